"""The host's half of continuous batching: which row sits in which slot, and which pages hold a slot's tokens.

Everything here follows from lengths; nothing looks at a clock or at tokens. So a rollout can be repeated bit for bit,
and the schedule can be simulated without a model (`benchmarks/rollout.py` does).
"""

import dataclasses
import math
from collections import deque
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from tsopsd_jax.types import AnyArray

PAGES_GROWTH = 1.5
"""Ratio of neighbouring pool sizes: no pool is larger than it must be by more, and few programs are compiled."""
FIRST_SHARE = 8
"""The pool starts at no less than this fraction of the full length: responses are an eighth of their limit, about."""
TAIL_MULTIPLE = 16
"""A tail's places are a multiple of this where R is."""
PREFILL_TOKENS = 16_384
"""Prompts are prefilled in pieces of about this many positions, and at least a prompt on each shard."""
SMALLEST_SHARE = 16
"""At the end of a rollout the slots are halved as rows run out, down to this fraction of them."""


class Admitted(NamedTuple):
    """A row that takes a slot, and the pages that hold its prompt."""

    row: int
    shard: int
    slot: int  # within the shard
    pages: np.ndarray
    new: bool = True  # whether they are to be written; otherwise another row of the group has brought them


class PageTable(NamedTuple):
    """The pages that hold a slot's tokens, in their order; a page may stand in several slots' lists."""

    page: Int[AnyArray, "S B P"]  # from `count` on: anything
    count: Int[AnyArray, "S B"]


class Shrink(NamedTuple):
    """A change to fewer slots and pages: where each that stays was, int32 [S, b] and [S, Q]; 0 where it is free."""

    slot_source: np.ndarray
    page_source: np.ndarray


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The sizes that do not change during a rollout; slots and pages are counted per shard.

    `segment_tokens` is R, the tokens of a segment and of a page; `shards` is S, the groups of devices over which slots
    and pages are divided.
    """

    segment_tokens: int
    max_prompt_tokens: int
    max_response_tokens: int
    shards: int = 1

    @property
    def home(self) -> int:
        """C0, the places of a tail for what is left of a prompt beyond its whole pages."""
        rest, r = min(self.segment_tokens, self.max_prompt_tokens) - 1, self.segment_tokens
        # Tails that fill whole cache lines, where that costs little: 191 places take 1.5 times as long to read as 192.
        return rest if r % TAIL_MULTIPLE else -(-rest // TAIL_MULTIPLE) * TAIL_MULTIPLE

    def prefill_width(self, longest: int) -> int:
        """Choose how many prompt positions are prefilled where the longest prompt has `longest`: a power of two of
        segments; always the same for prompts that fill no page."""
        if longest == 0:
            return 0
        if self.max_prompt_tokens <= self.segment_tokens:
            return self.home
        return self.segment_tokens * power_of_two(-(-longest // self.segment_tokens))

    def prefill_most(self, width: int) -> int:
        """Return the most prompts that a shard prefills together: about `PREFILL_TOKENS` positions over all shards."""
        return max(1, PREFILL_TOKENS // (width * self.shards))

    def prefill_rows(self, prompts: int, width: int) -> int:
        """Return the rows, over all shards, of the first piece of this many prompts, evenly divided."""
        each = min(-(-prompts // self.shards), self.prefill_most(max(width, 1)))
        return power_of_two(each) * self.shards

    def prompt_pages(self, prompt_length: int) -> int:
        """Count the pages that a prompt fills; its last token is the first to be decoded and in no page."""
        return (prompt_length - 1) // self.segment_tokens

    @property
    def row_pages(self) -> int:
        """The number of pages of the longest row; its last segment never becomes one."""
        return self.prompt_pages(self.max_prompt_tokens) + (self.max_response_tokens - 1) // self.segment_tokens

    def pool_sizes(self, slots: int) -> list[int]:
        """List the pool's possible sizes, rising; the last holds every slot at full length."""
        full = slots * self.row_pages
        if full == 0:
            return [0]
        count = math.ceil(math.log(FIRST_SHARE, PAGES_GROWTH))
        return sorted({math.ceil(full / PAGES_GROWTH**k) for k in range(count + 1)})


