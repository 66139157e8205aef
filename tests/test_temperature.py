"""Sampling temperatures that change: from rollout to rollout as a knob, from token to token as EDT; TAMPO and the
schedule."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tsopsd_jax import losses
from tsopsd_jax.distributed.sharding import make_mesh
from tsopsd_jax.learn.update import UpdateOut, make_gradient
from tsopsd_jax.metric_names import HELD, SKIPPED
from tsopsd_jax.objectives import Control, Objective, dapo, with_start_kl
from tsopsd_jax.objectives.dapo import tempered_stats
from tsopsd_jax.objectives.tampo import drawn_index, probabilities, sparsemax, tampo
from tsopsd_jax.rollout import Engine, Sampling, draw, sample
from tsopsd_jax.testing import check_objective
from tsopsd_jax.train.rollout_updates import take_updates
from tsopsd_jax.types import SAMPLING_TEMPERATURE, Batch, Prompts, TrainState

N = 2000
GRID = jnp.asarray((np.arange(N) + 0.5) / N, jnp.float32)  # midpoints: a frequency is right to 1 / N
P = np.array([0.4, 0.05, 0.3, 0.05, 0.2])
MODES = {"plain": {}, "top-k": {"top_k": 3}, "top-p": {"top_p": 0.75}}


def share_and_logp(drawn, vocab):
    """(share of each token, its reported log-probability) of the draws at the points of GRID."""
    token, logp = (np.asarray(x) for x in drawn)
    reported = np.full(vocab, np.nan)
    reported[token] = logp
    np.testing.assert_array_equal(reported[token], logp)
    return np.bincount(token, minlength=vocab) / N, reported


# ------------------------------------------------------------------ an input of the sampler


@pytest.mark.parametrize("mode", MODES)
def test_a_temperature_that_is_an_input_draws_the_settings_distribution(mode):
    """At T the frequencies are those of p^(1/T), whatever the settings' own temperature; one program draws all."""
    logits = jnp.broadcast_to(jnp.asarray(np.log(P), jnp.float32)[None, :], (N, 5))
    turned = jax.jit(functools.partial(draw, sampling=Sampling(sampling_temperature=0.3, **MODES[mode])))
    for t in (0.5, 1.0, 2.0):
        share, logp = share_and_logp(turned(logits, GRID, sampling_temperature=jnp.float32(t)), 5)
        of_settings = functools.partial(draw, sampling=Sampling(sampling_temperature=t, **MODES[mode]))
        want_share, want_logp = share_and_logp(jax.jit(of_settings)(logits, GRID), 5)
        np.testing.assert_array_equal(share, want_share)
        np.testing.assert_allclose(logp, want_logp, atol=1e-6)
        if mode == "plain":
            want = P ** (1 / t) / (P ** (1 / t)).sum()
            np.testing.assert_allclose(share, want, atol=1.5 / N)
            np.testing.assert_allclose(logp, np.log(want), atol=1e-6)
    assert turned._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(5)
    length = np.array([4, 1, 3, 2], np.int32)
    tokens = rng.integers(0, 37, size=(4, 4)).astype(np.int32)
    return Prompts(tokens=tokens, length=length, row_id=np.arange(4, dtype=np.uint32))


def engine_of(model, sampling):
    return Engine(
        model,
        make_mesh(fsdp=1, devices=jax.devices()[:1]),
        sampling=sampling,
        max_prompt_tokens=4,
        max_response_tokens=6,
        stop_ids=(3,),
        slots=4,
        segment=6,  # one: with several, shapes follow from the responses' lengths
    )


