"""The measures of the paper's figures on constructed cases: values by hand, limits, and what is refused."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import TINY

from tsopsd_jax import losses
from tsopsd_jax.analysis import forks, jump, representations, reversal, temperatures, trajectories
from tsopsd_jax.analysis.batches import Answered, batches_of
from tsopsd_jax.analysis.cost import cost_of, reheating_share
from tsopsd_jax.analysis.distributions import OnMesh, compare_tokens, pair_stats, summarise_tokens, summary
from tsopsd_jax.distributed.sharding import make_mesh
from tsopsd_jax.model import Qwen3
from tsopsd_jax.model.qwen3 import rms_norm
from tsopsd_jax.objectives import ts_opsd

LN2 = math.log(2)


# ---------------------------------------------------------------------------------------------------- reversal


def test_reversal_by_hand():
    # H = (3, 4), |H| = 5.  L = (-3, 0), |L| = 3.  <H, L> = -9.  H + L = (0, 4).
    before, after = np.asarray([1.0, 1.0], np.float32), np.asarray([4.0, 5.0], np.float32)
    found = reversal.reversal_of(reversal.moved(before, after, np.asarray([1.0, 5.0], np.float32)))
    assert found == pytest.approx((-9 / 15, 9 / 25, 3 / 5, 4 / 5), abs=1e-12)


@pytest.mark.parametrize("share", [1.0, 0.9])
def test_an_inverse_and_nine_tenths_of_it(share, monkeypatch):
    monkeypatch.setattr(reversal, "PIECE", 7)  # several pieces, the last one shorter
    rng = np.random.default_rng(0)
    before, heated = rng.normal(size=(5, 4)), rng.normal(size=(5, 4))
    sums = reversal.moved(before, before + heated, before + (1 - share) * heated)
    assert reversal.reversal_of(sums) == pytest.approx((-1.0, share, share, 1 - share), abs=1e-12)


def test_tensors_in_16_bits_are_subtracted_exactly():
    # 256 - (1 + 2^-7) has 15 digits, and bfloat16 eight of them: it would be 255.
    before, after = (np.asarray([x], ml_dtypes.bfloat16) for x in (256.0, 1.0 + 2**-7))
    square = (255.0 - 2**-7) ** 2
    assert reversal.moved(before, after, before).tolist() == [square, -square, square, 0.0]


def test_reversal_of_parts():
    one, zero = np.asarray([1.0]), np.asarray([0.0])
    undone = reversal.moved(zero, one, zero)  # H = 1, L = -1
    further = reversal.moved(zero, one, 3 * one)  # H = 1, L = 2
    still = reversal.moved(one, one, one)
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.11.mlp.up_proj.weight", "model.norm.weight"]
    found = reversal.add_up(zip(names, (undone, further, still), strict=True))
    assert dict(reversal.layers_of(found)) == {0: (-1.0, 1.0, 1.0, 0.0), 11: (1.0, -2.0, 2.0, 3.0)}
    assert found.parts["norm"] == (None, None, None, None)
    # All together: H = (1, 1), L = (-1, 2), H + L = (0, 3).
    assert found.whole == pytest.approx((1 / math.sqrt(10), -1 / 2, math.sqrt(5 / 2), 3 / math.sqrt(2)))
    with pytest.raises(ValueError, match="got two equal policies"):
        reversal.add_up([("model.norm.weight", still)])


# ----------------------------------------------------------------------------------------------- distributions


def test_pair_of_distributions_by_hand():
    # p = (1/2, 1/2), q = (1/4, 3/4).
    before, after = jnp.log(jnp.asarray([0.5, 0.5])), jnp.log(jnp.asarray([0.25, 0.75]))
    found = pair_stats(after, before, k=1)
    assert float(found["forward_kl_nats"]) == pytest.approx(0.5 * LN2 + 0.5 * math.log(2 / 3), abs=1e-6)
    assert float(found["reverse_kl_nats"]) == pytest.approx(0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2), abs=1e-6)
    assert float(found["entropy_before_nats"]) == pytest.approx(LN2, abs=1e-6)
    assert float(found["entropy_after_nats"]) == pytest.approx(0.25 * 2 * LN2 + 0.75 * math.log(4 / 3), abs=1e-6)


@pytest.mark.parametrize(
    ("after", "overlap", "mass_before", "mass_after"),
    [
        ([0.4, 0.3, 0.2, 0.1], 1.0, 0.7, 0.7),  # the same two
        ([0.3, 0.4, 0.2, 0.1], 1.0, 0.7, 0.7),  # the same two in another order
        ([0.1, 0.5, 0.3, 0.1], 0.5, 0.3, 0.5),  # of {0, 1} and {1, 2} token 1 is in both
        ([0.1, 0.2, 0.3, 0.4], 0.0, 0.0, 0.0),  # {0, 1} and {2, 3}
    ],
)
def test_overlap_of_the_likeliest_tokens(after, overlap, mass_before, mass_after):
    found = pair_stats(jnp.log(jnp.asarray(after)), jnp.log(jnp.asarray([0.4, 0.3, 0.2, 0.1])), k=2)
    got = [float(found[name]) for name in ("top_k_overlap", "top_k_mass_before", "top_k_mass_after")]
    assert got == pytest.approx([overlap, mass_before, mass_after], abs=1e-6)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh()


@pytest.fixture(scope="module")
def pair(tiny, mesh):
    """The tiny model and one that is a little apart, on eight devices."""
    model, params = tiny
    model = dataclasses.replace(model, mesh=mesh)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    moved = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape), params)
    return OnMesh(model, params), OnMesh(model, moved)


@pytest.fixture(scope="module")
def given():
    """Ten responses of different lengths, of which no two batches' worth has the same."""
    rng = np.random.default_rng(3)
    return [Answered(rng.integers(0, 37, 2 + n % 3).tolist(), rng.integers(0, 37, 1 + n).tolist()) for n in range(10)]


