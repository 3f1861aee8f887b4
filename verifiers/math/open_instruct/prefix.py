r"""The equality that sympy's LaTeX parser gives Tülu 3's MATH verifier: the longest readable prefix, letter by letter.

Source: sympy 1.14's grammar sympy/parsing/latex/LaTeX.g4 and its conversion, which open-instruct e6c3044 calls as
simplify(parse_latex(a) - parse_latex(b)) == 0. Here the same language is read by hand, without antlr or sympy, into the
trees of math_parse, and the difference is decided by math_value. Kept: '1,2' is 1, '204_5' is 204, 'cat' is c·a·t, '1 2' is 12,
\pi and e are variables, an equation is equal to nothing. Left out, and so never equal: integrals, sums, limits, derivatives,
bras and kets.
"""

import re
from fractions import Fraction
from functools import lru_cache

from verifiers.math.parse import MAX_DEPTH
from verifiers.math.tokens import MAX_LENGTH, MAX_TOKENS, Unparseable
from verifiers.math.value import ComplexEvaluator, NoValue, Undefined, same_value

TOKEN = re.compile(
    r"(?P<skip>[ \t\r\n]+|\\(?:,|:|;|!|\*|-|\.|/|\"|\(|=)|\\(?:thinspace|medspace|thickspace|quad|qquad|negthinspace|negmedspace"
    r"|negthickspace|left(?!\|)|right(?!\|)|vrule|vcenter|vbox|vskip|vspace|hfil)(?![A-Za-z]))"
    r"|(?P<differential>d[ \t\r\n]*(?:[A-Za-z]|\\[A-Za-z]+))|(?P<letter>[A-Za-z])|(?P<digit>[0-9])|(?P<bars>\\(?:left|right)\|)"
    r"|(?P<equal>&[ \t\r\n]*=|=(?:[ \t\r\n]*&)?)|(?P<command>\\[A-Za-z]+)|(?P<quotes>'+)|(?P<mark>\\[{}]|[-+*/(){}\[\]|_^:<>!.,])"
)
FUNCTIONS = frozenset(
    str.split("exp log lg ln sin cos tan csc sec cot arcsin arccos arctan arccsc arcsec arccot sinh cosh tanh arsinh arcosh artanh")
)
RELATIONS = frozenset(("equal", "\\neq", "<", ">", "\\leq", "\\le", "\\leqq", "\\leqslant", "\\geq", "\\ge", "\\geqq", "\\geqslant"))
LEFT_OUT = frozenset(["\\lim", "\\int", "\\sum", "\\prod", "\\langle"])
STOPS = frozenset(str.split(r"\to \rightarrow \Rightarrow \longrightarrow \Longrightarrow \rangle \rfloor \rceil \times \cdot \div"))
GROUPS = {"(": ")", "[": "]", "{": "}", "\\{": "\\}"}


def same_prefix(a: str, b: str) -> bool:
    """True if the expressions that the two texts begin with are equal. Total."""
    x, y = read(a[:MAX_LENGTH]), read(b[:MAX_LENGTH])
    if x is None or y is None or x[0] == "rel" or y[0] == "rel":
        return False
    try:
        return same_value(x, y, a[:MAX_LENGTH] + "|" + b[:MAX_LENGTH], ComplexEvaluator)
    except (NoValue, Undefined, RecursionError):
        return False


@lru_cache(maxsize=4096)
def read(text: str) -> tuple | None:
    """The tree of the prefix of `text`, or None where sympy raises (or its calculus is needed)."""
    try:
        return PrefixParser(text.strip()).relation()
    except (Unparseable, RecursionError):
        return None


class Unlexable(Unparseable):
    """A character that sympy's lexer does not know."""


