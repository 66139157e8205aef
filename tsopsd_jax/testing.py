"""The contract of an objective, checked on a toy batch: for people's own objectives, and before every run."""

import contextlib
import functools
import inspect
import math
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import Literal

from tsopsd_jax.objectives import Objective
from tsopsd_jax.types import Batch, LossOutput, Mean

PROMPT, RESPONSE = (2, 1, 3, 1, 2, 1), (5, 1, 3, 4, 2, 6)
"""Tokens of the toy batch's rows: ragged, so that no two parts of the batch count the same."""

WIDTH, VOCABULARY = 8, 512
"""Positions and entries of the toy batch: enough entries for a top-k of one's own."""

TOLERANCE = 1e-3
"""Relative difference that is taken for rounding: sums run in another order; a mistake makes more."""

LIVE_GRADIENT = 1e-7
"""Into a logit; what is below may be the rounding of a probability."""


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
    the same for tokens in any arrangement, as tiles and packed rows have them. If not `uses_advantage`, for other advantages.

    Raises:
        ValueError: one line that says what is broken: file, function, expected, got.
    """
    _check_declarations(objective)
    toy = _toy()
    _check_shapes(objective, toy)
    program = _Program(objective)
    found = program(toy)
    _check_finite(objective, found)
    if not objective.tokenwise:
        _check_rows(objective, program, toy, found)
    else:
        _check_tokenwise(objective, program, toy, found)
    if not objective.uses_advantage:
        other = _Toy(toy.z, _replaced(toy.batch, advantage=-2 * toy.batch.advantage))
        for what, want, got in _unequal(found, program(other)):
            raise ValueError(
                f"{_place(objective.loss)}: declares uses_advantage=False, but {what} changes with batch.advantage from "
                f"{want} to {got}; leave uses_advantage out, and give its phase a reward"
            )
    return _gradient_notes(objective, program, toy, found)


# ------------------------------------------------------------------ the toy batch


class _Toy(NamedTuple):
    """Logits [B, L, V] and the batch to which they belong (numpy): the logits at [b, t] predict `tokens[b, t]`."""

    z: np.ndarray
    batch: Batch


class _Found(NamedTuple):
    """What an objective makes of a batch (numpy): statistics [B, L], loss and metrics, gradient into the logits."""

    stats: dict[str, np.ndarray]
    out: LossOutput
    gradient: np.ndarray


def _replaced(batch: Batch, **fields: Any) -> Batch:
    return Batch(**(vars(batch) | fields))


def _toy() -> _Toy:
    rng = np.random.default_rng(0)
    shape = len(PROMPT), WIDTH
    at, prompt = np.arange(WIDTH)[None, :], np.array(PROMPT)[:, None]
    end = prompt + np.array(RESPONSE)[:, None]
    mask = (at >= prompt) & (at < end)
    z = 1.5 * rng.normal(size=(*shape, VOCABULARY))
    tokens = rng.integers(0, VOCABULARY, shape)
    logp = np.take_along_axis(z, tokens[..., None], -1)[..., 0] - np.log(np.exp(z).sum(-1))
    fields = {
        "tokens": np.where(at < end, tokens, 0).astype(np.int32),
        "mask": mask,
        "advantage": np.where(mask, rng.normal(size=(shape[0], 1)), 0).astype(np.float32),
        "old_logp": np.where(mask, np.minimum(logp + 0.2 * rng.normal(size=shape), -0.01), 0).astype(np.float32),
    }
    return _Toy(z.astype(np.float32), Batch(**fields))


def _rows(toy: _Toy, which: Any) -> _Toy:
    return jax.tree.map(lambda x: x[which], toy)


def _padded(toy: _Toy) -> _Toy:
    """Three more positions in every row, whose logits are ones."""
    z = np.pad(toy.z, ((0, 0), (0, 3), (0, 0)), constant_values=1.0)
    return _Toy(z, jax.tree.map(lambda x: np.pad(x, ((0, 0), (0, 3))), toy.batch))


def _joined(parts: Sequence[_Found], at: Any) -> _Found:
    """What was found of a batch's parts as that of the batch: sums added, what is per token (at `at`) side by side."""
    return _Found(
        {name: np.concatenate([part.stats[name][at] for part in parts]) for name in parts[0].stats},
        jax.tree.map(lambda *xs: np.sum(xs, axis=0), *(part.out for part in parts)),
        np.concatenate([part.gradient[at] for part in parts]),
    )


