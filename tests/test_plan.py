"""Plans: what a program's text says it moves, work and times by hand, errors, and one plan of real programs."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from tsopsd_jax.cli import main
from tsopsd_jax.commands.exit_codes import BAD_INPUT, DONE
from tsopsd_jax.config import load_config
from tsopsd_jax.distributed.sharding import MESH_AXES
from tsopsd_jax.hardware.chips import GPUS, TPUS
from tsopsd_jax.hardware.work import (
    Lengths,
    Split,
    UpdateShape,
    Work,
    attention_flops,
    cache_bytes_per_token,
    decode_work,
    layer_weights,
    prefill_work,
    reference_work,
    update_work,
    view_work,
)
from tsopsd_jax.model import Qwen3, Qwen3Config
from tsopsd_jax.model.hf_config import read_config
from tsopsd_jax.plan import topologies
from tsopsd_jax.plan.case import Part
from tsopsd_jax.plan.collectives import Moved, Program
from tsopsd_jax.plan.compiled import Compiled, CompiledPrograms, _measured
from tsopsd_jax.plan.planner import Means, make_plan, search
from tsopsd_jax.plan.report import as_json, as_text
from tsopsd_jax.plan.roofline import Seconds, Shares, axis_rate, seconds
from tsopsd_jax.plan.topologies import Topology

ROOT = Path(__file__).resolve().parents[1]
MESH = {"data": 1, "fsdp": 4, "tensor": 2}

TEXT = """\
HloModule jit_update, is_scheduled=true

%gathered.1 (p.1: bf16[2,8]) -> (bf16[2,8], bf16[8,8], u32[]) {
  %p.1 = bf16[2,8]{1,0} parameter(0)
  %all-gather.9 = bf16[8,8]{0,1:T(8,128)(2,1)} all-gather(%p.1), channel_id=20, replica_groups=[2,4]<=[4,2]T(1,0), \
frontend_attributes={chain_id="6"}
  ROOT %c.1 = (bf16[2,8]{1,0}, bf16[8,8]{1,0}, u32[]) custom-call(%all-gather.9)
}

%layer (p.2: (u32[], bf16[1,64])) -> (u32[], bf16[1,64]) {
  %p.2 = (u32[], bf16[1,64]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p.2), index=0
  %x = bf16[1,64]{1,0} get-tuple-element(%p.2), index=1
  %two..sunk3 = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%i, %two..sunk3)
  %all-gather.1 = bf16[4,64]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %part = (bf16[2,8]{1,0}, bf16[8,8]{1,0}, u32[]) fusion(%x), kind=kOutput, calls=%gathered.1
  ROOT %t.2 = (u32[], bf16[1,64]{1,0}) tuple(%next, %x)
}

%layers_left (p.3: (u32[], bf16[1,64])) -> pred[] {
  %limit = u32[]{:T(128)} constant(6)
  %p.3 = (u32[], bf16[1,64]{1,0}) parameter(0)
  %at = u32[]{:T(128)} get-tuple-element(%p.3), index=0
  ROOT %lt = pred[]{:T(512)} compare(%at, %limit), direction=LT
}

%other (p.8: (s32[], s32[], bf16[1,64])) -> (s32[], s32[], bf16[1,64]) {
  %p.8 = (s32[], s32[], bf16[1,64]{1,0}) parameter(0)
  %all-gather.8 = bf16[4,64]{1,0} all-gather(%p.8), channel_id=8, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  ROOT %t.8 = (s32[], s32[], bf16[1,64]{1,0}) tuple(%p.8, %p.8, %p.8)
}

%all-reduce-scatter.1 (p.4: f32[20]) -> f32[5] {
  %p.4 = f32[20]{0} parameter(0)
  %all-reduce.4 = f32[20]{0} all-reduce(%p.4), channel_id=1, replica_groups=mesh['a'=4,'b'=2] {'a'}, to_apply=%add
  ROOT %slice = f32[5]{0} dynamic-slice(%all-reduce.4), dynamic_slice_sizes={5}
}

