"""Text <-> token ids, and which ids end a sequence, from the files of a Hugging Face model directory."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int

from tsopsd_jax import huggingface
from tsopsd_jax.data.chat import CHATS, read_frame


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer that transformers read, as its `tokenizers` backend, with the stop ids that its directory tells."""

    backend: tokenizers.Tokenizer
    stop_ids: tuple[int, ...]
    """Ids that end a response, the first being the one to append to training text."""
    vocab_size: int
    """Highest token id + 1, added tokens included; a model's (padded) vocabulary may be larger."""
    frame: Callable[[tuple[str, ...]], list[list[int]]] | None = None
    """Roles of a conversation that the user's message ends -> ids before, between and after its texts; None:
    no chat."""
    special_ids: frozenset[int] = frozenset()
    """Ids that no prompt's text may become, nor a response's text show."""

    @classmethod
    def load(cls, directory: str | Path, *, chat: str = "none") -> "Tokenizer":
        """Read a directory's tokenizer, its stop ids and, unless `chat` (one of `chat.CHATS`) is none, its chat turn.

        Stop ids are `eos_token_id` of generation_config.json, else of config.json, else the id of the tokenizer's
        `eos_token`: the order in which a model's own generation settles it. In a chat the token that ends an
        assistant's turn is one of them, the first: a base model's files do not name it.

        tokenizer.json is read as it stands, with the tokens that other files add to it, whatever class the directory
        names: some classes replace its splitting of text by their own. Truncation and padding in it are a past call's,
        and left aside.

        Raises:
            ValueError: if the directory or tokenizer.json is missing or unreadable, no stop token is declared or it is
                no token, or a chat is asked of a directory without a usable template.
        """
        if chat not in CHATS:
            raise ValueError(f"chat: expected one of {', '.join(CHATS)}, got {chat!r}")
        folder = Path(directory)
        if not folder.is_dir():
            raise ValueError(f"tokenizer: expected a model directory, got {folder}: no such directory")
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(
                f"tokenizer: expected {path}, found none: name a Hugging Face model directory that has one"
            )
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
            _read_if_there(folder / name)  # names the file if it is damaged
        with huggingface.reading(f"tokenizer: cannot read {path}") as transformers:
            theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        backend, used = theirs.backend_tokenizer, []
        backend.no_truncation()
        backend.no_padding()
        stop_ids, added = _declared(folder) or _eos(folder, theirs), backend.get_added_tokens_decoder()

        @functools.cache
        def frame(roles: tuple[str, ...]) -> list[list[int]]:
            """The ids around the texts of messages of these roles, their special tokens read as such."""
            texts = read_frame(theirs, folder, roles, thinking=chat == "thinking")
            outside, backend.encode_special_tokens = backend.encode_special_tokens, False
            pieces = [_encode(backend, text).ids for text in texts]
            backend.encode_special_tokens = outside
            _check_ids(folder, {str(added[token]) for piece in pieces for token in piece if token in added})
            return pieces

        if chat != "none":
            *_, end = read_frame(theirs, folder, ("user", "assistant"), thinking=chat == "thinking")
            end = _encode(backend, end).ids
            stop_ids = tuple(dict.fromkeys((*[token for token in end if token in added][:1], *stop_ids)))
            used = [token for piece in frame(("user",)) for token in piece]
        if absent := [token for token in stop_ids if backend.id_to_token(token) is None]:
            raise ValueError(f"tokenizer: expected stop tokens of {path}, got eos_token_id {absent[0]}, which it lacks")
        _check_ids(folder, {str(added[token]) for token in (*used, *stop_ids) if token in added})
        # Whatever the directory calls them: their text is left out of responses, and stands in none of a problem's ids.
        backend.add_special_tokens([backend.id_to_token(token) for token in stop_ids])
        special = {token for token, entry in backend.get_added_tokens_decoder().items() if entry.special}
        # From here on a special token's name in a problem is text like any other: no problem can end a turn.
        backend.encode_special_tokens = True
        return cls(
            backend,
            stop_ids,
            vocab_size=max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1,
            frame=None if chat == "none" else frame,
            special_ids=frozenset({*special, *stop_ids} - {theirs.unk_token_id}),
        )

    def encode(self, text: str, before: Sequence[tuple[str, str]] = ()) -> list[int]:
        """Encode a prompt: `text` in the chat turn if there is one, else with what the tokenizer adds (Qwen3: nothing).

        In a turn texts are stripped, so that they do not fuse with the template's line ends.

        Args:
            text: of the user's message.
            before: (role, content) of the messages before it.

        Raises:
            ValueError: if there are messages before and no chat, the tokenizer has no token for a part of a text, or a
                part of it is the name of a special token that the vocabulary has as a word.
        """
        if self.frame is None:
            if before:
                raise ValueError(
                    f"tokenizer: expected a chat for a prompt of {len(before) + 1} messages, got none: set data.chat"
                )
            return self._text(text, add=True)
        first, *others = self.frame((*(role for role, _ in before), "user"))
        ids = [*first]
        for content, piece in zip((*(content for _, content in before), text), others, strict=True):
            ids += [*self._text(content.strip()), *piece]
        return ids

    def _text(self, text: str, *, add: bool = False) -> list[int]:
        """The ids of a text, of which none is a special token that it names."""
        encoding = _encode(self.backend, text, add=add)
        ids = encoding.ids
        if not self.special_ids.isdisjoint(ids):
            for token, is_added in zip(ids, encoding.special_tokens_mask, strict=True):
                if token in self.special_ids and not is_added:
                    name = self.backend.id_to_token(token)
                    raise ValueError(
                        f"tokenizer: expected a prompt without special tokens, got {name} in {text[:80]!r}"
                    )
        return ids

    def decode(self, ids: Iterable[int] | Int[np.ndarray, " N"]) -> str:
        """Decode `ids`; special tokens (stop, padding) and ids without an entry give no text."""
        return self.backend.decode([int(token) for token in ids], skip_special_tokens=True)

    def check_fits(self, model_vocab_size: int) -> None:
        """Raise ValueError if this tokenizer has ids that a model of `model_vocab_size` entries lacks."""
        if self.vocab_size > model_vocab_size:
            raise ValueError(
                f"tokenizer: expected ids below the model's vocabulary of {model_vocab_size}, but this "
                f"tokenizer has {self.vocab_size} entries: use the tokenizer that belongs to the model"
            )


