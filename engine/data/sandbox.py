"""Chat templates in a sandbox with a bound on work and on output.

A template is a program that comes with a tokenizer. Jinja's sandbox keeps it from the machine; nothing keeps it from
looping for ever or from making a text of a terabyte. Here every template is compiled with a meter in it: an iteration
of a loop and a call of a macro cost the number of nodes in their bodies, an operation costs the size of what it reads,
and what can be larger than that (a product, a power, a width, a replacement) is priced before it is made. So the work
that is done is bounded by what was paid, the bound grows with the conversation, and no clock decides: a template is
refused on every machine or on none.

The text is what transformers' `apply_chat_template` gives. Left out on purpose: recursive loops, and filters whose work
does not follow from their operands' size (urlize, wordwrap, striptags, xmlattr, pprint, random, lipsum).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FunctionType
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError, TemplateAssertionError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_SOURCE = 2**16  # characters of a template: the longest of today's families has a third of it
MAX_NODES = 10_000  # of its tree
BASE = 1_000_000  # units, a quarter of a second of the worst; a turn of a conversation takes some hundreds
PER_VALUE = 4_000  # units more for every value of the conversation: loops over messages in loops over messages
PER_UNIT = 16  # characters that are read or written for a unit
MAX_BITS = 2**14  # of a whole number
MAX_DEPTH = 200
MAX_FORMAT = 1024  # characters of a text with places to fill
OUTPUT = 2**20, 64  # characters of text, and more of them for each of the conversation's
LEFT_OUT = ("urlize", "wordwrap", "striptags", "xmlattr", "pprint", "random")
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


# --- what is compiled -------------------------------------------------------------------------------------------------


class _Metering(NodeTransformer):
    """Puts the meter into a template's tree. The names of its filters have a space, which no template can say."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.recursive:
            raise TemplateAssertionError("recursive loops are not rendered", node.lineno)
        weight = _weight([node.target, *node.body, *node.else_, *([node.test] if node.test else [])])
        self.generic_visit(node)
        node.iter = _filter("iterate over", node.iter, nodes.Const(weight))
        return node

    def _called(self, node: Any) -> nodes.Node:
        weight = 5 + _weight(node.body)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_filter("spend on", nodes.Const(weight)), lineno=node.lineno))
        return node

    visit_Macro = visit_CallBlock = visit_Block = _called

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        left: nodes.Expr = node.expr
        for at, operand in enumerate(node.ops):
            right, contains = operand.expr, operand.op in ("in", "notin")
            if not _plain(right) and (contains or not _plain(left)):
                operand.expr = _filter("measure of", right)
                if at == 0 and not _plain(left):
                    node.expr = _filter("measure of", left)
            left = right
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [x if _plain(x) else _filter("measure of", x) for x in node.nodes]
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _filter("measure of", node.node)
        elif not _plain(node.arg):
            node.arg = _filter("measure of", node.arg)
        return node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return node if _plain(node) else _filter("measure of", node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return node if node.ctx != "load" or _plain(node) else _filter("measure of", node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        for pair in node.items:
            pair.key = pair.key if _plain(pair.key) else _filter("measure of", pair.key)
        return _filter("measure of", node)

    def visit_NSRef(self, node: nodes.NSRef) -> nodes.Node:
        if node.attr.startswith("_"):
            raise TemplateAssertionError(f"a namespace has no {node.attr}", node.lineno)
        return node


def _filter(name: str, of: Any, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(of, name, list(args), [], None, None, lineno=of.lineno)


def _plain(node: nodes.Node) -> bool:
    """Written out in the template: no larger than its source."""
    if isinstance(node, nodes.List | nodes.Tuple):
        return all(map(_plain, node.items))
    return isinstance(node, nodes.Const | nodes.TemplateData)


def _weight(body: Iterable[nodes.Node]) -> int:
    total, todo = 1, list(body)
    while todo:
        node = todo.pop()
        total += 1 + (len(node.data) // PER_UNIT if isinstance(node, nodes.TemplateData) else 0)
        todo += node.iter_child_nodes()
    return total


class _Generator(CodeGenerator):
    def visit_Template(self, node: nodes.Template, frame: Any = None) -> None:
        if (count := _weight(node.body)) > MAX_NODES:
            raise Spent(f"is a program of {count:,} parts, more than {MAX_NODES:,}")
        super().visit_Template(_Metering().visit(node), frame)


class _Generation(Extension):
    """`{% generation %}` around what is trained, which is seen otherwise here: its body as it is."""

    tags = {"generation"}  # noqa: RUF012 - declared by Jinja

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


# --- what is run ------------------------------------------------------------------------------------------------------


class _Dictionary:
    """`dict`, without the type's methods."""

    def __call__(self, *args: Any, **items: Any) -> dict:
        return dict(*args, **items)


def _raise(message: str) -> None:
    raise TemplateError(message)


class _Sandbox(ImmutableSandboxedEnvironment):
    code_generator_class = _Generator
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        meter = self.meter = Meter()

        @pass_context  # so that nothing is computed while the template is compiled
        def finalize(context: Context, value: Any) -> Any:
            return meter.sized(value)

        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            optimized=False,
            finalize=finalize,
        )
        kept = {name: f for name, f in self.filters.items() if name not in LEFT_OUT} | {"tojson": _to_json}
        self.filters = {name: _priced(meter, name, f) for name, f in kept.items()}
        self.filters |= {"iterate over": meter.loop, "spend on": meter.spend, "measure of": meter.sized}
        tests: dict[str, Any] = self.tests
        self.tests = {name: _priced_test(meter, f) for name, f in tests.items()}
        self.globals.pop("lipsum", None)
        self.globals |= {"dict": _Dictionary(), "raise_exception": _raise}

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        spend = self.meter.spend
        if operator == "+" and type(left) is str and type(right) is str:
            spend(1 + (len(left) + len(right)) // PER_UNIT)
            return left + right
        units = self.meter.size(left) + self.meter.size(right)
        if operator == "*":
            units += _product(left, right)
        elif operator == "**":
            _check_power(left, right)
        elif operator == "%" and isinstance(left, str | bytes):
            units += _format_units(self.meter, left, right)
        spend(units)
        result = super().call_binop(context, operator, left, right)
        if type(result) is int:
            self.meter.size(result)
        return result

    def call(__self, __context: Context, __obj: Any, *args: Any, **options: Any) -> Any:
        meter = __self.meter
        meter.spend(10)
        for value in args:
            meter.sized(value)
        for name, value in options.items():
            meter.sized(value)
            if name.startswith("_") and __obj is Namespace:
                raise SecurityError(f"a namespace has no {name}")
        if type(__obj) is FunctionType and __obj.__name__ in ("format", "format_map"):
            text: Any = vars(__obj)["__wrapped__"].__self__
            meter.spend(_format_units(meter, text, *args, *options.values()))
        elif (holder := getattr(__obj, "__self__", None)) is not None:
            meter.spend(_method_units(meter, holder, getattr(__obj, "__name__", ""), args, options))
        return super().call(__context, __obj, *args, **options)


def _product(left: Any, right: Any) -> int:
    """Units of left * right, unless it is too large a number."""
    text, times = (right, left) if isinstance(left, int) else (left, right)
    if isinstance(text, int) and isinstance(times, int):
        if text.bit_length() + times.bit_length() > MAX_BITS:
            raise Spent(f"computes a number of more than {MAX_BITS} bits")
    elif isinstance(times, int) and isinstance(text, str | bytes | list | tuple):
        return len(text) * max(times, 0) // (PER_UNIT if isinstance(text, str | bytes) else 1)
    return 0


def _check_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int) and abs(right) * max(left.bit_length(), 1) > MAX_BITS:
        raise Spent(f"computes a number of more than {MAX_BITS} bits")


def _format_units(meter: Meter, text: Any, *values: Any) -> int:
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


def _method_units(meter: Meter, holder: Any, name: str, args: tuple, options: Mapping[str, Any]) -> int:
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


# --- filters and tests ------------------------------------------------------------------------------------------------


def _to_json(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


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


def _priced(meter: Meter, name: str, f: Callable) -> Callable:
    """The filter, paid for before it is done; what it iterates over is counted where its length is not known."""
    passed = getattr(f, "jinja_pass_arg", None)
    before = 1 if passed else 0
    shallow = name in ("default", "d", "length", "count", "first", "last", "items", "attr", "string", "safe")

    @functools.wraps(f)
    def priced(*args: Any, **options: Any) -> Any:
        value, rest = args[before], args[before + 1 :]
        meter.spend(8)
        if name == "format" and isinstance(value, str):
            meter.spend(_format_units(meter, value, *rest, *options.values()))
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

    return priced


def _priced_test(meter: Meter, f: Callable) -> Callable:
    passed = getattr(f, "jinja_pass_arg", None)
    if passed:
        return f  # whether a filter or a test is there

    @functools.wraps(f)
    def priced(*args: Any) -> Any:
        for value in args:
            if (isinstance(value, str | Mapping | list | tuple) and len(args) > 1) or type(value) is int:
                meter.sized(value)
        meter.spend(1)
        return f(*args)

    return priced


# --- the way in -------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def compiled(source: str) -> tuple[Any, Meter]:
    """The template and its meter. Raises Spent for one that is too long, and what Jinja raises for one that is none."""
    if len(source) > MAX_SOURCE:
        raise Spent(f"is longer than {MAX_SOURCE:,} characters")
    sandbox = _Sandbox()
    sandbox.meter.left = BASE
    return sandbox.from_string(source), sandbox.meter


def render(source: str, conversation: dict[str, Any]) -> str:
    """The template's text of a conversation of plain data (messages, tools, and names of special tokens). Raises Spent,
    and whatever else a template raises.
    """
    template, meter = compiled(source)
    values, characters = extent(conversation)
    meter.left = BASE + PER_VALUE * values + characters
    text = template.render(conversation)
    if len(text) > OUTPUT[0] + OUTPUT[1] * characters:
        raise Spent(f"writes {len(text):,} characters of a conversation of {characters:,}")
    return text


def plain(value: Any) -> Any:
    """Plain data again, of rows that a library read: a template sees no method that could do something."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value)


def extent(value: Any) -> tuple[int, int]:
    """(values, characters) in plain data."""
    values, characters, todo = 0, 0, [value]
    while todo:
        x = todo.pop()
        values += 1
        if isinstance(x, str):
            characters += len(x)
        elif isinstance(x, dict):
            todo += x.values()
        elif isinstance(x, list | tuple):
            todo += x
    return values, characters
