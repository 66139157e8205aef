"""The contracts of objectives, checked on a toy batch, and of rewards: for people's own, and before every run."""

import contextlib
import dataclasses
import functools
import inspect
import math
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

from tsopsd_jax.metric_names import GRAD_NORM, LOSS
from tsopsd_jax.objectives import Control, Objective
from tsopsd_jax.objectives.toy import (
    VOCABULARY,
    WIDTH,
    Found,
    Toy,
    flat_stats,
    join_found,
    make_toy,
    mapped,
    packed,
    padded,
    take_rows,
)
from tsopsd_jax.rewards import check_reward as check_reward
from tsopsd_jax.types import SAMPLING_TEMPERATURE, Batch, LossOutput, Mean

TOLERANCE = 1e-3
"""Relative difference that is taken for rounding: sums run in another order; a mistake makes more."""

ORDER = np.array([3, 1, 5, 0, 4, 2])  # another order of the toy's rows
LIVE_GRADIENT = 1e-7  # into a logit; what is below may be the rounding of a probability


def check_objective(objective: Objective) -> None:
    """Check that an objective keeps its contract (`objective_notes` says what is checked).

    Warns where the gradient is zero on the toy batch, which may be meant: TS-OPSD at temperature 1.

    Raises:
        ValueError: one line that says what is broken: file, function, expected, got.
    """
    for note in objective_notes(objective):
        warnings.warn(note, stacklevel=2)


def objective_notes(objective: Objective) -> list[str]:
    """Check that an objective keeps its contract, and list what is allowed but may be a mistake.

    Shapes and keys, by abstract evaluation. Then on a toy batch: values are finite, a gradient reaches the logits, and
    the result is the same for rows in another order and for two micro-batches with more padding. If it is `tokenwise`,
    the same for tokens in any arrangement, as tiles and packed rows have them. If not `uses_advantage`, for other
    advantages. What `select` makes of the batch is the same for rows in another order and for packed rows, and keeps
    the mask; `control` turns numbers into numbers.

    Raises:
        ValueError: one line that says what is broken: file, function, expected, got.
    """
    _check_declarations(objective)
    toy = make_toy(objective)
    stats = _check_stats(objective, toy)
    toy = _check_select(objective, toy)
    metrics = _check_loss(objective, toy, stats)
    if objective.control is not None:
        _check_turning(objective.control, metrics)
    program = _Program(objective)
    found = program(toy)
    _check_finite(objective, found)
    if not objective.tokenwise:
        _check_rows(objective, program, toy, found)
    else:
        _check_tokenwise(objective, program, toy, found)
    if not objective.uses_advantage:
        other = toy._replace(batch=dataclasses.replace(toy.batch, advantage=-2 * toy.batch.advantage))
        for what, want, got in _unequal(found, program(other)):
            raise ValueError(
                f"{_place(objective.loss)}: declares uses_advantage=False, but {what} changes with batch.advantage "
                f"from {want} to {got}; leave uses_advantage out, and give its phase a reward"
            )
    return _gradient_notes(objective, program, toy, found)


class _Program:
    """An objective as the head calls it: statistics of flat tokens, then the loss; compiled once for each shape.

    On the CPU, where there is one beside the accelerator, and without optimization: compiling toys takes longest.
    """

    def __init__(self, objective: Objective):
        def total(z, batch: Batch, reference_z: Any, tiles: bool):
            shape = batch.tokens.shape
            stats = {name: x.reshape(shape) for name, x in flat_stats(objective, z, batch, reference_z).items()}
            if not tiles:  # the head gives zeros outside the mask; a tile holds what it finds there
                stats = {name: jax.numpy.where(batch.mask, x, jax.numpy.zeros_like(x)) for name, x in stats.items()}
            out = objective.loss(stats, batch)
            return out.loss.total, (stats, out)

        self.objective = objective
        self.gradient = jax.grad(total, has_aux=True)
        self._device = next(iter(_cpu_devices()), None)
        options = {} if self._device is None else {"xla_backend_optimization_level": 0}
        self._jitted = jax.jit(self.gradient, static_argnums=3, compiler_options=options)

    def __call__(self, toy: Toy, *, tiles: bool = False) -> Found:
        with _named(self.objective.stats, self.objective.loss), jax.default_device(self._device):
            gradient, (stats, out) = jax.device_get(self._jitted(*toy, tiles))
        return Found(stats, out, gradient)


def _cpu_devices() -> Sequence[Any]:
    try:
        return jax.local_devices(backend="cpu")
    except RuntimeError:  # JAX was told to know accelerators alone
        return ()


# ------------------------------------------------------------------ checks


