"""A user's own verifier: --verifier_module judge.py, a Python file of the user's, never of a dataset's.

    def verify(response: str, ground_truth) -> float | bool | tuple[float, str]: ...   # from 0 to 1, with a reason
    def check(ground_truth) -> None: ...   # may be left out; raises ValueError for a row that cannot be judged
    NAMES = ("my_task",)                   # may be left out; rows say `dataset: my_task`, or the file's name, `judge`

The file is run in worker processes alone (`judged` and `asked` are what they call), so that a verifier that
hangs, dies or raises costs a row its verdict and nothing else. What a run depends on is `judge.py#sha256=…` (`pin`):
the file's path with its content, and a worker refuses another content. What the file imports is not hashed, and the
directory that it lies in is not on the path.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import math
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from verifiers.pool import Pool
from verifiers.route import VERIFIERS, check, known_name, verify
from verifiers.strings import nearest, shown
from verifiers.verdict import GroundTruthError, Verdict, error, passed

PIN = "#sha256="
ANSWERS_WITHIN = 60.0  # seconds, for loading the file or for one row


class ModuleError(ValueError):
    """A file that cannot serve as a verifier, in one line."""


class Own(NamedTuple):
    """A user's verifier by its names: `judge` gives verdicts, `check` raises GroundTruthError."""

    names: tuple[str, ...]
    judge: Callable[[str, Any], Verdict]
    check: Callable[[Any], None]

    def is_named(self, dataset: object) -> bool:
        """Whether a row's `dataset` means this verifier."""
        return isinstance(dataset, str) and dataset.strip().lower() in self.names


# --- the file, in the run's own process: read, never run --------------------------------------------------------------


def pin(module: str) -> str:
    """The path of a file with its sha256, 'judge.py#sha256=…', which the rest of the run is given. A path that has one
    must still have that content. Raises ModuleError."""
    path, _, sha256 = module.partition(PIN)
    found = hashlib.sha256(source_of(Path(path).expanduser())).hexdigest()
    if sha256 not in ("", found):
        raise ModuleError(f"{path} has changed: its sha256 was {sha256[:16]}…, now it is {found[:16]}…")
    return path + PIN + found


def source_of(path: Path) -> bytes:
    """The content of a Python file. Raises ModuleError."""
    if path.suffix != ".py":
        raise ModuleError(f"{path}: expected a Python file, judge.py")
    try:
        return path.read_bytes()
    except OSError as problem:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ModuleError(f"{path}: {problem.strerror}{nearest(path.name, siblings)}") from None


class Checker:
    """`with Checker(mode, module) as check: check(dataset, ground_truth)`, which raises GroundTruthError for a row that
    could not be judged: `check` of route.py, and for rows of the user's verifier its own, in a process of its own.

    Entering it loads the file there, and raises ModuleError for one that cannot be loaded or has no `verify`.
    """

    def __init__(self, mode: str, module: str | None = None, *, silence: float = ANSWERS_WITHIN) -> None:
        self.mode, self.module, self.silence = mode, module, silence
        self.own: Own | None = None
        self._pool: Pool | None = None

    def __enter__(self) -> Checker:
        if self.module is not None:
            self._pool = Pool(1, module=self.module, silence=self.silence, judge="verifiers.custom:asked")
            described = self._ask(None, "names")
            if described.status == "error":
                self._pool.close()
                raise ModuleError(f"{self.module.partition(PIN)[0]}: {described.reason}")
            self.own = Own(tuple(json.loads(described.reason)), self._never, self._check)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.close()

    def __call__(self, dataset: Any, ground_truth: Any) -> None:
        check(dataset, ground_truth, self.mode, own=self.own)

    def name(self, dataset: Any) -> str:
        """The verifier that a `dataset` names. Raises GroundTruthError."""
        return known_name(dataset, self.own)

    def _check(self, ground_truth: Any) -> None:
        verdict = self._ask(ground_truth, "check")
        if verdict.status == "error":
            raise GroundTruthError(f"ground_truth: {verdict.reason}")

    def _ask(self, ground_truth: Any, what: str) -> Verdict:
        assert self._pool is not None
        return self._pool.score([("", ground_truth, what)]).verdicts[0]

    def _never(self, response: str, ground_truth: Any) -> Verdict:
        return error("a user's verifier judges in the pool's processes alone")


# --- the file, in a worker --------------------------------------------------------------------------------------------