class _Program:
    """An objective as the head calls it: statistics of flat tokens, then the loss; compiled once for each shape.

    On the CPU, where there is one beside the accelerator, and without optimization: toys are compiled longer than they run.
    """

    def __init__(self, objective: Objective):
        def total(z, batch: Batch, tiles: bool):
            shape = batch.tokens.shape
            stats = objective.stats(z.reshape(-1, z.shape[-1]), batch.tokens.reshape(-1))
            stats = {name: x.reshape(shape) for name, x in stats.items()}
            if not tiles:  # the head gives zeros outside the mask; a tile holds what it finds there
                stats = {name: jax.numpy.where(batch.mask, x, jax.numpy.zeros_like(x)) for name, x in stats.items()}
            out = objective.loss(stats, batch)
            return out.loss.total, (stats, out)

        self.objective = objective
        self.gradient = jax.grad(total, has_aux=True)
        self._device = next(iter(_cpu_devices()), None)
        options = {} if self._device is None else {"xla_backend_optimization_level": 0}
        self._jitted = jax.jit(self.gradient, static_argnums=2, compiler_options=options)

    def __call__(self, toy: _Toy, *, tiles: bool = False) -> _Found:
        with _named(self.objective.stats, self.objective.loss), jax.default_device(self._device):
            gradient, (stats, out) = jax.device_get(self._jitted(toy.z, toy.batch, tiles))
        return _Found(stats, out, gradient)


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
    for name, value in (("tokenwise", objective.tokenwise), ("uses_advantage", objective.uses_advantage)):
        if not isinstance(value, bool):
            raise ValueError(f"{place}: expected {name} to be True or False, got {value!r}")
    if t is not None and not (isinstance(t, int | float) and 0 < t < math.inf):
        raise ValueError(f"{place}: expected policy_temperature to be positive or None, got {t!r}")


def _check_shapes(objective: Objective, toy: _Toy) -> None:
    """Abstract evaluation of both functions, with the shapes in which the head calls them."""
    shape, n = toy.batch.tokens.shape, toy.batch.tokens.size
    with _named(objective.stats):
        stats = jax.eval_shape(objective.stats, toy.z.reshape(n, -1), toy.batch.tokens.reshape(n))
    place = _place(objective.stats)
    if not isinstance(stats, dict) or not all(isinstance(name, str) for name in stats):
        raise ValueError(f"{place}: expected a dict of statistics by name, got {_short(stats)}")
    for name, x in stats.items():
        if not _is_float(x, (n,)):
            raise ValueError(
                f"{place}: expected the statistic {name!r} of logits {[n, VOCABULARY]} to be floats of shape {[n]}, one a "
                f"token, got {_short(x)}"
            )
    by_row = {name: jax.ShapeDtypeStruct(shape, x.dtype) for name, x in stats.items()}
    with _named(objective.loss, note=f"stats returns {', '.join(stats) or 'nothing'}"):
        out = jax.eval_shape(objective.loss, by_row, toy.batch)
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
                    f"{place}: expected the {part} of {name} to be a float of shape [], got {_short(x)}; Mean.of adds up"
                )


def _check_finite(objective: Objective, found: _Found) -> None:
    for what, x in _values(found):
        if not np.isfinite(x).all():
            place = _place(objective.stats if what.startswith("the statistic") else objective.loss)
            raise ValueError(f"{place}: expected finite values on the toy batch, got {what} with {_odd(x)}")
    if not found.out.loss.count > 0:
        raise ValueError(
            f"{_place(objective.loss)}: expected the loss to count tokens, got a count of {found.out.loss.count}"
        )


