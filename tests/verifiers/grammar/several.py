"""Kinds of several values. Each kind returns (response, label, whether they are equal).

Left out, as it may be read in two ways: (1, 2) alone, which is a point or an interval; 'x < 3 or x > 1'; a list without
names against an assignment in another order; sets against tuples.
"""

import random
from fractions import Fraction

from tests.verifiers.grammar.singles import Case
from tests.verifiers.grammar.values import next_to, rational, spelled, spelled_surd, surd

Ends = tuple[Fraction | None, bool, Fraction | None, bool]  # low (None is -oo), closed, high, closed


def _item(rng: random.Random, x: Fraction) -> str:
    """A spelling without thousands and outer white space: one item of a list."""
    return spelled(rng, x).removesuffix("\\,").strip()


def _distinct(rng: random.Random, low: int, high: int) -> list[Fraction]:
    values = list(dict.fromkeys(rational(rng) for _ in range(rng.randint(low, high) + 2)))[:high]
    while len(values) < low:
        values.append(max(values) + 1)
    return values


def _changed(rng: random.Random, values: list[Fraction]) -> list[Fraction]:
    """The values with one replaced by a near miss that is not among them, or without one, or with one more."""
    how, at = rng.randrange(3), rng.randrange(len(values))
    fresh = next_to(rng, values[at])
    while fresh in values:
        fresh += 13
    if how == 0:
        return [*values[:at], fresh, *values[at + 1 :]]
    return [*values, fresh] if how == 1 or len(values) < 3 else values[:at] + values[at + 1 :]


def _brackets(rng: random.Random, opening: str, closing: str, inside: str) -> str:
    left, right = rng.choice((("", ""), ("\\left", "\\right"), ("\\bigl", "\\bigr")))
    return f"{left}{opening}{inside}{right}{closing}"


def tuples(rng: random.Random) -> Case:
    """Tuples by place."""
    xs = _distinct(rng, 2, 4)
    ys = rng.choice((xs, xs, xs[::-1], _changed(rng, xs), [*xs[1:], xs[0]]))
    return _tuple(rng, ys), _tuple(rng, xs), xs == ys


def _tuple(rng: random.Random, xs: list[Fraction]) -> str:
    comma = rng.choice((", ", " , ", ",\\ ", ",\\, "))
    inside = comma.join(_item(rng, x) for x in xs)
    if rng.random() < 0.2:
        return f"\\langle {inside} \\rangle"
    return rng.choice(("", "", "(x, y)=" if len(xs) == 2 else "")) + _brackets(rng, "(", ")", inside)


def sets(rng: random.Random) -> Case:
    """Sets in any order, repeated elements once."""
    xs = _distinct(rng, 2, 5)
    ys = xs if rng.random() < 0.5 else _changed(rng, xs)
    return _set(rng, ys), _set(rng, xs), xs == ys


def _set(rng: random.Random, xs: list[Fraction]) -> str:
    order = rng.sample(xs, len(xs)) + ([rng.choice(xs)] if rng.random() < 0.2 else [])
    inside = ", ".join(_item(rng, x) for x in order)
    return rng.choice(("", "", "x \\in ")) + _brackets(rng, "\\{", "\\}", inside)


def lists(rng: random.Random) -> Case:
    """Several solutions, in any order, joined in several ways."""
    xs = _distinct(rng, 2, 4)
    ys = xs if rng.random() < 0.5 else _changed(rng, xs)
    return _list(rng, ys), _list(rng, xs), xs == ys


def _list(rng: random.Random, xs: list[Fraction]) -> str:
    items = [_item(rng, x) for x in rng.sample(xs, len(xs))]
    name = rng.choice(("", "", "x = "))
    items = [name + item for item in items] if rng.random() < 0.5 else [name + items[0], *items[1:]]
    last = rng.choice((", ", " \\text{ and } ", " \\text{ or } ", ", \\text{ and } ", "; ", "\\text{ or }", " and "))
    return last.join((", ".join(items[:-1]), items[-1]))


def points(rng: random.Random) -> Case:
    """Sets and lists of ordered pairs."""
    pairs = list({(x, y) for x, y in zip(_distinct(rng, 3, 3), _distinct(rng, 3, 3), strict=True)})
    others = rng.choice(
        (pairs, pairs, [(y, x) for x, y in pairs], pairs[1:], [(pairs[0][0] + 1, pairs[0][1]), *pairs[1:]])
    )

    def text(of: list) -> str:
        inside = ", ".join(f"({_item(rng, x)}, {_item(rng, y)})" for x, y in rng.sample(of, len(of)))
        return rng.choice((inside, f"\\{{{inside}\\}}", f"\\left\\{{ {inside} \\right\\}}"))

    return text(others), text(pairs), set(pairs) == set(others)


