"""Configurations that say only how they differ from another: `extends: base.yaml`, merged as JSON Merge Patch (RFC
7396) does, with lists of named items changed by name."""

import re
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


def located(message: str, data: Any, sources: list[ConfigFile]) -> str:
    """Add the file and line that last set what a message names at its beginning, such as `phases.0.stop.steps: ...`.

    Args:
        message: of an error; returned as it is where no file sets that key.
        data: the merged data, in which the indices of items are looked up; None: the message has names.
        sources: the files, the one that extends first.
    """
    match = re.match(r"[\w.-]+(?=: )", message)
    keys = match[0].split(".") if match else []
    for source in sources if keys else []:
        line = strict.line_of(source.text, keys, _names(keys, data))
        if line is not None:
            return f"{message} ({source.path.name}, line {line})"
    return message


def _names(keys: list[str], data: Any) -> list[str]:
    """The keys with the names of list items for their indices, where they have one."""
    found = []
    for key in keys:
        name = key
        if isinstance(data, list) and key.isdecimal() and int(key) < len(data):
            data = data[int(key)]
            name = str(data.get("name", key)) if isinstance(data, dict) else key
        else:
            data = data.get(key) if isinstance(data, dict) else None
        found.append(name)
    return found
