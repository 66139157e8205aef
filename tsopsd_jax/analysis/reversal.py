"""How far cooling undoes reheating in the space of parameters (TS-OPSD, appendix E, figure 12).

With H = reheated - collapsed and L = recooled - reheated:

    cosine              <H, L> / (|H| |L|)            -1: opposite directions
    reverse projection  -<L, H> / |H|^2               1: H is taken back in full
    norm ratio          |L| / |H|
    residual            |H + L| / |H|                 0: back where it began
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

PIECE = 1 << 20
"""Numbers that are compared at once: three float64 copies of them fit a processor's cache."""


class Reversal(NamedTuple):
    """The four measures; None where a part did not move, so that a direction or a ratio is not defined."""

    cosine: float | None
    reverse_projection: float | None
    norm_ratio: float | None
    residual: float | None


def moved(before: np.ndarray, after: np.ndarray, recooled: np.ndarray) -> np.ndarray:
    """Sum up |H|^2, <H, L>, |L|^2 and |H + L|^2 of one tensor, [4] in float64; sums of several tensors add.

    Args:
        before, after, recooled: of one shape, in any float type; differences are taken in float64, piece by piece.

    Raises:
        ValueError: if their shapes differ.
    """
    if not before.shape == after.shape == recooled.shape:
        raise ValueError(
            f"expected one shape, got before {before.shape}, after {after.shape}, recooled {recooled.shape}"
        )
    sums = np.zeros(4)
    flat = [x.reshape(-1) for x in (before, after, recooled)]
    for start in range(0, before.size, PIECE):
        a, b, c = (x[start : start + PIECE].astype(np.float64) for x in flat)
        heated, cooled, left = b - a, c - b, c - a
        sums += heated @ heated, heated @ cooled, cooled @ cooled, left @ left
    return sums


def reversal_of(sums: np.ndarray) -> Reversal:
    """Turn the sums of `moved` into the measures."""
    heated2, product, cooled2, left2 = map(float, sums)
    if heated2 == 0.0:
        return Reversal(None, None, None, None)
    return Reversal(
        cosine=product / (heated2 * cooled2) ** 0.5 if cooled2 else None,
        reverse_projection=-product / heated2,
        norm_ratio=(cooled2 / heated2) ** 0.5,
        residual=(left2 / heated2) ** 0.5,
    )


def part_of(name: str) -> str:
    """The part of the model that a stored tensor belongs to: its layer's number, or `embed_tokens`, `norm`,
    `lm_head`."""
    layer = re.search(r"\.layers\.(\d+)\.", name)
    return layer[1] if layer else name.removesuffix(".weight").split(".")[-1]


class Reversals(NamedTuple):
    """The measures of the whole model, and of each part in the order of the forward pass."""

    whole: Reversal
    parts: dict[str, Reversal]


def add_up(sums: Iterable[tuple[str, np.ndarray]]) -> Reversals:
    """Add up the sums of tensors, given by their names, for the whole model and its parts.

    Raises:
        ValueError: if nothing moved between `before` and `after`.
    """
    total, parts = np.zeros(4), dict[str, np.ndarray]()
    for name, each in sums:
        total = total + each
        parts[part_of(name)] = parts.get(part_of(name), np.zeros(4)) + each
    if total[0] == 0.0:
        raise ValueError("reversal: expected --before and --after to differ, got two equal policies")
    return Reversals(reversal_of(total), {name: reversal_of(each) for name, each in parts.items()})


def layers_of(found: Reversals) -> Iterator[tuple[int, Reversal]]:
    """The parts that are layers, with their numbers."""
    return ((int(name), each) for name, each in found.parts.items() if name.isdigit())
