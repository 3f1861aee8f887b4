"""A model's generation_config.json, as it is kept beside what a run made of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import GenerationConfig

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")


def generation_config(source: Path, config: Any, end_ids: tuple[int, ...]) -> tuple[GenerationConfig, str]:
    """(that of the directory `source` with the ends of turns added, why it is not kept or '').

    One that the library would not save, after hours of training, gives way to what the model's configuration says.
    """
    if not (source / "generation_config.json").is_file():
        return _with_ends(GenerationConfig.from_model_config(config), end_ids), ""
    try:
        generation = _with_ends(GenerationConfig.from_pretrained(source), end_ids)
        generation.validate(strict=True)
    except Exception as error:  # the library's checks raise whatever they do
        why = " ".join(str(error).split())[:160]
        return _with_ends(GenerationConfig.from_model_config(config), end_ids), why or type(error).__name__
    return generation, ""


def _with_ends(generation: GenerationConfig, end_ids: tuple[int, ...]) -> GenerationConfig:
    if any(getattr(generation, field, None) is not None for field in SAMPLING):
        generation.do_sample = True  # hub configs often leave it out, and transformers then refuses to save them
    ends = generation.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    generation.eos_token_id = list(dict.fromkeys((*end_ids, *ends)))
    return generation
