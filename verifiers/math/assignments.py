"""Answers that name their values: 'p = 5, q = 2' is (p, q) = (5, 2), and several of them are a list of such tuples."""

from verifiers.math.tree import Node, Rel, Seq, Sym, bare_list

Pairs = list[tuple[Node, Node]]  # names and values


def grouped(items: tuple[Node, ...]) -> Node:
    """The bare list of `items`; where they assign two or more names in turn, the assignment of a tuple to a tuple, or a
    list of these: 'p = 5, q = 2; p = 7, q = 2' is (p, q) = (5, 2), (p, q) = (7, 2)."""
    pairs = [assignment(item) for item in items]
    if any(pair is None for pair in pairs):
        return bare_list(items)
    names = [pair[0] for pair in pairs if pair]
    width = next((i for i in range(1, len(names)) if names[i] in names[:i]), len(names))
    if width < 2 or len(names) % width:
        return bare_list(items)
    groups = [items[at : at + width] for at in range(0, len(items), width)]
    trees = []
    for at, group in enumerate(groups):
        if {name.name for name in names[at * width : (at + 1) * width]} != {name.name for name in names[:width]}:
            return bare_list(items)
        sides = [item.sides for item in group if isinstance(item, Rel)]
        trees.append(
            Rel(("=",), (Seq("(", ")", tuple(s[0] for s in sides)), Seq("(", ")", tuple(s[1] for s in sides))))
        )
    return trees[0] if len(trees) == 1 else bare_list(tuple(trees))


def assignment(item: Node) -> tuple[Sym, Node] | None:
    """(name, value) of 'name = value', else None."""
    match item:
        case Rel(("=",), (Sym() as name, value)):
            return name, value
    return None


def pairs_of(tree: Node) -> Pairs | None:
    """The names and values of an assignment to a tuple, else None: of (x, y) = (1, 2) [(x, 1), (y, 2)]."""
    match tree:
        case Rel(("=",), (Seq("(", ")", names), Seq("(", ")", values))) if len(names) == len(values):
            if all(isinstance(name, Sym) for name in names):
                return list(zip(names, values, strict=True))
    return None


def orders(pairs: Pairs) -> list[tuple[Node, ...]]:
    """The tuples that the values may be compared with: in the order of the alphabet for x, y, z and for names that
    differ in their subscripts alone; else as written, where that is another order, too."""
    written = tuple(value for _, value in pairs)
    by_name = sorted(pairs, key=lambda pair: str(pair[0].fields()[0]))
    ordered = tuple(value for _, value in by_name)
    letters = {str(name.fields()[0])[:1] for name, _ in pairs}
    return [ordered] if letters <= set("xyz") else [ordered, written]


def is_family(pairs: Pairs) -> bool:
    """True for names that differ in their subscripts alone: x_1, x_2, which are as good as a list."""
    return len({str(name.fields()[0]).partition("_")[0] for name, _ in pairs}) == 1
