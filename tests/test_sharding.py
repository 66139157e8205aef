"""Meshes and sharding rules: the table of a tiny model, and errors that say what to change."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from tsopsd_jax.model import Qwen3, Qwen3Config
from tsopsd_jax.sharding import (
    MESH_AXES,
    TRAIN_RULES,
    make_mesh,
    replicated,
    row_multiple,
    row_sharding,
    spec_of,
    tree_shardings,
)


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
