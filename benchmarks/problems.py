"""What a row of training problems costs before the first step: seconds and memory at 10^4, 10^5 and 10^6 rows.

    python benchmarks/problems.py [--rows 10000 100000 1000000] [--out FILE.json]

Each row count and kind of file has a process of its own. Its rows are short problems of mathematics with an id and one
more column, and the tokenizer is a byte-level BPE of 4,096 tokens that is trained on some of them (a larger vocabulary
makes fewer tokens). Parts follow one another as at the start of a run: reading the file, packing the prompts as tokens
(with a limit of 2,048 of them each, which padded rows would all take), and the digest by which a run knows its problems
again. Seconds are those of the processor; memory is what the process holds more than before, by the end and at most.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from peers import about

TEXT = (
    "Let $x$ and $y$ be real numbers with $x+y={}$ and $xy={}$. Find the value of $x^2+y^2$, "
    "and give the answer as an integer."
)
KINDS = ("jsonl", "parquet")


def row_of(at: int) -> dict[str, Any]:
    """A row of a user's file."""
    return {"id": f"p{at}", "problem": TEXT.format(at, at // 2), "answer": str(at * at), "level": at % 5}


def write_rows(file: Path, rows: int) -> None:
    """Write a file of problems, of the kind that its name says."""
    if file.suffix == ".jsonl":
        with file.open("w") as out:
            out.writelines(json.dumps(row_of(at)) + "\n" for at in range(rows))
        return
    import pyarrow
    import pyarrow.parquet

    columns = {name: [row_of(at)[name] for at in range(rows)] for name in row_of(0)}
    pyarrow.parquet.write_table(pyarrow.table(columns), file)


def write_bpe(folder: Path) -> None:
    """Write a model directory's tokenizer files."""
    import tokenizers

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=4096, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    bpe.train_from_iterator((row_of(at * 97)["problem"] for at in range(5000)), trainer)
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))


def held_bytes() -> int:
    """Memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def work(file: Path, tokenizer_folder: Path) -> None:
    """Read, tokenise and digest; prints what each part took."""
    from tsopsd_jax.config import claim, load_config
    from tsopsd_jax.config.places import DEMO_CONFIG
    from tsopsd_jax.data import Tokenizer, load_problems
    from tsopsd_jax.data.encode import pack_prompts

    config = load_config(DEMO_CONFIG, [])
    tokenizer = Tokenizer.load(tokenizer_folder)
    tokenizer.encode("once")
    load_problems("jsonl", path=file, first=10)  # imports
    parts, before = {}, held_bytes()
    clock = time.process_time()

    def until_now(name: str) -> None:
        nonlocal clock
        parts[name], clock = time.process_time() - clock, time.process_time()

    problems = load_problems("jsonl", path=file)
    until_now("read_s")
    read_bytes = held_bytes() - before
    packed = pack_prompts(problems, tokenizer, max_prompt_tokens=2048)
    until_now("tokenise_s")
    claim.inputs_of(config, {"training problems": problems})
    until_now("digest_s")
    rows, most = len(problems), 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(
        json.dumps(
            {
                "rows": rows,
                "kind": file.suffix[1:],
                "file_bytes_per_row": file.stat().st_size / rows,
                "tokens_per_row": len(packed.tokens) / rows,
                **parts,
                "read_bytes_per_row": read_bytes / rows,
                "held_bytes_per_row": (held_bytes() - before) / rows,
                "peak_bytes_per_row": most / rows,
                "peak_mib": most / 2**20,
            }
        )
    )


def measured(rows: int, kind: str, folder: Path) -> dict[str, Any]:
    """What `work` prints, in a process of its own."""
    file = folder / f"problems-{rows}.{kind}"
    write_rows(file, rows)
    command = [sys.executable, __file__, "--work", str(file), str(folder)]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    found = json.loads(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)
    file.unlink()
    return found


def main() -> None:
    """Measure, print a table and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(*args.work)
        return
    found = []
    print("| rows | file | read, s | tokenise, s | digest, s | us a row | peak, MiB | held, bytes a row |")
    print("|---:|---|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as place:
        write_bpe(Path(place))
        for kind in KINDS:
            for rows in args.rows:
                one = measured(rows, kind, Path(place))
                seconds = [one[name] for name in ("read_s", "tokenise_s", "digest_s")]
                cells = [f"{each:.1f}" for each in seconds] + [f"{1e6 * sum(seconds) / rows:.0f}"]
                cells += [f"{one['peak_mib']:.0f}", f"{one['held_bytes_per_row']:.0f}"]
                print(f"| {rows:,} | {kind} | {' | '.join(cells)} |", flush=True)
                found.append(one)
    if args.out:
        args.out.write_text(json.dumps(about() | {"rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
