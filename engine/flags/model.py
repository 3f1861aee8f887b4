"""The flags of the model, of adapters on it, and of what it is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import UserError, require
from engine.flags.declare import ADAPTERS, MEMORY, MODEL, STAGE, Seeded, flag, require_positive

DTYPES = ("auto", "bfloat16", "float32", "float16")
ATTENTION = ("auto", "flash4", "flash3", "flash2", "varlen", "sdpa", "eager")


@dataclass(frozen=True, kw_only=True)
class ModelFlags(Seeded):
    """Which model, and what it is computed in."""

    model_name_or_path: str = flag(
        None, "local directory or hub id of a decoder; without it, a tiny Llama made on the spot", MODEL
    )
    model_revision: str | None = flag(None, "branch, tag or commit of the model on the hub", MODEL)
    add_special_tokens: tuple[str, ...] | None = flag(
        None,
        "control tokens to add to the tokenizer ('<|im_start|>' '<|im_end|>'); where the model has no row for one,"
        " embedding and head grow by a row that is the mean of theirs",
        MODEL,
        many=True,
    )
    chat_template: str | None = flag(
        None, "a Jinja file, or tulu, instead of the tokenizer's own template; exported with the tokenizer", MODEL
    )
    adapter_name_or_path: str | None = flag(
        None, "start from this adapter (PEFT's format): its rank, alpha and modules are taken", ADAPTERS
    )
    load_in_4bit: bool = flag(False, "hold the frozen linear layers in NF4, 4 bits a weight, sharded (QLoRA)", ADAPTERS)
    double_quant: bool = flag(
        False,
        "NF4 scales in 8 bits as well: 4.13 bits a weight instead of 4.5",
        ADAPTERS,
        aliases=("bnb_4bit_use_double_quant", "use_bnb_nested_quant"),
    )
    dtype: str = flag(
        "auto",
        "compute dtype (masters: --master_dtype); auto: bfloat16 on CUDA, float32 on CPU",
        MEMORY,
        choices=DTYPES,
    )
    attention: str = flag("auto", "packed attention backend", MEMORY, choices=ATTENTION)


@dataclass(frozen=True, kw_only=True)
class AdapterFlags(ModelFlags):
    """Low-rank adapters on the model."""

    use_lora: bool = flag(False, "train low-rank adapters on the frozen model", ADAPTERS, aliases=("use_peft",))
    lora_rank: int | None = flag(None, "r of W + (alpha / r) B A; 16", ADAPTERS, aliases=("lora_r",))
    lora_alpha: float | None = flag(None, "alpha; 32", ADAPTERS)
    lora_target_modules: tuple[str, ...] | None = flag(
        None,
        "linear layers by the last part of their name (q_proj k_proj v_proj); without it, or with all-linear,"
        " every one",
        ADAPTERS,
        many=True,
    )
    lora_modules_to_save: tuple[str, ...] | None = flag(
        None,
        "of embedding and head (embed_tokens lm_head), what is trained whole beside the adapters",
        ADAPTERS,
        aliases=("modules_to_save",),
        many=True,
    )
    use_rslora: bool = flag(False, "scale by alpha / sqrt(r)", ADAPTERS)
    export_adapter: bool = flag(
        False,
        "final/ is the adapter alone (PEFT's format); without it, the merged model with the adapter in final/adapter",
        ADAPTERS,
    )

    def check_adapters(self) -> None:
        """Raises UserError for flags that contradict each other or need what is not installed; nothing is opened."""
        if self.load_in_4bit and not self.use_lora:
            raise UserError(
                "--load_in_4bit needs --use_lora: weights in 4 bits cannot be trained, only adapters on them"
            )
        only_with_lora = ("lora_rank", "lora_alpha", "lora_target_modules", "use_rslora", "adapter_name_or_path")
        for name in (*only_with_lora, "lora_modules_to_save", "load_in_4bit", "double_quant", "export_adapter"):
            if vars(self)[name] and not self.use_lora:
                raise UserError(f"--{name} is not read without --use_lora")
        if self.double_quant and not self.load_in_4bit:
            raise UserError("--double_quant is not read without --load_in_4bit")
        if self.load_in_4bit:
            require("bitsandbytes", "--load_in_4bit")
        require_positive(self, "lora_rank", "lora_alpha")
        if self.adapter_name_or_path is not None:
            for name in ("lora_rank", "lora_alpha", "lora_target_modules", "lora_modules_to_save", "use_rslora"):
                if vars(self)[name] not in (None, False):
                    raise UserError(f"--{name} is that of --adapter_name_or_path: give one of them")


@dataclass(frozen=True, kw_only=True)
class ReferenceFlags:
    """What a policy is compared with."""

    reference: str = flag(
        "auto",
        "log pi_ref: from the cache, from the frozen base or adapter under the trained one, or from a frozen copy",
        STAGE,
        choices=("auto", "cache", "base", "adapter", "copy"),
    )
