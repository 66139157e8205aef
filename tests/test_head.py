"""The head: chunks change nothing, gradients pass, and the one shift by one is right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tsopsd_jax import losses
from tsopsd_jax.head import LibraryStats, VocabStats, logits_stats, next_token_stats, vocab_stats

N, D, V = 7, 5, 11
T = 1.3


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(N, D)), jnp.float32)
    unembed = jnp.asarray(rng.normal(size=(D, V)) * 1.5, jnp.float32)
    return hidden, unembed, jnp.asarray(rng.integers(0, V, size=N), jnp.int32)


def on_full_logits(hidden, unembed, tokens):
    z = hidden @ unembed
    teacher = jax.lax.stop_gradient(z) / T
    return VocabStats(
        losses.token_logp(z, tokens), losses.entropy(z), losses.forward_kl(teacher, z), losses.reverse_kl(teacher, z)
    )


def weighted(stats):
    """A different weight for each position and statistic, so that no mix-up cancels."""
    return sum((i + 1) * jnp.sum(x * jnp.arange(1.0, N + 1)) for i, x in enumerate(stats))


@pytest.mark.parametrize("chunk", [1, 3, N, 50])
def test_vocab_stats_equal_the_losses_on_full_logits(case, chunk):
    def chunked(hidden, unembed):
        return vocab_stats(hidden, unembed, case[2], teacher_temperature=T, chunk_tokens=chunk)

    for name, got, want in zip(VocabStats._fields, chunked(*case[:2]), on_full_logits(*case), strict=True):
        assert got.shape == (N,)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6, err_msg=name)
    got = jax.grad(lambda h, w: weighted(chunked(h, w)), argnums=(0, 1))(*case[:2])
    want = jax.grad(lambda h, w: weighted(on_full_logits(h, w, case[2])), argnums=(0, 1))(*case[:2])
    for name, g, w in zip(("hidden", "unembed"), got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5, err_msg=name)
        assert float(jnp.abs(g).min(axis=-1).max()) > 0


def test_vocab_stats_by_hand():
    # hidden (ln 3,) x unembed (1, 0) = logits (ln 3, 0); T = 2: the numbers of test_losses.
    got = vocab_stats(
        jnp.log(jnp.array([[3.0]])), jnp.array([[1.0, 0.0]]), jnp.array([1], jnp.int32), teacher_temperature=2.0
    )
    want = [np.log(0.25), 0.5623351, 0.0329957, 0.0307378]
    np.testing.assert_allclose([float(x[0]) for x in got], want, rtol=1e-5)


def test_bfloat16_hidden_states_give_float32_statistics(case):
    hidden, unembed, tokens = case
    got = vocab_stats(hidden.astype(jnp.bfloat16), unembed, tokens, teacher_temperature=T)
    rounded = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in (hidden, unembed)]
    want = on_full_logits(*rounded, tokens)
    assert {x.dtype for x in got} == {jnp.dtype("float32")}
    np.testing.assert_allclose(got.logp, want.logp, rtol=1e-5, atol=1e-6)  # accumulated in float32


def test_library_stats_answers_the_fields_asked_for(case):
    z, tokens = case[0] @ case[1], case[2]
    got = LibraryStats(("logp", "reverse_kl"), T)(z, tokens)
    full = logits_stats(z, tokens, teacher_temperature=T)
    assert set(got) == {"logp", "reverse_kl"}
    np.testing.assert_array_equal(got["reverse_kl"], full.reverse_kl)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_a_teacher_needs_a_positive_temperature(case, temperature):
    with pytest.raises(ValueError, match="teacher_temperature must be positive"):
        vocab_stats(*case, teacher_temperature=temperature)


@pytest.mark.parametrize("chunk", [1, 2, 4, 9])
def test_next_token_stats_refer_to_the_token_at_their_index(chunk):
    rng = np.random.default_rng(1)
    b, length = 3, 5
    hidden, unembed = rng.normal(size=(b, length, D)), rng.normal(size=(D, V))
    tokens = rng.integers(0, V, size=(b, length))
    want = np.zeros((b, length))
    for row in range(b):
        for t in range(1, length):  # the state before token t predicts it; nothing precedes token 0
            z = hidden[row, t - 1] @ unembed
            want[row, t] = z[tokens[row, t]] - np.log(np.exp(z).sum())
    got = next_token_stats(
        lambda z, token: {"logp": losses.token_logp(z, token), "token": token.astype(jnp.float32)},
        jnp.asarray(hidden, jnp.float32),
        jnp.asarray(unembed, jnp.float32),
        jnp.asarray(tokens, jnp.int32),
        chunk_positions=chunk,
    )
    np.testing.assert_allclose(got["logp"], want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got["token"][:, 1:], tokens[:, 1:])
    np.testing.assert_array_equal(got["logp"][:, 0], np.zeros(b))
