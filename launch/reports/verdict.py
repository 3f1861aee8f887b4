"""What was trained, whether it worked, and the commands that come next: the top of the page, in sentences."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from launch.reports.catalogue import metric_of
from launch.reports.runs import RLVR, Recorded

NAMES = {
    "sft": "Supervised fine-tuning",
    "dpo": "Preference optimization (DPO)",
    "ppo": "Reinforcement learning with verifiable rewards (PPO)",
    "grpo": "Reinforcement learning with verifiable rewards (GRPO)",
    "other": "Runs of an unknown stage",
}
# what a stage is judged by, the first that a run has, and whether more of it is better
HEADLINES = {
    "sft": (("eval/token_accuracy", True), ("eval/loss", False), ("loss", False)),
    "dpo": (("eval/logps/accuracies", True), ("eval/loss", False), ("rewards/accuracies", True), ("loss", False)),
    **dict.fromkeys(RLVR, (("eval/accuracy", True), ("objective/scores", True))),
    "other": (("eval/accuracy", True), ("eval/loss", False), ("loss", False)),
}
SHAPED = ("overlong_buffer", "format_reward")  # what a reward is besides the verdict
OF_GRPO = (
    *("advantage", "surrogate", "clip_low", "clip_high", "dual_clip", "aggregate", "kl_coef", "kl_in", "kl_estimator"),
    *("entropy_coef", "tis_cap", "mask_truncated", *SHAPED, "dynamic_sampling"),
)


@dataclass(frozen=True)
class Headline:
    """The figure that a stage is judged by, before and after."""

    metric: str
    before: float
    after: float
    before_interval: tuple[float, float] | None
    after_interval: tuple[float, float] | None
    outcome: str  # better | worse | unclear

    def shown(self, value: float) -> str:
        return f"{100 * value:.1f}\u00a0%" if metric_of(self.metric).share else f"{value:.4g}"

    @property
    def between(self) -> str:
        """The interval of the figure after, in words, or ''."""
        if self.after_interval is None:
            return ""
        return "95 % interval {} to {}".format(*map(self.shown, self.after_interval))


def headline(run: Recorded) -> Headline | None:
    """None where the run has none of the stage's figures twice."""
    for metric, more_is_better in HEADLINES[run.stage]:
        series = run.series.get(metric)
        if series is None or len(series) < 2:
            continue
        # held-out figures are means already; a training metric of one step is noise
        before, after = (series.first, series.last) if metric.startswith("eval/") else series.ends()
        intervals = interval_at(run, metric, 0), interval_at(run, metric, -1)
        return Headline(metric, before, after, *intervals, outcome_of(before, after, intervals, more_is_better))
    return None


def quoted(path: str | Path) -> str:
    """A path as a shell takes it, with ~ for the home directory."""
    home = f"{Path.home()}/"
    return "~/" + shlex.quote(str(path).removeprefix(home)) if str(path).startswith(home) else shlex.quote(str(path))


Interval = tuple[float, float] | None


def outcome_of(before: float, after: float, intervals: tuple[Interval, Interval], more_is_better: bool) -> str:
    """By whether the intervals overlap, where there are any; without them a change of 2 % of the figure is one."""
    first, last = intervals
    if first is not None and last is not None:
        up, down = last[0] > first[1], last[1] < first[0]
    else:
        up, down = (sign * (after - before) > 0.02 * max(abs(before), abs(after), 1e-12) for sign in (1, -1))
    better, worse = (up, down) if more_is_better else (down, up)
    return "better" if better else "worse" if worse else "unclear"


def interval_at(run: Recorded, metric: str, place: int) -> Interval:
    """The 95 % interval of a held-out accuracy at its first (0) or last (-1) evaluation."""
    prefix = metric.rpartition("/")[0]
    if not metric.endswith("/accuracy") or not {f"{prefix}/low", f"{prefix}/high"} <= run.series.keys():
        return None
    step = run.series[metric].steps[place]
    bounds = []
    for end in ("low", "high"):
        at = np.flatnonzero(run.series[f"{prefix}/{end}"].steps == step)
        if not len(at):
            return None
        bounds.append(float(run.series[f"{prefix}/{end}"].values[at[0]]))
    return bounds[0], bounds[1]


def sentence(run: Recorded) -> str:
    """Whether it worked."""
    h = headline(run)
    if h is None:
        return "Nothing to compare yet: no figure of this stage has been measured twice."
    title = metric_of(h.metric).title
    name = title[:1].lower() + title[1:]
    change = f"{name} went from {h.shown(h.before)} to {h.shown(h.after)}"
    if h.after_interval is not None and h.before_interval is not None:
        apart = "the 95 % intervals do not overlap" if h.outcome != "unclear" else "the 95 % intervals overlap"
        change += f"; {apart}"
    judged = {"better": "It worked", "worse": "It made the model worse", "unclear": "No clear difference"}
    if run.status == "running":
        judged = {
            "better": "It works so far",
            "worse": "The model is getting worse",
            "unclear": "No clear difference yet",
        }
    return f"{judged[h.outcome]}: {change}."


