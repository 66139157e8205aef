"""Change files at random and read them: `python scripts/fuzz.py [TARGET ...] [--cases N] [--seed S]`.

Everything that the package reads from a disk is a target: weights, configurations, tokenizers, chat templates, data
sets, settings, checkpoints, logs. A case is a good file with some of its bytes or JSON values changed. It must be
read, or refused by a ValueError (one line, exit code 2). Anything else is a fault: another exception, a killed
process, more than `LIMIT_S` seconds, or more than `ROOM_BYTES` of memory beyond what the reader needs for the good
file; the files are a few kB large.

    python scripts/fuzz.py --json fuzz.json        # all targets, 13,100 cases: about half an hour
    python scripts/fuzz.py yaml --only 117         # one case again, with its traceback

The exit code is 0 if there is no fault. Cases follow from target, seed and number alone.
"""

import argparse
import collections
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fuzz_changes import changed
from fuzz_targets import TARGETS, Target

LIMIT_S = 20
"""Time for one case, in a machine that does other work too."""
ROOM_BYTES = 512 << 20
"""Address space that a case may take beyond what the process has after it read the good file."""


class Outcome(NamedTuple):
    """What became of a case: `read`, `refused`, or a fault with its words."""

    case: int
    kind: str
    words: str = ""


def dice_of(target: str, seed: int, case: int) -> random.Random:
    return random.Random(f"{target} {seed} {case}")


def prepare(target: Target, folder: Path) -> list[Path]:
    """Make the good files; those that are changed, relative to `folder`."""
    folder.mkdir()
    pattern = target.make(folder)
    return sorted(path.relative_to(folder) for path in folder.glob(pattern) if path.is_file())


def damage(good: Path, bad: Path, files: list[Path], dice: random.Random) -> None:
    """Copy the good files with one of them changed."""
    shutil.rmtree(bad, ignore_errors=True)
    shutil.copytree(good, bad)
    file = dice.choice(files)
    (bad / file).write_bytes(changed((good / file).read_bytes(), file.suffix, dice))


def attempt(target: Target, folder: Path) -> tuple[str, str]:
    """Read a folder: the kind of outcome, and the words of an error."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {LIMIT_S} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT_S)
    try:
        target.read(folder)
        return "read", ""
    except ValueError as error:
        return "refused", str(error)
    except BaseException as error:
        return "fault", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    finally:
        signal.alarm(0)


def work(name: str, seed: int, cases: Iterator[int], out: Any) -> None:
    """Try cases in this process, with a limit of its memory; lines of JSON say which is begun, and how it ended."""
    warnings.simplefilter("ignore")
    target = TARGETS[name]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        good, bad = Path(place) / "good", Path(place) / "bad"
        files = prepare(target, good)
        shutil.copytree(good, bad)
        kind, words = attempt(target, bad)
        assert kind == "read", f"{name}: the good file is {kind}: {words}"
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + ROOM_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for case in cases:
            print(json.dumps(["begun", case]), file=out, flush=True)
            damage(good, bad, files, dice_of(name, seed, case))
            print(json.dumps(["done", case, *attempt(target, bad)]), file=out, flush=True)


def forked(name: str, seed: int, first: int, last: int) -> Iterator[Outcome]:
    """Outcomes of the cases from `first` to `last` in a fork; where it dies the case is a fault and the last one."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.close(reading)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)  # libraries tell there of what they were asked to read
            with os.fdopen(writing, "w") as out:
                work(name, seed, iter(range(first, last)), out)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    running = None
    with os.fdopen(reading) as lines:
        for line in lines:
            what, case, *rest = json.loads(line)
            running = case if what == "begun" else None
            if what == "done":
                yield Outcome(case, *rest)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if running is not None:
        yield Outcome(running, "fault", f"the process ended with {code}")
    elif code:
        raise SystemExit(f"{name}: the worker failed")


def outcomes(name: str, seed: int, cases: int) -> Iterator[Outcome]:
    """Outcomes of all cases of a target, in forks that follow one another."""
    at = 0
    while at < cases:
        for outcome in forked(name, seed, at, min(cases, at + 500)):
            at = outcome.case + 1
            yield outcome


def again(name: str, seed: int, case: int) -> None:
    """Try one case in this process, and show what it raises."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    files = prepare(TARGETS[name], folder / "good")
    damage(folder / "good", folder / "bad", files, dice_of(name, seed, case))
    print(folder / "bad")
    print(TARGETS[name].read(folder / "bad"))


def main(arguments: list[str] | None = None) -> int:
    """Try all cases of the targets; 0 if there is no fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"default: all ({', '.join(TARGETS)})")
    parser.add_argument("--cases", type=int, help="of each target; default: as many as a long run has")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="CASE", help="try one case of one target again")
    parser.add_argument("--json", type=Path, help="write the counts there")
    args = parser.parse_args(arguments)
    for unknown in [target for target in args.targets if target not in TARGETS]:
        parser.error(f"expected a target among {', '.join(TARGETS)}, got {unknown!r}")
    if args.only is not None:
        again(args.targets[0], args.seed, args.only)
        return 0
    rows, faults = {}, 0
    for name in args.targets or TARGETS:
        began = time.monotonic()
        found = list(outcomes(name, args.seed, args.cases or TARGETS[name].cases))
        counts = collections.Counter(outcome.kind for outcome in found)
        bad = [outcome for outcome in found if outcome.kind == "fault"]
        faults += len(bad)
        seconds = time.monotonic() - began
        print(
            f"{name:24} {counts['read']:6} read {counts['refused']:6} refused {len(bad):4} faults {seconds:6.0f} s",
            flush=True,
        )
        for words in dict.fromkeys(outcome.words for outcome in bad):
            print(f"    {next(o.case for o in bad if o.words == words)}: {words}", flush=True)
        rows[name] = {"read": counts["read"], "refused": counts["refused"], "faults": len(bad)}
    print(f"{sum(sum(row.values()) for row in rows.values())} cases, {faults} faults")
    if args.json:
        command = " ".join(["python scripts/fuzz.py", *(sys.argv[1:] if arguments is None else arguments)])
        facts = {
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "command": command,
            "seed": args.seed,
            "targets": rows,
        }
        args.json.write_text(json.dumps(facts, indent=1) + "\n")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