def parts_of(given):
    return batches_of(given, tokens_at_once=8 * 64, multiple=8, limit=1000)


def test_batches_hold_every_response_once(given):
    parts = list(batches_of([*given, Answered([1], [2] * 64)], tokens_at_once=8 * 64, multiple=8, limit=1000))
    assert [part.batch.tokens.shape for part in parts] == [(8, 64), (8, 64), (8, 128)]
    seen = {}
    for part in parts:
        for row, at in enumerate(part.which):
            mask = np.asarray(part.batch.mask[row])
            if at < 0:
                assert not mask.any()
            else:
                seen[int(at)] = np.asarray(part.batch.tokens[row])[mask].tolist()
                assert np.flatnonzero(mask)[0] == len(([*given, Answered([1], [2] * 64)])[at].prompt)
    assert seen == {at: list(each.response) for at, each in enumerate([*given, Answered([1], [2] * 64)])}


def test_batches_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="response 2: expected .* 5 together, got 2 and 4"):
        list(batches_of([Answered([1], [2]), Answered([1, 2], [3] * 4)], tokens_at_once=64, multiple=1, limit=5))
    with pytest.raises(ValueError, match="response 1: .*got 1 and 0"):
        list(batches_of([Answered([1], [])], tokens_at_once=64, multiple=1, limit=5))


def rows_of(given):
    """Tokens [N, 16], and which of them are a response's."""
    tokens, mask = np.zeros((len(given), 16), np.int32), np.zeros((len(given), 16), bool)
    for row, (prompt, response) in enumerate(given):
        tokens[row, : len(prompt) + len(response)] = [*prompt, *response]
        mask[row, len(prompt) : len(prompt) + len(response)] = True
    return jnp.asarray(tokens), mask


@jax.jit
def whole_logits(params, tokens):
    """The logits that predict each token but the first of each row, of the tiny model on one device."""
    return Qwen3(TINY).logits(params, tokens)[:, :-1]