def radical_sets(rng: random.Random) -> Case:
    """Sets of sums of square roots."""
    xs: list = []
    while len(xs) < 2:
        value = surd(rng)
        xs += [value] if value not in xs else []
    ys = rng.choice((xs, xs, [xs[0], {7: Fraction(11)}], [{n: -q for n, q in x.items()} for x in xs]))
    same = all(x in ys for x in xs) and all(y in xs for y in ys)
    text = lambda of: "\\{" + ", ".join(spelled_surd(rng, x) for x in rng.sample(of, len(of))) + "\\}"
    return text(ys), text(xs), same


# --- sets of numbers --------------------------------------------------------------------------------------------------


def regions(rng: random.Random) -> Case:
    """Unions of intervals, as intervals, inequalities and absolute values."""
    pieces = _pieces(rng)
    others = pieces
    if rng.random() < 0.5:
        at = rng.randrange(len(pieces))
        others = [*pieces[:at], *_near(rng, pieces[at]), *pieces[at + 1 :]]
    return _region(rng, others), _region(rng, pieces), merged(pieces) == merged(others)


def _pieces(rng: random.Random) -> list[Ends]:
    ends: list[Fraction | None] = sorted(_distinct(rng, 4, 4))
    if rng.random() < 0.3:
        ends[0] = None
    if rng.random() < 0.3:
        ends[3] = None
    closed = [rng.random() < 0.5 and end is not None for end in ends]
    first, second = (ends[0], closed[0], ends[1], closed[1]), (ends[2], closed[2], ends[3], closed[3])
    if rng.random() < 0.4:
        return [rng.choice((first, second))]
    return [first, second]


def _near(rng: random.Random, piece: Ends) -> list[Ends]:
    low, low_closed, high, high_closed = piece
    options: list[list[Ends]] = []
    if low is not None:
        options += [[(low, not low_closed, high, high_closed)], [(low - 1, low_closed, high, high_closed)]]
    if high is not None:
        options += [
            [(low, low_closed, high, not high_closed)],
            [(low, low_closed, high + Fraction(1, 100), high_closed)],
        ]
    if low is not None and high is not None:
        middle = (low + high) / 2
        options += [[(low, low_closed, middle, False), (middle, False, high, high_closed)]]
        options += [[(low, low_closed, middle, False), (middle, True, high, high_closed)]]  # the same set
    return rng.choice(options)


def merged(pieces: list[Ends]) -> list[Ends]:
    """The normal form: sorted, no two that touch."""
    infinity = Fraction(10**9)
    ordered = sorted(pieces, key=lambda piece: -infinity if piece[0] is None else piece[0])
    result = [ordered[0]]
    for low, low_closed, high, high_closed in ordered[1:]:
        before = result[-1]
        if (
            before[2] is not None
            and low is not None
            and (low < before[2] or (low == before[2] and (low_closed or before[3])))
        ):
            result[-1] = (before[0], before[1], high, high_closed)
        else:
            result.append((low, low_closed, high, high_closed))
    return result


def _region(rng: random.Random, pieces: list[Ends]) -> str:
    touching = merged(pieces) != sorted(pieces, key=lambda piece: (piece[0] is not None, piece[0] or 0))
    order = rng.sample(pieces, len(pieces))
    style = rng.randrange(4)
    if len(order) > 1 and touching and style in (1, 2):
        style = 0
    if style == 1:
        return rng.choice((" \\text{ or } ", " or ")).join(_inequality(rng, piece) for piece in order)
    if style == 2 and len(order) > 1:
        return " \\text{ or } ".join(_interval(rng, piece) for piece in order)
    if style == 3 and len(order) == 1 and None not in (order[0][0], order[0][2]) and order[0][1] == order[0][3]:
        return _absolute(rng, order[0])
    text = rng.choice((" \\cup ", "\\cup", " ∪ ")).join(_interval(rng, piece) for piece in order)
    alone = len(order) == 1 and None not in (order[0][0], order[0][2])
    return ("x \\in " if alone or rng.random() < 0.3 else "") + text


