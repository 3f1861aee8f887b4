"""Which responses are in the making: who joins, who grows, who is set back, on the host.

    waiting  ->  active, as long as there is a slot and pages for its prompt and for everybody's next token
    active   ->  waiting, in front, the youngest first, where somebody grows and no page is free: it gives its pages
                 back, and goes on later from its own tokens
    active   ->  done

The samples of a prompt share its whole pages. The prompt is run once for all of them, and held until the last of them
has begun; under want, what is held for samples that still wait goes before anybody is set back.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rollout.cache import PagedCache, Window, columns_of
from rollout.pages import Pages, SharedPages


@dataclass(eq=False)
class Response:
    """A response in the making."""

    index: int  # of its request
    prompt: list[int]
    prompt_name: bytes
    key: int  # of its noise
    limit: int  # tokens
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    logprobs_t1: list[float] = field(default_factory=list)
    launched: int = 0  # tokens asked for; those that the host has not seen yet among them
    slot: int = -1
    number: int = -1  # which start this is, of all responses'
    reason: str = ""  # why it ended

    @property
    def position(self) -> int:
        """Of its next input: the last token that there is."""
        return len(self.prompt) + self.launched - 1

    @property
    def input(self) -> int:
        """Its last token, where the host has seen all."""
        return (self.tokens or self.prompt)[-1]

    @property
    def room(self) -> int:
        """Positions that it may come to hold: its last token is no input."""
        return len(self.prompt) + self.limit - 1


@dataclass
class Joined:
    """What has to be done before new responses can go on: prompts to run, and pages to copy then."""

    prompts: list[list[int]] = field(default_factory=list)
    columns: list[dict[Window, np.ndarray]] = field(default_factory=list)  # of each prompt, by its positions
    sources: dict[Window, list[int]] = field(default_factory=dict)
    targets: dict[Window, list[int]] = field(default_factory=dict)


class Schedule:
    """The responses of one stream over the pages of a cache that nobody else uses."""

    def __init__(self, cache: PagedCache, responses: Sequence[Response]) -> None:
        self.cache, self.kinds = cache, cache.kinds
        self.waiting = deque(responses)
        self.active: list[Response] = []  # in the order in which they began
        self.set_back = 0  # times that a response was
        self._slots = list(range(cache.slots))  # a heap: neighbours are read together
        self._samples = Counter(response.prompt_name for response in responses)
        self._fresh = self._samples.copy()  # of a prompt, samples that have not begun
        self._held: dict[bytes, dict[Window, SharedPages]] = {}
        self._started = 0
        self._patient = False  # nobody joins before somebody has ended

    # --- joining ------------------------------------------------------------------------------------------------------

    def admit(self) -> Joined:
        """The next waiting responses join, as long as there is room."""
        joined = Joined()
        self._patient &= bool(self.active)
        while self.waiting and self._slots and not self._patient and self._fits(self.waiting[0]):
            response = self.waiting.popleft()
            response.slot, response.number = heapq.heappop(self._slots), self._started
            self._started += 1
            self.active.append(response)
            if response.launched or self._samples[response.prompt_name] == 1:
                self._run_alone(response, joined)
            else:
                self._join_prompt(response, joined)
            if not response.launched:
                self._fresh[response.prompt_name] -= 1
        for name in [name for name in self._held if not self._fresh[name]]:  # not before: the last pages are copied
            self._let_go(name)
        return joined

    def _fits(self, response: Response) -> bool:
        """Whether there are pages for it and, after that, for the next token of everybody."""
        while True:
            shares = not response.launched and self._samples[response.prompt_name] > 1
            held = shares and response.prompt_name in self._held
            everybody = len(self.active) + 1
            pages = {w: 0 if held else kind.needed(response.position) for w, kind in self.kinds.items()}
            own = {w: everybody + (shares or pages[w]) for w in pages}
            if all(kind.has_room(own[w], pages[w] if shares else 0) for w, kind in self.kinds.items()):
                return True
            if self.active or not self._let_go_of_one(but=response.prompt_name):
                # alone it fits: the pools have the pages of the longest
                return not self.active

    def _run_alone(self, response: Response, joined: Joined) -> None:
        """With pages of its own, from its own tokens."""
        length = response.position
        for kind in self.kinds.values():
            kind.begin(response.slot, length)
        if length:
            joined.prompts.append([*response.prompt, *response.tokens][:length])
            joined.columns.append({w: kind.tables[response.slot] for w, kind in self.kinds.items()})

    def _join_prompt(self, response: Response, joined: Joined) -> None:
        """With the pages of its prompt, which is run if nobody has."""
        name, length = response.prompt_name, response.position
        if name not in self._held:
            self._held[name] = {w: kind.hold(length) for w, kind in self.kinds.items()}
            if length:
                joined.prompts.append(response.prompt[:length])
                columns = {w: columns_of(self._held[name][w], kind) for w, kind in self.kinds.items()}
                joined.columns.append(columns)
        for window, kind in self.kinds.items():
            shared = self._held[name][window]
            if own := kind.join(response.slot, shared):
                joined.sources.setdefault(window, []).append(shared.tail)
                joined.targets.setdefault(window, []).append(own)

    def _let_go(self, name: bytes) -> None:
        for window, shared in self._held.pop(name, {}).items():
            self.kinds[window].drop(shared)

    def _let_go_of_one(self, but: bytes = b"") -> bool:
        """Ends the hold of the prompt that was held last, for samples that wait."""
        for name in reversed(self._held):
            if name != but:
                self._let_go(name)
                return True
        return False

    # --- growing ------------------------------------------------------------------------------------------------------

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """(slots, positions of the next inputs) of the active responses."""
        slots = np.array([response.slot for response in self.active], np.int64)
        return slots, np.array([response.position for response in self.active], np.int64)

    def is_short(self) -> bool:
        """Whether `grow` may have to set somebody back."""
        slots, positions = self.places()
        return any(int(kind.due(slots, positions).sum()) > kind.free for kind in self.kinds.values())

    def grow(self) -> None:
        """Every active response has a page for its next input; where there is none left, the youngest are set back."""
        slots, positions = self.places()
        due = {w: kind.due(slots, positions) | kind.slides(slots, positions) for w, kind in self.kinds.items()}
        for i in np.flatnonzero(np.any(list(due.values()), axis=0)):
            response = next((r for r in self.active if r.slot == slots[i]), None)
            if response is None:  # was set back for an older one
                continue
            for window, kind in self.kinds.items():
                if due[window][i] and not self._grow(response, kind):
                    break

    def _grow(self, response: Response, kind: Pages) -> bool:
        """False if it was set back itself."""
        kind.slide(response.slot, response.position)
        while kind.wants(response.slot, response.position):
            if kind.free:
                kind.take(response.slot)
            elif not self._let_go_of_one():
                youngest = self.active[-1]
                self.leave(youngest)
                self.waiting.appendleft(youngest)
                self.set_back += 1
                self._patient = True  # or it would be run again for the few tokens of a page
                if youngest is response:
                    return False
        return True

    def leave(self, response: Response) -> None:
        """It is active no more, and gives its pages back."""
        self.cache.leave(response.slot)
        heapq.heappush(self._slots, response.slot)
        self.active.remove(response)
        self._patient = False
