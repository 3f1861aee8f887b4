"""The command line's flags in groups, each declared once, with the checks that need nothing but the group.

A stage's configuration is a composition of groups and its own flags; whoever reads flags takes the group that they are
in. A flag whose default is None and whose type is not optional is filled before anything is opened (`fill`): 'decided
at the start'.
"""

from __future__ import annotations

from engine.flags.data import (
    ConversationFlags,
    DataFlags,
    MixtureFlags,
    PairFlags,
    PromptFlags,
    QuestionFlags,
    SystemFlags,
    TextFlags,
)
from engine.flags.declare import (
    HEADINGS,
    Seeded,
    fill,
    flag,
    override,
    require_between,
    require_not_negative,
    require_positive,
)
from engine.flags.inference import DecodingFlags, InferenceFlags, RolloutFlags
from engine.flags.model import AdapterFlags, ModelFlags, ReferenceFlags
from engine.flags.optimizer import OptimizerFlags
from engine.flags.run import MemoryFlags, RunFlags, SamplingFlags
from engine.flags.stage import RewardFlags, RlvrFlags, StageFlags

__all__ = [
    "HEADINGS",
    "AdapterFlags",
    "ConversationFlags",
    "DataFlags",
    "DecodingFlags",
    "InferenceFlags",
    "MemoryFlags",
    "MixtureFlags",
    "ModelFlags",
    "OptimizerFlags",
    "PairFlags",
    "PromptFlags",
    "QuestionFlags",
    "ReferenceFlags",
    "RewardFlags",
    "RlvrFlags",
    "RolloutFlags",
    "RunFlags",
    "SamplingFlags",
    "Seeded",
    "StageFlags",
    "SystemFlags",
    "TextFlags",
    "fill",
    "flag",
    "override",
    "require_between",
    "require_not_negative",
    "require_positive",
]
