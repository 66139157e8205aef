"""The documentation says what the code does: settings, functions, test files, the README's example."""

import dataclasses
import importlib.util
import inspect
import json
import re
import types
import typing
from pathlib import Path

from tsopsd_jax.config import Config, DataSettings, EvaluationSettings, strict
from tsopsd_jax.objectives import OBJECTIVES

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _documented(cls: type, prefix: str):
    """(key, type, default) of every setting, as docs/configuration.md writes them."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        options = (
            [a for a in typing.get_args(hint) if a is not type(None)] if type(None) in typing.get_args(hint) else [hint]
        )
        inner, key = options[0], f"{prefix}{field.name}"
        if typing.get_origin(inner) is tuple and dataclasses.is_dataclass(typing.get_args(inner)[0]):
            yield from _documented(typing.get_args(inner)[0], f"{key}[].")
            continue
        if dataclasses.is_dataclass(inner):
            if len(options) != len(typing.get_args(hint) or options):
                yield key, "group", "null"
            if inner is not DataSettings or key == "data":
                yield from _documented(typing.cast(type, inner), f"{key}.")
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if key.startswith("evaluation.sampling."):
            default = vars(EvaluationSettings().sampling)[field.name]
        shown = "required" if default is dataclasses.MISSING else json.dumps(default).strip('"')
        kinds = typing.get_args(inner) if isinstance(inner, types.UnionType) else [inner]
        yield key, ", ".join((typing.get_origin(kind) or kind).__name__ for kind in kinds), shown


def test_every_setting_is_documented():
    table = read(DOCS / "configuration.md").split("\n## Settings")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| `([^`]+)` \|", table, flags=re.MULTILINE)
    documented = {key: f"{kind}, default {default}" for key, kind, default in rows}
    expected = {key: f"{kind}, default {default}" for key, kind, default in _documented(Config, "")}
    assert len(expected) > 50
    assert strict.first_difference(expected, documented) is None


def test_every_hyperparameter_is_documented():
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| `([^`]+)` \|", read(DOCS / "configuration.md"), flags=re.MULTILINE)
    expected = {
        (name, parameter.name, str(parameter.default))
        for name, factory in OBJECTIVES.items()
        for parameter in inspect.signature(factory).parameters.values()
    }
    assert set(rows) == expected


def test_paper_to_code_names_what_exists():
    text = read(DOCS / "paper_to_code.md")
    modules = "head|losses|advantages|judge|learn|train|objectives|evaluation|rollout|rewards"
    functions = set(re.findall(rf"`((?:{modules})(?:\.[a-z_]+)*\.\w+)`", text))
    assert len(functions) > 10
    for function in functions:
        module, _, name = function.rpartition(".")
        known = vars(importlib.import_module(f"tsopsd_jax.{module}"))
        assert name in known or importlib.util.find_spec(f"tsopsd_jax.{function}"), function
    tests = set(re.findall(r"`(tests/\w+\.py)`", text))
    assert len(tests) > 5
    assert [t for t in sorted(tests) if not (ROOT / t).is_file()] == []


def test_readme_is_short_and_shows_the_example_as_it_is():
    text = read(ROOT / "README.md")
    assert len(text.splitlines()) <= 150
    shown = text.split("```python\n")[1].split("```")[0]
    example = read(ROOT / "examples" / "entropy_bonus.py")

    def code(source: str) -> list[str]:
        lines = [re.sub(r"\s+#.*", "", line) for line in source[source.index("def dapo_with_entropy") :].splitlines()]
        return [line for line in lines if line.strip() and '"""' not in line]

    assert code(shown) == code(example)
