"""Per-token mathematics: values and gradients by hand, limits, and accuracy against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tsopsd_jax import losses

TWO = np.log([3.0, 1.0])  # p = (3/4, 1/4)
THREE = np.array([2.0, 1.0, -1.0])  # p = (0.70538451, 0.25949646, 0.03511903)


def f32(x):
    return jnp.asarray(x, jnp.float32)


def softmax64(z):
    e = np.exp(np.asarray(z, np.float64) - np.max(z, axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def log_softmax64(z):
    z = np.asarray(z, np.float64)
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log1p(np.exp(z).sum(axis=-1, keepdims=True) - 1.0)


def kl64(logq, logp):
    return np.sum(np.exp(logq) * (logq - logp), axis=-1)


def test_entropy_by_hand():
    # -(3/4 ln 3/4 + 1/4 ln 1/4) = 0.2157616 + 0.3465736 = 0.5623351
    # -(0.70538451 ln 0.70538451 + 0.25949646 ln 0.25949646 + 0.03511903 ln 0.03511903) = 0.7138658
    np.testing.assert_allclose(losses.entropy(f32(TWO)), 0.5623351446, rtol=1e-6)
    np.testing.assert_allclose(losses.entropy(f32(THREE)), 0.7138657580, rtol=1e-6)
    np.testing.assert_allclose(losses.entropy(jnp.zeros((2, 8))), [np.log(8)] * 2, rtol=1e-6)


def test_entropy_gradient_by_hand():
    # dH/dz_i = -p_i (ln p_i + H): -0.75 (ln 0.75 + 0.5623351) = -0.75 * 0.2746531 = -0.2059898, and its opposite.
    grad = jax.grad(lambda z: losses.entropy(z).sum())
    np.testing.assert_allclose(grad(f32(TWO)), [-0.2059898, 0.2059898], atol=1e-6)
    np.testing.assert_allclose(grad(f32(THREE)), [-0.25736204, 0.16481826, 0.09254378], atol=1e-6)


def test_token_logp_by_hand():
    # ln 3/4 and ln 1/4; the gradient of log p_0 is (1 - p_0, -p_1) = (1/4, -1/4).
    np.testing.assert_allclose(losses.token_logp(f32([TWO, TWO]), jnp.array([0, 1])), np.log([0.75, 0.25]), rtol=1e-6)
    grad = jax.grad(lambda z: losses.token_logp(z, jnp.array(0)))(f32(TWO))
    np.testing.assert_allclose(grad, [0.25, -0.25], atol=1e-6)


# With T = 2 the teacher of (ln 3, 0) is (sqrt 3, 1) / (sqrt 3 + 1) = (0.6339746, 0.3660254):
#   forward 0.6339746 ln(0.6339746 / 0.75) + 0.3660254 ln(0.3660254 / 0.25) = -0.1065494 + 0.1395451 = 0.0329957
#   reverse 0.75 ln(0.75 / 0.6339746) + 0.25 ln(0.25 / 0.3660254) = 0.1260497 - 0.0953120 = 0.0307378
#   d forward = p - q = 0.75 - 0.6339746 = 0.1160254
#   d reverse = (1 - 1/2) p_0 (z_0 - E_p z) = 0.5 * 0.75 * (1.0986123 - 0.8239592) = 0.1029949
BY_HAND = [
    (TWO, 2.0, 0.0329956813, 0.0307377859, [0.1160254, -0.1160254], [0.1029949, -0.1029949]),
    (TWO, 1.2, 0.0033308171, 0.0032377118, [0.0358736, -0.0358736], [0.03433163, -0.03433163]),
    (
        THREE,
        2.0,
        0.0935585701,
        0.0726916180,
        [0.15883513, -0.0720025, -0.08683263],
        [0.12868102, -0.08240913, -0.04627189],
    ),
    (
        THREE,
        1.2,
        0.0073045842,
        0.0067047097,
        [0.04605104, -0.02704868, -0.01900236],
        [0.04289367, -0.02746971, -0.01542396],
    ),
]


@pytest.mark.parametrize(("logits", "temperature", "forward", "reverse", "d_forward", "d_reverse"), BY_HAND)
def test_self_teacher_kl_by_hand(logits, temperature, forward, reverse, d_forward, d_reverse):
    student = f32(logits)
    teacher = student / temperature
    np.testing.assert_allclose(losses.forward_kl(teacher, student), forward, rtol=2e-5)
    np.testing.assert_allclose(losses.reverse_kl(teacher, student), reverse, rtol=2e-5)
    # The teacher is a function of the same logits: only a stopped gradient gives these values.
    np.testing.assert_allclose(jax.grad(lambda z: losses.forward_kl(z / temperature, z))(student), d_forward, atol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda z: losses.reverse_kl(z / temperature, z))(student), d_reverse, atol=1e-6)


@pytest.mark.parametrize("kl", [losses.forward_kl, losses.reverse_kl])
def test_no_gradient_reaches_the_teacher(kl):
    grad = jax.grad(lambda teacher: kl(teacher, f32(THREE)))(f32([0.0, 1.0, 2.0]))
    np.testing.assert_array_equal(grad, np.zeros(3))


def test_kl_of_unrelated_distributions_and_its_order():
    rng = np.random.default_rng(0)
    teacher, student = rng.normal(size=(2, 5, 11)) * 2
    logq, logp = log_softmax64(teacher), log_softmax64(student)
    np.testing.assert_allclose(losses.forward_kl(f32(teacher), f32(student)), kl64(logq, logp), rtol=1e-5)
    np.testing.assert_allclose(losses.reverse_kl(f32(teacher), f32(student)), kl64(logp, logq), rtol=1e-5)
    p, q = np.exp(logp), np.exp(logq)
    d_forward = jax.grad(lambda s: losses.forward_kl(f32(teacher), s).sum())(f32(student))
    d_reverse = jax.grad(lambda s: losses.reverse_kl(f32(teacher), s).sum())(f32(student))
    np.testing.assert_allclose(d_forward, p - q, atol=1e-6)
    np.testing.assert_allclose(d_reverse, p * (logp - logq - kl64(logp, logq)[:, None]), atol=1e-5)


@pytest.mark.parametrize("kl", [losses.forward_kl, losses.reverse_kl])
def test_temperature_one_is_exactly_nothing(kl):
    logits = f32(np.random.default_rng(1).normal(size=(6, 13)) * 8)
    value, grad = jax.value_and_grad(lambda z: kl(z / 1.0, z).sum())(logits)
    assert float(value) == 0.0
    np.testing.assert_array_equal(grad, np.zeros_like(logits))


@pytest.mark.parametrize("kl", [losses.forward_kl, losses.reverse_kl])
@pytest.mark.parametrize("temperature", [0.5, 0.999, 1.001, 1.2, 3.0])
def test_kl_is_never_negative(kl, temperature):
    logits = f32(np.random.default_rng(2).normal(size=(200, 17)) * np.linspace(0.01, 30, 200)[:, None])
    assert float(jnp.min(kl(logits / temperature, logits))) >= 0.0


@pytest.mark.parametrize("temperature", [0.5, 1.2])
def test_extreme_logits_stay_finite(temperature):
    logits = f32([[1e4, -1e4, 0.0, 1.0], [-1e4, -1e4, -1e4, -1e4], [1e4, 1e4, -1e4, 1e4 - 1], [0.0, 1e4, 0.0, -1e4]])

    def everything(z):
        return (
            losses.entropy(z)
            + losses.forward_kl(z / temperature, z)
            + losses.reverse_kl(z / temperature, z)
            + losses.token_logp(z, jnp.array([0, 1, 2, 3]))
        )

    assert bool(jnp.all(jnp.isfinite(everything(logits))))
    assert bool(jnp.all(jnp.isfinite(jax.grad(lambda z: everything(z).sum())(logits))))
    # Row 1 is uniform over four; row 0 is one token, its second choice 2e4 nats away.
    np.testing.assert_allclose(losses.entropy(logits)[:2], [0.0, np.log(4)], rtol=1e-6)
    np.testing.assert_allclose(losses.token_logp(logits, jnp.array([1, 0, 0, 0]))[0], -2e4)


def test_minus_infinity_marks_an_impossible_token():
    logits = f32([np.log(3.0), 0.0, -np.inf])
    np.testing.assert_allclose(losses.entropy(logits), 0.5623351446, rtol=1e-6)
    np.testing.assert_allclose(losses.token_logp(logits, jnp.array(0)), np.log(0.75), rtol=1e-6)


@pytest.mark.parametrize("temperature", [1.01, 1.1, 1.2, 1.5, 2.0])
@pytest.mark.parametrize("lead", [5.0, 15.0, 30.0])
def test_collapsed_regime_against_float64(lead, temperature):
    # One entry leads by up to 30 nats: entropy and KL are 1e-13 .. 1e-2 nats, and float32 must keep their digits.
    rest = np.random.default_rng(3).uniform(-1, 0, size=40)
    logits = np.concatenate([[lead], rest]).astype(np.float32)
    z = logits.astype(np.float64)
    tail = np.exp(z[1:] - z[0]).sum()
    logp = np.concatenate([[-np.log1p(tail)], z[1:] - z[0] - np.log1p(tail)])
    u = z / temperature
    tail = np.exp(u[1:] - u[0]).sum()
    logq = np.concatenate([[-np.log1p(tail)], u[1:] - u[0] - np.log1p(tail)])
    p, q, d = np.exp(logp), np.exp(logq), logq - logp
    # sum q d cancels even in float64; with + p - q = q (exp(-d) - 1) in every term it does not.
    forward = np.sum(q * (d + np.expm1(-d)))
    reverse = np.sum(p * (np.expm1(d) - d))
    student = jnp.asarray(logits)
    np.testing.assert_allclose(losses.entropy(student), -np.sum(p * logp), rtol=1e-5)
    np.testing.assert_allclose(losses.forward_kl(student / temperature, student), forward, rtol=1e-4)
    np.testing.assert_allclose(losses.reverse_kl(student / temperature, student), reverse, rtol=1e-4)


# ratio, advantage -> loss, d loss / d logp, with low 0.2, high 0.28, c 10 (d ratio / d logp = ratio)
SURROGATE = [
    (1.0, 2.0, -2.0, -2.0),  # on policy: -A r = -2, gradient -A r
    (1.25, 1.0, -1.25, -1.25),  # inside 1.28: not clipped
    (1.5, 2.0, -2.56, 0.0),  # A > 0 above: max(-3, -2 * 1.28) = -2.56, clipped
    (0.5, 2.0, -1.0, -1.0),  # A > 0 below: max(-1, -1.6) = -1, not clipped
    (0.7, -2.0, 1.6, 0.0),  # A < 0 below: max(1.4, 2 * 0.8) = 1.6, clipped
    (0.9, -2.0, 1.8, 1.8),  # A < 0 inside
    (1.5, -2.0, 3.0, 3.0),  # A < 0 above: max(3, 2.56) = 3, not clipped
    (9.0, -2.0, 18.0, 18.0),  # under the dual clip
    (12.0, -2.0, 20.0, 0.0),  # dual clip: min(24, 2 * 10) = 20
    (12.0, 2.0, -2.56, 0.0),  # no dual clip where A > 0
    (1.5, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("ratio", "advantage", "want", "slope"), SURROGATE)
def test_clipped_surrogate_every_branch(ratio, advantage, want, slope):
    def loss(logp):
        return losses.clipped_surrogate(logp, f32(-3.0), f32(advantage))

    value, grad = jax.value_and_grad(loss)(f32(-3.0 + np.log(ratio)))
    np.testing.assert_allclose(value, want, atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(grad, slope, atol=1e-6, rtol=1e-6)


def test_clip_low_and_high_are_their_own_sides():
    ratio, ones = f32(np.log([2.0, 0.1])), f32([1.0, -1.0])
    got = losses.clipped_surrogate(ratio, jnp.zeros(2), ones, clip_low=0.4, clip_high=0.1)
    np.testing.assert_allclose(got, [-1.1, 0.6], rtol=1e-6)  # -(1 + 0.1), 1 - 0.4
    # c = 3: min(5, 3)
    got = losses.clipped_surrogate(f32(np.log(5.0)), f32(0.0), f32(-1.0), clip_ratio_c=3.0)
    np.testing.assert_allclose(got, 3.0, rtol=1e-6)


def test_log_ratio_is_clamped_to_twenty_nats():
    logp, old = f32([0.0, -90.0, -1.0]), f32([-90.0, 0.0, -21.5])
    np.testing.assert_array_equal(losses.log_ratio(logp, old), [20.0, -20.0, 20.0])
    # e^20 = 4.8516520e8; the dual clip is out of the way, so the clamp alone bounds the loss, and stops its gradient.
    huge, slope = jax.value_and_grad(lambda x: losses.clipped_surrogate(x, f32(-90.0), f32(-1.0), clip_ratio_c=1e30))(
        f32(0.0)
    )
    np.testing.assert_allclose(huge, 4.851652e8, rtol=1e-6)
    assert float(slope) == 0.0


def test_surrogate_gradient_reaches_logp_alone():
    args = f32(-1.0), f32(-1.1), f32(1.5)
    d_logp, d_old, d_advantage = jax.grad(losses.clipped_surrogate, argnums=(0, 1, 2))(*args)
    np.testing.assert_allclose(d_logp, -1.5 * np.exp(0.1), rtol=1e-6)
    assert (float(d_old), float(d_advantage)) == (0.0, 0.0)
