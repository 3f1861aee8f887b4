"""The arguments of a constraint, checked against the annotations of the rule that takes them."""

import difflib

from verifiers.verdict import GroundTruthError, shown


def typed_arguments(name: str, parameters, given: dict) -> dict:
    """The arguments that the rule `name` takes, checked against its annotations. Raises GroundTruthError."""
    wanted = {key: p.annotation for key, p in parameters.items() if key != "text"}
    for key in given:
        if key not in wanted:
            raise GroundTruthError(f"{name}: unknown argument {shown(key)}{nearest(key, wanted)}")
    for key, kind in wanted.items():
        value = given.get(key)
        if kind is int and isinstance(value, float) and value == value // 1:
            value = given[key] = int(value)
        if kind is list and isinstance(value, list) and not all(isinstance(word, str) for word in value):
            value = None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise GroundTruthError(f"{name}: argument {key} must be {TYPES.get(kind, kind)}, found {shown(given.get(key))}")
    return given


TYPES = {int: "a whole number", str: "a text", list: "a list of texts", list | str: "a list of texts or a text"}


def nearest(name: object, known) -> str:
    close = difflib.get_close_matches(str(name)[:200], list(known), n=1, cutoff=0.5)
    return f" (nearest: {close[0]})" if close else ""
