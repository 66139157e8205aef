"""`tsopsd generate`: responses of a model to a file of prompts, with the sampler that trains."""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from tsopsd_jax.commands import exit_codes, options
from tsopsd_jax.commands.policies import model_facts
from tsopsd_jax.config import DTYPES
from tsopsd_jax.data import Tokenizer
from tsopsd_jax.data.encode import encode_to_fit
from tsopsd_jax.data.prompts import make_template
from tsopsd_jax.display.live_table import LiveTable
from tsopsd_jax.distributed.sharding import make_mesh
from tsopsd_jax.loading import is_own
from tsopsd_jax.model import load_pretrained
from tsopsd_jax.model.hf_config import read_config
from tsopsd_jax.rewards import Rewards, make_checked_rewards
from tsopsd_jax.rollout import Engine, Sampling
from tsopsd_jax.rundir import resumable_jsonl
from tsopsd_jax.rundir.lock import locked
from tsopsd_jax.types import Prompts


class Request(NamedTuple):
    """A line of the prompts' file."""

    id: str
    prompt: str
    row: dict[str, Any]
    """All of it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """What decides the responses; a file begun with other settings is not gone on with."""

    model: str
    samples: int = 1
    max_tokens: int = 1024
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    template: str = "plain"
    chat: str = "none"
    seed: int = 0
    dtype: str = "float32"
    score: str | None = None
    """Verifier of the responses; None: they are not scored."""

    def __post_init__(self):
        for name in ("samples", "max_tokens"):
            if vars(self)[name] < 1:
                raise ValueError(f"{name} must be at least 1, got {vars(self)[name]}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in 0..2^32-1, got {self.seed}")

    def facts(self) -> dict[str, Any]:
        """As a file's settings: what another directory with the same name must not pass for."""
        own = {"model": str(Path(self.model).resolve()), "sampling": self.sampling.facts()}
        return dataclasses.asdict(self) | own


def digest(texts: Sequence[str]) -> str:
    """SHA-256 of a list of texts."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def generate(
    settings: GenerateSettings,
    prompts: Path,
    out: Path,
    *,
    slots: int = 64,
    tensor: int = 1,
    again: bool = False,
    table: LiveTable,
) -> tuple[int, int]:
    """Write a line {id, sample, prompt, response, tokens, stopped, prompt_ids, response_ids} for every prompt and
    sample, as responses end; the ids are those that the model saw and drew, the stop token included. Where responses
    are scored, also {answer, correct, rewards} and, where a function of one's own failed, {failed}.

    What `out` holds already is kept and not sampled again; a response depends on the seed, its prompt's place in the
    file and its sample alone, so an interrupted file ends up as an uninterrupted one, in another order.

    Args: settings: model, sampling, seed. prompts: JSON lines with `prompt` and perhaps `id` (default: the line's
        number); with `answer` where they are scored. out: JSON lines; `out`.settings.json beside it remembers the
        settings. slots: responses decoded side by side. tensor: devices over which heads and vocabulary are divided;
        the others take rows. again: replace what `out` holds instead of adding what it lacks. table: where progress is
        shown.

    Returns:
        (responses written now, responses in the file).

    Raises:
        ValueError: a malformed line, a file of other settings or of another model, a prompt that does not fit the
            model, another process that writes `out`.
    """
    requests = _read_requests(prompts, scored=settings.score is not None)
    facts = settings.facts() | {"prompts_sha256": digest([part for r in requests for part in (r.id, r.prompt)])}
    rewards = None
    if settings.score is not None:
        first = requests[0].row
        rewards = make_checked_rewards(settings.score, answer=first["answer"], row=first)
        facts["score"] = f"{settings.score}{own_digest(settings.score)}"
        facts["answers_sha256"] = digest([r.row["answer"] for r in requests])
    tokenizer = Tokenizer.load(Path(settings.model), chat=settings.chat)
    shape = read_config(Path(settings.model) / "config.json")
    tokenizer.check_fits(shape.vocab_size)
    template = make_template(settings.template)
    prompted = encode_to_fit(
        [r.id for r in requests],
        [(template(r.prompt, {}), ()) for r in requests],
        tokenizer,
        max_tokens=settings.max_tokens,
        positions=shape.max_position_embeddings,
    )
    facts |= model_facts(Path(settings.model))
    if not again:
        resumable_jsonl.check_ours(out, facts)
    with writing(out):
        if again:
            resumable_jsonl.remove(out)
        resumable_jsonl.claim_output(out, facts)
        return _add_missing(
            settings, requests, rewards, tokenizer, prompted, out, slots=slots, tensor=tensor, table=table
        )


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """Keep other processes from writing a file of JSON lines, or a folder of them.

    Raises:
        ValueError: one writes there, or nothing can be written there.
    """
    file = out.with_name(f".{out.name}.lock") if out.suffix == ".jsonl" else out / ".lock"
    taken = f"another process writes {out}; wait for it, or choose another --out"
    with locked(file, taken=taken, unwritable=f"{out}: cannot be written ({{reason}}); choose another --out"):
        yield


def _add_missing(
    settings: GenerateSettings,
    requests: Sequence[Request],
    rewards: Rewards | None,
    tokenizer: Tokenizer,
    prompted: tuple[np.ndarray, np.ndarray],
    out: Path,
    *,
    slots: int,
    tensor: int,
    table: LiveTable,
) -> tuple[int, int]:
    """Sample the responses that `out`, which is ours and held, does not have yet."""
    tokens, lengths = prompted
    done = {(line["id"], line["sample"]) for line in resumable_jsonl.lines(out)}
    rows = np.asarray(
        [
            i * settings.samples + k
            for i, r in enumerate(requests)
            for k in range(settings.samples)
            if (r.id, k) not in done
        ],
        np.uint32,
    )
    which = (rows // settings.samples).astype(np.int64)
    if len(rows):
        mesh = make_mesh(tensor=tensor)
        # Laid out as in training: each device reads its part; the view below is what decoding needs.
        model, params = load_pretrained(settings.model, dtype=DTYPES[settings.dtype], mesh=mesh)
        engine = Engine(
            model,
            mesh,
            sampling=settings.sampling,
            max_prompt_tokens=tokens.shape[1],
            max_response_tokens=settings.max_tokens,
            stop_ids=tokenizer.stop_ids,
            slots=slots,
        )
        view = engine.view(params)
        del params
        todo = Prompts(tokens[which], lengths[which], rows)
        stream = engine.stream(view, todo, jax.random.key(settings.seed), group=which, on_progress=table.sampling)
        with out.open("a", encoding="utf-8") as file:
            for ended in stream:
                request = requests[int(which[ended.row])]
                line = {
                    "id": request.id,
                    "sample": int(rows[ended.row] % settings.samples),
                    "prompt": request.prompt,
                    "response": tokenizer.decode(ended.tokens),
                    "tokens": len(ended.tokens),
                    "stopped": ended.stopped,
                    "prompt_ids": tokens[which[ended.row], : lengths[which[ended.row]]].tolist(),
                    "response_ids": ended.tokens.tolist(),
                }
                if rewards is not None:
                    verdict = rewards(line["response"], request.row["answer"], request.row)
                    line |= {"answer": request.row["answer"], "correct": verdict.right, "rewards": verdict.parts}
                    line |= {"failed": list(verdict.failures)} if verdict.failures else {}
                resumable_jsonl.append(file, line)
        now = engine.progress
        table.note(
            f"{now.tokens:,} tokens in {now.seconds:.1f} s ({now.tokens / max(now.seconds, 1e-9):,.0f} tokens/s), "
            f"slots used {100 * now.slot_use:.0f} %"
        )
    return len(rows), len(requests) * settings.samples


def own_digest(verifier: str) -> str:
    """What tells a function of one's own from another of its name: the digest of its file; nothing for the
    library's."""
    if not is_own(verifier):
        return ""
    file = Path(verifier.rpartition(":")[0])
    return f" sha256 {hashlib.sha256(file.read_bytes()).hexdigest()[:16]}"


