"""What scripts/crash_test.py compares of two runs: every array of the last checkpoint, every record, bit for bit."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from tsopsd_jax.config import load_config
from tsopsd_jax.config.build import make_phase
from tsopsd_jax.config.places import model_folder
from tsopsd_jax.distributed.sharding import make_mesh
from tsopsd_jax.learn.update import abstract_state
from tsopsd_jax.model import Qwen3
from tsopsd_jax.model.hf_config import read_config
from tsopsd_jax.rundir import log
from tsopsd_jax.rundir.checkpoints import Checkpoints

CLOCKS = ("time_s", "rollout/tokens_per_s", "rollout/programs")
"""Entries of a line of metrics.jsonl that depend on the clock, or on what this process compiled."""


def arrays(file: Path, run: Path) -> dict[str, Any]:
    """All arrays of the run's last checkpoint, with its progress: {path: array or plain value}."""
    settings = load_config(file, [])
    model = Qwen3(read_config(model_folder(settings) / "config.json"))
    mesh = make_mesh(devices=jax.devices()[:1])
    like = abstract_state(model, make_phase(settings.phases[0]).optimizer, mesh)
    checkpoints = Checkpoints(run.resolve() / "checkpoints", keep=9)
    step = checkpoints.latest()
    assert step is not None, run
    restored = checkpoints.restore(like, step, start_like=like.params)
    checkpoints.close()
    tree = {"state": vars(restored.state), "leftover": restored.leftover and vars(restored.leftover)}
    tree |= {"start": restored.start}
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: not isinstance(x, dict | list | tuple))
    found = {jax.tree_util.keystr(path): value for path, value in leaves}
    flat: dict[str, Any] = {}
    for name, value in found.items():
        inner = vars(value) if name.endswith("['rollout']") else {"": value}
        flat |= {f"{name}{key}": np.asarray(each) for key, each in inner.items()}
    progress = {key: value for key, value in vars(restored.progress).items() if key != "elapsed_s"}
    return flat | {f"progress.{key}": value for key, value in progress.items()}


def records(run: Path) -> dict[str, list[Any]]:
    """The lines of a run's log, evaluations and responses, without clocks."""
    lines = [
        {k: v for k, v in line.items() if k not in CLOCKS and not k.startswith(("time/", "perf/"))}
        for line in log.read_metrics(run)
    ]
    return {"metrics": lines, "evaluations": log.read_evaluations(run), "samples": log.read_samples(run)}


def differences(
    alone: tuple[dict[str, Any], dict[str, Any]], killed: tuple[dict[str, Any], dict[str, Any]]
) -> list[str]:
    """Name what differs, bit for bit, between two runs (each: arrays, records)."""
    odd = []
    for name in sorted(alone[0].keys() | killed[0].keys()):
        one, other = alone[0].get(name), killed[0].get(name)
        if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
            same = (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
        else:
            same = type(one) is type(other) and one == other
        odd += [] if same else [name]
    for name, lines in alone[1].items():
        others = killed[1][name]
        odd += [f"{name}: {len(lines)} records, {len(others)} after the kills"] * (len(lines) != len(others))
        for at, (one, other) in enumerate(zip(lines, others, strict=False)):
            odd += [f"{name}[{at}].{key}" for key in {**one, **other} if one.get(key) != other.get(key)]
    return odd