def test_tiles_on_a_mesh_say_what_whole_logits_say(pair, given, mesh):
    before, after = pair
    found = list(compare_tokens(before, after, parts_of(given), k=5, tile_tokens=3, mesh=mesh))
    tokens, mask = rows_of(given)
    logits = [whole_logits(policy.params, tokens) for policy in pair]
    expected = jax.jit(lambda before, after: pair_stats(after, before, k=5))(*logits)
    for name in ("forward_kl_nats", "reverse_kl_nats", "entropy_after_nats", "top_k_overlap", "top_k_mass_after"):
        got = np.concatenate([each[name] for each in found])
        wanted = np.asarray(expected[name])[mask[:, 1:]]
        np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=1e-6, err_msg=name)
    assert found[0]["forward_kl_nats"].mean() > 0.01, "the case must show something"


def test_equal_policies_differ_in_nothing_at_all(pair, given, mesh):
    found = list(compare_tokens(pair[0], pair[0], parts_of(given), k=5, tile_tokens=3, mesh=mesh))
    for each in found:
        assert not each["forward_kl_nats"].any()
        assert not each["reverse_kl_nats"].any()
        assert (each["entropy_after_nats"] == each["entropy_before_nats"]).all()
        assert (each["top_k_overlap"] == 1.0).all()


def test_a_summary_counts_every_token():
    found = summary(np.asarray([-3.0, 0.5, 0.5, 1.5, 9.0]), np.asarray([0.0, 1.0, 2.0]))
    assert found["histogram"] == {"edges": [0.0, 1.0, 2.0], "counts": [3, 2]}
    assert (found["mean"], found["quantiles"]["0.5"]) == (pytest.approx(1.7), 0.5)
    ones = np.ones(4, np.float32)
    tokens = {
        "forward_kl_nats": np.asarray([0.0, 1e-9, 0.01, 1e3], np.float32),
        "reverse_kl_nats": 0 * ones,
        "entropy_before_nats": ones,
        "entropy_after_nats": ones + np.asarray([0.0, 0.0, 0.2, 0.4], np.float32),
        **dict.fromkeys(("top_k_overlap", "top_k_mass_before", "top_k_mass_after"), ones),
    }
    out = summarise_tokens(tokens, k=10)
    assert out["entropy_change_nats"]["mean"] == pytest.approx(0.15, abs=1e-6)
    assert out["entropy_after_nats"] == pytest.approx(1.15, abs=1e-6)
    counts = out["forward_kl_nats"]["histogram"]["counts"]
    assert (counts[0], counts[-1], sum(counts), out["tokens"]) == (2, 1, 4, 4)
    assert out["top_k_overlap"]["histogram"]["counts"] == [0] * 10 + [4]


# --------------------------------------------------------------------------------------------- representations


def cka_of(x, y):
    """Linear CKA of [n, D] and [n, D'] through the sums, in two batches."""
    pairs = {"xy": (x, y), "xx": (x, x), "yy": (y, y)}
    norms = {}
    for name, (a, b) in pairs.items():
        sums = representations.Sums([(0, 0)])
        for part in (slice(0, 3), slice(3, None)):
            u, v = a[part], b[part]
            sums.add(u.sum(axis=0)[None], v.sum(axis=0)[None], len(u), lambda _i, _j, u=u, v=v: u.T @ v)
        norms[name] = sums.squared_norms()[0, 0]
    return representations.cka(*(np.asarray(norms[n]).reshape(s) for n, s in (("xy", (1, 1)), ("xx", 1), ("yy", 1))))


def test_a_rotated_representation_is_the_same():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 6))
    rotation, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    assert cka_of(x, 3.0 * x @ rotation + 7.0)[0, 0] == pytest.approx(1.0, abs=1e-10)


def test_noise_has_the_similarity_of_noise():
    """Of independent normal states, with n - 1 = 400: E|X^T Y|^2 = 400 D^2 and E|X^T X|^2 = 400 D (401 + D)."""
    rng = np.random.default_rng(0)
    found = [cka_of(rng.normal(size=(401, 20)), rng.normal(size=(401, 20)))[0, 0] for _ in range(20)]
    assert np.mean(found) == pytest.approx(20 / 421, rel=0.05)


