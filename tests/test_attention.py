"""Every implementation of attention against the formula; kernels run interpreted here and are compiled for TPUs."""

import functools
import os
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tsopsd_jax.distributed.sharding import DECODE_RULES, make_mesh, replicated, row_sharding, tree_shardings
from tsopsd_jax.learn.update import abstract_state, make_optimizer, make_update
from tsopsd_jax.model import Qwen3, Qwen3Config
from tsopsd_jax.model import attention as attention_module
from tsopsd_jax.model.attention import best_causal, causal_attention
from tsopsd_jax.model.decoding import rollout_view, view_axes
from tsopsd_jax.objectives import OBJECTIVES
from tsopsd_jax.rollout import Engine, Sampling, draw
from tsopsd_jax.rollout.paged_attention import pages_attention
from tsopsd_jax.rollout.schedule import PageTable
from tsopsd_jax.rollout.segment import Pool, Slots, empty_tails
from tsopsd_jax.rollout.slot_attention import SlotAttention
from tsopsd_jax.types import Batch


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def dense(q, k, v, segment=None):
    """Softmax over all earlier positions of the segment, per head, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    b, t, n, h = q.shape
    out = np.zeros((b, t, n, h))
    for head in range(n):
        kv = head // (n // k.shape[2])
        scores = np.einsum("bth,bsh->bts", q[:, :, head], k[:, :, kv]) / np.sqrt(h)
        seen = np.tri(t, dtype=bool)[None]
        if segment is not None:
            seen = seen & (segment[:, :, None] == segment[:, None, :])
        scores = np.where(seen, scores, -np.inf)
        weight = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, :, head] = np.einsum("bts,bsh->bth", weight / weight.sum(-1, keepdims=True), v[:, :, kv])
    return out


@pytest.mark.parametrize(
    ("implementation", "mesh"), [("xla", None), ("splash", None), ("splash", {"fsdp": 2, "tensor": 2})]
)
def test_causal_attention(implementation, mesh):
    q, k, v = normal(0, 2, 128, 4, 128), normal(1, 2, 128, 2, 128), normal(2, 2, 128, 2, 128)
    on = None if mesh is None else make_mesh(**mesh, devices=jax.devices()[:4])
    run = functools.partial(causal_attention, implementation=implementation, mesh=on, interpret=True)
    np.testing.assert_allclose(jax.jit(run)(q, k, v), dense(q, k, v), atol=2e-5)
    segment = np.repeat(np.array([[1, 2, 0, 0], [1, 1, 1, 2]], np.int32), 32, axis=1)
    np.testing.assert_allclose(jax.jit(run)(q, k, v, jnp.asarray(segment)), dense(q, k, v, segment), atol=2e-5)


@pytest.mark.parametrize("implementation", ["splash", "xla"])
def test_attention_of_long_rows_in_blocks_and_its_gradients(implementation, monkeypatch):
    """Rows of 384 positions in blocks of 128, segments across the blocks' borders."""
    monkeypatch.setattr(attention_module, "BLOCK_POSITIONS", 128)
    monkeypatch.setattr(attention_module, "BLOCKS", 3)
    q, k, v, weight = (
        normal(0, 1, 384, 2, 128),
        normal(1, 1, 384, 1, 128),
        normal(2, 1, 384, 1, 128),
        normal(3, 1, 384, 2, 128),
    )
    segment = jnp.asarray(np.repeat(np.array([[1, 2, 3, 0]], np.int32), [100, 40, 200, 44], axis=1))

    def blocks(q, k, v):
        return jnp.sum(weight * causal_attention(q, k, v, segment, implementation=implementation, interpret=True))

    def whole(q, k, v):
        visible = jnp.tri(384, dtype=bool)[None] & (segment[:, :, None] == segment[:, None, :])
        return jnp.sum(weight * attention_module.attention(q, k, v, visible))

    got, want = (jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(q, k, v) for f in (blocks, whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)
    if implementation == "xla":
        text = jax.jit(jax.grad(blocks, argnums=(0, 1, 2))).lower(q, k, v).compile().as_text()
        assert "2,128,384]" in text
        assert "384,384]" not in text, "scores of all queries exist"


def test_implementations_are_chosen_by_name():
    q = normal(0, 1, 100, 2, 8)
    with pytest.raises(ValueError, match="expected auto or one of xla, cudnn, splash, got 'flash'"):
        causal_attention(q, q, q, implementation="flash")
    with pytest.raises(ValueError, match="multiple of 128 positions, got 100"):
        causal_attention(q, q, q, implementation="splash")
    with pytest.raises(
        ValueError, match=r"cudnn takes rows of one sequence here, got segments \(a cpu has no cuDNN\); use xla"
    ):
        causal_attention(q, q, q, jnp.zeros((1, 100), jnp.int32), implementation="cudnn")
    assert best_causal("cpu", positions=128, dtype=jnp.bfloat16) == "xla"
    assert best_causal("gpu", positions=100, dtype=jnp.bfloat16) == "cudnn"
    assert best_causal("gpu", positions=100, dtype=jnp.bfloat16, packed=True) == "xla"
    assert best_causal("gpu", positions=100, dtype=jnp.float32) == "xla"
    assert best_causal("tpu", positions=256, dtype=jnp.float32) == "splash"
    assert best_causal("tpu", positions=100, dtype=jnp.bfloat16) == "xla"


def test_cudnn_takes_segments_on_hopper_only():
    def on(platform, capability="9.0"):
        return attention_module.cudnn_refuses_segments(
            SimpleNamespace(platform=platform, compute_capability=capability)
        )

    assert on("gpu") is None
    assert on("gpu", "10.0") is None
    assert "compute capability 9, got 8.0" in on("gpu", "8.0")
    assert "a tpu has no cuDNN" in on("tpu")


def test_without_jaxs_private_interface_packed_rows_go_through_xla(monkeypatch):
    def gone():
        raise AttributeError("no attribute '_dot_product_attention_fwd_impl'")

    monkeypatch.setattr(attention_module, "_cudnn", gone)
    found = attention_module.cudnn_refuses_segments(SimpleNamespace(platform="gpu", compute_capability="9.0"))
    assert found == "this version of JAX has no such interface: no attribute '_dot_product_attention_fwd_impl'"


def test_segments_as_cudnn_reads_them(monkeypatch):
    """Lengths and starts within the row, -1 where there is no segment; starts have one place more."""
    monkeypatch.setattr(attention_module, "MOST_SEGMENTS", 3)
    segment = jnp.asarray([[1, 1, 2, 3, 3, 3], [1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]], jnp.int32)
    length, start = attention_module.segment_ranges(segment)
    np.testing.assert_array_equal(length, [[2, 1, 3], [4, -1, -1], [-1, -1, -1]])
    np.testing.assert_array_equal(start, [[0, 2, 3, -1], [0, -1, -1, -1], [-1, -1, -1, -1]])


def test_places_of_no_sequence_give_and_take_nothing(monkeypatch):
    """Whatever cuDNN leaves there, NaN too: output and gradients are zero, elsewhere they are untouched. (A stand-in
    for cuDNN; its numbers can be seen on a GPU alone.)"""
    monkeypatch.setattr(attention_module, "_within_ranges", junk_at_padding)
    q = normal(0, 1, 4, 2, 8)
    segment = jnp.asarray([[1, 1, 2, 0]], jnp.int32)

    def total(q):
        return jnp.sum(attention_module._cudnn_packed(q, q, q, segment))

    value, gradient = jax.value_and_grad(total)(q)
    np.testing.assert_allclose(value, 3 * jnp.sum(q[:, :3]), rtol=1e-6)
    np.testing.assert_array_equal(gradient, jnp.full(q.shape, 3.0).at[:, 3].set(0.0))


@jax.custom_vjp
def junk_at_padding(q, k, v, length, start):
    del length, start
    return (q + k + v).at[:, 3].set(jnp.nan)


junk_at_padding.defvjp(
    lambda q, k, v, length, start: (junk_at_padding(q, k, v, length, start), None),
    lambda _, g: (*[g.at[:, 3].set(jnp.nan)] * 3, None, None),
)


# Shard 0: slot 0 has two pages that do not lie together, slot 1 none, slot 2 one. Shard 1: only slot 1 has pages.
OWNER = np.array([[2, 0, -1, 0, -1], [-1, 1, 1, -1, 1]], np.int32)


def table_of(owner) -> PageTable:
    """The pages of each slot, in the order of their numbers."""
    slots, most = owner.max() + 1, owner.shape[1]
    mine = [[np.flatnonzero(shard == slot) for slot in range(slots)] for shard in owner]
    page = [[np.pad(at, (0, most - len(at))) for at in shard] for shard in mine]
    return PageTable(np.array(page, np.int32), np.array([[len(at) for at in shard] for shard in mine], np.int32))


def expected(q, keys, values):
    """(top, total, out) per slot by the definition, in float64."""
    q, keys, values = (np.asarray(x, np.float64) for x in (q, keys, values))
    shards, slots = OWNER.shape[0], q.shape[0] // OWNER.shape[0]
    top = np.full(q.shape[:3], -np.inf)
    total, out = np.zeros(q.shape[:3]), np.zeros(q.shape)
    for shard in range(shards):
        for slot in range(slots):
            mine, b = np.flatnonzero(OWNER[shard] == slot), shard * slots + slot
            if not len(mine):
                continue
            scores = np.concatenate([np.einsum("kgh,khr->kgr", q[b], keys[shard, p]) for p in mine], axis=-1)
            scores /= np.sqrt(q.shape[-1])
            top[b] = scores.max(-1)
            weight = np.exp(scores - top[b][..., None])
            total[b] = weight.sum(-1)
            out[b] = np.einsum("kgr,krh->kgh", weight, np.concatenate([values[shard, p] for p in mine], axis=1))
    return top, total, out


@pytest.mark.parametrize(
    ("implementation", "mesh"),
    [("xla", None), ("pallas", None), ("pallas", {"fsdp": 2, "tensor": 2}), ("xla", {"fsdp": 2})],
)
def test_paged_attention(implementation, mesh):
    q, keys, values = normal(0, 6, 2, 3, 8), normal(1, 2, 5, 2, 8, 4) * 3, normal(2, 2, 5, 2, 4, 8)
    owner, on = OWNER, None
    if mesh is None and implementation == "pallas":  # without a mesh there is one shard
        q, keys, values, owner = q[:3], keys[:1], values[:1], OWNER[:1]
    want = [
        x[: len(q)] for x in expected(normal(0, 6, 2, 3, 8), normal(1, 2, 5, 2, 8, 4) * 3, normal(2, 2, 5, 2, 4, 8))
    ]
    if mesh is not None:
        on = make_mesh(**mesh, devices=jax.devices()[: np.prod(list(mesh.values()))])
        q, keys, values = (jax.device_put(x, NamedSharding(on, P(("data", "fsdp")))) for x in (q, keys, values))
    attention = SlotAttention(implementation, on, interpret=True)

    def run(q, pages, table):
        return pages_attention(q, pages, attention.prepare(table, pages, 8), mesh=on, interpret=True)

    got = jax.jit(run)(q, (keys, values), table_of(owner))
    for name, a, b in zip(("top", "total", "out"), got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def tpu():
    """A mesh of four TPU chips that exist for the compiler only."""
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed (extra `tpu`)")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    # Programs for chips that are not there cannot be read back from the cache.
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    except Exception as error:  # another process may hold the library
        pytest.skip(f"the TPU compiler cannot be used here: {error}")
    yield make_mesh(fsdp=2, tensor=2, devices=chips)
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def compile_for(mesh, function, *shapes):
    args = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(("data", "fsdp"), None, *tail)))
        for shape, dtype, *tail in shapes
    ]
    return jax.jit(function).lower(*args).compile()