def _check_declarations(objective: Objective) -> None:
    if not (isinstance(objective, Objective) and callable(objective.stats) and callable(objective.loss)):
        raise ValueError(f"expected an Objective of two functions, got {objective!r}")
    place, t = _place(objective.loss), objective.policy_temperature
    for name in ("tokenwise", "uses_advantage", "reference"):
        if not isinstance(value := objective._asdict()[name], bool):
            raise ValueError(f"{place}: expected {name} to be True or False, got {value!r}")
    if objective.select is not None and not callable(objective.select):
        raise ValueError(f"{place}: expected select to be a function, got {objective.select!r}")
    control = objective.control
    if control is not None and not (isinstance(control, Control) and callable(control.update)):
        raise ValueError(f"{place}: expected a Control(init, update), got {control!r}")
    if t is not None and not (isinstance(t, int | float) and 0 < t < math.inf):
        raise ValueError(f"{place}: expected policy_temperature to be positive or None, got {t!r}")


def _check_turning(control: Control, names: set[str]) -> None:
    """Numbers by name, before and after updates that report the loss's own metrics and what every update does."""
    turned = control.init
    for value in (0.01, 1.0):
        metrics = dict.fromkeys(sorted(names | {LOSS, GRAD_NORM}), value)
        with _named(control.update, note=f"its metrics here are {metrics}"):
            turned = control.update(dict(turned), metrics)
        for knobs in (control.init, turned):
            odd = {k: v for k, v in knobs.items() if not isinstance(v, int | float) or not math.isfinite(v)}
            if odd or set(knobs) != set(control.init) or knobs.get(SAMPLING_TEMPERATURE, 1.0) <= 0:
                above = " (a temperature above 0)" if SAMPLING_TEMPERATURE in control.init else ""
                raise ValueError(
                    f"{_place(control.update)}: expected finite numbers under {sorted(control.init)}{above}, got "
                    f"{dict(knobs)!r}"
                )


def _check_stats(objective: Objective, toy: Toy) -> dict[str, Any]:
    """Abstract evaluation of the statistics, with the shapes in which the head asks for them: their shapes [B, L]."""
    n = toy.batch.tokens.size
    with _named(objective.stats):
        stats = jax.eval_shape(functools.partial(flat_stats, objective), *toy)
    place = _place(objective.stats)
    if not isinstance(stats, dict) or not all(isinstance(name, str) for name in stats):
        raise ValueError(f"{place}: expected a dict of statistics by name, got {_short(stats)}")
    for name, x in stats.items():
        if not _is_float(x, (n,)):
            raise ValueError(
                f"{place}: expected the statistic {name!r} of logits {[n, VOCABULARY]} to be floats of shape {[n]}, "
                f"one a token, got {_short(x)}"
            )
    return {name: jax.ShapeDtypeStruct(toy.batch.tokens.shape, x.dtype) for name, x in stats.items()}


def _check_loss(objective: Objective, toy: Toy, stats: dict[str, Any]) -> set[str]:
    """Abstract evaluation of the loss: the names of its metrics."""
    with _named(objective.loss, note=f"stats returns {', '.join(stats) or 'nothing'}"):
        out = jax.eval_shape(objective.loss, stats, toy.batch)
    place = _place(objective.loss)
    if not isinstance(out, LossOutput):
        raise ValueError(f"{place}: expected a LossOutput, got {_short(out)}")
    if not isinstance(out.metrics, dict) or not all(isinstance(name, str) for name in out.metrics):
        raise ValueError(f"{place}: expected metrics to be a dict of Mean by name, got {_short(out.metrics)}")
    for name, mean in {"the loss": out.loss, **{f"the metric {name!r}": m for name, m in out.metrics.items()}}.items():
        if not isinstance(mean, Mean):
            raise ValueError(f"{place}: expected {name} to be a Mean, got {_short(mean)}; Mean.of makes one")
        for part, x in vars(mean).items():
            if not _is_float(x, ()):
                raise ValueError(
                    f"{place}: expected the {part} of {name} to be a float of shape [], got {_short(x)}; use Mean.of"
                )
    return set(out.metrics)


