"""The command line's flags in groups, each declared once, with the checks that need nothing but the group.

A stage's configuration is a composition of groups and its own flags; whoever reads flags takes the group that they are
in. A flag whose default is None and whose type is not optional is filled before anything is opened (`fill`): 'decided
at the start'.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from engine.errors import UserError, nearest, require

T = TypeVar("T")
MODEL, DATA, ADAPTERS, OPTIMIZATION = "model", "data", "adapters", "optimization"
SAMPLING, MEMORY, RUN, STAGE = "sampling", "memory and speed", "the run", "this stage"
HEADINGS = (STAGE, "the plan", MODEL, DATA, ADAPTERS, OPTIMIZATION, SAMPLING, MEMORY, RUN)  # the parts of --help
DTYPES = ("auto", "bfloat16", "float32", "float16")
ATTENTION = ("auto", "flash4", "flash3", "flash2", "varlen", "sdpa", "eager")


def flag(
    default: Any,
    help: str,
    heading: str = STAGE,
    *,
    choices: Sequence[str] = (),
    aliases: Sequence[str] = (),
    excludes: Sequence[str] = (),
    many: bool = False,
    positional: bool = False,
) -> Any:
    """A dataclass field that is a command-line flag, under a `heading` of --help.

    `aliases` are other names that people know it by; `excludes` names flags that say the same in another way, of which
    only one may be given; `many` takes several words; `positional` is given without its name.
    """
    metadata = {"help": help, "heading": heading, "choices": tuple(choices), "aliases": tuple(aliases)}
    return field(
        default=default, metadata=metadata | {"excludes": tuple(excludes), "many": many, "positional": positional}
    )


def override(default: Any, help: str = "", choices: Sequence[str] = ()) -> Any:
    """A flag of a group with a stage's own default and meaning; the rest stays as the group declares it."""
    return field(default=default, metadata={"override": True, "help": help, "choices": tuple(choices)})


@dataclass(frozen=True, kw_only=True)
class Seeded:
    """The seed of all draws, which several groups read."""

    seed: int = flag(1, "every draw (data order, sampled tokens) is a function of it and of its own name", OPTIMIZATION)


@dataclass(frozen=True, kw_only=True)
class ModelFlags(Seeded):
    """Which model, and what it is computed in."""

    model_name_or_path: str = flag(
        None, "local directory or hub id of a decoder; without it, a tiny Llama made on the spot", MODEL
    )
    model_revision: str | None = flag(None, "branch, tag or commit of the model on the hub", MODEL)
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
class DataFlags(Seeded):
    """Which rows, and how much of each."""

    dataset_name: str = flag(
        None, "hub id, directory, .jsonl, .json or .parquet; without it, embedded data", DATA, excludes=("mixer_list",)
    )
    dataset_revision: str | None = flag(None, "branch, tag or commit of the dataset on the hub", DATA)
    dataset_split: str = flag(
        "train", "split of a hub dataset, or of a directory whose files are named after splits", DATA
    )
    max_seq_length: int = flag(2048, "prompt + response, in tokens", DATA, aliases=("max_length",))
    on_bad_row: str = flag(
        "skip", "a malformed row stops the run or is skipped, counted and listed", DATA, choices=("error", "skip")
    )
    cache_dir: str = flag(
        "~/.cache/triptych", "tokenised data and reference log-probs, shared by all runs of a user", RUN
    )


@dataclass(frozen=True, kw_only=True)
class MixtureFlags(DataFlags):
    """Which rows to train on, and which to hold out."""

    mixer_list: tuple[str, ...] | None = flag(
        None,
        "a mixture instead of --dataset_name: NAME AMOUNT NAME AMOUNT ..., AMOUNT a fraction (1.0) or a number of rows"
        " (2000)",
        DATA,
        many=True,
    )
    eval_dataset_name: str | None = flag(None, "held-out data, like --dataset_name", DATA, aliases=("eval_dataset",))
    eval_split: str = flag("test", "--dataset_split of --eval_dataset_name", DATA)
    dataset_num_proc: int | None = flag(None, "processes that tokenise a large dataset; without it, one per core", DATA)

    @property
    def names_data(self) -> bool:
        return self.dataset_name is not None or self.mixer_list is not None


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
        for name in (*only_with_lora, "load_in_4bit", "double_quant", "export_adapter"):
            if vars(self)[name] and not self.use_lora:
                raise UserError(f"--{name} is not read without --use_lora")
        if self.double_quant and not self.load_in_4bit:
            raise UserError("--double_quant is not read without --load_in_4bit")
        if self.load_in_4bit:
            require("bitsandbytes", "--load_in_4bit")
        require_positive(self, "lora_rank", "lora_alpha")
        if self.adapter_name_or_path is not None:
            for name in ("lora_rank", "lora_alpha", "lora_target_modules", "use_rslora"):
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


