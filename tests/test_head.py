"""The head: tiles change nothing, gradients pass, no [tokens, V] exists, and the one shift by one is right."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tsopsd_jax import head_tiles, losses
from tsopsd_jax.distributed.sharding import make_mesh
from tsopsd_jax.head import batch_loss, batch_stats, token_loss, token_stats, vocab_stats
from tsopsd_jax.head_tiles import Tiling
from tsopsd_jax.logit_stats import LibraryStats, VocabStats, logits_stats
from tsopsd_jax.types import Batch, LossOutput, Mean

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


@pytest.mark.parametrize("tile", [1, 3, N, 50])
def test_vocab_stats_equal_the_losses_on_full_logits(case, tile):
    def tiled(hidden, unembed):
        return vocab_stats(hidden, unembed, case[2], teacher_temperature=T, tile_tokens=tile)

    for name, got, want in zip(VocabStats._fields, tiled(*case[:2]), on_full_logits(*case), strict=True):
        assert got.shape == (N,)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6, err_msg=name)
    got = jax.grad(lambda h, w: weighted(tiled(h, w)), argnums=(0, 1))(*case[:2])
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


def some_batch(rng, b, length, v=V):
    prompt, end = rng.integers(1, length - 1, (b, 1)), rng.integers(length - 1, length + 1, (b, 1))
    at = np.arange(length)[None, :]
    return Batch.of(
        tokens=rng.integers(0, v, (b, length)),
        mask=(at >= prompt) & (at < end),
        advantage=rng.normal(size=(b, length)),
        old_logp=-rng.random((b, length)),
    )


@pytest.mark.parametrize("tile", [1, 2, 4, 9, 100])
def test_batch_stats_refer_to_the_token_at_their_index(tile):
    rng = np.random.default_rng(1)
    b, length = 3, 5
    hidden, unembed = rng.normal(size=(b, length, D)), rng.normal(size=(D, V))
    batch = some_batch(rng, b, length)
    want = np.zeros((b, length))
    for row, t in np.argwhere(batch.mask):  # the state before token t predicts it
        z = hidden[row, t - 1] @ unembed
        want[row, t] = z[batch.tokens[row, t]] - np.log(np.exp(z).sum())
    got = batch_stats(
        lambda z, token: {"logp": losses.token_logp(z, token), "token": token.astype(jnp.float32)},
        jnp.asarray(hidden, jnp.float32),
        jnp.asarray(unembed, jnp.float32),
        batch,
        tile_tokens=tile,
    )
    np.testing.assert_allclose(got["logp"], want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got["token"], np.where(batch.mask, batch.tokens, 0))


def loss_of(stats, batch):
    """A different weight for every statistic; nonlinear in one of them."""
    per_token = batch.advantage * jnp.exp(stats["logp"]) + 0.3 * stats["entropy"] - 2.0 * stats["forward_kl"]
    return LossOutput(
        Mean.of(per_token + 0.7 * stats["reverse_kl"], batch.mask), {"h": Mean.of(stats["entropy"], batch.mask)}
    )


ALL = LibraryStats(VocabStats._fields, T)


def generic(z, tokens):
    teacher = jax.lax.stop_gradient(z) / T
    return VocabStats(
        losses.token_logp(z, tokens), losses.entropy(z), losses.forward_kl(teacher, z), losses.reverse_kl(teacher, z)
    )._asdict()


@pytest.mark.slow
@pytest.mark.parametrize("block", [1, 2, None])
@pytest.mark.parametrize("mesh", [None, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 1, "tensor": 4}])
def test_one_pass_equals_two_and_the_formula_on_full_logits(mesh, block, monkeypatch):
    """Loss, metrics, gap and both gradients: formed in the forward pass, or in the backward pass, or from all logits;
    tiles of four tokens, in blocks of one, two, or as they are."""
    rng = np.random.default_rng(2)
    b, length, v = 8, 6, 12
    if block:
        monkeypatch.setattr(head_tiles, "BLOCK_BYTES", block * 4 * v)
    mesh = mesh and make_mesh(**mesh, devices=jax.devices()[: int(np.prod(list(mesh.values())))])
    hidden = jnp.asarray(rng.normal(size=(b, length, D)), jnp.float32)
    unembed = jnp.asarray(rng.normal(size=(D, v)), jnp.float32)
    batch = some_batch(rng, b, length, v)
    logp = jnp.pad(generic(hidden[:, :-1] @ unembed, batch.tokens[:, 1:])["logp"], ((0, 0), (1, 0)))
    near = jnp.arange(length) % 2 == 0  # a ratio of 1.01 at every other position, the others far from 1
    batch = dataclasses.replace(batch, old_logp=jnp.where(near, logp - 0.01, batch.old_logp))

    def on_full(hidden, unembed):
        stats = generic(hidden[:, :-1] @ unembed, batch.tokens[:, 1:])
        stats = {name: jnp.pad(x, ((0, 0), (1, 0))) for name, x in stats.items()}
        return loss_of(stats, batch).loss.total, (loss_of(stats, batch), stats["logp"])

    def through(stats, tokenwise):
        def f(hidden, unembed):
            found = batch_loss(stats, loss_of, hidden, unembed, batch, tokenwise=tokenwise, tile_tokens=4, mesh=mesh)
            return found.out.loss.total, found

        np.testing.assert_allclose(jax.jit(f)(hidden, unembed)[0], total, rtol=1e-5)  # without gradients
        return jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(hidden, unembed)

    (total, (out, logp)), grads = jax.value_and_grad(on_full, argnums=(0, 1), has_aux=True)(hidden, unembed)
    moved = (np.asarray(logp) - batch.old_logp)[np.asarray(batch.mask)]
    gap, outside = np.abs(moved), np.abs(np.exp(moved) - 1) > 0.1
    assert 0 < outside.sum() < outside.size
    for stats, tokenwise in ((ALL, True), (ALL, False), (generic, True), (generic, False)):
        (value, found), pulled = through(stats, tokenwise)
        np.testing.assert_allclose(value, total, rtol=1e-5)
        np.testing.assert_allclose(found.gap, gap.max(), rtol=1e-5)
        metrics = dict(found.out.metrics)
        np.testing.assert_allclose(metrics.pop("rollout/logp_gap_mean_nats").value, gap.mean(), rtol=1e-5)
        np.testing.assert_allclose(metrics.pop("rollout/ratio_outside_fraction").value, outside.mean(), rtol=1e-6)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), metrics, out.metrics)
        for got, want in zip(pulled, grads, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def buffers(text):
    """Elements of every array that a compiled program names, largest first."""
    shapes = re.findall(r"\b(?:f32|bf16|s32|pred)\[([\d,]+)\]", text)
    return sorted({int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes}, reverse=True)


def compiled(n, *, one_pass, v=3000, tile=16, d=24, block=None):
    tiling = Tiling(tile, block and 4 * v * block)

    def total(hidden, unembed, batch):
        if one_pass:
            found: Any = token_loss(ALL, loss_of, tiling, hidden, unembed, batch)
            return found.out.loss.total
        stats: Any = token_stats(ALL, tiling, hidden, unembed, batch.tokens[0], batch.mask[0])
        return loss_of({name: x[None] for name, x in stats.items()}, batch).loss.total

    rows = [jax.ShapeDtypeStruct((1, n), t) for t in (jnp.int32, bool, jnp.float32, jnp.float32)]
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((n, d), (d, v))]
    return jax.jit(jax.grad(total, argnums=(0, 1))).lower(*shapes, Batch(*rows)).compile()


@pytest.mark.parametrize("block", [4, None])
@pytest.mark.parametrize("one_pass", [True, False])
def test_no_logits_of_all_tokens_exist_and_memory_does_not_grow_with_them(one_pass, block):
    v, d = 3000, 24
    few, many = (compiled(n, one_pass=one_pass, block=block) for n in (64, 1024))
    assert buffers(many.as_text())[0] == d * v  # the unembedding; a tile is 16 x 3000, all logits would be 1024 x 3000
    per_token = 4 * (2 * d + 40)  # bytes: hidden states, and a few numbers
    grown = many.memory_analysis().temp_size_in_bytes - few.memory_analysis().temp_size_in_bytes
    assert grown < 960 * per_token < 0.05 * (960 * v * 4)


@pytest.mark.parametrize("one_pass", [True, False])
def test_blocks_of_a_tile_write_gradients_where_logits_stood(one_pass):
    """A tile of 256 tokens once, in blocks of 8, beside the unembedding's gradient."""
    v, d = 3000, 24
    tile, blocks = (compiled(1024, one_pass=one_pass, tile=256, block=block) for block in (None, 8))
    assert "dynamic-update-slice" in blocks.as_text()
    assert buffers(blocks.as_text())[0] == buffers(tile.as_text())[0] == 256 * v
    held = blocks.memory_analysis().temp_size_in_bytes
    assert held < 4 * (1.1 * 256 * v + 4 * d * v)
    assert held < tile.memory_analysis().temp_size_in_bytes, "all passes of a tile at once need more than one"


