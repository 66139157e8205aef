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
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from tsopsd_jax.config.places import DEMO_CONFIG

ASSETS = DEMO_CONFIG.parent / "countdown-tiny"
LIMIT_S = 20
"""Time for one case, in a machine that does other work too."""
ROOM_BYTES = 512 << 20
"""Address space that a case may take beyond what the process has after it read the good file."""
ROWS = [{"id": f"p{i}", "problem": f"What is {i} + {i}?", "answer": str(2 * i), "level": 0.5 * i} for i in range(40)]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Target(NamedTuple):
    """Something that is read."""

    make: Callable[[Path], str]
    """Puts good files into a folder; returns the name of the one that is changed, a pattern where there are several."""
    read: Callable[[Path], Any]
    """Reads the folder."""
    cases: int
    """In a long run."""


# ------------------------------------------------------------------------------------------------ changes

# fmt: off
VALUES = [None, True, False, -1, 0, 1, 2**31, 2**63, -(2**63), 10**400, 1e308, -1e308, float("nan"), float("inf"),
          "", "\x00", "\ud800", "\u202e", "../../etc/passwd", "/dev/zero", "x" * 5000, "1e999", "{}",
          [], {}, [[]], [None], {"": None}]
PIECES = [b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"null", b"NaN", b"1e999", b"-1", b"9" * 400, b"9" * 5000,
          b"[" * 3000, b'{"a":' * 3000, b"\n", b'"', b"\\ud800", b"\xe2\x80\xae", b"{%", b"{{", b"}}",
          b"!!python/object/apply:os.system", b"&a [*a]", b"<<: *a", b"- ", b": ", b"\t", b"\r", b"\xef\xbb\xbf",
          b"../", b"%s%n", b"\x7f" * 8]
# fmt: on


def deep(levels: int) -> Any:
    """Nest lists so many levels deep."""
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def change_bytes(data: bytes, dice: random.Random) -> bytes:
    """Change some bytes: flipped bits, pieces cut out, doubled, overwritten or put in; or a shorter file."""
    out = bytearray(data)
    for _ in range(dice.choice((1, 1, 1, 2, 4, 16))):
        at = dice.randrange(len(out) + 1)
        end = min(len(out), at + dice.choice((1, 2, 8, 100, 1000)))
        how = dice.randrange(7)
        if how == 0 and at < len(out):
            out[at] ^= 1 << dice.randrange(8)
        elif how == 1:
            del out[at:end]
        elif how == 2:
            out[at:at] = out[at:end]
        elif how == 3:
            out[at:at] = dice.choice(PIECES)
        elif how == 4:
            out[at:end] = dice.randbytes(end - at)
        elif how == 5:
            out[at : at + 8] = struct.pack("<q", dice.choice((-1, 0, 1, 2**31, 2**40, 2**62, -(2**63))))
        elif dice.random() < 0.3:
            del out[at:]
    return bytes(out)


def change_value(value: Any, dice: random.Random) -> Any:
    """Change plain data in one place: another value, a key that is gone, renamed or new."""
    if isinstance(value, dict) and value and dice.random() < 0.9:
        key = dice.choice(list(value))
        how = dice.randrange(8)
        if how == 0:
            return {k: v for k, v in value.items() if k != key}
        if how == 1:
            return {(k + "_" if k == key else k): v for k, v in value.items()}
        if how == 2:
            return value | {dice.choice(["", "x", "\ud800", key.upper()]): dice.choice(VALUES)}
        return value | {key: change_value(value[key], dice)}
    if isinstance(value, list) and value and dice.random() < 0.9:
        at = dice.randrange(len(value))
        how = dice.randrange(6)
        if how == 0:
            return value[:at] + value[at + 1 :]
        if how == 1:
            return value[:at] + [value[at]] * dice.choice((2, 50)) + value[at:]
        return [*value[:at], change_value(value[at], dice), *value[at + 1 :]]
    if dice.random() < 0.05:
        return deep(dice.choice((50, 900, 3000)))
    return dice.choice(VALUES)


