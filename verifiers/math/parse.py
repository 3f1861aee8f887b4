r"""Answers in LaTeX or plain text as trees (verifiers.math.tree): the whole text or nothing, never its longest readable
prefix.

Work is bounded by the length of the text, the number of its tokens and the depth of its nesting.
Left out: calculus (integrals, sums, limits), logic; such answers are compared as text.
"""

from verifiers.math.cursor import Cursor
from verifiers.math.tokens import DECORATIONS, FUNCTIONS, GREEK, Unparseable, number, repeating, tokenize
from verifiers.math.tree import (
    MINUS_ONE,
    Based,
    Call,
    Const,
    Div,
    Inter,
    Matrix,
    Minus,
    MinusPlus,
    Neg,
    Node,
    Num,
    PlusMinus,
    Pow,
    Prod,
    Ratio,
    Rel,
    Seq,
    Sum,
    Sym,
    Text,
    Union,
    Unit,
    bare_list,
    too_deep,
)

RELATIONS = frozenset(("=", "~", "<", ">", "<=", ">=", "!=", "in"))
OPENING = {"(": ")", "[": "]", "\\{": "\\}"}
MATRICES = frozenset(["pmatrix", "bmatrix", "matrix", "vmatrix", "Bmatrix", "smallmatrix", "array"])
LINES = frozenset(["cases", "aligned", "align", "align*", "gathered", "split"])
APPLIED = frozenset("fghFGH")
BASES = {
    **{
        name: str(2 + i)
        for i, name in enumerate(str.split("two three four five six seven eight nine ten eleven twelve"))
    },
    **{"sixteen": "16", "hex": "16"},
}
SIGNS = {"pm": PlusMinus, "mp": MinusPlus}
SETS = {"cup": Union, "cap": Inter, "backslash": Minus}
ENDS_PRODUCT = frozenset(("pm", "mp", "cup", "cap", "end", "backslash", "rfloor", "rceil", "cr", "%"))  # commands


def parse(text: str, thousands: bool = True) -> Node:
    """The tree of a text that `normalise` has been applied to: of 'x=5' Rel(('=',), (x, 5)). Raises Unparseable.

    thousands: read 1,234 as one number."""
    parser = Parser(tokenize(text, thousands))
    tree = parser.answer(stop=None)
    if parser.at < len(parser.tokens):
        raise Unparseable(f"at {parser.tokens[parser.at][1]!r}")
    if too_deep(tree):
        raise Unparseable("nested too deep")
    return tree