def test_another_temperature_compiles_nothing(tiny, prompts):
    """Rollouts of the engine and of the sampler inside jit, at two temperatures: those of settings with them."""
    model, params = tiny
    key = jax.random.key(11)
    engine = engine_of(model, Sampling())
    view = engine.view(params)
    settings = {"max_response_tokens": 6, "stop_ids": (3,)}
    inside = jax.jit(functools.partial(sample, model, sampling=Sampling(), **settings))
    programs, seen = None, []
    for t in (0.6, 1.7):
        fixed = Sampling(sampling_temperature=t)
        want = jax.jit(functools.partial(sample, model, sampling=fixed, **settings))(params, prompts, key)
        for got in (
            engine.run(view, prompts, key, sampling_temperature=t),
            inside(params, prompts, key, jnp.float32(t)),
        ):
            np.testing.assert_array_equal(got.tokens, want.tokens)
            np.testing.assert_allclose(got.logp, want.logp, atol=1e-5)
        programs = programs or engine.programs
        seen.append(want.tokens)
    assert engine.programs == programs
    assert inside._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]
    assert not np.array_equal(*seen), "the temperatures should draw other tokens, or this tests nothing"
    with pytest.raises(ValueError, match="the knob sampling_temperature must be a number of at least 1e-06, got 0"):
        engine.run(view, prompts, key, sampling_temperature=0.0)


# ------------------------------------------------------------------ and of the ratio


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, 37, size=(4, 8)).astype(np.int32)
    mask = (np.arange(8)[None, :] >= 3) & (np.arange(8)[None, :] < np.array([8, 5, 7, 6])[:, None])
    advantage = np.array([[1.0], [-1.0], [0.5], [-2.0]]) + np.zeros((4, 8))
    return Batch.of(tokens=tokens, mask=mask, advantage=advantage, old_logp=-3.5 + 0.0 * tokens)


@pytest.mark.parametrize("tokenwise", [True, False])
def test_the_ratio_is_at_the_knob(tiny, batch, tokenwise):
    """Gradient, loss and statistics at the knob 1.3 are those of `dapo(policy_temperature=1.3)`, through both ways of
    the head; one program serves every temperature."""
    model, params = tiny
    turned = dapo(final_temperature=2.0)._replace(tokenwise=tokenwise)
    made = jax.jit(make_gradient(model, turned, micro_batches=2, tile_tokens=4))
    for t in (1.3, 0.8):
        fixed = dapo(policy_temperature=t)._replace(tokenwise=tokenwise)
        want = jax.jit(make_gradient(model, fixed, micro_batches=2, tile_tokens=4))(params, batch)
        got = made(params, dataclasses.replace(batch, knobs={SAMPLING_TEMPERATURE: jnp.float32(t)}))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), got, want)
    assert made._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]


def test_all_updates_of_a_rollout_are_at_its_temperature(batch):
    seen = []

    def update(state, _part, _length, _limit, knobs):
        seen.append({name: float(x) for name, x in knobs.items()})
        metrics = {name: jnp.float32(0.0) for name in (SKIPPED, HELD)}
        return state, UpdateOut(metrics, jnp.bool_(True), {}), 1.0

    control = Control(
        {SAMPLING_TEMPERATURE: 1.0, "other": 1.0}, lambda knobs, _: {k: x + 0.5 for k, x in knobs.items()}
    )
    _, learnt, _ = take_updates(
        update,
        TrainState(jnp.int32(0), {}, {}),
        batch,
        np.array([8, 5, 7, 6]),
        [np.array([0, 1]), np.array([2, 3])],
        hold_above_nats=np.inf,
        knobs=dict(control.init),
        control=control,
        beside={},
        mesh=make_mesh(fsdp=1, devices=jax.devices()[:1]),
    )
    assert seen == [{SAMPLING_TEMPERATURE: 1.0, "other": 1.0}, {SAMPLING_TEMPERATURE: 1.0, "other": 1.5}]
    assert learnt.knobs == {SAMPLING_TEMPERATURE: 2.0, "other": 2.0}


def test_statistics_at_a_knob_by_hand():
    # z = (2 log 3, 0), T = 2: z / T = (log 3, 0), p = (3/4, 1/4): logp = log 3/4, H = -(3/4 log 3/4 + 1/4 log 1/4) =
    # 0.562335. At temperature 1: p = (9/10, 1/10), H = 0.325083. d logp / dz = (1 - 3/4, -1/4) / 2.
    z, token = jnp.asarray([[2 * np.log(3.0), 0.0]], jnp.float32), jnp.zeros((1,), jnp.int32)

    def logp(z):
        found = tempered_stats(z, token, sampling_temperature=jnp.float32(2.0))
        return found["logp"][0], found

    (value, found), gradient = jax.value_and_grad(logp, has_aux=True)(z)
    np.testing.assert_allclose(value, np.log(0.75), rtol=1e-6)
    np.testing.assert_allclose(found["entropy"], [0.325083], rtol=1e-5)
    np.testing.assert_allclose(found["entropy_at_policy_temperature"], [0.562335], rtol=1e-5)
    np.testing.assert_allclose(gradient, [[0.125, -0.125]], rtol=1e-5)


