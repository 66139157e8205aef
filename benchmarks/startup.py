"""Where the first minutes of a run go: from launching the process to the end of its second step, cold and warm.

    python benchmarks/startup.py [--config configs/demo.yaml] [--set KEY=VALUE ...] [--out FILE.json]

Two processes, one after the other, with one cache directory that is empty before the first: `cold` prepares the data
set and compiles, `warm` finds both. The rows follow one another; those under `of which` are JAX's own figures of the
main thread (tracing, lowering, compiling, reading compiled programs from the cache) within the steps. The phases to
come are compiled meanwhile in another thread, which shares the cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from peers import about

EVENTS = {
    "tracing": "/jax/core/compile/jaxpr_trace_duration",
    "lowering": "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "compiling or reading": "/jax/core/compile/backend_compile_duration",
}


def work(config: str, overrides: list[str], folder: Path) -> None:
    """One start; prints seconds of its parts."""
    began = last = float(os.environ["LAUNCHED"])
    parts: dict[str, float] = {}

    def until_now(name: str) -> None:
        nonlocal last
        parts[name], last = time.time() - last, time.time()

    import io

    import jax

    from tsopsd_jax.commands import train
    from tsopsd_jax.config import load_config
    from tsopsd_jax.display.live_table import LiveTable

    until_now("python and imports")
    spent = dict.fromkeys(EVENTS, 0.0)

    def heard(event: str, duration_secs: float, **_: Any) -> None:
        for name, wanted in EVENTS.items():
            if event == wanted and threading.current_thread() is threading.main_thread():
                spent[name] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(heard)
    settings = load_config(Path(config), [f"cache_dir={folder / 'cache'}", *overrides])
    prepare = train.prepare

    def timed(given: Any) -> Any:
        made = prepare(given)
        until_now("configuration, data, tokenizer")
        return made

    train.prepare = timed
    steps: list[float] = []

    class Table(LiveTable):
        def step(self, *_: Any) -> None:
            steps.append(time.time())
            until_now("first step" if len(steps) == 1 else "second step")
            if len(steps) == 2:
                parts.update({f"of which {name}": seconds for name, seconds in spent.items()})
                print(json.dumps(parts | {"all": time.time() - began}), flush=True)
                os._exit(0)

    with train.open_trainer(
        settings, Path(tempfile.mkdtemp(dir=folder)) / "run", Table(stream=io.StringIO())
    ) as trainer:
        until_now("weights onto the mesh")
        spent.update(dict.fromkeys(EVENTS, 0.0))
        evaluate = trainer.evaluations.evaluate

        def evaluated(*asked: Any) -> str | None:
            scores = evaluate(*asked)
            until_now("evaluation of the base")
            return scores

        vars(trainer.evaluations)["evaluate"] = evaluated
        trainer.run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--set", nargs="*", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.config, args.overrides, args.worker)
        return
    found = {}
    with tempfile.TemporaryDirectory() as name:
        for start in ("cold", "warm"):
            command = [sys.executable, __file__, "--worker", name, "--config", args.config, "--set", *args.overrides]
            env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
            done = subprocess.run(
                command, env=env | {"LAUNCHED": repr(time.time())}, check=True, text=True, stdout=subprocess.PIPE
            )
            found[start] = json.loads(done.stdout.splitlines()[-1])
    print("| seconds | cold | warm |\n|---|---|---|")
    for part in found["cold"]:
        print(f"| {part} | {found['cold'][part]:.1f} | {found['warm'].get(part, 0.0):.1f} |")
    if args.out:
        args.out.write_text(
            json.dumps(about() | {"config": args.config, "set": args.overrides} | found, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
