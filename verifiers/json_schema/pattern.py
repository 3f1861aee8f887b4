r"""Regular expressions whose work is linear in the text, for `pattern`: an automaton of ours, no backtracking.

Read: literals, `.`, classes, \d \w \s \D \W \S (ASCII, as ECMA-262 has them), \t \n \r \f \v \xHH \uHHHH, groups,
`|`, `* + ? {m} {m,} {m,n}` (also lazy, which is the same to a yes or no), `^` and `$`. As in JSON Schema a match may
stand anywhere. Refused by name: look-around, backward references, \b, \p, named groups and flags.
Source: Thompson 1968, 'Regular expression search algorithm', simulated on sets of states.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from verifiers.strings import shown
from verifiers.verdict import GroundTruthError

MAX_PATTERN = 500  # characters
MAX_STATES = 400  # of the automaton, after {m,n} are written out
MAX_DEPTH = 20  # of groups
DIGITS, WORD = "0123456789", "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz"
SPACE = " \t\n\r\f\v\u00a0\u1680\u2028\u2029\u202f\u205f\u3000\ufeff" + "".join(map(chr, range(0x2000, 0x200B)))
SETS = {"d": frozenset(DIGITS), "w": frozenset(WORD), "s": frozenset(SPACE)}
CONTROL = {"t": "\t", "n": "\n", "r": "\r", "f": "\f", "v": "\v", "0": "\0"}
Part = tuple[frozenset[str], bool]  # characters, and whether it is all others


class Class(NamedTuple):
    """A set of characters: parts and ranges, or all but those."""

    parts: tuple[Part, ...]
    ranges: tuple[tuple[str, str], ...] = ()
    negated: bool = False

    def holds(self, character: str) -> bool:
        """Whether the character is one of the class."""
        found = any((character in chars) != others for chars, others in self.parts)
        found = found or any(low <= character <= high for low, high in self.ranges)
        return found != self.negated


class State(NamedTuple):
    """kind 'one' (a character of `of`), 'start', 'end', 'split' or 'done', and the states that follow."""

    kind: str
    of: Class | None
    then: tuple[int, ...]


Fragment = Callable[[int], int]  # from the state that follows to the state where the fragment begins


class Pattern:
    """A compiled pattern. Raises GroundTruthError for one that is not read."""

    def __init__(self, text: str) -> None:
        self.text, self.place, self.states = text, 0, [State("done", None, ())]
        if len(text) > MAX_PATTERN:
            raise self.problem(f"longer than {MAX_PATTERN} characters")
        fragment = self.choice(0)
        if self.place < len(text):
            raise self.problem(f"unmatched {text[self.place]!r}")
        self.first = fragment(0)

    def problem(self, what: str) -> GroundTruthError:
        """The error that says what is not read."""
        return GroundTruthError(f"ground_truth: pattern {shown(self.text)}: {what}")

    def search(self, text: str, spend: Callable[[int], None]) -> bool:
        """Whether it matches anywhere in the text. `spend` is told how many states each character was compared with."""
        spend(1 + len(text) // 4)
        known: dict[tuple[frozenset[int], str, bool], frozenset[int]] = {}  # of this text alone
        current = self.closure([self.first], True, not text)
        for i, character in enumerate(text, 1):
            if 0 in current:
                return True
            step = (current, character, i == len(text))
            if step not in known:
                spend(3 + 2 * len(current))
                at = [self.states[s] for s in current]
                after = [s.then[0] for s in at if s.kind == "one" and s.of and s.of.holds(character)]
                known[step] = self.closure([*after, self.first], False, step[2])
            current = known[step]
        return 0 in current

    def closure(self, states: list[int], at_start: bool, at_end: bool) -> frozenset[int]:
        """All states that are reached without a character."""
        reached: set[int] = set()
        while states:
            number = states.pop()
            if number in reached:
                continue
            reached.add(number)
            state = self.states[number]
            if state.kind == "split" or (state.kind == "start" and at_start) or (state.kind == "end" and at_end):
                states.extend(state.then)
        return frozenset(reached)

    # --- reading ------------------------------------------------------------------------------------------------------

    def state(self, kind: str, of: Class | None, *then: int) -> int:
        """A new state's number. Raises GroundTruthError for one too many."""
        if len(self.states) >= MAX_STATES:
            raise self.problem(f"more than {MAX_STATES} states")
        self.states.append(State(kind, of, then))
        return len(self.states) - 1

    def peek(self) -> str:
        """The next character, or ''."""
        return self.text[self.place : self.place + 1]

    def take(self, what: str) -> bool:
        """Goes on if `what` comes next."""
        found = self.text.startswith(what, self.place)
        self.place += len(what) if found else 0
        return found

    def choice(self, depth: int) -> Fragment:
        """a|b|c"""
        if depth > MAX_DEPTH:
            raise self.problem(f"groups nested deeper than {MAX_DEPTH}")
        ways = [self.sequence(depth)]
        while self.take("|"):
            ways.append(self.sequence(depth))
        return ways[0] if len(ways) == 1 else lambda then: self.state("split", None, *[way(then) for way in ways])

    def sequence(self, depth: int) -> Fragment:
        """abc"""
        parts: list[Fragment] = []
        while self.peek() not in ("", "|", ")"):
            parts.append(self.repeated(self.atom(depth)))

        def build(then: int) -> int:
            for part in reversed(parts):
                then = part(then)
            return then

        return build

    def repeated(self, atom: Fragment) -> Fragment:
        """An atom with the quantifier behind it, if there is one."""
        bounds = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        if self.peek() in bounds and self.peek():
            low, high = bounds[self.peek()]
            self.place += 1
        elif self.peek() == "{":
            low, high = self.counted()
        else:
            return atom
        self.take("?")
        if self.peek() in ("*", "+", "?", "{") and self.peek():
            raise self.problem(f"{self.peek()!r} behind another quantifier")

        def build(then: int) -> int:
            if high is None:
                loop = self.state("split", None)  # its ways are known only when the atom is built
                self.states[loop] = State("split", None, (atom(loop), then))
                then = loop
            for _ in range((high or low) - low):
                then = self.state("split", None, atom(then), then)
            for _ in range(low):
                then = atom(then)
            return then

        return build

    def counted(self) -> tuple[int, int | None]:
        """{m}, {m,} or {m,n}."""
        inside, closed, _ = self.text[self.place + 1 :].partition("}")
        low, comma, high = inside.partition(",")
        numbers = [n for n in (low, high) if n]
        if not closed or not low or not all(n.isascii() and n.isdigit() and len(n) < 4 for n in numbers):
            raise self.problem(f"expected {{m}} or {{m,n}}, found {{{inside[:12]}")
        self.place += len(inside) + 2
        most = int(high) if high else None if comma else int(low)
        if most is not None and most < int(low):
            raise self.problem(f"{{{inside}}} ends before it begins")
        return int(low), most

    def atom(self, depth: int) -> Fragment:
        """A group, an anchor, or a set of characters."""
        if self.take("("):
            if self.peek() == "?" and not self.take("?:"):
                raise self.problem(
                    f"{self.text[self.place - 1 : self.place + 3]!r} is not read: only groups (…) and (?:…)"
                )
            inside = self.choice(depth + 1)
            if not self.take(")"):
                raise self.problem("a group does not end")
            return inside
        for mark, kind in (("^", "start"), ("$", "end")):
            if self.take(mark):
                return lambda then, kind=kind: self.state(kind, None, then)  # type: ignore[misc]
        if self.peek() in ("*", "+", "?", "{"):
            raise self.problem(f"{self.peek()!r} has nothing to repeat")
        found = self.bracketed() if self.take("[") else self.character()
        return lambda then: self.state("one", found, then)

    def character(self) -> Class:
        """A literal, '.', or an escape."""
        if self.take("."):
            return Class(((frozenset("\n\r\u2028\u2029"), False),), (), True)
        return Class((self.single(),))

    def single(self) -> Part:
        """One character, or an escape that stands for several."""
        character = self.peek()
        self.place += 1
        if character != "\\":
            return frozenset(character), False
        letter = self.peek()
        self.place += 1
        if letter.lower() in SETS and letter:
            return SETS[letter.lower()], letter.isupper()
        if letter in ("x", "u"):
            digits = self.text[self.place : self.place + (2 if letter == "x" else 4)]
            self.place += len(digits)
            if len(digits) != (2 if letter == "x" else 4) or set(digits) - set("0123456789abcdefABCDEF"):
                raise self.problem(f"\\{letter} without its hexadecimal digits")
            return frozenset(chr(int(digits, 16))), False
        if letter in CONTROL:
            return frozenset(CONTROL[letter]), False
        if not letter or letter in WORD:
            raise self.problem(f"\\{letter} is not read")
        return frozenset(letter), False

    def bracketed(self) -> Class:
        """[abc], [^a-z]; behind its '['."""
        negated, parts, ranges = self.take("^"), [], []
        while not self.take("]"):
            if not self.peek():
                raise self.problem("a class does not end")
            part = self.single()
            behind = self.text[self.place : self.place + 2]
            if len(part[0]) == 1 and not part[1] and behind[:1] == "-" and behind[1:] not in ("]", ""):
                self.place += 1
                end = self.single()
                low, high = next(iter(part[0])), next(iter(end[0]))
                if len(end[0]) != 1 or end[1] or high < low:
                    raise self.problem(f"the range from {low!r} has no end behind it")
                ranges.append((low, high))
            else:
                parts.append(part)
        return Class(tuple(parts), tuple(ranges), negated)


@lru_cache(maxsize=1024)
def compiled(text: str) -> Pattern:
    """The pattern. Raises GroundTruthError."""
    return Pattern(text)
