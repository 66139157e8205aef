"""Two processes with four devices each: the same run as one process with eight devices and as one device; what happens
when one of them is asked to stop, or dies; what each reads of the weights."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from tsopsd_jax.config import load_config
from tsopsd_jax.config.build import make_phase
from tsopsd_jax.config.places import model_folder
from tsopsd_jax.data.countdown import distinct_problems
from tsopsd_jax.distributed.sharding import make_mesh
from tsopsd_jax.learn.update import abstract_state
from tsopsd_jax.model import Qwen3, load_pretrained
from tsopsd_jax.model.hf_config import read_config
from tsopsd_jax.model.packaged import PACKAGED_MODEL
from tsopsd_jax.rundir import digests
from tsopsd_jax.rundir.checkpoints import Checkpoints
from tsopsd_jax.rundir.log import read_evaluations, read_metrics

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parents[1]
HEARTBEAT_S = 20  # a busy machine must not look like a dead process
EIGHT = {"data": 2, "fsdp": 2, "tensor": 2}


def config(folder: Path) -> dict:
    """Ten steps through all kinds of phases, with evaluation; fewer slots than rows, several pieces of an update."""
    problems = distinct_problems(48, seed=5, held_out=False)
    file = folder / "problems.jsonl"
    file.write_text("".join(json.dumps({"problem": p, "answer": a}) + "\n" for p, a in problems))
    data = {"name": "jsonl", "path": str(file), "verifier": "countdown", "max_prompt_tokens": 7}
    common = {
        # A large epsilon: AdamW would turn a gradient of pure rounding into a step of full size.
        "optimizer": {"learning_rate": 2e-4, "epsilon": 1e-3},
        "max_response_tokens": 19,
        "micro_batches": 2,
    }
    rl = common | {
        "objective": {"name": "dapo"},
        "prompts_per_step": 8,
        "responses_per_prompt": 4,
        "rows_at_once": 16,
        "reward": {"overlong_buffer_tokens": 8, "max_generation_batches": 2, "surplus": "keep", "on_shortage": "fill"},
    }
    reheat = rl | {"objective": {"name": "ts_opsd"}, "reward": None, "rows_at_once": None}
    return {
        "model": {"path": PACKAGED_MODEL},
        "data": data,
        "mesh": EIGHT,
        # As the phases sample: most programs are then compiled once.
        "evaluation": {
            "data": data | {"first": 6},
            "samples": 4,
            "sampling": {"top_p": 1.0},
            "max_response_tokens": 19,
            "rows_at_once": 16,
        },
        "checkpoint_every_steps": 1,
        "keep_checkpoints": 20,
        "phases": [
            rl | {"name": "rl", "stop": {"steps": 3}},
            reheat | {"name": "reheat", "stop": {"steps": 2}},
            reheat | {"name": "reheat-in-stages", "rows_at_once": 16, "stop": {"steps": 2}},
            rl | {"name": "rl-again", "stop": {"steps": 3}},
        ],
    }


def spawn(*arguments: str, devices: int) -> subprocess.Popen:
    env = os.environ | {"XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *arguments], env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def flags() -> list[list[str]]:
    """What tells two processes of each other."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    return [["--coordinator", coordinator, "--processes", "2", "--process", str(i)] for i in range(2)]


def train(file: Path, run: Path, *more: str, devices: int = 8) -> subprocess.Popen:
    return spawn("-m", "tsopsd_jax", "train", str(file), "--run-dir", str(run), *more, devices=devices)


def pair(file: Path, run: Path, devices: int = 4) -> list[subprocess.Popen]:
    return [train(file, run, *each, "--heartbeat-s", str(HEARTBEAT_S), devices=devices) for each in flags()]


def ends(*processes: subprocess.Popen, codes: tuple[int, ...]) -> list[str]:
    try:
        said = [p.communicate(timeout=900)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
            p.wait()
    assert tuple(p.returncode for p in processes) == codes, "\n".join(text[-3000:] for text in said)
    return said


def until_step(run: Path, step: int, *processes: subprocess.Popen) -> None:
    """Wait for a line of the log while the processes run."""
    log = run / "metrics.jsonl"
    while not (log.is_file() and log.read_bytes().count(b"\n") >= step):
        if any(p.poll() is not None for p in processes):
            ends(*processes, codes=(0, 0))
            pytest.fail("the run ended before the test could interrupt it")
        time.sleep(0.05)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    (folder / "run.yaml").write_text(yaml.safe_dump(config(folder)))
    return folder / "run.yaml"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, file):
    """The run directories of one device, of eight in one process, and of two processes with four each."""
    folder = tmp_path_factory.mktemp("runs")
    one = ("--set", "mesh.data=1", "--set", "mesh.fsdp=1", "--set", "mesh.tensor=1")
    ends(train(file, folder / "one", *one, devices=1), codes=(0,))
    ends(train(file, folder / "eight"), codes=(0,))
    ends(*pair(file, folder / "pair"), codes=(0, 0))
    return folder