%piece (p.5: (s32[], s32[], bf16[1,64])) -> (s32[], s32[], bf16[1,64]) {
  %p.5 = (s32[], s32[], bf16[1,64]{1,0}) parameter(0)
  %fusion.5 = f32[5]{0} fusion(%p.5), kind=kCustom, calls=%all-reduce-scatter.1
  %start = (bf16[2,8]{1,0}, bf16[8,8]{1,0}, u32[]) fusion(%p.5), kind=kCustom, calls=%gathered.1
  %while.1 = (u32[], bf16[1,64]{1,0}) while(%p.5), condition=%layers_left, body=%layer, \
metadata={op_name="jit(update)/micro_batches/while/body/while"}
  ROOT %t.5 = (s32[], s32[], bf16[1,64]{1,0}) tuple(%p.5, %p.5, %p.5)
}

%pieces_left (p.6: (s32[], s32[], bf16[1,64])) -> pred[] {
  %p.6 = (s32[], s32[], bf16[1,64]{1,0}) parameter(0)
  %a = s32[] get-tuple-element(%p.6), index=0
  %b = s32[] get-tuple-element(%p.6), index=1
  ROOT %lt.6 = pred[] compare(%a, %b), direction=LT
}

ENTRY %main.1_spmd (p.7: f32[3]) -> f32[3] {
  %p.7 = f32[3]{0} parameter(0)
  %all-reduce.1 = f32[3]{0} all-reduce(%p.7), channel_id=3, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  %all-reduce.2 = (f32[], s32[]) all-reduce(%p.7, %p.7), channel_id=1, \
replica_groups=mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'x','y'}, to_apply=%add
  %start.2 = (f32[3]{0}, f32[3]{0}, u32[], u32[]) collective-permute-start(%p.7), channel_id=4, \
source_target_pairs={{0,2},{2,4},{4,6},{6,0},{1,3},{3,5},{5,7},{7,1}}
  %done.2 = f32[3]{0} collective-permute-done(%start.2)
  %while.2 = (s32[], s32[], bf16[1,64]{1,0}) while(%p.7), condition=%pieces_left, body=%piece, \
metadata={op_name="jit(update)/micro_batches/while"}
  ROOT %while.3 = (s32[], s32[], bf16[1,64]{1,0}) while(%p.7), condition=%pieces_left, body=%other, \
