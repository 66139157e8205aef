"""The host's half of continuous batching: which row sits in which slot, and which slot owns which pages.

Everything here follows from lengths; nothing looks at a clock or at tokens. So a rollout can be repeated bit for bit,
and the schedule can be simulated without a model (`benchmarks/rollout.py` does).
"""

import dataclasses
import math
from collections import deque
from typing import NamedTuple

import numpy as np

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


NO_PAGES = np.zeros(0, np.int64)


class Admitted(NamedTuple):
    """A row that takes a slot, and the pages that its prompt gets."""

    row: int
    shard: int
    slot: int  # within the shard
    pages: np.ndarray


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

    Attributes:
        row: [S, b] the row in each slot, -1 where idle.
        drawn: [S, b] its response tokens so far.
        owner: [S, Q] the slot (within the shard) that owns each page, -1 where free.
        slot_steps, kept_tokens: steps that slots were decoded for, and tokens that came of them.
    """

    def __init__(self, prompt_length: np.ndarray, *, slots: int, geometry: Geometry, group: np.ndarray | None = None):
        self.prompt_length, self.geometry = [int(n) for n in prompt_length], geometry
        self.group: list[int] = np.arange(len(prompt_length)).tolist() if group is None else group.tolist()
        each = min(slots, len(prompt_length)) + geometry.shards - 1
        each //= geometry.shards
        self.smallest = max(1, each // SMALLEST_SHARE)
        self.row = np.full((geometry.shards, each), -1, np.int32)
        self.drawn = np.zeros((geometry.shards, each), np.int32)
        self.owner = np.full((geometry.shards, geometry.pool_sizes(each)[0]), -1, np.int32)
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

    def advance(self, count: np.ndarray, stopped: np.ndarray) -> list[tuple[int, int, bool]]:
        """Take in a segment's counts and stops [S, b]; free the slots and pages of rows that ended.

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
        for shard, gone in enumerate(ended):
            free = self.owner[shard] >= 0
            free[free] = gone[self.owner[shard][free]]
            self.owner[shard, free] = -1
        self.row[ended], self.drawn[ended] = -1, 0
        return finished

    def grow(self) -> int | None:
        """Enlarge the pool if the pages of the coming segment do not fit. Returns its new size per shard, or None."""
        if self.geometry.row_pages == 0:
            return None
        need = self.live.sum(axis=1)  # each takes a page of what it has just drawn
        for row, (shard, _) in self._coming():
            need[shard] += self.geometry.prompt_pages(self.prompt_length[row])
        used = (self.owner >= 0).sum(axis=1)
        size = self.owner.shape[1]
        if (used + need).max() <= size:
            return None
        size = next(s for s in self.geometry.pool_sizes(self.row.shape[1]) if s >= (used + need).max())
        self.owner = np.pad(self.owner, ((0, 0), (0, size - self.owner.shape[1])), constant_values=-1)
        return size

    def commit(self) -> np.ndarray:
        """Take a page for what each row drew in the last segment: [S, b], the pool's size where nothing is kept."""
        page = np.full(self.row.shape, self.owner.shape[1], np.int32)
        for shard, slot in np.argwhere(self.live).tolist():
            page[shard, slot] = self._take(shard, slot, 1)[0]
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
        used = int((self.owner >= 0).sum(axis=1).max())
        sizes = self.geometry.pool_sizes(each)
        # Room for the pages of one more segment, so that shrinking is not followed by growing.
        size = next((s for s in sizes if s >= used + most), sizes[-1])
        slot_source = np.zeros((shards, each), np.int32)
        page_source = np.zeros((shards, size), np.int32)
        row, drawn = np.full((shards, each), -1, np.int32), np.zeros((shards, each), np.int32)
        owner = np.full((shards, size), -1, np.int32)
        for shard in range(shards):
            stay = np.flatnonzero(self.live[shard])
            pages = np.flatnonzero(self.owner[shard] >= 0)
            slot_source[shard, : len(stay)], page_source[shard, : len(pages)] = stay, pages
            row[shard, : len(stay)], drawn[shard, : len(stay)] = self.row[shard, stay], self.drawn[shard, stay]
            owner[shard, : len(pages)] = np.searchsorted(stay, self.owner[shard, pages])
        self.row, self.drawn, self.owner = row, drawn, owner
        return Shrink(slot_source, page_source)

    def admit(self) -> list[Admitted]:
        """Give idle slots to waiting rows, in order."""
        admitted = []
        for row, (shard, slot) in self._coming():
            self.row[shard, slot], self.drawn[shard, slot] = row, 0
            pages = self._take(shard, slot, self.geometry.prompt_pages(self.prompt_length[row]))
            admitted.append(Admitted(row, shard, slot, pages))
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

    def _take(self, shard: int, slot: int, count: int) -> np.ndarray:
        if count == 0:
            return NO_PAGES
        pages = np.flatnonzero(self.owner[shard] < 0)[:count]
        assert len(pages) == count, "the pool was not grown before pages were taken"
        self.owner[shard, pages] = slot
        return pages
