"""JSON that satisfies a schema: verify.py judges, schema.py is the subset of JSON Schema, pattern.py its `pattern`."""

from verifiers.json_schema.verify import parse, verify

__all__ = ["parse", "verify"]
