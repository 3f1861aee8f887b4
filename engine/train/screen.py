"""The first screen: what will run, in a dozen lines."""

from __future__ import annotations

import numpy as np

from engine.data.chat import ChatTokenizer
from engine.data.mixture import Steps
from engine.data.store import Examples
from engine.model.open import Base
from engine.world import World


def describe(base: Base, world: World) -> list[str]:
    """The lines on the model, the machine and the template, which every stage shows."""
    name = (base.config.architectures or [base.config.model_type])[0]
    how = base.how
    return [
        f"model: {name} from {base.directory}",
        f"world: {world.size} x {world.device.type}, compute {_plain(how.dtype)}, masters {_plain(how.master)}",
        *_describe_adapters(base),
        f"attention: {how.backend} ({base.why_backend}); head: {how.head}",
        f"chat template: {base.chat.template_origin}; a turn ends with {_ends(base.chat)}",
    ]


def describe_data(examples: Examples, steps: Steps, base: Base, unit: str) -> list[str]:
    """How much data, in how many steps, and what does not fit a micro-batch."""
    tokens, budget = int(examples.tokens.sum()), base.memory.micro_batch_tokens
    longer = int((examples.tokens > budget).sum())
    epochs = steps.total / steps.per_epoch
    lines = [
        f"data: {len(examples):,} {unit}, {tokens:,} tokens; {min(steps.batch_size, len(examples))} {unit} per step,"
        f" {steps.total} steps, {epochs:.2g} epochs"
    ]
    if longer:
        lines.append(
            f"warning: {longer} {unit} are longer than --micro_batch_tokens {budget}; each is a micro-batch of its own"
        )
    return lines


def first_example(examples: Examples, chat: ChatTokenizer) -> list[str]:
    """One example with its mask, for --dry_run."""
    return [
        "the first example (trained tokens in [[ ]]):",
        *(_marked(chat, ids, mask) for ids, mask in examples.sequences(0)),
    ]


def _ends(chat: ChatTokenizer) -> str:
    """The ends of turns that are trained, and where generation stops besides."""
    trained = " or ".join(map(repr, chat.habits.ends))
    stops = {chat.tokenizer.convert_tokens_to_ids(stop) for stop in chat.habits.stops}
    also = [chat.tokenizer.convert_ids_to_tokens(end) or str(end) for end in chat.end_ids if end not in stops]
    shown = ", ".join(map(repr, also[:4])) + (f" and {len(also) - 4} more" if len(also) > 4 else "")
    return trained + (f"; generation also stops at {shown}" if also else "")


def _describe_adapters(base: Base) -> list[str]:
    """One line, or none."""
    if (a := base.adapters) is None:
        return []
    names = ", ".join(sorted({name.rpartition(".")[2] for name in a.modules}))
    forms = {"": _plain(base.how.dtype), "nf4": "NF4", "nf4-double": "NF4 with double quantisation"}
    start = f"from {base.how.start}" if base.how.start else "new"
    return [
        f"adapters: {start}, rank {a.rank}, alpha {a.alpha:g}{' (rsLoRA)' if a.rslora else ''}, on {len(a.modules)}"
        f" layers ({names}); the model is frozen in {forms[a.form]}",
        *_describe_saved(base),
    ]


def _describe_saved(base: Base) -> list[str]:
    """One line, or none."""
    if base.adapters is None or not base.adapters.saved:
        return []
    names = " and ".join(name.rpartition(".")[2] for name in base.adapters.saved)
    apart = "; embedding and head, one tensor in the model, are two from now on" if base.how.untied else ""
    return [f"trained whole beside the adapters: {names}{apart}"]


def _plain(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _marked(chat: ChatTokenizer, ids: np.ndarray, mask: np.ndarray) -> str:
    """The text with its trained spans in double brackets."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8))) + 1
    pieces = np.split(np.arange(len(ids)), edges)
    texts = [
        (chat.tokenizer.decode(ids[piece], skip_special_tokens=False), mask[piece[0]]) for piece in pieces if len(piece)
    ]
    return "".join(f"[[{text}]]" if trained else text for text, trained in texts)
