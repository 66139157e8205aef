"""Plans of the paper's configurations on three kinds of TPU: `python scripts/plans.py [--only WORD ...]`.

For each configuration and kind the smallest slice that fits: slices are tried from the smallest on, each on the mesh
that the formulas rank first; where these say that it is far from fitting, nothing is compiled. docs/plans/ gets what
`tsopsd plan --json` prints for every slice that was compiled for, and a README with a table. What is there already is
kept: delete a file to make it anew.
"""

import argparse
import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

from tsopsd_jax.cli import main as tsopsd
from tsopsd_jax.commands.plan import shape_folder
from tsopsd_jax.config import load_config
from tsopsd_jax.hardware.chips import TPUS
from tsopsd_jax.model.hf_config import read_config
from tsopsd_jax.plan.planner import Means, by_formula
from tsopsd_jax.plan.topologies import topology

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "plans"
CONFIGS = ("qwen3_4b", "qwen3_8b")
KINDS = ("v5e", "v6e", "v5p")
FAR = 1.15
"""A slice that by formula needs this many times its memory is not compiled for."""
GIB = 2**30


def smallest(name: str, kind: str) -> list[dict[str, Any]]:
    """The slices tried, by rising size, the last one the first that fits."""
    path = ROOT / "configs" / "paper" / f"{name}.yaml"
    config = load_config(path, [])
    shape = read_config(shape_folder(config, path) / "config.json")
    tried = []
    for size in TPUS[kind].shapes:
        _, rough = by_formula(config, shape, topology(f"{kind}:{size}"), means=Means())[0]
        far = rough.peak > FAR * rough.limit
        row = {"config": name, "topology": f"{kind}:{size}", "rough_bytes": rough.peak, "limit": rough.limit}
        tried.append(row | {"plan": None if far else compiled(path, f"{kind}:{size}", rough.split._asdict())})
        if tried[-1]["plan"] and tried[-1]["plan"]["fits"]:
            return tried
    return tried


def compiled(path: Path, place: str, mesh: dict[str, int]) -> dict[str, Any]:
    """What the command prints, from its file if it ran before."""
    file = OUT / f"{path.stem}_{place.replace(':', '_')}.json"
    if not file.is_file():
        sets = [f"--set=mesh.{axis}={size}" for axis, size in mesh.items()]
        print(" ".join(["tsopsd plan", str(path.relative_to(ROOT)), "--topology", place, *sets]), file=sys.stderr)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            code = tsopsd(["plan", str(path), "--topology", place, "--json", *sets])
        if code:
            raise SystemExit(code)
        found = json.loads(out.getvalue()) | {"config": str(path.relative_to(ROOT))}
        file.write_text(json.dumps(found, indent=1) + "\n")
    return json.loads(file.read_text())


def limits(plan: dict[str, Any]) -> str:
    """The part and the kinds of memory that take the most."""
    part = max(plan["parts"], key=lambda part: part["peak_bytes"])
    kinds = sorted(part["bytes"].items(), key=lambda pair: -pair[1])[:2]
    held = ", ".join(f"{kind} {size / GIB:.1f}" for kind, size in kinds)
    return f"{part['phases'][0]}: {part['name']} ({held})"


def line(row: dict[str, Any]) -> str:
    plan = row["plan"]
    if plan is None:
        need = f"{row['rough_bytes'] / GIB:.1f} / {row['limit'] / GIB:.1f}"
        return f"| {row['config']} | {row['topology']} | best by formula | no | {need} | not compiled | | | |"
    mesh = " x ".join(str(n) for n in plan["mesh"].values())
    need = f"{plan['peak_bytes_per_device'] / GIB:.2f} / {plan['usable_bytes_per_device'] / GIB:.2f}"
    pieces = "/".join(str(part["micro_batches"]) for part in plan["parts"] if part["micro_batches"])
    seconds = plan["step_seconds"]
    slowest = max(plan["parts"], key=lambda part: part["seconds"]["total"])
    slow = f"{slowest['phases'][0]}: {slowest['name']} ({slowest['seconds']['limit']})"
    times = f"{seconds['rl']:,.0f} / {seconds['reheat']:,.0f}"
    fits = "**yes**" if plan["fits"] else "no"
    cells = [row["config"], row["topology"], mesh, fits, need, limits(plan), pieces, times, slow]
    return f"| {' | '.join(cells)} |"


def decoding(plan: dict[str, Any]) -> list[str]:
    """What one decoding step of the RL phase moves between chips."""
    part = next(part for part in plan["parts"] if part["name"] == "decode")
    steps, name = part["decoding_steps"], f"{Path(plan['config']).stem} on {plan['topology']}"
    rows = [(m, m["bytes"] / steps, m["count"] / steps) for m in part["collectives"]]
    return [
        f"| {name} | {m['kind']} | {m['axis']} | {count:.2f} | {size / 1e6:.3f} | {m['largest']:,} |"
        for m, size, count in sorted(rows, key=lambda row: -row[1])
    ]


HEAD = """# Plans of the paper's configurations

Made by `python scripts/plans.py` from what `tsopsd plan CONFIG --topology T --json` prints; the JSON files beside this one
are that output. Nothing here ran on a TPU: memory and traffic are the compiler's, operations are counted from shapes, and
times are lower bounds at the makers' peaks, with every response at its limit (8,192 tokens, 4,096 when reheating). The
assumptions stand in each file. For GPUs: [gpus.md](gpus.md); what one H100 could do at best: [h100_rooflines.md](h100_rooflines.md).

For each configuration and kind of chip, slices from the smallest to the first that fits. The mesh is data x fsdp x tensor,
the one that the formulas rank first. Memory, GiB a device: needed / usable (3 % of what the compiler names are left free).

| configuration | slice | mesh | fits | GiB | what takes most | micro-batches, RL / reheat | step >= s, RL / reheat | slowest |
|---|---|---|---|---|---|---|---|---|
"""  # noqa: E501


TAIL = """
## What a decoding step moves

Of the slices that fit, the RL phase's decoding, read from the compiled program: for each token of all slots. The largest
array is in elements; the smallest matrix of a layer has 2,560 x 4,096 / tensor of them (4B) or 4,096 x 4,096 / tensor (8B):
nothing of a weight's size moves.

| plan | collective | axis | times | MB sent by a chip | largest array |
|---|---|---|---|---|---|
"""  # noqa: E501


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="configurations or kinds of chips")
    chosen = parser.parse_args().only
    OUT.mkdir(parents=True, exist_ok=True)
    names = [name for name in CONFIGS if name in chosen] or CONFIGS
    kinds = [kind for kind in KINDS if kind in chosen] or KINDS
    rows = [row for name in names for kind in kinds for row in smallest(name, kind)]
    fitting = [row["plan"] for row in rows if row["plan"] and row["plan"]["fits"]]
    text = (
        HEAD
        + "\n".join(map(line, rows))
        + "\n"
        + TAIL
        + "\n".join(x for plan in fitting for x in decoding(plan))
        + "\n"
    )
    if not chosen:
        (OUT / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
