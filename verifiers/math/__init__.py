"""MATH: competition mathematics, whose answers are LaTeX."""

from verifiers.math.extract import extract_reference
from verifiers.math.verify import verify

__all__ = ["extract_reference", "verify"]
