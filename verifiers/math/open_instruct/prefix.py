r"""The equality that sympy's LaTeX parser gives Tülu 3's MATH verifier: the longest readable prefix, letter by letter.

Source: sympy 1.14's grammar sympy/parsing/latex/LaTeX.g4 and its conversion, which open-instruct e6c3044 calls as
simplify(parse_latex(a) - parse_latex(b)) == 0. Here the same language is read by hand, without antlr or sympy, into the
trees of verifiers.math.tree, and the difference is decided by verifiers.math.value.
Kept: '1,2' is 1, '204_5' is 204, 'cat' is c·a·t, '1 2' is 12, \pi and e are variables, an equation is equal to nothing.
Left out, and so never equal: integrals, sums, limits, derivatives, bras and kets.
"""

import re
from fractions import Fraction
from functools import lru_cache

from verifiers.math.arithmetic import Undefined
from verifiers.math.cursor import MAX_DEPTH
from verifiers.math.open_instruct.scan import Scanner
from verifiers.math.tokens import MAX_LENGTH, Unparseable
from verifiers.math.tree import MINUS_ONE, ONE, Call, Const, Div, Neg, Node, Num, Pow, Prod, Rel, Sum, Sym, too_deep
from verifiers.math.value import ComplexEvaluator, NoValue, same_value

FUNCTIONS = frozenset(
    str.split(
        "exp log lg ln sin cos tan csc sec cot arcsin arccos arctan arccsc arcsec arccot sinh cosh tanh arsinh arcosh "
        "artanh"
    )
)
RELATIONS = frozenset(str.split(r"equal \neq < > \leq \le \leqq \leqslant \geq \ge \geqq \geqslant"))
LEFT_OUT = frozenset(["\\lim", "\\int", "\\sum", "\\prod", "\\langle"])
STOPS = frozenset(
    str.split(r"\to \rightarrow \Rightarrow \longrightarrow \Longrightarrow \rangle \rfloor \rceil \times \cdot \div")
)
TIMES = ("*", "\\times", "\\cdot")
DIVIDED = ("/", "\\div", ":")
GROUPS = {"(": ")", "[": "]", "{": "}", "\\{": "\\}"}


def same_prefix(a: str, b: str) -> bool:
    """True if the expressions that the two texts begin with are equal. Total."""
    x, y = read(a[:MAX_LENGTH]), read(b[:MAX_LENGTH])
    if x is None or y is None or isinstance(x, Rel) or isinstance(y, Rel):
        return False
    try:
        return same_value(x, y, a[:MAX_LENGTH] + "|" + b[:MAX_LENGTH], ComplexEvaluator)
    except (NoValue, Undefined):
        return False


@lru_cache(maxsize=4096)
def read(text: str) -> Node | None:
    """The tree of the prefix of `text`, or None where sympy raises (or its calculus is needed)."""
    try:
        tree = PrefixParser(text.strip()).relation()
    except Unparseable:
        return None
    return None if too_deep(tree) else tree


