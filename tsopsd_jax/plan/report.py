"""A plan for people and for programs."""

from typing import Any

from tsopsd_jax.hardware.chips import GPU_MEMORY_SHARE
from tsopsd_jax.plan.case import Part
from tsopsd_jax.plan.planner import Plan
from tsopsd_jax.plan.roofline import Seconds

GIB = 2**30
NO_GPU_COMPILER = ': the GPU compiler is not installed; pip install -e ".[cuda]"'


def as_json(plan: Plan) -> dict[str, Any]:
    """One object; bytes are per device, seconds lower bounds of one step."""
    return {
        "topology": plan.topology.name,
        "devices": plan.topology.count,
        "mesh": plan.split._asdict(),
        "fits": plan.fits,
        "peak_bytes_per_device": plan.peak,
        "hbm_bytes_per_device": plan.topology.chip.hbm_bytes,
        "usable_bytes_per_device": plan.limit,
        "host_bytes": plan.host_bytes,
        "rows_at_once": plan.slots,
        "chunk_tokens": plan.tiles,
        "step_seconds": plan.step_seconds,
        "estimated_step_seconds": plan.estimated_step_seconds,
        "estimate_shares_of_peaks": plan.shares._asdict(),
        "run": _run(plan),
        "parts": [_part(part, time, plan) for part, time in zip(plan.parts, plan.times, strict=True)],
        "advice": advice(plan),
        "assumptions": assumptions(plan),
    }


def _run(plan: Plan) -> dict[str, Any]:
    """Totals of the run's steps; None where a phase has no `stop.steps`."""
    hours = {"at_least": plan.run_hours(plan.step_seconds), "estimated": plan.run_hours(plan.estimated_step_seconds)}
    devices = {f"device_hours_{name}": None if h is None else h * plan.topology.count for name, h in hours.items()}
    return {"steps": plan.steps} | {f"hours_{name}": h for name, h in hours.items()} | devices


def _part(part: Part, time: Seconds, plan: Plan) -> dict[str, Any]:
    return {
        "name": part.name,
        "phases": list(part.phases),
        "source": part.source,
        "fits": part.peak <= plan.limit,
        "peak_bytes": part.peak,
        "bytes": part.bytes,
        "updates": part.updates,
        "micro_batches": part.micro_batches,
        "decoding_steps": part.steps,
        "flops": part.work.flops,
        "hbm_bytes_moved": part.work.hbm_bytes,
        "collectives": [moved._asdict() for moved in part.moved],
        "uncounted_loops": list(part.uncounted_loops),
        "seconds": time._asdict() | {"total": time.total, "limit": time.limit},
    }


def as_text(plan: Plan) -> str:
    """Tables of memory, work, traffic and time; then assumptions, and what to change."""
    shape, chip = plan.split, plan.topology.chip
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    verdict += f" (by formula{NO_GPU_COMPILER})" if plan.topology.devices is None else ""
    largest = max(plan.parts, key=lambda part: part.peak)
    lines = [
        f"{plan.topology.name}: {plan.topology.count} devices, mesh data {shape.data} x fsdp {shape.fsdp} x tensor "
        f"{shape.tensor}: {verdict}",
        f"needs {plan.peak / GIB:.2f} GiB of each device's {plan.limit / GIB:.2f} (of {chip.hbm_bytes / GIB:.2f}, "
        f"{1 - plan.limit / chip.hbm_bytes:.0%} are left free), most in {_name(largest)}",
        f"a checkpoint being written takes {plan.host_bytes / GIB:.2f} GiB of each host's own memory",
        "",
        *_table(_memory_rows(plan)),
        "",
        *_table(_time_rows(plan)),
        "",
        *_table(_traffic_rows(plan)),
        "",
        *_time_lines(plan),
        "of the head at once (chunk_tokens): " + ", ".join(f"{name} {n:,} tokens" for name, n in plan.tiles.items()),
        "",
        "assumed:",
        *(f"- {line}" for line in assumptions(plan)),
    ]
    found = advice(plan)
    return "\n".join(lines + (["", "to make it fit:", *(f"- {line}" for line in found)] if found else []))


def _time_lines(plan: Plan) -> list[str]:
    least, likely, run = plan.step_seconds, plan.estimated_step_seconds, _run(plan)
    steps = (f"{name} {least[name]:,.1f} s (estimate {likely[name]:,.0f})" for name in least)
    lines = ["a step takes at least " + ", ".join(steps)]
    if run["hours_at_least"] is None:
        return [*lines, "the whole run: unknown, a phase names no stop.steps"]
    phases = " + ".join(f"{n:,} {name}" for name, n in plan.steps.items())
    return [
        *lines,
        f"the whole run, {phases} steps (phases may end sooner): at least {run['hours_at_least']:,.1f} h, "
        f"{run['device_hours_at_least']:,.0f} device-hours; estimate {run['hours_estimated']:,.0f} h, "
        f"{run['device_hours_estimated']:,.0f} device-hours",
    ]


def ranking(plans: list[Plan]) -> str:
    """One line for each plan of a search."""
    rows = [["data", "fsdp", "tensor", "rows_at_once", "micro-batches", "GiB", "fits", "steps, s at least", "from"]]
    for plan in plans:
        micro_batches = [str(part.micro_batches) for part in plan.parts if part.micro_batches]
        times = ", ".join(f"{name} {time:,.1f}" for name, time in plan.step_seconds.items())
        sizes = [str(n) for n in plan.split]
        source = "formula" if any(part.source == "formula" for part in plan.parts) else "compiler"
        slots = "/".join(map(str, plan.slots.values()))
        rows.append(
            [*sizes, slots, "/".join(micro_batches), f"{plan.peak / GIB:.2f}", str(plan.fits).lower(), times, source]
        )
    return "\n".join(_table(rows))


