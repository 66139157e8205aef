"""What a device pays for one step as the slice grows and each device's work stays the same: 8 to 512 TPU chips,
compiled ahead of time; nothing is run.

    python benchmarks/scaling.py --out benchmarks/results/scaling_v5e.json [--chips 8 16 ...]

The RL phase of configs/paper/qwen3_4b.yaml with work in proportion to the chips: `tensor` 4, `fsdp` the rest of a
slice, four micro-batches of one row of 10,240 positions for each group of 4 chips, as many slots as rows; 512 chips are
two slices joined by `data`. Memory and traffic are the compiler's; operations and bytes of memory are counted from
shapes; seconds are least times at the maker's peaks. A figure is written beside the JSON. Sizes that the JSON holds are
kept.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

from tsopsd_jax.commands.plan import no_compilation_cache, shape_folder
from tsopsd_jax.config import Config, load_config
from tsopsd_jax.model.hf_config import read_config
from tsopsd_jax.plan.compiled import CompiledPrograms
from tsopsd_jax.plan.planner import Means, make_plan
from tsopsd_jax.plan.report import as_json
from tsopsd_jax.plan.topologies import topology

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "paper" / "qwen3_4b.yaml"
SLICES = {8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16", 512: "16x16*2"}
KIND, TENSOR, PIECES = "v5e", 4, 4
BEND = 1.1
"""A part bends where its least time is first this many times what it is on the smallest slice."""


def config_for(chips: int) -> Config:
    """The first phase, its rows in proportion to the chips."""
    config = load_config(CONFIG, [])
    mesh = dataclasses.replace(config.mesh, data=2 if "*2" in SLICES[chips] else 1, tensor=TENSOR)
    rows = PIECES * chips // TENSOR
    sizes = {"prompts_per_step": rows // 8, "responses_per_prompt": 8, "rows_at_once": rows, "micro_batches": PIECES}
    return dataclasses.replace(config, mesh=mesh, phases=(dataclasses.replace(config.phases[0], **sizes),))


def measure(chips: int) -> dict[str, Any]:
    """What each part costs a device."""
    shape = read_config(shape_folder(load_config(CONFIG, []), CONFIG) / "config.json")

    def note(text: str) -> None:
        print(f"{chips} chips: {text}", file=sys.stderr, flush=True)

    with no_compilation_cache():
        place = topology(f"{KIND}:{SLICES[chips]}")
        plan = as_json(make_plan(config_for(chips), shape, place, means=Means(), programs=CompiledPrograms(note)))
    return {
        "chips": chips,
        "topology": plan["topology"],
        "mesh": plan["mesh"],
        "fits": plan["fits"],
        "parts": {part["name"]: cost(part, chips) for part in plan["parts"]},
    }


def cost(part: dict[str, Any], chips: int) -> dict[str, Any]:
    links = dict.fromkeys(sorted({m["axis"] for m in part["collectives"]}), 0.0)
    for moved in part["collectives"]:
        links[moved["axis"]] += moved["bytes"] / 1e9
    return {
        "source": part["source"],
        "tflop": part["flops"] / chips / 1e12,
        "hbm_gb": part["hbm_bytes_moved"] / 1e9,
        "link_gb": links,
        "peak_gib": part["peak_bytes"] / 2**30,
        "seconds": part["seconds"],
    }


def bend(sizes: list[dict[str, Any]], part: str, key: str) -> int | None:
    """The chips from which on a part's time is more than BEND times that of the smallest slice."""
    first = sizes[0]["parts"][part]["seconds"][key]
    return next((s["chips"] for s in sizes if s["parts"][part]["seconds"][key] > BEND * first), None)


def draw(sizes: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    chips = [size["chips"] for size in sizes]
    for ax, part in zip(axes, ("update", "decode"), strict=False):
        for key in ("compute", "memory", "links"):
            ax.plot(chips, [size["parts"][part]["seconds"][key] for size in sizes], marker="o", label=key)
        ax.set(title=f"{part}: least seconds of a step", xscale="log", yscale="log", xlabel="chips")
        ax.legend()
    for part in sizes[0]["parts"]:
        axes[2].plot(chips, [size["parts"][part]["peak_gib"] for size in sizes], marker="o", label=part)
    axes[2].set(title="memory, GiB a device", xscale="log", xlabel="chips")
    axes[2].legend()
    for ax in axes:
        ax.set_xticks(chips, labels=[str(n) for n in chips], minor=False)
        ax.minorticks_off()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--chips", type=int, nargs="+", default=list(SLICES), choices=list(SLICES))
    options = parser.parse_args()
    known = json.loads(options.out.read_text())["sizes"] if options.out.is_file() else []
    for chips in options.chips:
        if chips not in [size["chips"] for size in known]:
            known = sorted([*known, measure(chips)], key=lambda size: size["chips"])
            bends = {
                part: {key: bend(known, part, key) for key in ("compute", "memory", "links", "total")}
                for part in known[0]["parts"]
            }
            about = {"config": CONFIG.name, "kind": KIND, "tensor": TENSOR, "bend": f"> {BEND} x the smallest slice"}
            options.out.write_text(json.dumps(about | {"bends_at_chips": bends, "sizes": known}, indent=1) + "\n")
    print(f"{'chips':>6} {'part':<8} {'compute s':>10} {'HBM s':>8} {'links s':>8} {'GiB':>6}")
    for size in known:
        for name, part in size["parts"].items():
            times = part["seconds"]
            print(
                f"{size['chips']:>6} {name:<8} {times['compute']:>10.2f} {times['memory']:>8.2f} "
                f"{times['links']:>8.2f} {part['peak_gib']:>6.2f}"
            )
    draw(known, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
