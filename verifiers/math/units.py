"""Units of measurement: which spellings mean the same, and when two amounts may be compared at all."""

from verifiers.math.tree import Node, Unit

SAME_UNIT: dict[str, str] = {
    **dict.fromkeys(("inches", "inch", "in"), "in"),
    **dict.fromkeys(("feet", "foot", "ft"), "ft"),
    **dict.fromkeys(("yards", "yard", "yd", "yds"), "yd"),
    **dict.fromkeys(("miles", "mile", "mi"), "mi"),
    **dict.fromkeys(("meters", "meter", "metres", "metre", "m"), "m"),
    **dict.fromkeys(("millimeters", "millimeter", "millimetres", "mm"), "mm"),
    **dict.fromkeys(("centimeters", "centimeter", "centimetres", "cm", "cms"), "cm"),
    **dict.fromkeys(("kilometers", "kilometer", "kilometres", "km", "kms"), "km"),
    **dict.fromkeys(("hours", "hour", "hr", "hrs", "h"), "h"),
    **dict.fromkeys(("minutes", "minute", "mins", "min"), "min"),
    **dict.fromkeys(("seconds", "second", "secs", "sec", "s"), "s"),
    **dict.fromkeys(("days", "day"), "day"),
    **dict.fromkeys(("weeks", "week"), "week"),
    **dict.fromkeys(("months", "month"), "month"),
    **dict.fromkeys(("years", "year", "yr", "yrs"), "year"),
    **dict.fromkeys(("dollars", "dollar"), "$"),
    **dict.fromkeys(("cents", "cent"), "cent"),
    **dict.fromkeys(("degrees", "degree"), "°"),
    **dict.fromkeys(("radians", "radian", "rad"), "rad"),
    **dict.fromkeys(("kilograms", "kilogram", "kg"), "kg"),
    **dict.fromkeys(("grams", "gram", "g"), "g"),
    **dict.fromkeys(("milligrams", "milligram", "mg"), "mg"),
    **dict.fromkeys(("pounds", "pound", "lb", "lbs"), "lb"),
    **dict.fromkeys(("ounces", "ounce", "oz"), "oz"),
    **dict.fromkeys(("liters", "liter", "litres", "litre", "l"), "l"),
    **dict.fromkeys(("milliliters", "milliliter", "ml"), "ml"),
    **dict.fromkeys(("gallons", "gallon", "gal"), "gal"),
    **{"am": "am", "pm": "pm", "mph": "mi/h", "kph": "km/h"},
}
POWERS = (("square ", " squared", "2"), ("sq ", " squared", "2"), ("cubic ", " cubed", "3"), ("cu ", " cubed", "3"))


def same_units(a: Node, b: Node) -> bool:
    """False only for two units that are both known and differ: '5 cm' and '5 m', '15 cm^2' and '15 cm^3'."""
    if not isinstance(a, Unit) or not isinstance(b, Unit):
        return True
    x, y = unit_key(a.unit), unit_key(b.unit)
    return x is None or y is None or x == y


def unit_key(unit: str) -> tuple[tuple[str, str], ...] | None:
    """(canonical name, exponent) of the unit and of those that it is divided by, or None if one is not known:
    'square feet' is (('ft', '2'),), 'miles per hour', 'mi / h' and 'mph' are (('mi', '1'), ('h', '1'))."""
    parts = unit.lower().replace(".", "").replace(" per ", "/").split("/")
    keys = []
    for part in parts:
        name, _, exponent = part.partition("^")
        name, exponent = " ".join(name.split()), exponent.strip() or "1"
        for before, after, power in POWERS:
            if name.startswith(before) or name.endswith(after):
                exponent, name = power, name.removeprefix(before).removesuffix(after)
        if name not in SAME_UNIT:
            return None
        names = SAME_UNIT[name].split("/")
        keys += [(names[0], exponent), *((below, "1") for below in names[1:])]
    return tuple(keys)


def without_unit(tree: Node) -> Node:
    """The amount of a tree with a unit; any other tree as it is."""
    return tree.amount if isinstance(tree, Unit) else tree