class PrefixParser:
    """antlr looks ahead before it goes on: where what follows an operator or a bracket cannot be read, the expression ends
    before it ('5+\\\\sqrt2' is 5), unless an unknown character is met, which is an error wherever it stands."""

    def __init__(self, text: str):
        self.text, self.tokens, self.end = text, [], 0
        self.at = self.depth = self.bars = 0
        self.dead: set[tuple[int, bool]] = set()  # where a factor could not be read: never tried twice

    def peek(self, ahead: int = 0) -> tuple[str, str]:
        while len(self.tokens) <= self.at + ahead:
            self.tokens.append(self.scan())
        return self.tokens[self.at + ahead]

    def scan(self) -> tuple[str, str]:
        while self.end < len(self.text):
            match = TOKEN.match(self.text, self.end)
            if match is None or len(self.tokens) > MAX_TOKENS:
                raise Unlexable(f"at {self.end}")
            self.end = match.end()
            if match.lastgroup != "skip":
                kind = match.lastgroup
                return (kind, "equal") if kind == "equal" else (kind, match[0])
        return ("end", "")

    def next(self) -> tuple[str, str]:
        token = self.peek()
        self.at += 1
        return token

    def take(self, *values: str) -> str:
        kind, value = self.peek()
        if kind != "letter" and value in values:
            self.at += 1
            return value
        return ""

    def expect(self, value: str) -> None:
        if not self.take(value):
            raise Unparseable(f"expected {value}")

    def relation(self) -> tuple:
        left = self.sum()
        if self.peek()[1] not in RELATIONS:
            return left
        while self.take(*RELATIONS):
            self.sum()
        return ("rel",)  # equal to nothing, whatever it says

    def attempt(self, read, start: int | None = None):
        """What `read` reads, or None with the place (`start`, before the operator) restored where it cannot."""
        start = self.at if start is None else start
        depth, bars, key = self.depth, self.bars, (start, self.bars > 0)
        try:
            if key not in self.dead:
                return read()
        except Unlexable:
            raise
        except Unparseable:
            self.dead.add(key)
        self.at, self.depth, self.bars = start, depth, bars
        return None

    def sum(self) -> tuple:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unparseable("nested too deep")
        terms = [self.product()]
        while sign := self.take("+", "-"):
            term = self.attempt(self.product, self.at - 1)
            if term is None:
                break
            terms.append(term if sign == "+" else ("neg", term))
        self.depth -= 1
        return terms[0] if len(terms) == 1 else ("sum", tuple(terms))

    def product(self, functions: bool = True) -> tuple:
        left = self.unary(functions)
        while operator := self.take("*", "\\times", "\\cdot", "/", "\\div", ":"):
            right = self.attempt(lambda: self.unary(functions), self.at - 1)
            if right is None:
                break
            left = ("prod", (left, right)) if operator in ("*", "\\times", "\\cdot") else ("div", left, right)
        return left

    def unary(self, functions: bool) -> tuple:
        signs = 0
        while sign := self.take("+", "-"):
            signs += sign == "-"
        factors = [self.postfix()]
        while self.begins(functions) and (factor := self.attempt(self.postfix)) is not None:
            factors.append(factor)
        factors = without_times_x(factors)
        tree = factors[0] if len(factors) == 1 else ("prod", tuple(factors))
        return ("neg", tree) if signs % 2 else tree

    def begins(self, functions: bool) -> bool:
        kind, value = self.peek()
        if kind == "command":
            function = value[1:] in FUNCTIONS or value in ("\\sqrt", "\\overline", "\\int", "\\sum", "\\prod", "\\lim")
            return (functions or not function) and value not in RELATIONS and value not in STOPS
        if kind == "mark":
            return value in GROUPS or (value == "|" and not self.bars)
        return kind in ("letter", "digit", "differential") or (kind == "bars" and value == "\\left|")

    def postfix(self) -> tuple:
        base = self.atom()
        while True:
            if self.take("^"):
                exponent = self.attempt(self.exponent, self.at - 1)
                if exponent is None:
                    return base
                base = ("pow", base, exponent)
            elif self.take("!"):
                base = ("fn", "factorial", (base,))
                while self.take("!"):
                    base = ("fn", "factorial", (base,))
                return base
            else:
                return base

    def exponent(self) -> tuple:
        tree = self.braced() if self.peek()[1] == "{" else self.simple()
        if self.peek()[1] == "_":
            self.subscript()
        return tree

    def braced(self) -> tuple:
        self.expect("{")
        tree = self.sum()
        self.expect("}")
        return tree

    def subscript(self) -> str:
        self.expect("_")
        start = self.at
        self.braced() if self.peek()[1] == "{" else self.simple()
        return "_" + "".join(value for _, value in self.tokens[start : self.at] if value not in "{}")

    def atom(self) -> tuple:
        kind, value = self.peek()
        if kind == "mark" and value in GROUPS:
            self.at += 1
            bars, self.bars = self.bars, 0
            tree = self.sum()
            self.bars = bars
            self.expect(GROUPS[value])
            return tree
        if kind == "mark" and value == "|":
            self.at += 1
            self.bars += 1
            tree = self.sum()
            self.bars -= 1
            self.expect("|")
            return ("fn", "abs", (tree,))
        if kind == "command" and value[1:] in FUNCTIONS | {"sqrt", "overline", "lfloor", "lceil"}:
            self.at += 1
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise Unparseable("nested too deep")
            tree = self.function(value[1:])
            self.depth -= 1
            return tree
        return self.simple(applied=True)

    def simple(self, applied: bool = False) -> tuple:
        """An atom: a letter or command with its subscript and primes (applied to arguments in brackets, if it may be), a
        number, a fraction, a binomial."""
        kind, value = self.next()
        if kind == "digit":
            return self.number(value)
        if kind == "differential":
            return ("sym", "d" + re.sub(r"^d\s*\\?", "", value))
        if kind == "command" and value in ("\\frac", "\\dfrac", "\\tfrac"):
            top = self.upper_or_lower()
            if self.peek(1)[0] == "differential" and self.peek(2)[1] == "}":
                raise Unparseable("a derivative")
            return ("div", top, self.upper_or_lower())
        if kind == "command" and value in ("\\binom", "\\dbinom", "\\tbinom"):
            top = self.braced()
            return ("fn", "binom", (top, self.braced()))
        if kind == "command" and value == "\\mathit":
            self.expect("{")
            letters = ""
            while self.peek()[0] == "letter":
                letters += self.next()[1]
            self.expect("}")
            return ("sym", letters)
        if kind not in ("letter", "command") or value in LEFT_OUT | RELATIONS | STOPS:
            raise Unparseable(f"at {value!r}")
        if value == "\\infty" and self.peek()[1] != "(":
            return ("const", "inf")
        return self.symbol(value.lstrip("\\"), applied)

    def symbol(self, name: str, applied: bool) -> tuple:
        for _ in range(2):
            if self.peek()[1] == "_":
                name += self.subscript()
            elif self.peek()[0] == "quotes":
                name += self.next()[1]
        if not applied or self.peek()[1] != "(" or self.peek()[0] != "mark":
            return ("sym", name)
        arguments = self.attempt(self.arguments)
        return ("sym", name) if arguments is None else ("fn", "apply " + name, arguments)

    def arguments(self) -> tuple:
        self.expect("(")
        arguments = [self.sum()]
        while self.take(","):
            arguments.append(self.sum())
        self.expect(")")
        return tuple(arguments)

    def number(self, digits: str) -> tuple:
        """DIGIT+ (',' DIGIT DIGIT DIGIT)* ('.' DIGIT+)?, white space between any two of them. Before a point without
        decimals the look-ahead takes the number apart: '142.' is 1 times 4, '12,345.' is 12, '5.' is nothing."""
        start = self.at
        while self.peek()[0] == "digit":
            digits += self.next()[1]
        comma = len(digits), self.at
        while self.peek()[1] == "," and all(self.peek(i)[0] == "digit" for i in (1, 2, 3)):
            digits += "".join(self.peek(i)[1] for i in (1, 2, 3))
            self.at += 4
        if self.peek()[1] == ".":
            if self.peek(1)[0] != "digit":
                if len(digits) == 1:
                    raise Unparseable("a point without decimals")
                length, self.at = comma if comma[0] < len(digits) else (1, start)
                return ("num", Fraction(digits[:length]), 0)
            self.at += 1
            digits += "."
            while self.peek()[0] == "digit":
                digits += self.next()[1]
        leading_zero = "." not in digits and digits.startswith("0") and digits.strip("0")
        if len(digits) > 400 or leading_zero:
            raise Unparseable("a number of too many digits" if len(digits) > 400 else "a leading zero")
        return ("num", Fraction(digits), 0)

    def upper_or_lower(self) -> tuple:
        if self.peek()[0] == "digit":
            return ("num", Fraction(self.next()[1]), 0)
        return self.braced()

    def function(self, name: str) -> tuple:
        if name == "sqrt":
            index = None
            if self.take("["):
                index = self.sum()
                self.expect("]")
            inside = self.braced()
            return ("fn", "sqrt", (inside,)) if index is None else ("pow", inside, ("div", ("num", Fraction(1), 0), index))
        if name == "overline":
            return ("fn", "apply overline", (self.braced(),))
        if name in ("lfloor", "lceil"):
            tree = self.sum()
            self.expect("\\r" + name[1:])
            return ("fn", name[1:], (tree,))
        power = base = None
        for _ in range(2):
            if self.peek()[1] == "^" and power is None:
                self.at += 1
                power = self.braced() if self.peek()[1] == "{" else self.simple()
            elif self.peek()[1] == "_" and base is None:
                self.at += 1
                base = self.braced() if self.peek()[1] == "{" else self.simple()
                base = self.without_last_digit(base)
        if self.take("("):
            inside = self.sum()
            while self.take(","):
                self.sum()  # sympy drops all arguments but the first
            self.expect(")")
        else:
            inside = self.product(functions=False)
        arguments = (inside, base) if name == "log" and base is not None else (inside,)
        inverse = power == ("neg", ("num", Fraction(1), 0)) and "arc" + name in FUNCTIONS
        tree = ("fn", "arc" + name if inverse else name, arguments)
        return tree if power is None or inverse else ("pow", tree, power)

    def without_last_digit(self, base: tuple) -> tuple:
        """\\log_28 with nothing after it is log of 8 to the base 2: antlr gives the argument what the base can spare."""
        if base[0] != "num" or base[1] < 10 or self.begins(False) or self.peek()[1] in ("+", "-", "^"):
            return base
        self.at -= 1
        return ("num", Fraction(str(base[1])[:-1]), 0)


def without_times_x(factors: list[tuple]) -> list[tuple]:
    """An 'x' between two factors without variables is a multiplication sign: 3x4 is 12."""

    def constant(tree):
        return isinstance(tree, tuple) and tree[:1] != ("sym",) and all(constant(p) for p in tree if isinstance(p, tuple))

    inner = range(1, len(factors) - 1)
    drop = {i for i in inner if factors[i] == ("sym", "x") and constant(factors[i - 1]) and constant(factors[i + 1])}
    return [factor for i, factor in enumerate(factors) if i not in drop]
