"""How similar the layers of two policies are: linear CKA between every pair of layers (TS-OPSD, figure 3).

With X [n, D] and Y [n, D'] the states of two layers at the same n tokens, centred over the tokens (arXiv 1905.00414,
equation 3):

    CKA = |X^T Y|^2 / (|X^T X| |Y^T Y|)        Frobenius norms; 1: equal up to a rotation and a scale

The products are summed over tokens in float64, so memory does not grow with them. States are shifted by the mean of the
first batch before they are multiplied, and what is left of the mean is taken off the sums at the end: a dimension whose
mean is a thousand times its spread keeps its digits. All pairs of layers take 8 L^2 D^2 bytes; what exceeds
`memory_bytes` is done in more than one pass.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from tsopsd_jax.analysis.batches import GivenBatch
from tsopsd_jax.analysis.distributions import OnMesh
from tsopsd_jax.distributed.sharding import put, replicated, row_sharding
from tsopsd_jax.rundir.unfinished import Unfinished
from tsopsd_jax.types import Batch, PyTree

WIDTH_TOKENS = 64
"""Places for a row's response tokens are a multiple of this, so that few programs are compiled."""


class Sums:
    """Sums over tokens for some pairs of layers: X^T Y, the states themselves, and how many tokens they are of.

    Args:
        pairs: of layers (i, j) whose products are summed, X_i^T Y_j.
    """

    def __init__(self, pairs: Iterable[tuple[int, int]]):
        self.products: dict[tuple[int, int], np.ndarray | float] = dict.fromkeys(pairs, 0.0)
        self.x_total: np.ndarray | float = 0.0
        self.y_total: np.ndarray | float = 0.0
        self.tokens = 0

    def add(
        self, x_total: np.ndarray, y_total: np.ndarray, tokens: int, product: Callable[[int, int], np.ndarray]
    ) -> None:
        """Add a batch's sums: of states [layers, D] each, and `product(i, j)`, its X_i^T Y_j [D, D']."""
        self.x_total = self.x_total + np.asarray(x_total, np.float64)
        self.y_total = self.y_total + np.asarray(y_total, np.float64)
        self.tokens += tokens
        for i, j in self.products:
            self.products[i, j] = self.products[i, j] + np.asarray(product(i, j), np.float64)

    def state(self, name: str) -> dict[str, Any]:
        """All sums as arrays by names that begin with `name`."""
        products = {f"{name}.{i}.{j}": product for (i, j), product in self.products.items()}
        return products | {f"{name}.x": self.x_total, f"{name}.y": self.y_total, f"{name}.tokens": self.tokens}

    def take(self, name: str, saved: Mapping[str, np.ndarray]) -> None:
        """Go on from what `state` returned."""
        self.products = {(i, j): saved[f"{name}.{i}.{j}"] for i, j in self.products}
        self.x_total, self.y_total = saved[f"{name}.x"], saved[f"{name}.y"]
        self.tokens = int(saved[f"{name}.tokens"])

    def squared_norms(self) -> dict[tuple[int, int], float]:
        """|X^T Y|^2 of the centred states, for each pair."""
        x, y = np.asarray(self.x_total), np.asarray(self.y_total)
        centred = {(i, j): product - np.outer(x[i], y[j]) / self.tokens for (i, j), product in self.products.items()}
        return {pair: float(np.sum(np.square(product))) for pair, product in centred.items()}


def cka(cross: np.ndarray, own_x: np.ndarray, own_y: np.ndarray) -> np.ndarray:
    """Linear CKA of all pairs from squared norms: |X_i^T Y_j|^2 [L, L'], |X_i^T X_i|^2 [L], |Y_j^T Y_j|^2 [L'].

    Raises:
        ValueError: a layer whose states are all the same: it has no direction to compare.
    """
    if not (own_x > 0).all() or not (own_y > 0).all():
        raise ValueError(
            "representations: expected states that vary over the tokens, got a constant layer; give more tokens"
        )
    return cross / np.sqrt(own_x[:, None] * own_y[None, :])


class _Batched(NamedTuple):
    """Programs that work on the states of a batch, which stay on the devices."""

    states: Callable[..., Array]
    total: Callable[[Array], Array]
    product: Callable[..., Array]


def _programs(policies: tuple[OnMesh, OnMesh], mesh: Mesh) -> tuple[_Batched, _Batched]:
    everywhere = replicated(mesh)

    def total(states: Array) -> Array:
        return jnp.sum(states, axis=(1, 2))

    def product(x: Array, y: Array, i: Array, j: Array) -> Array:
        x, y = jax.lax.dynamic_index_in_dim(x, i, keepdims=False), jax.lax.dynamic_index_in_dim(y, j, keepdims=False)
        return jnp.einsum("BLD,BLE->DE", x, y, precision="highest", preferred_element_type=jnp.float32)

    def programs(policy: OnMesh) -> _Batched:
        def states(params: PyTree, batch: Batch, shift: Array, width: int) -> Array:
            found = policy.model.layer_states(params, batch.tokens).astype(jnp.float32)
            # Response tokens first in each row, and no more places than there are: products are what costs.
            at = jnp.argsort(~batch.mask, axis=1, stable=True)[:, :width]
            found = jnp.take_along_axis(found, at[None, :, :, None], axis=2)
            there = jnp.take_along_axis(batch.mask, at, axis=1)
            return jnp.where(there[None, :, :, None], found - shift[:, None, None, :], 0.0)

        return _Batched(
            jax.jit(states, static_argnums=3),
            jax.jit(total, out_shardings=everywhere),
            jax.jit(product, out_shardings=everywhere),
        )

    return programs(policies[0]), programs(policies[1])


