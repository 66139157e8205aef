"""The contract of every objective, the user's own included, and the library's metrics by hand."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tsopsd_jax import losses
from tsopsd_jax.distributed.sharding import make_mesh, replicated, row_sharding
from tsopsd_jax.learn.packing import pack
from tsopsd_jax.learn.update import make_gradient
from tsopsd_jax.objectives import OBJECTIVES, Objective, make_objective
from tsopsd_jax.types import Batch, LossOutput, Mean

OWN = '''
import jax.numpy as jnp
from tsopsd_jax import losses
from tsopsd_jax.objectives import Objective
from tsopsd_jax.types import LossOutput, Mean


def renyi(*, weight: float = 0.5) -> Objective:
    """Policy gradient with a bonus on the collision entropy -log sum p^2."""

    def stats(logits, tokens):
        logp = losses.log_softmax(logits)
        return {"logp": losses.token_logp(logits, tokens), "collision": -jnp.log(jnp.sum(jnp.exp(2 * logp), axis=-1))}

    def loss(stats, batch):
        per_token = -batch.advantage * stats["logp"] - weight * stats["collision"]
        return LossOutput(Mean.of(per_token, batch.mask), {"own/collision_nats": Mean.of(stats["collision"], batch.mask)})

    return Objective(stats, loss)
'''

CASES = {
    "dapo": ("dapo", {}),
    "ts_opsd-forward": ("ts_opsd", {"direction": "forward", "teacher_temperature": 1.2}),
    "ts_opsd-reverse": ("ts_opsd", {"direction": "reverse", "teacher_temperature": 1.2}),
    "own": ("own", {"weight": 0.3}),
}
B, L = 8, 7


@pytest.fixture(scope="module")
def own_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("own") / "mine.py"
    file.write_text(OWN)
    return f"{file}:renyi"


@pytest.fixture(scope="module", params=CASES)
def objective(request, own_file):
    name, settings = CASES[request.param]
    return make_objective(own_file if name == "own" else name, settings)


def test_the_cases_cover_every_entry():
    assert {name for name, _ in CASES.values()} - {"own"} == set(OBJECTIVES)


def fields():
    """Ragged rows: the rows' responses have 5, 1, 3, ... tokens, so no two halves of the batch count the same."""
    rng = np.random.default_rng(3)
    prompt = np.array([1, 2, 1, 3, 2, 1, 4, 1])[:, None]
    length = np.array([6, 3, 4, 7, 5, 2, 6, 7])[:, None]
    at = np.arange(L)[None, :]
    return {
        "tokens": np.where(at < length, rng.integers(0, 37, size=(B, L)), 0).astype(np.int32),
        "mask": (at >= prompt) & (at < length),
        "advantage": np.broadcast_to(rng.normal(size=(B, 1)), (B, L)).astype(np.float32),
        "old_logp": (-3 + 0.7 * rng.normal(size=(B, L))).astype(np.float32),
    }


def close(a, b):
    """Equal gradients and means; the float32 sums run in another order."""
    (grads_a, out_a, gap_a), (grads_b, out_b, gap_b) = jax.device_get((a, b))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-6), grads_a, grads_b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-5), (out_a, gap_a), (out_b, gap_b))


@pytest.fixture(scope="module")
def case(objective, tiny):
    """(traces of stats, jitted gradient of micro_batches and tile_tokens, batch, reference)."""
    traces = []

    def stats(logits, tokens):
        traces.append(logits.shape)
        return objective.stats(logits, tokens)

    counted = objective._replace(stats=stats)

    @functools.partial(jax.jit, static_argnames=("micro_batches", "tile_tokens", "tokenwise", "mesh"))
    def gradient(params, batch, micro_batches=1, tile_tokens=512, tokenwise=objective.tokenwise, mesh=None):
        asked, model = counted._replace(tokenwise=tokenwise), dataclasses.replace(tiny[0], mesh=mesh)
        made = make_gradient(model, asked, micro_batches=micro_batches, tile_tokens=tile_tokens)
        return made(params, batch)

    batch = Batch.of(**fields())
    return traces, gradient, batch, gradient(tiny[1], batch)


def test_loss_counts_the_mask_and_the_gradient_is_alive(case):
    _, _, batch, (grads, out, _) = case
    assert float(out.loss.count) == float(batch.mask.sum()) == 25.0  # 5 + 1 + 3 + 4 + 3 + 1 + 2 + 6
    for mean in out.metrics.values():
        assert float(mean.count) == 25.0
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(g).all()
        assert float(np.abs(g).max()) > 0, jax.tree_util.keystr(path)


def test_micro_batches_and_tiles_change_nothing(case, tiny):
    _, gradient, batch, reference = case
    close(gradient(tiny[1], batch, micro_batches=4, tile_tokens=4), reference)


def test_eight_devices_equal_one(case, tiny):
    _, gradient, batch, reference = case
    mesh = make_mesh(data=2, fsdp=4)
    spread = jax.device_put(batch, row_sharding(mesh))
    assert len(spread.tokens.sharding.device_set) == 8
    close(gradient(jax.device_put(tiny[1], replicated(mesh)), spread, mesh=mesh), reference)


