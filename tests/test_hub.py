"""`tsopsd convert --push-to-hub`, against a stand-in of the hub's client."""

import inspect
import types

import huggingface_hub
import pytest

from tsopsd_jax.cli import main
from tsopsd_jax.commands import convert


class Address(str):
    repo_id = "me/mine"


class Hub:
    """What was asked of it, in order; `refuses`: the call that fails; `private`: of the repository that is there."""

    def __init__(self):
        self.calls, self.refuses, self.private = [], None, True

    def _called(self, name, **given):
        self.calls.append((name, given))
        if self.refuses == name:
            raise OSError("403 Forbidden:\n no write access")

    def whoami(self):
        self._called("whoami")

    def create_repo(self, repo, *, private, exist_ok):
        self._called("create_repo", repo=repo, private=private, exist_ok=exist_ok)
        return Address(f"https://hub/{repo}")

    def repo_info(self, repo):
        self._called("repo_info", repo=repo)
        return types.SimpleNamespace(private=self.private)

    def upload_folder(self, *, repo_id, folder_path, commit_message, delete_patterns):
        names = sorted(file.name for file in folder_path.iterdir())
        self._called("upload_folder", repo=repo_id, names=names, gone=delete_patterns, said=commit_message)

    @property
    def names(self):
        return [name for name, _ in self.calls]


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)

    def export(_folder, out, *, step, dtype):
        hub._called("export", step=step, dtype=dtype)
        out.mkdir(exist_ok=True)
        for name in ("config.json", "model.safetensors"):
            (out / name).write_text("{}")
        return 7

    monkeypatch.setattr(convert, "export", export)
    return hub


def push(tmp_path, *more):
    return main(["convert", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--push-to-hub", "mine", *more])


def test_what_was_exported_is_uploaded_as_one_commit(hub, tmp_path, capsys):
    assert push(tmp_path) == 0
    assert hub.names == ["whoami", "export", "create_repo", "upload_folder"]
    assert hub.calls[2][1] == {"repo": "mine", "private": None, "exist_ok": True}, "the owner's own default"
    assert hub.calls[3][1] == {
        "repo": "me/mine",
        "names": ["config.json", "model.safetensors"],
        "gone": ["*.safetensors", "*.safetensors.index.json"],
        "said": "Export by tsopsd convert",
    }
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: the policy after step 7, in bfloat16\nhttps://hub/mine\n"


def test_private_means_that_nobody_else_can_read_it(hub, tmp_path, capsys):
    assert push(tmp_path, "--private") == 0
    assert hub.calls[2][1]["private"] is True
    hub.private = False
    hub.calls.clear()
    assert push(tmp_path, "--private") == 2
    assert hub.names == ["whoami", "export", "create_repo", "repo_info"]
    assert "expected a private repository, got a public one, and nothing was uploaded" in capsys.readouterr().err
    assert main(["convert", "run", "--out", "out", "--private"]) == 2
    assert "--private: expected with --push-to-hub REPO; leave it out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("refuses", "asked", "says"),
    [
        ("whoami", ["whoami"], "expected a login that may write; hf auth login, or HF_TOKEN"),
        ("create_repo", ["whoami", "export", "create_repo"], "out holds the export; the same command tries again"),
        (
            "upload_folder",
            ["whoami", "export", "create_repo", "upload_folder"],
            "out holds the export; the same command tries again",
        ),
    ],
)
def test_a_refusal_is_one_line(hub, tmp_path, capsys, refuses, asked, says):
    hub.refuses = refuses
    assert push(tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith("tsopsd convert: --push-to-hub mine: OSError: 403 Forbidden: no write access; ")
    assert error.endswith(f"{says}\n")
    assert error.count("\n") == 1
    assert hub.names == asked


def test_nothing_is_uploaded_of_an_export_that_failed(hub, tmp_path, monkeypatch):
    def export(*_, **__):
        raise ValueError("no such checkpoint")

    monkeypatch.setattr(convert, "export", export)
    assert push(tmp_path) == 2
    assert hub.names == ["whoami"]


def test_the_stand_in_takes_what_the_hubs_client_takes():
    """Its methods are the client's, and take these arguments."""
    for name in ("whoami", "create_repo", "repo_info", "upload_folder"):
        theirs = inspect.signature(vars(huggingface_hub.HfApi)[name]).parameters
        ours = [each for each in inspect.signature(vars(Hub)[name]).parameters if each not in ("self", "repo")]
        assert set(ours) <= set(theirs), name
