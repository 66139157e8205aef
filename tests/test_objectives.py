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
from tsopsd_jax.head import call_stats
from tsopsd_jax.learn.packing import pack
from tsopsd_jax.learn.update import ReferencePolicy, make_gradient, whole_stats
from tsopsd_jax.objectives import OBJECTIVES, Objective, make_objective, with_start_kl
from tsopsd_jax.objectives.base import token_hash
from tsopsd_jax.types import SAMPLING_TEMPERATURE, Batch, LossOutput, Mean

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
        metrics = {"own/collision_nats": Mean.of(stats["collision"], batch.mask)}
        return LossOutput(Mean.of(per_token, batch.mask), metrics)

    return Objective(stats, loss)
'''

CASES = {
    "dapo": ("dapo", {}),
    "ts_opsd-forward": ("ts_opsd", {"direction": "forward", "teacher_temperature": 1.2}),
    "ts_opsd-reverse": ("ts_opsd", {"direction": "reverse", "teacher_temperature": 1.2}),
    "dapo-hot": ("dapo", {"policy_temperature": 1.2}),
    "dapo-schedule": ("dapo", {"policy_temperature": 0.8, "final_temperature": 1.5}),
    "tampo": ("tampo", {"temperatures": [0.8, 1.0, 1.3]}),
    "ts_opsd-frozen": ("ts_opsd", {"teacher": "frozen", "teacher_temperature": 1.5}),
    "dapo-k1": ("dapo", {"kl_coefficient": 0.3, "kl_estimator": "k1"}),
    "dapo-k3": ("dapo", {"kl_coefficient": 0.3, "kl_estimator": "k3"}),
    "dapo-exact": ("dapo", {"kl_coefficient": 0.3, "kl_estimator": "exact", "policy_temperature": 1.2}),
    "opd": ("opd", {}),
    "eopd": ("eopd", {"threshold_nats": 1.5}),
    "jsd-frozen": ("jsd", {"beta": 0.3, "teacher": "frozen"}),
    "top_entropy-start_kl": ("top_entropy", {"fraction": 0.4}),
    "jsd": ("jsd", {"beta": 0.3, "teacher_temperature": 1.5}),
    "entropy_bonus": ("entropy_bonus", {"coefficient": 0.1}),
    "adaptive_entropy_bonus": ("adaptive_entropy_bonus", {"initial": 0.1}),
    "clip_cov": ("clip_cov", {"fraction": 0.2, "cov_low": 0.0}),
    "kl_cov": ("kl_cov", {"fraction": 0.2, "anneal_updates": 10}),
    "top_entropy": ("top_entropy", {"fraction": 0.4}),
    "entropy_advantage": ("entropy_advantage", {}),
    "repo_r": ("repo_r", {"zeta": 0.05}),
    "adapo": ("adapo", {}),
    "bapo": ("bapo", {}),
    "aent": ("aent", {"coefficient": 0.01, "clamp_fraction": 0.3}),
    "aer": ("aer", {"initial": 0.1}),
    "own": ("own", {"weight": 0.3}),
}
SEES_ROWS = ("tampo",)
"""Cases whose loss sees whole rows (`tokenwise=False`): they have no one pass, and no packed rows."""
COUNTS_ROWS: tuple[str, ...] = ()
"""Those of them whose loss is a mean over responses: it counts rows that have a token, not tokens."""
B, L = 8, 7


@pytest.fixture(scope="module")
def own_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("own") / "mine.py"
    file.write_text(OWN)
    return f"{file}:renyi"


@pytest.fixture(scope="module", params=CASES)
def objective(request, own_file):
    name, settings = CASES[request.param]
    made = make_objective(own_file if name == "own" else name, settings)
    return with_start_kl(made) if request.param.endswith("start_kl") else made


def test_the_cases_cover_every_entry():
    names = {name for name, _ in CASES.values()}
    assert sorted(set(OBJECTIVES) - names) == [], "CASES, in this file, lacks an entry with hyperparameters for these"
    assert names - {"own"} <= set(OBJECTIVES)


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

    turned = {SAMPLING_TEMPERATURE} & set(objective.control.init if objective.control else ())

    def stats(logits, tokens, *reference, **temperature):
        assert len(reference) == objective.reference
        assert set(temperature) == turned
        traces.append(logits.shape)
        return objective.stats(logits, tokens, *reference, **temperature)

    counted = objective._replace(stats=stats)

    @functools.partial(jax.jit, static_argnames=("micro_batches", "tile_tokens", "tokenwise", "mesh"))
    def gradient(params, batch, micro_batches=1, tile_tokens=512, tokenwise=objective.tokenwise, mesh=None):
        asked, model = counted._replace(tokenwise=tokenwise), dataclasses.replace(tiny[0], mesh=mesh)
        cut = {"micro_batches": micro_batches, "tile_tokens": tile_tokens}
        knobs = asked.control.init if asked.control else {}
        batch = dataclasses.replace(batch, knobs={name: jnp.float32(value) for name, value in knobs.items()})
        frozen = ReferencePolicy(model, jax.tree.map(lambda x: 0.8 * x, params)) if asked.reference else None
        if asked.select is not None:
            batch = asked.select(whole_stats(model, params, batch, asked, reference=frozen, **cut), batch)
        return make_gradient(model, asked, **cut)(params, batch, frozen)

    batch = Batch.of(**fields())
    return traces, gradient, batch, gradient(tiny[1], batch)


def test_loss_counts_the_mask_and_the_gradient_is_alive(case, request):
    _, _, batch, (grads, out, _) = case
    assert float(batch.mask.sum()) == 25.0  # 5 + 1 + 3 + 4 + 3 + 1 + 2 + 6
    assert float(out.loss.count) == (B if request.node.callspec.params["objective"] in COUNTS_ROWS else 25.0)
    for name, mean in out.metrics.items():
        assert float(mean.count) == (B if name.startswith("tampo/") else 25.0), name
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(g).all()
        assert float(np.abs(g).max()) > 0, jax.tree_util.keystr(path)


def test_micro_batches_and_tiles_change_nothing(case, tiny):
    _, gradient, batch, reference = case
    close(gradient(tiny[1], batch, micro_batches=4, tile_tokens=4), reference)


@pytest.mark.slow
def test_eight_devices_equal_one(case, tiny):
    _, gradient, batch, reference = case
    mesh = make_mesh(data=2, fsdp=4)
    spread = jax.device_put(batch, row_sharding(mesh))
    assert len(spread.tokens.sharding.device_set) == 8
    close(gradient(jax.device_put(tiny[1], replicated(mesh)), spread, mesh=mesh), reference)


@pytest.fixture
def any_arrangement(request):
    """Nothing, for the cases whose tokens may lie in any arrangement."""
    if request.node.callspec.params["objective"] in SEES_ROWS:
        pytest.skip("the loss sees whole rows")


@pytest.mark.slow
@pytest.mark.usefixtures("any_arrangement")
def test_one_pass_equals_two(case, tiny):
    """What `tokenwise` promises; both of this file's own objectives keep it, the one that does not say so too."""
    _, gradient, batch, reference = case
    for tokenwise in (True, False):
        close(gradient(tiny[1], batch, tokenwise=tokenwise, tile_tokens=4), reference)


@pytest.mark.slow
@pytest.mark.usefixtures("any_arrangement")
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

    knobs = objective.control.init if objective.control else {}
    batch = dataclasses.replace(batch, knobs={name: jnp.float32(value) for name, value in knobs.items()})
    reference = -logits if objective.reference else None

    def stats(logits):
        return call_stats(objective.stats, logits, batch.tokens % 5, reference, batch.knobs.get(SAMPLING_TEMPERATURE))

    if objective.select is not None:
        batch = objective.select(stats(logits), batch)

    def total(logits):
        return objective.loss(stats(logits), batch).loss.total

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
        ("ppo", {}, r"objective 'ppo' is unknown; known: dapo, ts_opsd, "),
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


# ------------------------------------------------------------------ methods by hand


def selected(objective, stats, batch):
    """(batch as `select` leaves it, with the knobs of the control, and the loss)."""
    knobs = objective.control.init if objective.control else {}
    batch = dataclasses.replace(batch, knobs={name: jnp.float32(value) for name, value in knobs.items()})
    if objective.select is not None:
        batch = objective.select(stats, batch)
    return batch, objective.loss(stats, batch)


def test_dapo_at_a_policy_temperature_by_hand():
    # Logits (2 ln 3, 0), T = 2: z / T = (ln 3, 0), p = (3/4, 1/4). log p(0) = ln 0.75; H at T: 0.562335.
    # At temperature 1: p = (0.9, 0.1): H = -(0.9 ln 0.9 + 0.1 ln 0.1) = 0.325083.
    objective = OBJECTIVES["dapo"](policy_temperature=2.0)
    assert objective.policy_temperature == 2.0
    logits = jnp.asarray([[[2 * np.log(3.0), 0.0]]], jnp.float32)
    batch = batch_of([np.log(0.75)], [2.0], [True])

    def loss(logits):
        out = objective.loss(objective.stats(logits, batch.tokens), batch)
        return out.loss.total, out

    (value, out), grad = jax.value_and_grad(loss, has_aux=True)(logits)
    np.testing.assert_allclose(value, -2.0, rtol=1e-6)  # ratio 1
    # d(-A r)/dz = -A (1[token] - p) / T = -2 (1/4, -1/4) / 2
    np.testing.assert_allclose(grad[0, 0], [-0.25, 0.25], rtol=1e-5)
    np.testing.assert_allclose(out.metrics["policy/entropy_nats"].value, 0.325083, rtol=1e-5)
    np.testing.assert_allclose(out.metrics["policy/entropy_at_policy_temperature_nats"].value, 0.562335, rtol=1e-5)
    with pytest.raises(ValueError, match="policy_temperature must be positive, got 0"):
        OBJECTIVES["dapo"](policy_temperature=0.0)


def test_entropy_bonus_by_hand():
    # Surrogate -A r = -1 at ratio 1; entropies 0.5 and 0.25: total = -1 - 1 - 0.1 (0.75) = -2.075.
    batch = batch_of([0.0, 0.0, 0.0], [1.0, 1.0, 9.0], [True, True, False])
    stats = {"logp": jnp.zeros((1, 3)), "entropy": jnp.asarray([[0.5, 0.25, 7.0]])}
    _, out = selected(OBJECTIVES["entropy_bonus"](coefficient=0.1), stats, batch)
    np.testing.assert_allclose([out.loss.total, out.loss.count], [-2.075, 2], rtol=1e-6)


def test_adaptive_entropy_bonus_turns_its_coefficient():
    objective = OBJECTIVES["adaptive_entropy_bonus"](target_nats=0.2, step=0.005, initial=0.01, most=0.013)
    control = objective.control
    assert control.init == {"coefficient": 0.01}
    below, above = {"policy/entropy_nats": 0.19}, {"policy/entropy_nats": 0.2}
    assert control.update({"coefficient": 0.005}, below) == {"coefficient": 0.01}
    assert control.update({"coefficient": 0.01}, below) == {"coefficient": 0.013}, "bounded above"
    assert control.update({"coefficient": 0.004}, above) == {"coefficient": 0.0}, "and below"
    batch = batch_of([0.0], [1.0], [True])
    _, out = selected(objective, {"logp": jnp.zeros((1, 1)), "entropy": jnp.ones((1, 1))}, batch)
    np.testing.assert_allclose(out.loss.total, -1 - 0.01, rtol=1e-6)


COVARIANCE = {
    # logp -1, -3, -5, -3 (mean -3), A 2, 2, -2, -2 (mean 0): centred products 2 x 2 = 4, 0, -2 x -2 = 4, 0; the last is
    # masked.
    "logp": jnp.asarray([[-1.0, -3.0, -5.0, -3.0, -99.0]]),
    "entropy": jnp.asarray([[0.1, 0.9, 0.2, 0.8, 9.0]]),
}
ADVANTAGE, RESPONSE = [2.0, 2.0, -2.0, -2.0, 50.0], [True] * 4 + [False]


def test_clip_cov_by_hand():
    batch = batch_of([-1.0, -3.0, -5.0, -3.0, 0.0], ADVANTAGE, RESPONSE)  # every ratio is 1
    made, out = selected(OBJECTIVES["clip_cov"](fraction=0.5), COVARIANCE, batch)
    # max(1, int(0.5 x 4)) = 2 of the tokens with 1 < cov < 5: both of them.
    np.testing.assert_array_equal(made.weight, [[0, 1, 0, 1, 1]])
    np.testing.assert_allclose([out.loss.total, out.loss.count], [-2 + 2, 4], atol=1e-6)
    one, _ = selected(OBJECTIVES["clip_cov"](fraction=1e-4), COVARIANCE, batch)
    assert float((1 - one.weight).sum()) == 1, "at least one"
    none, _ = selected(OBJECTIVES["clip_cov"](fraction=0.5, cov_high=4.0), COVARIANCE, batch)
    assert float((1 - none.weight).sum()) == 0, "a covariance at the bound is outside"
    # A token that the clip takes already (ratio e, A > 0) is not drawn.
    other = batch_of([-2.0, -3.0, -5.0, -3.0, 0.0], ADVANTAGE, RESPONSE)
    clipped, _ = selected(OBJECTIVES["clip_cov"](fraction=0.5), COVARIANCE, other)
    np.testing.assert_array_equal(clipped.weight, [[1, 1, 0, 1, 1]])


def test_kl_cov_by_hand():
    batch = batch_of([-1.5, -3.0, -5.0, -3.5, 0.0], ADVANTAGE, RESPONSE)
    objective = OBJECTIVES["kl_cov"](fraction=0.25, coefficient=0.5)
    made, out = selected(objective, COVARIANCE, batch)
    assert float(made.weight.sum()) == 1, "int(0.25 x 4) tokens"
    chosen = int(made.weight[0].argmax())
    assert chosen in (0, 2), "of the highest covariance"
    # -A r: -2 e^0.5 - 2 + 2 + 2 e^0.5 = 0; the penalty 0.5 |logp - old| is 0.25 at token 0, 0 at token 2.
    np.testing.assert_allclose(out.loss.total, 0.25 if chosen == 0 else 0.0, atol=1e-5)
    both, out = selected(OBJECTIVES["kl_cov"](fraction=0.5, coefficient=0.5), COVARIANCE, batch)
    np.testing.assert_array_equal(both.weight, [[1, 0, 1, 0, 0]])
    np.testing.assert_allclose([out.loss.total, out.loss.count], [0.25, 4], atol=1e-5)


def test_kl_cov_pulls_at_no_token_that_has_not_moved():
    # Every ratio is 1: the gradient is that of -A r alone, -2, -2, 2, 2, also where the penalty is chosen. A token that
    # has moved by 0.5 adds its sign: -2 e^0.5 + 0.5.
    objective = OBJECTIVES["kl_cov"](fraction=0.5, coefficient=0.5)

    def gradient(old_logp):
        made, _ = selected(objective, COVARIANCE, batch_of(old_logp, ADVANTAGE, RESPONSE))
        np.testing.assert_array_equal(made.weight, [[1, 0, 1, 0, 0]])
        return jax.grad(lambda x: objective.loss(COVARIANCE | {"logp": x}, made).loss.total)(COVARIANCE["logp"])[0]

    np.testing.assert_allclose(gradient([-1.0, -3.0, -5.0, -3.0, 0.0]), [-2, -2, 2, 2, 0], atol=1e-6)
    np.testing.assert_allclose(gradient([-1.5, -3.0, -5.0, -3.0, 0.0])[0], -2 * np.exp(0.5) + 0.5, rtol=1e-6)


def test_kl_covs_coefficient_is_annealed():
    objective = OBJECTIVES["kl_cov"](fraction=0.5, coefficient=1.0, anneal_updates=4)
    knobs = dict(objective.control.init)
    seen = []
    for _ in range(6):
        seen.append(knobs["coefficient"])
        knobs = objective.control.update(knobs, {})
    assert seen == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    batch = batch_of([-1.5, -3.0, -5.0, -3.5, 0.0], ADVANTAGE, RESPONSE)
    assert objective.select is not None
    made = objective.select(COVARIANCE, dataclasses.replace(batch, knobs={"coefficient": jnp.float32(0.25)}))
    np.testing.assert_allclose(objective.loss(COVARIANCE, made).loss.total, 0.125, atol=1e-5)


def test_top_entropy_by_hand():
    batch = batch_of([-1.0, -3.0, -5.0, -3.0, 0.0], ADVANTAGE, RESPONSE)
    made, out = selected(OBJECTIVES["top_entropy"](fraction=0.5), COVARIANCE, batch)
    np.testing.assert_array_equal(made.weight, [[0, 1, 0, 1, 0]])  # entropies 0.9 and 0.8; 9.0 is masked
    np.testing.assert_allclose([out.loss.total, out.loss.count], [-2 + 2, 4], atol=1e-6)


@pytest.mark.parametrize(
    ("beta", "want"),
    [
        (0.0, 0.0329956813),  # the forward and the reverse KL of test_losses
        (1.0, 0.0307377859),
        # s = (3/4, 1/4), t = (0.6339746, 0.3660254), m = (0.6919873, 0.3080127):
        # KL(t||m) = 0.6339746 ln(0.9161650) + 0.3660254 ln(1.1883451) = 0.0076520; KL(s||m) = 0.0082092; their mean
        (0.5, 0.0079306),
    ],
)
def test_jsd_by_hand(beta, want):
    objective = OBJECTIVES["jsd"](beta=beta, teacher_temperature=2.0)
    logits = jnp.asarray([[[np.log(3.0), 0.0]]], jnp.float32)
    batch = batch_of([0], [0], [True])
    out = objective.loss(objective.stats(logits, batch.tokens), batch)
    np.testing.assert_allclose(out.loss.value, want, rtol=1e-4)
    assert not objective.uses_advantage
    assert objective.policy_temperature is None


def test_jsd_weights_by_hand():
    # beta = 0.25, s = (3/4, 1/4), t = (0.6339746, 0.3660254): m = 0.75 s + 0.25 t = (0.7209936, 0.2790064).
    # KL(t||m) = 0.6339746 ln(0.8793068) + 0.3660254 ln(1.3118891) = 0.0178215
    # KL(s||m) = 0.75 ln(1.0402311) + 0.25 ln(0.8960370) = 0.0021388; 0.25 x 0.0178215 + 0.75 x 0.0021388 = 0.0060594
    objective = OBJECTIVES["jsd"](beta=0.25, teacher_temperature=2.0)
    found = objective.stats(jnp.asarray([[[np.log(3.0), 0.0]]], jnp.float32), jnp.zeros((1, 1), jnp.int32))
    np.testing.assert_allclose(found["jsd"], [[0.0060594]], rtol=1e-4)


def test_jsd_has_no_gradient_at_temperature_one():
    objective = OBJECTIVES["jsd"](beta=0.3, teacher_temperature=1.0)
    logits = jnp.asarray([[[0.3, -1.0, 2.0]]], jnp.float32)
    value, grad = jax.value_and_grad(lambda z: objective.stats(z, jnp.zeros((1, 1), jnp.int32))["jsd"].sum())(logits)
    np.testing.assert_allclose(value, 0.0, atol=1e-9)
    np.testing.assert_allclose(grad, 0.0, atol=1e-7)


def test_a_tokens_hash_follows_it_into_a_packed_row():
    batch = Batch.of(**fields())
    length = np.array([6, 3, 4, 7, 5, 2, 6, 7])
    packed = pack(batch, length, micro_batches=4)
    here, there = np.asarray(token_hash(batch))[np.asarray(batch.mask)], np.asarray(token_hash(packed))[packed.mask]
    assert len(set(here.tolist())) == 25, "no two tokens alike"
    assert sorted(here.tolist()) == sorted(there.tolist())
