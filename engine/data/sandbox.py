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
from collections.abc import Iterable, Mapping
from types import FunctionType
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError, TemplateAssertionError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from engine.data.meter import (
    PER_UNIT,
    Meter,
    Spent,
    check_power,
    format_units,
    method_units,
    priced,
    priced_test,
    product,
)

MAX_SOURCE = 2**16  # characters of a template: the longest of today's families has a third of it
MAX_NODES = 10_000  # of its tree
BASE = 1_000_000  # units, a quarter of a second of the worst; a turn of a conversation takes some hundreds
PER_VALUE = 4_000  # units more for every value of the conversation: loops over messages in loops over messages
OUTPUT = 2**20, 64  # characters of text, and more of them for each of the conversation's
LEFT_OUT = ("urlize", "wordwrap", "striptags", "xmlattr", "pprint", "random")


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
        self.filters = {name: priced(meter, name, f) for name, f in kept.items()}
        self.filters |= {"iterate over": meter.loop, "spend on": meter.spend, "measure of": meter.sized}
        tests: dict[str, Any] = self.tests
        self.tests = {name: priced_test(meter, f) for name, f in tests.items()}
        self.globals.pop("lipsum", None)
        self.globals |= {"dict": _Dictionary(), "raise_exception": _raise}

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        spend = self.meter.spend
        if operator == "+" and type(left) is str and type(right) is str:
            spend(1 + (len(left) + len(right)) // PER_UNIT)
            return left + right
        units = self.meter.size(left) + self.meter.size(right)
        if operator == "*":
            units += product(left, right)
        elif operator == "**":
            check_power(left, right)
        elif operator == "%" and isinstance(left, str | bytes):
            units += format_units(self.meter, left, right)
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
            meter.spend(format_units(meter, text, *args, *options.values()))
        elif (holder := getattr(__obj, "__self__", None)) is not None:
            meter.spend(method_units(meter, holder, getattr(__obj, "__name__", ""), args, options))
        return super().call(__context, __obj, *args, **options)


def _to_json(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


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
