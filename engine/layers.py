"""What a decoder layer keeps and how it runs: recomputation and torch.compile, applied to each layer of a root."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_layers(root: nn.Module) -> None:
    """Every decoder layer keeps only its input and runs again in the backward pass, inside FSDP's gathering of its weights."""
    for layer in root.lm.base_model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def compile_layers(root: nn.Module) -> None:
    """torch.compile on every decoder layer, for any number of tokens: one artefact serves all layers and all micro-batches."""
    for layer in root.lm.base_model.layers:
        layer.compile(dynamic=True)
