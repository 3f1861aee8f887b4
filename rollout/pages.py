"""Pages: which of a pool's blocks of B positions hold whose keys and values. On the host, and of one kind of layers,
those with one window.

    page of position s of slot a  =  tables[a, s // B]            0: nobody's page, where what is not wanted is written

A response takes pages as it grows and gives back those that its window has left. Whole pages of a prompt are shared by
its samples, by reference; they are taken from the pool's upper end and all others from the lower one, so that each kind
of use lies together (rows.py reads them in place). Or every slot, and every prompt, has a strip of its own, in which
its pages lie side by side (strips.py). A page belongs to its users and is free when the last has left it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np


@dataclass
class SharedPages:
    """The pages that hold a prompt for its samples: whole ones from column `first` on, and a last one that is not full
    (0: there is none), which is copied and not shared.
    """

    first: int = 0
    whole: list[int] = field(default_factory=list)
    tail: int = 0


@dataclass(frozen=True)
class Strip:
    """`count` strips of so many `pages`, one after the other."""

    first_page: int
    pages: int
    count: int

    @property
    def end(self) -> int:
        """The page after the last."""
        return self.first_page + self.pages * self.count


@dataclass(frozen=True)
class Layout:
    """The strips of the slots, for what they have beside a shared prompt, and those of the prompts."""

    own: Strip
    prompts: Strip


class Pages:
    """The pages of one kind of layers, taken from wherever one is free."""

    layout: Layout | None = None

    def __init__(self, count: int, slots: int, max_length: int, block: int, window: int | None) -> None:
        """`count` pages, nobody's page 0 among them, for `slots` responses of at most `max_length` positions."""
        self.block, self.window = block, window
        self.tables = np.zeros((slots, -(-max_length // block)), np.int32)
        self.first = np.zeros(slots, np.int64)  # columns first .. end - 1 of a slot are held
        self.end = np.zeros(slots, np.int64)
        self.shared = np.zeros(slots, np.int64)  # of these, columns below are the prompt's
        self.users = np.zeros(count, np.int64)
        self.users[0] = 1
        self.free = count - 1
        self.ended = 0  # times that a slot was given back
        self._low = list(range(1, count))
        self._high = list(range(1 - count, 0))  # negative: the heap gives the smallest first
        self._listed = np.ones((2, count), bool)  # in which heap a page is listed, at most once

    # --- how many -----------------------------------------------------------------------------------------------------

    def needed(self, length: int) -> int:
        """Pages that `length` positions take, those that no later position sees left out."""
        return -(-length // self.block) - self.unseen(length)

    def unseen(self, position: int) -> int:
        """Leading columns that the query at `position`, and those after it, do not see."""
        return 0 if self.window is None else max(0, position + 1 - self.window) // self.block

    def has_room(self, own: int, prompt: int) -> bool:
        """For so many pages of responses, and so many of a prompt besides."""
        return own + prompt <= self.free

    # --- taking and giving --------------------------------------------------------------------------------------------

    def _for_slot(self, slot: int, column: int) -> int:
        """A page for this column of a slot."""
        return self._take()

    def _for_prompt(self, count: int) -> list[int]:
        return [self._take(upper=True) for _ in range(count)]

    def _use(self, page: int) -> int:
        self.users[page] = 1
        self.free -= 1
        return page

    def _take(self, upper: bool = False) -> int:
        heap = self._high if upper else self._low
        while True:
            page = abs(heapq.heappop(heap))
            self._listed[int(upper), page] = False
            if not self.users[page]:  # one that the other end has given away is passed over
                break
        return self._use(page)

    def _leave(self, pages: Iterable[int]) -> None:
        for page in pages:
            self.users[page] -= 1
            if self.users[page]:
                continue
            self.free += 1
            for upper, heap in enumerate((self._low, self._high)):
                if not self._listed[upper, page]:
                    heapq.heappush(heap, -page if upper else page)
                    self._listed[upper, page] = True

    def begin(self, slot: int, length: int) -> None:
        """Own pages for the first `length` positions of a slot, as far as they will be seen."""
        first, end = self.unseen(length), -(-length // self.block)
        self.shared[slot] = 0
        self.tables[slot, :end] = 0
        self.tables[slot, first:end] = [self._for_slot(slot, column) for column in range(first, end)]
        self.first[slot], self.end[slot] = first, end

    def hold(self, length: int) -> SharedPages:
        """Pages for a prompt whose first `length` positions its samples will share."""
        first, end, has_tail = self.unseen(length), length // self.block, length % self.block > 0
        pages = self._for_prompt(end - first + has_tail)
        return SharedPages(first, pages[: end - first], pages[-1] if has_tail else 0)

    def join(self, slot: int, prompt: SharedPages) -> int:
        """Gives a slot the prompt: whole pages by reference; returns its own page for what is on the prompt's last one
        (0: none), which is to be copied.
        """
        end = prompt.first + len(prompt.whole)
        self.tables[slot, : prompt.first] = 0
        self.tables[slot, prompt.first : end] = prompt.whole
        self.users[prompt.whole] += 1
        self.first[slot], self.end[slot], self.shared[slot] = prompt.first, end, end
        return self.take(slot) if prompt.tail else 0

    def drop(self, prompt: SharedPages) -> None:
        """The prompt's own hold ends; samples that share its pages keep them."""
        self._leave([*prompt.whole, *([prompt.tail] if prompt.tail else [])])

    def wants(self, slot: int, position: int) -> bool:
        """Whether a slot must take a page before `position` is written."""
        return bool(position >= self.end[slot] * self.block)

    def due(self, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Which of these slots must take a page before these positions are written."""
        return positions >= self.end[slots] * self.block

    def slides(self, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Which of these slots hold pages that queries at these positions no longer see."""
        if self.window is None:
            return np.zeros(len(slots), bool)
        return np.maximum(0, positions + 1 - self.window) // self.block > self.first[slots]

    def slide(self, slot: int, position: int) -> None:
        """Gives back what the query at `position` no longer sees."""
        first, unseen = int(self.first[slot]), self.unseen(position)
        if unseen > first:
            self._leave(self.tables[slot, first:unseen].tolist())
            self.tables[slot, first:unseen] = 0
            self.first[slot] = unseen

    def take(self, slot: int) -> int:
        """The page of the slot's next column, which it now holds."""
        page = self._for_slot(slot, int(self.end[slot]))
        self.tables[slot, self.end[slot]] = page
        self.end[slot] += 1
        return page

    def finish(self, slot: int) -> None:
        """A slot gives back all."""
        self.ended += 1
        self._leave(self.tables[slot, self.first[slot] : self.end[slot]].tolist())
        self.first[slot] = self.end[slot] = self.shared[slot] = 0
        self.tables[slot] = 0


class PagesInStrips(Pages):
    """The pages of layers without a window, in strips: a slot's next page is always there."""

    layout: Layout

    def __init__(self, count: int, slots: int, max_length: int, block: int, layout: Layout) -> None:
        """At least the pages of the layout's strips, of which `slots` are the slots'."""
        super().__init__(count, slots, max_length, block, None)
        self.layout = layout

    def has_room(self, own: int, prompt: int) -> bool:
        return not prompt or len(self._unused()) > 0

    def _for_slot(self, slot: int, column: int) -> int:
        own = self.layout.own
        return self._use(own.first_page + slot * own.pages + column - int(self.shared[slot]))

    def _for_prompt(self, count: int) -> list[int]:
        if not count:
            return []
        begin = self.layout.prompts.first_page + int(self._unused()[0]) * self.layout.prompts.pages
        return [self._use(page) for page in range(begin, begin + count)]

    def _unused(self) -> np.ndarray:
        """The prompts' strips of which no page is used."""
        prompts = self.layout.prompts
        return np.flatnonzero(~self.users[prompts.first_page : prompts.end].reshape(prompts.count, -1).any(1))