@dataclass(frozen=True, kw_only=True)
class OptimizerFlags:
    """How many steps, of how much, and how far each goes."""

    batch_size: int = flag(
        None,
        "examples per optimizer step, whatever the machine",
        STAGE,
        excludes=("per_device_train_batch_size", "gradient_accumulation_steps"),
    )
    learning_rate: float = flag(None, "peak", STAGE)
    num_train_epochs: int = flag(1, "passes over the data", OPTIMIZATION, aliases=("num_epochs",))
    max_steps: int = flag(
        -1, "stop after N optimizer steps, whatever the epochs (-1: off)", OPTIMIZATION, aliases=("max_train_steps",)
    )
    per_device_train_batch_size: int | None = flag(
        None, "with --gradient_accumulation_steps and the number of ranks: sets --batch_size", OPTIMIZATION
    )
    gradient_accumulation_steps: int | None = flag(None, "see --per_device_train_batch_size", OPTIMIZATION)
    optimizer: str = flag(
        "adamw",
        "AdamW in fp32, or with moments of 8 bits by blocks of 256 (bitsandbytes)",
        OPTIMIZATION,
        choices=("adamw", "adamw_8bit"),
    )
    lr_scheduler_type: str = flag("linear", "after the warm-up", OPTIMIZATION, choices=("linear", "cosine", "constant"))
    warmup_ratio: float = flag(0.1, "share of the steps in which the learning rate rises linearly from 0", OPTIMIZATION)
    weight_decay: float = flag(0.0, "AdamW's, on matrices only (not on norms and biases)", OPTIMIZATION)
    max_grad_norm: float = flag(
        1.0, "global gradient norm is clipped to it (0: off)", OPTIMIZATION, aliases=("clip_grad_norm",)
    )

    def batch_size_on(self, ranks: int) -> tuple[int, str]:
        """(--batch_size, what --per_device_train_batch_size and --gradient_accumulation_steps made of it, or '')."""
        per_device, accumulation = self.per_device_train_batch_size, self.gradient_accumulation_steps
        if per_device is None and accumulation is None:
            return self.batch_size, ""
        factors = (per_device or 1, accumulation or 1, ranks)
        batch_size = math.prod(factors)
        return batch_size, "{} per device x {} accumulation x {} ranks = --batch_size {}".format(*factors, batch_size)

    def check_optimizer(self) -> None:
        """Raises UserError for what cannot be."""
        require_positive(self, "batch_size", "num_train_epochs", "learning_rate")
        require_positive(self, "per_device_train_batch_size", "gradient_accumulation_steps")
        require_not_negative(self, "warmup_ratio", "weight_decay", "max_grad_norm")
        if self.max_steps == 0 or self.max_steps < -1:
            raise UserError(f"--max_steps must be greater than 0, or -1 for whole epochs, got {self.max_steps}")
        if self.warmup_ratio > 1:
            raise UserError(f"--warmup_ratio is a share of the steps, at most 1, got {self.warmup_ratio}")
        if self.optimizer == "adamw_8bit":
            require("bitsandbytes", "--optimizer adamw_8bit")


@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """How responses are drawn and judged."""

    response_length: int = flag(None, "longest response in tokens; 1024, embedded 24", SAMPLING)
    temperature: float = flag(1.0, "of sampling; 0 is greedy", SAMPLING)
    top_k: int = flag(0, "sample from the k likeliest tokens (0: from all)", SAMPLING)
    top_p: float = flag(1.0, "sample from the likeliest tokens of this total probability", SAMPLING)
    rollout_slots: int = flag(64, "responses sampled at a time on each rank", SAMPLING)
    verifier_mode: str = flag(
        "default", "reference: the published verifiers' exact behaviour, also where it is wrong", SAMPLING
    )
    verifier_module: str | None = flag(
        None,
        "a Python file of your own with verify(response, ground_truth), for rows whose `dataset` is its name",
        SAMPLING,
    )

    def check_sampling(self) -> None:
        """Raises UserError for what cannot be."""
        require_positive(self, "response_length", "rollout_slots")
        require_between(self, top_p=(1e-9, 1), temperature=(0, 1e3), top_k=(0, 1e9))