def params_of(run: Path, file: Path, step: int, **mesh):
    """A checkpoint's parameters, restored onto a mesh of this process's eight devices."""
    settings = load_config(file, [])
    model = Qwen3(read_config(model_folder(settings) / "config.json"))
    count = int(np.prod(list(mesh.values())))
    like = abstract_state(
        model, make_phase(settings.phases[0]).optimizer, make_mesh(**mesh, devices=jax.devices()[:count])
    )
    checkpoints = Checkpoints(run / "checkpoints", keep=20)
    params = checkpoints.restore(like, step).state.params
    checkpoints.close()
    return params


def test_two_processes_train_like_one_process_and_like_one_device(runs, file):
    lines = {name: read_metrics(runs / name) for name in ("one", "eight", "pair")}
    assert [line["step"] for line in lines["pair"]] == list(range(1, 11))
    exact = ("phase", "rollout/tokens", "rollout/length_mean_tokens", "reward/mean", "reward/accuracy_fraction",
             "rollout/groups_kept_fraction", "rollout/generation_batches", "rollout/groups_left_over", "loss/tokens",
             "optim/skipped", "learner/useful_fraction")  # fmt: skip
    close = ("loss/total", "policy/entropy_nats", "optim/grad_norm")
    for other in ("one", "eight"):
        for a, b in zip(lines["pair"], lines[other], strict=True):
            assert a.keys() == b.keys()
            for name in exact:
                assert a.get(name) == b.get(name), (other, a["step"], name)
            for name in close:
                assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), (other, a["step"], name)
        for a, b in zip(read_evaluations(runs / "pair"), read_evaluations(runs / other), strict=True):
            assert a.pop("entropy_nats") == pytest.approx(b.pop("entropy_nats"), rel=1e-3)
            assert a == b
    one, two = (params_of(runs / name, file, 10, data=1, fsdp=1, tensor=1) for name in ("one", "pair"))
    start = load_pretrained(model_folder(load_config(file, [])))[1]
    moved = max(float(np.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (start, two)), strict=True))
    assert moved > 3e-4, "the runs should have learned something"
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one, two)


def test_a_checkpoint_of_two_processes_is_bit_equal_on_any_mesh(runs, file):
    meshes = ({"data": 1, "fsdp": 8, "tensor": 1}, EIGHT, {"data": 1, "fsdp": 1, "tensor": 1})
    restored = [jax.device_get(params_of(runs / "pair", file, 10, **mesh)) for mesh in meshes]
    for other in restored[1:]:
        jax.tree.map(np.testing.assert_array_equal, restored[0], other)


def test_a_death_ends_the_others_a_signal_to_one_stops_all_and_another_machine_goes_on(runs, file, tmp_path):
    run = tmp_path / "run"
    first = pair(file, run)
    until_step(run, 2, *first)
    first[1].kill()
    killed = time.monotonic()
    said = ends(*first, codes=(5, -signal.SIGKILL))
    assert time.monotonic() - killed < HEARTBEAT_S + 5
    assert "process 1 of 2 (host" in said[0]
    assert "died; start all processes again with the same command" in said[0]

    second = pair(file, run)
    until_step(run, 5, *second)
    second[1].send_signal(signal.SIGTERM)
    said = ends(*second, codes=(4, 4))
    steps = [text[text.index("SIGTERM: ") :].split(";")[0] for text in said]
    assert steps[0] == steps[1]
    assert re.fullmatch(
        r"SIGTERM: (saved|left the rollout after|left the evaluation of|took no step after) step \d", steps[0]
    )

    mesh = ("--set", "mesh.data=1", "--set", "mesh.fsdp=2", "--set", "mesh.tensor=1")
    said = ends(train(file, run, *mesh, devices=2), codes=(0,))
    assert "goes on with changed settings: mesh.data: 2 -> 1; mesh.tensor: 2 -> 1" in said[0]
    for a, b in zip(read_metrics(run), read_metrics(runs / "one"), strict=True):
        assert a["rollout/tokens"] == b["rollout/tokens"]
        assert a["policy/entropy_nats"] == pytest.approx(b["policy/entropy_nats"], rel=1e-3)


