"""MATH: competition mathematics, whose answers are LaTeX.

extract.py        where in a response is the answer?
spellings.py      one spelling for what has many
tokens.py         LaTeX as tokens; cursor.py a place in them; parse.py tokens as a tree; tree.py the nodes of a tree
arithmetic.py     exact and 50-digit arithmetic with bounds; value.py the value of a tree
canonical.py      one form for what can be written in several; units.py inches and inch
regions.py        sets of real numbers; assignments.py values with names; words.py answers in words
equal.py          when are two answers the same?
verify.py         all of it: the verdict on a response
open_instruct/    the verdicts that Tülu 3 was trained on, defects included
"""

from verifiers.math.extract import extract_reference
from verifiers.math.verify import verify

__all__ = ["extract_reference", "verify"]
