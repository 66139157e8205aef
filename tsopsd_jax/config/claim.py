"""Ownership of a run directory: who runs there, what it was made with, and what may change when the run resumes."""

import contextlib
import hashlib
import itertools
import json
import re
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tsopsd_jax.config import Config, strict
from tsopsd_jax.data import Problem
from tsopsd_jax.rundir import files, object_store
from tsopsd_jax.rundir.checkpoints import read_progress
from tsopsd_jax.rundir.lock import locked
from tsopsd_jax.rundir.log import EVALUATIONS_FILE, METRICS_FILE, read_evaluations
from tsopsd_jax.rundir.status import read_status
from tsopsd_jax.writing import writes_to

CONFIG_FILE, LOCK_FILE = "config.yaml", ".lock"
INPUTS_FILE = "inputs.json"
"""Digests of what settings name and do not hold: problems, files of functions."""
FUNCTIONS_FOLDER = "functions"
"""Copies of the Python files that settings name as `path/to/file.py:function`."""

RUNTIME = r"checkpoint_every_steps|samples\.(every_steps|groups)|keep_checkpoints|page_every_s|tracker(\..+)?|cache_dir"
"""Settings that may change between two starts of the same run, without a word."""
CHANGEABLE = r"evaluation\.(rows_at_once|every_steps)|mesh\.(data|fsdp|tensor|cpu_devices)|cycle\.times"
"""Settings that may change too, and are told: memory, machine, when to look, and how often the cycle may come again."""
CHANGEABLE_IN_PHASE = (
    r"phases\.(\d+)\.((guard|stop)\.\w+|optimizer\.learning_rate|learning_rate_control(\.\w+)?|reward\.(on_shortage|max_generation_batches)"
    r"|rows_at_once|micro_batches|chunk_tokens|pack)"
)
"""Settings of a phase that may change while it is not finished: what guards, shortages and memory ask for."""


def read_settings(file: Path) -> dict[str, Any]:
    """Read the mapping in a run's config.yaml.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        found = strict.read_yaml(file)
    except ValueError as error:
        raise ValueError(
            f"{file}: expected a run's configuration, got invalid YAML ({error}); "
            "restore the file or choose another run directory"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} is not a configuration; restore the file or choose another run directory")
    return found


def settings_of(run_dir: Path) -> dict[str, Any] | None:
    """Read the configuration of a run directory; None if it has none (`read_settings` says what raises)."""
    file = run_dir / CONFIG_FILE
    return read_settings(file) if file.is_file() else None


def _check_ours(run_dir: Path) -> None:
    """Check that a run directory is absent, empty or a run's, and that Orbax, which takes a path for a pattern,
    can read it."""
    where = object_store.checkpoints_address(run_dir)
    if odd := sorted(set("*?[") & set(str(where))):
        raise ValueError(
            f"{where}: expected a path without {' '.join(odd)}, in which checkpoints could not be read again; "
            f"choose another --run-dir"
        )
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"{run_dir}: expected a run directory, got a file; choose another --run-dir")
    if not run_dir.exists() or (run_dir / CONFIG_FILE).is_file():
        return
    ours = {LOCK_FILE, files.partial(run_dir / CONFIG_FILE).name, object_store.ADDRESS_FILE}
    if {each.name for each in run_dir.iterdir()} - ours:
        raise ValueError(f"{run_dir} is not empty and holds no run; choose another --run-dir")


@contextlib.contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Keep other processes out of `run_dir`, which is made if absent.

    Raises:
        ValueError: it holds something else, cannot be made, or another process runs in it.
    """
    _check_ours(run_dir)
    with locked(
        run_dir / LOCK_FILE,
        taken=f"another process runs in {run_dir}; wait for it or choose another --run-dir",
        unwritable=f"{run_dir}: expected a directory to write to, got {{reason}}; choose another --run-dir",
    ):
        yield


