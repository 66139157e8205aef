"""Programs for GPUs, compiled by XLA's GPU compiler on a machine without a GPU and read as text.

What is read here is structure: what moves, what is written, in which type, how many kernels. Numbers, speed and the
choice of kernels by timing need a device. Skipped without the extra `cuda`: `make gpu-programs` has an environment of
its own.
"""

import dataclasses
import functools
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from compile_targets import GPU

from tsopsd_jax.commands.plan import no_compilation_cache
from tsopsd_jax.config import load_config
from tsopsd_jax.distributed.sharding import make_mesh
from tsopsd_jax.learn.update import abstract_state
from tsopsd_jax.model import Qwen3, Qwen3Config
from tsopsd_jax.model.attention import causal_attention
from tsopsd_jax.plan.collectives import KINDS, Program, computations_of
from tsopsd_jax.plan.compiled import CompiledPrograms
from tsopsd_jax.plan.planner import Means, make_plan
from tsopsd_jax.plan.topologies import topology
from tsopsd_jax.plan.traffic import FREE, Loop, loop_of, products
from tsopsd_jax.rollout import Engine, Sampling
from tsopsd_jax.rollout.schedule import PageTable
from tsopsd_jax.rollout.segment import STEPS
from tsopsd_jax.rollout.slot_attention import Seen, SlotAttention

pytestmark = [
    pytest.mark.gpu_compiler,
    GPU,
]

# Slots with a factor of 7, which every cache and activation has and no weight: a buffer of a weight's size is a weight.
D, F, V, HEADS, KV, H = 1024, 2048, 16_384, 16, 4, 128
WEIGHTS = {"qkv": D * (HEADS + 2 * KV) * H, "o": D * HEADS * H, "gate_up": 2 * D * F, "down": D * F, "embed": V * D}
SLOTS = 56
MOST_KERNELS = 19


def config_of(layers: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV,
        head_dim=H,
        rope_theta=1e6,
        tie_word_embeddings=True,
    )


class Decoding(NamedTuple):
    """A decoding segment's program: its text, and the loop over tokens."""

    text: str
    loop: Loop


def decoding(place: str, *, layers: int, tensor: int = 1, options: dict | None = None) -> Decoding:
    mesh = make_mesh(data=1, fsdp=-1, tensor=tensor, devices=topology(place).devices)
    model = Qwen3(config_of(layers), compute_dtype=jnp.bfloat16, mesh=mesh)
    state = abstract_state(model, optax.adamw(1e-6), mesh)
    engine = Engine(
        model,
        mesh,
        sampling=Sampling(),
        max_prompt_tokens=512,
        max_response_tokens=1024,
        stop_ids=(0, 1),
        slots=SLOTS,
    )
    with no_compilation_cache():
        program = engine.on_device.lower_segment(state.params).compile(compiler_options=options)
    text = program.as_text()
    return Decoding(text, loop_of(text, STEPS))


@pytest.fixture(scope="module")
def on_one(tmp_path_factory):
    """(the program of two layers on one H100, its kernels as XLA will launch them)."""
    folder = tmp_path_factory.mktemp("dump")
    found = decoding("h100:1", layers=2, options={"xla_dump_to": str(folder)})
    (file,) = folder.glob("*decode_segment*thunk_sequence_after_thunk_passes.txt")
    return found, file.read_text()


@pytest.fixture(scope="module")
def on_four():
    return decoding("h100:4", layers=2, tensor=4)


def elements(shape: str) -> list[int]:
    return [math.prod(int(n) for n in dims.split(",") if n) for dims in re.findall(r"[a-z]\w*\[([\d,]*)\]", shape)]


