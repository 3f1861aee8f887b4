r"""Answers in LaTeX or plain text as trees: the whole text or nothing, never its longest readable prefix.

A tree is a tuple (kind, ...):
  ('num', value: Fraction, decimals: int)   ('sym', name)   ('const', 'pi' | 'e' | 'i' | 'inf')   ('text', words)
  ('sum' | 'prod', trees)   ('neg' | 'pm' | 'mp', tree)   ('div' | 'pow', tree, tree)   ('fn', name, trees)
  ('unit', tree, unit)   ('based', digits, base)   ('ratio', trees)   ('rel', operators, trees)
  ('seq', opening, closing, trees)   brackets '(' '[' '{' (a set) or '' (a bare list)
  ('union' | 'inter' | 'minus', trees)   ('matrix', rows)
Work is bounded by the length of the text, the number of its tokens and the depth of its nesting.
Left out: calculus (integrals, sums, limits), logic; such answers are compared as text.
"""

from fractions import Fraction

from verifiers.math.tokens import DECORATIONS, FUNCTIONS, GREEK, Unparseable, number, repeating, tokenize

MAX_DEPTH = 30

RELATIONS = frozenset(("=", "<", ">", "<=", ">=", "!=", "in"))
OPENING = {"(": ")", "[": "]", "\\{": "\\}"}
MATRICES = frozenset(["pmatrix", "bmatrix", "matrix", "vmatrix", "Bmatrix", "smallmatrix", "array"])
APPLIED = frozenset("fghFGH")


def parse(text: str, thousands: bool = True) -> tuple:
    """The tree of a text that `normalise` has been applied to. Raises Unparseable."""
    parser = Parser(tokenize(text, thousands))
    tree = parser.answer(stop=None)
    if parser.at < len(parser.tokens):
        raise Unparseable(f"at {parser.tokens[parser.at][1]!r}")
    return tree


