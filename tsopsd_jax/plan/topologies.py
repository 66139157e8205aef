"""Topologies by name: `v5p:4x4x4`, `v5e:16x16*2` (two slices), `h100:8`, and the other ways in which people write them.

Their devices come from the compilers (extras `tpu` and `cuda`); none need be there.
"""

import dataclasses
import difflib
import importlib.util
import math
import os
import re
from typing import Any

from tsopsd_jax.hardware.chips import GPU_MEMORY_SHARE, GPUS, GPUS_PER_HOST, TPUS, Chip, GpuTarget
from tsopsd_jax.learn.micro_batches import RESERVE

KNOWN = (
    f"TPUs {', '.join(f'{kind}:{chip.shapes[0]} ... {kind}:{chip.shapes[-1]}' for kind, chip in TPUS.items())} "
    f"(several slices: v5e:16x16*2); GPUs {', '.join(f'{kind}:N' for kind in GPUS)}"
)
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v6litepod": "v6e", "v7x": "tpu7x", "tpu7": "tpu7x"}
_ALIASES |= {f"{kind}-{size}gb": kind for kind, size in (("h100", 80), ("h800", 80), ("h200", 141), ("b200", 180))}
_ALIASES |= {f"{kind}b": kind for kind in ("a100-40g", "a100-80g")} | {"h100-80g": "h100", "h800-80g": "h800"}
_CORES = {"v4": 2, "v5p": 2, "v5e": 1, "v6e": 1}
"""Cores of a chip where Cloud's name of a slice counts them: v5p-64 has 32 chips."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind, and how they are joined."""

    name: str
    chip: Chip
    platform: str
    """`tpu` or `gpu`."""
    devices: tuple[Any, ...] | None
    """That the compiler knows; None: GPUs without their compiler, for which everything is worked out by formula."""
    count: int

    @property
    def hosts(self) -> int:
        """Processes of a run, one on each host."""
        if self.devices is None:
            return self.count // math.gcd(self.count, GPUS_PER_HOST)
        return len({device.process_index for device in self.devices})

    @property
    def usable_bytes(self) -> int:
        """Memory of a device that a run may plan with."""
        share = GPU_MEMORY_SHARE if self.platform == "gpu" else 1.0
        return int((1 - RESERVE) * share * self.chip.hbm_bytes)


def topology(name: str) -> Topology:
    """Find the topology of that name.

    Raises:
        ValueError: unknown, or a TPU without its compiler; says what is known and near, or what to install.
    """
    kind, shape, slices = _read(name)
    if kind in TPUS:
        full = f"{kind}:{shape}" + (f"*{slices}" if slices > 1 else "")
        devices = _tpu_devices(kind, shape, slices)
        return Topology(full, TPUS[kind], "tpu", devices, len(devices))
    if not shape.isdigit() or int(shape) < 1 or slices > 1:
        raise ValueError(f"topology: got {name!r}, expected {kind}:N, N the number of GPUs, such as {kind}:8")
    count = int(shape)
    return Topology(f"{kind}:{count}", GPUS[kind], "gpu", _gpu_devices(GPUS[kind].target, count), count)


def _read(name: str) -> tuple[str, str, int]:
    """(kind, shape, slices) of a name: `H100:8`, `8xh100`, `h100-80gb:8`, `v5p-64`."""
    text = re.sub(r"^(nvidia|tpu)[ \-:]+", "", name.strip().lower().replace("_", "-"))
    text = re.sub(r"^(\d+) ?x ?([a-z].*)$", r"\2:\1", text)  # 8xh100
    text = re.sub(r"-?sxm\d?", "", text)
    match = re.fullmatch(r"([a-z0-9\-]+?) ?[:x] ?(\d+(?:x\d+)*)(?:\*([1-9]\d*))?", text)
    if match is None:
        match = re.fullmatch(r"([a-z]\w*(?:-\d+gb?)?)-(\d+)()", text)  # v5p-64, h100-8
    kind = "" if match is None else _ALIASES.get(match[1], match[1])
    if match is None or (kind not in TPUS and kind not in GPUS):
        raise ValueError(f"topology: got {name!r}, expected one of {KNOWN}{_near(text)}")
    shape = match[2]
    if kind in _CORES and "-" in text and ":" not in text:
        shape = _shape_of_slice(name, kind, int(shape))
    return kind, shape, int(match[3] or 1)