def test_similarity_by_hand():
    # Centred x = (-1, 1), y = (-1, 1) / 2 and orthogonal: x and z of three tokens, (1, -1, 0) and (1, 1, -2).
    x, z = np.asarray([[1.0], [-1.0], [0.0]]), np.asarray([[1.0], [1.0], [-2.0]])
    assert cka_of(x, z)[0, 0] == pytest.approx(0.0, abs=1e-12)
    # <x, (2, 0, 1) - 1> = 2, |x|^2 = 2, |(1, -1, 0)|^2 = 2: 4 / (2 x 2).
    assert cka_of(x, np.asarray([[2.0], [0.0], [1.0]]))[0, 0] == pytest.approx(1.0)
    # <x, (1, 0, -1)> = 1: 1 / (2 x 2).
    assert cka_of(x, np.asarray([[1.0], [0.0], [-1.0]]))[0, 0] == pytest.approx(0.25)
    with pytest.raises(ValueError, match="got a constant layer"):
        representations.cka(np.ones((1, 1)), np.zeros(1), np.ones(1))


def test_layer_states_lead_to_the_hidden_states(tiny):
    model, params = tiny
    tokens = jnp.asarray([[1, 2, 3, 4]])
    states = jax.jit(model.layer_states)(params, tokens)
    assert states.shape == (2, 1, 4, 16)
    last = rms_norm(states[-1], params["final_norm"], model.config.rms_norm_eps)
    np.testing.assert_allclose(last, jax.jit(model.hidden)(params, tokens), rtol=1e-6)
    assert not np.allclose(states[0], states[1])


@pytest.fixture(scope="module")
def far(pair):
    """The pair with a mean of 300 in one dimension of the residual stream, 300 times its spread."""

    def shifted(policy):
        return OnMesh(policy.model, policy.params | {"embed": policy.params["embed"].at[:, 3].add(300.0)})

    return shifted(pair[0]), shifted(pair[1])


@pytest.mark.parametrize("memory_bytes", [1 << 20, 1])
def test_layers_on_a_mesh_in_one_pass_and_in_several(far, given, mesh, memory_bytes, monkeypatch):
    monkeypatch.setattr(representations, "WIDTH_TOKENS", 3)  # 12 of a row's 64 places: the longest response has 10
    before, after = far
    passes = []

    def parts(number, count):
        passes.append((number, count))
        return parts_of(given)

    found = representations.layer_similarity(before, after, parts, mesh=mesh, memory_bytes=memory_bytes)
    assert passes[1:] == ([(0, 1)] if memory_bytes > 1 else [(0, 2), (1, 2)])

    tokens, mask = rows_of(given)

    def states(policy):
        """[layers, tokens, D] in float64, centred."""
        x = np.asarray(jax.jit(Qwen3(TINY).layer_states)(policy.params, tokens), np.float64)[:, mask]
        return x - x.mean(axis=1, keepdims=True)

    def norm(a, b):
        return np.sum(np.square(a.T @ b))

    x, y = states(before), states(after)
    expected = [[norm(a, b) / math.sqrt(norm(a, a) * norm(b, b)) for b in y] for a in x]
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    assert found[0, 0] < 0.9999


def test_layers_are_divided_by_memory():
    # 28 layers of 1024: 8 MiB a product, 28 + 2 of them for each layer of `before`.
    assert representations.groups_of(28, 8 << 20, 8 << 30) == [range(28)]
    assert [len(g) for g in representations.groups_of(28, 8 << 20, 30 * 10 * (8 << 20))] == [10, 10, 8]
    assert len(representations.groups_of(28, 8 << 20, 0)) == 28


# ------------------------------------------------------------------------------------------------------- forks