def test_the_causal_kernel_compiles_for_a_tpu(tpu):
    causal = functools.partial(causal_attention, implementation="splash", mesh=tpu)
    shapes = [((4, 256, heads, 128), jnp.bfloat16, "tensor") for heads in (32, 8, 8)]
    assert "custom-call" in compile_for(tpu, causal, *shapes).as_text()


@pytest.mark.parametrize(
    ("slots", "most", "heads", "group", "dtype"),
    [
        # 64 slots of a chip at 20,480 + 2,048 tokens: what has to fit into its scalar memory
        pytest.param(64, 176, 8, 4, jnp.bfloat16, id="long"),
        # as many heads on each chip as a step's pages have room for in its fast memory: four, two, one
        pytest.param(8, 8, 48, 1, jnp.bfloat16, id="heads-24"),
        pytest.param(8, 8, 64, 1, jnp.bfloat16, id="heads-32"),
        pytest.param(8, 8, 64, 1, jnp.float32, id="heads-32-float32"),
    ],
)
def test_the_paged_kernel_compiles_for_a_tpu(tpu, slots, most, heads, group, dtype):
    """It reads the pages where they lie: nothing of their size is copied beside them."""
    rows = ("data", "fsdp")

    def array(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(tpu, P(rows, *axes)))

    def paged(q, keys, values, table):
        pages = keys, values
        return pages_attention(q, pages, SlotAttention("pallas", tpu).prepare(table, pages, 256), mesh=tpu)

    pool = array((2, 300, heads, 128, 128), dtype, None, "tensor")
    table = PageTable(array((2, slots // 2, most), jnp.int32), array((2, slots // 2), jnp.int32))
    compiled = jax.jit(paged).lower(array((slots, heads, group, 128), dtype, "tensor"), pool, pool, table).compile()
    assert "tpu_custom_call" in compiled.as_text()
    on_chip = 2 * 300 * (heads // 2) * 128 * 128 * jnp.dtype(dtype).itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * on_chip


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.95, "top_k": 20}])
def test_a_tpu_divides_centred_logits_by_the_temperature_once(tpu, settings):
    """In the program that comes out of the compiler, logits from a matrix product: over the vocabulary there is one
    division (a product with 1 / T by now), and it divides a difference."""
    vocab, batch = 4096, ("data", "fsdp")

    def next_token(hidden, unembed, uniform):
        logits = jnp.einsum("BD,DV->BV", hidden, unembed, preferred_element_type=jnp.float32)
        return draw(logits, uniform, Sampling(sampling_temperature=0.6, **settings))

    def array(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(tpu, P(*axes)))

    hidden = array((16, 256), jnp.bfloat16, batch)
    unembed = array((256, vocab), jnp.bfloat16, None, "tensor")
    text = jax.jit(next_token).lower(hidden, unembed, array((16,), jnp.float32, batch)).compile().as_text()
    found = re.findall(rf"f32\[8,{vocab // 2}\]\S* (?:multiply|divide)\(%([\w.-]+), \S+\), metadata=.*/div\"", text)
    (divided,) = found
    assert re.search(rf"%{re.escape(divided)} = f32\[8,{vocab // 2}\]\S* subtract\(", text), "not centred"


def test_a_decoding_segment_compiles_for_a_tpu(tpu):
    """The whole program with pages and kernel, for four chips: what moves between chips is activations, never
    weights."""
    model = Qwen3(
        Qwen3Config(
            vocab_size=4096,
            hidden_size=512,
            intermediate_size=1024,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=128,
        ),
        compute_dtype=jnp.bfloat16,
    )
    settings = {"sampling": Sampling(), "max_response_tokens": 1000, "stop_ids": (3,), "slots": 32}
    engine = Engine(model, tpu, max_prompt_tokens=300, segment=128, **settings)
    view = jax.eval_shape(functools.partial(rollout_view, model), model.param_shapes())
    layout = tree_shardings(view_axes(model), view, tpu, DECODE_RULES)

    def placed(tree, sharding):
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, sharding)

    def everywhere(tree, spec):
        return placed(tree, jax.tree.map(lambda _: NamedSharding(tpu, spec), tree))

    rows = ("data", "fsdp")
    tails = jax.eval_shape(lambda: empty_tails(model, 32, engine.geometry.home + 128))
    keys = jax.ShapeDtypeStruct((2, 40, 4, 128, 128), jnp.bfloat16)
    table = PageTable(jax.ShapeDtypeStruct((2, 16, 10), jnp.int32), jax.ShapeDtypeStruct((2, 16), jnp.int32))
    pool = Pool(everywhere(((keys, keys),) * 2, P(rows, None, "tensor")), everywhere(table, P(rows)))
    slots = everywhere(Slots(*(jax.ShapeDtypeStruct((32,), jnp.int32),) * 6), P(rows))
    key = everywhere(jax.eval_shape(lambda: jax.random.key(0)), P())
    text = engine.on_device.decode_segment.lower(
        placed(view, layout), everywhere(tails, P(rows, "tensor")), pool, slots, key
    )
    text = text.compile().as_text()
    assert "tpu_custom_call" in text
    moved = re.findall(r"= \(?(\w+)\[([\d,]*)\]\S* (?:all-gather|all-to-all|all-reduce|collective-permute)", text)
    largest = max(int(np.prod([int(n) for n in shape.split(",") if n])) for _, shape in moved)
    weights = min(x.size for x in jax.tree.leaves(view["layers"][0]) if x.ndim > 1)
    assert largest < weights / 4, (largest, weights)