def _shape_of_slice(name: str, kind: str, counted: int) -> str:
    """The shape of Cloud's `v5p-64`, whose number counts cores (v4, v5p) or chips."""
    chips = counted / _CORES[kind]
    for shape in TPUS[kind].shapes:
        if math.prod(map(int, shape.split("x"))) == chips:
            return shape
    raise ValueError(
        f"topology: got {name!r}, {chips:g} chips, expected a shape of theirs, such as {kind}:{TPUS[kind].shapes[0]}; "
        f"common ones: {', '.join(TPUS[kind].shapes)}"
    )


def _near(text: str) -> str:
    head, _, rest = text.partition(":")
    families = [kind for kind in GPUS if kind.startswith(f"{head}-")]
    near = families or difflib.get_close_matches(_ALIASES.get(head, head), [*TPUS, *GPUS, *_ALIASES], n=1, cutoff=0.6)
    near = [_ALIASES.get(kind, kind) for kind in near]
    shape = [rest or (TPUS[kind].shapes[0] if kind in TPUS else "8") for kind in near]
    found = " or ".join(f"{kind}:{each}" for kind, each in zip(near, shape, strict=True))
    return f"; did you mean {found}?" if found else ""


def _tpu_devices(kind: str, shape: str, slices: int) -> tuple[Any, ...]:
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError('topology: the TPU compiler (libtpu) is not installed; pip install -e ".[tpu]"')
    _quiet()
    import jax
    from jax.experimental import topologies

    options: dict[str, Any] = {"chip_config_name": "megacore"} if kind == "v4" else {}
    options |= {"num_slices": slices} if slices > 1 else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{shape}", **options)
    except jax.errors.JaxRuntimeError as error:
        known = ", ".join(TPUS[kind].shapes)
        first = str(error).splitlines()[0]
        raise ValueError(
            f"topology: {kind}:{shape} is refused by the compiler ({first}); common shapes: {known}"
        ) from error
    return tuple(found.devices)


def _gpu_devices(target: GpuTarget | None, count: int) -> tuple[Any, ...] | None:
    """Devices for XLA's GPU compiler, a process for each host; None where its library is not installed."""
    if target is None or not any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin"))):
        return None
    from jax.experimental import topologies

    each = math.gcd(count, GPUS_PER_HOST)
    found = topologies.get_topology_desc(
        platform="cuda",
        topology_name=target.name,
        topology=f"1x{count // each}x{each}",  # NVLink domains x processes x devices
        target_config=target_config(target),
    )
    return tuple(found.devices)


def target_config(target: GpuTarget) -> str:
    """Write a GPU's description as XLA reads it: a text of the message `GpuTargetConfigProto`."""
    limits = (
        "threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 shared_memory_per_block: 49152"
    )
    sizes = "block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535"
    sizes += " thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64"
    sizes += " registers_per_core_limit: 65536 registers_per_block_limit: 65536"
    own = {
        "core_count": target.cores,
        "fpus_per_core": target.fpus,
        "shared_memory_per_core": target.shared_bytes,
        "shared_memory_per_block_optin": target.shared_bytes - 1024,
        "l2_cache_size": target.l2_bytes,
        "clock_rate_ghz": target.clock_ghz,
        "memory_bandwidth": int(target.memory_rate),
        "device_memory_size": target.memory_bytes,
    }
    figures = " ".join(f"{key}: {value}" for key, value in own.items())
    accelerated = " feature_extension: ACCELERATED_FEATURES" if target.capability >= 9 else ""  # sm_90a, sm_100a
    capability = f"cuda_compute_capability {{ major: {target.capability}{accelerated} }}"
    return (
        f"gpu_device_info {{ {limits} {sizes} {figures} {capability} }} "
        'platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 } '
        f'device_description_str: "{target.name}"'
    )


def _quiet() -> None:
    """A machine without a TPU: the library is told not to look for one, nor to complain that there is none."""
    quiet = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