REWARD = """
from tsopsd_jax.rewards import verify_countdown

def right_or_hopeful(response, answer, row):
    return {"right": verify_countdown(response, answer), "hopeful": row["hope"] * len(response)}
"""


def config_of_methods(folder: Path) -> dict:
    """Three steps of two updates, with a KL to the phase's start and rewards of a file's function."""
    problems = distinct_problems(16, seed=7, held_out=False)
    rows = [{"problem": p, "answer": a, "hope": 0.01 * i} for i, (p, a) in enumerate(problems)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARD)
    return {
        "model": {"path": PACKAGED_MODEL},
        "data": {
            "name": "jsonl",
            "path": str(folder / "problems.jsonl"),
            "verifier": f"{folder / 'reward.py'}:right_or_hopeful",
            "max_prompt_tokens": 7,
        },
        "mesh": {"data": 2, "fsdp": 2},
        "phases": [
            {
                "name": "rl",
                "objective": {"name": "dapo", "hyperparameters": {"kl_coefficient": 0.5}},
                "reference": "start",
                "updates_per_rollout": 2,
                "prompts_per_step": 8,
                "responses_per_prompt": 4,
                "max_response_tokens": 19,
                "reward": {},
                "optimizer": {"learning_rate": 1e-3, "epsilon": 1e-3},
                "stop": {"steps": 3},
            }
        ],
    }


def test_two_processes_share_a_reference_rewards_of_ones_own_and_several_updates(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config_of_methods(tmp_path)))
    ends(train(file, tmp_path / "one", devices=4), codes=(0,))
    ends(*pair(file, tmp_path / "pair", devices=2), codes=(0, 0))
    lines = [read_metrics(tmp_path / name) for name in ("pair", "one")]
    assert [line["step"] for line in lines[0]] == [1, 2, 3]
    for two, one in zip(*lines, strict=True):
        assert two.keys() == one.keys()
        for name in ("rollout/tokens", "reward/mean", "reward/right_mean", "reward/hopeful_mean", "optim/updates"):
            assert two[name] == one[name], (two["step"], name)
        for name in ("loss/total", "policy/entropy_nats", "optim/grad_norm", "policy/reference_kl_nats",
                     "last_update/reference_kl_nats", "last_update/ratio_variance"):  # fmt: skip
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-7), (two["step"], name)
    first, *_, last = lines[0]
    assert first["optim/updates"] == 2
    assert first["reward/hopeful_mean"] > 0.1
    assert 0 < first["last_update/reference_kl_nats"] < last["policy/reference_kl_nats"], "the reference stays"
    assert last["last_update/ratio_variance"] > 1e-4


WORKER = """
import json, sys, traceback
from pathlib import Path
import jax, numpy as np
from tsopsd_jax.distributed import processes
from tsopsd_jax.model import hf_layout, load_pretrained, save_pretrained
from tsopsd_jax.distributed.sharding import make_mesh

def explain(error):
    traceback.print_exception(error)
    return 1

model_dir, out, flags = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
with processes.joined(coordinator=flags[1], processes=2, process=int(flags[5]), heartbeat_s=20, stall_s=0,
                      explain=explain):
    read, original = [], hf_layout.WeightLayout.read
    def counting(self, tensor, shape, index):
        class Counted:
            def __getitem__(self, cut):
                part = tensor[cut]
                read.append(part.nbytes)
                return part
        return original(self, Counted(), shape, index)
    hf_layout.WeightLayout.read = counting
    model, params = load_pretrained(model_dir, mesh=make_mesh(fsdp=8))
    save_pretrained(out / "model", model, params)
    facts = {"read": sum(read), "largest": max(read), "rows": processes.divided(lambda i: [i, jax.process_index()], 5)}
    (out / f"{jax.process_index()}.json").write_text(json.dumps(facts))
    if flags[5] == "1":
        raise RuntimeError("a bad verifier")
    processes.exchange(0)  # would wait for ever
"""