def _interval(rng: random.Random, piece: Ends) -> str:
    low, low_closed, high, high_closed = piece
    left = "-\\infty" if low is None else _item(rng, low)
    right = rng.choice(("\\infty", "+\\infty", "∞")) if high is None else _item(rng, high)
    return _brackets(rng, "[" if low_closed else "(", "]" if high_closed else ")", f"{left}, {right}")


def _inequality(rng: random.Random, piece: Ends) -> str:
    low, low_closed, high, high_closed = piece
    less = lambda closed: rng.choice(("\\le ", "\\leq ", "≤", "<=")) if closed else rng.choice(("<", " < ", "\\lt "))
    more = lambda closed: rng.choice(("\\ge ", "\\geq ", "≥")) if closed else rng.choice((">", " > "))
    if low is None:
        return (
            f"x {less(high_closed)}{_item(rng, high)}"
            if rng.random() < 0.6
            else f"{_item(rng, high)} {more(high_closed)}x"
        )
    if high is None:
        return (
            f"x {more(low_closed)}{_item(rng, low)}" if rng.random() < 0.6 else f"{_item(rng, low)} {less(low_closed)}x"
        )
    if rng.random() < 0.3:
        return f"{_item(rng, high)} {more(high_closed)}x {more(low_closed)}{_item(rng, low)}"
    return f"{_item(rng, low)} {less(low_closed)}x {less(high_closed)}{_item(rng, high)}"


def _absolute(rng: random.Random, piece: Ends) -> str:
    low, closed, high, _ = piece
    middle, radius = (low + high) / 2, (high - low) / 2
    k = rng.choice((1, 1, 2))
    inside = f"{k if k > 1 else ''}x" + (
        "" if middle == 0 else f"{'-' if middle > 0 else '+'}{_item(rng, abs(middle) * k)}"
    )
    bars = rng.choice((f"|{inside}|", f"\\left|{inside}\\right|", f"\\lvert {inside}\\rvert"))
    sign = "\\le" if closed else "<"
    return f"{bars} {sign} {_item(rng, radius * k)}"


# --- matrices, assignments, boxes -------------------------------------------------------------------------------------


def matrices(rng: random.Random) -> Case:
    """Matrices entry by entry; a column is a tuple, but no row."""
    height, width = rng.choice(((2, 2), (2, 2), (2, 3), (3, 1), (1, 3)))
    rows = [[rational(rng) for _ in range(width)] for _ in range(height)]
    others = [list(row) for row in rows]
    if rng.random() < 0.5:
        if rng.random() < 0.5:
            others = [list(column) for column in zip(*rows, strict=True)]
        else:
            i, j = rng.randrange(height), rng.randrange(width)
            others[i][j] = next_to(rng, others[i][j])
    return _matrix(rng, others), _matrix(rng, rows), rows == others


def _matrix(rng: random.Random, rows: list[list[Fraction]]) -> str:
    body = rng.choice((" \\\\ ", "\\\\", "\\\\\n")).join(" & ".join(_item(rng, x) for x in row) for row in rows)
    body += rng.choice(("", "", "\\\\"))
    kind = rng.choice(("pmatrix", "bmatrix", "matrix", "array"))
    if kind == "matrix":
        return f"\\left(\\begin{{matrix}}{body}\\end{{matrix}}\\right)"
    if kind == "array":
        return f"\\left[\\begin{{array}}{{{'c' * len(rows[0])}}}{body}\\end{{array}}\\right]"
    return f"\\begin{{{kind}}}{body}\\end{{{kind}}}"


def vectors(rng: random.Random) -> Case:
    """A column vector against a tuple."""
    xs = _distinct(rng, 2, 3)
    ys = rng.choice((xs, xs, xs[::-1], _changed(rng, xs)))
    column = _matrix(rng, [[y] for y in ys])
    label = _brackets(rng, "(", ")", ", ".join(_item(rng, x) for x in xs))
    return rng.choice((column, f"\\langle {', '.join(_item(rng, y) for y in ys)} \\rangle")), label, xs == ys


def assignments(rng: random.Random) -> Case:
    """x = 1, y = 2, in any order of the names, against (1, 2) and against each other; and several of them."""
    names = rng.choice(("xy", "xyz", "ab", "pq"))
    solutions = [_distinct(rng, len(names), len(names)) for _ in range(rng.choice((1, 1, 2)))]
    others = [list(values) for values in solutions]
    if rng.random() < 0.5:
        others[0] = others[0][::-1] if rng.random() < 0.5 else [others[0][0] + 1, *others[0][1:]]
    if len(solutions) == 2 and (solutions[0] == solutions[1] or others[0] == others[1]):
        solutions, others = solutions[:1], others[:1]
    same = sorted(map(tuple, solutions)) == sorted(map(tuple, others))
    return _assigned(rng, names, others, named=True), _assigned(rng, names, solutions, rng.random() < 0.6), same


