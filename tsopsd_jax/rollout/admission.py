"""Division of newly admitted rows into prefills: which prompts, on which shard, and which slots their cache goes to.

A prompt is prefilled on the shard whose slots continue it, so no cache ever leaves its devices. Rows of a group mostly
share a shard (`Schedule`); a group that does not fit into one is prefilled on each that it came to.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tsopsd_jax.rollout.schedule import Admitted, power_of_two


class Piece(NamedTuple):
    """Prompts that are prefilled together, and the rows that wait for them.

    Prompts are numbered within their shard: 0 is the one that it carried on from before, then come its new ones.
    """

    new: list[list[int]]  # for each shard the groups to prefill
    entries: list[list[tuple[Admitted, int]]]  # for each shard its rows, and the prompt of each

    @property
    def rows(self) -> int:
        """The number of prompts prefilled on each shard, padding included: a power of two; 0: nothing to prefill."""
        most = max(len(groups) for groups in self.new)
        return most and power_of_two(most)


class Placement(NamedTuple):
    """The arguments of `cache.place` that say which cache goes into which slots and pages."""

    home: np.ndarray  # [S, b]: the prompt whose rest a slot's tail gets, or -1
    start: np.ndarray  # [S, b]: where in the prompt this rest begins
    table: np.ndarray  # [S, 3, n]: page, prompt, and which of the prompt's pages; beyond the pool: dropped
    keep: np.ndarray  # [S]: the prompt to carry on


def pieces(admitted: Sequence[Admitted], group: Sequence[int], carried: list[int], most: int) -> Iterator[Piece]:
    """Divide rows that found slots into pieces, in order.

    Args:
        admitted: rows in order.
        group: the group of every row.
        carried: for each shard the group whose prompt it carries on, -1 for none; is kept up to date.
        most: prompts of a shard that are prefilled together, at most.
    """
    waiting: list[deque[Admitted]] = [deque() for _ in carried]
    for entry in admitted:
        waiting[entry.shard].append(entry)
    while any(waiting):
        piece = Piece([], [])
        for shard, mine in enumerate(waiting):
            known, entries = {carried[shard]: 0}, []
            while mine and (group[mine[0].row] in known or len(known) <= most):
                of_entry = group[mine[0].row]
                entries.append((mine.popleft(), known.setdefault(of_entry, len(known))))
                carried[shard] = of_entry
            piece.new.append(list(known)[1:])
            piece.entries.append(entries)
        yield piece


def placement(piece: Piece, *, slots: int, pool: int, r: int) -> Placement:
    """Work out where a piece's cache goes; a shard has `slots` slots and `pool` pages of `r` tokens."""
    shards = len(piece.new)
    pages = [
        [(p, prompt, j) for e, prompt in mine if e.new for j, p in enumerate(e.pages.tolist())]
        for mine in piece.entries
    ]
    longest = max(map(len, pages))
    home, start = np.full((shards, slots), -1, np.int32), np.zeros((shards, slots), np.int32)
    table, keep = np.zeros((shards, 3, longest and power_of_two(longest)), np.int32), np.zeros(shards, np.int32)
    table[:, 0] = pool
    for shard, mine in enumerate(piece.entries):
        for entry, prompt in mine:
            home[shard, entry.slot], start[shard, entry.slot] = prompt, len(entry.pages) * r
            keep[shard] = prompt
        table[shard, :, : len(pages[shard])] = np.asarray(pages[shard], np.int32).reshape(-1, 3).T
    return Placement(home, start, table, keep)
