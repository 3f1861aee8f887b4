"""Verifiable rewards: was the response right? Exact, total and bounded; see docs/verifiers.md.

    from verifiers import verify
    verify("... so the answer is 42.", "42", "gsm8k")
    # Verdict(score=1.0, reason='extracted 42, expected 42', status='ok')

`verify` judges one response, `check` tells before training whether a row can be judged, `Pool` judges a batch in
parallel. Each verifier reads alone: gsm8k.py, math/, ifeval/google.py, ifeval/tulu.py, answers.py, choice.py, tags.py,
json_schema/; route.py chooses it by the row's `dataset`; custom.py takes a user's own (`pin`, `Checker`). verdict.py
and strings.py are what they share.
"""

from verifiers.custom import Checker, ModuleError, pin
from verifiers.pool import MAX_ERROR_RATE, Pool, ScoredBatch
from verifiers.route import MODES, VERIFIERS, check, verify
from verifiers.verdict import GroundTruthError, Verdict

__all__ = [
    "MAX_ERROR_RATE",
    "MODES",
    "VERIFIERS",
    "Checker",
    "GroundTruthError",
    "ModuleError",
    "Pool",
    "ScoredBatch",
    "Verdict",
    "check",
    "pin",
    "verify",
]
