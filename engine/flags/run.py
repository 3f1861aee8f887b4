"""The flags of sampling, of memory and speed, and of a run's directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.errors import UserError, nearest, require
from engine.flags.declare import MEMORY, RUN, SAMPLING, flag, require_not_negative, require_positive
from engine.flags.inference import RolloutFlags


@dataclass(frozen=True, kw_only=True)
class SamplingFlags(RolloutFlags):
    """How responses are drawn and judged."""

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
        self.check_decoding()
        self.check_rollout()


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
    seeds: tuple[str, ...] | None = flag(
        None,
        "run once for each of these seeds, in output_dir/seed-N, and say how much of a difference is the seed's",
        RUN,
        excludes=("seed",),
        many=True,
    )
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
    checkpoint_dir: str | None = flag(
        None, "another directory, on another disk perhaps, for this run's checkpoints; without it, output_dir's", RUN
    )
    max_hours: float | None = flag(
        None, "end by a checkpoint (exit status 85) before so many hours since the start are over", RUN
    )
    patience: float = flag(
        5.0, "minutes that ranks wait for one that does not go on, before it is named and the run ends (status 86)", RUN
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
    quiet: bool = flag(False, "show only warnings, errors and the last line", RUN)
    profile: bool = flag(False, "write a trace of steps 3 to 5 to output_dir/trace.json, for Perfetto", RUN)
    report_to: str = flag(
        "none", "a second home for metrics.jsonl's rows", RUN, choices=("none", "tensorboard", "wandb")
    )

    def check_run(self) -> None:
        """Raises UserError for what cannot be."""
        require_not_negative(self, "save_steps", "eval_steps")
        require_positive(self, "max_hours", "patience")
        if self.quiet and self.dry_run:
            raise UserError("--quiet would hide what --dry_run is for: give one of them")
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