class Parser(Cursor):
    """Recursive descent over the tokens; a method a level: answer , relation = sum + product * power ^ atom."""

    def answer(self, stop: str | None) -> Node:
        """relation ((',' | 'or') relation)*: one tree, or a bare list; with an 'or' in it, Seq('', 'or', items)."""
        self.nest()
        items, separators = [self.relation()], ""
        while separator := self.take(",", "or"):
            while separator:
                separators += separator
                separator = self.take(",", "or")
            if self.peek()[0] == "end" or self.mark() == (stop or "end"):
                break
            items.append(self.relation())
        self.depth -= 1
        if len(items) == 1:
            return items[0]
        return Seq("", "or", tuple(items)) if "or" in separators else bare_list(tuple(items))

    def relation(self) -> Node:
        """ratio (('=' | '<' | ...) ratio)*."""
        sides, operators = [self.ratio()], []
        while operator := self.take(*RELATIONS):
            operators.append(operator)
            sides.append(self.ratio())
        if "~" in operators:  # 'x ~ 3.5' is x = 3.5, '1/3 ~ 0.33' is 1/3
            first = operators.index("~")
            if first or not isinstance(sides[0], Sym):
                operators, sides = operators[:first], sides[: first + 1]
            operators = ["=" if operator == "~" else operator for operator in operators]
        return sides[0] if not operators else Rel(tuple(operators), tuple(sides))

    def ratio(self) -> Node:
        """sum (':' sum)*."""
        parts = [self.sum()]
        while self.take(":"):
            parts.append(self.sum())
        return parts[0] if len(parts) == 1 else Ratio(tuple(parts))

    def sum(self) -> Node:
        r"""product (('+' | '-' | '\pm' | '\cup' | ...) product)*."""
        terms = [self.product()]
        while True:
            kind, value = self.peek()
            if (kind, value) in (("mark", "+"), ("mark", "-")):
                self.at += 1
                terms.append(self.product() if value == "+" else Neg(self.product()))
            elif kind == "command" and value in SIGNS:
                self.at += 1
                terms.append(SIGNS[value](self.product()))
            elif kind == "command" and value in SETS:
                self.at += 1
                left = terms[0] if len(terms) == 1 else Sum(tuple(terms))
                terms = [SETS[value]((left, self.product()))]
            else:
                return terms[0] if len(terms) == 1 else Sum(tuple(terms))

    def product(self) -> Node:
        """sign* power (('*' | '/' | nothing) power)*, where a text after a factor is its unit."""
        if sign := self.take("-", "+"):
            self.deeper()
            return Neg(self.product()) if sign == "-" else self.product()
        kind, value = self.peek()
        if kind == "command" and value in SIGNS:
            self.at += 1
            self.deeper()
            return SIGNS[value](self.product())
        left = self.power()
        while True:
            if operator := self.take("*", "/"):
                sign = self.take("-", "+")
                right = Neg(self.power()) if sign == "-" else self.power()
                left = product_of(left, right) if operator == "*" else Div(left, right)
            elif self.peek()[0] == "text" and not isinstance(left, Text):
                left = Unit(left, self.raw_unit())
            elif self.begins_factor():
                if isinstance(left, Unit) and left.unit not in ("%", "°"):
                    raise Unparseable("words inside an expression")  # 5 \text{ if } x > 0
                left = self.implicit(left)
            else:
                return left

    def begins_factor(self) -> bool:
        """True if the next token can begin a factor without a sign before it."""
        kind, value = self.peek()
        if kind == "mark":
            return value in ("(", "[", "{") or (value == "|" and not self.bars)
        return kind in ("name", "number", "repeating") or (kind == "command" and value not in ENDS_PRODUCT)

    def implicit(self, left: Node) -> Node:
        r"""left right without a sign: a mixed number (1\frac12, 1 1/2), an application f(x), or a product."""
        kind, value = self.peek()
        whole = isinstance(left, Num) and left.decimals == 0
        if kind in ("number", "repeating") and isinstance(left, (Num, Text, Unit, Based)):
            slash, below = self.peek(1), self.peek(2)
            if not (whole and slash == ("mark", "/") and below[0] == "number" and "." not in value):
                raise Unparseable("two numbers side by side")
            top = self.power()
            self.at += 1
            match self.power():
                case Unit(bottom, unit):  # 1 1/2 %
                    return Unit(Sum((left, Div(top, bottom))), unit)
                case bottom:
                    return Sum((left, Div(top, bottom)))
        right = self.power()
        match right:
            case Div(Num(), Num()) if whole and (kind, value) == ("command", "frac"):
                return Sum((left, right))
            case Unit(Div(Num(), Num()) as part, unit) if whole and (kind, value) == ("command", "frac"):
                return Unit(Sum((left, part)), unit)
        if isinstance(left, Sym) and left.name[0] in APPLIED and value == "(":
            return Call("apply " + left.name, arguments_of(right))
        return product_of(left, right)

    def power(self) -> Node:
        """atom ('^' script | '!' | '°' | '%' | '_' base | subscript | prime)*."""
        base = self.atom()
        while True:
            if self.take("^"):
                self.deeper()
                exponent = self.script()
                base = Pow(base, exponent)
                self.depth -= 1
            elif self.take("°"):
                base = Unit(base, "°")
            elif self.mark() == "!" and self.take("!"):
                base = Call("factorial", (base,))
            elif self.peek() == ("command", "%"):
                self.at += 1
                base = Unit(base, "%")
            elif isinstance(base, Num) and self.take("_"):
                base = self.based()
            elif isinstance(base, (Sym, Const)) and self.mark() in ("_", "'"):
                base = Sym(base.name + ("'" if self.take("'") else "_" + "".join(self.raw_group(skip=1))))
            else:
                return base

    def based(self) -> Node:
        r"""The number just read, before '_', in the base that follows: 1101_2, (1101)_{2}, 1101_{\text{two}}."""
        before = [value for _, value in self.tokens[max(0, self.at - 4) : self.at - 1]]
        digits = before[-2] if before[-1] == ")" else before[-1]
        base = "".join(self.raw_group()).strip("() ").removeprefix("base").strip().lower()
        if self.tokens[self.at - 1][0] == "end" or not digits.replace(".", "").isdigit():
            raise Unparseable("a base of no digits")
        return Based(digits.lstrip("0") or "0", BASES.get(base, base))

    def script(self) -> Node:
        """An exponent: a group, a signed or a single atom."""
        if self.take("-"):
            self.deeper()
            return Neg(self.script())
        return self.atom()

    def atom(self) -> Node:
        """A number, a name, a text, a command with its arguments, or something in brackets."""
        kind, value = self.peek()
        if kind == "text":
            return Text(self.raw_text())
        self.at += 1
        if kind == "number":
            return number(value)
        if kind == "repeating":
            return repeating(value)
        if kind == "name":
            return Const(value) if value in ("e", "i") else Sym(value)
        if kind == "command":
            self.nest()
            tree = self.command(value)
            self.depth -= 1
            return tree
        if kind == "mark":
            return self.bracket(value)
        raise Unparseable("the text ends too early")

    def bracket(self, opening: str) -> Node:
        """What stands in brackets or bars, after `opening`: (1, 2] as a Seq, (x) as x, |x| as its absolute value."""
        if opening == "|":
            self.bars += 1
            inside = self.answer(stop="|")
            self.expect("|")
            self.bars -= 1
            return Call("abs", (inside,))
        if opening == "{":
            return self.group()
        if opening not in OPENING:
            raise Unparseable(f"at {opening!r}")
        bars, self.bars = self.bars, 0
        if opening == "\\{" and self.take("\\}"):
            return Seq("{", "}", ())
        inside = self.answer(stop=OPENING[opening])
        closing = self.expect(*((")", "]") if opening in "([" else ("\\}",)))
        self.bars = bars
        match inside:
            case Seq("", "" | "or", several):
                items = several
            case _:
                items = (inside,)
        if opening == "\\{":
            return Seq("{", "}", items)
        if len(items) == 1 and OPENING[opening] == closing:
            return items[0]
        return Seq(opening, closing, items)

    def group(self) -> Node:
        """The inside of { } once the brace is taken."""
        bars, self.bars = self.bars, 0
        inside = self.answer(stop="}")
        self.expect("}")
        self.bars = bars
        return inside

    def argument(self) -> Node:
        r"""A command's argument: {...}, or the next digit or atom alone (\frac12, \sqrt2)."""
        kind, value = self.peek()
        if kind == "number" and len(value) > 1 and "." not in value:
            self.tokens[self.at] = ("number", value[1:])
            return number(value[0])
        return self.atom()

    def command(self, name: str) -> Node:
        r"""What a command stands for, its arguments read: \frac12, \sqrt[3]{x}, \pi, \sin x, a matrix, a letter."""
        if name == "frac":
            top = self.argument()
            return Div(top, self.argument())
        if name == "sqrt":
            return self.root()
        if name == "binom":
            top = self.argument()
            return Call("binom", (top, self.argument()))
        if name in ("pi", "infty"):
            return Const("pi" if name == "pi" else "inf")
        if name in ("lfloor", "lceil"):
            inside = self.answer(stop=None)
            if self.peek() != ("command", "r" + name[1:]):
                raise Unparseable(f"no \\r{name[1:]}")
            self.at += 1
            return Call(name[1:], (inside,))
        if name in FUNCTIONS:
            return self.function(name)
        if name == "begin":
            return self.matrix()
        if name in ("boxed", "fbox", "mathstrut", "phantom"):
            return self.argument()
        if name in DECORATIONS or name in ("mathbb", "mathcal"):
            return Sym(f"{name} {''.join(self.raw_group())}")
        if name in GREEK:
            return Sym(name)
        raise Unparseable(f"\\{name}")

    def root(self) -> Node:
        r"""\sqrt{x} or \sqrt[n]{x}, after the command."""
        index = None
        if self.take("["):
            index = self.answer(stop="]")
            self.expect("]")
        inside = self.atom() if self.peek()[0] == "number" else self.argument()
        return Call("sqrt", (inside,)) if index is None else Call("root", (inside, index))

    def function(self, name: str) -> Node:
        r"""\sin^2 x, \log_2 8, \sin(x): the argument without brackets is a product that stops before a function."""
        power: Node | None = None
        base: Node | None = None
        for _ in range(2):
            if self.take("^"):
                power = self.script()
            elif self.take("_"):
                base = self.argument()
        if self.mark() in ("(", "{", "["):
            inside = self.atom()
        else:
            inside = self.power() if self.mark() != "-" else self.product()
            while self.peek()[0] in ("name", "number") or self.peek() == ("command", "pi"):
                inside = self.implicit(inside)
        arguments = tuple(degrees_as_radians(tree) for tree in arguments_of(inside))
        if name == "log" and base is not None:
            arguments += (base,)
        if power == MINUS_ONE and "arc" + name in FUNCTIONS:
            return Call("arc" + name, arguments)
        tree = Call(name, arguments)
        return tree if power is None else Pow(tree, power)

    def matrix(self) -> Node:
        r"""Rows up to \end{...}; the column specification of an array is skipped."""
        kind = "".join(self.raw_group())
        if kind not in MATRICES | LINES:
            raise Unparseable(f"\\begin{{{kind}}}")
        if kind == "array":
            self.raw_group()
        rows: list[tuple[Node, ...]] = []
        row: list[Node] = []
        while True:
            row.append(self.relation())
            if self.take("&"):
                continue
            rows.append(tuple(row))
            row = []
            if self.peek() == ("command", "cr"):
                self.at += 1
            if self.peek() == ("command", "end"):
                break
            if self.peek(-1) != ("command", "cr"):
                raise Unparseable("a matrix is not closed")
        self.at += 1
        self.raw_group()
        if len({len(row) for row in rows}) != 1:
            raise Unparseable("a matrix of unequal rows")
        if kind in LINES:
            return bare_list(tuple(entry for row in rows for entry in row))
        tree = Matrix(tuple(rows))
        return Call("det", (tree,)) if kind == "vmatrix" else tree


def product_of(left: Node, right: Node) -> Node:
    """left times right; a product of many factors is one node: a chain of letters is not deep."""
    return Prod((*left.factors, right)) if isinstance(left, Prod) else Prod((left, right))


def arguments_of(tree: Node) -> tuple[Node, ...]:
    """The arguments that a function is applied to: of '(x, y)' both, of 'x' the one."""
    return tree.items if isinstance(tree, Seq) else (tree,)


def degrees_as_radians(tree: Node) -> Node:
    """30° as 30 pi / 180, for a function; any other tree as it is."""
    match tree:
        case Unit(amount, "°"):
            return Div(Prod((amount, Const("pi"))), number("180"))
    return tree