def _read_requests(path: Path, *, scored: bool) -> list[Request]:
    if not path.is_file():
        raise ValueError(f"--prompts: expected a file of JSON lines, got {path}: no such file")
    requests: list[Request] = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(prompt, str) or not prompt:
            raise ValueError(f'{path}, line {number}: expected an object with a text "prompt", got {line[:80]}')
        if scored and not isinstance(row.get("answer"), str):
            raise ValueError(f'{path}, line {number}: --score expects a text "answer" too, got {line[:80]}')
        requests.append(Request(str(row.get("id", number)), prompt, row))
    repeated = _first_repeated([r.id for r in requests])
    if repeated is not None:
        raise ValueError(f"{path}: id {repeated!r} stands in two lines; ids must differ")
    if not requests:
        raise ValueError(f"{path}: expected at least one prompt")
    return requests


def _first_repeated(ids: Sequence[str]) -> str | None:
    seen: set[str] = set()
    return next((i for i in ids if i in seen or seen.add(i)), None)


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="a Hugging Face model directory")
    parser.add_argument(
        "--score",
        metavar="NAME",
        help="also score: math, countdown, last_number or FILE.py:FUNCTION; prompts have an answer",
    )
    parser.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE", help='JSON lines with "prompt", maybe "id"'
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines, in the order of ending")
    parser.add_argument(
        "--template",
        default="plain",
        help="text around the prompt: plain, boxed, dapo_answer, a text with {problem}, or FILE.py:FUNCTION",
    )
    parser.add_argument("--chat", default="none", help="the model's chat turn around that: none, direct, thinking")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    options.add_again(parser)
    options.add_sampling(parser, samples=1, max_tokens=1024, top_p=1.0)


def run(args: argparse.Namespace) -> int:
    """Sample what the file lacks, and say how many responses it has."""
    try:
        return _run(args)
    except KeyboardInterrupt:
        return exit_codes.interrupted(args.out)


def _run(args: argparse.Namespace) -> int:
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    settings = GenerateSettings(
        model=str(args.model),
        samples=args.samples,
        max_tokens=args.max_tokens,
        sampling=options.sampling_of(args),
        template=args.template,
        chat=args.chat,
        seed=args.seed,
        dtype=dtype,
        score=args.score,
    )
    with LiveTable(stream=sys.stderr) as table:
        now, total = generate(
            settings, args.prompts, args.out, slots=args.slots, tensor=args.tensor, again=args.again, table=table
        )
    print(f"{args.out}: {total} responses, {now} of them new")
    return exit_codes.DONE
