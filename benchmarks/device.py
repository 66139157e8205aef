"""What one accelerator does with this program, in order of value, within a number of minutes.

    python benchmarks/device.py --out benchmarks/results/device_h100.json [--minutes 25] [--only WORD ...] [--dry]

Shapes are those of Qwen3-0.6B, 4B and 8B, weights random, bfloat16 with float32 masters. Each case is a process of its
own, so that one that runs out of memory or hangs costs its own result only; results are written as they come, and the
same command goes on where it stopped. `--dry` runs every case at toy shapes, on a CPU too: it shows that they work.

parity       |sampler's - learner's log-probability| of the same tokens
determinism  a rollout and an update, twice from the same state: equal bits
decode       ms a step, tokens/s, and the share of the floor: weights and live cache read once at the peak rate
attention    the decoding kernel of the device against XLA's way: time of one layer, largest difference
prefill      tokens/s and the share of peak arithmetic
update       model FLOPs a second as a share of the peak (MFU): padded or packed rows, by length and rematerialisation
head         the reheater's and DAPO's head against cross-entropy on all logits: time and memory
step         a whole step of RL and of reheating at NeMo-RL's published row: 2,048 rows (here an eighth of its 16 GPUs'
             share), mean 1,019 tokens of 4,096; as many layers as fit, seconds scaled to all of them and said so
demo         `tsopsd demo` from the shell

Peaks are those of `tsopsd_jax.hardware.chips`; on a device that is not there (a CPU) shares are left out.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from peers import about

HERE = Path(__file__).resolve().parent


class Case(NamedTuple):
    """A measurement: `kind` names a function of device_cases.py (or a command), `asked` its arguments."""

    name: str
    kind: str
    asked: dict[str, Any]
    limit_s: float


def cases() -> Iterator[Case]:
    """Every case, the most telling first: what the largest gaps are is known when the minutes are over."""
    yield Case("parity 0.6b", "parity", {"shape": "0.6b"}, 180)
    yield Case("decode 4b, 64 slots, 1k", "decode", {"shape": "4b", "rows": 64, "context": 1024}, 240)
    yield Case("update 4b, 8k padded", "update", {"shape": "4b", "rows": 4, "length": 8192, "remat": "full"}, 300)
    yield Case("attention 4b, 64 slots", "attention", {"shape": "4b", "rows": 64, "context": 4096}, 120)
    yield Case("determinism 0.6b", "determinism", {"shape": "0.6b"}, 240)
    yield Case("step 8b", "step", {"shape": "8b", "rows": 128, "mean": 1019, "limit": 4096}, 600)
    for rows, context in ((8, 1024), (128, 1024), (256, 1024), (1, 1024), (64, 8192)):
        name = f"decode 4b, {rows} slots, {context // 1024}k"
        yield Case(name, "decode", {"shape": "4b", "rows": rows, "context": context}, 240)
    yield Case("update 4b, 8k packed", "update", {"shape": "4b", "rows": 32, "length": 8192, "packed": True}, 300)
    yield Case("head 4b", "head", {"cases": "2560x8192"}, 300)
    yield Case("demo", "demo", {}, 400)
    yield Case("step 4b", "step", {"shape": "4b", "rows": 128, "mean": 1019, "limit": 4096}, 600)
    for shape in ("8b", "0.6b"):
        for rows in (64, 8, 256):
            yield Case(
                f"decode {shape}, {rows} slots, 1k", "decode", {"shape": shape, "rows": rows, "context": 1024}, 240
            )
    for length, rows in ((2048, 16), (16_384, 2)):
        asked = {"shape": "4b", "rows": rows, "length": length, "remat": "full"}
        yield Case(f"update 4b, {length // 1024}k padded", "update", asked, 300)
    for remat in ("dots", "none"):
        asked = {"shape": "4b", "rows": 4, "length": 8192, "remat": remat}
        yield Case(f"update 4b, 8k padded, remat {remat}", "update", asked, 300)
    yield Case("update 8b, 8k padded", "update", {"shape": "8b", "rows": 4, "length": 8192, "remat": "full"}, 300)
    yield Case("prefill 4b", "prefill", {"shape": "4b", "rows": 16, "length": 1024}, 180)


TOY = {"shape": "toy", "rows": 4, "context": 40, "length": 64, "mean": 12, "limit": 24, "cases": "32x64"}
"""What `--dry` asks in the place of a case's own numbers."""


def command(case: Case, *, dry: bool, python: str) -> list[str]:
    """The process of a case; its last line of output is a JSON object."""
    if case.kind == "demo":
        toy = ["--set", "phases.0.stop.steps=1", "--set", "phases.1.stop.steps=1", "--set", "phases.2.stop.steps=1"]
        small = ["--set", "evaluation.data.first=8", "--set", "phases.1.guard.max_start_entropy_nats=null"]
        return [python, str(HERE / "device_cases.py"), "demo", json.dumps({"settings": [*toy, *small] if dry else []})]
    asked = {key: TOY.get(key, value) if dry else value for key, value in case.asked.items()}
    return [python, str(HERE / "device_cases.py"), case.kind, json.dumps(asked)]


def run(case: Case, *, dry: bool, limit_s: float) -> dict[str, Any]:
    """Run a case; what it says, or why it said nothing. A process that runs out of memory is a result, too."""
    began = time.perf_counter()
    try:
        done = subprocess.run(
            command(case, dry=dry, python=sys.executable), capture_output=True, text=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {limit_s:.0f} s"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines or not lines[-1].startswith("{"):
        said = [line for line in done.stderr.splitlines() if line.strip()]
        memory = [line for line in said if "RESOURCE_EXHAUSTED" in line]
        return {"failed": (memory or said or [f"exit code {done.returncode}"])[-1][:500]}
    return json.loads(lines[-1]) | {"wall_s": round(time.perf_counter() - began, 1)}


def main(arguments: list[str] | None = None) -> None:
    """Run the cases that are not in the file yet, as many as the minutes allow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="WORD", help="cases whose name holds one of these words"
    )
    parser.add_argument("--again", action="store_true", help="measure again what the file holds")
    parser.add_argument("--dry", action="store_true", help="toy shapes: shows that every case works")
    args = parser.parse_args(arguments)
    end = time.monotonic() + 60 * args.minutes
    results: dict[str, Any] = {"about": about() | {"dry": args.dry}, "cases": {}}
    if args.out.is_file():
        results = json.loads(args.out.read_text())
        if results["about"]["dry"] != args.dry:
            parser.error(f"{args.out} holds {'dry' if not args.dry else 'true'} results; choose another --out")
    for case in cases():
        known = results["cases"].get(case.name, {"failed": ""})
        if args.only and not any(word in case.name for word in args.only):
            continue
        if "failed" not in known and not args.again:
            continue
        left = end - time.monotonic()
        if left < 30 and not args.dry:
            print(f"the minutes are over before {case.name!r}; the same command goes on from there")
            break
        found = run(case, dry=args.dry, limit_s=case.limit_s if args.dry else min(case.limit_s, left))
        results["cases"][case.name] = found
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{case.name:32} {json.dumps(found)}", flush=True)


if __name__ == "__main__":
    main()
