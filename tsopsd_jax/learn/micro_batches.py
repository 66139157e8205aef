"""How many micro-batches an update is cut into to fit the devices: from shapes, and from the compiled program."""

import re
from collections.abc import Callable
from typing import Any

import jax

from tsopsd_jax.distributed import processes

TOKENS_PER_DEVICE = 16_384
"""Tokens of a micro-batch on each device, at most: enough for full speed; more takes memory and leaves more padding."""
TOKENS_PER_CPU = 2_048
"""Tokens of a micro-batch on a CPU device, at most:
its caches hold the activations of this many (docs/lab_notes.md)."""

RESERVE = 0.03
"""Share of a device's memory left to the runtime and to fragmentation."""


def device_bytes(mesh: jax.sharding.Mesh) -> int | None:
    """Memory that programs may use on each device, the least of any process;
    None where the backend does not say (a CPU)."""
    limits = processes.exchange((mesh.local_devices[0].memory_stats() or {}).get("bytes_limit"))
    return None if None in limits else int((1 - RESERVE) * min(limits))


def needed_bytes(compiled: Any) -> int:
    """Memory of a compiled program at its peak on each device: arguments, results in buffers of their own,
    temporaries."""
    m = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


def compile_within(lowered: Any) -> tuple[Any | None, int]:
    """Compile a program.

    Returns:
        (the program, its peak on each device), or (None, what it would need) where the
        compiler finds that no device has that much.
    """
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        need = exhausted_bytes(str(error))
        if need is None:
            raise
        return None, need
    return compiled, needed_bytes(compiled)


def exhausted_bytes(message: str) -> int | None:
    """Bytes that a program would need, from the TPU compiler's refusal; None for another error.

    It says `Used 24.50G of 15.75G hbm`, or `total memory required for HLO temporaries (512.01G)`: then arguments and
    results come on top, and the figure is a lower bound.
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    found = re.search(r"Used ([\d.]+)([KMGT]?) of \S+ hbm|temporaries \(([\d.]+)([KMGT]?)\)", message)
    if found is None:
        return None
    number, unit = found[1] or found[3], found[2] or found[4] or ""
    return int(float(number) * 1024 ** " KMGT".index(unit or " "))


def choose_micro_batches(
    need_of: Callable[[int], int],
    *,
    rows: int,
    width: int,
    shards: int,
    limit_bytes: int | None,
    tokens: int = TOKENS_PER_DEVICE,
) -> int:
    """Choose the fewest micro-batches of which none has more than `tokens` tokens on a device and with which the update
    fits. More tokens at once would not be faster, and leave more padding.

    Args:
        need_of: number of micro-batches -> bytes of the update on each device; called only where memory has a limit.
        rows, width: of the batch; rows are a multiple of `shards`.
        shards: devices over which rows are divided.
        limit_bytes: of each device; None: no limit.
        tokens: of a micro-batch on each device, at most (a single row may have more).

    Raises:
        ValueError: if one row on each device does not fit.
    """
    each = rows // shards
    few = [n for n in range(1, each + 1) if each % n == 0]
    few = [n for n in few if (each // n) * width <= tokens] or [each]
    if limit_bytes is None:
        return few[0]
    while True:
        need = need_of(few[0])
        if need <= limit_bytes:
            return few[0]
        if len(few) == 1:
            raise ValueError(
                f"the update needs {need / 2**30:.1f} GiB on each device with one row of {width} tokens at a time, got "
                f"{limit_bytes / 2**30:.1f} GiB; set model.remat: full, lower chunk_tokens, set "
                f"optimizer.momentum_dtype: bfloat16, or divide the model over more devices (mesh.fsdp, mesh.tensor)"
            )
        few = [n for n in few if n >= 2 * few[0]] or few[-1:]