def _name(part: Part) -> str:
    return f"{'/'.join(part.phases)}: {part.name}"


def _memory_rows(plan: Plan) -> list[list[str]]:
    kinds = ("parameters", "optimizer", "gradients", "rollout view", "cache", "temporaries")
    rows = [["memory, GiB a device", *kinds, "in all", "from"]]
    for part in plan.parts:
        cells = [f"{part.bytes[kind] / GIB:.2f}" if kind in part.bytes else "-" for kind in kinds]
        rows.append([_name(part), *cells, f"{part.peak / GIB:.2f}", part.source])
    return rows


def _time_rows(plan: Plan) -> list[list[str]]:
    rows = [["one step", "updates", "micro-batches", "TFLOP", "HBM GB", "links GB"]]
    rows[0] += ["compute s", "HBM s", "links s", "limit"]
    for part, time in zip(plan.parts, plan.times, strict=True):
        links = sum(moved.bytes for moved in part.moved)
        counts = [str(n or "-") for n in (part.updates, part.micro_batches)]
        figures = (part.work.flops / 1e12, part.work.hbm_bytes / 1e9, links / 1e9, *time)
        rows.append([_name(part), *counts, *(f"{x:,.2f}" for x in figures), time.limit])
    return rows


def _traffic_rows(plan: Plan) -> list[list[str]]:
    rows = [["collectives of one step", "kind", "axis", "GB a device", "count"]]
    for part in plan.parts:
        for m in sorted(part.moved, key=lambda m: -m.bytes):
            rows.append([_name(part), m.kind, m.axis, f"{m.bytes / 1e9:,.3f}", f"{m.count:,.0f}"])
    return rows


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    left = (0, len(widths) - 1)
    return [
        "  ".join(
            x.ljust(w) if i in left else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def assumptions(plan: Plan) -> list[str]:
    """What the figures rest on."""
    chip, lengths = plan.topology.chip, plan.lengths
    mean = "; ".join(f"{name}: prompts {n.prompt}, responses {n.response}" for name, n in lengths.items())
    found = [
        "memory: prompts and responses at their limits, all slots at once; parts run one after the other, parameters "
        "and optimizer lie there throughout, the rollout view and the cache while sampling",
        f"mean tokens ({mean}); --mean-tokens and --mean-prompt-tokens for others",
        f"peaks of a device: {chip.flops / 1e12:,.0f} TFLOP/s bfloat16, {chip.hbm_rate / 1e9:,.0f} GB/s of memory, "
        f"{chip.link_rate / 1e9:,.0f} GB/s of links, {chip.network_rate / 1e9:,.1f} GB/s between slices or hosts",
        "times are lower bounds: peaks are reached, all three overlap within a part, nothing waits for latency or the "
        f"host; estimates: {plan.shares.compute:.0%} of the arithmetic, {plan.shares.memory:.0%} of the memory's rate, "
        f"{plan.shares.links:.0%} of the links' are reached (--shares for others)",
        "one generation batch a step (dynamic sampling may draw more), slots are full until the rows are out, packed "
        "rows have no gaps; verification and evaluation are not counted",
    ]
    if any(part.source == "formula" for part in plan.parts):
        found.append(
            f"not compiled: memory and traffic by formula{NO_GPU_COMPILER if plan.topology.devices is None else ''}"
        )
    if plan.topology.platform == "gpu":
        found.append(
            f"of a GPU's memory {GPU_MEMORY_SHARE:.0%} are JAX's (XLA_PYTHON_CLIENT_MEM_FRACTION); with no GPU here "
            "the compiler cannot time kernels and takes those that it prefers by rule"
        )
    if any(part.source == "refused" for part in plan.parts):
        found.append("of a program that does not fit, the compiler tells the memory; its traffic is by formula")
    loops = sorted({loop for part in plan.parts for loop in part.uncounted_loops})
    if loops:
        found.append(f"loops whose count is not known count once: {', '.join(loops)}")
    return found


def advice(plan: Plan) -> list[str]:
    """What to change, for each part that does not fit; nothing if all do."""
    found = dict.fromkeys(line for part in plan.parts if part.peak > plan.limit for line in _advice(part, plan))
    return list(found)


def _advice(part: Part, plan: Plan) -> list[str]:
    held = part.bytes
    state = held["parameters"] + held["optimizer"]
    more = "more devices in mesh.fsdp divide parameters and optimizer further"
    lines = []
    if state > plan.limit / 2:
        lines += [more, "optimizer.momentum_dtype: bfloat16 saves 2 bytes of 12 for each parameter"]
    if held.get("rollout view", 0) > plan.limit / 4:
        lines.append(f"mesh.tensor: {2 * plan.split.tensor} halves the rollout view, which fsdp does not divide")
    room = plan.limit - (part.peak - held.get("cache", 0))
    if "cache" in held and 0 < room < held["cache"]:
        share = room / held["cache"]
        lines.append(f"rows_at_once: at most {share:.0%} of its slots have room for their cache ({_name(part)})")
    if part.name in ("update", "reheat_step"):
        lines.append("model.remat: full, unless it is; half the chunk_tokens")
        lines.append(f"mesh.tensor: {2 * plan.split.tensor} halves a layer's activations, weights and logits")
    return lines or [more]
