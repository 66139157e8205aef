"""`check_objective`: right objectives of every kind pass, and of every kind of mistake one line says what it is."""

# ruff: noqa: ARG005 - an objective has two arguments, whether it reads them or not

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import pytest

from tsopsd_jax import losses
from tsopsd_jax.objectives import OBJECTIVES, Control, Objective, make_objective
from tsopsd_jax.testing import check_objective, objective_notes
from tsopsd_jax.types import LossOutput, Mean


def stats(logits, tokens):
    return {"logp": losses.token_logp(logits, tokens), "entropy": losses.entropy(logits)}


def token_loss(stats, batch):
    return LossOutput(
        Mean.of(-batch.advantage * stats["logp"], batch.mask),
        {"policy/entropy_nats": Mean.of(stats["entropy"], batch.mask)},
    )


def sequence_loss(stats, batch):
    """A ratio of whole sequences: right, and not tokenwise."""
    n = jnp.sum(batch.mask, axis=1, keepdims=True, dtype=jnp.float32)
    log_ratio = jnp.sum(stats["logp"] - batch.old_logp, axis=1, keepdims=True) / n
    ratio = jnp.broadcast_to(jnp.exp(log_ratio), batch.mask.shape)
    return LossOutput(Mean.of(-batch.advantage * ratio, batch.mask), {})


def row_mean_loss(stats, batch):
    """A mean over rows of means over tokens; every row has a response."""
    n = jnp.sum(batch.mask, axis=1, dtype=jnp.float32)
    per_row = jnp.sum(-batch.advantage * stats["logp"], axis=1) / n
    return LossOutput(Mean.of(per_row, n > 0), {})


def entropy_loss(stats, batch, *, coefficient=1.0):
    return LossOutput(Mean.of(-coefficient * stats["entropy"], batch.mask), {})