def test_each_process_reads_its_part_writes_one_export_and_an_exception_ends_both(tmp_path):
    source = ROOT / "tsopsd_jax" / "assets" / PACKAGED_MODEL
    said = ends(*(spawn("-c", WORKER, str(source), str(tmp_path), *each, devices=4) for each in flags()), codes=(5, 1))
    assert "failed: RuntimeError: a bad verifier" in said[0]
    model, params = load_pretrained(source)
    jax.tree.map(np.testing.assert_array_equal, params, load_pretrained(tmp_path / "model")[1])
    # Matrices are divided over fsdp, and four of its eight parts are a process's: one half.
    # The norms are whole everywhere.
    sizes = {jax.tree_util.keystr(path): leaf.nbytes for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    norms = sum(size for name, size in sizes.items() if "norm" in name)
    matrices, c = sum(sizes.values()) - norms, model.config
    for i in range(2):
        facts = json.loads((tmp_path / f"{i}.json").read_text())
        assert facts["rows"] == [[0, 0], [1, 1], [2, 0], [3, 1], [4, 0]]
        assert facts["read"] == matrices // 2 + norms
        assert facts["largest"] == c.intermediate_size * c.hidden_size * 4 // 8, "a device's part of a layer's matrix"


SAVER = """
import json, sys, traceback
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from tsopsd_jax.distributed import processes
from tsopsd_jax.distributed.sharding import make_mesh
from tsopsd_jax.rundir import digests
from tsopsd_jax.rundir.checkpoints import Checkpoints
from tsopsd_jax.rundir.run_state import RunProgress, RunState
from tsopsd_jax.types import TrainState

def explain(error):
    traceback.print_exception(error)
    return 1

def state(step, **mesh):
    place = jax.NamedSharding(make_mesh(**mesh), jax.sharding.PartitionSpec("fsdp", "tensor"))
    params = {"embed": jax.jit(lambda: jax.random.normal(jax.random.key(step), (512, 256)), out_shardings=place)()}
    everywhere = jax.NamedSharding(place.mesh, jax.sharding.PartitionSpec())
    return TrainState(jax.jit(lambda: jnp.int32(step), out_shardings=everywhere)(), params, ())

out, flags = Path(sys.argv[1]), sys.argv[2:]
joining = {"coordinator": flags[1], "processes": 2, "process": int(flags[5])}
with processes.joined(**joining, heartbeat_s=60, stall_s=0, explain=explain):
    checkpoints = Checkpoints(out / "c", keep=9)
    for step in (1, 2, 3):
        checkpoints.save(RunState(state(step, data=2, fsdp=4), RunProgress(position=step)))
    checkpoints.close()
    mine = digests.of_arrays(vars(state(1, data=2, fsdp=4)), "state")
    if processes.is_first():
        for step, harm in ((2, "flip"), (3, "truncate")):
            data = max((out / "c" / str(step) / "state" / "ocdbt.process_1").rglob("*"), key=lambda f: f.stat().st_size)
            content = bytearray(data.read_bytes())
            if harm == "flip":
                content[len(content) // 2] ^= 1
            data.write_bytes(content if harm == "flip" else content[: len(content) // 2])
    processes.exchange(None)
    checkpoints = Checkpoints(out / "c", keep=9)
    run, lines = checkpoints.restore_newest(state(0, data=1, fsdp=8))
    same = digests.of_arrays(vars(run.state), "state") == mine
    checkpoints.set_aside(int(run.state.step))
    facts = {"digests": mine, "lines": lines, "step": int(run.state.step), "same": same, "left": checkpoints.steps()}
    (out / f"{jax.process_index()}.json").write_text(json.dumps(facts))
    checkpoints.close()
"""


def test_processes_agree_on_digests_and_on_a_checkpoint_of_which_one_cannot_read_its_part(tmp_path):
    ends(*(spawn("-c", SAVER, str(tmp_path), *each, devices=4) for each in flags()), codes=(0, 0))
    one, other = (json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2))
    assert one == other
    embed = {"embed": jax.random.normal(jax.random.key(1), (512, 256))}
    assert one.pop("digests")["state/params/embed"] == digests.of_arrays(embed, "state/params")["state/params/embed"]
    newest, middle = one.pop("lines")
    assert re.match("checkpoint 3 is damaged: it cannot be read", newest)
    assert re.match(r"checkpoint 2 is damaged: digest of state/params/embed is float32\[512,256\]", middle)
    assert one == {"step": 1, "same": True, "left": [1]}
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["1", "2.damaged", "3.damaged"]
