"""Methods around DAPO by hand: what they make of statistics, where their gradients go, how their knobs turn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tsopsd_jax.metric_names import ENTROPY
from tsopsd_jax.objectives import OBJECTIVES
from tsopsd_jax.objectives.aent import clamped_entropy, order_statistic
from tsopsd_jax.objectives.repo_r import next_zeta
from tsopsd_jax.types import Batch


def batch_of(old_logp, advantage, **knobs):
    """One row of response tokens, and a masked one after them with junk in it."""
    n = len(old_logp)
    batch = Batch.of(
        tokens=np.zeros((1, n + 1), np.int32),
        mask=np.asarray([[True] * n + [False]]),
        advantage=np.asarray([[*advantage, 9.0]], np.float32),
        old_logp=np.asarray([[*old_logp, -9.0]], np.float32),
    )
    return dataclasses.replace(batch, knobs={name: jnp.float32(value) for name, value in knobs.items()})


def row(*values):
    return jnp.asarray([[*values, 7.0]], jnp.float32)


def found(objective, stats, batch):
    """(total, count, gradient of the total into each statistic at the response tokens, metrics);
    `select` comes first."""
    if objective.select is not None:
        batch = objective.select(stats, batch)

    def total(stats):
        out = objective.loss(stats, batch)
        return out.loss.total, out

    (value, out), gradient = jax.value_and_grad(total, has_aux=True)(stats)
    for g in gradient.values():
        assert float(g[0, -1]) == 0.0, "nothing comes from the masked token"
    metrics = {name: float(mean.value) for name, mean in out.metrics.items()}
    return float(value), float(out.loss.count), {k: np.asarray(g[0, :-1]) for k, g in gradient.items()}, metrics


# ------------------------------------------------------------------ entropy-shaped advantage


def test_entropy_advantage_by_hand():
    # min(0.4 H, |A| / 2): A 1, H 0.5: 0.2 of 0.5, so 1.2. A -1, H 2: 0.5 of 0.8, so -0.5. A 0: stays 0.
    # At ratio 1 the loss is -A' and its gradient into logp the same: total -1.2 + 0.5 + 0; none into the entropy.
    stats = {"logp": row(-1.0, -2.0, -3.0), "entropy": row(0.5, 2.0, 1.0)}
    batch = batch_of([-1.0, -2.0, -3.0], [1.0, -1.0, 0.0])
    total, count, gradient, metrics = found(OBJECTIVES["entropy_advantage"](), stats, batch)
    np.testing.assert_allclose([total, count], [-0.7, 3], rtol=1e-6)
    np.testing.assert_allclose(gradient["logp"], [-1.2, 0.5, 0.0], rtol=1e-6)
    np.testing.assert_array_equal(gradient["entropy"], 0.0)
    assert metrics["policy/entropy_bonus_mean"] == pytest.approx(0.7 / 3)
    # alpha 0.1, kappa 4: 0.05 and min(0.2, 0.25) = 0.2: -1.05 + 0.8
    total, *_ = found(OBJECTIVES["entropy_advantage"](alpha=0.1, kappa=4.0), stats, batch)
    assert total == pytest.approx(-0.25, rel=1e-6)


# ------------------------------------------------------------------ REPO-R


def test_repo_r_by_hand():
    # zeta 0.05. A 1, logp -2: 1 + 0.1 = 1.1. A -1, logp -2: -(1 - 0.1) = -0.9. A -1, logp -30: 1 - 1.5 < 0, so 0.
    # At ratio 1: total -1.1 + 0.9 + 0. Were logp in the advantage not stopped, the first gradient would be -1.1 + 0.05.
    stats = {"logp": row(-2.0, -2.0, -30.0), "entropy": row(1.0, 1.0, 1.0)}
    batch = batch_of([-2.0, -2.0, -30.0], [1.0, -1.0, -1.0], zeta=0.05)
    total, count, gradient, _ = found(OBJECTIVES["repo_r"](), stats, batch)
    np.testing.assert_allclose([total, count], [-0.2, 3], rtol=1e-6)
    np.testing.assert_allclose(gradient["logp"], [-1.1, 0.9, 0.0], rtol=1e-6)
    # A negative zeta lowers the entropy: A 1, logp -2: 0.9; A -1: -1.1; A -1, logp -30: -2.5. -0.9 + 1.1 + 2.5
    total, *_ = found(OBJECTIVES["repo_r"](), stats, dataclasses.replace(batch, knobs={"zeta": jnp.float32(-0.05)}))
    assert total == pytest.approx(2.7, rel=1e-6)


@pytest.mark.parametrize(
    ("zeta", "below", "want"),
    [
        (1e-3, True, 2e-3),
        (1e-3, False, 5e-4),
        (0.04, True, 0.05),  # at most
        (1.5e-4, False, -1e-4),  # 7.5e-5 is under the least: the sign changes
        (-1e-4, False, -2e-4),
        (-4e-4, True, -2e-4),
        (-1.5e-4, True, 1e-4),
        (-0.04, False, -0.05),
    ],
)
def test_zeta_doubles_halves_and_changes_its_sign(zeta, below, want):
    assert next_zeta(zeta, below, least=1e-4, most=0.05) == pytest.approx(want)


def test_an_anchored_knob_holds_the_entropy_of_the_first_update():
    control = OBJECTIVES["repo_r"]().control
    knobs, seen = control.init, []
    for entropy in (0.3, 0.29, 0.2, 0.3):
        knobs = control.update(knobs, {ENTROPY: entropy})
        seen.append(knobs)
    assert [k["target_nats"] for k in seen] == [0.3] * 4
    assert [k["zeta"] for k in seen] == [1e-3, 2e-3, 4e-3, 2e-3]  # measured; below, below, at it
    given = OBJECTIVES["repo_r"](target_nats=0.25).control
    assert given.update(given.init, {ENTROPY: 0.3}) == {"zeta": 5e-4, "target_nats": 0.25}


# ------------------------------------------------------------------ ADAPO


def test_adapo_by_hand():
    # Ratio 1.4, A 1. clip_high 0.5: inside, -1.4 and its gradient. 0.28: clipped at 1.28, no gradient.
    # Ratio 0.5, A -1: clipped at 1 - 0.2. Ratio 12, A -1: dual clip at 10.
    stats = {"logp": row(0.0, 0.0, 0.0), "entropy": row(1.0, 1.0, 1.0)}
    old = -np.log([1.4, 0.5, 12.0])
    for high, want, first in ((0.5, -1.4, -1.4), (0.28, -1.28, 0.0)):
        batch = batch_of(old, [1.0, -1.0, -1.0], clip_high=high)
        total, count, gradient, metrics = found(OBJECTIVES["adapo"](), stats, batch)
        np.testing.assert_allclose([total, count], [want + 0.8 + 10.0, 3], rtol=1e-6)
        np.testing.assert_allclose(gradient["logp"], [first, 0.0, 0.0], rtol=1e-6)
        assert metrics["policy/clipped_fraction"] == pytest.approx((1 if high == 0.5 else 2) / 3)


def test_adapo_turns_its_upper_clip():
    control = OBJECTIVES["adapo"](clip_high=0.3, least=0.2, most=0.5).control
    knobs, seen = control.init, []
    for entropy in (0.3, 0.1, 0.1, 0.5, 0.5, 0.5):
        knobs = control.update(knobs, {ENTROPY: entropy})
        seen.append(knobs["clip_high"])
    assert seen == [0.3, 0.5, 0.5, 0.25, 0.2, 0.2]  # measured; doubled up to the most; halved down to the least


# ------------------------------------------------------------------ BAPO


def test_bapo_by_hand():
    # positive(1.2) = 2 x 1.2 = 2.4, negative(0.6) = 0.6 + 1.95 = 2.55: under 1, so lo = 0.8 and negative = 2.75.
    # hi 1.2, 1.25, 1.3, 1.35, 1.4: positive 2.4, 2.5, 2.6, 2.7, 2.8, the first over 2.75.
    # Loss: -2 x 1.4 (clipped), 0.8 (clipped), 1.95: -0.05. Gradient: only the last token's, A r = 1.95.
    stats = {"logp": row(0.0, 0.0, 0.0), "entropy": row(1.0, 1.0, 1.0)}
    batch = batch_of(-np.log([1.5, 0.5, 1.95]), [2.0, -1.0, -1.0])
    total, count, gradient, metrics = found(OBJECTIVES["bapo"](), stats, batch)
    np.testing.assert_allclose([total, count], [-0.05, 3], atol=1e-6)
    np.testing.assert_allclose(gradient["logp"], [0.0, 0.0, 1.95], rtol=1e-6)
    assert metrics["policy/ratio_low_bound"] == pytest.approx(0.8)
    assert metrics["policy/ratio_high_bound"] == pytest.approx(1.4)
    assert metrics["policy/clipped_fraction"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("ratio", "advantage", "target", "want"),
    [
        ([1.5, 0.5, 1.0], [2.0, -1.0, -1.0], 1.0, (0.6, 1.2)),  # 2.4 over 1.6: reached at once
        ([1.5, 0.5, 1.0], [2.0, -1.0, -1.0], 1.55, (0.8, 1.4)),  # 2.4 under 2.48; 1.55 x 1.8 = 2.79, 2.8 is over it
        ([1.5, 0.5, 1.0], [0.1, -1.0, -1.0], 1.0, (0.8, 2.0)),  # never
        ([1.5, 1.5, 1.0], [1.0, 1.0, 1.0], 1.0, (0.6, 1.2)),  # nothing negative
    ],
)
def test_bapos_bounds(ratio, advantage, target, want):
    select = OBJECTIVES["bapo"](target=target).select
    assert select is not None
    made = select({"logp": row(0.0, 0.0, 0.0)}, batch_of(-np.log(ratio), advantage))
    assert (float(made.knobs["ratio_low"]), float(made.knobs["ratio_high"])) == pytest.approx(want)


def test_bapos_dual_clip():
    stats = {"logp": row(0.0), "entropy": row(1.0)}
    total, *_ = found(OBJECTIVES["bapo"](), stats, batch_of([-np.log(5.0)], [-1.0]))
    assert total == pytest.approx(3.0)


# ------------------------------------------------------------------ AEnt


def test_clamped_entropy_by_hand():
    # Of five entries int(0.4 x 5) = 2 go: 0.5 and 0.25. The rest, 6, 3, 1, is p = (0.6, 0.3, 0.1):
    # H = 0.6 x 0.510826 + 0.3 x 1.203973 + 0.1 x 2.302585 = 0.897946;  dH/dz = -p (ln p + H), 0 for those that went.
    logits = jnp.log(jnp.asarray([3.0, 0.5, 6.0, 0.25, 1.0]))
    value, gradient = jax.value_and_grad(lambda z: clamped_entropy(z, fraction=0.4))(logits)
    np.testing.assert_allclose(value, 0.897946, rtol=1e-5)
    np.testing.assert_allclose(gradient, [0.091808, 0.0, -0.232272, 0.0, 0.140464], atol=1e-6)
    np.testing.assert_allclose(clamped_entropy(jnp.zeros(8), fraction=0.5), np.log(8), rtol=1e-6)  # equal ones stay


def test_order_statistic_is_that_of_a_sort():
    x = np.random.default_rng(0).normal(size=(3, 41)).astype(np.float32) * 10.0 ** np.arange(-2, 1)[:, None]
    for k in (0, 7, 20, 40):
        np.testing.assert_array_equal(
            order_statistic(jnp.asarray(x, jnp.float32), k), np.sort(x.astype(np.float32))[:, k]
        )


def test_aent_by_hand():
    # Ratio 1, A 1: -1 - 0.5 x 0.25 and -1 - 0.5 x 0.75; the exact entropy is what is logged as such.
    stats = {"logp": row(-1.0, -1.0), "entropy": row(0.5, 0.9), "clamped_entropy": row(0.25, 0.75)}
    batch = batch_of([-1.0, -1.0], [1.0, 1.0], coefficient=0.5)
    total, count, gradient, metrics = found(OBJECTIVES["aent"](), stats, batch)
    np.testing.assert_allclose([total, count], [-2.5, 2], rtol=1e-6)
    np.testing.assert_allclose(gradient["clamped_entropy"], [-0.5, -0.5])
    np.testing.assert_array_equal(gradient["entropy"], 0.0)
    assert metrics[ENTROPY] == pytest.approx(0.7)
    assert metrics["policy/clamped_entropy_nats"] == pytest.approx(0.5)
    asked = OBJECTIVES["aent"](clamp_fraction=0.4).stats(
        jnp.log(jnp.asarray([[3.0, 0.5, 6.0, 0.25, 1.0]])), jnp.zeros(1, int)
    )
    np.testing.assert_allclose(asked["clamped_entropy"], [0.897946], rtol=1e-5)


def test_aents_coefficient_stays_between_its_entropies():
    update = OBJECTIVES["aent"]().control.update

    def turned(coefficient, entropy):
        metrics = {ENTROPY: 0.3, "policy/clamped_entropy_nats": entropy}
        return update({"coefficient": coefficient}, metrics)["coefficient"]

    assert turned(1e-3, 0.05) == pytest.approx(1e-3 + 1e-3 * 0.05)
    assert turned(1e-3, 0.7) == pytest.approx(1e-3 - 1e-3 * 0.2)
    assert turned(1e-3, 0.3) == 1e-3
    assert turned(1e-3, 3.0) == 1e-5
    assert turned(0.00999, 0.0) == 0.01


# ------------------------------------------------------------------ AER


def test_aer_by_hand():
    # Ratio 1, A 1: -1 - 0.1 x 0.5 and -1 - 0.1 x 0.9
    stats = {"logp": row(-1.0, -1.0), "entropy": row(0.5, 0.9)}
    total, count, gradient, _ = found(OBJECTIVES["aer"](), stats, batch_of([-1.0, -1.0], [1.0, 1.0], coefficient=0.1))
    np.testing.assert_allclose([total, count], [-2.14, 2], rtol=1e-6)
    np.testing.assert_allclose(gradient["entropy"], [-0.1, -0.1])


def test_aers_target_is_a_fraction_of_the_first_entropy():
    control = OBJECTIVES["aer"](step=0.01, most=0.015).control
    knobs, seen = control.init, []
    for entropy in (0.5, 0.21, 0.19, 0.19, 0.19, 0.2):
        knobs = control.update(knobs, {ENTROPY: entropy})
        seen.append(knobs["coefficient"])
    assert knobs["target_nats"] == pytest.approx(0.2)  # 0.4 x 0.5
    assert seen == pytest.approx([0.0, 0.0, 0.01, 0.015, 0.015, 0.005])


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("entropy_advantage", {"kappa": 1.0}, "kappa=1.0"),
        ("entropy_advantage", {"alpha": -1.0}, "alpha=-1.0"),
        ("repo_r", {"zeta": 0.0}, "zeta=0.0"),
        ("repo_r", {"target_nats": 0.0}, "target_nats=0.0"),
        ("adapo", {"clip_high": 3.0}, "clip_high=3.0"),
        ("adapo", {"most": 12.0}, "clip_ratio_c=10.0"),
        ("bapo", {"low": 0.9}, "low=0.9"),
        ("bapo", {"high_most": 4.0}, "high_most=4.0"),
        ("bapo", {"target": 0.0}, "target=0.0"),
        ("aent", {"clamp_fraction": 1.0}, "clamp_fraction=1.0"),
        ("aent", {"coefficient": 0.1}, "coefficient=0.1"),
        ("aer", {"target_fraction": 0.0}, "target_fraction=0.0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(name, settings, words):
    with pytest.raises(ValueError, match=rf"{name}.*expects|anchored.*expects") as error:
        OBJECTIVES[name](**settings)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
