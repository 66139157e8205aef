"""A run's plan on a topology: every phase's parts, whether they fit, how long they take at best; and the search."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

from jax.sharding import AbstractMesh, AxisType

from tsopsd_jax.config import DTYPES, Config, PhaseSettings
from tsopsd_jax.config.build import check_batches, make_phase
from tsopsd_jax.config.references import reference_model
from tsopsd_jax.distributed.sharding import MESH_AXES, AnyMesh, make_mesh, mesh_sizes, tree_shardings
from tsopsd_jax.hardware.work import Lengths, Split
from tsopsd_jax.learn.micro_batches import choose_micro_batches
from tsopsd_jax.model import Qwen3, Qwen3Config
from tsopsd_jax.model.packaged import model_directory
from tsopsd_jax.plan import estimate
from tsopsd_jax.plan.case import Case, Part
from tsopsd_jax.plan.compiled import CompiledPrograms, compile_parts
from tsopsd_jax.plan.roofline import LIKELY, Seconds, Shares, seconds
from tsopsd_jax.plan.topologies import Topology
from tsopsd_jax.train.phase import START

COMPILED_MESHES = 3
"""How many meshes, the best by formula, a search compiles."""


class Means(NamedTuple):
    """Mean tokens that times are for; None: the configuration's limits."""

    response: int | None = None
    prompt: int | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run needs on one mesh of a topology."""

    topology: Topology
    split: Split
    parts: tuple[Part, ...]
    times: tuple[Seconds, ...]
    lengths: dict[str, Lengths]
    slots: dict[str, int]
    """`rows_at_once` of each phase."""
    tiles: dict[str, int]
    """`chunk_tokens` of each phase."""
    steps: dict[str, int | None]
    """`stop.steps` of each phase."""
    shares: Shares
    host_bytes: int
    """Bytes of each host's memory while a checkpoint is written: its part of the state, once."""

    @property
    def limit(self) -> int:
        """Bytes that a program may take of a device."""
        return self.topology.usable_bytes

    @property
    def peak(self) -> int:
        return max(part.peak for part in self.parts)

    @property
    def fits(self) -> bool:
        return self.peak <= self.limit

    @property
    def step_seconds(self) -> dict[str, float]:
        """Least seconds of one step of each phase, its parts one after the other."""
        return self._step_seconds(self.times)

    @property
    def estimated_step_seconds(self) -> dict[str, float]:
        """Seconds of one step of each phase at the shares of the peaks."""
        return self._step_seconds(tuple(time.at(self.shares) for time in self.times))

    def _step_seconds(self, times: tuple[Seconds, ...]) -> dict[str, float]:
        return {
            name: sum(time.total for part, time in zip(self.parts, times, strict=True) if name in part.phases)
            for name in self.lengths
        }

    def run_hours(self, step_seconds: dict[str, float]) -> float | None:
        """Hours of all steps that the phases' `stop.steps` allow; None where a phase names no number."""
        taken = {name: steps for name, steps in self.steps.items() if steps is not None}
        return sum(taken[name] * step_seconds[name] for name in taken) / 3600 if len(taken) == len(self.steps) else None


