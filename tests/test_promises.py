"""docs/reliability.md and docs/security.md name tests and files that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "docs" / name for name in ("reliability.md", "security.md")]


def functions_of(file: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}


def test_each_promise_names_a_test_that_exists():
    text = PAGES[0].read_text(encoding="utf-8")
    rows = [row for row in text.split("\n## ")[0].splitlines() if row.startswith("| ")][1:]
    assert len(rows) > 15
    for row in rows:
        named = re.findall(r"`(tests/\w+\.py)::(\w+)`", row)
        assert named, f"no test holds: {row}"
        for file, test in named:
            assert test in functions_of(ROOT / file), f"{file} has no {test}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`?\b((?:tests|scripts|benchmarks|constraints)/[\w./]+\w)", text)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []
