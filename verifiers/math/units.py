"""Units of measurement: which spellings mean the same, and when two amounts may be compared at all."""

from verifiers.math.tree import Node, Unit

SAME_UNIT: dict[str, str | None] = {
    **dict.fromkeys(("inches", "inch", "in"), "in"),
    **dict.fromkeys(("feet", "foot", "ft"), "ft"),
    **dict.fromkeys(("meters", "meter", "metres", "metre", "m"), "m"),
    **dict.fromkeys(("centimeters", "centimeter", "centimetres", "cm"), "cm"),
    **dict.fromkeys(("kilometers", "kilometer", "km"), "km"),
    **dict.fromkeys(("miles", "mile", "mi"), "mi"),
    **dict.fromkeys(("hours", "hour", "hr", "hrs", "h"), "h"),
    **dict.fromkeys(("minutes", "minute", "min"), "min"),
    **dict.fromkeys(("seconds", "second", "sec", "s"), "s"),
    **dict.fromkeys(("dollars", "dollar"), "$"),
    **dict.fromkeys(("cents", "cent"), "cent"),
    **dict.fromkeys(("degrees", "degree"), "°"),
    **dict.fromkeys(("kilograms", "kilogram", "kg"), "kg"),
    **dict.fromkeys(("grams", "gram", "g"), "g"),
    **dict.fromkeys(("pounds", "pound", "lb", "lbs"), "lb"),
    **dict.fromkeys(("mm", "mph", "yd", "ml", "mg"), None),
}


def same_units(a: Node, b: Node) -> bool:
    """False only for two units that are both known and differ: '5 cm' and '5 m', '15 cm^2' and '15 cm^3'."""
    if not isinstance(a, Unit) or not isinstance(b, Unit):
        return True
    x, y = unit_key(a.unit), unit_key(b.unit)
    return x is None or y is None or x == y


def unit_key(unit: str) -> tuple[str, str] | None:
    """(canonical name, exponent), or None for a unit that is not known: 'square feet' is ('ft', '2')."""
    name, _, exponent = unit.lower().replace(".", "").partition("^")
    name, exponent = name.strip(), exponent.strip() or "1"
    if name.startswith(("square ", "sq ", "cubic ")):
        exponent, name = ("3" if name.startswith("cubic") else "2"), name.partition(" ")[2]
    return ((SAME_UNIT[name] or name), exponent) if name in SAME_UNIT else None


def without_unit(tree: Node) -> Node:
    """The amount of a tree with a unit; any other tree as it is."""
    return tree.amount if isinstance(tree, Unit) else tree
