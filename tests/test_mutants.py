"""The list of mutants fits the tree, and CI tries those of what changed."""

import mutants
import pytest
from mutants import MUTANTS, ROOT, Mutant


@pytest.mark.parametrize("file", sorted({m.file for m in MUTANTS}))
def test_every_text_occurs_once(file):
    text = (ROOT / "tsopsd_jax" / file).read_text()
    wrong = [m.name for m in MUTANTS if m.file == file and (text.count(m.old) != 1 or m.old == m.new)]
    assert not wrong, "update tests/mutants.py"


def test_every_test_of_a_mutant_exists():
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        for file in mutants.arguments(mutant.tests):
            if file.endswith(".py"):
                assert (ROOT / file).is_file(), mutant.name


def test_recent_mutants_are_those_of_changed_files_and_tests_and_a_tenth_of_the_rest(monkeypatch):
    many = [Mutant(f"m{i}", "head.py", "a", "b", "test_head.py") for i in range(1000)]
    of_code, of_test = (
        Mutant("x", "../tpu/run.sh", "a", "b", "test_a.py"),
        Mutant("y", "a.py", "a", "b", "test_b.py -k c"),
    )
    monkeypatch.setattr(mutants, "git", lambda *_: "abc\n")
    monkeypatch.setattr(mutants, "changed_files", lambda: {"tpu/run.sh", "tests/test_b.py"})
    chosen = mutants.recent([*many, of_code, of_test])
    assert chosen[-2:] == [of_code, of_test]
    assert 70 < len(chosen) - 2 < 130
    monkeypatch.setattr(mutants, "git", lambda *_: "abd\n")
    assert mutants.recent([*many, of_code, of_test]) != chosen, "another commit draws others"


def test_without_history_no_file_counts_as_changed(monkeypatch):
    monkeypatch.setattr(mutants, "git", lambda *_: "\n")
    assert mutants.changed_files() == set()


def test_renamed_and_changed_files_are_read_from_git(monkeypatch):
    rows = "\0".join(["1\t2\ta.py", "3\t4\t", "b.py", "c.py", ""])
    monkeypatch.setattr(mutants, "git", lambda command, *_: "1234\n" if command == "rev-list" else rows)
    assert mutants.changed_files() == {"a.py", "b.py", "c.py"}