metadata={op_name="jit(update)/elsewhere/while"}
}
"""  # noqa: E501


def test_collectives_are_counted_by_kind_axis_and_loop():
    """Loops: 5 micro-batches, in each 6 / 2 = 3 rounds of layers; the last loop's count is not known, and it runs once.

    all-gather over fsdp (4 devices): [4, 64] bfloat16 = 512 bytes, 3/4 of them sent, 5 x 3 + 1 times: 16 x 384; and the
    asynchronous one of [8, 8], 128 bytes, that starts in the micro-batch and is carried by its layers: 5 x 96.
    reduce-scatter over fsdp: of 80 bytes, 3/4, 5 times. all-reduce over tensor: 2 x 12 x 1/2; over both axes: two
    scalars, 8 bytes, 2 x 7/8. A permute: 12 bytes.
    """
    program = Program(TEXT, MESH, {"micro_batches": 5})
    assert program.moved == [
        Moved("all-gather", "fsdp", 16 * 384 + 5 * 96, 21, largest=256),
        Moved("all-reduce", "fsdp+tensor", 14, 1, largest=2),
        Moved("all-reduce", "tensor", 12, 1, largest=3),
        Moved("collective-permute", "fsdp", 12, 1, largest=3),
        Moved("reduce-scatter", "fsdp", 5 * 60, 5, largest=20),
    ]
    assert program.unknown == ["jit(update)/elsewhere/while"]
    for scope in ("micro_batches", "jvp(micro_batches)", "transpose(jvp(micro_batches))"):
        assert Program(TEXT.replace("elsewhere", scope), MESH, {"micro_batches": 5}).unknown == []


def test_a_program_of_one_device_moves_nothing():
    text = TEXT.replace("[2,4]<=[4,2]T(1,0)", "[1,1]<=[1]").replace("mesh['a'=4,'b'=2] {'a'}", "{{0}}")
    text = text.replace("mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'x','y'}", "{}").replace(
        "{{0,1},{2,3},{4,5},{6,7}}", "[1,1]<=[1]"
    )
    text = text.replace("{{0,2},{2,4},{4,6},{6,0},{1,3},{3,5},{5,7},{7,1}}", "{{0,0}}")
    assert Program(text, {"data": 1, "fsdp": 1, "tensor": 1}, {}).moved == []


def test_an_unknown_form_of_groups_is_refused():
    with pytest.raises(ValueError, match="replica groups of a form that is not known: 'ring"):
        Program(TEXT.replace("[2,4]<=[4,2]T(1,0)", "ring(4)"), MESH, {})


# ------------------------------------------------------------------ work by hand

C = Qwen3Config(
    vocab_size=10,
    hidden_size=4,
    intermediate_size=6,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=2,
)
ONE = Split(1, 1, 1)


def test_weights_of_a_layer():
    # q, o: 4 x 4 each; k, v: 4 x 2 each; gate, up, down: 4 x 6 each.
    assert layer_weights(C) == 2 * 16 + 2 * 8 + 3 * 24 == 120
    assert cache_bytes_per_token(C, 2) == 2 * 2 * 1 * 2 * 2  # keys and values, layers, heads, head_dim, bytes


def test_attention_counts_each_pair_once():
    # 3 positions see 1 + 2 + 3 = 6 keys; scores and values 2 x 2 operations for each of N H = 4: 96 a layer.
    assert attention_flops(C, 3) == 2 * 96


@pytest.mark.parametrize(("remat", "products", "attention"), [("none", 3, 3.5), ("dots", 3, 4.5), ("full", 4, 4.5)])
def test_flops_of_an_update(remat, products, attention):
    """2 sequences of 3 positions, 1 of them a response: 6 positions x 2 layers x 120 weights x 2 operations = 2,880 a
    pass; attention 2 x 192; head 2 x 2 tokens x 4 x 10 = 160 a product."""
    u = UpdateShape(2, 3, 1, 3, 1, 2, 8, remat, tokenwise=True)
    assert update_work(C, ONE, u).flops == 2880 * products + 2 * 192 * attention + 3 * 160
    assert update_work(C, ONE, u._replace(tokenwise=False)).flops - update_work(C, ONE, u).flops == 160


def test_flops_of_a_reference():
    """One forward pass of `test_flops_of_an_update`'s: 2,880 for the layers, 2 x 192 for attention, 160 for the
    head."""
    u = UpdateShape(2, 3, 1, 3, 1, 2, 8, "none", tokenwise=True)
    assert reference_work(C, ONE, u).flops == 2880 + 2 * 192 + 160
    # Bytes: 240 weights x 4; activations of 6 positions x 2 layers x (16 + 2 x 8 + 18) x 2; logits 2 x 10 x 8; a tile's
    # 40 x 2.
    assert reference_work(C, ONE, u).hbm_bytes == 960 + 6 * 2 * 50 * 2 + 160 + 80


def test_work_of_sampling():
    # 5 responses of 4 tokens, prompts of 3: context 3 + 4 / 2 = 5. Weights 2 x 120 + 40; attention 4 x 2 layers x 4 x
    # 5.
    lengths = Lengths(prompt=3, response=4)
    found = decode_work(C, Split(1, 2, 1), rows=5, slots=2, steps=10, lengths=lengths, itemsize=2)
    assert found.flops == 20 * (2 * 280 + 160)
    assert found.hbm_bytes == 10 * (280 * 2 + 2 * 5 * 16 / 2)  # all weights; a slot's cache on each device
    # 2 calls of 1 prompt, 3 positions: 6 x 2 x 240 + 2 x 192; weights of the layers twice, a cache of 6 x 16 bytes.
    assert prefill_work(C, ONE, calls=2, rows=1, width=3, itemsize=2) == Work(2880 + 384, 2 * 480 + 96)
    # 240 + 2 x 40 weights (untied), float32 read over 2 devices, bfloat16 written on each.
    assert view_work(C, Split(1, 2, 1), 2) == Work(0.0, 4 * 320 / 2 + 2 * 320)


def test_tiles_are_of_the_response_tokens_of_a_device():
    u = UpdateShape(8, 3, 100, 200, micro_batches=2, rows=4, tile_tokens=64, remat="full", tokenwise=True)
    assert u.tiles(Split(1, 2, 4)) == 4  # 8 x 100 / (2 x 2) = 200 tokens


# -------------------------------------------------------------------------- time


def test_the_roofline_of_a_part():
    chip = dataclasses.replace(TPUS["v5e"], flops=100.0, hbm_rate=10.0, link_rate=5.0, network_rate=1.0)
    coords = np.empty((2, 2, 2), object)
    for i, j, k in np.ndindex(2, 2, 2):  # fsdp spans two dimensions of the torus, data goes over slices
        coords[i, j, k] = SimpleNamespace(slice_index=i, coords=(j, k, j))
    mesh = SimpleNamespace(devices=coords, shape={"data": 2, "fsdp": 2, "tensor": 2})
    place = Topology("v5e:2x2*2", chip, "tpu", tuple(coords.reshape(-1)), 8)
    assert axis_rate("fsdp", place, mesh) == 10.0
    assert axis_rate("tensor", place, mesh) == 5.0
    assert axis_rate("fsdp+tensor", place, mesh) == 15.0
    assert axis_rate("data", place, mesh) == 1.0
    moved = (Moved("all-gather", "fsdp", 40.0, 1), Moved("all-reduce", "data", 3.0, 1))
    part = Part("update", ("rl",), {"parameters": 1}, Work(1600.0, 50.0), moved, "compiled")
    found = seconds(part, place, mesh)
    assert tuple(found) == (2.0, 5.0, 7.0)  # 1600 / 8 / 100; 50 / 10; 40 / 10 + 3 / 1
    assert (found.total, found.limit) == (7.0, "links")


def test_an_estimate_reaches_shares_of_the_peaks():
    # 2 s of arithmetic at half the peak are 4 s, 5 s of memory at a quarter 20 s, 7 s of links at all of it 7 s.
    found = Seconds(2.0, 5.0, 7.0).at(Shares(0.5, 0.25, 1.0))
    assert tuple(found) == (4.0, 20.0, 7.0)
    assert (found.total, found.limit) == (20.0, "memory")


def test_gpus_of_a_host_are_near():
    place = Topology("h100:16", GPUS["h100"], "gpu", None, 16)
    mesh = AbstractMesh((2, 4, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    assert axis_rate("fsdp+tensor", place, mesh) == GPUS["h100"].link_rate
    assert axis_rate("data", place, mesh) == GPUS["h100"].network_rate


def test_memory_beside_a_program_counts():
    """A program of 100 bytes holds the view (30) and the cache (20): 50 are its own; parameters lie beside it."""
    part = Part(
        "decode", ("rl",), {"parameters": 7, "rollout view": 30, "cache": 20, "temporaries": 1}, Work(1, 1), (), "x"
    )
    case = SimpleNamespace(mesh=SimpleNamespace(shape=MESH))
    found = _measured(part, case, Compiled(100, TEXT), inside=("rollout view", "cache"), times=2.5)  # pyright: ignore
    assert (found.bytes["temporaries"], found.peak, found.source) == (50, 107, "compiled")
    (summed,) = [m for m in found.moved if (m.kind, m.axis) == ("all-reduce", "tensor")]
    assert (summed.bytes, summed.count) == (30, 2.5)
    refused = _measured(part, case, Compiled(100, None), inside=("rollout view", "cache"))  # pyright: ignore
    assert (refused.peak, refused.source, refused.moved) == (107, "refused", ())


# ------------------------------------------------------------------------ plans

SMALL = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}

CONFIG = """
model: {path: nowhere/small, compute_dtype: bfloat16, remat: full}
mesh: {fsdp: 2, tensor: 2}
data: {name: countdown, verifier: countdown, max_prompt_tokens: 60}
phases:
  - &rl
    name: rl
    objective: {name: dapo}
    optimizer: {learning_rate: 1.0e-6}
    stop: {steps: 1}
    prompts_per_step: 4
    responses_per_prompt: 4
    max_response_tokens: 140
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
  - <<: *rl
    name: rl-again