def test_the_loop_over_tokens_writes_no_weight(on_one, on_four):
    """No copy, slice or transpose of a matrix: nothing in the loop gives a buffer of a weight's size, whole or a
    device's."""
    for (_, (body, _)), shards in ((on_one[0], 1), (on_four, 4)):
        sizes = {size // shards for size in WEIGHTS.values()} | set(WEIGHTS.values())
        written = [(i.name, i.shape) for i in body if i.op not in FREE and sizes & set(elements(i.shape))]
        assert written == []
        assert all(n < min(WEIGHTS.values()) // shards for i in body if i.op == "copy" for n in elements(i.shape))


def test_the_loop_over_tokens_moves_no_weight(on_one, on_four):
    """On one GPU nothing moves; on four, over `tensor`, activations and what the draw compares."""
    assert Program(on_one[0].text, {"data": 1, "fsdp": 1, "tensor": 1}, {STEPS: 1}).moved == []
    moved = Program(on_four.text, {"data": 1, "fsdp": 1, "tensor": 4}, {STEPS: 1}).moved
    assert {m.axis for m in moved} == {"tensor"}
    assert max(m.largest for m in moved) <= SLOTS * D < min(WEIGHTS.values()) / 4 / 4
    assert any(i.op.removesuffix("-start") in KINDS for i in on_four.loop.body)


def test_products_are_of_bfloat16_where_it_is_asked(on_one, small):
    for text in (on_one[0].text, *small[1].values()):
        found = products(computations_of(text)[0])
        assert [product for product in found if product.factors != ("bf16", "bf16")] == []
    assert (
        len(products(on_one[0].loop.computations)) >= 2 * 4 + 1
    )  # a layer's four with weights (attention's are in the kernel), and the head


def test_kernels_of_a_layer(on_one):
    """A layer costs this many launches more: more of them is a loss, fewer a gain to write down (docs/gpus.md)."""
    one = decoding("h100:1", layers=1)
    more = on_one[0].loop.launches - one.loop.launches
    assert more <= MOST_KERNELS, more
    assert [i.name for i in on_one[0].loop.body if i.op == "copy"] == []


def test_attention_is_one_kernel_a_layer_whose_sums_have_an_order(on_one):
    """... and nothing in the loop adds to what others add to: no scatter, so the same bits each time."""
    kernels = [i for i in on_one[0].loop.body if i.op == "custom-call" and "slot_attention" in i.rest]
    assert len(kernels) == 2
    assert " scatter(" not in on_one[0].text


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("place", ["a100-80g:2", "h100:2", "b200:2"])
def test_the_kernel_compiles_for_every_generation(place, dtype):
    """Eight slots of a 4B or 8B model over two GPUs, their pages divided among programs; pages are read where they lie,
    each device its own heads."""
    mesh = make_mesh(data=1, fsdp=1, tensor=2, devices=topology(place).devices)

    def array(*shape, dtype=dtype, spec=()):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, jax.P(*spec)))

    q, heads = array(8, 32, 128, spec=(None, "tensor")), (None, "tensor")
    tail = array(8, 8, 128, 128, spec=heads), array(8, 8, 128, 128, spec=heads)
    pages = array(1, 300, 8, 128, 64, spec=(None, *heads)), array(1, 300, 8, 64, 128, spec=(None, *heads))
    seen = Seen(array(8, dtype=jnp.int32), array(dtype=jnp.int32), array(8, 128, dtype=jnp.bool_))
    attention = SlotAttention("triton", mesh)

    def run(q, tail, seen, pages, table):
        return attention.attend(q, tail, seen, 64, pages, attention.prepare(table, pages, 128))

    with no_compilation_cache():
        table = PageTable(array(1, 8, 60, dtype=jnp.int32), array(1, 8, dtype=jnp.int32))
        compiled = jax.jit(run).lower(q, tail, seen, pages, table).compile()
    assert compiled.as_text().count('name = "slot_attention"') == 1
    pool = 300 * 4 * 128 * 64 * jnp.dtype(dtype).itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < 0.3 * pool
    assert Program(compiled.as_text(), {"data": 1, "fsdp": 1, "tensor": 2}, {}).moved == []


def test_the_loops_body_is_one_graph(on_one):
    """XLA records the whole body as a command buffer (a CUDA graph): the host launches it once a token."""
    _, sequence = on_one
    body = sequence.split("body:")[1]
    lines = [line for line in body.splitlines() if re.match(r"    \d+: ", line)]
    assert len(lines) == 1
    assert "kCommandBuffer" in lines[0]


SMALL = """
model: {path: nowhere/small, compute_dtype: bfloat16, remat: full}
mesh: {fsdp: 2, tensor: 2}
data: {name: countdown, verifier: countdown, max_prompt_tokens: 64}
phases:
  - name: rl
    objective: {name: dapo}
    optimizer: {learning_rate: 1.0e-6}
    stop: {steps: 1}
    prompts_per_step: 4
    responses_per_prompt: 4
    max_response_tokens: 192
    rows_at_once: 8
    micro_batches: 2
    chunk_tokens: 64
    reward: {}
  - name: reheat
    objective: {name: ts_opsd}
    optimizer: {learning_rate: 1.0e-6}
    stop: {steps: 1}
    prompts_per_step: 4
    responses_per_prompt: 1
    max_response_tokens: 20
    micro_batches: 1
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(plan, texts of the programs by name) of a small run on four H100."""
    file = Path(tmp_path_factory.mktemp("plan")) / "small.yaml"
    file.write_text(SMALL)
    texts = {}

    class Kept(CompiledPrograms):
        def compile(self, name, lowered):
            found = super().compile(name, lowered)
            texts[name] = found.text
            return found

    shape = Qwen3Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        rope_theta=1e6,
        tie_word_embeddings=True,
    )
    with no_compilation_cache():
        found = make_plan(
            load_config(file, []), shape, topology("h100:4"), means=Means(), programs=Kept(lambda _: None)
        )
    return found, texts