def _phase_reached(run_dir: Path) -> int | None:
    """Find the index of the phase in which the run resumes; None if it has neither a checkpoint nor a logged step."""
    if (progress := read_progress(object_store.checkpoints_address(run_dir))) is not None:
        return progress.phase
    metrics = run_dir / METRICS_FILE
    return 0 if metrics.is_file() and metrics.stat().st_size else None


def _check_not_lost(run_dir: Path) -> None:
    """A run whose checkpoints were removed would start over and drop its log."""
    where, metrics = object_store.checkpoints_address(run_dir), run_dir / METRICS_FILE
    if not (metrics.is_file() and metrics.stat().st_size):
        return
    removed = object_store.address(run_dir) is None and not where.exists()  # it is made before the first step
    empty = not where.exists() or not any(each.name.isdigit() for each in where.iterdir())
    saved = read_status(run_dir).get("saved_step") or any(record["step"] for record in read_evaluations(run_dir))
    if removed or (empty and saved):  # evaluations after the first step are of saved policies
        raise ValueError(
            f"{run_dir} holds the log of a run whose checkpoints are gone, so that it cannot go on; "
            f"to begin anew choose another --run-dir, or remove {run_dir}"
        )


def _may_change(key: str, phase: int) -> bool:
    if match := re.fullmatch(CHANGEABLE_IN_PHASE, key):
        return int(match[1]) >= phase
    return re.fullmatch(CHANGEABLE, key) is not None


def _words(found: strict.Difference, sign: str, settings: dict[str, Any]) -> str:
    """Say a difference by the phase's name, not by its place."""
    return found._replace(key=".".join(strict.names_along(found.key.split("."), settings))).words(sign)