def _check_select(objective: Objective, toy: Toy) -> Toy:
    """The toy as `select` leaves it, the same for rows in another order, and for several sequences in a row."""
    if objective.select is None:
        return toy
    select: Any = objective.select

    @jax.jit
    def of(z, batch: Batch, reference_z: Any):
        found = flat_stats(objective, z, batch, reference_z)
        by_row = {k: jax.numpy.where(batch.mask, x.reshape(batch.mask.shape), 0.0) for k, x in found.items()}
        return select(objective.read(by_row), batch)

    def selected(toy: Toy) -> Batch:
        with _named(objective.stats, select):
            return of(*toy)

    place, made = _place(select), selected(toy)
    if not isinstance(made, Batch):
        raise ValueError(f"{place}: expected select to return a Batch, got {_short(made)}; try dataclasses.replace")
    made = jax.device_get(made)
    if not np.array_equal(made.mask, toy.batch.mask) or not np.array_equal(made.tokens, toy.batch.tokens):
        raise ValueError(
            f"{place}: expected select to keep mask and tokens, got others; set weight to leave tokens out"
        )
    for name, x in made.knobs.items():
        if np.shape(x) != ():
            raise ValueError(f"{place}: expected the knob {name!r} to be a scalar, got shape {list(np.shape(x))}")

    def set_by(batch: Batch) -> dict[str, Any]:
        fields = {name: vars(batch)[name] for name in ("weight", "advantage", "old_logp")}
        per_token = {name: x[toy.batch.mask] for name, x in fields.items() if x is not None}
        return per_token | {f"the knob {name!r}": x for name, x in batch.knobs.items()}

    def compare(other: Batch, where: str) -> None:
        for (name, want), got in zip(set_by(made).items(), set_by(other).values(), strict=True):
            if not np.allclose(want, got, rtol=TOLERANCE, atol=1e-5):
                raise ValueError(f"{place}: expected {name} to stay as it is where {where}, got another")

    shuffled = jax.device_get(selected(take_rows(toy, ORDER)))
    compare(mapped(lambda x: x[np.argsort(ORDER)], shuffled), "rows stand in another order")
    together = mapped(lambda x: x.reshape(toy.batch.mask.shape), jax.device_get(selected(packed(toy))))
    compare(together, "several sequences stand in a row")
    return toy._replace(batch=made)


def _check_finite(objective: Objective, found: Found) -> None:
    for what, x in _values(found):
        if not np.isfinite(x).all():
            place = _place(objective.stats if what.startswith("the statistic") else objective.loss)
            raise ValueError(f"{place}: expected finite values on the toy batch, got {what} with {_odd(x)}")
    if not found.out.loss.count > 0:
        raise ValueError(
            f"{_place(objective.loss)}: expected the loss to count tokens, got a count of {found.out.loss.count}"
        )


def _check_rows(objective: Objective, program: _Program, toy: Toy, found: Found) -> None:
    """Check that rows in another order, and two micro-batches with more padding, give the same result."""
    back = np.argsort(ORDER)
    _compare(objective, found, join_found([program(take_rows(toy, ORDER))], back), "rows stand in another order")
    more_padding = padded(toy)
    halves = [program(take_rows(more_padding, slice(start, start + 3))) for start in (0, 3)]
    in_halves = join_found(halves, np.s_[:, :WIDTH])
    if next(_unequal(found, in_halves), None) is None:
        return
    more = join_found([program(more_padding)], np.s_[:, :WIDTH])
    _compare(objective, found, more, "rows have more padding", "; use batch.mask, as in Mean.of(values, batch.mask)")
    why = "; what is added over micro-batches must be sums and counts, as Mean.of(values, batch.mask) has them"
    _compare(objective, found, in_halves, "the batch is cut into two micro-batches, and results are added", why)


def _check_tokenwise(objective: Objective, program: _Program, toy: Toy, found: Found) -> None:
    """Check that response tokens in any order, in two tiles of a row, one with an empty place, give the same result."""
    mask = toy.batch.mask
    order = np.random.default_rng(1).permutation(np.flatnonzero(mask))
    n = order.size // 2 + 1
    tiles = []
    for at in (order[:n], order[n:]):

        def take(x: np.ndarray, at: np.ndarray = at) -> np.ndarray:
            x = x.reshape(-1, *x.shape[2:])[at]
            return np.pad(x, [(0, n - at.size)] + [(0, 0)] * (x.ndim - 1))[None]

        segment = np.broadcast_to(np.arange(1, len(mask) + 1, dtype=np.int32)[:, None], mask.shape)
        tile = toy._replace(batch=dataclasses.replace(toy.batch, segment=segment)).mapped(take)
        tiles.append(join_found([program(tile, tiles=True)], (0, slice(at.size))))
    want, got = join_found([found], np.unravel_index(order, mask.shape)), join_found(tiles, np.s_[:])
    if next(_unequal(want, got), None) is not None:
        _check_rows(objective, program, toy, found)  # what is wrong with rows already is said so
    why = "; leave tokenwise out for a loss that looks at more than a token"
    _compare(objective, want, got, "tokens stand in another order, as tokenwise=True allows", why)