def test_a_packed_update_compiles_for_a_tpu(tpu):
    """The learner's step for four chips, rows packed: the kernel has the segments, no scores [L, L], no logits of all
    tokens, and only the unembedding's own shards are gathered of what has the vocabulary's size."""
    v, width, rows = 8192, 1024, 8
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4}
    shape = Qwen3Config(vocab_size=v, num_key_value_heads=2, head_dim=128, **sizes)
    model = Qwen3(shape, compute_dtype=jnp.bfloat16, remat="full", mesh=tpu)
    optimizer = make_optimizer(learning_rate=1e-6)
    update = make_update(model, OBJECTIVES["dapo"](), optimizer, micro_batches=2, tile_tokens=256)
    state = abstract_state(model, optimizer, tpu)
    of = functools.partial(jax.ShapeDtypeStruct, (rows, width), sharding=row_sharding(tpu))
    batch = Batch(*map(of, (jnp.int32, bool, jnp.float32, jnp.float32)), segment=of(jnp.int32))
    hold = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(tpu))
    layout = jax.tree.map(lambda x: x.sharding, state)
    compiled = jax.jit(update, donate_argnums=0, out_shardings=(layout, None)).lower(state, batch, hold).compile()
    text = compiled.as_text()
    assert "tpu_custom_call" in text
    assert f"{width},{width}]" not in text
    unembed = 256 * v // 2  # gathered over fsdp, on each chip
    sizes = {int(np.prod([int(n) for n in s.split(",")])) for s in re.findall(r"(?:f32|bf16)\[([\d,]+)\]", text)}
    tokens = rows // 2 // 2 * width  # of a micro-batch on each chip
    assert 256 * v // 2 <= max(sizes) < tokens * v // 2, "a tile's logits, not those of all tokens"
    moved = [x for x in text.splitlines() if re.search(r" (all-gather|all-to-all|collective-permute)(-start)?\(", x)]
    assert moved
    for line in moved:
        for found in re.findall(r"(?:f32|bf16)\[([\d,]+)\]", line):
            assert int(np.prod([int(n) for n in found.split(",")])) <= unembed, line