class Schedule:
    """The assignment of rows to slots, in order; a group's rows take slots of one shard, as long as it has any.

    Args:
        prompt_length: [N], tokens of each row's prompt.
        slots: at most this many rows at a time, over all shards; a multiple of the shards.
        geometry: sizes.
        group: [N], rows with the same number have the same prompt and stand side by side; None: each row has its own.
        shares: whether the rows of a group in a shard have their prompt's pages in common; otherwise each has a copy.

    Attributes:
        row: [S, b] the row in each slot, -1 where idle.
        drawn: [S, b] its response tokens so far.
        table: the pages of each slot, [S, b, P] and how many of them, [S, b].
        uses: [S, Q] how many slots each page belongs to, 0 where it is free.
        slot_steps, kept_tokens: steps that slots were decoded for, and tokens that came of them.
    """

    def __init__(
        self,
        prompt_length: np.ndarray,
        *,
        slots: int,
        geometry: Geometry,
        group: np.ndarray | None = None,
        shares: bool = False,
    ):
        self.prompt_length, self.geometry, self.shares = [int(n) for n in prompt_length], geometry, shares
        self.group: list[int] = np.arange(len(prompt_length)).tolist() if group is None else group.tolist()
        each = min(slots, len(prompt_length)) + geometry.shards - 1
        each //= geometry.shards
        self.smallest = max(1, each // SMALLEST_SHARE)
        self.row = np.full((geometry.shards, each), -1, np.int32)
        self.drawn = np.zeros((geometry.shards, each), np.int32)
        self.table = PageTable(np.zeros((*self.row.shape, geometry.row_pages), np.int32), np.zeros_like(self.drawn))
        self.uses = np.zeros((geometry.shards, geometry.pool_sizes(each)[0]), np.int32)
        self.shared: dict[tuple[int, int], np.ndarray] = {}  # (shard, group): the pages of a prompt that is in use
        self.waiting = 0  # the next row without a slot
        self.filled = 0  # the shard that the row before it went to
        self.slot_steps = self.kept_tokens = 0

    @property
    def live(self) -> np.ndarray:
        """The slots with a row, bool [S, b]."""
        return self.row >= 0

    @property
    def over(self) -> bool:
        """Whether every row has ended."""
        return self.waiting == len(self.prompt_length) and not self.live.any()

    @property
    def pool(self) -> int:
        """Q, the pages of a shard, free ones included."""
        return self.uses.shape[1]

    def advance(self, count: np.ndarray, stopped: np.ndarray) -> list[tuple[int, int, bool]]:
        """Take in a segment's counts and stops [S, b]; free the slots of rows that ended, and pages that nobody uses.

        Returns:
            (row, slot, stopped) of each row that ended, slots numbered over all shards.
        """
        self.drawn += np.where(self.live, count, 0).astype(np.int32)
        self.slot_steps += int(count.max()) * self.row.size
        self.kept_tokens += int(count[self.live].sum())
        ended = self.live & (stopped | (self.drawn >= self.geometry.max_response_tokens))
        finished = []
        for shard, slot in np.argwhere(ended).tolist():
            finished.append((int(self.row[shard, slot]), self._number(shard, slot), bool(stopped[shard, slot])))
            self.uses[shard, self._pages(shard, slot)] -= 1
        self.shared = {key: pages for key, pages in self.shared.items() if self.uses[key[0], pages[0]]}
        self.row[ended], self.drawn[ended], self.table.count[ended] = -1, 0, 0
        return finished

    def grow(self) -> int | None:
        """Enlarge the pool if the pages of the coming segment do not fit. Returns its new size per shard, or None."""
        if self.geometry.row_pages == 0:
            return None
        need = self.live.sum(axis=1)  # each takes a page of what it has just drawn
        there = set(self.shared)
        for row, (shard, _) in self._coming():
            if (shard, self.group[row]) not in there:
                need[shard] += self.geometry.prompt_pages(self.prompt_length[row])
            if self.shares:
                there.add((shard, self.group[row]))
        used = (self.uses > 0).sum(axis=1)
        if (used + need).max() <= self.pool:
            return None
        size = next(s for s in self.geometry.pool_sizes(self.row.shape[1]) if s >= (used + need).max())
        self.uses = np.pad(self.uses, ((0, 0), (0, size - self.pool)))
        return size

    def commit(self) -> np.ndarray:
        """Take a page for what each row drew in the last segment: [S, b], the pool's size where nothing is kept."""
        page = np.full(self.row.shape, self.pool, np.int32)
        for shard, live in enumerate(self.live):
            slots = np.flatnonzero(live)
            page[shard, slots] = self._take(shard, len(slots))
            self.table.page[shard, slots, self.table.count[shard, slots]] = page[shard, slots]
            self.table.count[shard, slots] += 1
        return page

    def shrink(self) -> Shrink | None:
        """Halve the slots as often as the rows that are left allow; nothing is done while rows wait."""
        if self.waiting < len(self.prompt_length):
            return None
        shards, old = self.row.shape
        most, each = int(self.live.sum(axis=1).max()), old
        while each // 2 >= max(most, self.smallest):
            each //= 2
        if each == old:
            return None
        used = int((self.uses > 0).sum(axis=1).max())
        sizes = self.geometry.pool_sizes(each)
        # Room for the pages of one more segment, so that shrinking is not followed by growing.
        size = next((s for s in sizes if s >= used + most), sizes[-1])
        slot_source = np.zeros((shards, each), np.int32)
        page_source = np.zeros((shards, size), np.int32)
        row, drawn = np.full((shards, each), -1, np.int32), np.zeros((shards, each), np.int32)
        table, uses = PageTable(*(x[:, :each].copy() for x in self.table)), np.zeros((shards, size), np.int32)
        table.count[:] = 0
        for shard in range(shards):
            stay = np.flatnonzero(self.live[shard])
            pages = np.flatnonzero(self.uses[shard])
            slot_source[shard, : len(stay)], page_source[shard, : len(pages)] = stay, pages
            row[shard, : len(stay)], drawn[shard, : len(stay)] = self.row[shard, stay], self.drawn[shard, stay]
            table.page[shard, : len(stay)] = np.searchsorted(pages, self.table.page[shard, stay])
            table.count[shard, : len(stay)] = self.table.count[shard, stay]
            uses[shard, : len(pages)] = self.uses[shard, pages]
            mine = {key: np.searchsorted(pages, at) for key, at in self.shared.items() if key[0] == shard}
            self.shared |= mine
        self.row, self.drawn, self.table, self.uses = row, drawn, table, uses
        return Shrink(slot_source, page_source)

    def admit(self) -> list[Admitted]:
        """Give idle slots to waiting rows, in order."""
        admitted = []
        for row, (shard, slot) in self._coming():
            self.row[shard, slot], self.drawn[shard, slot] = row, 0
            pages, new = self._prompt(row, shard)
            self.table.page[shard, slot, : len(pages)], self.table.count[shard, slot] = pages, len(pages)
            admitted.append(Admitted(row, shard, slot, pages, new))
            self.filled = shard
        self.waiting += len(admitted)
        return admitted

    def _coming(self) -> list[tuple[int, tuple[int, int]]]:
        """List (row, (shard, slot)) of the rows that are next. A new group goes where most slots are idle."""
        idle = [deque(np.flatnonzero(~live).tolist()) for live in self.live]
        coming, shard = [], self.filled
        for row in range(self.waiting, len(self.prompt_length)):
            if not idle[shard] or self.group[row] != self.group[row - 1]:
                shard = max(range(len(idle)), key=lambda s: len(idle[s]))
                if not idle[shard]:
                    break
            coming.append((row, (shard, idle[shard].popleft())))
        return coming

    def _number(self, shard: int, slot: int) -> int:
        return shard * self.row.shape[1] + slot

    def _pages(self, shard: int, slot: int) -> np.ndarray:
        return np.asarray(self.table.page)[shard, slot, : self.table.count[shard, slot]]

    def _prompt(self, row: int, shard: int) -> tuple[np.ndarray, bool]:
        """Return the pages of a row's prompt, and whether they are new."""
        key = (shard, self.group[row])
        if key in self.shared:
            self.uses[shard, self.shared[key]] += 1
            return self.shared[key], False
        pages = self._take(shard, self.geometry.prompt_pages(self.prompt_length[row]))
        if self.shares and len(pages):
            self.shared[key] = pages
        return pages, True

    def _take(self, shard: int, count: int) -> np.ndarray:
        pages = np.flatnonzero(self.uses[shard] == 0)[:count]
        assert len(pages) == count, "the pool was not grown before pages were taken"
        self.uses[shard, pages] = 1
        return pages
