"""Mesh and logical axes: which dimension of which array lies on which devices.

Every parameter dimension has a logical name (`embed`, `heads`, ...). A rules table maps names to mesh axes; changing
the layout means changing the table, nothing else.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tsopsd_jax.types import PyTree

MESH_AXES = ("data", "fsdp", "tensor")
"""`data`: replicas, across slices too. `fsdp`: batch rows and parameter shards. `tensor`: heads, feed-forward,
vocabulary."""

ROW_AXES = ("data", "fsdp")
"""The mesh axes over which rows are divided."""

AnyMesh = Mesh | AbstractMesh
"""A mesh of devices, or of sizes only: shardings follow from sizes."""

Rules = Mapping[str, str | tuple[str, ...] | None]

TRAIN_RULES: Rules = {
    "rows": ROW_AXES,
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "norm": None,
}

DECODE_RULES: Rules = TRAIN_RULES | {"embed": None, "parts": None}
"""Rules of the rollout view: what training shards over `fsdp` lies whole on each device,
so that no token has to gather it."""


def make_mesh(*, data: int = 1, fsdp: int = -1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh with the axes (data, fsdp, tensor); one size may be -1: all devices that are left.

    On TPUs the axes follow the torus; across slices, which the data-center network joins, goes `data` alone.

    Raises:
        ValueError: if the sizes do not multiply to the number of devices, or `data` to that of the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(len(devices), data=data, fsdp=fsdp, tensor=tensor)
    return Mesh(_arrange(list(devices), sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def mesh_sizes(devices: int, *, data: int, fsdp: int, tensor: int) -> tuple[int, int, int]:
    """The sizes (data, fsdp, tensor) of a mesh of so many devices; one may be asked for as -1.

    Raises:
        ValueError: if they do not multiply to the number of devices.
    """
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) > 1:
        raise ValueError(f"mesh: at most one size may be -1, got data={data}, fsdp={fsdp}, tensor={tensor}")
    known = math.prod(s for s in sizes if s != -1)
    if known <= 0 or devices % known or (-1 not in sizes and known != devices):
        raise ValueError(
            f"mesh: data={data} x fsdp={fsdp} x tensor={tensor} does not fit {devices} devices; "
            f"the product must be {devices} (one size may be -1)"
        )
    data, fsdp, tensor = (devices // known if s == -1 else s for s in sizes)
    return data, fsdp, tensor


def slice_of(device: Any) -> int:
    """The number of a TPU's slice; 0 where there is but one."""
    return device.slice_index if hasattr(device, "slice_index") else 0


def _arrange(devices: list[Any], sizes: tuple[int, ...]) -> np.ndarray:
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(sizes)
    slices = len({slice_of(device) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    data, *rest = sizes
    if data % slices:
        raise ValueError(
            f"mesh: data={data} does not go over {slices} slices, which only `data` may join; "
            f"choose a multiple of {slices}"
        )
    within, across = (data // slices, *rest), (slices, 1, 1)
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)


def spec_of(axes: tuple[str, ...], shape: tuple[int, ...], mesh: AnyMesh, rules: Rules, *, name: str) -> P:
    """The PartitionSpec of one array.

    Raises:
        ValueError: two dimensions on one mesh axis, a dimension that the mesh axis does not divide, an unknown name.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{name}: {len(axes)} logical axes {axes} for shape {shape}")
    used: dict[str, str] = {}
    entries = []
    for axis, size in zip(axes, shape, strict=True):
        if axis not in rules:
            raise ValueError(f"{name}: no sharding rule for logical axis {axis!r}; known: {sorted(rules)}")
        target = rules[axis]
        for mesh_axis in (target,) if isinstance(target, str) else target or ():
            if mesh_axis in used:
                raise ValueError(
                    f"{name}: logical axes {used[mesh_axis]!r} and {axis!r} both lie on mesh axis {mesh_axis!r}; "
                    "give one of them another rule"
                )
            used[mesh_axis] = axis
        parts = math.prod(mesh.shape[a] for a in ((target,) if isinstance(target, str) else target or ()))
        if size % parts:
            raise ValueError(
                f"{name}: {axis!r} has size {size}, which mesh axis {target!r} of size {parts} does not divide; "
                "choose a size that divides it"
            )
        entries.append(target)
    return P(*entries)


def tree_shardings(axes: PyTree, shapes: PyTree, mesh: AnyMesh, rules: Rules = TRAIN_RULES) -> PyTree:
    """NamedShardings for a tree of arrays; `axes` mirrors it with tuples of logical names at the leaves."""

    def one(path, leaf, names):
        spec = spec_of(names, leaf.shape, mesh, rules, name=jax.tree_util.keystr(path))
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, shapes, axes)


def row_sharding(mesh: AnyMesh) -> NamedSharding:
    """For arrays whose first dimension is rows, such as every field of a Batch."""
    return NamedSharding(mesh, P(TRAIN_RULES["rows"]))


def replicated(mesh: AnyMesh) -> NamedSharding:
    """Sharding of an array that stands whole on every device."""
    return NamedSharding(mesh, P())


def put(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """Host arrays that every process holds, as global arrays; each process copies what its own devices need."""

    def one(x):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree)


def row_multiple(mesh: AnyMesh) -> int:
    """Rows of a batch must be a multiple of this."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
