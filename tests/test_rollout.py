"""Sampling: the exact distribution, and rollouts that depend on nothing but key, row id and prompt."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tsopsd_jax.rollout import Sampling, draw, sample
from tsopsd_jax.types import Prompts

N = 2000
GRID = jnp.asarray((np.arange(N) + 0.5) / N, jnp.float32)  # midpoints: a frequency is right to 1 / N
P = np.array([0.4, 0.05, 0.3, 0.05, 0.2])


def frequencies(probability, sampling):
    """(share of each token over the grid of uniforms, reported log-prob of each token, NaN where not drawn)."""
    with np.errstate(divide="ignore"):
        logits = jnp.broadcast_to(jnp.asarray(np.log(probability), jnp.float32)[None, :], (N, len(probability)))
    token, logp = (np.asarray(x) for x in draw(logits, GRID, sampling))
    reported = np.full(len(probability), np.nan)
    reported[token] = logp
    np.testing.assert_array_equal(reported[token], logp)  # the same token always reports the same value
    return np.bincount(token, minlength=len(probability)) / N, reported


def normal(weights):
    weights = np.asarray(weights, np.float64)
    return weights / weights.sum()


CASES = [
    (P, {}, P),
    # Temperature 2: p^(1/2), renormalised; temperature 1/2: p^2.
    (P, {"sampling_temperature": 2.0}, normal(P**0.5)),
    (P, {"sampling_temperature": 0.5}, normal(P**2)),
    (P, {"top_k": 2}, normal([0.4, 0, 0.3, 0, 0])),
    (P, {"top_k": 9}, P),
    # Mass before 0.2's turn is 0.7 < 0.75: in; before 0.05's it is 0.9: out.
    (P, {"top_p": 0.75}, normal([0.4, 0, 0.3, 0, 0.2])),
    # Ties in order of index: 0.9 < 0.92, so the first 0.05 is in, and with it the mass is 0.95: the second is out.
    (P, {"top_p": 0.92}, normal([0.4, 0.05, 0.3, 0, 0.2])),
    (P, {"top_p": 0.35}, [1, 0, 0, 0, 0]),
    (P, {"top_p": 1e-6}, [1, 0, 0, 0, 0]),
    (P, {"top_k": 1}, [1, 0, 0, 0, 0]),
    # Exact in binary: the first two reach 1/2 + 1/4 = 3/4 exactly, which is enough.
    ([0.5, 0.125, 0.25, 0.125], {"top_p": 0.75}, normal([2, 0, 1, 0])),
    ([0.5, 0.125, 0.25, 0.125], {"top_p": 0.5}, [1, 0, 0, 0]),
    ([0.25, 0.25, 0.25, 0.25], {"top_p": 0.5}, [0.5, 0.5, 0, 0]),
    # Top-k first: of (0.4, 0.3, 0.2) / 0.9 the first two have 7/9 = 0.78, enough for 0.7 and for 0.75.
    (P, {"top_k": 3, "top_p": 0.75}, normal([0.4, 0, 0.3, 0, 0])),
    # The nucleus is of the tempered distribution: p^(1/2) gives 0.305 + 0.264 = 0.569 < 0.62, so a third is in;
    # untempered the first two would have 0.7.
    (P, {"sampling_temperature": 2.0, "top_p": 0.62}, normal([0.4**0.5, 0, 0.3**0.5, 0, 0.2**0.5])),
    ([0, 0.5, 0, 0.5, 0], {}, [0, 0.5, 0, 0.5, 0]),
    ([0, 0.5, 0, 0.5, 0], {"top_p": 0.9}, [0, 0.5, 0, 0.5, 0]),
]


@pytest.mark.parametrize(("probability", "settings", "want"), CASES)
def test_draw_follows_the_filtered_distribution(probability, settings, want):
    share, logp = frequencies(probability, Sampling(**settings))
    want = np.asarray(want, np.float64)
    np.testing.assert_allclose(share, want, atol=1.5 / N)
    drawn = want > 0
    np.testing.assert_array_equal(share > 0, drawn)
    # The log-probability is that of what was sampled: tempered, filtered, renormalised.
    np.testing.assert_allclose(logp[drawn], np.log(want[drawn]), atol=1e-6)


def test_rows_are_filtered_each_by_itself():
    probability = np.array([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7], [0.3, 0.4, 0.3]])
    logits = jnp.repeat(jnp.log(jnp.asarray(probability, jnp.float32)), N, axis=0)
    token = np.asarray(draw(logits, jnp.tile(GRID, 3), Sampling(top_p=0.6))[0]).reshape(3, N)
    assert [sorted(set(row.tolist())) for row in token] == [[0], [2], [0, 1]]


LARGE = 1536  # 32 blocks of 48


def reference_and_margin(logits, sampling):
    """The distribution by sorting, in float64; and how far the nucleus is from holding a token more or less."""
    z = np.asarray(logits, np.float64)
    order = np.argsort(-z, kind="stable")
    if sampling.sampling_temperature == 0:
        return (np.arange(len(z)) == order[0]).astype(np.float64), 1.0
    p = normal(np.exp((z - z.max()) / sampling.sampling_temperature))
    if sampling.top_k:
        p[order[sampling.top_k :]] = 0
        p = normal(p)
    if sampling.top_p == 1:
        return p, 1.0
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= sampling.top_p]] = 0
    return normal(p), np.abs(before - sampling.top_p).min()


def reference(logits, sampling):
    return reference_and_margin(logits, sampling)[0]


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.7}, {"top_k": 50}, {"top_k": 200, "top_p": 0.9}])
@pytest.mark.parametrize("kind", ["sharp", "flat", "ties"])
def test_frequencies_over_a_large_vocabulary(kind, settings):
    """Chi-square of 40,000 draws against the sorted distribution; ties across blocks; a fixed seed."""
    rng = np.random.default_rng(3)
    logits = rng.normal(size=LARGE) * {"sharp": 4.0, "flat": 0.1, "ties": 2.0}[kind]
    if kind == "ties":
        logits = np.round(logits)
    sampling = Sampling(**settings)
    want = reference(logits.astype(np.float32), sampling)
    draws = 40_000
    uniform = jnp.asarray(rng.random(draws), jnp.float32)
    row = jnp.asarray(logits, jnp.float32)[None, :]
    token, logp = jax.jit(jax.vmap(lambda u: jax.tree.map(lambda x: x[0], draw(row, u[None], sampling))))(uniform)
    token, logp = np.asarray(token), np.asarray(logp)
    assert (want[token] > 0).all(), "drew a token outside the nucleus"
    np.testing.assert_allclose(logp, np.log(want[token]), atol=2e-5)
    # Pearson's statistic over cells of at least 20 expected draws, the rest in one; within 5 sigma of its mean.
    count, expected = np.bincount(token, minlength=LARGE), want * draws
    big = expected >= 20
    cells = [(count[big], expected[big]), (count[~big].sum(keepdims=True), expected[~big].sum(keepdims=True))]
    seen, due = (np.concatenate(x) for x in zip(*cells, strict=True))
    seen, due = seen[due > 0], due[due > 0]
    statistic, freedom = ((seen - due) ** 2 / due).sum(), len(seen) - 1
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * max(freedom, 1)), (statistic, freedom)


def test_the_real_vocabulary_without_a_sort():
    """151,936 entries: the compiled program holds no sort and draws one number a row; the nucleus is that of a sort."""
    logits = np.random.default_rng(0).normal(size=151_936).astype(np.float32) * 3
    sampling = Sampling(top_p=0.7)
    uniform = (jnp.arange(16, dtype=jnp.float32) + 0.5) / 16
    compiled = (
        jax.jit(functools.partial(draw, sampling=sampling))
        .lower(jnp.broadcast_to(jnp.asarray(logits)[None], (16, 151_936)), uniform)
        .compile()
    )
    assert " sort(" not in compiled.as_text()
    assert "rng" not in compiled.as_text()
    token, logp = compiled(jnp.broadcast_to(jnp.asarray(logits)[None], (16, 151_936)), uniform)
    want = reference(logits, sampling)
    np.testing.assert_allclose(logp, np.log(want[np.asarray(token)]), atol=1e-4)
    cdf = np.cumsum(want)
    high = cdf[np.asarray(token)]
    assert (np.asarray(uniform) <= high + 2e-4).all()
    assert (np.asarray(uniform) >= high - want[np.asarray(token)] - 2e-4).all()


MODES = {"plain": {}, "top-k": {"top_k": 20}, "top-p": {"top_p": 0.95}, "both": {"top_k": 20, "top_p": 0.8}}


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 0.1, 0.3, 0.6, 0.7, 1.0, 1.2, 1.7])
@pytest.mark.parametrize("mode", MODES)
def test_every_temperature_is_exact(mode, temperature):
    """Jitted draws from logits far from zero: the token is the inverse of the sorted float64 distribution at the
    uniform number, none lies outside the nucleus, the log-probability is its own. Half of the rows spread their mass;
    half are nearly one token's, so that the nucleus is at its edge."""
    rng = np.random.default_rng(7)
    sampling = Sampling(sampling_temperature=temperature, **MODES[mode])
    rows, draws, vocab = 48, 32, 256
    tempered = rng.normal(0, 3, (rows, vocab))
    tempered[::2, 5] = tempered[::2].max(axis=1) + rng.uniform(4, 9, rows // 2)
    logits = (tempered * (temperature or 1) + rng.uniform(20, 40, (rows, 1))).astype(np.float32)  # 1e-6: many are equal
    uniform = rng.random((rows, draws)).astype(np.float32)
    args = np.repeat(logits, draws, axis=0), uniform.reshape(-1)
    token, logp = jax.jit(functools.partial(draw, sampling=sampling))(*map(jnp.asarray, args))
    token, logp = np.asarray(token).reshape(rows, draws), np.asarray(logp).reshape(rows, draws)
    clear = 0
    for i in range(rows):
        want, margin = reference_and_margin(logits[i], sampling)
        if margin < 1e-5:  # float32 cannot tell which side of top-p this row is on
            continue
        clear += 1
        assert (want[token[i]] > 0).all(), "drew a token outside the nucleus"
        np.testing.assert_allclose(logp[i], np.log(want[token[i]]), atol=2e-5)
        high = np.cumsum(want)[token[i]]
        assert (uniform[i] <= high + 1e-5).all()
        assert (uniform[i] >= high - want[token[i]] - 1e-5).all()
    assert clear > 0.9 * rows
    if temperature == 0:
        np.testing.assert_array_equal(logp, 0.0)


def test_greedy_decoding_takes_the_first_of_the_likeliest():
    logits = jnp.array([[1.0, 3.0, 3.0, -jnp.inf], [-5.0, -5.0, -5.0, -5.0], [-jnp.inf, -1e9, 0.0, 0.0]])
    for settings in MODES.values():
        token, logp = draw(logits, jnp.full(3, 0.99), Sampling(sampling_temperature=0.0, **settings))
        np.testing.assert_array_equal(token, [1, 0, 2])
        np.testing.assert_array_equal(logp, [0, 0, 0])


def test_the_policy_itself_is_drawn_from_without_a_division():
    shapes = jax.ShapeDtypeStruct((8, 256), jnp.float32), jax.ShapeDtypeStruct((8,), jnp.float32)
    text = jax.jit(functools.partial(draw, sampling=Sampling())).lower(*shapes).as_text()
    assert not re.findall(r"stablehlo.divide .*xf32>", text)


@pytest.mark.parametrize("platform", ["cuda", "tpu", "cpu"])
@pytest.mark.parametrize("mode", MODES)
def test_logits_are_centred_before_the_one_division(mode, platform):
    """In the program handed to each compiler. (What a TPU's makes of it: `test_attention`.)"""
    sampling = Sampling(sampling_temperature=0.6, **MODES[mode])
    shapes = jax.ShapeDtypeStruct((8, 256), jnp.float32), jax.ShapeDtypeStruct((8,), jnp.float32)
    traced = jax.jit(functools.partial(draw, sampling=sampling)).trace(*shapes)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert len(re.findall(r"stablehlo.divide .*tensor<8x256xf32>", text)) == 1
    # Lines of the main function; those of loops are indented further.
    main = re.split(r"\n  func.func ", text)[1]
    defined = dict(re.findall(r"^    (%\w+) = stablehlo\.(.*)$", main, flags=re.MULTILINE))
    (line,) = [x for x in defined.values() if x.startswith("divide") and x.endswith("tensor<8x256xf32>")]

    def operands(line, operation):
        assert line.startswith(operation), line
        return re.findall(r"%\w+", line)

    centred, _ = operands(line, "divide")
    logits, wide = operands(defined[centred], "subtract")
    (column,) = operands(defined[wide], "broadcast_in_dim")
    (top,) = operands(defined[column], "broadcast_in_dim")
    assert operands(defined[top], "reduce")[0] == logits == "%arg0"
    assert "stablehlo.maximum" in defined[top]


def test_impossible_tokens_are_not_drawn_at_the_ends():
    logits = jnp.array([[-jnp.inf, 0.0, -jnp.inf, 1.0, -jnp.inf]] * 2)
    ends = jnp.array([0.0, np.nextafter(np.float32(1), np.float32(0))])
    token, logp = draw(logits, ends, Sampling())
    np.testing.assert_array_equal(token, [1, 3])
    assert bool(jnp.all(jnp.isfinite(logp)))
    # Where rounding makes uniform x total the total itself: the last token with any weight.
    token, _ = draw(logits, jnp.ones(2), Sampling(top_p=0.999))
    np.testing.assert_array_equal(token, [3, 3])


def test_extreme_logits_are_drawn_from():
    token, logp = draw(jnp.array([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]]), jnp.array([0.5, 0.99]), Sampling())
    np.testing.assert_array_equal(token, [0, 2])
    np.testing.assert_allclose(logp, [0.0, -np.log(3)], atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"sampling_temperature": -1.0},
            r"sampling_temperature must be 0 \(greedy decoding\) or .* at least 1e-06, got -1.0$",
        ),
        ({"sampling_temperature": 9e-7}, "sampling_temperature must be 0 .* got 9e-07$"),
        ({"sampling_temperature": float("nan")}, "sampling_temperature"),
        ({"sampling_temperature": float("inf")}, "sampling_temperature"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -1}, "top_k must be 0 .* got -1"),
    ],
)
def test_sampling_refuses(settings, words):
    with pytest.raises(ValueError, match=words):
        Sampling(**settings)


