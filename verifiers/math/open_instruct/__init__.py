"""Tülu 3's MATH verifier as it is, defects included: open-instruct e6c3044.

reference.py   its candidates and its two equalities; hendrycks/math's string rule
scan.py        the tokens of sympy's LaTeX grammar; prefix.py the expression that a text begins with, and its equality
"""