"""


@pytest.fixture(autouse=True)
def no_gpu_compiler(monkeypatch):
    """GPUs by formula, as where the extra `cuda` is not installed; what their compiler says: test_gpu_programs.py."""
    find = topologies.importlib.util.find_spec
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None if "cuda" in name else find(name))


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    """A configuration in a tree like the repository's: the model's directory is absent, its shape is beside it."""
    folder = tmp_path_factory.mktemp("tree")
    (folder / "models" / "small").mkdir(parents=True)
    (folder / "models" / "small" / "config.json").write_text(json.dumps(SMALL))
    (folder / "paper").mkdir()
    (folder / "paper" / "small.yaml").write_text(CONFIG)
    return folder / "paper" / "small.yaml"


def plan(capsys, *args) -> tuple[int, str, str]:
    code = main(["plan", *map(str, args)])
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.mark.parametrize(
    ("topology", "words"),
    [
        ("v9:2x2", r"got 'v9:2x2', expected one of TPUs v4:.*v5e:2x2 \.\.\. v5e:16x16.*GPUs .*h100:N"),
        ("h100", "got 'h100', expected one of"),
        ("h100:2x4", "expected h100:N, N the number of GPUs, such as h100:8"),
        ("h100:7", "mesh: data=1 x fsdp=2 x tensor=2 does not fit 7 devices"),
        ("h100:64", "does not fit 64 devices"),
    ],
)
def test_bad_topologies_say_what_is_known(capsys, config_file, topology, words):
    code, out, err = plan(capsys, config_file, "--topology", topology)
    assert (code, out) == (BAD_INPUT, "")
    assert len(err.strip().splitlines()) <= 2  # where the shape comes from, and the error
    with pytest.raises(ValueError, match=words):
        raise ValueError(err)


def test_without_the_compiler_the_extra_is_named(capsys, config_file, monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda _: None)
    code, _, err = plan(capsys, config_file, "--topology", "v5e:2x2")
    assert code == BAD_INPUT
    assert 'pip install -e ".[tpu]"' in err


def test_sizes_that_do_not_divide_are_named(capsys, config_file):
    def refused(topology, *sets):
        return plan(capsys, config_file, "--topology", topology, *(f"--set={x}" for x in sets))[2]

    assert "'kv_heads' has size 2, which mesh axis 'tensor' of size 4" in refused(
        "h100:4", "mesh.fsdp=1", "mesh.tensor=4"
    )
    assert "phase 'rl': 16 rows of a step do not split over 12 devices" in refused(
        "h100:12", "mesh.fsdp=12", "mesh.tensor=1"
    )
    assert "expected at least 1, got 0" in plan(capsys, config_file, "--topology", "h100:4", "--mean-tokens=0")[2]


def test_a_model_without_a_shape_is_an_error(capsys, config_file):
    code, _, err = plan(capsys, config_file, "--topology", "h100:4", "--set=model.path=nowhere/else")
    assert code == BAD_INPUT
    assert "config.json in nowhere/else, or in configs/models/else" in err


def test_gpus_are_planned_by_formula(capsys, config_file):
    code, out, err = plan(capsys, config_file, "--topology", "h100:4", "--json", "--mean-tokens", "200")
    assert code == DONE
    assert "its shape is taken from" in err
    found = json.loads(out)
    assert found["fits"] is True
    assert found["hbm_bytes_per_device"] == 80_000_000_000
    parts = {(part["name"], *part["phases"]): part for part in found["parts"]}
    # rl and rl-again compute the same; the reheater's step with a slot for each row is one program.
    assert set(parts) == {
        *((name, "rl", "rl-again") for name in ("view", "prefill", "decode", "update")),
        ("reheat_step", "reheat"),
    }
    assert found["peak_bytes_per_device"] == max(part["peak_bytes"] for part in found["parts"])
    assert {part["source"] for part in found["parts"]} == {"formula"}
    model = Qwen3(read_config(config_file.parent.parent / "models" / "small" / "config.json"))
    whole = sum(x.size for x in jax.tree.leaves(model.param_shapes()))
    norms = sum(x.size for x in jax.tree.leaves(model.param_shapes()) if x.ndim <= 2 and x.shape[-1] == 128) - 512 * 128
    update = parts["update", "rl", "rl-again"]
    # Four bytes a parameter, a quarter of the matrices and all norms on each device; two moments and their step
    # counters.
    assert update["bytes"]["parameters"] == whole - norms + 4 * norms
    assert update["bytes"]["optimizer"] - 2 * update["bytes"]["parameters"] in range(4, 17)
    # A checkpoint: each parameter and its two moments once, and AdamW's counters, on one host of four GPUs.
    assert found["host_bytes"] - 12 * whole in range(4, 17)
    # 4 slots of a device have each 64 places of the prompt's rest, 64 of a segment, and 139 // 64 pages of 64; keys and
    # values of one layer, 2 heads of 128 numbers over 2 devices, 2 bytes each.
    cache = parts["decode", "rl", "rl-again"]["bytes"]["cache"]
    assert cache == 4 * (64 + 64 + 64 * 2) * 2 * 2 * 128 // 2 * 2
    assert found["step_seconds"]["rl"] == pytest.approx(
        sum(part["seconds"]["total"] for part in found["parts"] if "rl" in part["phases"])
    )
    # A step of each of three phases on four devices; an estimate is at most 1 / 0.4 of the bound, at least 1 / 0.7.
    run = found["run"]
    assert run["steps"] == {"rl": 1, "reheat": 1, "rl-again": 1}
    assert run["hours_at_least"] == pytest.approx(sum(found["step_seconds"].values()) / 3600)
    assert run["device_hours_at_least"] == pytest.approx(4 * run["hours_at_least"])
    assert 1 / 0.7 <= run["hours_estimated"] / run["hours_at_least"] <= 1 / 0.4
    assert any("pip install -e" in line for line in found["assumptions"])


def test_a_run_without_a_number_of_steps_has_no_total(capsys, config_file):
    sets = "--set=phases.1.stop={recovered_above_nats: 0.1}"
    _, out, _ = plan(capsys, config_file, "--topology", "h100:4", "--json", sets)
    assert json.loads(out)["run"]["hours_at_least"] is None
    _, out, _ = plan(capsys, config_file, "--topology", "h100:4", sets)
    assert "the whole run: unknown, a phase names no stop.steps" in out


@pytest.mark.parametrize("shares", ["0.4,0.6", "0.4,0.6,1.1", "0,0.5,0.5"])
def test_shares_of_the_peaks_lie_between_0_and_1(capsys, config_file, shares):
    with pytest.raises(SystemExit):
        main(["plan", str(config_file), "--topology", "h100:4", "--shares", shares])
    assert "expected three shares in (0, 1]" in capsys.readouterr().err


def test_what_does_not_fit_is_said_with_a_remedy(capsys, config_file):
    sets = ["--set=model.path=configs/models/Qwen3-8B-Base", "--set=mesh.fsdp=1"]
    if not (ROOT / "configs" / "models").is_dir():
        pytest.skip("the repository's configs/ are not here")
    code, out, _ = plan(capsys, config_file, "--topology", "a100-40g:2", *sets)
    assert code == DONE  # planned, whether or not it fits
    assert "DOES NOT FIT" in out
    assert "to make it fit:" in out
    assert "more devices in mesh.fsdp" in out


def test_several_updates_of_a_rollout_are_planned(capsys, config_file):
    """Two updates of half the rows, and two passes of that, against one update: the same arithmetic a pass, AdamW each
    time, and less memory. A reheater of two updates is no single program."""

    def parts(*sets) -> dict[tuple[str, str], dict[str, Any]]:
        code, out, _ = plan(capsys, config_file, "--topology", "h100:4", "--json", *(f"--set={x}" for x in sets))
        assert code == DONE
        return {(phase, part["name"]): part for part in json.loads(out)["parts"] for phase in part["phases"]}

    one = parts()["rl", "update"]
    two = parts("phases.rl.updates_per_rollout=2")["rl", "update"]
    twice = parts("phases.rl.updates_per_rollout=2", "phases.rl.passes_per_rollout=2")["rl", "update"]
    assert [x["updates"] for x in (one, two, twice)] == [1, 2, 4]
    assert two["flops"] == pytest.approx(one["flops"])
    assert two["hbm_bytes_moved"] > one["hbm_bytes_moved"]
    assert two["peak_bytes"] < one["peak_bytes"]
    for kind in ("flops", "hbm_bytes_moved"):
        assert twice[kind] == pytest.approx(2 * two[kind])
    moved = [sum(m["bytes"] for m in x["collectives"]) for x in (two, twice)]
    assert moved[1] == pytest.approx(2 * moved[0])
    assert ("reheat", "reheat_step") in parts()
    assert ("reheat", "update") in parts("phases.reheat.updates_per_rollout=2")


@pytest.fixture(scope="module")
def compiled(config_file):
    """(plan, texts of the programs by name) of the small run on four chips that exist for the compiler only."""
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed (extra `tpu`)")
    config = load_config(config_file, [])
    shape = read_config(config_file.parent.parent / "models" / "small" / "config.json")
    texts = {}

    class Kept(CompiledPrograms):
        def compile(self, name, lowered):
            found = super().compile(name, lowered)
            texts[name] = found.text
            return found

    from tsopsd_jax.commands.plan import no_compilation_cache

    try:
        place = topologies.topology("v5e:2x2")
    except ValueError as error:  # another process may hold the library
        pytest.skip(f"the TPU compiler cannot be used here: {error}")
    with no_compilation_cache():
        return make_plan(config, shape, place, means=Means(), programs=Kept(lambda _: None)), texts


def test_a_plan_of_real_programs(compiled):
    found, texts = compiled
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
    by_name = {part.name: part for part in found.parts}
    update = by_name["update"]
    assert update.micro_batches == 2
    moved = {(m.kind, m.axis): m for m in update.moved}
    assert {axis for _, axis in moved} <= {"fsdp", "tensor", "fsdp+tensor"}
    # At least: each layer's weights gathered over fsdp for the forward pass, for the one again and for the backward one
    # of two micro-batches, or their gradients scattered, by whatever means.
    layer = layer_weights(found_config()) / 2 * 2 / 2  # over tensor; bfloat16; half of it comes from the other device
    over_fsdp = sum(m.bytes for (kind, axis), m in moved.items() if axis == "fsdp")
    assert 2 * 3 * layer < over_fsdp < 2 * 12 * layer
    report = as_json(found)
    assert report["peak_bytes_per_device"] == max(part["peak_bytes"] for part in report["parts"])
    assert json.loads(json.dumps(report)) == report
    assert "v5e:2x2: 4 devices, mesh data 1 x fsdp 2 x tensor 2: fits" in as_text(found)


def found_config() -> Qwen3Config:
    sizes = {key: value for key, value in SMALL.items() if key in {f.name for f in dataclasses.fields(Qwen3Config)}}
    return Qwen3Config(**sizes)


def test_a_decoding_step_gathers_no_weights(compiled):
    """What crosses chips while a token is decoded: activations and what the draw compares, each far smaller than the
    smallest matrix of a layer; the weights were gathered once, in the view."""
    found, texts = compiled
    segment = Program(texts["rl: decode"], dict(found.split._asdict()), {"decoding_steps": 1})
    smallest = 128 * 4 * 128 // 2
    assert {axis for m in segment.moved for axis in m.axis.split("+")} <= {"fsdp", "tensor"}
    assert max(m.largest for m in segment.moved) < smallest / 4, segment.moved
    view = Program(texts["rl: view"], dict(found.split._asdict()), {})
    assert max(m.largest for m in view.moved) >= smallest


def test_the_formula_is_near_the_compiler(compiled, config_file):
    """Where nothing is compiled, parameters, optimizer, view and cache are exact, and the traffic of sampling of the
    right size."""
    found, _ = compiled
    config = load_config(config_file, [])
    rough = make_plan(config, found_config(), found.topology, means=Means(), programs=None)
    for guess, true in zip(rough.parts, found.parts, strict=True):
        assert (guess.name, guess.work) == (true.name, true.work)
        kinds = set(guess.bytes) - {"temporaries"}
        assert {k: guess.bytes[k] for k in kinds} == {k: true.bytes[k] for k in kinds}


def test_a_reference_is_held_and_computed(config_file, tmp_path):
    """A copy in bfloat16 of the float32 parameters, and one forward pass more; another model's are its own."""
    frozen = ["phases.1.objective.hyperparameters={teacher: frozen}", "phases.1.reference"]
    (tmp_path / "config.json").write_text(json.dumps(SMALL | {"intermediate_size": 64}))
    place, steps = topologies.topology("h100:4"), []
    for overrides in ([], [frozen[0], f"{frozen[1]}=start"], [frozen[0], f"{frozen[1]}={tmp_path}"]):
        config = load_config(config_file, overrides)
        plan = make_plan(config, found_config(), place, means=Means(), programs=None)
        steps.append(next(part for part in plan.parts if part.name == "reheat_step"))
    plain, start, other = steps
    assert "reference" not in plain.bytes
    assert start.bytes["reference"] == plain.bytes["parameters"] // 2
    assert other.bytes["reference"] < start.bytes["reference"]
    assert 0 < other.work.flops - plain.work.flops < start.work.flops - plain.work.flops < plain.work.flops / 3
    assert start.peak > other.peak > plain.peak


