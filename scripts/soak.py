"""Watch a long run's memory, files and threads: `python scripts/soak.py [--steps 600] [--json FILE]`.

The demo's three phases with few prompts, evaluated and saved all along. After each step the process's resident
memory, open files and threads are noted. What counts is the growth after the first third of the steps, when all
programs are compiled and all buffers made: the slope of a line through the rest, per 1,000 steps. The exit code is
0 if memory grows by less than `MOST_BYTES` in 1,000 steps, and files and threads do not.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import yaml

from tsopsd_jax.commands.train import run_config
from tsopsd_jax.config import load_config
from tsopsd_jax.config.places import DEMO_CONFIG
from tsopsd_jax.rundir import log

MOST_BYTES = 64 << 20
"""Growth of memory in 1,000 steps that is no leak: allocators keep what they may need again."""


def configuration(folder: Path, steps: int) -> Path:
    """Write the demo's configuration with phases of so many steps together."""
    config = yaml.safe_load(DEMO_CONFIG.read_text())
    for phase in config["phases"]:
        group = phase["responses_per_prompt"]
        phase |= {"prompts_per_step": 8 if group > 1 else 16, "stop": {"steps": steps // 3}, "guard": {}}
        phase["responses_per_prompt"] = min(group, 4)
    config["evaluation"] |= {"samples": 2, "rows_at_once": 16, "every_steps": 25}
    config["evaluation"]["data"]["first"] = 8
    config |= {"checkpoint_every_steps": 10, "samples": {"every_steps": 5}, "cache_dir": str(folder / "cache")}
    file = folder / "soak.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def usage() -> dict[str, int]:
    """What this process holds now."""
    own = Path("/proc/self")
    return {
        "resident_bytes": int((own / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        "files": len(list((own / "fd").iterdir())),
        "threads": len(list((own / "task").iterdir())),
        "arrays": len(jax.live_arrays()),
    }


def watched(file: Path, run_dir: Path) -> list[dict[str, int]]:
    """Run a configuration; what the process held after each step."""
    seen: list[dict[str, int]] = []
    write = log.RunLog.write

    def noting(self: log.RunLog, line: Any) -> None:
        write(self, line)
        seen.append({"step": line["step"], **usage()})

    log.RunLog.write = noting
    try:
        code = run_config(load_config(file, []), run_dir)
    finally:
        log.RunLog.write = write
    if code:
        raise SystemExit(f"the run ended with {code}")
    return seen


def growth(seen: list[dict[str, int]]) -> dict[str, float]:
    """The slope of each quantity per 1,000 steps, over the last two thirds of the steps."""
    late = seen[len(seen) // 3 :]
    steps = np.array([each["step"] for each in late], float)
    return {name: 1000 * float(np.polyfit(steps, [each[name] for each in late], 1)[0]) for name in usage()}


def main(arguments: list[str] | None = None) -> int:
    """Run, and say what grew; 0 if nothing did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="of the run, in three phases; default 600")
    parser.add_argument("--json", type=Path, help="write what was seen there")
    args = parser.parse_args(arguments)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as place:
        seen = watched(configuration(Path(place), args.steps), Path(place) / "run")
    rises = growth(seen)
    every = max(1, len(seen) // 60)
    facts = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": f"python scripts/soak.py --steps {args.steps}",
        "seconds": round(time.monotonic() - began),
        "growth_per_1000_steps": rises,
        "curve": seen[::every],
    }
    print(json.dumps({name: round(value, 3) for name, value in rises.items()}))
    if args.json:
        args.json.write_text(json.dumps(facts) + "\n")
    return int(rises["resident_bytes"] > MOST_BYTES or max(rises["files"], rises["threads"]) > 1)


if __name__ == "__main__":
    sys.exit(main())