def _check_rows(objective: Objective, program: _Program, toy: _Toy, found: _Found) -> None:
    """The same result for rows in another order, and for two micro-batches with more padding."""
    order = np.array([3, 1, 5, 0, 4, 2])
    back = np.argsort(order)
    _compare(objective, found, _joined([program(_rows(toy, order))], back), "rows stand in another order")
    padded = _padded(toy)
    halves = [program(_rows(padded, slice(start, start + 3))) for start in (0, 3)]
    in_halves = _joined(halves, np.s_[:, :WIDTH])
    if next(_unequal(found, in_halves), None) is None:
        return
    more = _joined([program(padded)], np.s_[:, :WIDTH])
    _compare(objective, found, more, "rows have more padding", "; use batch.mask, as in Mean.of(values, batch.mask)")
    why = "; what is added over micro-batches must be sums and counts, as Mean.of(values, batch.mask) has them"
    _compare(objective, found, in_halves, "the batch is cut into two micro-batches, and results are added", why)


def _check_tokenwise(objective: Objective, program: _Program, toy: _Toy, found: _Found) -> None:
    """The same result for the response tokens in any order, in two tiles of one row, of which one has an empty place."""
    mask = toy.batch.mask
    order = np.random.default_rng(1).permutation(np.flatnonzero(mask))
    n = order.size // 2 + 1
    tiles = []
    for at in (order[:n], order[n:]):

        def take(x: np.ndarray, at: np.ndarray = at) -> np.ndarray:
            x = x.reshape(-1, *x.shape[2:])[at]
            return np.pad(x, [(0, n - at.size)] + [(0, 0)] * (x.ndim - 1))[None]

        segment = np.broadcast_to(np.arange(1, len(mask) + 1, dtype=np.int32)[:, None], mask.shape)
        tile = _Toy(take(toy.z), jax.tree.map(take, _replaced(toy.batch, segment=segment)))
        tiles.append(_joined([program(tile, tiles=True)], (0, slice(at.size))))
    want, got = _joined([found], np.unravel_index(order, mask.shape)), _joined(tiles, np.s_[:])
    if next(_unequal(want, got), None) is not None:
        _check_rows(objective, program, toy, found)  # what is wrong with rows already is said so
    why = "; leave tokenwise out for a loss that looks at more than a token"
    _compare(objective, want, got, "tokens stand in another order, as tokenwise=True allows", why)


def _gradient_notes(objective: Objective, program: _Program, toy: _Toy, found: _Found) -> list[str]:
    if np.abs(found.gradient).max() > LIVE_GRADIENT:
        return []
    place = _place(objective.loss)
    jaxpr: Any = jax.make_jaxpr(program.gradient, static_argnums=2)(toy.z, toy.batch, False).jaxpr
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


def _values(found: _Found) -> Iterator[tuple[str, Any]]:
    """Everything that was found, by name, in the order in which one thing follows from another."""
    for name, x in found.stats.items():
        yield f"the statistic {name!r}", x
    yield "the loss's count", found.out.loss.count
    yield "the loss's total", found.out.loss.total
    for name, mean in found.out.metrics.items():
        yield f"the count of {name!r}", mean.count
        yield f"the total of {name!r}", mean.total
    yield "the gradient", found.gradient


def _unequal(want: _Found, got: _Found) -> Iterator[tuple[str, str, str]]:
    """(what, wanted, got) of all that differs by more than rounding, at the place where it differs most."""
    for (what, a), (_, b) in zip(_values(want), _values(got), strict=True):
        apart = np.abs(np.asarray(a, np.float64) - b)
        floor = 1e-6 if what == "the gradient" else 1e-5
        if not apart.max() <= TOLERANCE * np.abs(a).max() + floor:
            at = np.unravel_index(np.argmax(apart), apart.shape)
            yield what, f"{np.asarray(a)[at]:.6g}", f"{np.asarray(b)[at]:.6g}"


def _compare(objective: Objective, want: _Found, got: _Found, where: str, why: str = "") -> None:
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