RIGHT = {
    "tokenwise": Objective(stats, token_loss, tokenwise=True),
    "without saying so": Objective(stats, token_loss),
    "sequences": Objective(stats, sequence_loss),
    "rows": Objective(stats, row_mean_loss),
    "no advantage": Objective(stats, entropy_loss, tokenwise=True, uses_advantage=False, policy_temperature=None),
    "a partial function": Objective(stats, functools.partial(entropy_loss, coefficient=0.1)),
    "jitted": Objective(jax.jit(stats), jax.jit(token_loss), tokenwise=True),
    "top 50 entries": Objective(
        lambda z, t: {"logp": losses.token_logp(z, t), "entropy": losses.entropy(jax.lax.top_k(z, 50)[0])}, token_loss
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_objectives_pass(name):
    assert objective_notes(RIGHT[name]) == []


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_librarys_objectives_pass_and_nothing_is_warned_of(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_objective(OBJECTIVES[name]()) is None


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_gradient_that_is_zero_by_choice_is_warned_of(direction):
    objective = OBJECTIVES["ts_opsd"](direction=direction, teacher_temperature=1.0)
    with pytest.warns(UserWarning, match=r"ts_opsd\.py:\d+, loss: the gradient of the loss is zero"):
        check_objective(objective)
    (note,) = objective_notes(Objective(stats, functools.partial(entropy_loss, coefficient=0.0)))
    assert "entropy_loss: the gradient of the loss is zero" in note


def says(objective, *words):
    with pytest.raises(ValueError) as error:
        check_objective(objective)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 500
    for word in words:
        assert word in message, message


def named(name, function):
    function.__name__ = name
    return function


WRONG_STATS = {
    "no dict": (lambda z, t: losses.entropy(z), ["expected a dict of statistics by name, got float32 of shape [48]"]),
    "the whole vocabulary": (
        lambda z, t: {"h": z},
        ["the statistic 'h'", "shape [48]", "got float32 of shape [48, 512]"],
    ),
    "one for all": (lambda z, t: {"h": jnp.mean(z)}, ["the statistic 'h'", "got float32 of shape []"]),
    "an axis too many": (lambda z, t: {"h": losses.entropy(z)[:, None]}, ["got float32 of shape [48, 1]"]),
    "the wrong axis": (lambda z, t: {"h": jnp.max(z, axis=0)}, ["got float32 of shape [512]"]),
    "integers": (lambda z, t: {"h": jnp.argmax(z, axis=-1)}, ["the statistic 'h'", "got int32 of shape [48]"]),
    "nothing": (lambda z, t: {"h": None}, ["the statistic 'h'", "got None"]),
    "what raises": (lambda z, t: {"h": {}["k"]}, ["raised KeyError: 'k'"]),
    "a branch": (lambda z, t: {"h": z[:, 0] if z[0, 0] > 0 else z[:, 1]}, ["raised TracerBoolConversionError"]),
}


@pytest.mark.parametrize("kind", WRONG_STATS)
def test_wrong_statistics_are_named(kind):
    wrong, words = WRONG_STATS[kind]
    place = [] if "raised" in words[0] else [", mine: "]  # of what raises, the innermost function in the file
    says(Objective(named("mine", wrong), token_loss), "test_testing.py:", *place, *words)


def of(values, batch):
    return LossOutput(Mean.of(values, batch.mask), {})


WRONG_LOSSES = {
    "a number": (lambda s, b: jnp.sum(s["logp"]), ["expected a LossOutput, got float32 of shape []"]),
    "a pair": (lambda s, b: (jnp.sum(s["logp"]), {}), ["expected a LossOutput, got ("]),
    "no Mean": (lambda s, b: LossOutput(jnp.sum(s["logp"]), {}), ["expected the loss to be a Mean, got float32"]),
    "nothing added up": (
        lambda s, b: LossOutput(Mean(s["logp"], jnp.ones(())), {}),
        ["the total of the loss", "got float32 of shape [6, 8]"],
    ),
    "counted in integers": (
        lambda s, b: LossOutput(Mean(jnp.sum(s["logp"]), jnp.sum(b.mask)), {}),
        ["the count of the loss", "got int32 of shape []"],
    ),
    "rows under a mask of tokens": (
        lambda s, b: of(jnp.sum(s["logp"], axis=1), b),
        ["raised ValueError: Mean.of expects values and mask of one shape, got values (6,) and mask (6, 8)"],
    ),
    "a metric that is a number": (
        lambda s, b: LossOutput(Mean.of(s["logp"], b.mask), {"own/x": 1.0}),
        ["the metric 'own/x' to be a Mean, got float32 of shape []"],
    ),
    "metrics in a list": (lambda s, b: LossOutput(Mean.of(s["logp"], b.mask), []), ["metrics to be a dict of Mean"]),
    "a statistic that nobody returns": (
        lambda s, b: of(s["kl"], b),
        ["raised KeyError: 'kl'", "stats returns entropy, logp"],
    ),
    "a field that a batch lacks": (lambda s, b: of(b.reward, b), ["raised AttributeError", "reward"]),
    "not finite": (
        lambda s, b: of(s["logp"] / 0.0, b),
        ["finite values on the toy batch, got the loss's total with -inf"],
    ),
    "counts nothing": (
        lambda s, b: LossOutput(Mean.of(s["logp"], jnp.zeros_like(b.mask)), {}),
        ["expected the loss to count tokens, got a count of 0.0"],
    ),
    "a mean": (
        lambda s, b: LossOutput(Mean(jnp.mean(s["logp"]), jnp.ones(())), {}),
        ["where rows have more padding", "use batch.mask"],
    ),
    "a mean of the mask": (
        lambda s, b: LossOutput(Mean(Mean.of(s["logp"], b.mask).value, jnp.ones(())), {}),
        ["the loss's count to stay 1", "two micro-batches", "got 2", "sums and counts"],
    ),
    "counts padding": (
        lambda s, b: LossOutput(Mean.of(s["logp"], jnp.ones_like(b.mask)), {}),
        ["the loss's count to stay 48 where rows have more padding, got 66", "use batch.mask"],
    ),
    "a metric that counts padding": (
        lambda s, b: LossOutput(Mean.of(s["logp"], b.mask), {"own/h": Mean.of(s["entropy"], b.mask | True)}),
        ["the count of 'own/h' to stay 48", "more padding"],
    ),
    "compares with the batch": (
        lambda s, b: of(jnp.where(b.mask, s["logp"] - jnp.mean(s["logp"] * jnp.float32(48 / 21)), 0.0) ** 2, b),
        ["loss's total", "where"],
    ),
    "compares with the largest of the batch": (
        lambda s, b: of(s["logp"] * jnp.max(b.advantage), b),
        ["the loss's total to stay", "two micro-batches"],
    ),
    "the number of a row": (
        lambda s, b: of(s["logp"] * jnp.arange(len(b.mask), dtype=jnp.float32)[:, None], b),
        ["the loss's total to stay", "rows stand in another order"],
    ),
    "no parameters": (lambda s, b: of(b.old_logp * b.advantage, b), ["depends on the logits", "without a gradient"]),
    "a gradient that is stopped": (
        lambda s, b: of(jax.lax.stop_gradient(s["logp"]), b),
        ["expected a loss that depends on the logits", "nothing would be learned"],
    ),
    "a step": (
        lambda s, b: of((s["logp"] > -5).astype(jnp.float32), b),
        ["expected a loss that depends on the logits"],
    ),
    "a loop without a derivative": (
        lambda s, b: of(jax.lax.while_loop(lambda x: jnp.sum(x) < 0, lambda x: x + 1, s["logp"]), b),
        ["raised ValueError: Reverse-mode differentiation does not work"],
    ),
}


@pytest.mark.parametrize("kind", WRONG_LOSSES)
def test_wrong_losses_are_named(kind):
    wrong, words = WRONG_LOSSES[kind]
    place = [] if "raised" in words[0] else [", mine: "]
    says(Objective(stats, named("mine", wrong)), "test_testing.py:", *place, *words)


def test_statistics_that_mix_tokens_are_named():
    def mixed(logits, tokens):
        return stats(logits - jnp.mean(logits, axis=0, keepdims=True), tokens)

    for tokenwise in (True, False):
        words = "the statistic 'entropy' to stay", "follow from its own logits alone"
        says(Objective(mixed, token_loss, tokenwise=tokenwise), ", mixed: ", *words)


NOT_TOKENWISE = {
    "sequences": sequence_loss,
    "what came before": lambda s, b: of(-b.advantage * jnp.cumsum(s["logp"], axis=1), b),
    "the next token": lambda s, b: of(-b.advantage * (s["logp"] + jnp.roll(s["logp"], -1, axis=1)), b),
    "the place in the row": lambda s, b: of(s["logp"] * jnp.arange(b.mask.shape[1], dtype=jnp.float32)[None], b),
    "statistics outside the mask": lambda s, b: LossOutput(
        Mean(jnp.sum(s["entropy"]), Mean.of(s["logp"], b.mask).count), {}
    ),
}


@pytest.mark.parametrize("kind", NOT_TOKENWISE)
def test_tokenwise_must_be_true(kind):
    loss = NOT_TOKENWISE[kind]
    assert objective_notes(Objective(stats, loss)) == []
    says(
        Objective(stats, named("mine", loss), tokenwise=True), "to stay", "tokenwise=True allows", "leave tokenwise out"
    )


def test_what_is_wrong_with_rows_is_not_blamed_on_tokenwise():
    wrong = WRONG_LOSSES["counts padding"][0]
    says(Objective(stats, wrong, tokenwise=True), "where rows have more padding")


def test_declared_needs_must_be_true():
    says(
        Objective(stats, token_loss, uses_advantage=False),
        "declares uses_advantage=False, but the loss's total changes",
    )
    says(Objective(stats, token_loss, tokenwise="yes"), "expected tokenwise to be True or False, got 'yes'")
    says(Objective(stats, token_loss, policy_temperature=0.0), "policy_temperature to be positive or None, got 0.0")
    says(Objective(stats, 3), "an Objective of two functions")


def test_a_control_may_read_what_its_own_loss_reports():
    def own_loss(stats, batch):
        out = token_loss(stats, batch)
        return LossOutput(out.loss, out.metrics | {"own/logp": Mean.of(stats["logp"], batch.mask)})

    def turn(knobs, metrics):
        return {"x": knobs["x"] + metrics["own/logp"]}

    control = Control({"x": 0.0}, turn)
    assert objective_notes(Objective(stats, own_loss, tokenwise=True, control=control)) == []
    says(
        Objective(stats, token_loss, control=control), ", turn: ", "raised KeyError: 'own/logp'", "policy/entropy_nats"
    )
    follows = Control({"x": 0.0}, lambda k, m: {"x": m["policy/entropy_nats"] + m["loss/total"] + m["optim/grad_norm"]})
    assert objective_notes(Objective(stats, token_loss, tokenwise=True, control=follows)) == []
    silent = named("own_loss", lambda s, b: LossOutput(token_loss(s, b).loss, {}))
    says(
        Objective(stats, silent, control=follows), "raised KeyError: 'policy/entropy_nats'", "metrics here are {'loss/"
    )
    says(
        Objective(stats, token_loss, control=Control({"x": 0.0}, lambda k, m: {})), "finite numbers under ['x'], got {}"
    )


def test_a_knob_that_select_sets_may_not_depend_on_the_order_of_rows():
    def select(_, batch):
        return dataclasses.replace(batch, knobs={"first": batch.advantage[0, jnp.argmax(batch.mask[0])]})

    def own_loss(stats, batch):
        return LossOutput(Mean.of(batch.knobs["first"] * stats["logp"], batch.mask), {})

    says(
        Objective(stats, own_loss, select=select),
        ", select: ",
        "the knob 'first' to stay",
        "rows stand in another order",
    )


def test_what_is_from_no_file_is_named_too():
    elsewhere = type("Elsewhere", (), {"__call__": lambda self, z, t: 3, "__module__": "nowhere"})
    says(Objective(elsewhere(), token_loss), "nowhere:0, Elsewhere: expected a dict of statistics by name, got ")


def test_the_file_of_ones_own_and_the_line_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from tsopsd_jax.objectives import Objective\n"
        "def f():\n"
        "    def stats(logits, tokens):\n"
        "        return {'x': logits[:, 0]}\n"
        "    def loss(stats, batch):\n"
        "        y = stats['x'] + batch.advantage[:, :3]\n"
        "        return y\n"
        "    return Objective(stats, loss)\n"
    )
    says(make_objective("mine.py:f", {}), "mine.py:6, loss: raised TypeError: ", "(6, 8)", "(6, 3)")