WIDTH, MAX = 5, 6
STOPS = (3, 17, 24, 30)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(5)
    return Prompts(
        tokens=jnp.asarray(rng.integers(0, 37, size=(8, WIDTH)), jnp.int32),
        length=jnp.array([5, 1, 3, 2, 5, 4, 1, 3], jnp.int32),
        row_id=jnp.array([0, 1, 2, 3, 10, 11, 40, 7], jnp.uint32),
    )


@pytest.fixture(scope="module")
def run(tiny):
    """run(prompts, group=1) -> Rollout as numpy; compiled once per shape."""
    model, params = tiny

    @functools.partial(jax.jit, static_argnames="group")
    def jitted(params, prompts, key, group):
        return sample(
            model,
            params,
            prompts,
            key,
            sampling=Sampling(),
            max_response_tokens=MAX,
            stop_ids=STOPS,
            group=group,
        )

    def call(prompts, *, key=11, group=1):
        return jax.tree.map(np.asarray, jitted(params, prompts, jax.random.key(key), group))

    return call


@pytest.fixture(scope="module")
def rollout(run, prompts):
    return run(prompts)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, (a.tokens, a.length, a.stopped), (b.tokens, b.length, b.stopped))
    np.testing.assert_allclose(a.logp, b.logp, atol=1e-5)


