"""Layouts of published data sets: which files, which columns, and how a row becomes a problem."""

import codecs
import csv
import hashlib
import itertools
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from tsopsd_jax.data.prompts import bare

Row = dict[str, Any]
_HALF = re.compile("[\ud800-\udfff]")


class Problem(NamedTuple):
    """One problem: `prompt` is the text that the model continues, `answer` the verifier's gold string."""

    id: str
    prompt: str
    answer: str
    row: Mapping[str, Any] = MappingProxyType({})
    """Other columns of a user's row, for rewards and templates of one's own."""
    before: tuple[tuple[str, str], ...] = ()
    """(role, content) of the messages before the prompt, which is then the last message, the user's."""

    def with_system(self, content: str) -> "Problem":
        """The problem after a system's message, unless it has one of its own."""
        if self.before and self.before[0][0] == "system":
            return self
        return self._replace(before=(("system", content), *self.before))


ROLES = ("system", "user", "assistant")
"""Roles of the messages of a conversation."""
TEXTS = ("id", "prompt", "answer")
"""Fields of a problem that a prepared data set holds."""


class Layout(NamedTuple):
    """The published files of a data set."""

    splits: dict[str, tuple[str, ...]]
    """Split -> names of its files with wildcards, in any folder; the first that matches counts."""
    problem: Callable[[Row, str], Problem | str]
    """(row, id where the row has none) -> the problem, or what is wrong with the row."""
    hub: str | None = None
    """The repository on the Hugging Face hub."""
    columns: tuple[str, ...] | None = None
    """The columns of a parquet file that are read, where not all are needed."""
    sizes: dict[str, int] | None = None
    """Split -> how many problems it has, where that is known."""
    repeats: bool = False
    """The file repeats its problems: rows that equal an earlier one are that problem."""


def prepared_folder(name: str, directory: str | Path) -> Path:
    """Name the folder of a prepared data set, whether it exists or not."""
    return Path(directory) / name / "1.0.0"


class Tally:
    """Counts the rows read, and collects what is wrong with which.

    Args:
        where: what is read, for messages.
        known: how many problems there are, where that is known.
    """

    def __init__(self, where: str, known: int | None = None):
        self.where = where
        self.known = known
        self.kept = self.duplicates = 0
        self.malformed: list[tuple[int, str]] = []

    def complaint(self) -> str:
        """Say how many rows are malformed, which (20 at most), and why (three at most)."""
        shown = [f"row {number}: {reason}" for number, reason in self.malformed[:3]]
        further = [str(number) for number, _ in self.malformed[3:20]]
        if further:
            shown.append(f"rows {', '.join(further)}" + (", ..." if len(self.malformed) > 20 else ""))
        return f"{len(self.malformed)} malformed rows ({'; '.join(shown)}; rows count from 1)"

    def check(self) -> None:
        """Raise ValueError if a row was malformed, or there were more problems than the data set has."""
        if self.malformed:
            raise ValueError(
                f"{self.where}: expected rows with id, problem and answer, got {self.complaint()}: "
                "repair or remove them"
            )
        self.check_size()

    def check_size(self) -> None:
        """Raise ValueError if there were more problems than the data set has: some are another's."""
        if self.known is not None and self.kept > self.known:
            raise ValueError(
                f"{self.where}: expected the data set's {self.known:,} problems, got {self.kept:,}: "
                "name its own file, or read yours as jsonl"
            )


def read_problems(
    layout: Layout, rows: Iterable[tuple[int, Row | str]], prefix: str, tally: Tally
) -> Iterator[Problem]:
    """Yield the problems in numbered rows, in order; what is wrong with the others goes to `tally`.

    Keeps a digest of each distinct problem, not the rows: memory does not grow with repetitions.
    """
    ids: set[str] = set()
    answers: dict[bytes, tuple[str, int]] = {}
    for number, row in rows:
        problem = row if isinstance(row, str) else layout.problem(row, f"{prefix}-{number}")
        if isinstance(problem, str):
            tally.malformed.append((number, problem))
            continue
        if layout.repeats:
            digest = hashlib.blake2b(problem.prompt.encode(), digest_size=16).digest()
            answer, earlier = answers.setdefault(digest, (problem.answer, number))
            if earlier != number:
                if answer == problem.answer:
                    tally.duplicates += 1
                else:
                    tally.malformed.append((number, f"repeats the problem of row {earlier} with another answer"))
                continue
        if problem.id in ids:
            tally.malformed.append((number, f"id {problem.id!r} repeats that of an earlier row"))
            continue
        ids.add(problem.id)
        tally.kept += 1
        yield problem


# --- files ---


def numbered_rows(files: Sequence[Path], columns: tuple[str, ...] | None) -> Iterator[tuple[int, Row | str]]:
    """Yield (row number from 1, the row or what is wrong with it) through all `files`, read in pieces.

    Raises:
        ValueError: for a file that cannot be read as what its name says, or that lacks `columns`.
    """
    pieces = (_READERS.get(file.suffix, _jsonl_rows)(file, columns) for file in files)
    yield from ((number, row) for number, row in enumerate(itertools.chain.from_iterable(pieces), 1) if row != "")


