"""The arguments of a constraint, checked against the annotations of the rule that takes them."""

from collections.abc import Mapping
from inspect import Parameter

from verifiers.strings import nearest, shown
from verifiers.verdict import GroundTruthError

TYPES = {
    int: "a whole number",
    int | float: "a number",
    str: "a text",
    list: "a list of texts",
    list | str: "a list of texts or a text",
}


def typed_arguments(name: str, parameters: Mapping[str, Parameter], given: dict) -> dict:
    """The arguments that the rule `name` takes, checked against its annotations. Raises GroundTruthError."""
    wanted = {key: p.annotation for key, p in parameters.items() if key != "text"}
    optional = {key for key, p in parameters.items() if p.default is not p.empty}
    for key in given:
        if key not in wanted:
            raise GroundTruthError(f"{name}: unknown argument {shown(key)}{nearest(key, wanted)}")
    for key, kind in wanted.items():
        value = given.get(key)
        if value is None and key in optional:
            continue
        if kind is int and isinstance(value, float) and value == value // 1:
            value = given[key] = int(value)
        if kind is list and isinstance(value, list) and not all(isinstance(word, str) for word in value):
            value = None
        if not isinstance(value, kind) or isinstance(value, bool):
            wanted_type = TYPES.get(kind, kind)
            raise GroundTruthError(f"{name}: argument {key} must be {wanted_type}, found {shown(given.get(key))}")
    return given