def test_a_schedule_moves_in_a_line_and_stays():
    objective = dapo(policy_temperature=0.9, final_temperature=1.5, anneal_updates=3)
    knobs, seen = objective.control.init, []
    for _ in range(5):
        seen.append(knobs[SAMPLING_TEMPERATURE])
        knobs = objective.control.update(knobs, {})
    np.testing.assert_allclose(seen, [0.9, 1.1, 1.3, 1.5, 1.5], rtol=1e-12)
    falling = dapo(policy_temperature=1.5, final_temperature=1.0, anneal_updates=1).control
    assert falling.update(falling.update(falling.init, {}), {}) == {SAMPLING_TEMPERATURE: 1.0}
    assert check_objective(objective) is None
    assert dapo(policy_temperature=0.9).control is None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: dapo(final_temperature=0.0), "positive final_temperature and anneal_updates of at least 1"),
        (lambda: dapo(final_temperature=1.5, anneal_updates=0), "anneal_updates=0"),
        (lambda: dapo(final_temperature=1.5, kl_coefficient=0.1), "no final_temperature beside a penalty"),
        (lambda: tampo(temperatures=[1.0]), "two different positive temperatures or more"),
        (lambda: tampo(temperatures=[1.0, 1.0]), "two different positive temperatures or more"),
        (lambda: tampo(temperatures=[0.0, 1.0]), "two different positive temperatures or more"),
        (lambda: tampo(temperatures=[0.9, 1.1]), "initial among them"),
        (lambda: tampo(ema=0.0), "0 < ema <= 1"),
        (lambda: tampo(nucleus=1.1), "0 <= nucleus <= 1"),
    ],
)
def test_what_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def turning(turn) -> Objective:
    control = Control(
        {SAMPLING_TEMPERATURE: 1.0}, lambda knobs, _: {SAMPLING_TEMPERATURE: turn(knobs[SAMPLING_TEMPERATURE])}
    )
    return dapo()._replace(stats=tempered_stats, control=control)


def test_the_contract_of_a_turned_temperature():
    assert check_objective(turning(lambda t: t + 0.1)) is None
    assert check_objective(with_start_kl(dapo(final_temperature=1.5))) is None
    with pytest.raises(ValueError, match=r"a temperature above 0\), got"):
        check_objective(turning(lambda t: t - 0.5))
    forgot = turning(lambda t: t)._replace(stats=dapo().stats)
    with pytest.raises(ValueError, match="unexpected keyword argument 'sampling_temperature'"):
        check_objective(forgot)


# ------------------------------------------------------------------ TAMPO


def test_sparsemax_by_hand():
    # (0.5, 0.3, -2): two are in, tau = (0.8 - 1) / 2 = -0.1: (0.6, 0.4, 0). (3, 0, 0): one, tau = 2. Equal ones share.
    z = jnp.asarray([[0.5, 0.3, -2.0], [0.0, 3.0, 0.0], [-1.0, -1.0, -1.0]])
    np.testing.assert_allclose(sparsemax(z), [[0.6, 0.4, 0.0], [0.0, 1.0, 0.0], [1 / 3] * 3], atol=1e-6)


