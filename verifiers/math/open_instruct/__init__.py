"""Tülu 3's MATH verifier as it is, defects included: open-instruct e6c3044."""