@pytest.mark.parametrize("place", ["h100:4", "b200:4"])
def test_packed_rows_go_through_cudnn_forward_and_backward(place):
    """Four rows over two devices, four heads over two: each device gives cuDNN its rows' segments and heads; no scores
    [T, T] stand in memory and nothing crosses devices. Numbers need a GPU."""
    mesh = make_mesh(data=1, fsdp=2, tensor=2, devices=topology(place).devices)
    split = jax.NamedSharding(mesh, jax.P("fsdp", None, "tensor"))
    q, k = (jax.ShapeDtypeStruct((4, 512, heads, 128), jnp.bfloat16, sharding=split) for heads in (4, 2))
    segment = jax.ShapeDtypeStruct((4, 512), jnp.int32, sharding=jax.NamedSharding(mesh, jax.P("fsdp")))

    def total(q, k, v, segment):
        return jnp.sum(causal_attention(q, k, v, segment, mesh=mesh).astype(jnp.float32))

    with no_compilation_cache():
        text = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(q, k, k, segment).compile().as_text()
    assert re.search(
        r"f32\[64,2,512\].*custom_call_target=\"__cudnn\$fmhaSoftmax\"", text
    )  # 2 rows x 32 segments, 2 heads
    assert "__cudnn$fmhaSoftmaxBackward" in text
    assert "PADDING_CAUSAL" in text
    assert "512,512]" not in text
    assert Program(text, {"data": 1, "fsdp": 2, "tensor": 2}, {}).moved == []


def test_packed_rows_on_ampere_go_through_blocks():
    mesh = make_mesh(data=1, fsdp=1, tensor=1, devices=topology("a100-80g:1").devices)
    q = jax.ShapeDtypeStruct((1, 128, 2, 128), jnp.bfloat16, sharding=jax.NamedSharding(mesh, jax.P()))
    segment = jax.ShapeDtypeStruct((1, 128), jnp.int32, sharding=jax.NamedSharding(mesh, jax.P()))
    run = functools.partial(causal_attention, mesh=mesh)
    with no_compilation_cache():
        assert "__cudnn$fmha" in jax.jit(run).lower(q, q, q).compile().as_text()
        assert "__cudnn$fmha" not in jax.jit(run).lower(q, q, q, segment).compile().as_text()


@pytest.mark.parametrize(("remat", "forward"), [("none", 1), ("full", 2)])
def test_a_kernel_is_run_again_only_where_all_is(remat, forward):
    """The gradient of a loop over six layers: what cuDNN gave is kept beside the results of products."""
    mesh = make_mesh(data=1, fsdp=1, tensor=1, devices=topology("h100:1").devices)
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
    shape = dataclasses.replace(config_of(6), vocab_size=512, **sizes)
    model = Qwen3(shape, compute_dtype=jnp.bfloat16, mesh=mesh, remat=remat)
    params = abstract_state(model, optax.adamw(1e-6), mesh).params
    tokens = jax.ShapeDtypeStruct((2, 256), jnp.int32, sharding=jax.NamedSharding(mesh, jax.P()))

    def total(params, tokens):
        return jnp.sum(model.hidden(params, tokens).astype(jnp.float32))

    with no_compilation_cache():
        text = jax.jit(jax.grad(total)).lower(params, tokens).compile().as_text()
    assert (text.count('__cudnn$fmhaSoftmax"'), text.count('__cudnn$fmhaSoftmaxBackward"')) == (forward, 1)


def test_the_update_of_packed_rows_uses_cudnn(small):
    text = small[1]["rl: update in 2 micro-batches"]
    assert "__cudnn$fmhaSoftmaxBackward" in text
    assert "256,256]" not in text  # width of a row: no scores


def test_a_plan_of_real_programs(small):
    found, texts = small
    assert set(texts) == {
        "rl: update in 2 micro-batches",
        "rl: view",
        "rl: prefill",
        "rl: decode",
        "reheat: whole step",
    }
    assert found.fits
    assert {part.source for part in found.parts} == {"compiled"}
    assert [loop for part in found.parts for loop in part.uncounted_loops] == []
    update = next(part for part in found.parts if part.name == "update")
    over = {axis for m in update.moved for axis in m.axis.split("+")}
    assert over == {"fsdp", "tensor"}
    assert json.loads(json.dumps([m._asdict() for m in update.moved]))


@pytest.mark.parametrize("place", ["a100-80g:2", "h200:2", "b200:2"])
def test_other_gpus_compile(place):
    """A product and its sum over two devices, for each generation."""
    mesh = make_mesh(data=1, fsdp=1, tensor=2, devices=topology(place).devices)
    rows = jax.NamedSharding(mesh, jax.P(None, "tensor"))
    x = jax.ShapeDtypeStruct((128, 256), jnp.bfloat16, sharding=rows)
    w = jax.ShapeDtypeStruct((256, 128), jnp.bfloat16, sharding=jax.NamedSharding(mesh, jax.P("tensor")))
    whole = jax.NamedSharding(mesh, jax.P())
    product = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32), out_shardings=whole)
    with no_compilation_cache():
        text = product.lower(x, w).compile().as_text()
    moved = Program(text, {"data": 1, "fsdp": 1, "tensor": 2}, {}).moved
    assert [(m.kind, m.axis, m.bytes) for m in moved] == [("all-reduce", "tensor", 128 * 128 * 4)]
