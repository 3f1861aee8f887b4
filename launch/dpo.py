"""Length-normalised DPO over cached reference log-probs.        torchrun --nproc_per_node 8 -m launch.dpo --help

    L = - (1/N) sum over pairs of log sigma( beta [ r(w) - r(l) ] ),    r(y) = ( log pi(y|x) - log pi_ref(y|x) ) / |y|

w is the chosen and l the rejected answer to prompt x; |y| counts the trained tokens of y (content and end of turn).
pi_ref is the policy before its first update: its log-probs are numbers in a cache, computed once, and there is no
second model. With adapters (--use_lora) the frozen model is there anyway, and --reference base or adapter asks it in
every step instead. --loss_type picks another loss of losses/preference.py or losses/preference_variants.py.

With no argument it trains an embedded tiny model on embedded preferences, in about a minute on two CPU cores.

P pairs of a chunk · S sequences of a micro-batch (chosen, rejected, chosen, ...) · R counted tokens.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import losses
from engine import batch as batching
from engine import data, log, optim, refcache, run, setup, world
from engine.batch import MicroBatch, sum_by_sequence
from engine.checkpoint import Checkpoints
from engine.config import RunConfig, flag, parse
from engine.dry_run import show_plan
from engine.errors import UserError, nearest
from engine.model import Policy
from engine.preferences import PairEncoder
from engine.reference import CHOICES, frozen
from engine.reference import resolve as resolve_reference
from engine.store import Examples, Steps
from engine.world import World

LOSSES = {"dpo_norm": losses.dpo_norm, "dpo": losses.dpo, "simpo": losses.simpo, "ipo": losses.ipo, "wpo": losses.wpo}
ALSO_KNOWN_AS = {"dpo_n": "dpo_norm", "sigmoid_norm": "dpo_norm", "sigmoid": "dpo"}
REFERENCE_FREE = ("simpo",)
HYPER = ("beta", "gamma_beta_ratio", "label_smoothing")
METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "logps/accuracies",
    "nll",
)


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    __doc__ = __doc__
    output_dir: str = flag("output/dpo", "directory of the run: config.yaml, metrics.jsonl, checkpoints/, final/")
    loss_type: str = flag(
        "dpo_norm", f"one of {', '.join(LOSSES)} (also {', '.join(f'{a} = {b}' for a, b in ALSO_KNOWN_AS.items())})"
    )
    beta: float | None = flag(None, "strength of the preference; by loss: dpo_norm 5, dpo, ipo and wpo 0.1, simpo 2.5")
    gamma_beta_ratio: float | None = flag(None, "simpo only: the margin over beta; 0.3")
    label_smoothing: float | None = flag(None, "probability that a label is flipped (dpo_norm, dpo, simpo, wpo); 0")
    rpo_alpha: float = flag(0.0, "coefficient of the chosen answer's mean negative log-likelihood, added to the loss")
    count_turns: str = flag(
        "last", "tokens counted: of the last assistant turn, or of all (the original's)", choices=("last", "all")
    )
    batch_size: int = flag(32, "pairs per optimizer step, whatever the machine")
    learning_rate: float | None = flag(None, "peak; 5e-7 (Tülu 3 8B), with adapters 5e-6, for the embedded model 1e-3")
    reference: str = flag(
        "auto",
        "log pi_ref from the cache (auto), or in every step from the frozen base or adapter under the trained one, or"
        " from a copy",
        choices=CHOICES,
    )
    cache_logprobs_only: bool = flag(False, "fill the reference cache and stop")


def train(config: Config) -> None:
    here = world.start(config.deterministic)
    config = setup.resolve(
        config,
        here,
        defaults={"learning_rate": 5e-6 if config.use_lora else 5e-7},
        embedded_defaults={"learning_rate": 1e-3},
        embedded_data="pairs",
    )
    config = resolve_loss(config)
    base = setup.prepare(config, here)
    pairs, held_out = load_pairs(config, here, base)
    steps = Steps(len(pairs), config.batch_size, config.num_train_epochs, config.max_steps, config.seed)
    hyper = {name: getattr(config, name) for name in HYPER if getattr(config, name) is not None}
    loss_line = (
        f"loss: {config.loss_type} ({', '.join(f'{k} {v:g}' for k, v in hyper.items())}), learning rate"
        f" {config.learning_rate:g}"
    )
    setup.first_screen(config, here, base, pairs, steps, unit="pairs", extra=[loss_line])
    if config.dry_run:
        show_plan(
            "dpo", config, here, pairs.tokens / 2 + 1, pairs.counts(np.arange(len(pairs))).sum() / pairs.tokens.sum()
        )
        return

    output_dir = Path(config.output_dir)
    with run.open_run(config, here, {"model_revision": base.revision}) as finished:
        if finished:
            here.say(f"{output_dir} is finished, final/ is written: nothing to do")
            return
        policy, weights = setup.load_policy(config, here, base)

        # log pi_ref(y) for every pair of the run: of the policy as it was loaded, also when a checkpoint is resumed
        # below
        cached = dict(
            cache_dir=Path(config.cache_dir).expanduser(),
            micro_batch_tokens=config.micro_batch_tokens,
            identity=refcache.model_identity(weights, base.config, base.dtype, base.backend, config.compile),
        )
        reference = held_out_reference = None
        if config.loss_type not in REFERENCE_FREE and config.reference != "cache":
            reference = held_out_reference = frozen(config, here, base, policy).sums
        elif config.loss_type not in REFERENCE_FREE:
            reference = refcache.reference_logprobs(policy, pairs, steps.used(), here, **cached)
            if held_out:
                held_out_reference = refcache.reference_logprobs(
                    policy, held_out, np.arange(len(held_out)), here, name="held-out reference", **cached
                )
        if config.cache_logprobs_only:
            return

        optimizer = optim.adamw(policy, config.weight_decay, config.optimizer, here)
        identity = {"model": weights, "dataset": pairs.fingerprint}
        checkpoints = Checkpoints(
            output_dir,
            here,
            {"policy": (policy, optimizer)},
            keep=config.save_total_limit,
            identity=identity,
            settings=run.settings(config),
        )
        state = checkpoints.resume(config.resume) or {"step": 0, "num_tokens": 0}
        here.say(f"resuming after step {state['step']}" if state["step"] else "starting at step 0")
        metrics = log.Metrics(output_dir, here, start=state["step"], total=steps.total, report_to=config.report_to)
        throughput = log.Throughput(here, policy, base.dtype, state["num_tokens"])
        batches = batching.MicroBatches(pairs, config.micro_batch_tokens, here)
        if held_out and state["step"] == 0:
            evaluate(policy, held_out, held_out_reference, config, hyper, here, metrics, 0)

        # descend L
        with run.profiler(config.profile, output_dir, here) as profile, checkpoints:
            for step in range(state["step"], steps.total):
                chosen = steps.examples(step)
                totals = log.Totals(here)
                upcoming = steps.examples(step + 1) if step + 1 < steps.total else None
                for batch, last in batches(chosen, then=upcoming):
                    policy.sync_gradients(last)
                    loss = preference_loss(policy, batch, reference, config, hyper, len(chosen), totals)
                    loss.backward()
                    throughput.count(batch, totals)
                sums = totals.reduce((*METRICS, *throughput.COUNTED))
                lr = optim.learning_rate(
                    step,
                    peak=config.learning_rate,
                    steps=steps.total,
                    warmup_ratio=config.warmup_ratio,
                    schedule=config.lr_scheduler_type,
                )
                grad_norm = optim.step(optimizer, here, lr=lr, max_norm=config.max_grad_norm)
                row = {name: sums[name] / len(chosen) for name in METRICS}
                if not math.isfinite(grad_norm + row["loss"]):
                    raise UserError(
                        f"step {step + 1}: loss {row['loss']}, gradient norm {grad_norm}, on pairs"
                        f" {chosen.tolist()[:8]} ...; the weights were left as they are"
                    )
                if step == 0 and reference is not None:
                    check_identity(row, pairs.counts(chosen).mean(), len(chosen), config, base, here)
                row |= {"learning_rate": lr, "grad_norm": grad_norm, **throughput.row(sums)}
                metrics.write(
                    step + 1, row, f"loss {row['loss']:.4f}, {row['perf/tokens_per_second_per_gpu']:.0f} tokens/s"
                )
                if profile is not None:
                    profile.step()
                if step + 1 < steps.total:
                    if held_out and config.eval_steps and (step + 1) % config.eval_steps == 0:
                        evaluate(policy, held_out, held_out_reference, config, hyper, here, metrics, step + 1)
                    if config.save_steps and (step + 1) % config.save_steps == 0:
                        checkpoints.save(step + 1, {"num_tokens": throughput.num_tokens})

        if held_out:
            evaluate(policy, held_out, held_out_reference, config, hyper, here, metrics, steps.total)
        metrics.close()
        here.say(f"done: {setup.export(policy, base, config, here, output_dir / 'final')}")


def preference_loss(
    policy: Policy,
    batch: MicroBatch,
    reference: Callable[[MicroBatch], Tensor] | None,
    config: Config,
    hyper: dict[str, float],
    n_pairs: int,
    totals: log.Totals,
) -> Tensor:
    """This micro-batch's part of L: the sum of its pairs' losses over the pairs of the whole step; adds its metrics to
    `totals`.
    """
    ref_S = reference(batch) if reference else torch.zeros(len(batch.counts_S), device=batch.ids_T.device)

    def loss_of_logprobs(logprobs_R: Tensor, chunk: slice) -> Tensor:
        sequences = slice(2 * chunk.start, 2 * chunk.stop)
        logps_S = sum_by_sequence(logprobs_R.double(), batch.counts_S[sequences]).float()
        chosen_P, rejected_P = logps_S.view(-1, 2).unbind(1)
        ref_chosen_P, ref_rejected_P = ref_S[sequences].view(-1, 2).unbind(1)
        chosen_len_P, rejected_len_P = batch.counts_S[sequences].view(-1, 2).unbind(1)

        loss_P, chosen_rewards_P, rejected_rewards_P = LOSSES[config.loss_type](
            chosen_P, rejected_P, ref_chosen_P, ref_rejected_P, chosen_len_P, rejected_len_P, **hyper
        )
        nll_P = losses.chosen_nll(chosen_P, chosen_len_P)
        loss_P = loss_P + config.rpo_alpha * nll_P

        totals.add(
            loss=loss_P,
            nll=nll_P,
            logps__chosen=chosen_P,
            logps__rejected=rejected_P,
            logps__accuracies=chosen_P / chosen_len_P > rejected_P / rejected_len_P,
            rewards__chosen=chosen_rewards_P,
            rewards__rejected=rejected_rewards_P,
            rewards__margins=chosen_rewards_P - rejected_rewards_P,
            rewards__accuracies=chosen_rewards_P > rejected_rewards_P,
        )
        return loss_P.sum() / n_pairs

    return policy(batch, loss_of_logprobs, sequences_per_group=2)


@torch.no_grad()
def evaluate(
    policy, held_out: Examples, reference, config: Config, hyper, here: World, metrics: log.Metrics, step: int
) -> None:
    """The training metrics on held-out pairs, as eval/*. logps/accuracies: how often the chosen answer is likelier per
    token.
    """
    totals = log.Totals(here)
    for batch, _ in batching.step_batches(held_out, np.arange(len(held_out)), config.micro_batch_tokens, here):
        preference_loss(policy, batch, reference, config, hyper, len(held_out), totals)
    policy.release()
    row = {name: total / len(held_out) for name, total in totals.reduce(METRICS).items()}
    metrics.write(step, {f"eval/{name}": value for name, value in row.items()})
    metrics.say(
        f"held out, after step {step}: loss {row['loss']:.4f}, chosen likelier per token in"
        f" {row['logps/accuracies']:.1%}, reward accuracy {row['rewards/accuracies']:.1%}"
    )


def check_identity(
    row: dict[str, float], tokens: float, pairs: int, config: Config, base: setup.Base, here: World
) -> None:
    """Before the first update the policy is the reference: every log-ratio is 0, so margins are 0 and dpo's loss is log
    2.

    Allowed is what rounding can do: log-probs of tokens off by 32 roundings of their size under the compute dtype,
    independently, so by 1 / sqrt(n) in a mean over n `tokens` of an answer (sqrt(n) in a sum) and by 1 / sqrt(P) in a
    mean over P `pairs`, times beta, for both answers. Raises UserError beyond: cache and policy disagree.
    """
    normalised = config.loss_type in ("dpo_norm", "ipo")
    per_answer = 32 * torch.finfo(base.dtype).eps * max(1.0, row["nll"]) * tokens ** (-0.5 if normalised else 0.5)
    bound = 2 * config.beta * per_answer / pairs**0.5
    margin = abs(row["rewards/margins"])
    exact = config.loss_type in ("dpo", "dpo_norm") and not config.rpo_alpha
    off = abs(row["loss"] - math.log(2)) if exact else margin
    here.say(
        f"step 0: margins {margin:.1e}"
        + (f", |loss - log 2| {off:.1e}" if exact else "")
        + f", rounding allows {bound:.1e}"
    )
    if not max(margin, off) <= bound:
        raise UserError(
            f"step 0: the policy is not its reference (margins {margin:.2e}, allowed {bound:.2e}; --reference"
            f" {config.reference})"
        )


def resolve_loss(config: Config) -> Config:
    """The loss by its own name, with its own defaults; a hyper-parameter that it does not read is an error. Raises
    UserError.
    """
    loss_type = ALSO_KNOWN_AS.get(config.loss_type, config.loss_type)
    if loss_type not in LOSSES:
        raise UserError(
            f"--loss_type {loss_type} is not one of {', '.join(LOSSES)}{nearest(loss_type, [*LOSSES, *ALSO_KNOWN_AS])}"
        )
    defaults = {
        name: p.default
        for name, p in inspect.signature(LOSSES[loss_type]).parameters.items()
        if p.kind == p.KEYWORD_ONLY
    }
    for name in HYPER:
        if getattr(config, name) is not None and name not in defaults:
            raise UserError(f"--{name} is not read by --loss_type {loss_type}, which reads {', '.join(defaults)}")
    hyper = {
        name: getattr(config, name) if getattr(config, name) is not None else default
        for name, default in defaults.items()
    }
    if not hyper["beta"] > 0:
        raise UserError(f"--beta must be greater than 0, got {hyper['beta']}")
    if config.rpo_alpha < 0:
        raise UserError(f"--rpo_alpha must not be negative, got {config.rpo_alpha}")
    if loss_type in REFERENCE_FREE and config.reference not in ("auto", "cache"):
        raise UserError(f"--reference is not read by --loss_type {loss_type}")
    config = resolve_reference(config, without_lora="cache", with_lora="cache")
    if config.cache_logprobs_only and (loss_type in REFERENCE_FREE or config.reference != "cache"):
        raise UserError(
            f"--cache_logprobs_only: --loss_type {loss_type} with --reference {config.reference} needs no cache"
        )
    if not 0 <= hyper.get("label_smoothing", 0) < 0.5:
        raise UserError(f"--label_smoothing must be in [0, 0.5), got {hyper['label_smoothing']}")
    return dataclasses.replace(config, loss_type=loss_type, **hyper)


def load_pairs(config: Config, here: World, base: setup.Base) -> tuple[Examples, Examples | None]:
    """(training pairs, held-out pairs or None). Raises UserError."""
    encode = lambda source: PairEncoder(base.chat, config.max_seq_length, config.count_turns == "last")
    options = {"per_example": 2, "kind": {"pairs": config.count_turns}}
    pairs = data.load_examples(
        data.mixture(config), config, here, base.chat, encode, split=config.dataset_split, **options
    )
    if here.size > len(pairs):
        raise UserError(f"{here.size} ranks for {len(pairs)} pairs: lower --nproc_per_node")
    if config.eval_dataset_name is None:
        return pairs, None
    return pairs, data.load_examples(
        [(config.eval_dataset_name, "")], config, here, base.chat, encode, split=config.eval_split, **options
    )


if __name__ == "__main__":
    world.run(lambda: train(parse(Config)))