def test_search_ranks_what_fits_first(config_file):
    config = load_config(config_file, [])
    place = topologies.topology("h100:4")
    plans = search(config, found_config(), place, means=Means(), programs=CompiledPrograms(lambda _: None))
    assert {tuple(p.split) for p in plans} == {
        (4, 1, 1),
        (2, 2, 1),
        (1, 4, 1),
        (2, 1, 2),
        (1, 2, 2),
    }  # two key-value heads
    times = [sum(p.step_seconds.values()) for p in plans]
    assert times == sorted(times)
    # Twice the slots read the weights half as often: where memory allows, all 16 rows of a step are decoded at once.
    assert {p.slots["rl"] for p in plans} == {16}
    slow = make_plan(config, found_config(), place, means=Means(), programs=None)
    assert slow.slots == {"rl": 8, "reheat": 4, "rl-again": 8}
    assert next(p for p in plans if p.split == slow.split).step_seconds["rl"] < slow.step_seconds["rl"]
    tight = dataclasses.replace(place, chip=dataclasses.replace(place.chip, hbm_bytes=plans[0].peak))
    ranked = search(config, found_config(), tight, means=Means(), programs=CompiledPrograms(lambda _: None))
    assert [p.fits for p in ranked] == sorted((p.fits for p in ranked), reverse=True)
    assert tuple(ranked[-1].split) in {tuple(p.split) for p in plans if p.peak > plans[0].peak * 0.97}