def _without_added_phases(old: dict[str, Any], new: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A run may go on with phases behind its last one: the new settings without those, and their names."""
    phases, known = new["phases"], old.get("phases")
    if not isinstance(known, list):
        return new, []
    return new | {"phases": phases[: len(known)]}, [phase["name"] for phase in phases[len(known) :]]


def inputs_of(config: Config, problems: Mapping[str, Sequence[Problem]]) -> dict[str, str]:
    """Digest what a run learns from beside its settings: name -> size and digest.

    Args:
        config: its paths `path/to/file.py:function` are files of functions, relative to the working directory.
        problems: such as `training problems`, in their order, as they were loaded.
    """
    found = {}
    for name, rows in problems.items():
        # That of one JSON list, which for a million problems would be a text of gigabytes.
        digest = hashlib.sha256(b"[")
        for at, row in enumerate(rows):
            digest.update((", " if at else "").encode() + json.dumps(_learned(row), default=str).encode())
        digest.update(b"]")
        found[name] = f"{len(rows):,}, sha256 {digest.hexdigest()[:16]}"
    for path in _function_files(strict.plain(config)):
        found[path] = f"sha256 {hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]}"
    return found


def _learned(problem: Problem) -> tuple[Any, ...]:
    """What of a problem a run learns from."""
    beyond = ({**problem.row}, problem.before)
    return (problem.prompt, problem.answer, *(beyond if any(beyond) else ()))


def _function_files(tree: Any) -> Iterable[str]:
    """Find the files of all `path/to/file.py:function` in plain data."""
    if isinstance(tree, dict | list):
        below = tree.values() if isinstance(tree, dict) else tree
        return dict.fromkeys(itertools.chain.from_iterable(map(_function_files, below)))
    match = re.fullmatch(r"(.+\.py):\w+", tree) if isinstance(tree, str) else None
    return [match[1]] if match and Path(match[1]).is_file() else []


def _copy_of(run_dir: Path, path: str) -> Path:
    """Name the copy of a file of functions."""
    return run_dir / FUNCTIONS_FOLDER / urllib.parse.quote(path, safe="")


def _read_inputs(run_dir: Path) -> dict[str, str]:
    file = run_dir / INPUTS_FILE
    if not file.is_file():  # a run of an earlier version, or one that died as it was claimed
        return {}
    return files.read_object(file, what="the digests of a run's inputs", remedy="restore it")


def _changed_inputs(run_dir: Path, inputs: Mapping[str, str]) -> list[str]:
    """List each input that is not as the run began with it, as `name: old -> new`."""
    changed = []
    for name, old in _read_inputs(run_dir).items():
        if name in inputs and inputs[name] != old:
            copy = _copy_of(run_dir, name)
            words = _changed_line(copy, Path(name)) if copy.is_file() else f"{old} -> {inputs[name]}"
            changed.append(f"{name}: {words}")
    return changed


def _changed_line(old: Path, new: Path) -> str:
    """Name the first line that differs between two files, as `line N: old -> new`."""
    texts = [file.read_text(encoding="utf-8", errors="replace").splitlines() for file in (old, new)]
    for number, (before, after) in enumerate(itertools.zip_longest(*texts), start=1):
        if before != after:
            return f"line {number}: {before!r} -> {after!r}"
    return "line ends"


def _keep_inputs(run_dir: Path, inputs: Mapping[str, str]) -> None:
    for name in inputs:
        if name.endswith(".py"):
            copy = _copy_of(run_dir, name)
            with writes_to(copy):
                copy.parent.mkdir(exist_ok=True)
            files.replace(copy, [Path(name).read_bytes()])
    files.replace(run_dir / INPUTS_FILE, [json.dumps(dict(inputs), indent=1).encode() + b"\n"])


def claim(
    run_dir: Path, config: Config, inputs: Mapping[str, str] | None = None, *, accept_changed: bool = False
) -> list[str]:
    """Write config.yaml into a run directory that is held, if it is new or its run may resume with `config`.

    Args:
        run_dir: held by this process.
        config: of the run that starts or resumes.
        inputs: what `inputs_of` returned; kept beside the configuration. None: nothing is compared.
        accept_changed: go on with inputs other than those that the run began with.

    Returns:
        What changed for a run that resumes, `key: old -> new`.

    Raises:
        ValueError: the run there is another configuration's, or has other inputs; nothing is changed then.
    """
    _check_ours(run_dir)
    file, resolved = run_dir / CONFIG_FILE, strict.plain(config)
    changed = []
    if file.is_file():
        old = read_settings(file)
        comparable, added = _without_added_phases(old, resolved)
        differences = [d for d in strict.differences(old, comparable) if not re.fullmatch(RUNTIME, d.key)]
        reached = _phase_reached(run_dir)
        cycle = config.indices_of_cycle()
        unfinished = cycle.first if (reached or 0) in cycle else reached or 0  # a cycle comes back to its first phase
        refused = [d for d in differences if not _may_change(d.key, unfinished)]
        if refused and reached is not None:
            over = _may_change(refused[0].key, 0)  # it may while its phase goes on
            raise ValueError(
                f"{run_dir} holds a run of another configuration ({_words(refused[0], '!=', old)}"
                f"{', a phase that is over' if over else ''}); choose another --run-dir, or the old settings"
                f"{', and another phase behind them to go on' if over else ''}"
            )
        _check_not_lost(run_dir)
        others = _changed_inputs(run_dir, inputs or {})
        if others and reached is not None and not accept_changed:
            raise ValueError(
                f"{run_dir} holds a run that began with something else ({'; '.join(others)}); restore it, choose "
                "another --run-dir, or go on with --accept-changed"
            )
        if refused or (others and reached is None):
            # Nothing was trained: the old run is replaced, and what was evaluated under it goes.
            (run_dir / EVALUATIONS_FILE).unlink(missing_ok=True)
        grown = [f"phases: {', '.join(added)} added"] if added else []
        changed = [*(_words(d, "->", old) for d in differences), *grown, *others] if reached is not None else []
    files.replace(file, [strict.dump(resolved).encode()])
    if inputs is not None:
        _keep_inputs(run_dir, inputs)
    return changed