def test_tampo_credits_temperatures_by_hand():
    # Row 0, two tokens: mean logp (-0.4, -0.2) at the two temperatures: tau = (-0.6 - 1) / 2 = -0.8: shares (0.4, 0.6);
    # A 2. Row 1, one token: (-0.1, -0.7): tau = (-0.8 - 1) / 2 = -0.9: (0.8, 0.2); A -1. Row 2 has no response and
    # counts nowhere. Means over two responses: (0.8 - 0.8) / 2 = 0 and (1.2 - 0.2) / 2 = 0.5. The surrogate at ratio 1:
    # -(2 + 2 - 1) over three tokens.
    mask = np.array([[True, True], [True, False], [False, False]])
    advantage = np.array([[2.0, 2.0], [-1.0, 9.0], [9.0, 9.0]])
    batch = Batch.of(tokens=np.zeros((3, 2), np.int32), mask=mask, advantage=advantage, old_logp=-1.0 + 0 * advantage)
    stats = {name: jnp.full((3, 2), -1.0) for name in ("logp", "entropy", "entropy_at_policy_temperature")}
    stats["logp_at_0.9"] = jnp.asarray([[-0.3, -0.5], [-0.1, 7.0], [7.0, 7.0]])
    stats["logp_at_1"] = jnp.asarray([[-0.1, -0.3], [-0.7, 7.0], [7.0, 7.0]])
    objective = tampo(temperatures=[0.9, 1])

    def total(stats):
        out = objective.loss(stats, batch)
        return out.loss.total, out

    (value, out), gradient = jax.value_and_grad(total, has_aux=True)(stats)
    np.testing.assert_allclose(value, -3.0, rtol=1e-6)
    np.testing.assert_allclose(gradient["logp"], [[-2.0, -2.0], [1.0, 0.0], [0.0, 0.0]], rtol=1e-6)
    for name in ("logp_at_0.9", "logp_at_1"):
        np.testing.assert_array_equal(gradient[name], 0.0)
    np.testing.assert_allclose(out.metrics["tampo/credit_at_0.9"].value, 0.0, atol=1e-6)
    np.testing.assert_allclose(out.metrics["tampo/credit_at_1"].value, 0.5, rtol=1e-6)


def test_tampo_measures_the_likelihood_at_every_temperature_of_the_grid():
    # p = (9/10, 1/10) at 1 and (3/4, 1/4) at 2, as above; no gradient passes through them.
    z, token = jnp.asarray([[2 * np.log(3.0), 0.0]], jnp.float32), jnp.zeros((1,), jnp.int32)
    stats = functools.partial(tampo(temperatures=[1, 2]).stats, sampling_temperature=jnp.float32(2.0))
    found = stats(z, token)
    np.testing.assert_allclose(found["logp_at_1"], [np.log(0.9)], rtol=1e-5)
    np.testing.assert_allclose(found["logp_at_2"], [np.log(0.75)], rtol=1e-5)
    np.testing.assert_allclose(found["logp"], [np.log(0.75)], rtol=1e-5)
    np.testing.assert_array_equal(jax.grad(lambda z: stats(z, token)["logp_at_1"][0])(z), 0.0)


def test_the_nucleus_of_temperatures_by_hand():
    # Averages (1, 3, 0, 2): (1, 3, 0, 2) / 6; in falling order 1, 3, 0, 2 with masses 1/2, 5/6, 1.
    probability = probabilities([-1.0, 1.0, -2.0, 0.0])
    np.testing.assert_allclose(probability, [1 / 6, 1 / 2, 0, 1 / 3])
    assert probabilities([0.3, 0.3]) == [0.5, 0.5]
    share = [drawn_index(probability, nucleus=0.7, uniform=u) for u in (np.arange(N) + 0.5) / N]
    np.testing.assert_allclose(np.bincount(share, minlength=4) / N, [0, 0.6, 0, 0.4], atol=1.5 / N)
    share = [drawn_index(probability, nucleus=1.0, uniform=u) for u in (np.arange(N) + 0.5) / N]
    np.testing.assert_allclose(np.bincount(share, minlength=4) / N, probability, atol=1.5 / N)
    assert {drawn_index(probability, nucleus=0.0, uniform=u) for u in (0.0, 0.999)} == {1}
    assert drawn_index([0.5, 0.5], nucleus=0.5, uniform=0.99) == 0


