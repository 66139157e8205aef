"""Plans of the paper's configurations on 8 H100 and 8 H200: `python scripts/gpu_plans.py [--only WORD ...]`.

Their compiler is needed (extra `cuda`), but no GPU. The mesh and each phase's `rows_at_once` are those that the
formulas rank first at MEAN_TOKENS; the programs are compiled once, and times worked out at full-length responses and at
that mean. docs/plans/ gets what `tsopsd plan --json` prints, with the times at the mean in it, and gpus.md with a table
beside the paper's own times. What is there already is kept: delete a file to make it anew. `--formula` compiles
nothing: what is not there is worked out by formula, for the table alone.
"""

import argparse
import json
import os
import sys
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

from plans import CONFIGS, GIB, OUT, ROOT

from tsopsd_jax.commands.plan import no_compilation_cache, shape_folder
from tsopsd_jax.config import load_config
from tsopsd_jax.model.hf_config import read_config
from tsopsd_jax.plan.compiled import CompiledPrograms
from tsopsd_jax.plan.planner import Means, Plan, by_formula, make_plan
from tsopsd_jax.plan.report import as_json
from tsopsd_jax.plan.topologies import topology

PLACES = ("h100:8", "h200:8")
MEAN_TOKENS = 2000
PAPER_S = {"qwen3_4b": (200, 1035), "qwen3_8b": (240, 1370)}
"""Seconds of an RL and of an OPSD step on 8 H800, as the paper tells them."""


def planned(name: str, place: str, *, formula: bool) -> dict[str, Any]:
    """What the plan says, from its file if it was made before."""
    file = OUT / f"{name}_{place.replace(':', '_')}.json"
    if file.is_file():
        return json.loads(file.read_text())
    path, where = ROOT / "configs" / "paper" / f"{name}.yaml", topology(place)
    if where.devices is None and not formula:
        raise SystemExit('the GPU compiler is not installed; pip install -e ".[cuda]"')
    config = load_config(path, [])
    shape = read_config(shape_folder(config, path) / "config.json")
    best, _ = by_formula(config, shape, where, means=Means(response=MEAN_TOKENS))[0]
    programs = CompiledPrograms(lambda text: print(f"{name} on {place}: {text}", file=sys.stderr, flush=True))
    with no_compilation_cache():
        full, mean = (
            make_plan(best, shape, where, means=Means(response=tokens), programs=None if formula else programs)
            for tokens in (None, MEAN_TOKENS)
        )
    found = {"config": str(path.relative_to(ROOT)), "model": shape_folder(config, path).name} | as_json(full)
    found["at_mean_tokens"] = at_mean(mean)
    if not formula:
        file.write_text(json.dumps(found, indent=1) + "\n")
    return found


def at_mean(plan: Plan) -> dict[str, Any]:
    """Times of responses of MEAN_TOKENS tokens in the mean."""
    keys = ("step_seconds", "estimated_step_seconds", "run", "estimate_shares_of_peaks")
    lengths = {name: n._asdict() for name, n in plan.lengths.items()}
    return {"tokens": lengths} | {key: value for key, value in as_json(plan).items() if key in keys}


def line(name: str, plan: dict[str, Any]) -> str:
    mesh = " x ".join(str(n) for n in plan["mesh"].values())
    slots = "/".join(str(plan["rows_at_once"][phase]) for phase in ("rl", "reheat"))
    need = f"{plan['peak_bytes_per_device'] / GIB:.1f} / {plan['usable_bytes_per_device'] / GIB:.1f}"
    source = "compiler" if {part["source"] for part in plan["parts"]} == {"compiled"} else "formula"
    cells = [name, plan["topology"], mesh, slots, "**yes**" if plan["fits"] else "no", need, source]
    for times in (plan, plan["at_mean_tokens"]):
        for key in ("step_seconds", "estimated_step_seconds"):
            cells.append(" / ".join(f"{times[key][phase]:,.0f}" for phase in ("rl", "reheat")))
    return f"| {' | '.join(cells)} |"


HEAD = f"""# Plans of the paper's configurations on GPUs

Made by `python scripts/gpu_plans.py` on a machine without a GPU (extra `cuda`); the JSON files beside this one are what
`tsopsd plan --json` prints for the configuration with that mesh and `rows_at_once`, and the times at the mean. **Nothing
here ran on a GPU.** Memory is the compiler's or by formula, as said; operations are counted from shapes. "At least" is
the bound at the maker's peaks; the estimate takes 40 % of the arithmetic, 60 % of the memory's rate and 70 % of the links'.

Mesh (data x fsdp x tensor) and `rows_at_once` (RL / reheat) are those that the formulas rank first at responses of
{MEAN_TOKENS:,} tokens in the mean. Seconds a step are RL / reheat: at full-length responses (8,192 and 4,096 tokens), and at that
mean. Memory, GiB a device: needed / usable.

| configuration | GPUs | mesh | rows_at_once | fits | GiB | from | full length: at least | estimate | mean {MEAN_TOKENS:,}: at least | estimate |
|---|---|---|---|---|---|---|---|---|---|---|
"""  # noqa: E501

TAIL = """
## Beside the paper's times

The paper gives 200 s an RL step and 1,035 s an OPSD step for 4B, 240 and 1,370 s for 8B, on 8 H800 (an H800 is an H100
with slower links between GPUs). It does not say how long responses were in the mean, so this is no comparison of
programs: figures measured there stand beside estimates here. The paper's seconds over the estimate's, RL / reheat:

| configuration | GPUs | full length | mean 2,000 |
|---|---|---|---|
"""


def ratios(name: str, plan: dict[str, Any]) -> str:
    """The paper's seconds over the estimate's."""
    cells = [name, plan["topology"]]
    for times in (plan, plan["at_mean_tokens"]):
        estimated = (times["estimated_step_seconds"][phase] for phase in ("rl", "reheat"))
        cells.append(" / ".join(f"{paper / s:.1f}" for paper, s in zip(PAPER_S[name], estimated, strict=True)))
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="configurations or kinds of GPUs")
    parser.add_argument("--formula", action="store_true", help="compile nothing")
    args = parser.parse_args()
    chosen = args.only
    names = [name for name in CONFIGS if name in chosen] or CONFIGS
    places = [place for place in PLACES if place in chosen] or PLACES
    found = [(name, planned(name, place, formula=args.formula)) for name in names for place in places]
    text = HEAD + "".join(line(*row) + "\n" for row in found) + TAIL + "".join(ratios(*row) + "\n" for row in found)
    if not chosen:
        (OUT / "gpus.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