def make_plan(
    config: Config,
    shape: Qwen3Config,
    topology: Topology,
    *,
    means: Means,
    programs: CompiledPrograms | None,
    shares: Shares = LIKELY,
) -> Plan:
    """The plan of a configuration on its own mesh.

    Args:
        shape: of the model.
        programs: what compiles; None, or a topology without devices: all by formula.
        shares: of the peaks, for the estimate of times.

    Raises:
        ValueError: a mesh, batch or model that does not divide; a mean below 1.
    """
    asked = {axis: vars(config.mesh)[axis] for axis in MESH_AXES}
    abstract = AbstractMesh(mesh_sizes(topology.count, **asked), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    real = abstract if topology.devices is None else make_mesh(**asked, devices=topology.devices)
    mesh = abstract if programs is None else real
    check_batches(config, mesh)
    split, limit = Split(**mesh.shape), topology.usable_bytes
    parts: list[Part] = []
    lengths: dict[str, Lengths] = {}
    slots: dict[str, int] = {}
    tiles: dict[str, int] = {}
    saved = 0
    for alike in _alike(config):
        names, settings = tuple(phase.name for phase in alike), alike[0]
        case = _case(config, shape, mesh, names, settings, means, topology)
        lengths |= dict.fromkeys(names, case.lengths)
        slots |= dict.fromkeys(names, case.slots)
        tiles |= dict.fromkeys(names, case.tile_tokens)
        saved = max(saved, case.saved_bytes)
        if programs is None or mesh is abstract:
            parts += estimate.estimate(case, settings.micro_batches or _micro_batches(case, limit))
        else:
            parts += compile_parts(case, programs, limit_bytes=limit)
    times = tuple(seconds(part, topology, real) for part in parts)
    steps = {phase.name: phase.stop.steps for phase in config.phases}
    return Plan(topology, split, tuple(parts), times, lengths, slots, tiles, steps, shares, -(-saved // topology.hosts))


def _case(
    config: Config,
    shape: Qwen3Config,
    mesh: AnyMesh,
    names: tuple[str, ...],
    settings: PhaseSettings,
    means: Means,
    topology: Topology,
) -> Case:
    wanted = {
        "response": (means.response, settings.max_response_tokens),
        "prompt": (means.prompt, config.data.max_prompt_tokens),
    }
    for what, (mean, most) in wanted.items():
        if mean is not None and mean < 1:
            raise ValueError(f"mean tokens of a {what}: expected at least 1, got {mean}; at most {most} are counted")
    found = Lengths(**{what: min(mean or most, most) for what, (mean, most) in wanted.items()})
    on = None if isinstance(mesh, AbstractMesh) else mesh
    model = Qwen3(shape, compute_dtype=DTYPES[config.model.compute_dtype], remat=config.model.remat, mesh=on)
    tree_shardings(model.param_axes(), model.param_shapes(), mesh)
    phase, other = make_phase(settings), None
    if phase.reference not in (None, START):
        other = reference_model(model_directory(phase.reference), model)
        tree_shardings(other.param_axes(), other.param_shapes(), mesh)
    widest, platform, chip = config.data.max_prompt_tokens, topology.platform, topology.chip
    return Case(names, phase, model, mesh, found, widest, platform, chip, other)


def _alike(config: Config) -> list[list[PhaseSettings]]:
    """Phases, those together that compute the same."""
    found: dict[str, list[PhaseSettings]] = {}
    free = ("name", "outcome", "stop", "guard", "optimizer_state", "optimizer", "reward")
    for phase in config.phases:
        fields = {key: value for key, value in vars(phase).items() if key not in free}
        found.setdefault(f"{fields} {phase.reward is None}", []).append(phase)
    return list(found.values())


def _micro_batches(case: Case, limit: int) -> int:
    """Micro-batches by formula."""
    rows, shards = case.phase.update_rows, case.split.rows

    def need_of(micro_batches: int) -> int:
        return sum(estimate.update(case, micro_batches).values())

    try:
        return choose_micro_batches(need_of, rows=rows, width=case.width, shards=shards, limit_bytes=limit)
    except ValueError:
        return rows // shards


def by_formula(
    config: Config, shape: Qwen3Config, topology: Topology, *, means: Means, shares: Shares = LIKELY
) -> list[tuple[Config, Plan]]:
    """Every mesh that the model and the batches allow, with the best `rows_at_once` of each phase and micro-batches
    chosen anew: (the configuration with them, its plan by formula), best first.

    Raises:
        ValueError: if no mesh divides model and batches.
    """
    found: list[tuple[Config, Plan]] = []
    refused = ""
    for split in _splits(topology.count):
        mesh = dataclasses.replace(config.mesh, **split._asdict())
        on = dataclasses.replace(config, mesh=mesh)
        plan = functools.partial(make_plan, shape=shape, topology=topology, means=means, programs=None, shares=shares)
        try:
            check_batches(on, AbstractMesh(split, MESH_AXES, axis_types=(AxisType.Auto,) * 3))
            slots: dict[str, int] = {}
            for alike in _alike(config):
                slots |= dict.fromkeys((phase.name for phase in alike), _best_slots(on, alike[0], split, plan))
            candidate = dataclasses.replace(on, phases=tuple(_freed(p, slots[p.name]) for p in config.phases))
            found.append((candidate, plan(candidate)))
        except ValueError as error:
            refused = str(error)
    if not found:
        raise ValueError(f"search: no mesh of {topology.count} devices divides model and batches; the last: {refused}")
    return sorted(found, key=lambda pair: _rank(pair[1]))


def _freed(phase: PhaseSettings, slots: int) -> PhaseSettings:
    return dataclasses.replace(phase, micro_batches=None, rows_at_once=slots)


def _best_slots(config: Config, phase: PhaseSettings, split: Split, plan: Callable[[Config], Plan]) -> int:
    """The `rows_at_once` with which a phase alone ranks first: its own, or all rows halved again and again."""
    rows = phase.prompts_per_step * phase.responses_per_prompt
    halves = (rows >> k for k in range(rows.bit_length()) if rows % (split.rows << k) == 0)
    tried = {phase.rows_at_once or rows, *halves}
    plans = {slots: plan(dataclasses.replace(config, phases=(_freed(phase, slots),))) for slots in tried}
    return min(plans, key=lambda slots: _rank(plans[slots]))


def search(
    config: Config,
    shape: Qwen3Config,
    topology: Topology,
    *,
    means: Means,
    programs: CompiledPrograms,
    shares: Shares = LIKELY,
    tell: Callable[[list[Plan]], None] | None = None,
) -> list[Plan]:
    """Plans of `by_formula`, best first; where there is a compiler, the first few of them compiled.

    `tell` hears what there is so far: the plans by formula, then the compiled ones after each.
    """
    rough = by_formula(config, shape, topology, means=means, shares=shares)
    if topology.devices is None:
        return [plan for _, plan in rough]
    tell = tell or (lambda _: None)
    tell([plan for _, plan in rough])
    best: list[Plan] = []
    for candidate, _ in rough[:COMPILED_MESHES]:
        best.append(make_plan(candidate, shape, topology, means=means, programs=programs, shares=shares))
        tell(sorted(best, key=_rank))
    return sorted(best, key=_rank)


def _rank(plan: Plan) -> tuple[bool, float, int]:
    """What fits first, then what is fast (to three digits), then what is small; of what does not fit, the smallest."""
    if not plan.fits:
        return True, plan.peak, 0
    return False, float(f"{sum(plan.step_seconds.values()):.3g}"), plan.peak


def _splits(devices: int) -> list[Split]:
    return [
        Split(data, devices // (data * tensor), tensor)
        for tensor in range(1, devices + 1)
        for data in range(1, devices // tensor + 1)
        if devices % (data * tensor) == 0
    ]