@pytest.mark.parametrize(
    ("a", "b", "distance", "fork"),
    [
        ("kitten", "sitting", 3 / 7, 0),  # two replaced, one inserted
        ("flaw", "lawn", 2 / 4, 0),  # one deleted, one inserted
        ("abcd", "abxd", 1 / 4, 2),
        ("abc", "abc", 0.0, 3),
        ("ab", "abcde", 3 / 5, 2),
        ("", "ab", 1.0, 0),
        ("", "", 0.0, 0),
    ],
)
def test_edit_distance_and_fork_by_hand(a, b, distance, fork):
    a, b = list(map(ord, a)), list(map(ord, b))
    assert forks.edit_distance(a, b) == pytest.approx(distance)
    assert forks.edit_distance(b, a) == pytest.approx(distance)
    assert forks.fork_position(a, b) == fork


def test_forks_of_a_policy_by_hand():
    found = forks.measure_forks(
        [
            forks.Stochastic([1, 2, 3], [-0.5, -1.0, -3.0], [1, 2, 4]),  # distance 1/3, fork at 2
            forks.Stochastic([1], [-0.1], [1]),  # the greedy one
        ]
    )
    assert found[:5] == pytest.approx((1 / 6, 1.5, 4.6 / 4, 0.5, 2))
    assert found.logp_by_position_nats.tolist() == pytest.approx([-0.3, -1.0, -3.0])
    assert found.rollouts_by_position.tolist() == [2, 1, 1]
    with pytest.raises(ValueError, match="at least one rollout"):
        forks.measure_forks([])


# -------------------------------------------------------------------------------------------------------- jump


def test_a_planted_jump_is_found():
    """Like the paper's: a slow rise, then 0.0125 nats within one step."""
    t, rng = np.arange(20), np.random.default_rng(0)
    found = jump.find_jump(0.055 + 0.001 * t + 0.0125 * (t >= 9) + 0.0003 * rng.normal(size=20))
    assert found.found
    assert found.place == 9
    assert found.height == pytest.approx(0.0125, abs=0.001)
    assert found.increment == pytest.approx(0.0135, abs=0.001)
    assert found.sharpness > 0.95
    down = jump.find_jump(0.09 - 0.001 * t - 0.0125 * (t >= 9) + 0.0003 * rng.normal(size=20))
    assert (down.found, down.place) == (True, 9)
    assert down.height < 0


@pytest.mark.parametrize(
    "curve",
    [
        lambda t: 0.05 + 0.002 * t,
        lambda t: 0.05 * np.exp(0.25 * t),
        lambda t: 0.05 + 0.05 / (1 + np.exp(-(t - 9.5) / 1.5)),  # steep, over six steps
        lambda t: 0.05 + 0.002 * t + 0.02 * (t == 9),  # a spike comes back
        lambda t: 0.05 + 0.0 * t,
        lambda t: 0.05 + 0.002 * t + 0.002 * np.random.default_rng(1).normal(size=len(t)),
    ],
)
def test_a_smooth_ramp_is_no_jump(curve):
    assert not jump.find_jump(curve(np.arange(20.0))).found


def test_a_jump_takes_enough_values():
    with pytest.raises(ValueError, match="at least 8 finite values, got 6 of 7"):
        jump.find_jump(np.asarray([1, 2, 3, 4, 5, 6, np.nan]))


# -------------------------------------------------------------------------------------------------------- runs


def line(step, phase, phase_step, **more):
    return {"step": step, "phase": phase, "phase_step": phase_step, **more}


def test_phases_of_a_log():
    lines = [line(1, "rl", 1, x=1.0), line(2, "rl", 2), line(3, "hot", 1, x=None), line(4, "hot", 1), line(5, "rl", 1)]
    run = trajectories.read_trajectory("a", lines)
    assert run.spans == [("rl", 1, 2), ("hot", 3, 3), ("hot", 4, 4), ("rl", 5, 5)]
    np.testing.assert_array_equal(run.column("x"), [1.0, np.nan, np.nan, np.nan, np.nan])
    assert run.within(run.spans[0]).step.tolist() == [1, 2]
    with pytest.raises(ValueError, match="a: expected at least one step"):
        trajectories.read_trajectory("a", [])