def judged(response: str, ground_truth: Any, dataset: Any, *, module: str, **options: Any) -> Verdict:
    """`verify` of route.py, with the user's verifier for rows that name it. Total."""
    try:
        own = load(module)
    except ModuleError as problem:
        return error(str(problem))
    return verify(response, ground_truth, dataset, own=own, **options)


def asked(response: str, ground_truth: Any, what: Any, *, module: str, **options: Any) -> Verdict:
    """The verifier's `names` as JSON in the reason, or whether its `check` lets a ground truth pass; an error says why
    not. Total."""
    try:
        own = load(module)
        if what == "names":
            return passed(json.dumps(own.names))
        if what != "check":  # as the pool says
            return error("holds what JSON does not")
        own.check(ground_truth)
    except (ModuleError, GroundTruthError) as problem:
        return error(str(problem))
    return passed("")


@lru_cache(maxsize=1)
def load(module: str) -> Own:
    """The verifier in a file, once a process. Raises ModuleError, whatever the file does but end the process."""
    path = Path(pin(module).partition(PIN)[0]).expanduser()
    spec = importlib.util.spec_from_file_location(f"verifier_module_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ModuleError("cannot be loaded as Python")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded  # where its own dataclasses look for it
    try:
        spec.loader.exec_module(loaded)
    except (Exception, SystemExit) as problem:
        line = f"line {problem.lineno}: " if isinstance(problem, SyntaxError) else ""
        raise ModuleError(f"cannot be loaded: {line}{said(problem)}") from None
    given = vars(loaded)
    user_verify, user_check = given.get("verify"), given.get("check")
    if not callable(user_verify):
        close = nearest("verify", [name for name in given if not name.startswith("_")])
        raise ModuleError(f"no function verify(response, ground_truth){close}")
    if user_check is not None and not callable(user_check):
        raise ModuleError(f"check is no function but {shown(user_check)}")
    takes(user_verify, "verify(response, ground_truth)", "", None)
    takes(user_check or (lambda truth: None), "check(ground_truth)", None)
    return Own(
        names_of(path.stem, given.get("NAMES", ())),
        lambda response, truth: outcome(path.name, user_verify, response, truth),
        lambda truth: refusal(path.name, user_check, truth) if user_check is not None else None,
    )


def takes(function: Callable[..., Any], signature: str, *arguments: Any) -> None:
    """Raises ModuleError for a function that cannot be called with so many arguments."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as problem:
        raise ModuleError(f"cannot be called as {signature}: {problem}") from None
    except ValueError:  # a function of C that does not say
        return


def names_of(stem: str, declared: Any) -> tuple[str, ...]:
    """What rows may call the verifier: the file's name, and NAMES. Raises ModuleError for a name that is taken."""
    if not isinstance(declared, (list, tuple)) or not all(isinstance(n, str) and n.strip() for n in declared):
        raise ModuleError(f"NAMES must be a list of texts, found {shown(declared)}")
    names = dict.fromkeys(name.strip().lower() for name in (stem, *declared))
    for name in names:
        if name in VERIFIERS:
            what = "give the file another name" if name == stem.lower() else "give it another name in NAMES"
            raise ModuleError(f"{name} is the name of a verifier that is here already: {what}")
    return tuple(names)


def outcome(file: str, user_verify: Callable[..., Any], response: str, ground_truth: Any) -> Verdict:
    """A verdict of what the user's function returns; an error where it raises, or returns no number from 0 to 1."""
    try:
        found = user_verify(response, ground_truth)
        score, reason = found if isinstance(found, tuple) and len(found) == 2 else (found, f"{file} says so")
        number = math.nan if isinstance(score, (str, bytes)) else float(score)
    except (Exception, SystemExit) as problem:
        return error(f"{file}: {said(problem)}")
    if not 0 <= number <= 1:
        return error(f"{file}: expected a score from 0 to 1, or (score, reason), found {shown(found, 30)}")
    return Verdict(number, shown(reason, 200))


def refusal(file: str, user_check: Callable[..., Any], ground_truth: Any) -> None:
    """Raises GroundTruthError for a ground truth that the user's function refuses, or on which it fails."""
    try:
        user_check(ground_truth)
    except (Exception, SystemExit) as problem:
        why = str(problem) if isinstance(problem, ValueError) and str(problem) else said(problem)
        raise GroundTruthError(f"{file}: {shown(why, 200)}") from None


def said(problem: BaseException) -> str:
    """An exception on one line."""
    return f"{type(problem).__name__}: {shown(problem, 120)}"
