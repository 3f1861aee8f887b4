"""What every stage does before its algorithm begins: resolve defaults, open model and tokenizer, say so on the first
screen.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine import adapters, attention, layers, model, weights
from engine.chat import ChatTokenizer, load_tokenizer
from engine.config import Config, RunConfig, require_positive, resolve_batch_size
from engine.embedded import embedded
from engine.errors import UserError, nearest, require
from engine.lora import Adapters
from engine.store import Examples, Steps
from engine.world import World
from losses.logprobs import default_chunk_rows


@dataclass(frozen=True)
class Base:
    """The model as found: where it lies, its tokenizer, and how it will be computed. No weight is loaded yet."""

    directory: Path
    revision: str
    config: Any
    chat: ChatTokenizer
    dtype: torch.dtype
    backend: str
    why_backend: str
    adapters: Adapters | None = None
    start: Path | None = None  # the adapter that training starts from

    def how(self, config: RunConfig) -> dict[str, Any]:
        """The arguments of `model.load` that say how a policy is held and computed."""
        return {
            "dtype": self.dtype,
            "backend": self.backend,
            "head": config.head,
            "master": getattr(torch, config.master_dtype),
            "adapters": self.adapters,
            "start": self.start,
        }


def resolve(
    config: Config, world: World, *, defaults: dict[str, Any], embedded_defaults: dict[str, Any], embedded_data: str
) -> Config:
    """Fills what depends on the machine or on other flags, and refuses what cannot be. Raises UserError.

    `defaults` are for flags left at None, `embedded_defaults` for them without a model, when the embedded one is
    trained, on the embedded `embedded_data` ('pairs', 'conversations') if no data is named.
    """
    world.agree("configuration", repr(config))
    require_positive(config, "max_seq_length", "micro_batch_tokens", "batch_size", "num_train_epochs", "learning_rate")
    for name in ("warmup_ratio", "weight_decay", "max_grad_norm", "save_steps", "eval_steps"):
        if getattr(config, name) < 0:
            raise UserError(f"--{name} must not be negative, got {getattr(config, name)}")
    if config.max_steps == 0 or config.max_steps < -1:
        raise UserError(f"--max_steps must be greater than 0, or -1 for whole epochs, got {config.max_steps}")
    if config.warmup_ratio > 1:
        raise UserError(f"--warmup_ratio is a share of the steps, at most 1, got {config.warmup_ratio}")
    if config.save_total_limit < 1:
        raise UserError(f"--save_total_limit must be at least 1, got {config.save_total_limit}")
    if config.resume not in ("auto", "never") and not (Path(config.resume).expanduser() / "COMPLETE").is_file():
        raise UserError(
            f"--resume {config.resume}: expected auto, never or the path of a checkpoint, and there is"
            f" none{nearest(config.resume, ['auto', 'never'])}"
        )
    module = {"tensorboard": "tensorboard", "wandb": "wandb"}.get(config.report_to)
    if module and importlib.util.find_spec(module) is None:
        raise UserError(f"--report_to {config.report_to}: the package {module} is not installed")
    if config.dtype == "float16":
        raise UserError("--dtype float16 is refused: it needs loss scaling, which bfloat16 and float32 do not")
    if config.model_name_or_path is not None and config.dataset_name is None and config.mixer_list is None:
        raise UserError("--model_name_or_path needs --dataset_name or --mixer_list (without either, all is embedded)")
    adapters.check_flags(config)
    if config.master_dtype == "bfloat16" and config.optimizer == "adamw":
        world.say(
            "warning: under --master_dtype bfloat16 AdamW's second moment is in bfloat16 too, where it stalls;"
            " --optimizer adamw_8bit keeps it better in fewer bytes"
        )
    if config.compile and (why_not := layers.why_not_compile(world.device)):
        raise UserError(f"--compile: {why_not}")
    if config.activation_offload and world.device.type == "cpu":
        world.say(
            "--activation_offload: on a CPU what waits is copied from host memory to host memory; it saves nothing here"
        )
    config, line = resolve_batch_size(config, world.size)
    world.say(*filter(None, [line]))
    chosen = {}
    for name in (
        "model_name_or_path",
        "value_model_name_or_path",
        "adapter_name_or_path",
        "output_dir",
        "resume",
    ):  # a shell expands ~, a YAML file does not
        if str(vars(config).get(name)).startswith("~/"):
            chosen[name] = str(Path(vars(config)[name]).expanduser())
    if config.model_name_or_path is None:
        root = Path(config.cache_dir).expanduser()
        made = world.once("embedded", lambda: embedded(root))
        chosen["model_name_or_path"] = str(made.model)
        if config.dataset_name is None and config.mixer_list is None:
            train, held_out = (str(getattr(made, f"{split}_{embedded_data}")) for split in ("train", "held_out"))
            chosen |= {"dataset_name": train, "eval_dataset_name": config.eval_dataset_name or held_out}
        world.say("no --model_name_or_path: training the embedded tiny Llama (a demonstration, not a useful model)")
        defaults = defaults | embedded_defaults
    chosen |= {name: value for name, value in defaults.items() if getattr(config, name) is None}
    return dataclasses.replace(config, **chosen)


def prepare(config: RunConfig, world: World) -> Base:
    """Opens configuration and tokenizer, picks dtype and attention backend. Raises UserError."""
    directory, revision = world.once("model", lambda: weights.resolve(config.model_name_or_path, config.model_revision))
    lm_config = model.load_config(directory)
    dtype = {"auto": torch.bfloat16 if world.device.type == "cuda" else torch.float32}.get(config.dtype) or getattr(
        torch, config.dtype
    )
    backend, why = attention.choose_backend(config.attention, world.device, lm_config, dtype)
    world.agree("attention backend", backend)
    base = Base(directory, revision, lm_config, load_tokenizer(directory, lm_config.vocab_size), dtype, backend, why)
    start = adapters.directory_of(config.adapter_name_or_path, world)
    if not isinstance(config, RunConfig):  # launch.evaluate: an adapter as it is
        if config.load_in_4bit:
            require("bitsandbytes", "--load_in_4bit")
        form = {"four_bit": config.load_in_4bit, "double_quant": config.double_quant}
        return dataclasses.replace(
            base,
            start=start,
            adapters=dataclasses.replace(adapters.of_directory(start, lm_config), **form) if start else None,
        )
    keep_initial = getattr(config, "reference", "") == "adapter" and getattr(config, "kl_coef", 1) != 0
    chosen = adapters.choose(config, lm_config, start, keep_initial)
    return dataclasses.replace(base, start=start, adapters=chosen)


def build_policy(config: RunConfig, world: World, base: Base) -> model.Policy:
    """The sharded policy as it will be trained, with room for its weights and none read: what `launch.plan` measures."""
    how = base.how(config)
    del how["start"]
    policy = model.build(base.config, world, **how)
    transform_layers(policy, config)
    return policy


def value_adapters(config: Any, base: Base) -> Adapters | None:
    """The policy's adapters on the value model's own layers. Raises UserError."""
    if base.adapters is None or config.value_model_name_or_path is None:
        return base.adapters and dataclasses.replace(base.adapters, keep_initial=False)
    directory, _ = weights.resolve(config.value_model_name_or_path, None, "--value_model_name_or_path")
    everything = base.start is None and "all-linear" in (config.lora_target_modules or ("all-linear",))
    return adapters.for_value_model(
        base.adapters, model.load_value_config(directory, base.config.vocab_size), everything
    )


def load_policy(config: RunConfig, world: World, base: Base) -> tuple[model.Policy, str]:
    """The sharded policy and the identity of its numbers; prints what was loaded. Collective."""
    policy, identity = model.load(base.directory, base.config, world, **base.how(config))
    transform_layers(policy, config)
    policy.gradient_sync, why = choose_gradient_sync(config, policy, world)
    world.say(
        f"policy: {policy.num_parameters:,} parameters, {policy.num_trained:,} trained,"
        f" {policy.bytes_held / 2**20:,.0f} MiB held by each rank, weights {identity}, two packed sequences equal each"
        " alone",
        f"gradient sync: {policy.gradient_sync} ({why})",
    )
    return policy, identity


def choose_gradient_sync(config: RunConfig, policy: model.Policy, world: World) -> tuple[str, str]:
    """(mode, why); of a stage that trains a value model as well, which is about as large, for both."""
    models = 2 if hasattr(config, "value_model_name_or_path") else 1
    return model.choose_gradient_sync(
        config.gradient_sync, policy, world, models=models, working=_working_memory(config, policy)
    )


def _working_memory(config: RunConfig, policy: model.Policy) -> int:
    """About what a full micro-batch takes, in bytes: an upper estimate, since what it decides (`--gradient_sync auto`)
    must not run out of memory.

    An eager layer keeps some 5.5 (D + F) numbers of a token (launch.plan, Llama 8B), 6 here; selective recomputation
    keeps 0.55 of that, full D numbers and one whole layer. The head takes its chunk of logits 3.5 times. D hidden, F
    intermediate size.
    """
    shape = policy.lm.config
    hidden, inner = shape.hidden_size, getattr(shape, "intermediate_size", None) or 4 * shape.hidden_size
    numbers = 6 * (hidden + inner)
    layers = {"none": numbers, "selective": 0.55 * numbers, "full": hidden}[
        config.gradient_checkpointing
    ] * shape.num_hidden_layers
    wide = policy.gathered_dtype or next(p.dtype for p in policy.parameters() if p.dtype.itemsize > 1)
    head = policy.lm.get_output_embeddings().weight
    return round(
        config.micro_batch_tokens * (layers + numbers) * wide.itemsize
        + 3.5 * 4 * head.shape[0] * default_chunk_rows(head)
    )


def transform_layers(root: model.Root, config: RunConfig) -> None:
    """--gradient_checkpointing, --compile, --activation_offload, from within: what is compiled includes the
    recomputation.
    """
    if config.gradient_checkpointing != "none":
        layers.recompute_layers(root, config.gradient_checkpointing)
    if config.compile:
        layers.compile_layers(root)
    if config.activation_offload:
        layers.offload_layers(root)


def export(
    root: model.Root, base: Base, config: RunConfig, world: World, final: Path, inside: dict[str, Path] | None = None
) -> str:
    """Writes `final` in Hugging Face's format, in --export_dtype or the input checkpoint's, adapters merged.
    Collective.

    A policy's adapter goes to final/adapter as well; under --export_adapter it is `final` itself. Returns what reads
    it.
    """
    if isinstance(root, model.Policy) and root.adapters is not None:
        facts = {"base_name": config.model_name_or_path, "revision": base.revision, "base_weights": root.base_weights}
        held = {"": "", "nf4": " held in NF4", "nf4-double": " held in NF4 with double quantisation"}[
            root.adapters.form
        ]
        if config.export_adapter:
            adapters.save(root.lm, root.adapters, final, world, inside=inside, **facts)
            return (
                f"{final} is an adapter on {config.model_name_or_path}{held}, for --adapter_name_or_path or"
                " PeftModel.from_pretrained"
            )
        adapters.save(root.lm, root.adapters, final.with_name(".adapter"), world, **facts)
        inside = {"adapter": final.with_name(".adapter"), **(inside or {})}
    dtype = getattr(torch, config.export_dtype) if config.export_dtype else base.config.dtype or torch.float32
    weights.export(
        root.lm,
        base.chat.tokenizer,
        base.directory,
        final,
        world,
        dtype=dtype,
        end_of_turn_id=base.chat.end_of_turn_id,
        inside=inside,
    )
    return f"{final} loads with AutoModelForCausalLM.from_pretrained"


def first_screen(
    config: RunConfig, world: World, base: Base, examples: Examples, steps: Steps, *, unit: str, extra: list[str]
) -> None:
    """What will run, in a dozen lines; with --dry_run also one example with its mask."""
    tokens = int(examples.tokens.sum())
    longest = int((examples.tokens > config.micro_batch_tokens).sum())
    name = (base.config.architectures or [base.config.model_type])[0]
    world.say(
        f"model: {name} from {base.directory}",
        f"world: {world.size} x {world.device.type}, compute {str(base.dtype).removeprefix('torch.')}, masters"
        f" {config.master_dtype}",
        *describe_adapters(config, base),
        f"attention: {base.backend} ({base.why_backend}); head: {config.head}",
        f"chat template: {base.chat.template_origin}; a turn ends with {base.chat.end_of_turn!r}",
        f"data: {len(examples):,} {unit}, {tokens:,} tokens; {min(config.batch_size, len(examples))} {unit} per step,"
        f" {steps.total} steps, {steps.total / steps.per_epoch:.2g} epochs",
        *extra,
    )
    if longest:
        world.say(
            f"warning: {longest} {unit} are longer than --micro_batch_tokens {config.micro_batch_tokens}; each is a"
            " micro-batch of its own"
        )
    if config.dry_run:
        world.say(
            "the first example (trained tokens in [[ ]]):",
            *(_marked(base.chat, ids, mask) for ids, mask in examples.sequences(0)),
        )


def describe_adapters(config: RunConfig, base: Base) -> list[str]:
    """One line of the first screen, or none."""
    if (a := base.adapters) is None:
        return []
    names = ", ".join(sorted({name.rpartition(".")[2] for name in a.modules}))
    frozen = (
        f"NF4{' with double quantisation' if a.double_quant else ''}"
        if a.four_bit
        else str(base.dtype).removeprefix("torch.")
    )
    start = f"from {config.adapter_name_or_path}" if base.start else "new"
    return [
        f"adapters: {start}, rank {a.rank}, alpha {a.alpha:g}{' (rsLoRA)' if a.rslora else ''}, on {len(a.modules)}"
        f" layers ({names}); the model is frozen in {frozen}"
    ]


def _marked(chat: ChatTokenizer, ids: np.ndarray, mask: np.ndarray) -> str:
    """The text with its trained spans in double brackets."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8))) + 1
    pieces = np.split(np.arange(len(ids)), edges)
    texts = [
        (chat.tokenizer.decode(ids[piece], skip_special_tokens=False), mask[piece[0]]) for piece in pieces if len(piece)
    ]
    return "".join(f"[[{text}]]" if trained else text for text, trained in texts)