@dataclass(frozen=True, kw_only=True)
class MemoryFlags:
    """What is held, gathered, recomputed, compiled: speed against memory, without effect on what is computed."""

    micro_batch_tokens: int = flag(
        8192, "tokens in memory at a time on each rank: the memory knob, without effect on results", MEMORY
    )
    head: str = flag(
        "fused",
        "log-probs by chunks (fused) or with the whole logits in memory (naive)",
        MEMORY,
        choices=("fused", "naive"),
    )
    gradient_sync: str = flag(
        "auto",
        "gather weights and reduce gradients for every micro-batch; keep weights gathered for a step; or also reduce"
        " after its last, which holds whole fp32 gradients",
        MEMORY,
        choices=("auto", "every", "keep", "last"),
    )
    gradient_checkpointing: str = flag(
        "none",
        "recomputed in the backward pass: nothing; all but matrix products and attention; every decoder layer, a third"
        " more work for a fraction of the activations",
        MEMORY,
        choices=("none", "selective", "full"),
    )
    activation_offload: bool = flag(
        False,
        "what the backward pass needs waits in host memory (CUDA; most useful with --gradient_checkpointing full)",
        MEMORY,
    )
    master_dtype: str = flag(
        "float32",
        "of the trained parameters and AdamW's arithmetic; bfloat16 halves both and loses small updates to rounding",
        MEMORY,
        choices=("float32", "bfloat16"),
    )
    compile: bool = flag(False, "torch.compile every decoder layer", MEMORY)
    deterministic: bool = flag(False, "bitwise repeatable on CUDA as well, at some cost", MEMORY)


@dataclass(frozen=True, kw_only=True)
class RunFlags:
    """A run's directory, and what goes into it."""

    output_dir: str = flag("output/run", "directory of the run: config.yaml, metrics.jsonl, checkpoints/, final/", RUN)
    save_steps: int = flag(
        0, "checkpoint every N steps (0: none; the run still ends in final/)", RUN, aliases=("checkpointing_steps",)
    )
    save_total_limit: int = flag(2, "checkpoints kept", RUN, aliases=("keep_last_n_checkpoints",))
    resume: str = flag(
        "auto",
        "auto: from the newest checkpoint of output_dir; never: refuse a directory that is not empty; or a checkpoint's"
        " path",
        RUN,
    )
    eval_steps: int = flag(0, "evaluate every N steps (0: before the first and after the last)", RUN)
    export_dtype: str | None = flag(
        None, "dtype of final/; without it, the input checkpoint's", RUN, choices=("bfloat16", "float16", "float32")
    )
    dry_run: bool = flag(
        False,
        "resolve everything, show one example with its mask and what the run will need (launch.plan), and stop before"
        " the weights are loaded",
        RUN,
    )
    profile: bool = flag(False, "write a trace of steps 3 to 5 to output_dir/trace.json, for Perfetto", RUN)
    report_to: str = flag(
        "none", "a second home for metrics.jsonl's rows", RUN, choices=("none", "tensorboard", "wandb")
    )

    def check_run(self) -> None:
        """Raises UserError for what cannot be."""
        require_not_negative(self, "save_steps", "eval_steps")
        if self.save_total_limit < 1:
            raise UserError(f"--save_total_limit must be at least 1, got {self.save_total_limit}")
        checkpoint = Path(self.resume).expanduser() / "COMPLETE"
        if self.resume not in ("auto", "never") and not checkpoint.is_file():
            close = nearest(self.resume, ["auto", "never"])
            raise UserError(
                f"--resume {self.resume}: expected auto, never or the path of a checkpoint, and there is none{close}"
            )
        if self.report_to != "none":
            require(self.report_to, f"--report_to {self.report_to}")


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


def require_positive(flags: object, *names: str) -> None:
    """Raises UserError unless each of these is greater than 0, or was not given."""
    for name in names:
        value = vars(flags)[name]
        if value is not None and not value > 0:
            raise UserError(f"--{name} must be greater than 0, got {value}")


def require_not_negative(flags: object, *names: str) -> None:
    """Raises UserError for one that is less than 0."""
    for name in names:
        if vars(flags)[name] < 0:
            raise UserError(f"--{name} must not be negative, got {vars(flags)[name]}")


def require_between(flags: object, **bounds: tuple[float, float]) -> None:
    """Raises UserError for one that is outside of its bounds."""
    for name, (low, high) in bounds.items():
        if not low <= vars(flags)[name] <= high:
            raise UserError(f"--{name} must be between {low:g} and {high:g}, got {vars(flags)[name]}")


def fill(flags: T, **values: Any) -> T:
    """The flags with these values where none was given (None)."""
    missing = {name: value for name, value in values.items() if vars(flags)[name] is None}
    return dataclasses.replace(flags, **missing)  # type: ignore[type-var]
