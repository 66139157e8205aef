"""Meshes and sharding rules: the table of a tiny model, and errors that say what to change."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from tsopsd_jax.distributed.sharding import (
    MESH_AXES,
    TRAIN_RULES,
    make_mesh,
    replicated,
    row_multiple,
    row_sharding,
    spec_of,
    tree_shardings,
)
from tsopsd_jax.model import Qwen3, Qwen3Config


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(data=2, fsdp=2, tensor=2)


@pytest.mark.parametrize(
    ("sizes", "want"),
    [
        ({}, (1, 8, 1)),
        ({"tensor": 2}, (1, 4, 2)),
        ({"data": -1, "fsdp": 2}, (4, 2, 1)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
    ],
)
def test_make_mesh_fills_in_what_is_left(sizes, want):
    mesh = make_mesh(**sizes)
    assert mesh.axis_names == MESH_AXES
    assert mesh.devices.shape == want


def test_make_mesh_takes_devices():
    assert make_mesh(devices=jax.devices()[:3]).devices.shape == (1, 3, 1)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"data": -1, "fsdp": -1}, "at most one size may be -1, got data=-1, fsdp=-1"),
        ({"fsdp": 4}, "fsdp=4 x tensor=1 does not fit 8 devices"),
        ({"tensor": 3}, "tensor=3 does not fit 8 devices"),
        ({"data": 0}, "data=0"),
        ({"fsdp": 16}, "fsdp=16"),
    ],
)
def test_make_mesh_refuses_sizes_that_do_not_fit(sizes, words):
    with pytest.raises(ValueError, match=words):
        make_mesh(**sizes)


def test_colliding_axes_are_named_both(mesh):
    with pytest.raises(ValueError, match=r"w: logical axes 'heads' and 'mlp' both lie on mesh axis 'tensor'"):
        spec_of(("heads", "mlp"), (2, 2), mesh, TRAIN_RULES, name="w")
    with pytest.raises(ValueError, match=r"logical axes 'rows' and 'embed' both lie on mesh axis 'fsdp'"):
        spec_of(("rows", "embed"), (4, 4), mesh, TRAIN_RULES, name="x")


def test_a_size_that_does_not_divide_names_axis_and_size(mesh):
    with pytest.raises(ValueError, match=r"w: 'kv_heads' has size 3, which mesh axis 'tensor' of size 2"):
        spec_of(("embed", "kv_heads"), (4, 3), mesh, TRAIN_RULES, name="w")
    with pytest.raises(ValueError, match=r"'rows' has size 6, .* of size 4"):  # data x fsdp = 4 together
        spec_of(("rows",), (6,), mesh, TRAIN_RULES, name="tokens")


def test_unknown_and_missing_axes(mesh):
    with pytest.raises(ValueError, match=r"no sharding rule for logical axis 'wings'; known: .*'embed'"):
        spec_of(("wings",), (4,), mesh, TRAIN_RULES, name="w")
    with pytest.raises(ValueError, match=r"1 logical axes .* for shape \(4, 4\)"):
        spec_of(("embed",), (4, 4), mesh, TRAIN_RULES, name="w")


GOLDEN = {
    "['embed']": P("tensor", "fsdp"),  # V D
    "['head']": P("fsdp", "tensor"),  # D V
    "['final_norm']": P(None),
    "['layers']['attention_norm']": P(None, None),
    "['layers']['mlp_norm']": P(None, None),
    "['layers']['q_norm']": P(None, None),
    "['layers']['k_norm']": P(None, None),
    "['layers']['q']": P(None, "fsdp", "tensor", None),  # layers D N H
    "['layers']['k']": P(None, "fsdp", "tensor", None),
    "['layers']['v']": P(None, "fsdp", "tensor", None),
    "['layers']['o']": P(None, "tensor", None, "fsdp"),  # layers N H D
    "['layers']['gate']": P(None, "fsdp", "tensor"),
    "['layers']['up']": P(None, "fsdp", "tensor"),
    "['layers']['down']": P(None, "tensor", "fsdp"),
}
"""Where each parameter of an untied model lies. A new parameter, or a changed rule, belongs here too."""


def test_the_table_of_a_model(mesh):
    model = Qwen3(
        Qwen3Config(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=6,
        )
    )
    shardings = tree_shardings(model.param_axes(), model.param_shapes(), mesh)
    got = {jax.tree_util.keystr(path): s.spec for path, s in jax.tree_util.tree_leaves_with_path(shardings)}
    assert got == GOLDEN


def test_a_vocabulary_that_tensor_does_not_divide_is_named(mesh, tiny):
    model, _ = tiny  # 37 entries over two devices
    with pytest.raises(ValueError, match=r"\['embed'\]: 'vocab' has size 37"):
        tree_shardings(model.param_axes(), model.param_shapes(), mesh)


def test_rows_lie_on_data_and_fsdp(mesh):
    x = jax.device_put(jnp.zeros((8, 3)), row_sharding(mesh))
    assert {s.data.shape for s in x.addressable_shards} == {(2, 3)}
    assert row_multiple(mesh) == 4
    assert jax.device_put(jnp.zeros(3), replicated(mesh)).is_fully_replicated


def test_the_golden_table_of_the_papers_models():
    from golden_sharding import FILE, table

    assert table() == json.loads(FILE.read_text()), (
        "the layout of a model's arrays changed; if that is meant, run `python tests/golden_sharding.py`, read the "
        "difference of tests/golden/sharding.json, and commit it"
    )


class Chip:
    """What a mesh of TPUs looks at in a device."""

    platform, device_kind, process_index = "tpu", "TPU v5 lite", 0

    def __init__(self, number: int, slice_index: int, coords: tuple[int, int, int]):
        self.id, self.slice_index, self.coords, self.core_on_chip = number, slice_index, coords, 0

    def __repr__(self):
        return f"{self.slice_index}:{self.coords}"


def two_slices() -> list[Any]:
    """Two slices of 2 x 2 chips, in no order."""
    chips = [Chip(4 * s + 2 * y + x, s, (x, y, 0)) for y in range(2) for s in range(2) for x in range(2)]
    return chips[::-1]


def test_only_data_goes_across_slices():
    devices = make_mesh(data=4, fsdp=1, tensor=2, devices=two_slices()).devices
    slices = np.vectorize(lambda chip: chip.slice_index)(devices)
    assert slices.tolist() == [[[0, 0]], [[0, 0]], [[1, 1]], [[1, 1]]]
    for pair in devices.reshape(4, 2):  # neighbours on the torus
        assert sum(a != b for a, b in zip(pair[0].coords, pair[1].coords, strict=True)) == 1
    with pytest.raises(ValueError, match=r"data=1 does not go over 2 slices.*choose a multiple of 2"):
        make_mesh(fsdp=8, devices=two_slices())


@pytest.mark.parametrize(("tensor", "words"), [(16, "'kv_heads' has size 8"), (3, "'vocab' has size 151936")])
def test_qwen3_8b_on_a_tensor_axis_that_does_not_divide(tensor, words):
    shape = Qwen3Config(
        vocab_size=151_936,
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    )
    model = Qwen3(shape)
    mesh = AbstractMesh((1, 2, tensor), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    with pytest.raises(
        ValueError, match=rf"{words}, which mesh axis 'tensor' of size {tensor} does not divide; choose"
    ):
        tree_shardings(model.param_axes(), model.param_shapes(), mesh)