def test_blocks_fit_a_cpus_caches_and_the_tile():
    wanted = jnp.ones(1000, bool)
    mib = 1 << 20
    for tiling, v, sizes in (
        (Tiling(512, 8 * mib), 151_936, (512, 8)),
        (Tiling(100, 8 * mib), 151_936, (96, 8)),
        (Tiling(3, 8 * mib), 151_936, (3, 3)),
        (Tiling(2000, 8 * mib), 40, (1000, 1000)),
        (Tiling(512, 1), 151_936, (512, 1)),
        (Tiling(512), 151_936, (512, 512)),
    ):
        tiles = head_tiles.tiles_of(wanted, v, tiling)
        assert (tiles.order.shape[1], tiles.block) == sizes
    assert head_tiles.tiling_for(7) == Tiling(7, head_tiles.BLOCK_BYTES), "the tests' backend is a CPU"


def test_a_vocabulary_over_devices_is_never_gathered():
    mesh = make_mesh(fsdp=2, tensor=4)
    rng, v = np.random.default_rng(0), 4096
    batch = some_batch(rng, 4, 17, v)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "tensor"))
    unembed = jax.device_put(jnp.asarray(rng.normal(size=(D * 2, v)), jnp.float32), sharding)
    hidden = jnp.asarray(rng.normal(size=(4, 17, D * 2)), jnp.float32)

    def total(hidden, unembed):
        found = batch_loss(ALL, loss_of, hidden, unembed, batch, tokenwise=True, tile_tokens=8, mesh=mesh)
        return found.out.loss.total

    text = (
        jax.jit(jax.grad(total, argnums=(0, 1)), out_shardings=(None, sharding))
        .lower(hidden, unembed)
        .compile()
        .as_text()
    )
    moved = [
        line for line in text.splitlines() if re.search(r" (all-gather|all-reduce|all-to-all|collective-permute)", line)
    ]
    assert moved
    tile = 8 * v // 4
    for line in moved:  # of V, only the unembedding's own shards over fsdp: [D, V / 4]
        of_tokens = [n for n in buffers(line.split(" = ")[1].split("(")[0] + line.split("=")[1]) if n >= tile]
        assert all(n <= D * 2 * v // 4 for n in of_tokens), line


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.01, 1.2, 2.0])
@pytest.mark.parametrize("nats", [1e-4, 1e-3, 1e-2, 0.1])
def test_collapsed_distributions_keep_their_digits(temperature, nats):
    """One entry 30 above the bulk; a few between, placed so that the entropy is `nats`. Against float64, 1e-4."""
    rng = np.random.default_rng(5)
    v, n = 5000, 4

    def float64(z, token):
        s = z - z.max(-1, keepdims=True)
        logp = s - np.log(np.exp(s).sum(-1, keepdims=True))
        u = s / temperature
        logq = u - np.log(np.exp(u).sum(-1, keepdims=True))
        p, q = np.exp(logp), np.exp(logq)
        h, fkl, rkl = -(p * logp).sum(-1), (q * (logq - logp)).sum(-1), (p * (logp - logq)).sum(-1)
        one = np.eye(v)[token]
        grads = one - p, -p * (logp + h[:, None]), p - q, p * (logp - logq - rkl[:, None])
        return (np.take_along_axis(logp, token[:, None], 1)[:, 0], h, fkl, rkl), grads

    z = np.concatenate([np.zeros((n, 1)), -30 + rng.normal(size=(n, v - 1))], axis=1)
    low, high = np.full(n, -40.0), np.full(n, 0.0)
    for _ in range(60):
        middle = (low + high) / 2
        z[:, 1:6] = middle[:, None] - np.arange(5)
        below = float64(z, np.zeros(n, int))[0][1] < nats
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    z = (z + rng.normal(size=(n, 1))).astype(np.float32)
    for token in (0, 2, 3000):
        tokens = np.full(n, token)
        want, want_grads = float64(z.astype(np.float64), tokens)
        np.testing.assert_allclose(want[1], nats, rtol=0.01)
        got = jax.jit(lambda z, t: logits_stats(z, t, teacher_temperature=temperature))(
            z, jnp.asarray(tokens, jnp.int32)
        )
        assert (np.asarray(got.logp) <= 0).all()
        assert (np.asarray(got.forward_kl) >= 0).all()
        assert (np.asarray(got.reverse_kl) >= 0).all()
        for i, name in enumerate(VocabStats._fields):
            np.testing.assert_allclose(got[i], want[i], rtol=1e-4, err_msg=name)
            grad = jax.jit(jax.grad(lambda z, t, i=i: jnp.sum(logits_stats(z, t, teacher_temperature=temperature)[i])))(
                z, jnp.asarray(tokens, jnp.int32)
            )
            error = np.linalg.norm(grad - want_grads[i], axis=-1) / np.linalg.norm(want_grads[i], axis=-1)
            assert error.max() < 1e-4, (name, error.max())


def test_ties_and_impossible_entries():
    # Two largest entries and one of probability 0: p = (1/2, 1/2, 0). H = ln 2 for every temperature, both KLs 0.
    z = jnp.array([[3.0, 3.0, -jnp.inf]])
    got = logits_stats(z, jnp.array([1], jnp.int32), teacher_temperature=1.5)
    np.testing.assert_allclose([float(x[0]) for x in got], [-np.log(2), np.log(2), 0, 0], atol=1e-7)
    grad = jax.grad(lambda z: logits_stats(z, jnp.array([1], jnp.int32), teacher_temperature=1.5).logp[0])(z)
    np.testing.assert_allclose(grad, [[-0.5, 0.5, 0.0]], atol=1e-7)
