"""Prepared data sets: TensorFlow Datasets (no TensorFlow needed) of problems, how one is built and read.

Import this module inside functions only: tensorflow_datasets is slow to import and most commands do not need
it.
"""

import contextlib
import errno
import fcntl
import io
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from tsopsd_jax.data.layouts import TEXTS, Problem, prepared_folder
from tsopsd_jax.writing import WriteError


class ProblemSet(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The data set called `name`: per split its problems, three texts each, in their order."""

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded. (TFDS would look for checksums, by way of a package that it does not declare.)
    url_infos = None

    def __init__(self, *, name: str, splits: Mapping[str, Iterable[Problem]], **kwargs):
        # TFDS wants a class per name; ours differ in nothing else.
        self.name = name  # pyright: ignore[reportAttributeAccessIssue]
        self._splits = splits
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            description="Problems with their gold answers.",
            features=tfds.features.FeaturesDict(dict.fromkeys(TEXTS, text)),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(problems) for split, problems in self._splits.items()}

    def _generate_examples(self, problems: Iterable[Problem]):
        for row, problem in enumerate(problems):
            yield row, dict(zip(TEXTS, problem, strict=False))


def build_dataset(name: str, splits: Mapping[str, Iterable[Problem]], directory: str | Path) -> Path:
    """Write a data set and return its folder; one that exists there is replaced when the new one is whole.

    Built beside the final place and moved there by a rename: nothing half-built is ever found there.

    Raises:
        ValueError: the folder cannot be made, or what the problems are read from is not as it should be.
        WriteError: it could not be written; what was there before is there still.
    """
    directory, final = Path(directory), prepared_folder(name, directory)
    with contextlib.ExitStack() as stack:
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            _sweep(directory)
            workplace = stack.enter_context(_workplace(name, directory))
        except OSError as error:
            raise ValueError(
                f"data set {name}: expected a folder to write to, got {directory}: {error.strerror}; name another with "
                "cache_dir, --cache-dir or TSOPSD_CACHE_DIR"
            ) from error
        builder = ProblemSet(name=name, splits=splits, data_dir=str(workplace), file_format="array_record")
        # The caller shows progress, if anybody does.
        tfds.disable_progress_bar()
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
        except (OSError, RuntimeError) as error:  # TFDS and array_record each have their own words for a full disk
            words = " ".join(str(error).split())
            raise WriteError(
                f"data set {name} could not be written to {directory}: {words}; make room, or name another folder with "
                "cache_dir, --cache-dir or TSOPSD_CACHE_DIR"
            ) from error
        with contextlib.suppress(FileNotFoundError):
            os.rename(final, workplace / "old")
        try:
            os.rename(builder.data_dir, final)
        except OSError:
            # Another process has built the same rows meanwhile: its copy is as good.
            if not final.exists():
                raise
    return final


@contextlib.contextmanager
def _workplace(name: str, directory: Path) -> Iterator[Path]:
    """Make a folder that is locked while it is used, and removed afterwards."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{name}-building-", dir=directory))
        with contextlib.suppress(FileNotFoundError):
            lock = _lock(folder, wait=True)
            if folder.exists():
                break
            os.close(lock)
        # Another process swept it away before it was locked: the next one, then.
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _sweep(directory: Path) -> None:
    """Remove the workplaces of processes that were killed: nobody holds their locks."""
    for folder in directory.glob(".*-building-*"):
        with contextlib.suppress(OSError):  # held, or just removed, or a file system without locks
            lock = _lock(folder, wait=False)
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path, *, wait: bool) -> int:
    """Hold a folder's lock until the returned handle is closed; waiting, do without where there are no locks.

    Raises:
        OSError: the lock is held and `wait` is False, the folder is gone, or there are no locks and `wait` is False.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if not wait or error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            os.close(handle)
            raise
    return handle


def read_dataset(name: str, directory: str | Path, *, split: str, first: int | None) -> list[Problem]:
    """Read the first `first` problems (None: all) of a split of a prepared data set; `a+b`: of both.

    Raises:
        ValueError: if the files are damaged, or there is no such split.
    """
    with _readable(name, directory) as builder:
        known = sorted(builder.info.splits)
        if set(split.split("+")) <= set(known):
            problems: list[Problem] = []
            for part in split.split("+"):
                raw = tfds.decode.DeserializeMethod.RAW_BYTES
                source = builder.as_data_source(split=part, deserialize_method=raw)  # pyright: ignore[reportCallIssue]
                many = len(source) if first is None else min(first - len(problems), len(source))
                problems += [_parsed(row) for row in source.__getitems__(list(range(many)))]
            return problems
    raise ValueError(
        f"data set {name}: expected a split of {', '.join(known)}, got {split!r}: prepare it from all of its files"
    )


def _parsed(record: bytes) -> Problem:
    """Parse a stored row. (TFDS decodes 20,000 in 1.3 s; they are read and parsed so in 0.35 s.)"""
    example = tf_example_pb2.Example.FromString(record)  # pyright: ignore[reportAttributeAccessIssue]
    fields = example.features.feature
    return Problem(**{key: fields[key].bytes_list.value[0].decode("utf-8") for key in TEXTS})


def sizes(name: str, directory: str | Path) -> dict[str, int]:
    """Count the problems of each split of a prepared data set.

    Raises:
        ValueError: if the files are damaged.
    """
    with _readable(name, directory) as builder:
        return {split: info.num_examples for split, info in builder.info.splits.items()}


@contextlib.contextmanager
def _readable(name: str, directory: str | Path) -> Iterator[tfds.core.DatasetBuilder]:
    """Open a prepared data set; whatever goes wrong while reading it is damage, and the error says what to do."""
    final = prepared_folder(name, directory)
    remedy = f"delete {final} and run again to rebuild it, or `tsopsd data prepare {name}`"
    # A whole data set has its metadata: it appears under its final name only by a rename.
    if not (final / "dataset_info.json").is_file():
        raise ValueError(f"data set {name}: expected dataset_info.json in {final}, found none: {remedy}")
    try:
        yield tfds.builder_from_directory(final, file_format="array_record")
    # TFDS, array_record and protobuf each raise their own kinds here.
    except Exception as error:
        raise ValueError(f"data set {name}: cannot read {final} ({error}): {remedy}") from error
