"""The first screen: what will run, in some twelve rows under four headings. docs/screen.md explains each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from engine import signals
from engine.data.chat import ChatTokenizer
from engine.data.mixture import Steps
from engine.data.store import Examples
from engine.flags import OptimizerFlags
from engine.model.open import Base
from engine.terminal import Heading, Row
from engine.train.optim import warmup_steps
from engine.world import World

NONE = "none, nothing is evaluated (--eval_dataset_name)"


def show(base: Base, world: World, *, model: Sequence[str] = (), data: Sequence[str], training: Sequence[str]) -> None:
    """Prints what every stage shows, with the stage's own rows, or warnings."""
    groups = {
        "model": [*_of_model(base), *model],
        "data": data,
        "training": training,
        "machine": _of_machine(base, world),
    }
    for heading, rows in groups.items():
        world.say(Heading(heading), *rows)
    world.say("")


def of_examples(examples: Examples, held_out: Examples | None, steps: Steps, base: Base, unit: str) -> list[str]:
    """How much data, in how many steps, and what does not fit a micro-batch."""
    tokens, budget = int(examples.tokens.sum()), base.memory.micro_batch_tokens
    longer = int((examples.tokens > budget).sum())
    lines: list[str] = [
        Row("training", f"{len(examples):,} {unit}, {tokens:,} tokens"),
        Row("held out", f"{len(held_out):,} {unit}" if held_out else NONE),
        of_steps(len(examples), steps, unit),
    ]
    if longer:
        lines.append(
            f"warning: {longer} {unit} are longer than --micro_batch_tokens {budget}; each is a micro-batch of its own"
        )
    return lines


def of_prompts(verifiers: Sequence[str]) -> Row:
    """How many prompts, and by what their answers are verified."""
    kinds = ", ".join(f"{n:,} {name}" for name, n in Counter(verifiers).items())
    return Row("training", f"{len(verifiers):,} prompts ({kinds})")


def of_steps(n: int, steps: Steps, unit: str, step: str = "step") -> Row:
    """How many steps of how much."""
    epochs = steps.total / steps.per_epoch
    return Row(
        f"{step}s", f"{min(steps.batch_size, n)} {unit} per {step}, {steps.total:,} {step}s, {epochs:.2g} epochs"
    )


def of_training(flags: OptimizerFlags, output_dir: str, steps: Steps) -> list[Row]:
    """How far a step goes, and where the run is written."""
    warmup = warmup_steps(flags, steps.total)
    schedule = f"{flags.lr_scheduler_type} after a warm-up of {warmup:,}" if warmup else flags.lr_scheduler_type
    return [
        Row("optimizer", f"{flags.optimizer}, learning rate {flags.learning_rate:g}, {schedule}"),
        Row("output", output_dir),
    ]


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


def _of_model(base: Base) -> list[Row]:
    """What is trained, and how conversations are written for it."""
    name = (base.config.architectures or [base.config.model_type])[0]
    return [
        Row("model", f"{name} from {base.directory}"),
        *_of_adapters(base),
        Row("chat template", f"{base.chat.template_origin}; a turn ends with {_ends(base.chat)}"),
    ]


def _of_machine(base: Base, world: World) -> list[Row]:
    """Who computes, in which numbers, and how."""
    how = base.how
    return [
        Row("world", f"{world.size} x {world.device.type}, compute {_plain(how.dtype)}, masters {_plain(how.master)}"),
        Row("attention", f"{how.backend} ({base.why_backend})"),
        Row("head", {"fused": "fused: log-probs by chunks"}.get(how.head, f"{how.head}: whole logits in memory")),
        *([Row("time", left)] if (left := signals.time_left()) else []),
    ]


def _of_adapters(base: Base) -> list[Row]:
    """What is trained beside the frozen model, if it is frozen."""
    if (a := base.adapters) is None:
        return []
    names = ", ".join(sorted({name.rpartition(".")[2] for name in a.modules}))
    forms = {"": _plain(base.how.dtype), "nf4": "NF4", "nf4-double": "NF4 with double quantisation"}
    start = f"from {base.how.start}" if base.how.start else "new"
    rows = [
        Row(
            "adapters",
            f"{start}, rank {a.rank}, alpha {a.alpha:g}{' (rsLoRA)' if a.rslora else ''}, on {len(a.modules)} layers"
            f" ({names}); the model is frozen in {forms[a.form]}",
        )
    ]
    if a.saved:
        whole = " and ".join(name.rpartition(".")[2] for name in a.saved)
        apart = "; embedding and head, one tensor in the model, are two from now on" if base.how.untied else ""
        rows.append(Row("trained whole", f"{whole}, beside the adapters{apart}"))
    return rows


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