def test_rows_end_with_their_first_stop_token_or_at_the_limit(rollout, prompts):
    assert rollout.tokens.shape == rollout.logp.shape == (8, WIDTH + MAX)
    assert 0 < rollout.stopped.sum() < 8, "the case must show both ends"
    for row in range(8):
        start, end = int(prompts.length[row]), int(rollout.length[row])
        np.testing.assert_array_equal(rollout.tokens[row, :start], prompts.tokens[row, :start])
        response = rollout.tokens[row, start:end]
        assert 1 <= len(response) <= MAX
        assert not np.isin(response[:-1], STOPS).any()
        assert np.isin(response[-1], STOPS) == rollout.stopped[row]  # the stop token is part of the length
        assert rollout.stopped[row] or len(response) == MAX
        assert not rollout.tokens[row, end:].any()
        assert not rollout.logp[row, end:].any()
        assert not rollout.logp[row, :start].any()
        assert (rollout.logp[row, start:end] < 0).all()
    np.testing.assert_array_equal(rollout.prompt_length, prompts.length)


def test_logp_is_the_full_forward_pass_of_the_same_row(rollout, tiny):
    # One row at a time and no padding, so neither the cache nor the ragged batch can hide behind the same bug.
    model, params = tiny
    logits = jax.jit(model.logits)(params, jnp.asarray(rollout.tokens))  # causal: padding lies after the row
    logp = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    for row in range(8):
        for t in range(rollout.prompt_length[row], rollout.length[row]):
            want = logp[row, t - 1, rollout.tokens[row, t]]
            np.testing.assert_allclose(rollout.logp[row, t], want, atol=1e-4)


