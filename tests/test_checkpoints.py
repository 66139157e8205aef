"""Checkpoints: digests that do not depend on the mesh, damage of every kind, a save that fails."""

import contextlib
import functools
import gc
import json
import re
import resource
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tsopsd_jax.distributed.sharding import make_mesh
from tsopsd_jax.judge.groups import Groups
from tsopsd_jax.rundir import digests
from tsopsd_jax.rundir.checkpoints import Checkpoints, DamagedError, SaveError, read_progress
from tsopsd_jax.rundir.run_state import RunProgress, RunState
from tsopsd_jax.types import Rollout, TrainState

# Coroutines and event loops that Orbax leaves where reading or writing failed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
EVERYWHERE = jax.sharding.PartitionSpec()


@pytest.fixture(autouse=True)
def collected():
    """What a test leaves is collected in it, not in one of another file that does not expect it."""
    yield
    gc.collect()


def groups() -> Groups:
    row = np.arange(4, dtype=np.int32)
    rollout = Rollout(np.ones((4, 7), np.int32), row, row + 3, np.full((4, 7), -0.5, np.float32), row > 2)
    return Groups(rollout, np.ones((2, 2), np.float32), np.zeros((2, 2), np.float32))


def run_at(step: int, *, mesh=None, spec=("fsdp", "tensor")) -> RunState:
    """A run with everything that a checkpoint can hold; a matrix large enough to have a file of its own."""
    mesh = mesh or make_mesh(data=1, devices=jax.devices()[:1])
    place = functools.partial(jax.NamedSharding, mesh)
    matrix = jax.random.normal(jax.random.key(step), (256, 128))
    params = {"embed": jax.device_put(matrix, place(jax.sharding.PartitionSpec(*spec))), "norm": jnp.ones((3,))}
    params["norm"] = jax.device_put(params["norm"], place(EVERYWHERE))
    state = TrainState(
        jax.device_put(jnp.int32(step), place(EVERYWHERE)), params, (jax.tree.map(lambda x: 0.1 * x, params),)
    )
    start = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    return RunState(state, RunProgress(phase=1, position=step, entropies_nats=(0.25, float("nan"))), groups(), start)


def like(run: RunState):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), run.state)


def equal(a: RunState, b: RunState) -> bool:
    """Bit for bit."""

    def content(run: RunState):
        arrays = [np.asarray(x) for x in jax.tree.leaves(run._replace(progress=None))]
        return repr(run.progress), [(x.dtype, x.shape, x.tobytes()) for x in arrays]

    return content(a) == content(b)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with the checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("checkpoints") / "all"
    checkpoints = Checkpoints(folder, keep=5)
    for step in (1, 2):
        checkpoints.save(run_at(step))
    checkpoints.close()
    return folder


@pytest.fixture
def damaged(saved, tmp_path):
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "damaged"))