def count_rows(files: Sequence[Path]) -> int | None:
    """Count the rows of parquet files; None for other files, which do not tell."""
    if any(file.suffix != ".parquet" for file in files):
        return None
    import pyarrow
    import pyarrow.parquet

    try:
        return sum(pyarrow.parquet.read_metadata(file).num_rows for file in files)
    except (pyarrow.ArrowException, OSError):
        return None  # reading it will say why


def _parquet_rows(path: Path, columns: tuple[str, ...] | None) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        # Memory-mapped and in small batches: the first rows cost the first pages only.
        with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
            there = file.schema_arrow.names
            if any(column not in there for column in columns or ()):
                raise ValueError(
                    f"{path}: expected columns {', '.join(columns or ())}, got {', '.join(there)}: "
                    "use a file in the official layout"
                )
            for batch in file.iter_batches(batch_size=256, columns=columns):
                narrow = {field.name: field.type for field in batch.schema if _is_narrow(field.type)}
                for row in batch.to_pylist():
                    yield row | {name: _own_digits(kind, row[name]) for name, kind in narrow.items()}
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: expected a readable parquet file, got {error}: download it again") from error


def _is_narrow(kind: Any) -> bool:
    """Whether a parquet type is, or holds, a float of less than 64 bits."""
    import pyarrow.types

    if pyarrow.types.is_struct(kind):
        return any(_is_narrow(field.type) for field in kind)
    return pyarrow.types.is_float32(kind) or pyarrow.types.is_float16(kind)


def _own_digits(kind: Any, value: Any) -> Any:
    """Widen a float to the one with the fewest digits in its own width: 0.1, not 0.10000000149011612."""
    import pyarrow.types

    if value is None or not _is_narrow(kind):
        return value
    if pyarrow.types.is_struct(kind):
        return {field.name: _own_digits(field.type, value[field.name]) for field in kind}
    return float(str((np.float32 if pyarrow.types.is_float32(kind) else np.float16)(value)))


def _csv_rows(path: Path, columns: tuple[str, ...] | None) -> Iterator[Row]:
    del columns
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a readable CSV file, got {error}: download it again") from error


def _jsonl_rows(path: Path, columns: tuple[str, ...] | None) -> Iterator[Row | str]:
    """Yield a row per line; "" for an empty line. A byte-order mark may open a line: files are joined with theirs."""
    del columns
    with path.open("rb") as file:
        for line in file:
            if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise ValueError(f"{path}: expected JSON lines in UTF-8, got UTF-16 or UTF-32: save the file as UTF-8")
            try:
                text = line.removeprefix(codecs.BOM_UTF8).decode("utf-8")
                row = json.loads(text) if text.strip() else ""
            except (ValueError, RecursionError) as error:
                row = f"not JSON ({error})"
            else:
                row = row if row == "" or isinstance(row, dict) else "not an object"
            yield row


_READERS: dict[str, Callable[[Path, tuple[str, ...] | None], Iterator[Row | str]]] = {
    ".parquet": _parquet_rows,
    ".csv": _csv_rows,
}
"""By the end of the file's name; others are JSON lines."""


# --- rows ---


def fields(problem: Sequence[str], answer: Sequence[str], *, own: bool = False) -> Callable[[Row, str], Problem | str]:
    """Return a reader of rows: text and answer stand under the first of these names that a row has.

    `own` is for a user's files: the text is taken as it stands, instructions and all; a list of {role, content} is a
    conversation, which the user's message ends; the other columns are kept.
    """
    identity = ("id",) if own else ("unique_id", "id")

    def read(row: Row, default_id: str) -> Problem | str:
        asked = [next((row[name] for name in names if name in row), None) for names in (problem, answer)]
        found = next((row[name] for name in identity if name in row), default_id)
        if not own:
            return _checked(found, bare(asked[0]) if isinstance(asked[0], str) else asked[0], asked[1])
        messages = _messages(asked[0]) if isinstance(asked[0], list) else [("user", asked[0])]
        if isinstance(messages, str):
            return messages
        checked = _checked(found, messages[-1][1], asked[1])
        if isinstance(checked, str):
            return checked
        others = {name: value for name, value in row.items() if name not in (*problem, *answer)}
        return checked._replace(row=others, before=tuple(messages[:-1]))

    return read


def _messages(found: list[Any]) -> list[tuple[str, str]] | str:
    """The (role, content) of a conversation up to its last message, the user's; or what is wrong with it."""
    messages: list[tuple[str, str]] = []
    for at, message in enumerate(found):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role not in ROLES or not isinstance(content, str) or not content.strip():
            return f"message {at + 1} of the problem is not {{role: {' | '.join(ROLES)}, content: a text}}"
        if role == "system" and at:
            return f"message {at + 1} of the problem is the system's, which must come first"
        if _HALF.search(content):
            return f"message {at + 1} of the problem has half a character (a lone surrogate)"
        messages.append((role, content))
    if not messages or messages[-1][0] != "user":
        return "the problem's last message is not the user's"
    return messages