def test_a_band_over_seeds_by_hand():
    band = trajectories.band_of(
        [(np.asarray([1, 2, 3]), np.asarray([1.0, np.nan, 5.0])), (np.asarray([2, 3]), np.asarray([4.0, 8.0]))]
    )
    assert band.step.tolist() == [1, 2, 3]
    assert band.mean.tolist() == [1.0, 4.0, 6.5]
    # (5 - 6.5)^2 + (8 - 6.5)^2 = 4.5, over n - 1 = 1.
    assert band.deviation.tolist() == pytest.approx([0.0, 0.0, math.sqrt(4.5)])
    assert band.runs.tolist() == [1, 1, 2]


def test_cost_by_hand():
    def took(step, phase, phase_step, rollout_s, update_s, step_s, tokens):
        return {
            **line(step, phase, phase_step),
            "time/rollout_s": rollout_s,
            "time/judge_s": 1.0,
            "time/update_s": update_s,
            "time/step_s": step_s,
            "rollout/tokens": tokens,
        }

    run = trajectories.read_trajectory(
        "a",
        [
            took(1, "rl", 1, 4.0, 2.0, 8.0, 100),
            took(2, "rl", 2, 6.0, 4.0, 12.0, 300),
            took(3, "hot", 1, None, 4, 5, 50),
        ],
    )
    rl, hot = cost_of(run, batch_sequences={"rl": 4, "hot": 10}, reheats=["hot"])
    assert (rl.steps, rl.step_s, rl.tokens) == (2, 10.0, 400)
    assert rl.part_s == {"sampling": 5.0, "judging": 1.0, "update": 3.0, "other": 1.0}
    assert hot.part_s == {"sampling": 0.0, "judging": 1.0, "update": 4.0, "other": 0.0}
    assert rl.total_h == pytest.approx(20 / 3600)
    assert (rl.ms_per_sequence, rl.us_per_token) == pytest.approx((2500.0, 50_000.0))  # 20 s / 8, 20 s / 400
    assert reheating_share([rl, hot]) == pytest.approx(0.25)
    assert reheating_share([rl]) is None


# ------------------------------------------------------------------------------------------------ temperatures


def test_reverse_teachers_pull_towards_entropy_alone(pair, given, mesh):
    """Equation 5: the reverse KL's gradient is (1 - 1/T) times that of entropy ascent; at T = 1 nothing pulls."""
    assert list(temperatures.sweep_of([1.2, 2.0])) == [
        temperatures.ASCENT, "forward, T 1.2", "forward, T 2", "reverse, T 1.2", "reverse, T 2"
    ]  # fmt: skip
    objectives = {
        temperatures.ASCENT: temperatures.entropy_ascent(),
        "reverse 2": ts_opsd(direction="reverse", teacher_temperature=2.0),
        "forward 2": ts_opsd(teacher_temperature=2.0),
        "forward 1": ts_opsd(teacher_temperature=1.0),
    }
    found = temperatures.measure_pulls(pair[0], objectives, lambda _: parts_of(given), mesh=mesh, tile_tokens=64)
    ascent, reverse, forward, nothing = found.norm
    assert reverse / ascent == pytest.approx(0.5, rel=1e-4)
    assert found.cosine[0, 1] == pytest.approx(1.0, abs=1e-5)
    assert 0.3 < found.cosine[0, 2] < 0.999
    assert nothing == 0.0
    # The loss and the gradient's square from whole logits, over the tokens of all batches.
    tokens, mask = rows_of(given)

    @jax.jit
    def loss(params):
        logits = whole_logits(params, tokens)
        kl = losses.forward_kl(logits / 2.0, logits)
        return jnp.sum(jnp.where(mask[:, 1:], kl, 0.0)) / np.float32(mask.sum())

    value, gradient = jax.jit(jax.value_and_grad(loss))(pair[0].params)
    assert found.loss_nats[2] == pytest.approx(float(value), rel=1e-4)
    square = sum(float(np.sum(np.square(np.asarray(g, np.float64)))) for g in jax.tree.leaves(gradient))
    assert forward**2 == pytest.approx(square, rel=1e-3)
