"""Configurations that say only how they differ from another: `extends: base.yaml`, merged as JSON Merge Patch (RFC
7396) does, with lists of named items changed by name."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tsopsd_jax.config import strict

EXTENDS = "extends"


class ConfigFile(NamedTuple):
    """A file that a configuration was read from."""

    path: Path
    text: str


def read(path: Path) -> tuple[Any, list[ConfigFile]]:
    """Read a configuration and what it extends.

    Returns:
        (plain data, merged; the files, `path` first and its base after it).

    Raises:
        ValueError: a missing file, one that is no YAML 1.2, a file that extends itself, a change of what is not there.
    """
    sources: list[ConfigFile] = []
    layers: list[Any] = []
    following: Path | None = path
    while following is not None:
        sources.append(_source(following, sources))
        try:
            data = strict.parse(sources[-1].text)
        except ValueError as error:
            raise ValueError(f"configuration {following}: not valid YAML: {error}") from error
        layers.append(data)
        following = _base(following, data)
    merged = layers.pop()
    for source, changes in zip(reversed(sources[:-1]), reversed(layers), strict=True):
        try:
            merged = merge(merged, changes)
        except ValueError as error:
            raise ValueError(f"configuration {source.path}: {located(str(error), None, [source])}") from error
    return merged, sources


def _source(path: Path, below: list[ConfigFile]) -> ConfigFile:
    chain = [source.path for source in below]
    asked = f" (asked for by {chain[-1]})" if chain else ""
    if path.resolve() in [each.resolve() for each in chain]:
        raise ValueError(
            f"configuration {chain[0]}: extends comes back to a file of the chain "
            f"({' -> '.join(str(each) for each in [*chain, path])}); end it with a file that extends none"
        )
    if not path.is_file():
        raise ValueError(f"configuration {path}: no such file{asked}")
    try:
        return ConfigFile(path, path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"configuration {path}: not valid YAML: {error}") from error


def _base(path: Path, data: Any) -> Path | None:
    """Take `extends` out of `data`: the file that it names, relative to `path`; None: none."""
    if not isinstance(data, dict) or EXTENDS not in data:
        return None
    base = data.pop(EXTENDS)
    if not isinstance(base, str) or not base:
        raise ValueError(f"configuration {path}: extends: expected the path of one YAML file, got {base!r}")
    return path.parent / strict.at_home(base)


def merge(base: Any, changes: Any, where: str = "") -> Any:
    """Apply `changes` to plain data, which stays as it is.

    Mappings are merged key by key. null removes what is there, so that its default holds. A list whose items have a
    `name` may be given as a mapping from names to their changes; null leaves that item out. Everything else replaces
    what was there.

    Raises:
        ValueError: a key or an item to be removed or changed is not there; the message begins with the place.
    """
    if not isinstance(changes, dict):
        return changes
    if isinstance(base, list):
        return _merge_named(base, changes, where)
    merged = dict(base) if isinstance(base, dict) else {}
    for key, change in changes.items():
        here = f"{where}.{key}" if where else str(key)
        if change is not None:
            merged[key] = merge(merged.get(key), change, here)
        elif key in merged:
            del merged[key]
        else:
            raise ValueError(
                f"{here}: expected a key to remove (null), got none of that name in the base; drop the line"
            )
    return merged


def _merge_named(base: list[Any], changes: dict[Any, Any], where: str) -> list[Any]:
    names = [item.get("name") if isinstance(item, dict) else None for item in base]
    for name in changes:
        if name not in names:
            known = ", ".join(str(each) for each in names)
            raise ValueError(
                f"{where}.{name}: expected the name of an item of the base ({known}); give the whole list to add one"
            )
    merged = []
    for name, item in zip(names, base, strict=True):
        if name not in changes:
            merged.append(item)
        elif changes[name] is not None:
            merged.append(merge(item, changes[name], f"{where}.{name}"))
    return merged


def located(message: str, data: Any, sources: list[ConfigFile], overrides: Sequence[str] = ()) -> str:
    """Say what a message names at its beginning, such as `phases.0.stop.steps: ...`, by the names of its items, and add
    what set it last: the file and its line, or `--set`.

    Args:
        message: of an error; returned as it is where it begins with no key.
        data: the merged data, in which the indices of items are looked up; None: the message has names.
        sources: the files, the one that extends first.
        overrides: `a.b=value`, applied after the files.
    """
    match = re.match(r"[\w.-]+(?=: )", message)
    if match is None:
        return message
    keys = match[0].split(".")
    names = strict.names_along(keys, data)
    message = ".".join(names) + message[match.end() :]
    for assignment in overrides:
        path = assignment.partition("=")[0]
        changed = strict.names_along(path.split("."), data)
        if changed == names[: len(changed)]:
            return f"{message} (from --set {path})"
        if names == changed[: len(names)]:
            return message  # a group with a value of another origin: no line is to blame alone
    for source in sources:
        line = strict.line_of(source.text, keys, names)
        if line is not None:
            return f"{message} ({source.path.name}, line {line})"
    return message
