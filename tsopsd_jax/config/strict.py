"""Strict settings: YAML <-> plain data <-> frozen dataclasses, by their type hints. No defaults live here."""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml

_T = TypeVar("_T")

_TAG = "tag:yaml.org,2002:"
MAX_YAML_VALUES = 1_000_000
"""Values that a YAML document may hold."""
_CORE = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
"""Scalars that are not text: YAML 1.2, 10.3.2. (In 1.1, PyYAML's, 010 is 8, 1:30 is 90, on is true, 1e-6 is text.)"""


class _Loader(yaml.SafeLoader):
    """A loader of YAML 1.2's core schema and merge keys, without repeated keys."""

    yaml_implicit_resolvers: typing.ClassVar[dict] = {}
    yaml_constructors: typing.ClassVar[dict] = {
        tag: yaml.SafeLoader.yaml_constructors[tag]
        for tag in (None, *(_TAG + name for name in ("null", "bool", "str", "seq", "map")))
    }

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:  # as they are written, before merge keys are followed
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise ValueError(
                        f"{key.value!r} is given twice, in lines {lines[key.value]} and {line}; remove one"
                    )
                lines[key.value] = line
        return node

    def compose_document(self) -> Any:
        document = super().compose_document()
        if _written_out(document, {}) > MAX_YAML_VALUES:
            raise ValueError(f"with its anchors written out it holds more than {MAX_YAML_VALUES:,} values; write fewer")
        return document

    def flatten_mapping(self, node: Any) -> None:
        """Follow merge keys: a mapping's own keys win, then the first source's. (PyYAML 6.0.3 confuses equal keys.)"""
        own, merged = [], []
        for key, value in node.value:
            if key.tag != f"{_TAG}merge":
                own.append((key, value))
                continue
            for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if not isinstance(source, yaml.MappingNode):
                    raise ValueError(f"line {key.start_mark.line + 1}: expected a mapping or several after <<")
                self.flatten_mapping(source)
                merged.append(source.value)
        node.value = [pair for pairs in reversed(merged) for pair in pairs] + own


def _written_out(node: Any, known: dict[Any, int]) -> int:
    """Count the values of a YAML node with a copy of an anchor's wherever it is named: nine lines may be a billion."""
    if node not in known:
        children = node.value if isinstance(node, yaml.SequenceNode | yaml.MappingNode) else []
        pairs = isinstance(node, yaml.MappingNode)
        known[node] = 1  # of one that holds itself, which is refused later
        known[node] = 1 + sum(
            _written_out(each, known) for child in children for each in (child if pairs else (child,))
        )
    return known[node]


class _Dumper(yaml.SafeDumper):
    """A dumper that quotes what YAML 1.1 or 1.2 would not read as text."""


def _integer(loader: yaml.SafeLoader, node: Any) -> int:
    text = loader.construct_scalar(node)
    return int(text, 0 if text[1:2] in ("o", "x") else 10)


def _float(loader: yaml.SafeLoader, node: Any) -> float:
    return float(re.sub(r"\.(inf|nan)", r"\1", loader.construct_scalar(node).lower()))


for _name, _pattern in _CORE.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), None)
_Loader.add_implicit_resolver(f"{_TAG}merge", re.compile(r"<<\Z"), None)
_Loader.add_constructor(f"{_TAG}int", _integer)
_Loader.add_constructor(f"{_TAG}float", _float)


def parse(text: str) -> Any:
    """Read the plain data of a YAML document (version 1.2); what its anchors share becomes separate.

    Raises:
        ValueError: it is none, or gives a key twice.
    """
    try:
        return plain(yaml.load(text, Loader=_Loader))
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply, or holds itself") from error


def read_yaml(file: Path) -> Any:
    """Parse a file in UTF-8.

    Raises:
        ValueError: as `parse` does, or other bytes; the file is not named.
    """
    return parse(file.read_text(encoding="utf-8"))


def line_of(text: str, keys: Sequence[str], names: Sequence[str]) -> int | None:
    """Find the line (from 1) of a key in a YAML document; None: it is not there.

    Args:
        keys: the way to it, such as `phases`, `0`, `stop`; an item of a list by its index.
        names: the same, where items of a list are written as a mapping from their names.
    """
    node, line = yaml.compose(text, Loader=_Loader), None
    for key, name in zip(keys, names, strict=True):
        if isinstance(node, yaml.SequenceNode):
            if not (key.isdecimal() and int(key) < len(node.value)):
                return None
            node = node.value[int(key)]
            line = node.start_mark.line + 1
        elif isinstance(node, yaml.MappingNode):
            pairs = [(k, v) for k, v in node.value if k.value in (key, name)]
            if not pairs:
                return None
            line, node = pairs[0][0].start_mark.line + 1, pairs[0][1]
        else:
            return None
    return line


