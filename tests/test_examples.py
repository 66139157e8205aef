"""The objective of the README, loaded by the name that a configuration gives it."""

import dataclasses
import importlib
import re
import runpy
import warnings
from math import log
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tsopsd_jax.learn.update import make_gradient, make_optimizer, make_update
from tsopsd_jax.objectives import make_objective
from tsopsd_jax.testing import check_objective
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


@pytest.mark.slow
def test_the_page_runs_its_three_phases(monkeypatch, tmp_path):
    """A step each: from the same state the reheater keeps the responses' accuracy and RL changes the parameters."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    one_page = importlib.import_module("one_page")

    small = [phase._replace(prompts=8 * 8 // phase.group, group=phase.group) for phase in one_page.SCHEDULE]
    monkeypatch.setattr(one_page, "SCHEDULE", small)
    seen = one_page.main(1, tmp_path)
    assert [name for name, _, _ in seen] == ["rl", "reheat", "rl-again"]
    assert all(0.1 < entropy < 0.6 and 0 <= accuracy <= 1 for _, entropy, accuracy in seen)


# ------------------------------------------------------------------ the gallery: known methods as a user writes them

GALLERY = {name: f"{ROOT}/examples/{name}.py:{name}" for name in ("cispo", "dr_grpo", "gspo", "held_entropy", "sapo")}


@pytest.mark.parametrize("name", GALLERY)
def test_gallery_objectives_are_short_and_keep_the_contract(name):
    lines = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if line.strip()]) <= 20
    assert f"examples/{name}.py:{name}" in lines[0], "how to name it in a configuration"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_objective(make_objective(GALLERY[name], {}))


def two_rows(name, ratio, **hyperparameters):
    """(loss, gradient into logp [2, 3]) of rows with 2 and 1 response tokens, advantages 1 and -2;
    logp is -1 throughout."""
    objective = make_objective(GALLERY[name], hyperparameters)
    mask = jnp.asarray([[False, True, True], [False, True, False]])
    batch = Batch.of(
        tokens=jnp.zeros((2, 3), jnp.int32),
        mask=mask,
        advantage=jnp.asarray([[1.0] * 3, [-2.0] * 3]),
        old_logp=-1 - jnp.log(jnp.asarray(ratio)),
    )

    def mean(logp):
        out = objective.loss({"logp": logp, "entropy": jnp.ones((2, 3))}, batch)
        return out.loss.total / out.loss.count

    return jax.value_and_grad(mean)(jnp.full((2, 3), -1.0))


def test_gspo_by_hand():
    # Row 1: ratios 2 and 1/2: (2 x 1/2)^(1/2) = 1: -1, gradient -1 x 1/2 for each token. Row 2: ratio 4, A -2: 8,
    # unclipped, since the clip bounds a negative advantage from below. Mean of two rows: 3.5; gradients halved.
    value, gradient = two_rows("gspo", [[9.0, 2.0, 0.5], [9.0, 4.0, 9.0]])
    assert float(value) == pytest.approx(3.5)
    assert jnp.allclose(gradient, jnp.asarray([[0.0, -0.25, -0.25], [0.0, 4.0, 0.0]]), atol=1e-5)
    # Ratios 2 and 2: clipped at 1 + 0.1, no gradient. Row 2: ratio 1/2 clipped at 0.9: 1.8.
    value, gradient = two_rows("gspo", [[9.0, 2.0, 2.0], [9.0, 0.5, 9.0]], clip_low=0.1, clip_high=0.1)
    assert float(value) == pytest.approx((-1.1 + 1.8) / 2)
    assert float(jnp.abs(gradient).max()) == 0.0


def test_cispo_by_hand():
    # -clip(r, 0, 3) A logp at logp -1: 2, 0.5 and 3 x -2 = -6; sum -3.5 over 3 tokens. Gradient -clip(r) A / 3,
    # clipped or not.
    value, gradient = two_rows("cispo", [[9.0, 2.0, 0.5], [9.0, 4.0, 9.0]], ratio_high=3.0)
    assert float(value) == pytest.approx(-3.5 / 3)
    assert jnp.allclose(gradient, jnp.asarray([[0.0, -2 / 3, -0.5 / 3], [0.0, 2.0, 0.0]]), atol=1e-6)


def test_sapo_by_hand():
    # Gate 4 / tau sigmoid(tau (r - 1)), tau 1 and 2. Ratio 1: 4 x 1/2 = 2; ratio 2: 4 x 0.7310586 = 2.9242343; A -2,
    # ratio 1: 2 x 1/2 = 1. Rows -(2 + 2.9242343) / 2 = -2.4621172 and 2; mean -0.2310586.
    # d gate / d logp = 4 s (1 - s) r: 1 at ratio 1; 4 x 0.1966119 x 2 = 1.5728955 at ratio 2.
    # Over 2 tokens and 2 rows: / 4.
    value, gradient = two_rows("sapo", [[9.0, 1.0, 2.0], [9.0, 1.0, 9.0]], tau_negative=2.0)
    assert float(value) == pytest.approx(-0.2310586, abs=1e-6)
    assert jnp.allclose(gradient, jnp.asarray([[0.0, -0.25, -0.3932239], [0.0, 1.0, 0.0]]), atol=1e-6)


def test_dr_grpo_by_hand():
    # Row 1: -1.2 (clipped) - 0.5; row 2: 2 x 4. Sums over max_tokens 10, mean of two rows: 0.5 (-0.17 + 0.8).
    value, gradient = two_rows("dr_grpo", [[9.0, 2.0, 0.5], [9.0, 4.0, 9.0]], max_tokens=10)
    assert float(value) == pytest.approx(0.315)
    assert jnp.allclose(gradient, jnp.asarray([[0.0, 0.0, -0.025], [0.0, 0.4, 0.0]]), atol=1e-6)


def test_held_entropy_by_hand():
    # -r A - 0.1 H: row 1: ratios 1 and 1: -1 - 1 - 0.1 (0.5 + 0.25); row 2: 2 - 0.1 x 1. Sum -0.175 over 3 tokens.
    objective = make_objective(GALLERY["held_entropy"], {"target_nats": 0.2, "step": 0.01})
    batch = Batch.of(
        tokens=jnp.zeros((2, 3), jnp.int32),
        mask=jnp.asarray([[False, True, True], [False, True, False]]),
        advantage=jnp.asarray([[1.0] * 3, [-2.0] * 3]),
        old_logp=jnp.full((2, 3), -1.0),
    )
    stats = {"logp": jnp.full((2, 3), -1.0), "entropy": jnp.asarray([[9.0, 0.5, 0.25], [9.0, 1.0, 9.0]])}
    out = objective.loss(stats, dataclasses.replace(batch, knobs={"coefficient": jnp.float32(0.1)}))
    assert float(out.loss.value) == pytest.approx(-0.175 / 3)
    turn = objective.control.update
    assert turn({"coefficient": 0.1}, {"policy/entropy_nats": 0.19})["coefficient"] == pytest.approx(0.11)
    assert turn({"coefficient": 0.1}, {"policy/entropy_nats": 0.2})["coefficient"] == pytest.approx(0.09)
    assert turn({"coefficient": 0.005}, {"policy/entropy_nats": 0.2}) == {"coefficient": 0.0}


@pytest.mark.parametrize("name", ["gspo", "dr_grpo"])
def test_means_over_rows_are_of_the_whole_update(name, tiny):
    """Rows of different lengths, micro-batches and tiles: the same gradient,
    and rows without a response count nothing."""
    model, params = tiny
    at = jnp.arange(8)[None, :]
    batch = Batch.of(
        tokens=jax.random.randint(jax.random.key(1), (4, 8), 0, 37),
        mask=(at >= 2) & (at < jnp.asarray([8, 4, 2, 7])[:, None]),
        advantage=jnp.asarray([[1.0], [-1.0], [5.0], [0.5]]) * jnp.ones((4, 8)),
        old_logp=jnp.full((4, 8), -3.6),
    )
    objective = make_objective(GALLERY[name], {"clip_low": 0.9, "clip_high": 9.0})
    whole, pieces = (
        make_gradient(model, objective, micro_batches=n, tile_tokens=t)(params, batch) for n, t in ((1, 64), (4, 3))
    )
    assert float(whole[1].loss.count) == 3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), whole[0], pieces[0])


@pytest.mark.slow
def test_the_python_api_reheats_a_policy(capsys):
    """Every cell of the script, as a person would run them."""
    runpy.run_path(str(ROOT / "examples" / "python_api.py"))
    before, after = re.findall(r"entropy ([\d.]+) -> ([\d.]+) nats", capsys.readouterr().out)[0]
    assert float(after) > float(before)


def test_unknown_hyperparameter_of_an_own_objective_is_named():
    with pytest.raises(ValueError, match="coeficient"):
        make_objective(NAME, {"coeficient": 0.1})