def _encode(backend: tokenizers.Tokenizer, text: str, *, add: bool = False) -> tokenizers.Encoding:
    try:
        return backend.encode(text, add_special_tokens=add)
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"tokenizer: cannot encode {text[:80]!r}: {error}") from error


def _declared(folder: Path) -> tuple[int, ...]:
    """`eos_token_id` of generation_config.json, else of config.json; empty if neither has one."""
    found = {}
    if (file := folder / "generation_config.json").is_file():
        huggingface.read_json(file)
        with huggingface.reading(f"{file}: cannot be read") as transformers:
            found[file] = transformers.GenerationConfig.from_pretrained(str(folder), local_files_only=True).eos_token_id
    found[folder / "config.json"] = _read_if_there(folder / "config.json").get("eos_token_id")
    for file, declared in found.items():
        if declared is None:
            continue
        stop_ids = tuple(declared) if isinstance(declared, list) else (declared,)
        if not stop_ids or not all(type(token) is int and 0 <= token < 2**31 for token in stop_ids):
            raise ValueError(f"{file}: expected eos_token_id to be ids >= 0 of 32 bits, got {declared!r}")
        return stop_ids
    return ()


def _eos(folder: Path, theirs: Any) -> tuple[int, ...]:
    """The tokenizer's own stop token."""
    if theirs.eos_token is None or _without_id(folder, {theirs.eos_token}):
        raise ValueError(
            f"tokenizer: expected a stop token in {folder} (eos_token_id in generation_config.json or config.json, "
            f"or eos_token in tokenizer_config.json), got eos_token={theirs.eos_token!r}: "
            "without one no response would ever end"
        )
    return (theirs.eos_token_id,)


def _check_ids(folder: Path, names: set[str]) -> None:
    """Raise ValueError for a token without an id in any file, unless the class is the one that is read by."""
    made_up = _without_id(folder, names)
    named = _read_if_there(folder / "tokenizer_config.json").get("tokenizer_class")
    if made_up and named not in ("PreTrainedTokenizerFast", "TokenizersBackend"):
        raise ValueError(
            f"tokenizer: expected an id of {min(made_up)} in tokenizer.json, tokenizer_config.json or "
            f"added_tokens.json of {folder}, got its name alone, which tokenizer_class {named} may number otherwise: "
            f"save the tokenizer again"
        )


def _without_id(folder: Path, names: set[str]) -> set[str]:
    """The names among these to which no file gives an id; transformers takes the next free one."""
    config = _read_if_there(folder / "tokenizer_config.json")
    names = names - _read_if_there(folder / "added_tokens.json").keys()
    names -= {token["content"] for token in config.get("added_tokens_decoder", {}).values()}
    if not names:  # mostly: the large file need not be read again
        return names
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return {name for name in names if backend.token_to_id(name) is None}


def _read_if_there(file: Path) -> dict[str, Any]:
    return huggingface.read_json(file) if file.is_file() else {}