def _gradient_notes(objective: Objective, program: _Program, toy: Toy, found: Found) -> list[str]:
    if np.abs(found.gradient).max() > LIVE_GRADIENT:
        return []
    place = _place(objective.loss)
    jaxpr: Any = jax.make_jaxpr(program.gradient, static_argnums=3)(*toy, False).jaxpr
    if not _depends(jaxpr, jaxpr.outvars[0]):
        raise ValueError(
            f"{place}: expected a loss that depends on the logits, got one without a gradient: nothing would be learned"
        )
    return [f"{place}: the gradient of the loss is zero on the toy batch; a phase that minimises it changes nothing"]


def _depends(jaxpr: Any, out: Any) -> bool:
    """Whether an output of a program is made of any of its inputs, and is not a constant."""
    made = set(jaxpr.invars)
    for eqn in jaxpr.eqns:
        if any(not isinstance(x, Literal) and x in made for x in eqn.invars):
            made |= set(eqn.outvars)
    return not isinstance(out, Literal) and out in made


# ------------------------------------------------------------------ comparing, and words


def _values(found: Found) -> Iterator[tuple[str, Any]]:
    """Everything that was found, by name, in the order in which one thing follows from another."""
    for name, x in found.stats.items():
        yield f"the statistic {name!r}", x
    yield "the loss's count", found.out.loss.count
    yield "the loss's total", found.out.loss.total
    for name, mean in found.out.metrics.items():
        yield f"the count of {name!r}", mean.count
        yield f"the total of {name!r}", mean.total
    yield "the gradient", found.gradient


def _unequal(want: Found, got: Found) -> Iterator[tuple[str, str, str]]:
    """(what, wanted, got) of all that differs by more than rounding, at the place where it differs most."""
    for (what, a), (_, b) in zip(_values(want), _values(got), strict=True):
        apart = np.abs(np.asarray(a, np.float64) - b)
        floor = 1e-6 if what == "the gradient" else 1e-5
        if not apart.max() <= TOLERANCE * np.abs(a).max() + floor:
            at = np.unravel_index(np.argmax(apart), apart.shape)
            yield what, f"{np.asarray(a)[at]:.6g}", f"{np.asarray(b)[at]:.6g}"


def _compare(objective: Objective, want: Found, got: Found, where: str, why: str = "") -> None:
    for what, a, b in _unequal(want, got):
        if what.startswith("the statistic"):
            why = "; a token's statistics may follow from its own logits alone"
        place = _place(objective.stats if what.startswith("the statistic") else objective.loss)
        raise ValueError(f"{place}: expected {what} to stay {a} where {where}, got {b}{why}")


def _is_float(x: Any, shape: tuple[int, ...]) -> bool:
    return (
        isinstance(x, jax.ShapeDtypeStruct) and x.shape == shape and jax.numpy.issubdtype(x.dtype, jax.numpy.floating)
    )


def _short(x: Any) -> str:
    if isinstance(x, jax.ShapeDtypeStruct):
        return f"{x.dtype} of shape {list(x.shape)}"
    return " ".join(repr(x).split())[:100]


def _odd(x: np.ndarray) -> str:
    return f"{x[~np.isfinite(x)].flat[0]}" if np.ndim(x) else f"{x}"


def _source(function: Any) -> tuple[str, int, str]:
    """(file, line, name) of a function, or of the class of another callable."""
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    if inspect.ismethod(function):
        function = function.__func__
    if inspect.isfunction(function):
        return function.__code__.co_filename, function.__code__.co_firstlineno, function.__name__
    kind = function if inspect.isclass(function) else type(function)
    try:
        return inspect.getsourcefile(kind) or kind.__module__, inspect.getsourcelines(kind)[1], kind.__name__
    except (OSError, TypeError):  # not from a file
        return kind.__module__, 0, kind.__name__


def _written(file: str, line: int | None, name: str) -> str:
    path = Path(file)
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return f"{path}:{line}, {name}"


def _place(function: Any) -> str:
    return _written(*_source(function))


@contextlib.contextmanager
def _named(*functions: Any, note: str = "") -> Iterator[None]:
    """Turn what an objective's function raises into one line that names the place in its file."""
    try:
        yield
    except Exception as error:
        files = {_source(function)[0] for function in functions}
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename in files]
        place = _written(frames[-1].filename, frames[-1].lineno, frames[-1].name) if frames else _place(functions[-1])
        first = " ".join(str(error).strip().split("\n\n")[0].split())[:300]
        more = f" ({note})" if note and isinstance(error, KeyError) else ""
        raise ValueError(f"{place}: raised {type(error).__name__}: {first}{more}") from error
