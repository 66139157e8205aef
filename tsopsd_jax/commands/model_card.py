"""The model card of an exported policy: what the run directory says, as Markdown with the Hub's front matter."""

import dataclasses
import importlib.metadata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tsopsd_jax.config import Config, DataSettings, PhaseSettings
from tsopsd_jax.data.prompts import PLACE
from tsopsd_jax.display.live_table import results_table
from tsopsd_jax.loading import is_own
from tsopsd_jax.metric_names import ACCURACY, ENTROPY, GRAD_NORM, LENGTH, LOSS, REWARD, TRUNCATED
from tsopsd_jax.model.hf import CARD
from tsopsd_jax.train.cycle import without_round

LAST_METRICS = (
    ENTROPY,
    REWARD,
    ACCURACY,
    LENGTH,
    TRUNCATED,
    LOSS,
    GRAD_NORM,
)
EXPORTED = "Trained and exported"
"""Words by which a card says that its directory is an export."""
BAR = r"\|"
"""A `|` inside a cell of a Markdown table."""
_LICENCE = ("license", "license_name", "license_link")


class BaseModel(NamedTuple):
    """What a run began with: ORG/NAME in the hub's cache, else the directory's name; the cached commit."""

    name: str
    commit: str | None = None

    @classmethod
    def of(cls, folder: Path) -> "BaseModel":
        """Read it from a directory's path; .../models--ORG--NAME/snapshots/COMMIT is how the hub's cache lies."""
        *_, repository, snapshots, commit = ("", "", *folder.resolve().parts)
        if snapshots == "snapshots" and repository.startswith("models--"):
            return cls(repository.removeprefix("models--").replace("--", "/"), commit)
        return cls(folder.resolve().name)


def base_licence(folder: Path) -> dict[str, str]:
    """The licence fields in the front matter of a model directory's own card; empty where there is none."""
    if not (folder / CARD).is_file():
        return {}
    begin, *rest = (folder / CARD).read_text(encoding="utf-8").split("---\n", 2)
    if begin or len(rest) != 2:
        return {}
    try:
        fields = yaml.safe_load(rest[0])
    except yaml.YAMLError:
        return {}
    return {key: str(fields[key]) for key in _LICENCE if key in fields} if isinstance(fields, dict) else {}


def model_card(
    config: Config,
    *,
    base: BaseModel,
    licence: Mapping[str, str],
    step: int,
    dtype: str,
    metrics: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
) -> str:
    """The card of the policy after `step`; lines of the run's log beyond that step are left out.

    Args:
        base: the model that the run began with.
        licence: from `base_licence`.
        dtype: of the stored weights.
        metrics: lines of metrics.jsonl.
        evaluations: lines of evaluations.jsonl.
    """
    metrics = [line for line in metrics if line["step"] <= step]
    evaluations = [record for record in evaluations if record["step"] <= step]
    version = importlib.metadata.version("tsopsd-jax")
    at = f", commit {base.commit}" if base.commit else ""
    random = " (random weights of its shape)" if config.model.random_init else ""
    front = yaml.safe_dump(
        {**licence, "library_name": "transformers", "base_model": base.name, "tags": ["tsopsd_jax"]}, sort_keys=False
    )
    parts = [
        f"---\n{front}---\n# {base.name}, after {step} steps",
        f"{EXPORTED} ({dtype}) by tsopsd_jax {version}; seed {config.seed}.",
        f"- Base model: {base.name}{at}{random}\n- Problems: {_data(config.data)}",
        "## Phases\n\n" + _phases(config.phases, Counter(without_round(line["phase"]) for line in metrics)),
    ]
    if metrics:
        last = metrics[-1]
        shown = [f"| {name} | {last[name]:.5g} |" for name in LAST_METRICS if last.get(name) is not None]
        parts.append(f"## Metrics of step {last['step']}\n\n" + "\n".join(["| metric | value |", "|---|---|", *shown]))
    if evaluations:
        parts.append(f"## Evaluations\n\n```\n{results_table(evaluations)}\n```")
    return "\n\n".join(parts) + "\n"


def _data(data: DataSettings) -> str:
    """The settings that are not their defaults."""
    default = {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(data)
    }
    values = {name: value for name, value in vars(data).items() if value != default[name]}
    if data.path is not None:
        values["path"] = Path(data.path).name
    verifier = data.verifier
    values["verifier"] = (
        _function(verifier) if isinstance(verifier, str) else {name: _function(x) for name, x in verifier.items()}
    )
    if data.template is not None and PLACE not in data.template:
        values["template"] = _function(data.template)
    return _words(values)


def _function(name: str) -> str:
    """A name of the library as it is, one's own as `file.py:function`: a publication does not tell where files lie."""
    return Path(name).name if is_own(name) else name


def _phases(phases: Sequence[PhaseSettings], steps: Mapping[str, int]) -> str:
    """A table of the phases that have begun."""
    lines = ["| phase | objective | steps | a step | AdamW |", "|---|---|---|---|---|"]
    for phase in phases:
        if not steps.get(phase.name):
            continue
        cells = [
            phase.name,
            " ".join([_function(phase.objective.name), _words(phase.objective.hyperparameters)]).strip(),
            str(steps[phase.name]),
            f"{phase.prompts_per_step} prompts x {phase.responses_per_prompt} responses of at most "
            f"{phase.max_response_tokens} tokens" + _updates(phase),
            _words(vars(phase.optimizer)),
        ]
        lines.append(f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |")
    return "\n".join(lines)


def _updates(phase: PhaseSettings) -> str:
    """How many updates follow a rollout, where it is not one."""
    updates, passes = phase.updates_per_rollout, phase.passes_per_rollout
    return (
        ""
        if updates * passes == 1
        else f", {updates * passes} updates" + (f" in {passes} passes" if passes > 1 else "")
    )


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