def test_every_position_draws_with_its_own_number(rollout, tiny):
    # A token says that its uniform number lay in [cdf before it, cdf after it). If one number served a whole row, the
    # intervals of that row would all hold it; in every row of several tokens here they have no point in common.
    model, params = tiny
    cdf = np.cumsum(jax.nn.softmax(jax.jit(model.logits)(params, jnp.asarray(rollout.tokens)), axis=-1), axis=-1)
    apart = []
    for row in np.flatnonzero(rollout.length - rollout.prompt_length >= 3):
        at = np.arange(rollout.prompt_length[row], rollout.length[row])
        high = cdf[row, at - 1, rollout.tokens[row, at]]
        low = high - np.exp(rollout.logp[row, at])
        apart.append(low.max() > high.min() + 1e-3)
    assert len(apart) >= 2
    assert all(apart)


def test_junk_in_the_prompt_padding_changes_nothing(rollout, run, prompts):
    padding = np.arange(WIDTH)[None, :] >= np.asarray(prompts.length)[:, None]
    junk = jnp.where(padding, 10**9, prompts.tokens)
    again = run(Prompts(tokens=junk, length=prompts.length, row_id=prompts.row_id))
    jax.tree.map(np.testing.assert_array_equal, again, rollout)


def test_a_row_depends_on_its_key_id_and_prompt_alone(rollout, run, prompts):
    order = np.array([6, 1, 7, 0, 3, 2, 5, 4])
    same(run(jax.tree.map(lambda x: x[order], prompts)), jax.tree.map(lambda x: x[order], rollout))
    few = np.array([2, 6])
    same(run(jax.tree.map(lambda x: x[few], prompts)), jax.tree.map(lambda x: x[few], rollout))


