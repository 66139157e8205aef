"""A run's plan on a topology: every phase's parts, whether they fit, how long they take at best; and the search."""

import dataclasses
from typing import NamedTuple

from jax.sharding import AbstractMesh, AxisType

from tsopsd_jax.config import DTYPES, Config, PhaseSettings
from tsopsd_jax.config.build import check_batches, make_phase
from tsopsd_jax.distributed.sharding import MESH_AXES, AnyMesh, make_mesh, mesh_sizes, tree_shardings
from tsopsd_jax.learn.micro_batches import RESERVE, choose_micro_batches
from tsopsd_jax.model import Qwen3, Qwen3Config
from tsopsd_jax.plan import estimate
from tsopsd_jax.plan.case import Case, Part
from tsopsd_jax.plan.chips import Topology
from tsopsd_jax.plan.compiled import CompiledPrograms, compile_parts
from tsopsd_jax.plan.roofline import Seconds, seconds
from tsopsd_jax.plan.work import Lengths, Split

COMPILED_MESHES = 3
"""Of the meshes that a search ranks by formula, so many of the best are compiled."""


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

    @property
    def limit(self) -> int:
        """Bytes that a program may take of a device."""
        return int((1 - RESERVE) * self.topology.chip.hbm_bytes)

    @property
    def peak(self) -> int:
        return max(part.peak for part in self.parts)

    @property
    def fits(self) -> bool:
        return self.peak <= self.limit

    @property
    def step_seconds(self) -> dict[str, float]:
        """Of one step of each phase, its parts one after the other."""
        return {
            name: sum(time.total for part, time in zip(self.parts, self.times, strict=True) if name in part.phases)
            for name in self.lengths
        }


def make_plan(
    config: Config, shape: Qwen3Config, topology: Topology, *, means: Means, programs: CompiledPrograms | None
) -> Plan:
    """The plan of a configuration on its own mesh.

    Args:
        shape: of the model.
        programs: what compiles; None, or GPUs: all by formula.

    Raises:
        ValueError: a mesh, batch or model that does not divide; a mean below 1.
    """
    asked = {axis: vars(config.mesh)[axis] for axis in MESH_AXES}
    abstract = AbstractMesh(mesh_sizes(topology.count, **asked), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    real = abstract if topology.devices is None else make_mesh(**asked, devices=topology.devices)
    mesh = abstract if programs is None else real
    check_batches(config, mesh)
    split, limit = Split(**mesh.shape), int((1 - RESERVE) * topology.chip.hbm_bytes)
    parts: list[Part] = []
    lengths: dict[str, Lengths] = {}
    for names, settings in _distinct(config):
        case = _case(config, shape, mesh, names, settings, means, topology)
        lengths |= dict.fromkeys(names, case.lengths)
        if programs is None or mesh is abstract:
            parts += estimate.estimate(case, settings.micro_batches or _pieces(case, limit))
        else:
            parts += compile_parts(case, programs, limit_bytes=limit)
    times = tuple(seconds(part, topology, real) for part in parts)
    return Plan(topology, split, tuple(parts), times, lengths)


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
    platform = "gpu" if topology.devices is None else "tpu"
    return Case(names, make_phase(settings), model, mesh, found, config.data.max_prompt_tokens, platform)


def _distinct(config: Config) -> list[tuple[tuple[str, ...], PhaseSettings]]:
    """Phases that differ in what they compute, each with the names of those that do not."""
    found: dict[str, tuple[list[str], PhaseSettings]] = {}
    free = ("name", "outcome", "stop", "guard", "optimizer_state", "optimizer", "reward")
    for phase in config.phases:
        fields = {key: value for key, value in vars(phase).items() if key not in free}
        key = f"{fields} {phase.reward is None}"
        found.setdefault(key, ([], phase))[0].append(phase.name)
    return [(tuple(names), phase) for names, phase in found.values()]


def _pieces(case: Case, limit: int) -> int:
    """Micro-batches by formula."""
    rows, shards = case.phase.rows, case.split.rows

    def need_of(pieces: int) -> int:
        return sum(estimate.update(case, pieces).values())

    try:
        return choose_micro_batches(need_of, rows=rows, width=case.width, shards=shards, limit_bytes=limit)
    except ValueError:
        return rows // shards


def by_formula(config: Config, shape: Qwen3Config, topology: Topology, *, means: Means) -> list[tuple[Config, Plan]]:
    """Every mesh that the model and the batches allow, micro-batches chosen anew: (the configuration with it, its plan by
    formula), best first.

    Raises:
        ValueError: if no mesh divides model and batches.
    """
    phases = tuple(dataclasses.replace(phase, micro_batches=None) for phase in config.phases)
    found: list[tuple[Config, Plan]] = []
    refused = ""
    for split in _splits(topology.count):
        mesh = dataclasses.replace(config.mesh, **split._asdict())
        candidate = dataclasses.replace(config, mesh=mesh, phases=phases)
        try:
            found.append((candidate, make_plan(candidate, shape, topology, means=means, programs=None)))
        except ValueError as error:
            refused = str(error)
    if not found:
        raise ValueError(f"search: no mesh of {topology.count} devices divides model and batches; the last: {refused}")
    return sorted(found, key=lambda pair: _rank(pair[1]))


def search(
    config: Config, shape: Qwen3Config, topology: Topology, *, means: Means, programs: CompiledPrograms
) -> list[Plan]:
    """Plans of `by_formula`, best first; for TPUs the first few of them, compiled."""
    rough = by_formula(config, shape, topology, means=means)
    if topology.devices is None:
        return [plan for _, plan in rough]
    best = [make_plan(c, shape, topology, means=means, programs=programs) for c, _ in rough[:COMPILED_MESHES]]
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