@contextlib.contextmanager
def deeper() -> Iterator[None]:
    """Let JSON be nested as deep as changes nest it."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(50_000)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def changed(data: bytes, suffix: str, dice: random.Random) -> bytes:
    """Change a file: as what its name says that it holds, or as bytes."""
    if dice.random() < 0.35:
        return change_bytes(data, dice)
    with deeper():
        return change_content(data, suffix, dice)


def change_content(data: bytes, suffix: str, dice: random.Random) -> bytes:
    """Change a file as what its name says that it holds."""
    times = dice.choice((1, 1, 2, 3))
    if suffix == ".safetensors":
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        for _ in range(times):
            header = change_value(header, dice)
        text = dumped(header)
        stated = dice.choice([len(text)] * 6 + [0, len(text) + 1, 2**40, 2**63, len(data)])
        return stated.to_bytes(8, "little") + text + data[8 + size :]
    if suffix in (".jsonl",):
        lines = data.splitlines(keepends=True)
        for _ in range(times):
            at = dice.randrange(len(lines))
            lines[at] = dumped(change_value(json.loads(lines[at]), dice)) + b"\n"
        return b"".join(lines)
    if suffix in (".json", ".yaml"):
        import yaml

        value = json.loads(data) if suffix == ".json" else yaml.safe_load(data)
        for _ in range(times):
            value = change_value(value, dice)
        return dumped(value)  # JSON is YAML, too
    return change_bytes(data, dice)


# ------------------------------------------------------------------------------------------------ what is read


def copy_model(folder: Path) -> None:
    """Put the packaged model there."""
    for file in ASSETS.iterdir():
        shutil.copy(file, folder)


def small_weights(folder: Path) -> str:
    """Put a model of a few kB there."""
    import jax
    import jax.numpy as jnp

    from tsopsd_jax.model import Qwen3, Qwen3Config, save_pretrained

    config = Qwen3Config(
        vocab_size=29,
        hidden_size=24,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        rope_theta=1e4,
    )
    model = Qwen3(config)
    save_pretrained(folder, model, jax.tree.map(lambda s: jnp.ones(s.shape), model.param_shapes()))
    return "model.safetensors"


def index_of_weights(folder: Path) -> str:
    """Put a model there whose weights have an index."""
    small_weights(folder)
    os.rename(folder / "model.safetensors", folder / "a.safetensors")
    size = int.from_bytes((folder / "a.safetensors").read_bytes()[:8], "little")
    names = json.loads((folder / "a.safetensors").read_bytes()[8 : 8 + size])
    index = {"weight_map": {name: "a.safetensors" for name in names if name != "__metadata__"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return "model.safetensors.index.json"


def load_weights(folder: Path) -> Any:
    from tsopsd_jax.model import load_pretrained

    return load_pretrained(folder)


def read_model_config(folder: Path) -> Any:
    from tsopsd_jax.model.hf_config import read_config

    return read_config(folder / "config.json")


def load_tokenizer(folder: Path) -> Any:
    from tsopsd_jax.data import Tokenizer

    tokenizer = Tokenizer.load(folder)
    return tokenizer.decode(tokenizer.encode("1 2 3"))


def load_chat(folder: Path) -> Any:
    from tsopsd_jax.data import Tokenizer

    tokenizer = Tokenizer.load(folder, chat="direct")
    return tokenizer.encode("1 2", before=[("system", "3")])


def files_of(folder: Path, name: str) -> str:
    copy_model(folder)
    return name


def make_chat(folder: Path) -> str:
    """Put a tokenizer of bytes there, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = {character: at for at, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return "chat_template.jinja"


def lines_of(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def make_parquet(folder: Path) -> str:
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"prompt": [{"content": f"What is {i}?", "role": "user"}], "reward_model": {"ground_truth": str(i)},
         "extra_info": {"index": f"p{i}"}} for i in range(20)]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "dapo-math-17k.parquet")
    return "dapo-math-17k.parquet"


def make_csv(folder: Path) -> str:
    names = (
        "Question",
        "Correct Answer",
        "Incorrect Answer 1",
        "Incorrect Answer 2",
        "Incorrect Answer 3",
        "Record ID",
    )
    rows = [",".join(names), *(f'"Which, {i}?",a{i},b,c,d,r{i}' for i in range(20))]
    (folder / "gpqa_diamond.csv").write_text("\n".join(rows) + "\n")
    return "gpqa_diamond.csv"