def _checked(identity: Any, prompt: Any, answer: Any) -> Problem | str:
    """Build a problem of three texts (an id or answer may be a number), or say what is wrong with them."""
    for what, value in (("id", identity), ("answer", answer)):
        if isinstance(value, float) and not math.isfinite(value):
            return f"{what} is {value}, not a finite number"
    texts = [_digits(value) if type(value) in (int, float) else value for value in (identity, answer)]
    for what, value in (("id", texts[0]), ("problem", prompt), ("answer", texts[1])):
        if not isinstance(value, str) or not value.strip():
            return f"{what} is missing, empty or not a text"
        if _HALF.search(value):
            return f"{what} has half a character (a lone surrogate)"
    return Problem(texts[0], prompt, texts[1].strip())


def _digits(value: int | float) -> str:
    """Write a finite number in plain digits, as few as mean it: 4.0 is 4, 5e-05 is 0.00005."""
    return str(value) if isinstance(value, int) else np.format_float_positional(value + 0.0, trim="-")  # -0.0 is 0


def _dapo(row: Row, default_id: str) -> Problem | str:
    del default_id
    messages, reward_model, extra = row.get("prompt"), row.get("reward_model"), row.get("extra_info")
    if not isinstance(messages, list) or len(messages) != 1 or not isinstance(messages[0], dict):
        return "prompt is not a list of one message"
    if not isinstance(reward_model, dict) or not isinstance(extra, dict):
        return "reward_model or extra_info is not a record"
    text = messages[0].get("content")
    text = bare(text) if isinstance(text, str) else text
    return _checked(extra.get("index"), text, reward_model.get("ground_truth"))


def _aime_2024(row: Row, default_id: str) -> Problem | str:
    """Read a row whose answer is a `solution` of one box, as in the official file, or bare, as in others."""
    boxed = re.fullmatch(r"\s*\\boxed\{(\d+)\}\s*", str(row.get("solution")))
    return _MATH(row | {"answer": boxed[1]} if boxed else row, default_id)


def _gsm8k(row: Row, default_id: str) -> Problem | str:
    worked, mark, gold = str(row.get("answer")).rpartition("####")
    if not mark or not worked.strip():
        return "answer has no ####"
    return _checked(default_id, row.get("question"), gold.replace(",", ""))


def _gpqa(row: Row, default_id: str) -> Problem | str:
    """Put the four answers as options A to D, in an order that the row's id settles; gold is the right one's letter."""
    columns = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    options, question = [row.get(column) for column in columns], row.get("Question")
    for what, value in zip(("Question", *columns), (question, *options), strict=True):
        if not isinstance(value, str) or not value.strip():
            return f"{what} is missing or empty"
    identity = row.get("Record ID") or default_id
    order = np.random.default_rng(zlib.crc32(str(identity).encode())).permutation(4)
    lines = [f"{letter}) {str(options[at]).strip()}" for letter, at in zip("ABCD", order, strict=True)]
    text = "\n".join([f"{str(question).strip()}\n", *lines, "\nAnswer with the letter of the right option."])
    return _checked(identity, text, "ABCD"[int(np.flatnonzero(order == 0)[0])])


_MATH = fields(("problem", "question", "prompt"), ("expected_answer", "answer"))
_TEST = {"test": ("test.jsonl", "test*.parquet")}

LAYOUTS: dict[str, Layout] = {
    "dapo_math_17k": Layout(
        {"train": ("*.parquet",)},
        _dapo,
        hub="BytedTsinghua-SIA/DAPO-Math-17k",
        columns=("prompt", "reward_model", "extra_info"),
        repeats=True,
    ),
    "math_500": Layout(_TEST, _MATH, hub="HuggingFaceH4/MATH-500", sizes={"test": 500}),
    "aime_2024": Layout(_TEST, _aime_2024, hub="math-ai/aime24", sizes={"test": 30}),
    "aime_2025": Layout(_TEST, _MATH, hub="math-ai/aime25", sizes={"test": 30}),
    "aime_2026": Layout(_TEST, _MATH, sizes={"test": 30}),
    "olymmath_en": Layout(
        {"easy": ("*EN-EASY.jsonl",), "hard": ("*EN-HARD.jsonl",)},
        _MATH,
        hub="RUC-AIBOX/OlymMATH",
        sizes={"easy": 100, "hard": 100},
    ),
    "gsm8k": Layout(
        {
            "train": ("main/train-*.parquet", "train.jsonl", "train-*.parquet"),
            "test": ("main/test-*.parquet", "test.jsonl", "test-*.parquet"),
        },
        _gsm8k,
        hub="openai/gsm8k",
        sizes={"train": 7_473, "test": 1_319},
    ),
    "gpqa": Layout({"main": ("gpqa_main.csv",)}, _gpqa, hub="Idavidrein/gpqa", sizes={"main": 448}),
}
"""Another published data set is another entry."""
