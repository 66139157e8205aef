"""The objective of the README, loaded by the name that a configuration gives it."""

import importlib
from math import log
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from tsopsd_jax.learn.update import make_optimizer, make_update
from tsopsd_jax.objectives import make_objective
from tsopsd_jax.types import Batch, TrainState

ROOT = Path(__file__).resolve().parents[1]
NAME = f"{ROOT}/examples/entropy_bonus.py:dapo_with_entropy"


def test_example_has_about_a_dozen_lines_of_its_own():
    body = (ROOT / "examples" / "entropy_bonus.py").read_text(encoding="utf-8").split("def dapo_with_entropy")[1]
    assert len([line for line in body.splitlines() if line.strip()]) <= 16


def two_tokens(logits, advantage):
    """(total of the loss, count) of the objective with coefficient 0.1 at tokens 1 and 2 of one row; ratio 1."""
    objective = make_objective(NAME, {"coefficient": 0.1})
    stats = objective.stats(logits, jnp.asarray([[0, 0, 0]]))
    batch = Batch.of(
        tokens=jnp.zeros((1, 3), jnp.int32),
        mask=jnp.asarray([[False, True, True]]),
        advantage=jnp.asarray([advantage]),
        old_logp=jax.lax.stop_gradient(stats["logp"]),
    )
    return objective.loss(stats, batch)


def test_example_value():
    # Token 1: logits (0, 0): H = ln 2 = 0.693147; advantage 1, ratio 1: surrogate -1.
    # Token 2: logits (ln 3, 0): p = (3/4, 1/4), H = -(0.75 ln 0.75 + 0.25 ln 0.25) = 0.562335; advantage -2: +2.
    # total = -1 + 2 - 0.1 x (0.693147 + 0.562335) = 0.874452, over 2 tokens; token 0 is masked.
    out = two_tokens(jnp.asarray([[[9.0, 0.0], [0.0, 0.0], [log(3), 0.0]]]), [50.0, 1.0, -2.0])
    assert float(out.loss.total) == pytest.approx(0.874452, abs=2e-6)
    assert float(out.loss.count) == 2
    assert float(out.metrics["policy/entropy_nats"].value) == pytest.approx((0.693147 + 0.562335) / 2, abs=2e-6)


def test_example_gradient_is_entropy_ascent_where_the_advantage_is_zero():
    # d(-c H)/dz_i = c p_i (ln p_i + H): token 2, i = 0: 0.1 x 0.75 x (ln 0.75 + 0.562335) = 0.020599, i = 1 opposite.
    # Token 1 is uniform, where the entropy is stationary: 0. Token 0 is masked: 0.
    logits = jnp.asarray([[[9.0, 0.0], [0.0, 0.0], [log(3), 0.0]]])
    grad = jax.grad(lambda z: two_tokens(z, [0.0, 0.0, 0.0]).loss.total)(logits)
    expected = jnp.asarray([[[0.0, 0.0], [0.0, 0.0], [0.020599, -0.020599]]])
    assert jnp.allclose(grad, expected, atol=2e-6)


def test_example_runs_in_the_learner(tiny):
    """Through the head's tiles and the micro-batches like the library's own: with no advantage it raises entropy."""
    model, params = tiny
    objective = make_objective(NAME, {"coefficient": 1.0})
    optimizer = make_optimizer(learning_rate=1e-2)
    update = jax.jit(make_update(model, objective, optimizer, micro_batches=2, tile_tokens=3))
    batch = Batch.of(
        tokens=jax.random.randint(jax.random.key(1), (4, 8), 0, 37),
        mask=jnp.arange(8)[None, :].repeat(4, axis=0) >= 3,
        advantage=jnp.zeros((4, 8)),
        old_logp=jnp.zeros((4, 8)),
    )
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    state, before = update(state, batch)
    _, after = update(state, batch)
    assert float(after.metrics["policy/entropy_nats"]) > float(before.metrics["policy/entropy_nats"]) + 1e-3


def test_the_method_fits_on_a_page():
    lines = (ROOT / "examples" / "one_page.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 135
    private = [line for line in lines if "tsopsd_jax" in line and "import _" in line]
    assert not private


def test_the_page_runs_its_three_phases(monkeypatch, tmp_path):
    """A step each: from the same state the reheater keeps the responses' accuracy and RL changes the parameters."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    one_page = importlib.import_module("one_page")

    small = [phase._replace(prompts=8 * 8 // phase.group, group=phase.group) for phase in one_page.SCHEDULE]
    monkeypatch.setattr(one_page, "SCHEDULE", small)
    seen = one_page.main(1, tmp_path)
    assert [name for name, _, _ in seen] == ["rl", "reheat", "rl-again"]
    assert all(0.1 < entropy < 0.6 and 0 <= accuracy <= 1 for _, entropy, accuracy in seen)


def test_unknown_hyperparameter_of_an_own_objective_is_named():
    with pytest.raises(ValueError, match="coeficient"):
        make_objective(NAME, {"coeficient": 0.1})