def test_tampo_chooses_what_it_credits():
    # Average 0.95 x 0 + 0.05 x credit, then 0.95 x that + 0.05 x the next.
    control = tampo(temperatures=[0.8, 1.0, 1.2]).control
    knobs = control.init
    assert knobs[SAMPLING_TEMPERATURE] == 1.0
    names = [f"tampo/credit_at_{t}" for t in ("0.8", "1", "1.2")]
    first = control.update(knobs, dict(zip(names, (0.0, 0.2, 1.0), strict=True)))
    assert [first[f"credit_at_{t}"] for t in ("0.8", "1", "1.2")] == pytest.approx([0.0, 0.01, 0.05])
    assert first[SAMPLING_TEMPERATURE] == 1.2  # 5/6 of the mass, more than the nucleus
    second = control.update(first, dict(zip(names, (0.0, 1.0, -1.0), strict=True)))
    assert [second[f"credit_at_{t}"] for t in ("0.8", "1", "1.2")] == pytest.approx([0.0, 0.0595, -0.0025])
    assert second[SAMPLING_TEMPERATURE] == 1.0  # 0.062 of 0.0645
    assert control.update(first, dict.fromkeys(names, 0.3)) == control.update(first, dict.fromkeys(names, 0.3))


def test_tampo_draws_anew_after_each_update():
    """Where the credit tells nothing, every temperature of the nucleus comes, the same for the same seed."""

    def chosen(seed):
        control = tampo(temperatures=[0.8, 1.0, 1.2, 1.4], nucleus=1.0, seed=seed).control
        knobs, found = control.init, []
        for _ in range(40):
            knobs = control.update(knobs, {f"tampo/credit_at_{t}": 0.0 for t in ("0.8", "1", "1.2", "1.4")})
            found.append(knobs[SAMPLING_TEMPERATURE])
        return found

    assert set(chosen(0)) == {0.8, 1.0, 1.2, 1.4}
    assert chosen(0) == chosen(0) != chosen(1)


# ------------------------------------------------------------------ EDT


def test_edt_by_hand():
    """T0 x 0.8^(theta / H) of each row: frequencies and log-probabilities are those of p^(1/T)."""
    flat = np.full(5, 0.2)
    logits = jnp.repeat(jnp.log(jnp.asarray([P, flat], jnp.float32)), N, axis=0)
    sampling = Sampling(sampling_temperature=1.5, edt_theta=0.7)
    token, logp = jax.jit(functools.partial(draw, sampling=sampling))(logits, jnp.tile(GRID, 2))
    entropy = -np.sum(P * np.log(P))  # 0.4 x 0.91629 + 0.3 x 1.20397 + 0.2 x 1.60944 + 0.1 x 2.99573 = 1.34917
    assert float(losses.entropy(logits)[0]) == pytest.approx(1.34917, rel=1e-5)
    t = 1.5 * 0.8 ** (0.7 / entropy)
    assert t == pytest.approx(1.33601, rel=1e-5)
    want = P ** (1 / t) / (P ** (1 / t)).sum()
    share, reported = share_and_logp((token[:N], logp[:N]), 5)
    np.testing.assert_allclose(share, want, atol=1.5 / N)
    np.testing.assert_allclose(reported, np.log(want), atol=1e-5)
    share, _ = share_and_logp((token[N:], logp[N:]), 5)
    np.testing.assert_allclose(share, flat, atol=1.5 / N)


def test_edt_scales_the_temperature_that_is_given():
    logits = jnp.broadcast_to(jnp.asarray(np.log(P), jnp.float32)[None, :], (N, 5))
    want = draw(logits, GRID, Sampling(sampling_temperature=1.5, edt_theta=0.7))
    got = draw(logits, GRID, Sampling(edt_theta=0.7), jnp.float32(1.5))
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_allclose(got[1], want[1], atol=1e-6)


def test_edt_without_entropy_draws_the_one_token():
    logits = jnp.asarray([[0.0, -jnp.inf, -jnp.inf], [-jnp.inf, 200.0, 0.0]])
    token, logp = draw(logits, jnp.asarray([0.999, 0.999]), Sampling(edt_theta=1.0))
    np.testing.assert_array_equal(token, [0, 1])
    np.testing.assert_array_equal(logp, [0.0, 0.0])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"edt_theta": 0.0}, "edt_theta must be null"),
        ({"edt_theta": -1.0}, "edt_theta must be null"),
        ({"edt_theta": float("inf")}, "edt_theta must be null"),
        ({"edt_theta": 1.0, "sampling_temperature": 0.0}, "expected a positive one, got 0"),
    ],
)
def test_edt_refuses(settings, words):
    with pytest.raises(ValueError, match=words):
        Sampling(**settings)