def described(run: Recorded) -> list[tuple[str, str]]:
    """What was trained: label and text, only what the directory says."""
    c = run.config
    data = c.get("dataset_name") or " ".join(map(str, c.get("mixer_list") or []))
    model = str(c.get("model_name_or_path", ""))
    embedded = "embedded-" in model
    adapters = f", LoRA of rank {c.get('lora_rank')}" + (" on NF4" if c.get("load_in_4bit") else "")
    rows = [
        ("model", ("embedded tiny Llama, " if embedded else "") + model + (adapters if c.get("use_lora") else "")),
        ("data", ("embedded, " if "embedded-" in str(data) else "") + str(data)),
        ("loss", loss_of(run)),
        ("batch", batch_of(run)),
        ("optimizer", f"{c['optimizer']}, learning rate {c.get('learning_rate')}, {c.get('lr_scheduler_type')}")
        if "optimizer" in c
        else ("optimizer", ""),
        ("machine", run.facts.get("machine", "")),
        ("version", ", ".join(filter(None, (run.facts.get("version", ""), run.facts.get("commit", ""))))),
        ("directory", str(run.directory)),
    ]
    return [(label, text.replace(f"{Path.home()}/", "~/")) for label, text in rows if text.strip()]


def loss_of(run: Recorded) -> str:
    c = run.config
    names = {
        "sft": ("reduce_loss",),
        "dpo": ("loss_type", "beta", "label_smoothing", "gamma_beta_ratio", "rpo_alpha"),
        "ppo": ("kl_coef", "kl_estimator", "gamma", "lam", "cliprange", "cliprange_value", "vf_coef", *SHAPED),
        "grpo": OF_GRPO,
    }.get(run.stage, ())
    if not c.get("kl_coef"):
        names = tuple(name for name in names if name not in ("kl_in", "kl_estimator"))
    shown = [
        f"{name} {c[name]:g}" if isinstance(c[name], float) else f"{name} {c[name]}"
        for name in names
        if c.get(name) not in (None, 0, 0.0) or name == "kl_coef"
    ]
    return ", ".join(shown) if any(name in c for name in names) else ""


def batch_of(run: Recorded) -> str:
    size, c = run.config.get("batch_size"), run.config
    if size is None:
        return ""
    if run.stage not in RLVR:
        return f"{size} {'pairs' if run.stage == 'dpo' else 'conversations'} per step"
    parts = [f"{size} prompts × {c.get('num_samples_per_prompt', 1)} responses"]
    parts += [f"of at most {c['response_length']} tokens"] if "response_length" in c else []
    parts += [f"{n} {'pass' if n == 1 else 'passes'} over them"] if (n := c.get("num_ppo_epochs")) is not None else []
    return ", ".join(parts) + " per iteration"


def next_steps(run: Recorded) -> list[tuple[str, str]]:
    """(what for, the command) of what a person would do now."""
    if run.stage == "other":
        return []
    here = quoted(str(run.directory))
    if run.status == "running":
        return [("look again", f"python -m launch.report {here}")]
    if run.status == "stopped":
        words = f"python -m launch.{run.stage} --config {quoted(str(run.directory / 'config.yaml'))}"
        return [("go on from the last checkpoint", words), ("look again", f"python -m launch.report {here}")]
    final = run.directory / "final"
    model = quoted(str(final))
    if (final / "adapter_config.json").is_file():
        base = quoted(str(run.config.get("model_name_or_path", "BASE")))
        model = f"{base} --adapter_name_or_path {model}"
    beside = Path(str(run.config.get("dataset_name") or "/nowhere/rows")).parent  # the embedded files lie together
    lies = lambda name, word: quoted(str(beside / name)) if (beside / name).is_file() else word
    tests = held_out_of(run) or lies("held_out_problems.jsonl", "PROBLEMS.jsonl")
    found = [
        (
            "measure it on prompts with verifiable answers",
            f"python -m launch.evaluate --model_name_or_path {model} --dataset_name {tests}",
        )
    ]
    following = {
        "sft": {"dpo": "start the next act"},
        "dpo": {"ppo": "start the next act", "grpo": "or the same without a value model"},
    }
    rows = ("train_pairs.jsonl", "PAIRS.jsonl") if run.stage == "sft" else ("train_problems.jsonl", "PROBLEMS.jsonl")
    for stage, what in following.get(run.stage, {}).items():
        found.append((what, f"python -m launch.{stage} --model_name_or_path {model} --dataset_name {lies(*rows)}"))
    return found


def held_out_of(run: Recorded) -> str:
    """The test set of a run with verifiable answers, or ''."""
    held_out = run.config.get("eval_dataset_name") if run.stage in RLVR else None
    return quoted(str(held_out)) if held_out else ""
