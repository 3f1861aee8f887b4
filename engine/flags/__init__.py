"""The command line's flags in groups, each declared once, with the checks that need nothing but the group.

A stage's configuration is a composition of groups and its own flags; whoever reads flags takes the group that they are
in. A flag whose default is None and whose type is not optional is filled before anything is opened (`fill`): 'decided
at the start'.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import UserError
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


@dataclass(frozen=True, kw_only=True)
class StageFlags(AdapterFlags, MixtureFlags, OptimizerFlags, MemoryFlags, RunFlags):
    """What every training stage takes."""

    def check(self) -> None:
        """Raises UserError for what cannot be, within a group and between groups; nothing is opened."""
        require_positive(self, "max_seq_length", "micro_batch_tokens")
        self.check_optimizer()
        self.check_run()
        if self.dtype == "float16":
            raise UserError("--dtype float16 is refused: it needs loss scaling, which bfloat16 and float32 do not")
        if self.model_name_or_path is not None and not self.names_data:
            raise UserError(
                "--model_name_or_path needs --dataset_name or --mixer_list (without either, all is embedded)"
            )
        self.check_adapters()
        if self.export_adapter and self.export_dtype not in (None, self.master_dtype):
            raise UserError(
                f"--export_dtype {self.export_dtype} is not read with --export_adapter: adapters are written as they"
                " are trained, in --master_dtype"
            )
