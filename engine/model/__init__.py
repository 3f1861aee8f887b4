"""Decoders of transformers, packed, sharded, adapted, loaded and exported. Start reading at open.py and policy.py."""

from engine.model.open import Base, check_value_model, load_policy, load_untrained, load_value_model, open_model
from engine.model.policy import Policy, ValueModel, release
from engine.model.probe import rounding

__all__ = [
    "Base",
    "Policy",
    "ValueModel",
    "check_value_model",
    "load_policy",
    "load_untrained",
    "load_value_model",
    "open_model",
    "release",
    "rounding",
]