class PrefixParser(Scanner):
    """Recursive descent as antlr does it: what cannot be read ends the expression before it."""

    def relation(self) -> Node:
        """sum ('=' sum)*, the relation itself being equal to nothing."""
        left = self.sum()
        if self.peek()[1] not in RELATIONS:
            return left
        while self.take(*RELATIONS):
            self.sum()
        return Rel((), ())  # equal to nothing, whatever it says

    def sum(self) -> Node:
        """product (('+' | '-') product)*."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unparseable("nested too deep")
        terms = [self.product()]
        while sign := self.take("+", "-"):
            term = self.attempt(self.product, self.at - 1)
            if term is None:
                break
            terms.append(term if sign == "+" else Neg(term))
        self.depth -= 1
        return terms[0] if len(terms) == 1 else Sum(tuple(terms))

    def product(self, functions: bool = True) -> Node:
        r"""unary (('*' | '/' | \times ...) unary)*; without `functions` it ends before a function."""
        left = self.unary(functions)
        while operator := self.take(*TIMES, *DIVIDED):
            right = self.attempt(lambda: self.unary(functions), self.at - 1)
            if right is None:
                break
            left = Prod((left, right)) if operator in TIMES else Div(left, right)
        return left

    def unary(self, functions: bool) -> Node:
        """sign* postfix*: factors side by side."""
        signs = 0
        while sign := self.take("+", "-"):
            signs += sign == "-"
        factors = [self.postfix()]
        while self.begins(functions) and (factor := self.attempt(self.postfix)) is not None:
            factors.append(factor)
        factors = without_times_x(factors)
        tree = factors[0] if len(factors) == 1 else Prod(tuple(factors))
        return Neg(tree) if signs % 2 else tree

    def begins(self, functions: bool) -> bool:
        """True if the next token can begin a factor; without `functions` a function cannot."""
        kind, value = self.peek()
        if kind == "command":
            function = value[1:] in FUNCTIONS or value in ("\\sqrt", "\\overline", "\\int", "\\sum", "\\prod", "\\lim")
            return (functions or not function) and value not in RELATIONS and value not in STOPS
        if kind == "mark":
            return value in GROUPS or (value == "|" and not self.bars)
        return kind in ("letter", "digit", "differential") or (kind == "bars" and value == "\\left|")

    def postfix(self) -> Node:
        """atom ('^' exponent | '!')*."""
        base = self.atom()
        while True:
            if self.take("^"):
                exponent = self.attempt(self.exponent, self.at - 1)
                if exponent is None:
                    return base
                base = Pow(base, exponent)
            elif self.take("!"):
                base = Call("factorial", (base,))
                while self.take("!"):
                    base = Call("factorial", (base,))
                return base
            else:
                return base

    def exponent(self) -> Node:
        """A group or a single atom; a subscript after it is dropped."""
        tree = self.braced() if self.peek()[1] == "{" else self.simple()
        if self.peek()[1] == "_":
            self.subscript()
        return tree

    def braced(self) -> Node:
        """'{' sum '}'."""
        self.expect("{")
        tree = self.sum()
        self.expect("}")
        return tree

    def subscript(self) -> str:
        """'_' and a group or an atom, as it is spelled: '_12' for _{12}."""
        self.expect("_")
        start = self.at
        self.braced() if self.peek()[1] == "{" else self.simple()
        return "_" + "".join(value for _, value in self.tokens[start : self.at] if value not in "{}")

    def atom(self) -> Node:
        """What stands in brackets or bars, a function with its arguments, or something simple."""
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
            return Call("abs", (tree,))
        if kind == "command" and value[1:] in FUNCTIONS | {"sqrt", "overline", "lfloor", "lceil"}:
            self.at += 1
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise Unparseable("nested too deep")
            tree = self.function(value[1:])
            self.depth -= 1
            return tree
        return self.simple(applied=True)

    def simple(self, applied: bool = False) -> Node:
        """An atom: a letter or command with its subscript and primes (applied to arguments in brackets, if it may be),
        a number, a fraction, a binomial."""
        kind, value = self.next()
        if kind == "digit":
            return self.number(value)
        if kind == "differential":
            return Sym("d" + re.sub(r"^d\s*\\?", "", value))
        if kind == "command" and value in ("\\frac", "\\dfrac", "\\tfrac"):
            top = self.upper_or_lower()
            if self.peek(1)[0] == "differential" and self.peek(2)[1] == "}":
                raise Unparseable("a derivative")
            return Div(top, self.upper_or_lower())
        if kind == "command" and value in ("\\binom", "\\dbinom", "\\tbinom"):
            top = self.braced()
            return Call("binom", (top, self.braced()))
        if kind == "command" and value == "\\mathit":
            self.expect("{")
            letters = ""
            while self.peek()[0] == "letter":
                letters += self.next()[1]
            self.expect("}")
            return Sym(letters)
        if kind not in ("letter", "command") or value in LEFT_OUT | RELATIONS | STOPS:
            raise Unparseable(f"at {value!r}")
        if value == "\\infty" and self.peek()[1] != "(":
            return Const("inf")
        return self.symbol(value.lstrip("\\"), applied)

    def symbol(self, name: str, applied: bool) -> Node:
        """A variable with its subscript and primes, or its application to arguments: x_1, f'(x)."""
        for _ in range(2):
            if self.peek()[1] == "_":
                name += self.subscript()
            elif self.peek()[0] == "quotes":
                name += self.next()[1]
        if not applied or self.peek()[1] != "(" or self.peek()[0] != "mark":
            return Sym(name)
        arguments = self.attempt(self.arguments)
        return Sym(name) if arguments is None else Call("apply " + name, arguments)

    def arguments(self) -> tuple[Node, ...]:
        """'(' sum (',' sum)* ')'."""
        self.expect("(")
        arguments = [self.sum()]
        while self.take(","):
            arguments.append(self.sum())
        self.expect(")")
        return tuple(arguments)

    def number(self, digits: str) -> Node:
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
                return Num(Fraction(digits[:length]), 0)
            self.at += 1
            digits += "."
            while self.peek()[0] == "digit":
                digits += self.next()[1]
        leading_zero = "." not in digits and digits.startswith("0") and digits.strip("0")
        if len(digits) > 400 or leading_zero:
            raise Unparseable("a number of too many digits" if len(digits) > 400 else "a leading zero")
        return Num(Fraction(digits), 0)

    def upper_or_lower(self) -> Node:
        """The numerator or denominator of a fraction: a digit or a group."""
        if self.peek()[0] == "digit":
            return Num(Fraction(self.next()[1]), 0)
        return self.braced()

    def function(self, name: str) -> Node:
        r"""A function after its name: \sqrt[3]{x}, \lfloor x \rfloor, \sin^2 x, \log_2(8)."""
        if name == "sqrt":
            index = None
            if self.take("["):
                index = self.sum()
                self.expect("]")
            inside = self.braced()
            return Call("sqrt", (inside,)) if index is None else Pow(inside, Div(ONE, index))
        if name == "overline":
            return Call("apply overline", (self.braced(),))
        if name in ("lfloor", "lceil"):
            tree = self.sum()
            self.expect("\\r" + name[1:])
            return Call(name[1:], (tree,))
        power: Node | None = None
        base: Node | None = None
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
        if power == MINUS_ONE and "arc" + name in FUNCTIONS:
            return Call("arc" + name, arguments)
        return Call(name, arguments) if power is None else Pow(Call(name, arguments), power)

    def without_last_digit(self, base: Node) -> Node:
        r"""\log_28 with nothing after it is log of 8 to the base 2: the argument gets what the base can spare."""
        if not isinstance(base, Num) or base.value < 10 or self.begins(False) or self.peek()[1] in ("+", "-", "^"):
            return base
        if base.value.denominator != 1:  # \log_220.5 is log of .5 to the base 220
            self.at -= next(n for n in range(1, self.at + 1) if self.tokens[self.at - n][1] == ".")
            return Num(Fraction(int(base.value)), 0)
        self.at -= 1
        return Num(Fraction(str(base.value)[:-1]), 0)


def without_times_x(factors: list[Node]) -> list[Node]:
    """An 'x' between two factors without variables is a multiplication sign: 3x4 is 12."""
    inner = range(1, len(factors) - 1)
    drop = {
        i
        for i in inner
        if factors[i] == Sym("x") and without_symbols(factors[i - 1]) and without_symbols(factors[i + 1])
    }
    return [factor for i, factor in enumerate(factors) if i not in drop]


def without_symbols(tree: object) -> bool:
    """True for a tree (or a field of a node) in which no variable stands: for 3 and 2/5, not for x."""
    if isinstance(tree, tuple):
        return all(without_symbols(part) for part in tree)
    if isinstance(tree, Node):
        return not isinstance(tree, Sym) and all(without_symbols(value) for value in tree.fields())
    return True