def test_a_group_is_prefilled_once_and_samples_the_same(run, prompts):
    twice = jax.tree.map(lambda x: jnp.repeat(x[::2], 2, axis=0), prompts)
    twice = Prompts(tokens=twice.tokens, length=twice.length, row_id=prompts.row_id)
    same(run(twice, group=2), run(twice))


def test_the_group_must_divide_the_rows(run, prompts):
    with pytest.raises(ValueError, match="group 3 does not divide 8 rows"):
        run(prompts, group=3)


def test_other_keys_and_other_row_ids_give_other_responses(rollout, run, prompts):
    assert not np.array_equal(run(prompts, key=12).tokens, rollout.tokens)
    # Eight times the same prompt: only the row ids differ, and they are enough.
    same_prompt = jax.tree.map(lambda x: jnp.repeat(x[:1], 8, axis=0), prompts)
    twins = Prompts(tokens=same_prompt.tokens, length=same_prompt.length, row_id=jnp.arange(8, dtype=jnp.uint32))
    assert len({row.tobytes() for row in run(twins).tokens}) > 4
    clones = run(same_prompt)
    assert len({row.tobytes() for row in clones.tokens}) == 1


def test_every_position_draws_anew(tiny):
    """With all weights zero every token is as likely at every position: one reused number would repeat one token."""
    model, params = tiny
    flat = jax.tree.map(jnp.zeros_like, params)
    prompts = Prompts(jnp.ones((4, 3), jnp.int32), jnp.full((4,), 3, jnp.int32), jnp.arange(4, dtype=jnp.int32))
    rollout = sample(
        model,
        flat,
        prompts,
        jax.random.key(0),
        sampling=Sampling(),
        max_response_tokens=6,
        stop_ids=(model.vocab_size,),
    )
    for row in rollout.tokens[:, 3:].tolist():
        assert len(set(row)) > 2, row
