"""A frozen reference: its logits go through the head's tiles, no gradient reaches it, and what objectives make of it,
by hand."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tsopsd_jax import head_tiles, losses
from tsopsd_jax.distributed.sharding import make_mesh
from tsopsd_jax.head import Reference, batch_loss, token_loss, token_stats
from tsopsd_jax.head_tiles import Tiling
from tsopsd_jax.learn.update import ReferencePolicy, make_gradient, make_optimizer, make_update, per_token_stats
from tsopsd_jax.objectives import OBJECTIVES, with_start_kl
from tsopsd_jax.objectives.reference import top1_agreement
from tsopsd_jax.types import Batch, LossOutput, Mean, TrainState

D, E, V = 5, 3, 12
"""Hidden sizes of the policy and of its reference; entries of both."""


def both_stats(z, tokens, reference_z):
    """Statistics in which policy and reference do not change places."""
    return {
        "logp": losses.token_logp(z, tokens),
        "reference_logp": losses.token_logp(reference_z, tokens),
        "kl": losses.reverse_kl(reference_z / 1.5, z),
    }


def both_loss(stats, batch):
    per_token = batch.advantage * jnp.exp(stats["logp"] - 0.3 * stats["reference_logp"]) + 2.0 * stats["kl"]
    return LossOutput(Mean.of(per_token, batch.mask), {"r": Mean.of(stats["reference_logp"], batch.mask)})


def some_batch(rng, rows, length):
    prompt, end = rng.integers(1, length - 1, (rows, 1)), rng.integers(length - 1, length + 1, (rows, 1))
    at = np.arange(length)[None, :]
    return Batch.of(
        tokens=rng.integers(0, V, (rows, length)),
        mask=(at >= prompt) & (at < end),
        advantage=rng.normal(size=(rows, length)),
        old_logp=-rng.random((rows, length)),
    )


@pytest.mark.parametrize("block", [1, 2, None])
@pytest.mark.parametrize("mesh", [None, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_its_logits_in_tiles_are_those_of_the_formula_and_no_gradient_reaches_it(mesh, block, monkeypatch):
    """Both ways through the tiles, in blocks, on one device and on eight: loss, metrics and gradients as on full
    logits."""
    rng, rows, length = np.random.default_rng(2), 8, 6
    if block:
        monkeypatch.setattr(head_tiles, "BLOCK_BYTES", block * 4 * V)
    mesh = mesh and make_mesh(**mesh)
    shapes = {"hidden": (rows, length, D), "unembed": (D, V), "theirs": (rows, length, E), "their_unembed": (E, V)}
    arrays = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    batch = some_batch(rng, rows, length)

    def on_full(hidden, unembed, theirs, their_unembed):
        theirs = jax.lax.stop_gradient(theirs[:, :-1] @ their_unembed)
        stats = both_stats(hidden[:, :-1] @ unembed, batch.tokens[:, 1:], theirs)
        out = both_loss({name: jnp.pad(x, ((0, 0), (1, 0))) for name, x in stats.items()}, batch)
        return out.loss.total, out

    def through(tokenwise):
        def f(hidden, unembed, theirs, their_unembed):
            reference, asked = (
                Reference(theirs, their_unembed),
                {"tokenwise": tokenwise, "tile_tokens": 4, "mesh": mesh},
            )
            found = batch_loss(both_stats, both_loss, hidden, unembed, batch, reference=reference, **asked)
            return found.out.loss.total, found.out

        return jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2, 3), has_aux=True))

    (total, out), want = jax.value_and_grad(on_full, argnums=(0, 1), has_aux=True)(*arrays.values())
    for tokenwise in (True, False):
        (value, found), (d_hidden, d_unembed, *d_reference) = through(tokenwise)(*arrays.values())
        np.testing.assert_allclose(value, total, rtol=1e-5)
        np.testing.assert_allclose(found.metrics["r"].value, out.metrics["r"].value, rtol=1e-5)
        for got, by_formula in zip((d_hidden, d_unembed), want, strict=True):
            np.testing.assert_allclose(got, by_formula, rtol=1e-4, atol=1e-5)
        assert all(not np.any(d) for d in d_reference)


@pytest.mark.parametrize("one_pass", [True, False])
def test_no_logits_of_all_tokens_exist(one_pass):
    v, d, n = 3000, 24, 1024

    def total(hidden, unembed, theirs, their_unembed, batch):
        reference, tiling = Reference(theirs, their_unembed), Tiling(16)
        if one_pass:
            found: Any = token_loss(both_stats, both_loss, tiling, hidden, unembed, batch, reference)
            return found.out.loss.total
        stats: Any = token_stats(both_stats, tiling, hidden, unembed, batch.tokens[0], batch.mask[0], reference)
        return both_loss({name: x[None] for name, x in stats.items()}, batch).loss.total

    rows = [jax.ShapeDtypeStruct((1, n), t) for t in (jnp.int32, bool, jnp.float32, jnp.float32)]
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((n, d), (d, v), (n, d), (d, v))]
    text = jax.jit(jax.grad(total, argnums=(0, 1))).lower(*shapes, Batch(*rows)).compile().as_text()
    sizes = [int(np.prod([int(k) for k in shape.split(",")])) for shape in re.findall(r"\bf32\[([\d,]+)\]", text)]
    assert max(sizes) == d * v  # an unembedding; a tile is 16 x 3000, all logits would be 1024 x 3000


# ------------------------------------------------------------------ objectives by hand

P = jnp.asarray([[[0.0, np.log(3.0)], [np.log(3.0), 0.0], [5.0, 0.0]]], jnp.float32)
"""Policy (1/4, 3/4), then (3/4, 1/4), then a token that is masked."""
Q = jnp.asarray([[[np.log(4.0), 0.0], [np.log(9.0), 0.0], [0.0, 5.0]]], jnp.float32)
"""Reference at temperature 1: (4/5, 1/5), then (9/10, 1/10). Their entropies: 0.500402 and 0.325083 nats."""
FORWARD = 0.8 * np.log(3.2) + 0.2 * np.log(4 / 15), 0.9 * np.log(1.2) + 0.1 * np.log(0.4)
"""KL(q || p) of the two tokens: 0.666170, 0.072460."""
REVERSE = 0.25 * np.log(0.3125) + 0.75 * np.log(3.75), 0.75 * np.log(5 / 6) + 0.25 * np.log(2.5)
"""KL(p || q): 0.700529, 0.092332."""


def one_row(advantage=(0.0, 0.0, 0.0)):
    """Tokens 0; the third is masked. Drawn from the policy: every ratio is 1."""
    old = [[np.log(0.25), np.log(0.75), 0.0]]
    mask = np.asarray([[True, True, False]])
    return Batch.of(
        tokens=np.zeros((1, 3), np.int32),
        mask=mask,
        advantage=np.asarray([advantage], np.float32),
        old_logp=np.asarray(old, np.float32),
    )


def evaluated(objective, z, reference_z, batch=None):
    """(total, LossOutput, gradient into the policy's logits)"""
    batch = batch or one_row()
    given = (batch.tokens, reference_z) if objective.reference else (batch.tokens,)

    def loss(z):
        out = objective.loss(objective.stats(z, *given), batch)
        return out.loss.total, out

    (total, out), gradient = jax.value_and_grad(loss, has_aux=True)(z)
    return total, out, gradient


@pytest.mark.parametrize("name", ["ts_opsd", "opd"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_frozen_teacher_by_hand(name, direction):
    """The reference's logits are doubled and divided by T = 2. Gradients: q || p gives p - q; p || q gives
    p (log p/q - KL)."""
    more = {"teacher": "frozen"} if name == "ts_opsd" else {}
    objective = OBJECTIVES[name](direction=direction, teacher_temperature=2.0, **more)
    assert objective.reference
    assert not objective.uses_advantage
    total, out, gradient = evaluated(objective, P, 2.0 * Q)
    want = FORWARD if direction == "forward" else REVERSE
    np.testing.assert_allclose([total, out.loss.count], [sum(want), 2], rtol=1e-5)
    np.testing.assert_allclose(sum(want), 0.738630 if direction == "forward" else 0.792861, rtol=1e-5)
    if direction == "forward":
        slope = 0.25 - 0.8, 0.75 - 0.9
    else:
        slope = 0.25 * (np.log(0.3125) - REVERSE[0]), 0.75 * (np.log(5 / 6) - REVERSE[1])
    np.testing.assert_allclose(gradient[0], [[slope[0], -slope[0]], [slope[1], -slope[1]], [0, 0]], rtol=1e-4)
    got = {key: float(mean.value) for key, mean in out.metrics.items()}
    assert got == pytest.approx(
        {
            "policy/entropy_nats": 0.562335,
            f"distil/{direction}_kl_nats": sum(want) / 2,
            "distil/teacher_entropy_nats": (0.500402 + 0.325083) / 2,
            "distil/top1_agreement_fraction": 0.5,
        },
        rel=1e-5,
    )


def test_opds_default_is_the_reverse_kl_at_temperature_1():
    total, out, _ = evaluated(OBJECTIVES["opd"](), P, Q)
    np.testing.assert_allclose(total, sum(REVERSE), rtol=1e-5)
    assert "distil/reverse_kl_nats" in out.metrics


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("name", ["ts_opsd", "jsd"])
def test_a_frozen_teacher_that_is_the_policy_is_the_live_one(name, direction):
    """Also far in the collapse, where the largest entry has all but 1e-5 of the probability."""
    rng = np.random.default_rng(0)
    z = np.concatenate([np.full((1, 3, 1), 12.0), rng.normal(size=(1, 3, 50))], axis=-1)
    z[0, 1] *= 0.2
    z = jnp.asarray(z, jnp.float32)
    more = {"direction": direction} if name == "ts_opsd" else {"beta": 0.3 if direction == "forward" else 1.0}
    made = OBJECTIVES[name]
    total, out, gradient = evaluated(made(teacher_temperature=1.5, **more), z, z)
    again, frozen, same = evaluated(made(teacher_temperature=1.5, teacher="frozen", **more), z, z)
    np.testing.assert_allclose(again, total, rtol=1e-5)
    np.testing.assert_allclose(same, gradient, rtol=1e-4, atol=1e-9)
    assert float(frozen.metrics["distil/top1_agreement_fraction"].value) == 1.0
    for key, mean in out.metrics.items():
        np.testing.assert_allclose(frozen.metrics[key].value, mean.value, rtol=1e-5)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("nats", [1e-4, 1e-2])
def test_two_collapsed_distributions_keep_their_digits(direction, nats):
    """Policy and teacher with one entry that has nearly everything: value and gradient against float64, 1e-4."""
    rng = np.random.default_rng(1)
    z = np.concatenate([np.zeros((1, 3, 1)), np.log(nats / 10) - np.log(200) + rng.normal(size=(1, 3, 200))], axis=-1)
    r = z + 0.3 * rng.normal(size=z.shape)
    z, r = z.astype(np.float32), r.astype(np.float32)
    total, out, gradient = evaluated(
        OBJECTIVES["ts_opsd"](direction=direction, teacher="frozen", teacher_temperature=1.1),
        jnp.asarray(z),
        jnp.asarray(r),
    )

    def log_softmax(x):
        x = x.astype(np.float64)
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    logp, logq = log_softmax(z)[:, :2], log_softmax(r.astype(np.float64) / 1.1)[:, :2]
    p, q = np.exp(logp), np.exp(logq)
    forward, reverse = (q * (logq - logp)).sum(-1), (p * (logp - logq)).sum(-1)
    want, slope = (forward, p - q) if direction == "forward" else (reverse, p * (logp - logq - reverse[..., None]))
    assert float(out.metrics["policy/entropy_nats"].value) < 3 * nats
    np.testing.assert_allclose(total, want.sum(), rtol=1e-4)
    error = np.linalg.norm(gradient[:, :2] - slope, axis=-1) / np.linalg.norm(slope, axis=-1)
    assert error.max() < 1e-4, error


def test_eopd_by_hand():
    # Threshold 0.4 nats: the first token's teacher (0.500402) is over it, the second's (0.325083) is not.
    total, out, gradient = evaluated(OBJECTIVES["eopd"](threshold_nats=0.4, coefficient=0.5), P, Q)
    np.testing.assert_allclose(total, sum(REVERSE) + 0.5 * FORWARD[0], rtol=1e-5)
    slope = 0.25 * (np.log(0.3125) - REVERSE[0]) + 0.5 * (0.25 - 0.8), 0.75 * (np.log(5 / 6) - REVERSE[1])
    np.testing.assert_allclose(gradient[0, :2, 0], slope, rtol=1e-4)
    assert float(out.metrics["distil/undecided_fraction"].value) == 0.5
    np.testing.assert_allclose(out.metrics["distil/forward_kl_nats"].value, sum(FORWARD) / 2, rtol=1e-5)
    plain, _, _ = evaluated(OBJECTIVES["eopd"](), P, Q)  # 0.8 nats: of two entries none is so undecided
    np.testing.assert_allclose(plain, sum(REVERSE), rtol=1e-5)
    with pytest.raises(ValueError, match="eopd expects threshold_nats >= 0 .*, got threshold_nats=-1"):
        OBJECTIVES["eopd"](threshold_nats=-1.0)


# Token 0 under policy and reference: 1/4 and 4/5, then 3/4 and 9/10. d = log(reference / policy) = log 3.2, log 1.2.
ESTIMATES = {
    "k1": ((-np.log(3.2), -np.log(1.2)), (0.75, 0.25)),  # gradient into the token's logit: 1 - p
    "k3": ((2.2 - np.log(3.2), 0.2 - np.log(1.2)), (-2.2 * 0.75, -0.2 * 0.25)),  # (1 - e^d) (1 - p)
    "exact": (REVERSE, (0.25 * (np.log(0.3125) - REVERSE[0]), 0.75 * (np.log(5 / 6) - REVERSE[1]))),
}


@pytest.mark.parametrize("estimator", ESTIMATES)
def test_dapos_kl_to_the_reference_by_hand(estimator):
    values, slopes = ESTIMATES[estimator]
    objective = OBJECTIVES["dapo"](kl_coefficient=0.1, kl_estimator=estimator)
    total, out, gradient = evaluated(objective, P, Q)  # advantage 0: the surrogate and its gradient are 0
    np.testing.assert_allclose([total, out.loss.count], [0.1 * sum(values), 2], rtol=1e-5)
    np.testing.assert_allclose(out.metrics["policy/reference_kl_nats"].value, sum(values) / 2, rtol=1e-5)
    np.testing.assert_allclose(gradient[0], [[0.1 * s, -0.1 * s] for s in slopes] + [[0, 0]], rtol=1e-4)
    total, *_ = evaluated(objective, P, Q, one_row((1.0, -3.0, 9.0)))  # beside the surrogate: -A r = -1 + 3
    np.testing.assert_allclose(total, 2.0 + 0.1 * sum(values), rtol=1e-5)
    # At a policy temperature both are of softmax(z / T).
    hot = OBJECTIVES["dapo"](kl_coefficient=0.1, kl_estimator=estimator, policy_temperature=2.0)
    total, *_ = evaluated(hot, 2.0 * P, 2.0 * Q)
    np.testing.assert_allclose(total, 0.1 * sum(values), rtol=1e-5)


def test_dapo_without_a_coefficient_has_no_reference():
    assert not OBJECTIVES["dapo"]().reference
    assert OBJECTIVES["dapo"]().stats == OBJECTIVES["dapo"](kl_estimator="exact").stats
    with pytest.raises(ValueError, match="kl_estimator: expected one of k1, k3, exact, got 'k2'"):
        OBJECTIVES["dapo"](kl_estimator="k2")
    with pytest.raises(ValueError, match="dapo expects kl_coefficient >= 0, got kl_coefficient=-0.1"):
        OBJECTIVES["dapo"](kl_coefficient=-0.1)
    for name in ("ts_opsd", "jsd"):
        with pytest.raises(ValueError, match=f"{name}: teacher must be 'live' or 'frozen', got 'dead'"):
            OBJECTIVES[name](teacher="dead")


def test_the_kl_to_the_start_is_a_metric_and_teaches_nothing():
    """On an objective without a reference and on one with: KL(policy || start) at temperature 1, loss and gradient as
    before."""
    for objective in (OBJECTIVES["dapo"](), OBJECTIVES["ts_opsd"](teacher="frozen", teacher_temperature=2.0)):
        batch = one_row((1.0, -3.0, 9.0))
        before, measured = (evaluated(o, P, Q, batch) for o in (objective, with_start_kl(objective)))
        np.testing.assert_array_equal(measured[0], before[0])
        np.testing.assert_array_equal(measured[2], before[2])
        np.testing.assert_allclose(measured[1].metrics["policy/start_kl_nats"].value, sum(REVERSE) / 2, rtol=1e-5)
        assert measured[1].metrics.keys() == before[1].metrics.keys() | {"policy/start_kl_nats"}


def test_agreement_takes_any_of_several_largest_entries():
    z = jnp.asarray([[1.0, 1.0, 0.0]] * 4 + [[0.0, 3.0, -jnp.inf]])
    reference = jnp.asarray([[0.0, 2.0, 0.0], [0.0, 0.0, 2.0], [2.0, 0.0, 2.0], [1.0, 1.0, 1.0], [9.0, 1.0, 0.0]])
    np.testing.assert_array_equal(top1_agreement(z, reference), [1, 0, 1, 1, 0])


# ------------------------------------------------------------------ in an update


def test_a_reference_of_other_sizes_and_no_gradient_into_it(tiny):
    """The reference's own model runs it, and the gradient of a loss that it alone decides is zero."""
    model, params = tiny
    other = dataclasses.replace(model, config=dataclasses.replace(model.config, num_hidden_layers=1, hidden_size=8))
    theirs = other.init(jax.random.key(1))
    rng = np.random.default_rng(4)
    batch = some_batch(rng, 4, 6)
    reference = ReferencePolicy(other, theirs)
    got = per_token_stats(model, params, batch, OBJECTIVES["opd"](), reference=reference, tile_tokens=4)
    p, q = (jax.nn.log_softmax(m.logits(w, batch.tokens))[:, :-1] for m, w in ((model, params), (other, theirs)))
    want = jnp.pad(jnp.sum(jnp.exp(p) * (p - q), axis=-1), ((0, 0), (1, 0)))
    np.testing.assert_allclose(got["reverse_kl"], jnp.where(batch.mask, want, 0.0), rtol=1e-3, atol=1e-5)

    def loss(theirs):
        grads = make_gradient(model, OBJECTIVES["opd"](), micro_batches=2, tile_tokens=4)
        return grads(params, batch, ReferencePolicy(other, theirs))[1].loss.total

    assert all(not np.any(g) for g in jax.tree.leaves(jax.grad(loss)(theirs)))


def test_an_update_leaves_the_reference_as_it_is_and_asks_for_it(tiny):
    model, params = tiny
    optimizer, objective = make_optimizer(learning_rate=1e-4), OBJECTIVES["ts_opsd"](teacher="frozen")
    update: Any = jax.jit(make_update(model, objective, optimizer, tile_tokens=4), donate_argnums=0)
    reference = jax.tree.map(lambda x: jnp.copy(x), params)
    state = TrainState(jnp.int32(0), jax.tree.map(jnp.copy, params), optimizer.init(params))
    batch = some_batch(np.random.default_rng(5), 4, 6)
    distances = []
    for _ in range(3):
        state, out = update(state, batch, jnp.float32(np.inf), {}, reference)
        distances.append(float(out.metrics["distil/forward_kl_nats"]))
    jax.tree.map(np.testing.assert_array_equal, reference, params)
    assert distances[2] < distances[0], "the policy approaches a teacher that stands still"
    assert update._cache_size() == 1
    with pytest.raises(ValueError, match="compares with a reference: expected its parameters, got none"):
        update(state, batch, jnp.float32(np.inf), {})