def names_along(keys: Sequence[str], data: Any) -> list[str]:
    """Put the names of items for their indices in a way into plain data, such as `phases`, `0`, `stop`."""
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


def dump(data: Any) -> str:
    """Write plain data as YAML, which `parse` and readers of YAML 1.1 read alike."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False)


def build(cls: type[_T], data: Any, *, where: str = "") -> _T:
    """Build an instance of the dataclass `cls` from nested plain data.

    Raises:
        ValueError: an unknown key (with the nearest known one), a missing key, a value of the wrong type; one line that
            names the place, such as `phases.0.optimizer.learning_rate`. (A group of settings may be null: its default.)
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
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if name in data and not (data[name] is None and not required and _is_mapping(hints[name])):
            values[name] = _convert(hints[name], data[name], _join(where, name))
        elif required:
            raise ValueError(f"{_join(where, name)}: expected a value, got none; set it")
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from error


def _is_mapping(hint: Any) -> bool:
    """Whether a setting is a group of settings, whose null is its default."""
    return dataclasses.is_dataclass(hint) or typing.get_origin(hint) is dict


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        kinds = [a for a in args if a is not type(None)]
        groups = [a for a in kinds if (typing.get_origin(a) is dict) == isinstance(value, Mapping)]
        return _convert((groups or kinds)[0], value, where)
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
    elif hint is str and isinstance(value, str):
        return at_home(value)
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ValueError(f"{where}: expected {hint.__name__}, got {value!r} ({type(value).__name__})")


def at_home(text: str) -> str:
    """Put the user's folder for a path's first `~`, as a shell does; in a list with commas for each."""
    try:
        return re.sub(r"(?:(?<=^)|(?<=,))~(?=/|,|$)", lambda _: str(Path.home()), text)
    except RuntimeError as error:
        raise ValueError(
            f"{text}: expected HOME to name the user's folder, got none ({error}); write the path out"
        ) from error


def _number_if_text(value: Any) -> Any:
    """Read text that is a number, in quotes or left so by a reader of YAML 1.1 (1e-6), as the number people mean."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def override(data: Any, assignment: str) -> None:
    """Apply one `a.b.0.c=value` (value in YAML) to nested plain data, in place; an item may be called by its `name`,
    and null leaves it out.

    Raises:
        ValueError: no `=`, or a path that does not lead anywhere. (Unknown last keys are found by `build`.)
    """
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise ValueError(f"--set expects a.b=value, got {assignment!r}")
    try:
        value = parse(text)
    except ValueError as error:
        raise ValueError(f"--set {path}: {text!r} is not a YAML value: {error}") from error
    *parents, last = path.split(".")
    node = data
    for depth, key in enumerate([*parents, last]):
        here = ".".join(path.split(".")[: depth + 1])
        final = depth == len(parents)
        if isinstance(node, list):
            at = _position(node, key, here)
            if not final:
                node = node[at]
            elif value is None and isinstance(node[at], dict):
                del node[at]
            else:
                node[at] = value
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


def _position(items: list[Any], key: str, here: str) -> int:
    """Find the place in a list of `key`: an index, or the name of an item."""
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if key.isdecimal() and int(key) < len(items):
        return int(key)
    if key in names:
        return names.index(key)
    known = ", ".join(str(name) for name in names if name is not None)
    raise ValueError(
        f"--set {here}: expected an index 0 to {len(items) - 1}, got {key!r}{f'; or a name: {known}' if known else ''}"
    )


def plain(value: Any) -> Any:
    """Turn dataclasses into nested dicts, lists and scalars, from which `build` makes them again."""
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
        """Say `key: old sign new`."""
        return f"{self.key}: {self.old!r} {sign} {self.new!r}"


def differences(a: Any, b: Any, where: str = "") -> Iterator[Difference]:
    """Find every place where two trees of plain data differ, in the order of `a`."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(k for k in b if k not in a)]:
            yield from differences(a.get(key), b.get(key), _join(where, key))
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from differences(x, y, _join(where, i))
    elif a != b:
        yield Difference(where, a, b)


def first_difference(a: Any, b: Any) -> str | None:
    """Name the first place where two trees of plain data differ, `path: a != b`; None: nowhere."""
    return next((found.words("!=") for found in differences(a, b)), None)