class Parser:
    """Recursive descent over the tokens; a method a level: answer , relation = sum + product * power ^ atom."""

    def __init__(self, tokens: list[tuple[str, str]]):
        self.tokens, self.at, self.depth, self.bars = tokens, 0, 0, 0

    def peek(self, ahead: int = 0) -> tuple[str, str]:
        return self.tokens[self.at + ahead] if self.at + ahead < len(self.tokens) else ("end", "")

    def mark(self) -> str:
        kind, value = self.peek()
        return value if kind == "mark" else ""

    def take(self, *marks: str) -> str:
        """The next mark if it is one of `marks`, consumed; else ''."""
        found = self.mark()
        if found and found in marks:
            self.at += 1
            return found
        return ""

    def expect(self, *marks: str) -> str:
        if found := self.take(*marks):
            return found
        raise Unparseable(f"expected {' or '.join(marks)}, found {self.peek()[1]!r}")

    def answer(self, stop: str | None) -> tuple:
        """relation (',' relation)*: one tree, or a bare list."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unparseable("nested too deep")
        items = [self.relation()]
        while self.take(","):
            while self.take(","):
                pass
            if self.peek()[0] == "end" or self.mark() == (stop or "end"):
                break
            items.append(self.relation())
        self.depth -= 1
        return items[0] if len(items) == 1 else ("seq", "", "", tuple(items))

    def relation(self) -> tuple:
        sides, operators = [self.ratio()], []
        while operator := self.take(*RELATIONS):
            operators.append(operator)
            sides.append(self.ratio())
        return sides[0] if not operators else ("rel", tuple(operators), tuple(sides))

    def ratio(self) -> tuple:
        parts = [self.sum()]
        while self.take(":"):
            parts.append(self.sum())
        return parts[0] if len(parts) == 1 else ("ratio", tuple(parts))

    def sum(self) -> tuple:
        terms = [self.product()]
        while True:
            kind, value = self.peek()
            if (kind, value) in (("mark", "+"), ("mark", "-")):
                self.at += 1
                terms.append(self.product() if value == "+" else ("neg", self.product()))
            elif kind == "command" and value in ("pm", "mp"):
                self.at += 1
                terms.append((value, self.product()))
            elif kind == "command" and value in ("cup", "cap", "backslash"):
                self.at += 1
                left = terms[0] if len(terms) == 1 else ("sum", tuple(terms))
                terms = [({"cup": "union", "cap": "inter", "backslash": "minus"}[value], (left, self.product()))]
            else:
                return terms[0] if len(terms) == 1 else ("sum", tuple(terms))

    def product(self) -> tuple:
        if self.mark() in ("-", "+"):
            sign = self.take("-", "+")
            return ("neg", self.product()) if self.deeper(sign == "-") else self.product()
        if self.peek() in (("command", "pm"), ("command", "mp")):
            self.at += 1
            self.deeper()
            return (self.peek(-1)[1], self.product())
        left = self.power()
        while True:
            if operator := self.take("*", "/"):
                sign = self.take("-", "+")
                right = ("neg", self.power()) if sign == "-" else self.power()
                left = ("prod", (left, right)) if operator == "*" else ("div", left, right)
            elif self.peek()[0] == "text" and left[0] != "text":
                left = ("unit", left, self.unit())
            elif self.begins_factor():
                left = self.implicit(left)
            else:
                return left

    def deeper(self, value: bool = True) -> bool:
        """Count one level for a chain of signs ('- - - x'), which no bracket counts."""
        self.depth += 1
        if self.depth > 4 * MAX_DEPTH:
            raise Unparseable("too many signs")
        return value

    def begins_factor(self) -> bool:
        kind, value = self.peek()
        if kind == "mark":
            return value in ("(", "[", "{") or (value == "|" and not self.bars)
        return kind in ("name", "number", "repeating") or (kind == "command" and value not in ("pm", "mp", "cup", "cap", "end",
            "backslash", "rfloor", "rceil", "cr", "%"))  # fmt: skip

    def implicit(self, left: tuple) -> tuple:
        """left right without a sign: a mixed number (1\\frac12, 1 1/2), an application f(x), or a product."""
        kind, value = self.peek()
        whole = left[0] == "num" and left[2] == 0
        if kind in ("number", "repeating") and left[0] in ("num", "text", "unit", "based"):
            ahead = [self.peek(i) for i in range(1, 3)]
            if not (whole and ahead[0] == ("mark", "/") and ahead[1][0] == "number" and "." not in value):
                raise Unparseable("two numbers side by side")
            top = self.power()
            self.at += 1
            return ("sum", (left, ("div", top, self.power())))
        right = self.power()
        if whole and (kind, value) == ("command", "frac") and right[0] == "div" and right[1][0] == right[2][0] == "num":
            return ("sum", (left, right))
        if left[0] == "sym" and left[1][0] in APPLIED and value == "(":
            return ("fn", "apply " + left[1], right[3] if right[0] == "seq" else (right,))
        return ("prod", (left, right))

    def unit(self) -> str:
        words = []
        while self.peek()[0] == "text" or (words and self.mark() in ("^", "/") and self.peek(1)[0] in ("number", "text", "mark")):
            words.append(self.peek()[1])
            self.at += 1
            if words[-1] == "^":
                words.append("".join(self.raw_group()))
        return " ".join(words)

    def power(self) -> tuple:
        base = self.atom()
        while True:
            if self.take("^"):
                self.deeper()
                exponent = self.script()
                base = ("pow", base, exponent)
                self.depth -= 1
            elif self.take("°"):
                base = ("unit", base, "°")
            elif self.mark() == "!" and self.take("!"):
                base = ("fn", "factorial", (base,))
            elif self.peek() == ("command", "%"):
                self.at += 1
                base = ("unit", base, "%")
            elif base[0] == "num" and self.take("_"):
                base = ("based", self.tokens[self.at - 2][1], "".join(self.raw_group()))
            elif base[0] in ("sym", "const") and self.mark() in ("_", "'"):
                name = base[1] + ("'" if self.take("'") else "_" + "".join(self.raw_group(skip=1)))
                base = ("sym", name)
            else:
                return base

    def script(self) -> tuple:
        """An exponent: a group, a signed or a single atom."""
        if self.take("-"):
            self.deeper()
            return ("neg", self.script())
        return self.atom()

    def raw_group(self, skip: int = 0) -> list[str]:
        """The spelling of a subscript: the tokens of {...}, or one token."""
        self.at += skip
        if not self.take("{"):
            self.at += 1
            return [self.peek(-1)[1]]
        start, depth = self.at, 1
        while depth:
            if self.peek()[0] == "end":
                raise Unparseable("a brace is not closed")
            depth += (self.mark() == "{") - (self.mark() == "}")
            self.at += 1
        return [value for _, value in self.tokens[start : self.at - 1]]

    def atom(self) -> tuple:
        kind, value = self.peek()
        self.at += 1
        if kind == "number":
            return number(value)
        if kind == "repeating":
            return repeating(value)
        if kind == "name":
            return ("const", value) if value in ("e", "i") else ("sym", value)
        if kind == "text":
            words = [value]
            while self.peek()[0] == "text":
                words.append(self.peek()[1])
                self.at += 1
            return ("text", " ".join(words))
        if kind == "command":
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise Unparseable("nested too deep")
            tree = self.command(value)
            self.depth -= 1
            return tree
        if kind == "mark":
            return self.bracket(value)
        raise Unparseable("the text ends too early")

    def bracket(self, opening: str) -> tuple:
        if opening == "|":
            self.bars += 1
            inside = self.answer(stop="|")
            self.expect("|")
            self.bars -= 1
            return ("fn", "abs", (inside,))
        if opening == "{":
            return self.group()
        if opening not in OPENING:
            raise Unparseable(f"at {opening!r}")
        bars, self.bars = self.bars, 0
        if opening == "\\{" and self.take("\\}"):
            return ("seq", "{", "}", ())
        inside = self.answer(stop=OPENING[opening])
        closing = self.expect(*((")", "]") if opening in "([" else ("\\}",)))
        self.bars = bars
        items = inside[3] if inside[:3] == ("seq", "", "") else (inside,)
        if opening == "\\{":
            return ("seq", "{", "}", items)
        if len(items) == 1 and OPENING[opening] == closing:
            return items[0] if items[0][0] != "matrix" or opening != "|" else ("fn", "det", items)
        return ("seq", opening, closing, items)

    def group(self) -> tuple:
        """The inside of { } once the brace is taken."""
        bars, self.bars = self.bars, 0
        inside = self.answer(stop="}")
        self.expect("}")
        self.bars = bars
        return inside

    def argument(self) -> tuple:
        """A command's argument: {...}, or the next digit or atom alone (\\frac12, \\sqrt2)."""
        kind, value = self.peek()
        if kind == "number" and len(value) > 1 and "." not in value:
            self.tokens[self.at] = ("number", value[1:])
            return number(value[0])
        return self.atom()

    def command(self, name: str) -> tuple:
        if name == "frac":
            top = self.argument()
            return ("div", top, self.argument())
        if name == "sqrt":
            index = None
            if self.take("["):
                index = self.answer(stop="]")
                self.expect("]")
            inside = self.atom() if self.peek()[0] == "number" else self.argument()
            return ("fn", "sqrt", (inside,)) if index is None else ("fn", "root", (inside, index))
        if name == "binom":
            top = self.argument()
            return ("fn", "binom", (top, self.argument()))
        if name in ("pi", "infty"):
            return ("const", "pi" if name == "pi" else "inf")
        if name in ("lfloor", "lceil"):
            inside = self.answer(stop=None)
            if self.peek() != ("command", "r" + name[1:]):
                raise Unparseable(f"no \\r{name[1:]}")
            self.at += 1
            return ("fn", name[1:], (inside,))
        if name in FUNCTIONS:
            return self.function(name)
        if name == "begin":
            return self.matrix()
        if name in ("boxed", "fbox", "mathstrut", "phantom"):
            return self.argument()
        if name in DECORATIONS or name in ("mathbb", "mathcal"):
            return ("sym", f"{name} {''.join(self.raw_group())}")
        if name in GREEK:
            return ("sym", name)
        raise Unparseable(f"\\{name}")

    def function(self, name: str) -> tuple:
        """\\sin^2 x, \\log_2 8, \\sin(x): the argument without brackets is a product that stops before a function."""
        power = base = None
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
        arguments = inside[3] if inside[0] == "seq" else (inside,)
        arguments = tuple(degrees_as_radians(tree) for tree in arguments)
        if name == "log" and base is not None:
            arguments += (base,)
        if power is not None and power == ("neg", ("num", Fraction(1), 0)) and "arc" + name in FUNCTIONS:
            return ("fn", "arc" + name, arguments)
        tree = ("fn", name, arguments)
        return tree if power is None else ("pow", tree, power)

    def matrix(self) -> tuple:
        """Rows up to \\end{...}; the column specification of an array is skipped."""
        kind = "".join(self.raw_group())
        if kind not in MATRICES:
            raise Unparseable(f"\\begin{{{kind}}}")
        if kind == "array":
            self.raw_group()
        rows, row = [], []
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
        return ("fn", "det", (("matrix", tuple(rows)),)) if kind == "vmatrix" else ("matrix", tuple(rows))


def degrees_as_radians(tree: tuple) -> tuple:
    if tree[0] == "unit" and tree[2] == "°":
        return ("div", ("prod", (tree[1], ("const", "pi"))), ("num", Fraction(180), 0))
    return tree