def test_one_pass_equals_two(case, tiny):
    """What `tokenwise` promises; both of this file's own objectives keep it, the one that does not say so too."""
    _, gradient, batch, reference = case
    for tokenwise in (True, False):
        close(gradient(tiny[1], batch, tokenwise=tokenwise, tile_tokens=4), reference)


def test_packed_rows_equal_padded_ones(case, tiny):
    """Several responses in a row: no attention across, positions from 0, fewer pieces; also on eight devices."""
    _, gradient, batch, reference = case
    length = np.array([6, 3, 4, 7, 5, 2, 6, 7])
    packed = pack(batch, length, micro_batches=4)
    assert packed.tokens.shape == batch.tokens.shape
    assert np.asarray(packed.mask).any(axis=1).sum() == 6 < B  # 7 | 7 | 6 | 6 | 5 2 | 4 3
    close(gradient(tiny[1], jax.device_put(packed), micro_batches=4, tile_tokens=4, tokenwise=True), reference)
    mesh = make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    packed = jax.device_put(pack(batch, length, micro_batches=2), row_sharding(mesh))
    params = jax.device_put(tiny[1], replicated(mesh))
    close(gradient(params, packed, micro_batches=2, tokenwise=True, mesh=mesh), reference)


def test_row_order_and_junk_change_nothing_and_nothing_is_traced_again(case, tiny):
    traces, gradient, batch, reference = case
    before = len(traces)
    assert before > 0
    order = np.array([3, 1, 7, 0, 5, 2, 6, 4])
    close(gradient(tiny[1], jax.tree.map(lambda x: x[order], batch)), reference)
    junk = fields()
    mask = junk["mask"]
    after = np.arange(L)[None, :] > np.where(mask, np.arange(L)[None, :], 0).max(axis=1, keepdims=True)
    junk["tokens"] = np.where(after, 10**9, junk["tokens"])
    junk["advantage"] = np.where(mask, junk["advantage"], np.nan)
    junk["old_logp"] = np.where(mask, junk["old_logp"], -np.inf)
    again = gradient(tiny[1], Batch.of(**junk))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), jax.device_get(reference))
    assert len(traces) == before


@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_extreme_logits_stay_finite(objective, scale):
    batch = Batch.of(**fields())
    logits = scale * jnp.asarray(np.random.default_rng(0).normal(size=(B, L, 5)), jnp.float32)

    def total(logits):
        return objective.loss(objective.stats(logits, batch.tokens % 5), batch).loss.total

    value, grad = jax.value_and_grad(total)(logits)
    assert np.isfinite(value)
    assert np.isfinite(grad).all()


def batch_of(old_logp, advantage, mask):
    shape = np.zeros((1, len(mask)), np.int32)
    return Batch.of(
        tokens=shape,
        mask=np.asarray([mask]),
        advantage=np.asarray([advantage], np.float32),
        old_logp=np.asarray([old_logp], np.float32),
    )


def test_dapo_loss_and_metrics_by_hand():
    # ratios 1.5 (A 1: clipped, -1.28), 0.5 (A 1: -0.5), 0.5 (A -1: clipped, 0.8), 12 (A -1: dual, 10), 1.5 (A -1: 1.5),
    # 1 (A 0: 0); the last is masked. Sum of losses 10.52 over 6; ratios 17 / 6; clipped 2 / 6, dual 1 / 6.
    ratio = np.array([1.5, 0.5, 0.5, 12.0, 1.5, 1.0, 7.0])
    batch = batch_of(-np.log(ratio), [1, 1, -1, -1, -1, 0, 5], [True] * 6 + [False])
    stats = {"logp": jnp.zeros((1, 7)), "entropy": jnp.arange(7.0)[None]}
    out = OBJECTIVES["dapo"]().loss(stats, batch)
    np.testing.assert_allclose([out.loss.total, out.loss.count], [10.52, 6], rtol=1e-6)
    got = {name: float(mean.value) for name, mean in out.metrics.items()}
    want = {
        "policy/entropy_nats": 2.5,  # (0 + 1 + 2 + 3 + 4 + 5) / 6
        "policy/ratio_mean": 17 / 6,
        "policy/ratio_variance": (0.25 + 0.25 + 0.25 + 121 + 0.25 + 0) / 6,
        # r - 1 - ln r: 0.0945349 (1.5, twice), 0.1931472 (0.5, twice), 8.5150934 (12), 0
        "policy/sampler_kl_nats": (2 * 0.0945349 + 2 * 0.1931472 + 8.5150934) / 6,
        "policy/clipped_fraction": 2 / 6,
        "policy/dual_clipped_fraction": 1 / 6,
    }
    assert got == pytest.approx(want, rel=1e-6)