def flip(file: Path, count: int = 64) -> None:
    data = bytearray(file.read_bytes())
    for at in range(len(data) // 2, min(len(data), len(data) // 2 + count)):
        data[at] ^= 0xFF
    file.write_bytes(data)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def largest(folder: Path) -> Path:
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


# ------------------------------------------------------------------ digests


@pytest.fixture
def blocks(monkeypatch):
    """Arrays of more than 16 KiB are summed block by block on a CPU."""
    monkeypatch.setattr(digests, "_BLOCK_BYTES", 16 << 10)
    digests._checksums.clear_cache()  # pyright: ignore[reportAttributeAccessIssue] - of every jitted function
    yield
    digests._checksums.clear_cache()  # pyright: ignore[reportAttributeAccessIssue] - of every jitted function


@pytest.mark.usefixtures("blocks")
def test_a_digest_in_blocks_is_the_same(monkeypatch):
    """8 blocks of a matrix of 128 KiB, or of each device's part, whose positions begin elsewhere; a prime number of
    rows; a bfloat16; several axes over one dimension."""
    meshes = [make_mesh(data=1, fsdp=4, tensor=2), make_mesh(data=2, fsdp=2, tensor=2), None]
    specs = [("fsdp", "tensor"), ("tensor", None), (None, ("fsdp", "tensor")), ()]
    trees = [run_at(3, mesh=mesh, spec=spec).state for mesh in meshes for spec in specs]
    trees += [{"x": jnp.arange(12_007.0).reshape(12_007, 1)}, {"x": jnp.arange(30_000).astype(jnp.bfloat16)}]
    cut = [digests.of_arrays(tree, "state") for tree in trees]
    monkeypatch.setattr(digests, "_BLOCK_BYTES", 1 << 30)
    digests._checksums.clear_cache()  # pyright: ignore[reportAttributeAccessIssue] - of every jitted function
    assert cut == [digests.of_arrays(tree, "state") for tree in trees]
    assert cut[:-2] == [cut[0]] * 12


def test_a_digest_takes_no_second_copy():
    """64 MiB on a CPU, whose compiler writes down what it sums: blocks of 8."""
    like = jax.ShapeDtypeStruct((16, 1024, 1024), jnp.float32)
    where = (("x", jax.sharding.SingleDeviceSharding(jax.devices()[0])),)
    compiled = digests._checksums.lower({"x": like}, where).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 10 << 20


def test_a_digest_does_not_depend_on_the_mesh_and_sees_every_word():
    meshes = [make_mesh(data=1, fsdp=4, tensor=2), make_mesh(data=2, fsdp=2, tensor=2), None]
    found = [digests.of_arrays(run_at(3, mesh=mesh).state, "state") for mesh in meshes]
    found.append(digests.of_arrays(run_at(3, mesh=meshes[0], spec=("tensor", None)).state, "state"))
    assert found == [found[0]] * 4
    assert {name.split(" ")[0] for name in found[0].values()} == {"int32[]", "float32[256,128]", "float32[3]"}
    x = np.asarray(run_at(3).state.params["embed"])
    of = {
        "as it is": x,
        "sign": -x,
        "transposed rows": x[::-1],
        "shifted": np.roll(x, 1),
        "shifted rows": np.roll(x, 1, 0),
    }
    for at in ((0, 0), (255, 127), (100, 3)):
        bits = x.copy().view(np.uint32)
        bits[at] ^= 1
        of[f"lowest bit of {at}"] = bits.view(np.float32)
    swapped = x.copy()
    swapped[0, 0], swapped[7, 9] = x[7, 9], x[0, 0]
    of["two swapped"] = swapped
    sums = {name: digests.of_arrays({"x": jnp.asarray(value)}, "")["/x"] for name, value in of.items()}
    assert len(set(sums.values())) == len(of)
    zeros = {digests.of_arrays({"x": jnp.asarray(z, jnp.float32)}, "")["/x"] for z in ([0.0, -0.0], [-0.0, 0.0])}
    assert len(zeros) == 2


def test_a_digests_value_is_that_of_its_formula():
    """In plain integers: words times nothing, xor positions times odd numbers, mixed, summed modulo 2^32."""
    x = np.asarray([[1.0, -2.5, 0.0], [3.0, 1e-30, np.inf]], np.float32)
    total = 0
    for (i, j), word in np.ndenumerate(x.view(np.uint32)):
        m = int(word) ^ (i * 0x9E3779B1) % 2**32 ^ (j * 0x85EBCA77) % 2**32
        m = (m ^ (m >> 15)) * 0x85EBCA6B % 2**32
        total += m ^ (m >> 13)
    assert digests.of_arrays({"x": jnp.asarray(x)}, "state") == {"state/x": f"float32[2,3] {total % 2**32:08x}"}


# ------------------------------------------------------------------- damage


def test_what_was_saved_is_restored_on_another_mesh(saved):
    checkpoints, want = Checkpoints(saved, keep=5), run_at(2)
    other = run_at(2, mesh=make_mesh(data=1, fsdp=4, tensor=2))
    for target in (want, other):
        got = checkpoints.restore(like(target), 2, start_like=target.state.params)
        assert equal(got, want)
        assert got.state.params["embed"].sharding == target.state.params["embed"].sharding
        assert got.start["embed"].dtype == jnp.bfloat16, "as it was saved"
    assert read_progress(saved).position == 2
    checkpoints.close()


DAMAGE = {
    "flipped bytes": (lambda d: flip(largest(d / "state")), r"digest of state/\S*embed is float32\[256,128\]"),
    "one flipped byte": (lambda d: flip(largest(d / "state"), 1), "digest of state/"),
    "flipped start policy": (lambda d: flip(largest(d / "start")), "digest of start/"),
    "truncated": (lambda d: truncate(largest(d / "state")), "it cannot be read"),
    "half of the index": (lambda d: truncate(d / "state" / "manifest.ocdbt"), "it cannot be read"),
    "a file is gone": (lambda d: largest(d / "state").unlink(), "it cannot be read"),
    "tree is gone": (lambda d: (d / "state" / "_METADATA").unlink(), "it cannot be read"),
    "no state": (lambda d: shutil.rmtree(d / "state"), "it cannot be read"),
    "no start policy": (lambda d: shutil.rmtree(d / "start"), "it cannot be read"),
    "no leftover": (lambda d: shutil.rmtree(d / "leftover"), "it cannot be read"),
    "no progress": (lambda d: shutil.rmtree(d / "progress"), "it cannot be read"),
    "no digests": (lambda d: shutil.rmtree(d / "digests"), "it cannot be read"),
    "torn progress": (lambda d: truncate(d / "progress" / "metadata"), "it cannot be read"),
    "another progress": (
        lambda d: (d / "progress" / "metadata").write_text(
            (d / "progress" / "metadata").read_text().replace('"phase": 1', '"phase": 0')
        ),
        "digest of progress is",
    ),
    "flipped digests": (lambda d: flip(d / "digests" / "metadata", 8), "it cannot be read|digest of"),
    "nothing in it": (lambda d: (shutil.rmtree(d), d.mkdir()), "it cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(kind, damaged):
    harm, says = DAMAGE[kind]
    harm(damaged / "2")
    checkpoints, one = Checkpoints(damaged, keep=5), run_at(1)
    with pytest.raises(DamagedError, match=rf"^checkpoint 2 is damaged: .*{says}") as error:
        checkpoints.restore(like(one), 2, start_like=one.state.params)
    assert "\n" not in str(error.value)
    run, lines = checkpoints.restore_newest(like(one), start_like=one.state.params)
    assert run is not None
    assert equal(run, one)
    [line] = lines
    assert re.match(rf"checkpoint 2 is damaged: .*({says})", line)
    progress = read_progress(damaged)
    assert progress is not None
    assert progress.position == (1 if "progress" in kind or "digests" in kind or "nothing" in kind else 2)
    assert checkpoints.steps() == [1, 2], "who only reads changes nothing"
    checkpoints.set_aside(run.step)
    assert checkpoints.steps() == [1]
    assert (damaged / "2.damaged").is_dir()
    checkpoints.save(run_at(2))
    checkpoints.close()
    assert equal(Checkpoints(damaged, keep=5).restore(like(one), 2, start_like=one.state.params), run_at(2))


def test_none_left_tells_of_all_and_nothing_is_set_aside(damaged):
    flip(largest(damaged / "1" / "state"))
    shutil.rmtree(damaged / "2" / "state")
    checkpoints = Checkpoints(damaged, keep=5)
    with pytest.raises(
        ValueError, match=r"checkpoint 2 is damaged: .*; checkpoint 1 is damaged: digest of .*; restore one"
    ):
        checkpoints.restore_newest(like(run_at(1)))
    assert checkpoints.steps() == [1, 2]
    checkpoints.close()


def test_another_models_arrays_are_no_damage(saved):
    checkpoints, run = Checkpoints(saved, keep=5), run_at(1)
    place = run.state.step.sharding
    wider = jax.ShapeDtypeStruct((257, 128), jnp.float32, sharding=place)
    for params, says in (
        (
            {"embed": wider, "norm": run.state.params["norm"]},
            r"holds state/params/embed as float32\[256,128\], expected float32\[257",
        ),
        ({"embed": run.state.params["embed"]}, "has state/params/norm: it is another model's"),
        ({**run.state.params, "more": wider}, "lacks state/params/more: it is another model's"),
    ):
        with pytest.raises(ValueError, match=rf"^checkpoint 2 of .* {says}") as error:
            checkpoints.restore(TrainState(run.state.step, params, run.state.opt_state), 2)
        assert not isinstance(error.value, DamagedError)
    checkpoints.close()


@pytest.mark.parametrize("error", [MemoryError(), PermissionError("no"), ValueError("UNAVAILABLE: the store is away")])
def test_what_says_nothing_of_the_checkpoint_is_no_damage(error, saved, monkeypatch):
    checkpoints, run = Checkpoints(saved, keep=5), run_at(1)

    def fails(*_, **__):
        raise error

    monkeypatch.setattr("tsopsd_jax.rundir.checkpoints._read", fails)
    with pytest.raises(type(error)) as raised:
        checkpoints.restore(like(run), 2)
    assert raised.value is error
    checkpoints.close()


# ------------------------------------------------------------- a failing save


@contextlib.contextmanager
def full_disk():
    """No file may grow beyond 4096 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def written(checkpoints: Checkpoints) -> None:
    """Look again and again, as the loop does, until the last save is over."""
    while checkpoints._writing is not None:
        checkpoints.check()
        time.sleep(0.01)


def test_a_save_that_fails_is_an_error_and_what_was_saved_before_stays(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    checkpoints.save(run_at(1))
    written(checkpoints)
    two = run_at(2)
    with full_disk():
        checkpoints.save(two)
        with pytest.raises(
            SaveError, match=r"step 2 could not be saved to .*; make room .* goes on from step 1$"
        ) as error:
            written(checkpoints)
        assert "File too large" in str(error.value)
        checkpoints.close()
    again = Checkpoints(tmp_path / "c", keep=1)
    assert again.steps() == [1]
    assert equal(again.restore(like(run_at(1)), 1), run_at(1)._replace(start=None))
    again.save(run_at(2))
    again.close()
    assert again.steps() == [2]
    assert json.loads((tmp_path / "c" / "2" / "progress" / "metadata").read_text())["position"] == 2


def test_a_save_that_cannot_be_read_is_a_failed_save(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    checkpoints.save(run_at(1))
    checkpoints._manager.wait_until_finished()
    truncate(tmp_path / "c/1/state/manifest.ocdbt")
    with pytest.raises(SaveError, match="step 1 could not be saved .*DATA_LOSS"):
        checkpoints.check()
    checkpoints.close()
