"""TensorFlow Datasets builders (no TensorFlow needed), and how one is built and read.

Import this module inside functions only: tensorflow_datasets is slow to import and most commands do not need
it.
"""

import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from tsopsd_jax.data import countdown


class CountdownSteps(tfds.core.GeneratorBasedBuilder):
    """The countdown-steps task: 20,000 training and 1,024 test problems, disjoint, from fixed seeds."""

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded. (TFDS would look for checksums, by way of a package that it does not declare.)
    url_infos = None

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            description="Reach a target from four numbers in three written steps.",
            features=tfds.features.FeaturesDict({"id": text, "prompt": text, "answer": text}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing is downloaded
        return {
            "train": self._generate_examples("train", count=20_000, seed=17, held_out=False),
            "test": self._generate_examples("test", count=1_024, seed=18, held_out=True),
        }

    def _generate_examples(self, split: str, *, count: int, seed: int, held_out: bool) -> Iterator:
        problems = countdown.distinct_problems(count, seed=seed, held_out=held_out)
        for row, (prompt, answer) in enumerate(problems):
            yield row, {"id": f"countdown-{split}-{row}", "prompt": prompt, "answer": answer}


def read_split(
    builder_class: type[tfds.core.GeneratorBasedBuilder],
    directory: str | Path,
    *,
    split: str,
    first: int | None,
) -> list[dict[str, str]]:
    """The first `first` rows (None: all) of a split of text features; builds the data set where it is absent.

    Raises:
        ValueError: if the files under `directory` are damaged, or there is no such split.
    """
    directory = Path(directory)
    final = directory / builder_class.name / str(builder_class.VERSION)
    if not final.exists():
        _build(builder_class, directory, final)
    # A whole data set has its metadata: it appears under its final name only by a rename.
    remedy = f"delete {final} and run again to rebuild it"
    if not (final / "dataset_info.json").is_file():
        raise ValueError(f"data set {builder_class.name}: expected dataset_info.json in {final}, found none: {remedy}")
    try:
        builder = builder_class(data_dir=str(directory), file_format="array_record")
        known = sorted(builder.info.splits)
        if split in known:
            source = builder.as_data_source(split=split)  # pyright: ignore[reportCallIssue]
            rows = source.__getitems__(list(range(len(source) if first is None else min(first, len(source)))))
            return [{key: value.decode("utf-8") for key, value in row.items()} for row in rows]
    # TFDS, array_record and protobuf each raise their own kinds here.
    except Exception as error:
        raise ValueError(f"data set {builder_class.name}: cannot read {final} ({error}): {remedy}") from error
    raise ValueError(f"data set {builder_class.name}: expected a split of {', '.join(known)}, got {split!r}")


def _build(builder_class: type[tfds.core.GeneratorBasedBuilder], directory: Path, final: Path) -> None:
    """Build beside the final place and move there in one step: nothing half-built is ever found."""
    final.parent.mkdir(parents=True, exist_ok=True)
    workplace = Path(tempfile.mkdtemp(prefix=f".{builder_class.name}-building-", dir=directory))
    try:
        builder = builder_class(data_dir=str(workplace), file_format="array_record")
        # A build of seconds needs no progress bars and no announcements.
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
        try:
            os.rename(builder.data_dir, final)
        except OSError:
            # Another process has built the same rows meanwhile: its copy is as good.
            if not final.exists():
                raise
    finally:
        shutil.rmtree(workplace, ignore_errors=True)
