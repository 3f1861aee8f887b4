"""What the operations of a chat template cost, paid before they are done (engine/data/sandbox.py)."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jinja2.runtime import Undefined
from jinja2.utils import Namespace

PER_UNIT = 16  # characters that are read or written for a unit
MAX_BITS = 2**14  # of a whole number
MAX_DEPTH = 200
MAX_FORMAT = 1024  # characters of a text with places to fill
WIDE = re.compile(r"%[^a-zA-Z%]{0,40}(?:\*|\d{4})|:[^{}]{0,40}(?:\d{4}|\{)")
ORDERING = ("sort", "dictsort", "groupby", "unique")


class Spent(Exception):
    """The template wants more work or text than a conversation of this size may take."""


class Meter:
    """Units that are left to a rendering."""

    def __init__(self) -> None:
        self.left = 0

    def spend(self, units: int) -> None:
        self.left -= units
        if self.left < 0:
            raise Spent("does more work than a conversation of this size may take: does it loop for ever?")

    def sized(self, value: Any) -> Any:
        """The value, its size paid."""
        kind = type(value)
        if kind is str:
            self.spend(len(value) // PER_UNIT)
        elif kind is not bool and value is not None:
            self.spend(self.size(value))
        return value

    def size(self, value: Any, depth: int = 0) -> int:
        """Units of a value with all that is in it; each visit is paid, since a value may be in another many times."""
        if isinstance(value, str | bytes):
            return 1 + len(value) // PER_UNIT
        if isinstance(value, int):
            if value.bit_length() > MAX_BITS:
                raise Spent(f"computes with a number of more than {MAX_BITS} bits")
            return 1
        if isinstance(value, range):
            return 1 + len(value)
        if isinstance(value, Namespace):
            raise Spent("uses a namespace as a value")
        if isinstance(value, Mapping):
            inside: Iterable = (x for pair in value.items() for x in pair)
        elif isinstance(value, list | tuple) or type(value).__name__ in ("dict_items", "dict_keys", "dict_values"):
            inside = value
        else:
            return 1
        if depth > MAX_DEPTH:
            raise Spent(f"nests values more than {MAX_DEPTH} deep")
        total = 1
        for x in inside:
            self.spend(4)
            total += self.size(x, depth + 1)
        return total

    def loop(self, iterable: Any, weight: int) -> Any:
        """What is iterated over, its iterations paid: at once where their number is known, else one by one."""
        if isinstance(iterable, str | list | tuple | range | Mapping):
            self.spend(1 + len(iterable) * weight)
            return iterable
        return iterable if isinstance(iterable, Undefined | int | float) else self.counted(iterable, weight)

    def counted(self, iterable: Iterable, weight: int = 4) -> Iterator:
        for x in iterable:
            self.spend(weight)
            yield self.sized(x)


def product(left: Any, right: Any) -> int:
    """Units of left * right, unless it is too large a number."""
    text, times = (right, left) if isinstance(left, int) else (left, right)
    if isinstance(text, int) and isinstance(times, int):
        if text.bit_length() + times.bit_length() > MAX_BITS:
            raise Spent(f"computes a number of more than {MAX_BITS} bits")
    elif isinstance(times, int) and isinstance(text, str | bytes | list | tuple):
        return len(text) * max(times, 0) // (PER_UNIT if isinstance(text, str | bytes) else 1)
    return 0


def check_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int) and abs(right) * max(left.bit_length(), 1) > MAX_BITS:
        raise Spent(f"computes a number of more than {MAX_BITS} bits")


def format_units(meter: Meter, text: Any, *values: Any) -> int:
    """Of a text with places to fill, by `%` or braces: each may take all values, and none is wide."""
    words = text if isinstance(text, str) else text.decode("latin-1")
    if len(words) > MAX_FORMAT or WIDE.search(words):
        raise Spent(f"formats a number of characters of its own choice, or by more than {MAX_FORMAT}")
    return (words.count("%") + words.count("{")) * (1 + sum(map(meter.size, values)))


def _replaced(text: Any, args: tuple) -> int:
    """Units of text.replace(old, new, ...)."""
    if len(args) < 2 or not all(isinstance(x, str | bytes) for x in args[:2]):
        return 0
    return len(text) // PER_UNIT + _count(text, args[0]) * len(args[1]) // PER_UNIT


def _count(text: Any, part: Any) -> int:
    if isinstance(text, bytes) and isinstance(part, str):
        part = part.encode()
    return text.count(part) if type(text) is type(part) or (isinstance(text, str) and isinstance(part, str)) else 0


def method_units(meter: Meter, holder: Any, name: str, args: tuple, options: Mapping[str, Any]) -> int:
    """Of a method of a text, a list or a dictionary; of others what their arguments cost."""
    if isinstance(holder, list | tuple) or name == "copy":
        return meter.size(holder)
    if not isinstance(holder, str | bytes):
        if name in ("to_bytes", "from_bytes"):
            raise Spent(f"uses {name}")
        return 0
    numbers = [abs(x) for x in (*args, *options.values()) if isinstance(x, int)]
    if name in ("center", "ljust", "rjust", "zfill"):
        return (len(holder) + sum(numbers)) // PER_UNIT
    if name == "expandtabs":
        return len(holder) + _count(holder, "\t") * (sum(numbers) or 8)
    if name in ("split", "rsplit", "splitlines"):
        by = next((x for x in (*args, *options.values()) if isinstance(x, str | bytes)), None)
        return len(holder) // PER_UNIT + (_count(holder, by) if by else len(holder) // 4)
    if name == "replace":
        return _replaced(holder, args)
    if name == "join" and args:
        return len(args[0]) * (1 + len(holder) // PER_UNIT) if isinstance(args[0], list | tuple | str | Mapping) else 0
    if name in ("translate", "striptags", "unescape", "format", "format_map"):
        raise Spent(f"uses {name}")
    return len(holder) // PER_UNIT


def _whole(value: Any, least: int = 0) -> int:
    return abs(value) if isinstance(value, int) else len(value) if isinstance(value, str) else least


def _filter_units(name: str, value: Any, args: tuple, options: dict, size: int) -> int:
    """Of a filter, whose operands of so many units are paid already."""
    given = [*args, *options.values()]
    numbers = sum(_whole(x) for x in given)
    if name in ORDERING:
        return size * 16
    if name == "tojson":
        return size * (2 + numbers * MAX_DEPTH if any(given) else 2)
    if name in ("center", "batch", "slice", "truncate"):
        return numbers
    if name == "indent":
        return (str(value).count("\n") + 1) * (1 + numbers // PER_UNIT) if isinstance(value, str) else 0
    if name == "replace" and isinstance(value, str):
        return _replaced(value, tuple(given))
    if name == "join":
        return size * (1 + sum(len(x) for x in given if isinstance(x, str)) // PER_UNIT)
    if name in ("list", "reverse") and isinstance(value, str):
        return len(value)
    if name == "round" and numbers > 100 + len("common"):
        raise Spent("rounds to more than 100 digits")
    if name == "sum" and any(isinstance(x, list | tuple) for x in given):
        return size * size
    return 0


def priced(meter: Meter, name: str, f: Callable) -> Callable:
    """The filter, paid for before it is done; what it iterates over is counted where its length is not known."""
    passed = getattr(f, "jinja_pass_arg", None)
    before = 1 if passed else 0
    shallow = name in ("default", "d", "length", "count", "first", "last", "items", "attr", "string", "safe")

    @functools.wraps(f)
    def paid(*args: Any, **options: Any) -> Any:
        value, rest = args[before], args[before + 1 :]
        meter.spend(8)
        if name == "format" and isinstance(value, str):
            meter.spend(format_units(meter, value, *rest, *options.values()))
        elif not shallow or name == "string":
            size = meter.size(value)
            meter.spend(size + sum(map(meter.size, (*rest, *options.values()))))
            meter.spend(_filter_units(name, value, rest, options, size))
            if isinstance(value, Iterator):
                args = (*args[:before], meter.counted(value, 16 if name in ORDERING else 4), *rest)
        result = f(*args, **options)
        if type(result) is int:
            meter.size(result)
        return result

    return paid


def priced_test(meter: Meter, f: Callable) -> Callable:
    passed = getattr(f, "jinja_pass_arg", None)
    if passed:
        return f  # whether a filter or a test is there

    @functools.wraps(f)
    def paid(*args: Any) -> Any:
        for value in args:
            if (isinstance(value, str | Mapping | list | tuple) and len(args) > 1) or type(value) is int:
                meter.sized(value)
        meter.spend(1)
        return f(*args)

    return paid
