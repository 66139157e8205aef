"""Strict settings: plain data <-> frozen dataclasses, by their type hints. No defaults live here."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import yaml

T = TypeVar("T")


def build(cls: type[T], data: Any, *, where: str = "") -> T:
    """An instance of the dataclass `cls` from nested plain data.

    Raises:
        ValueError: an unknown key (with the nearest known one), a missing key, a value of the wrong type; one line that
            names the place, such as `phases.0.optimizer.learning_rate`.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{where or 'the configuration'}: expected a mapping of settings, got {data!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType] - T is a dataclass
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(fields)}"
            raise ValueError(f"{_join(where, key)}: unknown key; {hint}")
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _convert(hints[name], data[name], _join(where, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{_join(where, name)}: expected a value, got none; set it")
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from error


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where=where)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ValueError(f"{where}: expected a list, got {value!r}")
        return tuple(_convert(args[0], item, _join(where, i)) for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}: expected a mapping, got {value!r}")
        return {str(k): _number_if_text(v) for k, v in value.items()}
    if hint is float:
        value = _number_if_text(value)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ValueError(f"{where}: expected {hint.__name__}, got {value!r} ({type(value).__name__})")


def _number_if_text(value: Any) -> Any:
    """YAML 1.1 reads 1e-6 as text; people mean the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def override(data: Any, assignment: str) -> None:
    """Apply one `a.b.0.c=value` (value in YAML) to nested plain data, in place.

    Raises:
        ValueError: no `=`, or a path that does not lead anywhere. (Unknown last keys are found by `build`.)
    """
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise ValueError(f"--set expects a.b=value, got {assignment!r}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {path}: {text!r} is not a YAML value") from error
    *parents, last = path.split(".")
    node = data
    for depth, key in enumerate([*parents, last]):
        here = ".".join(path.split(".")[: depth + 1])
        final = depth == len(parents)
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise ValueError(f"--set {here}: expected an index 0 to {len(node) - 1}, got {key!r}")
            if final:
                node[int(key)] = value
            else:
                node = node[int(key)]
        elif isinstance(node, dict):
            if final:
                node[key] = value
            else:
                if node.get(key) is None:
                    node[key] = {}
                node = node[key]
        else:
            parent = ".".join(path.split(".")[:depth]) or "the configuration"
            raise ValueError(f"--set {here}: {parent} is a value, not a group of settings")


def plain(value: Any) -> Any:
    """The reverse of `build`: nested dicts, lists and scalars."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(vars(value)[f.name]) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return value


class Difference(NamedTuple):
    """A place where two trees of plain data differ."""

    key: str
    old: Any
    new: Any

    def words(self, sign: str) -> str:
        """`key: old sign new`."""
        return f"{self.key}: {self.old!r} {sign} {self.new!r}"


def differences(a: Any, b: Any, where: str = "") -> Iterator[Difference]:
    """Every place where two trees of plain data differ, in the order of `a`."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(k for k in b if k not in a)]:
            yield from differences(a.get(key), b.get(key), _join(where, key))
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from differences(x, y, _join(where, i))
    elif a != b:
        yield Difference(where, a, b)


def first_difference(a: Any, b: Any) -> str | None:
    """The first place where two trees of plain data differ, `path: a != b`, or None."""
    return next((found.words("!=") for found in differences(a, b)), None)
