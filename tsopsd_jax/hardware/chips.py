"""Accelerators: what one device can do at best.

Figures are those that makers publish, per device that JAX sees, dense bfloat16. What is not published stands as such.
"""

import dataclasses
import re

GB, GIB = 1e9, 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuTarget:
    """What XLA's compiler must know of a GPU beyond `Chip`, from the descriptions in its own repository
    (`xla/backends/gpu/target_config/specs`), which were read from such devices."""

    name: str
    capability: int
    """Major compute capability: 8 Ampere, 9 Hopper, 10 Blackwell."""
    cores: int
    """Streaming multiprocessors."""
    fpus: int
    """Float32 units of a core."""
    shared_bytes: int
    """Shared memory of a core; a block may ask for 1,024 bytes less."""
    l2_bytes: int
    clock_ghz: float
    memory_bytes: int
    memory_rate: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One device. Rates are operations or bytes per second; of links and networks, what a device can send."""

    flops: float
    """Dense bfloat16 operations."""
    hbm_bytes: int
    """Memory: on TPUs what the compiler names as available, which is less than is built in; on GPUs as sold."""
    hbm_rate: float
    link_rate: float
    """TPU: along one dimension of the torus, to both neighbours. GPU: NVLink."""
    network_rate: float
    """To devices of other slices (TPU) or hosts (GPU)."""
    kinds: str
    """A pattern of the names that JAX gives to such devices (`device_kind`)."""
    shapes: tuple[str, ...] = ()
    """TPU: common shapes of a slice."""
    target: GpuTarget | None = None
    """GPU: for the compiler."""


_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")

# docs.cloud.google.com/tpu/docs/ v4, v5e, v5p, v6e, tpu7x: peak compute, HBM bandwidth, bidirectional interconnect of a
# chip (v5e 400 GB/s, v6e 800, v5p and tpu7x 1200), here divided by 2 directions and by the 2 (v5e, v6e) or 3 dimensions
# of the torus; network of a chip (v5p 50 Gb/s, v6e and tpu7x 100, v5e 2 x 100 a host of 8). v4: 2,400 Gb/s of links,
# and v5p's network, since its own is not told. A tpu7x chip is two devices with half of everything.
TPUS = {
    "v4": Chip(
        flops=275e12,
        hbm_bytes=int(30.75 * GIB),
        hbm_rate=1228 * GB,
        link_rate=100 * GB,
        network_rate=6.25 * GB,
        kinds=r"TPU v4",
        shapes=_CUBES,
    ),
    "v5e": Chip(
        flops=197e12,
        hbm_bytes=int(15.75 * GIB),
        hbm_rate=819 * GB,
        link_rate=100 * GB,
        network_rate=3.125 * GB,
        kinds=r"TPU v5(e| lite)",
        shapes=_FLAT,
    ),
    "v5p": Chip(
        flops=459e12,
        hbm_bytes=int(95.74 * GIB),
        hbm_rate=2765 * GB,
        link_rate=200 * GB,
        network_rate=6.25 * GB,
        kinds=r"TPU v5p?",
        shapes=_CUBES,
    ),
    "v6e": Chip(
        flops=918e12,
        hbm_bytes=int(31.25 * GIB),
        hbm_rate=1638 * GB,
        link_rate=200 * GB,
        network_rate=12.5 * GB,
        kinds=r"TPU v6(e| lite)",
        shapes=_FLAT,
    ),
    "tpu7x": Chip(
        flops=1153e12,
        hbm_bytes=int(94.75 * GIB),
        hbm_rate=3690 * GB,
        link_rate=100 * GB,
        network_rate=6.25 * GB,
        kinds=r"TPU ?v?7x?",
        shapes=_CUBES,
    ),
}

_A100 = {"capability": 8, "cores": 108, "fpus": 64, "shared_bytes": 167_936, "l2_bytes": 40 << 20, "clock_ghz": 1.41}
_HOPPER = {"capability": 9, "cores": 132, "fpus": 128, "shared_bytes": 233_472, "l2_bytes": 50 << 20, "clock_ghz": 1.98}
_H100 = GpuTarget(name="NVIDIA H100 80GB HBM3", memory_bytes=84_942_979_072, memory_rate=3352.32 * GB, **_HOPPER)

# nvidia.com data sheets of A100, H100, H200 (SXM) and of HGX B200: dense bfloat16, memory as sold, its rate, half of
# NVLink's two directions. H800: an H100 with 400 GB/s of NVLink. Between hosts: an adapter of 400 Gb/s for each GPU
# (A100: 200), as in the reference systems.
GPUS = {
    "a100-40g": Chip(
        flops=312e12,
        hbm_bytes=int(40 * GB),
        hbm_rate=1555 * GB,
        link_rate=300 * GB,
        network_rate=25 * GB,
        kinds=r"NVIDIA A100-SXM4-40GB",
        target=GpuTarget(name="NVIDIA A100-SXM4-40GB", memory_bytes=42_331_013_120, memory_rate=1555.2 * GB, **_A100),
    ),
    "a100-80g": Chip(
        flops=312e12,
        hbm_bytes=int(80 * GB),
        hbm_rate=2039 * GB,
        link_rate=300 * GB,
        network_rate=25 * GB,
        kinds=r"NVIDIA A100-SXM4-80GB",
        target=GpuTarget(name="NVIDIA A100-SXM4-80GB", memory_bytes=85_100_068_864, memory_rate=2039.04 * GB, **_A100),
    ),
    "h100": Chip(
        flops=989e12,
        hbm_bytes=int(80 * GB),
        hbm_rate=3350 * GB,
        link_rate=450 * GB,
        network_rate=50 * GB,
        kinds=r"NVIDIA H100 80GB HBM3",
        target=_H100,
    ),
    "h800": Chip(
        flops=989e12,
        hbm_bytes=int(80 * GB),
        hbm_rate=3350 * GB,
        link_rate=200 * GB,
        network_rate=50 * GB,
        kinds=r"NVIDIA H800",
        target=_H100,
    ),
    "h200": Chip(
        flops=989e12,
        hbm_bytes=int(141 * GB),
        hbm_rate=4800 * GB,
        link_rate=450 * GB,
        network_rate=50 * GB,
        kinds=r"NVIDIA H200( 141GB HBM3e)?",
        target=GpuTarget(name="NVIDIA H200", memory_bytes=151_397_597_184, memory_rate=4800 * GB, **_HOPPER),
    ),
    "b200": Chip(
        flops=2250e12,
        hbm_bytes=int(180 * GB),
        hbm_rate=8000 * GB,
        link_rate=900 * GB,
        network_rate=50 * GB,
        kinds=r"NVIDIA B200",
        target=GpuTarget(
            name="NVIDIA B200",
            memory_bytes=191_514_411_008,
            memory_rate=7672.32 * GB,
            capability=10,
            cores=148,
            fpus=128,
            shared_bytes=233_472,
            l2_bytes=132_644_864,
            clock_ghz=1.965,
        ),
    ),
}
GPUS_PER_HOST = 8
GPU_MEMORY_SHARE = 0.92
"""Share of a GPU's memory that JAX takes for arrays and programs, where XLA_PYTHON_CLIENT_MEM_FRACTION names no other
(JAX's own default is 0.75); NCCL's buffers, cuDNN and the CUDA context need the rest."""


def chip_of(device_kind: str) -> Chip | None:
    """Find what is known of a device by JAX's name for its kind; None: nothing (a CPU, a card not in the tables)."""
    for chip in (*TPUS.values(), *GPUS.values()):
        if re.fullmatch(chip.kinds, device_kind):
            return chip
    return None
