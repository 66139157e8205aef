"""The least time that a part can take: the slowest of arithmetic, memory and links, each at the maker's peak."""

from typing import Any, NamedTuple

import numpy as np

from tsopsd_jax.distributed.sharding import MESH_AXES, slice_of
from tsopsd_jax.hardware.chips import GPUS_PER_HOST, Chip
from tsopsd_jax.plan.case import Part
from tsopsd_jax.plan.topologies import Topology


class Shares(NamedTuple):
    """Shares of the peaks that an estimate assumes.

    The defaults are of the size that others published for such work: 36 to 45 % of the arithmetic in updates (prime-rl
    on H200, MaxText on v6e), 55 to 71 % of the memory's rate in decoding (Qwen3-4B in JAX on an L40S). Links: an
    assumption.
    """

    compute: float = 0.4
    memory: float = 0.6
    links: float = 0.7


LIKELY = Shares()


class Seconds(NamedTuple):
    """Seconds of one part in one step."""

    compute: float
    memory: float
    links: float

    @property
    def total(self) -> float:
        """The three overlap, at best."""
        return max(self)

    @property
    def limit(self) -> str:
        return self._fields[int(np.argmax(self))]

    def at(self, shares: Shares) -> "Seconds":
        """Estimate the times where each resource reaches its share of the peak."""
        return Seconds(*(time / share for time, share in zip(self, shares, strict=True)))


def seconds(part: Part, topology: Topology, mesh: Any) -> Seconds:
    """Lower bounds for a part on a mesh."""
    chip = topology.chip
    links = sum(moved.bytes / axis_rate(moved.axis, topology, mesh) for moved in part.moved)
    return Seconds(part.work.flops / topology.count / chip.flops, part.work.hbm_bytes / chip.hbm_rate, links)


def axis_rate(axis: str, topology: Topology, mesh: Any) -> float:
    """Bytes per second that a device can send along mesh axes (`fsdp`, `data+fsdp`): a TPU over the links of every
    dimension of the torus that they span, a GPU over NVLink within a host; the network where they leave slice or
    host."""
    chip: Chip = topology.chip
    along = axis.split("+")
    sizes = [mesh.shape[name] for name in MESH_AXES]
    line = tuple(slice(None) if name in along else 0 for name in MESH_AXES)
    if topology.platform == "gpu":
        hosts = np.arange(topology.count).reshape(sizes)[line] // GPUS_PER_HOST
        return chip.network_rate if np.unique(hosts).size > 1 else chip.link_rate
    devices = np.asarray(mesh.devices)[line].reshape(-1)
    if len({slice_of(device) for device in devices}) > 1:
        return chip.network_rate
    spanned = sum(len(set(at)) > 1 for at in zip(*(device.coords for device in devices), strict=True))
    return chip.link_rate * max(1, spanned)