def problems(name: str, file: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        from tsopsd_jax.data import load_problems

        return load_problems(name, path=folder / file)

    return read


def make_yaml(folder: Path) -> str:
    shutil.copy(DEMO_CONFIG, folder / "demo.yaml")
    return "demo.yaml"


def read_settings(folder: Path) -> Any:
    from tsopsd_jax.config import load_config

    return load_config(folder / "demo.yaml", [])


def run_files(folder: Path) -> None:
    """Put a short run's log there."""
    line = {"phase": "rl", "policy/entropy_nats": 0.3, "reward/mean": 0.5, "rollout/length_mean_tokens": 9.0}
    lines_of(folder, "metrics.jsonl", [{"step": i, "phase_step": i, "time_s": 1.0 * i} | line for i in range(1, 9)])
    example = {"prompt": "1 + 1", "response": "2", "answer": "2", "correct": True}
    record = {"stage": "base", "step": 0, "avg_at_k": 0.5, "pass_at_k": 0.7, "samples": 2, "examples": [example]}
    lines_of(folder, "evaluations.jsonl", [record, record | {"stage": "after rl", "step": 8}])
    kept = {"phase": "rl", "which": "best", "prompt": "1", "response": "2", "answer": "2", "reward": 1.0}
    lines_of(folder, "samples.jsonl", [kept | {"step": i} for i in range(1, 5)])
    status = {"state": "ended", "reason": None, "phase": "rl", "step": 8, "time": 1.7e9,
              "phases": [{"phase": "rl", "step": 8, "reason": "8 steps"}], "skipped_updates": 0, "held_updates": 0,
              "starts": [{"step": 0, "time": 1.7e9, "host": "h", "devices": "1 x cpu", "processes": 1,
                          "versions": {"jax": "0.10"}, "commit": None}]}  # fmt: skip
    (folder / "status.json").write_text(json.dumps(status))
    shutil.copy(DEMO_CONFIG, folder / "config.yaml")


def run_file(name: str) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        run_files(folder)
        return name

    return make


def read_run(folder: Path) -> Any:
    """As a run that goes on does, and as the page does but for its figures."""
    from tsopsd_jax.display import page, panels, responses, run_status
    from tsopsd_jax.rundir.log import RunLog, read_evaluations, read_samples
    from tsopsd_jax.rundir.status import read_status
    from tsopsd_jax.rundir.trackers import Tracker

    panels.draw_panels = lambda *_, **__: ""
    page.write_report(folder)
    responses.kept(read_samples(folder))
    run_status.machines(read_status(folder))
    RunLog(folder, last_step=6, tracker=Tracker(tensorboard=False)).close()
    return read_evaluations(folder)


def make_inputs(folder: Path) -> str:
    """Put a claimed run directory there."""
    from tsopsd_jax.config import claim, load_config

    (folder / "run").mkdir()
    claim.claim(folder / "run", load_config(DEMO_CONFIG, []), {"training problems": "sha256 1"}, accept_changed=False)
    return "run/inputs.json"


def read_inputs(folder: Path) -> Any:
    from tsopsd_jax.config import claim, load_config

    return claim.claim(
        folder / "run", load_config(DEMO_CONFIG, []), {"training problems": "sha256 1"}, accept_changed=False
    )


def make_output(folder: Path) -> str:
    from tsopsd_jax.rundir import resumable_jsonl

    resumable_jsonl.claim_output(folder / "out.jsonl", {"model": "m", "samples": 4, "sampling": {"top_p": 0.7}})
    lines_of(folder, "out.jsonl", [{"problem": "p", "response": "r", "correct": True}] * 4)
    return "out.jsonl.settings.json"


def read_output(folder: Path) -> Any:
    from tsopsd_jax.rundir import resumable_jsonl

    resumable_jsonl.claim_output(folder / "out.jsonl", {"model": "m", "samples": 4, "sampling": {"top_p": 0.7}})
    return resumable_jsonl.lines(folder / "out.jsonl")


def train_state() -> Any:
    import jax.numpy as jnp

    from tsopsd_jax.types import TrainState

    return TrainState(jnp.int32(1), {"embed": jnp.arange(12.0).reshape(3, 4)}, {"mu": jnp.ones(5)})


def make_checkpoint(folder: Path) -> str:
    from tsopsd_jax.rundir.checkpoints import Checkpoints
    from tsopsd_jax.rundir.run_state import RunProgress, RunState

    checkpoints = Checkpoints(folder.resolve() / "c", keep=2)
    checkpoints.save(RunState(train_state(), RunProgress(position=7)))
    checkpoints.close()
    return "c/1/**/*"


def read_checkpoint(folder: Path) -> Any:
    from tsopsd_jax.rundir.checkpoints import Checkpoints, read_progress

    read_progress(folder.resolve() / "c")
    checkpoints = Checkpoints(folder.resolve() / "c", keep=2)
    try:
        return checkpoints.restore_newest(train_state())
    finally:
        checkpoints.close()


TARGETS = {
    "weights": Target(small_weights, load_weights, 1500),
    "index of weights": Target(index_of_weights, load_weights, 500),
    "config.json": Target(lambda f: files_of(f, "config.json"), read_model_config, 1200),
    "generation_config.json": Target(lambda f: files_of(f, "generation_config.json"), load_tokenizer, 400),
    "tokenizer.json": Target(lambda f: files_of(f, "tokenizer.json"), load_tokenizer, 900),
    "tokenizer_config.json": Target(lambda f: files_of(f, "tokenizer_config.json"), load_tokenizer, 500),
    "chat template": Target(make_chat, load_chat, 600),
    "parquet": Target(make_parquet, problems("dapo_math_17k", "dapo-math-17k.parquet"), 1200),
    "csv": Target(make_csv, problems("gpqa", "gpqa_diamond.csv"), 500),
    "jsonl": Target(lambda f: lines_of(f, "rows.jsonl", ROWS), problems("jsonl", "rows.jsonl"), 1200),
    "yaml": Target(make_yaml, read_settings, 1500),
    "metrics.jsonl": Target(run_file("metrics.jsonl"), read_run, 500),
    "evaluations.jsonl": Target(run_file("evaluations.jsonl"), read_run, 400),
    "samples.jsonl": Target(run_file("samples.jsonl"), read_run, 400),
    "status.json": Target(run_file("status.json"), read_run, 400),
    "config.yaml of a run": Target(run_file("config.yaml"), read_run, 300),
    "inputs.json": Target(make_inputs, read_inputs, 300),
    "settings of an output": Target(make_output, read_output, 300),
    "checkpoint": Target(make_checkpoint, read_checkpoint, 500),
}


# ------------------------------------------------------------------------------------------------ cases


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
