"""Files of responses that commands read: what `tsopsd generate` and `tsopsd eval` write, or anybody's prompts and
responses."""

from pathlib import Path
from typing import Any, NamedTuple

from tsopsd_jax.analysis.batches import Answered
from tsopsd_jax.data import Tokenizer
from tsopsd_jax.rundir import files


class Responses(NamedTuple):
    """The responses of a file, and how many of them were encoded anew: their tokens may not be those that were
    sampled."""

    answered: list[Answered]
    encoded_again: int

    @property
    def note(self) -> str:
        """A sentence for a caption; empty where all tokens are those that were sampled."""
        if not self.encoded_again:
            return ""
        return (
            f" {self.encoded_again} of {len(self.answered)} responses have no ids in the file and were encoded again."
        )


def read_responses(path: Path, tokenizer: Tokenizer, *, vocab_size: int, first: int | None = None) -> Responses:
    """Read the lines of a file of responses.

    A line has `prompt_ids` and `response_ids`; or `prompt` and `response` as text, which are encoded, with a stop token
    unless the line says `"stopped": false`.

    Args:
        vocab_size: entries of the model, which may draw ids that the tokenizer has no token for.
        first: the first N lines only; None: all.

    Raises:
        ValueError: no such file, no lines, a line that has neither; names the line.
    """
    if not path.is_file():
        raise ValueError(f"--responses: expected a file of JSON lines, got {path}: no such file")
    answered, again = list[Answered](), 0
    for number, row in enumerate(files.read_objects(path)[:first], start=1):
        try:
            one = _ids(row)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: expected lists of token ids ({error})") from error
        if one is None:
            if not isinstance(row.get("prompt"), str) or not isinstance(row.get("response"), str):
                raise ValueError(
                    f"{path}, line {number}: expected prompt_ids and response_ids, or prompt and response as text, got "
                    f"{', '.join(row)}; sample them anew with tsopsd generate"
                )
            one, again = _encode(row, tokenizer), again + 1
        if max(*one.prompt, *one.response, 0) >= vocab_size:
            raise ValueError(f"{path}, line {number}: a token id is beyond the model's {vocab_size} entries")
        answered.append(one)
    if not answered:
        raise ValueError(f"{path}: expected at least one response")
    return Responses(answered, again)


def _ids(row: dict[str, Any]) -> Answered | None:
    if "prompt_ids" not in row or "response_ids" not in row:
        return None
    return Answered([int(i) for i in row["prompt_ids"]], [int(i) for i in row["response_ids"]])


def _encode(row: dict[str, Any], tokenizer: Tokenizer) -> Answered:
    response = tokenizer.backend.encode(row["response"], add_special_tokens=False).ids
    stop = [] if row.get("stopped") is False else [tokenizer.stop_ids[0]]
    return Answered(tokenizer.encode(row["prompt"]), [*response, *stop])