def _assigned(rng: random.Random, names: str, solutions: list, named: bool) -> str:
    if not named:
        return ", ".join(
            "(" + ", ".join(_item(rng, x) for x in values) + ")" for values in rng.sample(solutions, len(solutions))
        )
    order = rng.sample(range(len(names)), len(names)) if names[0] == "x" else range(len(names))
    joint = rng.choice((", ", " , \\quad ", " \\text{ and } ")) if len(solutions) == 1 else ", "
    texts = [
        joint.join(f"{names[i]} = {_item(rng, values[i])}" for i in order)
        for values in rng.sample(solutions, len(solutions))
    ]
    return rng.choice(("; ", " \\text{ or } ")).join(texts)


def boxes(rng: random.Random) -> Case:
    """Boxes that belong together are one answer; a box that corrects another counts alone."""
    xs = _distinct(rng, 2, 2)
    a, b = (_item(rng, x) for x in xs)
    together = rng.choice(
        (
            "For (a) we get $\\boxed{{{0}}}$ and for (b) we get $\\boxed{{{1}}}$.",
            "$\\boxed{{{0}}}$ and $\\boxed{{{1}}}$",
            "(a) \\boxed{{{0}}}, (b) \\boxed{{{1}}}",
            "Part (a): $\\boxed{{{0}}}$. Part (b): $\\boxed{{{1}}}$.",
            "The roots are \\[\\boxed{{{0}}}, \\quad \\boxed{{{1}}}\\]",
            "$x=\\boxed{{{0}}}$ and $y=\\boxed{{{1}}}$",
            "The length is $\\boxed{{{0}}}$ and the width is $\\boxed{{{1}}}$.",
        )
    )
    corrected = rng.choice(
        (
            "At first $\\boxed{{{0}}}$. But that is wrong: $\\boxed{{{1}}}$.",
            "I get \\boxed{{{0}}}. Wait, checking again I find \\boxed{{{1}}}.",
            "So $n = \\boxed{{{0}}}$, hence the sum is $\\boxed{{{1}}}$.",
            "\\boxed{{{0}}}\n\nNo. The final answer: \\boxed{{{1}}}",
        )
    )
    both, last = f"{_item(rng, xs[0])}, {_item(rng, xs[1])}", _item(rng, xs[1])
    if rng.random() < 0.5:
        label = rng.choice((both, last, _item(rng, xs[0])))
        return together.format(a, b), label, label is both
    label = rng.choice((last, both, _item(rng, xs[0])))
    return corrected.format(a, b), label, label is last


def equations(rng: random.Random) -> Case:
    """Lines and half planes: equal up to a factor, which turns an inequality round if it is negative."""
    a, b, c = rng.randint(1, 6), rng.choice((-5, -3, -2, 1, 2, 4)), rng.randint(-9, 9)
    k = rng.choice((2, 3, -1, -2))
    d, e, f = rng.choice(((a, b, c), (a, b, c), (a, b, c + 1), (a, -b, c), (a + 1, b, c)))
    line = lambda p, q, r, sign: f"{p}x{'+' if q >= 0 else '-'}{abs(q)}y {sign} {r}"
    same = a * e == b * d and a * f == c * d and b * f == c * e
    if rng.random() < 0.5:
        return (
            rng.choice(
                (line(k * d, k * e, k * f, "="), f"{k * f} = {k * d}x{'+' if k * e >= 0 else '-'}{abs(k * e)}y")
            ),
            line(a, b, c, "="),
            same,
        )
    sign = rng.choice(("<", ">"))
    turned = sign if k > 0 else {"<": ">", ">": "<"}[sign]
    if rng.random() < 0.3:
        turned, same = {"<": ">", ">": "<"}[turned], False
    same = same and d * a > 0
    return line(k * d, k * e, k * f, turned), line(a, b, c, sign), same


KINDS = {
    kind.__name__: kind
    for kind in (tuples, sets, lists, points, radical_sets, regions, matrices, vectors, assignments, equations)
}
RESPONSES = {"boxes": boxes}
