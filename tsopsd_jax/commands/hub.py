"""Publishing an exported policy on the Hugging Face hub, with the login of its own tools (`hf auth login`)."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STALE = ("*.safetensors", "*.safetensors.index.json")
"""Files of an earlier export that are deleted in the same commit, unless the new one has them."""


@contextlib.contextmanager
def _asking(repo: str, remedy: str) -> Iterator[None]:
    """Whatever the hub or the network refuses becomes one line."""
    try:
        yield
    except Exception as error:  # its client raises its own errors, the network's and ValueError
        words = " ".join(str(error).split())[:300]
        raise ValueError(f"--push-to-hub {repo}: {type(error).__name__}: {words}; {remedy}") from error


def open_hub(repo: str) -> Any:
    """The hub's client, logged in; before anything that takes long.

    Raises:
        ValueError: nobody is logged in, or the hub cannot be reached.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    with _asking(repo, "expected a login that may write; hf auth login, or HF_TOKEN"):
        api.whoami()
    return api


def push_to_hub(api: Any, folder: Path, repo: str, *, private: bool) -> str:
    """Upload a whole export as one commit, into a repository that is made if there is none; returns its address.

    Args:
        api: from `open_hub`.
        folder: what `convert.export` wrote.
        repo: NAME or OWNER/NAME.
        private: of a new repository; an existing one must be private already.

    Raises:
        ValueError: the hub refuses, or a private repository was asked for and an existing one is public.
    """
    with _asking(repo, f"{folder} holds the export; the same command tries again"):
        address = api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.repo_info(address.repo_id).private:
            raise ValueError("expected a private repository, got a public one, and nothing was uploaded to it")
        api.upload_folder(
            repo_id=address.repo_id,
            folder_path=folder,
            commit_message="Export by tsopsd convert",
            delete_patterns=list(STALE),
        )
    return str(address)
