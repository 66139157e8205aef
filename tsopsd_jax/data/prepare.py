"""Preparation of a published data set: it is read and written once, to the cache."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tsopsd_jax.data.layouts import LAYOUTS, Layout, Problem, Tally, count_rows, numbered_rows, read_problems
from tsopsd_jax.data.sources import GENERATED, find_files, known_source

OnRows = Callable[[Iterable[Any], str, int | None], Iterable[Any]]
"""(rows, what they are, how many if known) -> the same rows, showing progress."""


class Prepared(NamedTuple):
    """A data set as it was written."""

    folder: Path
    tallies: dict[str, Tally]
    """Split -> what was counted."""
    files: dict[str, list[Path]]
    """Split -> the files that were read."""


def prepare_dataset(
    name: str, directory: Path, *, source: Path | None = None, skip_malformed: bool = False, watch: OnRows
) -> Prepared:
    """Read the published files of a data set and write it under `directory`, replacing one that exists there.

    Args:
        name: a key of `SOURCES` but `jsonl`.
        directory: where prepared data sets are.
        source: a published file or a folder that holds them; None: the Hugging Face hub.
        skip_malformed: go on without malformed rows, which the tallies then name.
        watch: shows progress.

    Raises:
        ValueError: an unknown name, files that cannot be had or read, malformed rows, more problems than the data set
            has; nothing is written then.
    """
    known_source(name)
    if name == "jsonl":
        raise ValueError("jsonl is read where it is and needs no preparation: set data.path to the file")
    from tsopsd_jax.data import builders

    tallies: dict[str, Tally] = {}
    files: dict[str, list[Path]] = {}
    if name in GENERATED:
        if source is not None:
            raise ValueError(f"{name} is generated: expected no --from, got {source}")
        splits: dict[str, Iterable[Problem]] = dict(GENERATED[name]())
    else:
        layout = LAYOUTS[name]
        files = find_files(name, layout, source or _from_hub(name, layout))
        sizes = layout.sizes or {}
        tallies = {
            split: Tally(f"{name} {split}: {' '.join(map(str, paths))}", sizes.get(split))
            for split, paths in files.items()
        }
        splits = {
            split: _problems(name, split, paths, tallies[split], skip_malformed=skip_malformed, watch=watch)
            for split, paths in files.items()
        }
    return Prepared(builders.build_dataset(name, splits, directory), tallies, files)


def _problems(
    name: str, split: str, paths: list[Path], tally: Tally, *, skip_malformed: bool, watch: OnRows
) -> Iterator[Problem]:
    layout = LAYOUTS[name]
    rows = watch(numbered_rows(paths, layout.columns), f"{name} {split}", count_rows(paths))
    yield from read_problems(layout, rows, f"{name}-{split}", tally)
    if tally.malformed and not skip_malformed:
        raise ValueError(f"{tally.where}: {tally.complaint()}: repair them, or leave them out with --skip-malformed")
    tally.check_size()
    if not tally.kept:
        raise ValueError(f"{tally.where}: expected at least one problem, got none")


def _from_hub(name: str, layout: Layout) -> Path:
    """Download a data set's files; returns their folder."""
    remedy = f"`tsopsd data prepare {name} --from PATH` takes files that you have"
    if layout.hub is None:
        raise ValueError(f"{name}: no repository on the Hugging Face hub is known for it; {remedy}")
    import huggingface_hub

    patterns = [pattern for patterns in layout.splits.values() for pattern in patterns]
    try:
        folder = huggingface_hub.snapshot_download(
            layout.hub, repo_type="dataset", allow_patterns=[*patterns, *(f"*/{pattern}" for pattern in patterns)]
        )
    except huggingface_hub.errors.GatedRepoError as error:
        raise ValueError(
            f"{name}: {layout.hub} asks to accept its terms on the Hugging Face hub, and to log in (`hf auth login`); "
            + remedy
        ) from error
    # The library, its HTTP client and the operating system each raise their own kinds here.
    except Exception as error:
        raise ValueError(
            f"{name}: could not fetch {layout.hub} from the Hugging Face hub ({type(error).__name__}: {error}); "
            + remedy
        ) from error
    return Path(folder)