def test_dapo_settings_reach_the_loss():
    batch = batch_of(-np.log([2.0, 0.1, 9.0]), [1, -1, -1], [True] * 3)
    stats = {"logp": jnp.zeros((1, 3)), "entropy": jnp.zeros((1, 3))}
    out = OBJECTIVES["dapo"](clip_low=0.4, clip_high=0.1, clip_ratio_c=3.0).loss(stats, batch)
    np.testing.assert_allclose(out.loss.total, -1.1 + 0.6 + 3.0, rtol=1e-6)
    assert float(out.metrics["policy/clipped_fraction"].total) == 2.0
    assert float(out.metrics["policy/dual_clipped_fraction"].total) == 1.0


@pytest.mark.parametrize(("direction", "want"), [("forward", 0.0329956813), ("reverse", 0.0307377859)])
def test_ts_opsd_by_hand(direction, want):
    # Logits (ln 3, 0), T = 2: the values of test_losses. Masked token: uniform, KL 0, entropy ln 2, not counted.
    objective = OBJECTIVES["ts_opsd"](direction=direction, teacher_temperature=2.0)
    logits = jnp.asarray([[[np.log(3.0), 0.0], [np.log(3.0), 0.0], [0.0, 0.0]]], jnp.float32)
    batch = batch_of([0] * 3, [0] * 3, [True, True, False])
    out = objective.loss(objective.stats(logits, batch.tokens), batch)
    np.testing.assert_allclose([out.loss.total, out.loss.count], [2 * want, 2], rtol=1e-5)
    assert set(out.metrics) == {"policy/entropy_nats", f"distil/{direction}_kl_nats"}
    np.testing.assert_allclose(out.metrics["policy/entropy_nats"].value, 0.5623351, rtol=1e-5)
    np.testing.assert_allclose(out.metrics[f"distil/{direction}_kl_nats"].value, want, rtol=1e-5)


def test_ts_opsd_default_is_the_papers():
    got = OBJECTIVES["ts_opsd"]()
    logits = jnp.asarray([[[np.log(3.0), 0.0]]], jnp.float32)
    batch = batch_of([0], [0], [True])
    out = got.loss(got.stats(logits, batch.tokens), batch)
    np.testing.assert_allclose(out.loss.value, 0.0033308171, rtol=1e-4)  # forward, T = 1.2


def test_errors_name_what_is_wrong(tmp_path, own_file):
    cases = [
        ("ppo", {}, r"objective 'ppo' is unknown; known: dapo, ts_opsd"),
        ("dapo", {"clip_hi": 1.0}, r"objective 'dapo': unknown hyperparameter 'clip_hi'; did you mean 'clip_high'\?"),
        ("dapo", {"clip_low": -0.1}, "clip_low=-0.1"),
        ("dapo", {"clip_ratio_c": 1.1}, "clip_ratio_c=1.1"),
        ("ts_opsd", {"direction": "sideways"}, "direction must be 'forward' or 'reverse', got 'sideways'"),
        ("ts_opsd", {"teacher_temperature": 0.0}, "teacher_temperature must be positive"),
        (f"{tmp_path}/none.py:f", {}, "none.py does not exist"),
        (own_file.replace("renyi", "shannon"), {}, "has no function 'shannon'"),
        (own_file, {"wait": 1}, "unknown hyperparameter 'wait'; did you mean 'weight'"),
        (own_file, {"x": 1}, "unknown hyperparameter 'x'; known: weight"),
    ]
    for name, settings, words in cases:
        with pytest.raises(ValueError, match=words):
            make_objective(name, settings)


def test_an_objective_is_two_functions():
    objective = Objective(lambda z, _: {"h": losses.entropy(z)}, lambda s, b: LossOutput(Mean.of(-s["h"], b.mask), {}))
    batch = batch_of([0], [0], [True])
    out = objective.loss(objective.stats(jnp.zeros((1, 1, 4)), batch.tokens), batch)
    np.testing.assert_allclose(out.loss.value, -np.log(4), rtol=1e-6)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def f(:", "importing it raised SyntaxError"),
        ("import no_such_module_at_all", "importing it raised ModuleNotFoundError: No module named"),
        ("1 / 0", "importing it raised ZeroDivisionError"),
        ("raise SystemExit(3)", "importing it raised SystemExit: 3"),
        ("f = 3", "has no function 'f'"),
        ("def f():\n    return {}['k']", "its function raised KeyError: 'k'"),
        ("def f():\n    return 3", "expected its function to return an Objective of two functions, got 3"),
        (
            "from tsopsd_jax.objectives import Objective\ndef f():\n    return Objective(1, 2)",
            "Objective of two functions",
        ),
    ],
)
def test_files_of_ones_own_that_cannot_be_used_are_named(source, words, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(source)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        make_objective(f"{file}:f", {})
    assert "mine.py" in str(error.value)


def test_a_file_of_ones_own_is_python(tmp_path):
    (tmp_path / "mine.txt").write_text(OWN)
    with pytest.raises(ValueError, match=r"mine.txt: expected a Python file"):
        make_objective(f"{tmp_path / 'mine.txt'}:renyi", {})
