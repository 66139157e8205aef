"""What commands write is as private, or as shared, as the umask says: in a folder of a group, its members go on with a
run and read what it left."""

import os
import stat

import pytest
from test_cli import demo

from tsopsd_jax.cli import main

GROUP = 0o007
"""A umask: all for the owner and the group, nothing for others."""


@pytest.fixture
def shared(tmp_path, monkeypatch):
    monkeypatch.setenv("TSOPSD_CACHE_DIR", str(tmp_path / "shared" / "cache"))
    before = os.umask(GROUP)
    yield tmp_path / "shared"
    os.umask(before)


def test_files_and_folders_follow_the_umask(shared):
    run = shared / "run"
    assert demo(run) == 0
    for command in (
        ["convert", str(run), "--out", str(shared / "exported")],
        ["report", str(run)],
        ["init", str(shared / "run.yaml")],
        ["eval", "--run", str(run), "--first", "2", "--samples", "2", "--out", str(shared / "eval")],
        ["generate", "--run", str(run), "--first", "2", "--out", str(shared / "responses.jsonl")],
        ["data", "prepare", "countdown"],
    ):
        assert main(command) == 0, command
    paths = [path for path in shared.rglob("*") if "xla" not in path.relative_to(shared).parts]  # JAX's own
    kinds = {"checkpoints", "cache", "report.html", "metrics.jsonl", "model.safetensors", "responses.jsonl", "1.0.0"}
    assert kinds <= {path.name for path in paths}
    expected = {True: 0o777 & ~GROUP, False: 0o666 & ~GROUP}
    odd = {
        str(path): oct(mode) for path in paths if (mode := stat.S_IMODE(path.stat().st_mode)) != expected[path.is_dir()]
    }
    assert odd == {}
