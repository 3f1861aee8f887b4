"""Small random models of the families that must load, train and round-trip; windows of 8, so that a window's error
shows.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Qwen2Config,
    Qwen3Config,
)

from engine.model import Policy, build
from engine.model.build import How
from engine.world import World

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
FAMILIES = {
    "llama": (LlamaConfig, {}),
    "llama_biased": (LlamaConfig, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "qwen2": (
        Qwen2Config,
        {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3Config, {}),
    "olmo2": (Olmo2Config, {}),
    "gemma3": (
        Gemma3TextConfig,
        {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8},
    ),
    "gemma2": (
        Gemma2Config,
        {
            "sliding_window": 8,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "mistral": (MistralConfig, {"sliding_window": 8}),
    "granite": (
        GraniteConfig,
        {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
    ),
}


def load(directory: Path, world: World, dtype=torch.float32, backend="sdpa", head="fused", **adapters) -> Policy:
    """The policy of a directory; `adapters` and `start` as in `How`."""
    how = How(dtype, backend, head, **adapters)
    return build.load_policy(directory, build.load_config(directory), world, how)


def save_family(name: str, directory: Path, tokenizer_from: Path, max_shard_size: str = "5GB", **changes) -> Path:
    """A random model of the family with the embedded tokenizer, in Hugging Face's format."""
    import shutil

    config_class, options = FAMILIES[name]
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config_class(**(COMMON | options | changes)))
    for p in lm.parameters():  # norms start at 1 or 0 and biases at 0: move them, so that a skipped one would show
        if p.dim() == 1:
            p.data += torch.randn_like(p) * 0.1
    lm.save_pretrained(directory, max_shard_size=max_shard_size)
    for file in tokenizer_from.glob("*tokenizer*"):
        shutil.copy(file, directory)
    return directory