def groups_of(layers: int, pair_bytes: int, memory_bytes: int) -> list[range]:
    """Divide the layers of `before` into groups, one for each pass: as many as `memory_bytes` holds products of.

    Args:
        layers: of each policy.
        pair_bytes: of one product.
        memory_bytes: for products; a layer at a time is the least.
    """
    each = max(1, memory_bytes // (pair_bytes * (layers + 2)))
    return [range(start, min(start + each, layers)) for start in range(0, layers, each)]


def layer_similarity(
    before: OnMesh,
    after: OnMesh,
    parts: Callable[[int, int], Iterator[GivenBatch]],
    *,
    mesh: Mesh,
    memory_bytes: int,
    kept: Unfinished | None = None,
) -> np.ndarray:
    """Linear CKA of each layer of `before` with each of `after`, [L, L'], at the response tokens.

    Args:
        before, after: on the mesh.
        parts: (pass, passes) -> the batches, from the start.
        memory_bytes: for the sums, on the host.
        kept: where the sums are saved from time to time, and gone on from; None: nowhere.

    Raises:
        ValueError: a layer whose states do not vary.
    """
    programs = _programs((before, after), mesh)
    counts = before.model.config.num_hidden_layers, after.model.config.num_hidden_layers
    widths = before.model.config.hidden_size, after.model.config.hidden_size
    groups = groups_of(max(counts), 8 * max(widths) ** 2, memory_bytes)
    groups = [range(g.start, min(g.stop, counts[0])) for g in groups if g.start < counts[0]]
    shifts = _shifts(before, after, parts(0, len(groups)), mesh)
    saved = kept.load() if kept else {}
    norms = {
        name: saved.get(name, np.zeros(shape))
        for name, shape in (("cross", counts), ("x", counts[0]), ("y", counts[1]))
    }
    for number in range(int(saved.get("pass", 0)), len(groups)):
        # The layers of `after` with themselves go along with the passes, each with one of them.
        apart = range(number * counts[1] // len(groups), (number + 1) * counts[1] // len(groups))
        group = groups[number]
        all_sums = {
            "xy": Sums((i, j) for i in group for j in range(counts[1])),
            "xx": Sums((i, i) for i in group),
            "yy": Sums((j, j) for j in apart),
        }
        done = int(saved.get("batches", 0))
        for name, sums in all_sums.items() if saved else ():
            sums.take(name, saved)
        saved = {}
        for batches, part in enumerate(itertools.islice(parts(number, len(groups)), done, None), start=done + 1):
            _add_batch(all_sums, part, (before, after), programs, shifts, mesh)
            if kept:
                kept.save(lambda n=number, b=batches, sums=all_sums: _state(n, b, norms, sums))
        for (i, j), norm in all_sums["xy"].squared_norms().items():
            norms["cross"][i, j] = norm
        for own in "xy":
            for (i, _), norm in all_sums[own + own].squared_norms().items():
                norms[own][i] = norm
    return cka(norms["cross"], norms["x"], norms["y"])


def _add_batch(
    all_sums: Mapping[str, Sums],
    part: GivenBatch,
    policies: tuple[OnMesh, OnMesh],
    programs: tuple[_Batched, _Batched],
    shifts: Sequence[np.ndarray],
    mesh: Mesh,
) -> None:
    """Add a batch to the sums of X with Y, X with itself and Y with itself: "xy", "xx", "yy"."""
    batch, lengths = put(part.batch, row_sharding(mesh)), np.sum(np.asarray(part.batch.mask), axis=1)
    width = min(part.batch.mask.shape[1], -(-int(lengths.max()) // WIDTH_TOKENS) * WIDTH_TOKENS)
    states, totals = dict[str, Array](), dict[str, np.ndarray]()
    for name, policy, program, shift in zip("xy", policies, programs, shifts, strict=True):
        states[name] = program.states(policy.params, batch, put(shift, replicated(mesh)), width)
        totals[name] = jax.device_get(program.total(states[name]))
    product = programs[0].product
    for (a, b), sums in all_sums.items():
        x, y = states[a], states[b]
        sums.add(
            totals[a],
            totals[b],
            int(lengths.sum()),
            lambda i, j, x=x, y=y: jax.device_get(product(x, y, np.int32(i), np.int32(j))),
        )


def _state(number: int, batches: int, norms: Mapping[str, np.ndarray], sums: Mapping[str, Sums]) -> dict[str, Any]:
    """What a computation that stops after these batches of pass `number` has found."""
    found = dict[str, Any](norms) | {"pass": number, "batches": batches}
    for name, each in sums.items():
        found |= each.state(name)
    return found


def _shifts(before: OnMesh, after: OnMesh, parts: Iterator[GivenBatch], mesh: Mesh) -> list[np.ndarray]:
    """The mean state of each layer over the first batch, of both policies, [L, D] each."""
    part = next(iter(parts))
    batch, tokens = put(part.batch, row_sharding(mesh)), int(np.sum(np.asarray(part.batch.mask)))

    def mean(policy: OnMesh) -> np.ndarray:
        def of(params: PyTree, batch: Batch) -> Array:
            states = policy.model.layer_states(params, batch.tokens).astype(jnp.float32)
            return jnp.sum(jnp.where(batch.mask[None, :, :, None], states, 0.0), axis=(1, 2)) / tokens

        return np.asarray(jax.device_get(jax.jit(of, out_shardings=replicated(mesh))(policy.params, batch)))

    return [mean(before), mean(after)]
