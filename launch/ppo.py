"""Reinforcement learning with verifiable rewards, by PPO.         torchrun --nproc_per_node 8 -m launch.ppo --help

An iteration samples responses y to prompts x from the policy pi, has a program verify them, and takes several passes of
clipped policy and value updates on them. With d_t = log pi(y_t) - log pi_ref(y_t) estimating the KL divergence:

    r_t = - kl_coef d_t  + verification_reward * verdict in the last slot
    A_t = sum_k (gamma lam)^k ( r_{t+k} + gamma V_{t+k+1} - V_{t+k} ),   G_t = A_t + V_t,   A whitened over the whole batch
    L_policy = (1/N) sum_t max( - A_t rho_t, - A_t clip(rho_t, 1 - eps, 1 + eps) ),   rho_t = pi(y_t) / pi_old(y_t)
    L_value  = (1/N) sum_t (V_t - G_t)^2 / 2

N counts the response tokens of the mini-batch over all ranks. pi_ref is a frozen copy of the initial policy (with
adapters, the model under them, or the adapter that training starts from), V a model of its own. A step is an iteration:
--batch_size prompts times --num_samples_per_prompt responses, then all updates. Left out of the original on purpose:
sampling one step stale, whitening per rank, means of micro-batch means.

With no argument it fine-tunes the embedded tiny model on sums of which half are wrong, and reinforces the right ones.

S responses · R response tokens (or slots) of all of them, end to end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import losses
from engine import batch as batching
from engine import log, model, optim, run, setup, weights, world
from engine.checkpoint import Checkpoints
from engine.config import RunConfig, flag, parse, require_positive
from engine.data import mixture
from engine.dry_run import show_plan
from engine.embedded import Embedded
from engine.errors import UserError
from engine.interval import accuracy as accuracy_interval
from engine.prompts import Prompt, fingerprint_of, load_prompts
from engine.reference import FrozenPolicy, frozen
from engine.reference import resolve as resolve_reference
from engine.rows import open_source
from engine.store import Steps, mixture_index, permutation
from engine.world import World
from launch.tuned import tuned_on_sums
from rollout import Experience, Request, Rollout, Sampler, SamplingParams, evaluate
from verifiers import Pool, Verdict, check
from verifiers.pool import MAX_ERROR_RATE


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    __doc__ = __doc__
    output_dir: str = flag("output/ppo", "directory of the run: config.yaml, metrics.jsonl, checkpoints/, final/")
    batch_size: int | None = flag(None, "prompts per iteration, whatever the machine; 224, embedded 32")
    num_samples_per_prompt: int | None = flag(None, "responses per prompt; 1, embedded 4")
    learning_rate: float | None = flag(None, "peak, of the policy; 3e-7 (Tülu 3 8B), with adapters 3e-6, embedded 1e-3")
    value_learning_rate: float | None = flag(None, "peak, of the value model; without it the policy's")
    warmup_ratio: float = flag(0.0, "share of the iterations in which the learning rates rise linearly from 0")
    response_length: int | None = flag(None, "longest response in tokens; 1024, embedded 24")
    temperature: float = flag(1.0, "of sampling, and of all log-probs")
    top_k: int = flag(0, "sample from the k likeliest tokens (0: from all)")
    top_p: float = flag(1.0, "sample from the likeliest tokens of this total probability")
    kl_coef: float = flag(0.05, "weight of the KL penalty in the reward (0: no reference is loaded)")
    reference: str = flag(
        "auto",
        "pi_ref: the frozen base or adapter under the trained one (auto, with --use_lora), or a frozen copy",
        choices=("auto", "base", "adapter", "copy"),
    )
    kl_estimator: str = flag("k1", "of the penalty", choices=("k1", "k2", "k3"))
    gamma: float = flag(1.0, "discount")
    lam: float = flag(0.95, "GAE's lambda")
    cliprange: float = flag(0.2, "eps of the policy's clipping")
    cliprange_value: float | None = flag(
        None, "clip value updates to old +- this (the original: 0.2; from a fresh head it cannot follow large rewards)"
    )
    vf_coef: float = flag(0.1, "weight of the value loss")
    num_ppo_epochs: int = flag(4, "passes over an iteration's responses")
    num_mini_batches: int = flag(1, "optimizer steps per pass")
    verification_reward: float = flag(1.0, "reward of a right answer (the original: 10)")
    missing_eos_penalty: float | None = flag(
        None, "score, in place of the verifier's, of a response without an end (the original: -10)"
    )
    score_slot: str = flag(
        "last",
        "where the score is credited: at the last token, or in a slot after the end (the original)",
        choices=("last", "after_eos"),
    )
    value_model_name_or_path: str | None = flag(
        None, "reward model or decoder to start the value model from; without it the policy"
    )
    value_warmup_steps: int = flag(0, "iterations in which only the value model learns")
    verifier_mode: str = flag(
        "default",
        "reference: the published verifiers' exact behaviour, also where it is wrong",
        choices=("default", "reference", "tulu3"),
    )
    rollout_slots: int = flag(64, "responses sampled at a time on each rank")
    eval_samples: int = flag(4, "samples per held-out prompt")


EVALUATION = 1_000_003  # added to the seed: held-out responses are other draws than the training's
METRICS = ("loss/policy", "loss/value", "val/ratio", "policy/clipfrac", "policy/approxkl", "tokens", "slots")


def train(config: Config) -> None:
    here = world.start(config.deterministic)
    if config.model_name_or_path is None:
        config = embedded_flags(config, *tuned_on_sums(Path(config.cache_dir).expanduser(), here))
    config = setup.resolve(
        config,
        here,
        embedded_defaults={},
        embedded_data="problems",
        defaults={
            "batch_size": 224,
            "num_samples_per_prompt": 1,
            "learning_rate": 3e-6 if config.use_lora else 3e-7,
            "response_length": 1024,
        },
    )
    config = resolve_reference(config, without_lora="copy")
    base = setup.prepare(config, here)
    validate(config, base)
    prompts, held_out = load_data(config, here, base)
    steps = Steps(len(prompts), config.batch_size, config.num_train_epochs, config.max_steps, config.seed)
    params = SamplingParams(
        max_new_tokens=config.response_length,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        stop_ids=(base.chat.end_of_turn_id,),
    )
    here.say(*first_screen(config, here, base, prompts, steps))
    if config.dry_run:
        show_plan("ppo", config, here, np.array([len(prompt.ids) for prompt in prompts]) + config.response_length)
        return

    output_dir = Path(config.output_dir)
    with (
        run.open_run(config, here, {"model_revision": base.revision}) as finished,
        Pool(max(1, world.available_cores() // here.size), config.verifier_mode) as pool,
    ):
        if finished:
            here.say(f"{output_dir} is finished, final/ is written: nothing to do")
            return
        policy, reference, value_model, weights_identity = load_models(config, here, base)
        longest = config.response_length + max(len(prompt.ids) for prompt in prompts + held_out)
        sampler = Sampler(base.config, policy, here, dtype=base.dtype, max_length=longest, slots=config.rollout_slots)
        optimizers = {
            name: optim.adamw(module, config.weight_decay, config.optimizer, here)
            for name, module in (("policy", policy), ("value", value_model))
        }
        trained = {"policy": (policy, optimizers["policy"]), "value": (value_model, optimizers["value"])}
        identity = {"model": weights_identity, "value model": value_model.identity, "dataset": fingerprint_of(prompts)}
        checkpoints = Checkpoints(
            output_dir, here, trained, keep=config.save_total_limit, identity=identity, settings=run.settings(config)
        )
        state = checkpoints.resume(config.resume) or {"step": 0, "num_tokens": 0}
        here.say(f"resuming after step {state['step']}" if state["step"] else "starting at step 0")
        metrics = log.Metrics(output_dir, here, start=state["step"], total=steps.total, report_to=config.report_to)
        samples = log.JsonLines(output_dir / "samples.jsonl", state["step"]) if here.is_main else None
        throughput = log.Throughput(here, policy, base.dtype, state["num_tokens"])
        if state["step"] == 0:
            held_out_accuracy(sampler, policy, held_out, params, config, here, base, pool, metrics, samples, 0)

        with run.profiler(config.profile, output_dir, here) as profile, checkpoints:
            for step in range(state["step"], steps.total):
                clock = log.Clock()
                # 1. sample responses from the policy, and 2. verify each as soon as it ends
                sampler.load(policy)
                chosen = steps.examples(step)
                rollouts, verdicts = sample_and_verify(
                    sampler, prompts, chosen, config.num_samples_per_prompt, params, config.seed, step, here, base, pool
                )
                batch = experience(rollouts, verdicts, config)
                sampler.release()  # its cache makes room for activations
                times = {"time/rollout": clock.lap()}

                # 3. evaluate them: pi_old, pi_ref and V, before any update
                budget = config.micro_batch_tokens
                old_R, entropy_R = evaluate(lambda mb: policy(mb, mode="entropy"), batch.tokens, budget, here)
                ref_R = evaluate(reference, batch.tokens, budget, here) if reference else old_R
                values_R = evaluate(value_model, batch.slots, budget, here)
                for root in filter(None, (policy, reference, value_model)):
                    root.release()
                if step == 0:
                    check_sampler(batch, old_R, config, base, here)

                # 4. rewards, advantages, returns
                kl_R = losses.kl(old_R, ref_R, config.kl_estimator)
                rewards_R = losses.token_rewards(
                    batch.on_slots(kl_R), batch.scores_S, batch.slot_counts_S, config.kl_coef
                )
                advantages_R, returns_R = losses.gae(rewards_R, values_R, batch.slot_counts_S, config.gamma, config.lam)
                advantages_R = losses.whiten(advantages_R[batch.is_token_R])
                times["time/evaluate"] = clock.lap()

                # 5. several passes of clipped updates
                lr = [
                    optim.learning_rate(
                        step,
                        peak=peak,
                        steps=steps.total,
                        warmup_ratio=config.warmup_ratio,
                        schedule=config.lr_scheduler_type,
                    )
                    for peak in (config.learning_rate, config.value_learning_rate or config.learning_rate)
                ]
                totals, first_ratio = log.Totals(here), None
                for minibatch in minibatches(len(batch), config, step):
                    update(
                        policy,
                        value_model,
                        batch,
                        minibatch,
                        old_R,
                        advantages_R,
                        values_R,
                        returns_R,
                        config,
                        step,
                        here,
                        totals,
                        throughput,
                    )
                    norms = [
                        optim.step(optimizers[name], here, lr=lr[i], max_norm=config.max_grad_norm)
                        for i, name in enumerate(trained)
                    ]
                    if not all(map(math.isfinite, norms)):
                        raise UserError(
                            f"step {step + 1}: gradient norms {norms} of policy and value model; what is not finite was"
                            " not applied"
                        )
                    if step == 0 and first_ratio is None:
                        first_ratio = totals.reduce(METRICS)
                times["time/update"] = clock.lap()

                # 6. the new weights reach the sampler at the top of the loop
                sums = totals.reduce((*METRICS, *throughput.COUNTED))
                row = summary(batch, rollouts, verdicts, prompts, kl_R, entropy_R, values_R, returns_R, sums) | times
                row |= {
                    "learning_rate": lr[0],
                    "grad_norm": norms[0],
                    "grad_norm/value": norms[1],
                    **throughput.row(sums),
                }
                if step == 0:
                    check_ratio(first_ratio, config, base, here)
                metrics.write(
                    step + 1,
                    row,
                    f"score {row['objective/scores']:.3f}, kl {row['objective/kl']:.3f},"
                    f" {row['perf/tokens_per_second_per_gpu']:.0f} tokens/s",
                )
                if profile is not None:
                    profile.step()
                if step + 1 < steps.total:
                    if config.eval_steps and (step + 1) % config.eval_steps == 0:
                        held_out_accuracy(
                            sampler, policy, held_out, params, config, here, base, pool, metrics, samples, step + 1
                        )
                    if config.save_steps and (step + 1) % config.save_steps == 0:
                        checkpoints.save(step + 1, {"num_tokens": throughput.num_tokens})

        held_out_accuracy(sampler, policy, held_out, params, config, here, base, pool, metrics, samples, steps.total)
        metrics.close()
        setup.export(value_model, base, config, here, output_dir / ".value")
        done = setup.export(policy, base, config, here, output_dir / "final", inside={"value": output_dir / ".value"})
        here.say(f"done: {done}, its value/ as a sequence classifier")


# --- the steps of an iteration
# --------------------------------------------------------------------------------------------------


def sample_and_verify(
    sampler: Sampler,
    prompts: list[Prompt],
    chosen: np.ndarray,
    n: int,
    params: SamplingParams,
    seed: int,
    step: int,
    here: World,
    base: setup.Base,
    pool: Pool,
) -> tuple[list[Rollout], list[Verdict]]:
    """n responses to each chosen prompt and their verdicts, on every rank in one order. Collective.

    Every n-th group of samples is this rank's; verification draws finished responses from the sampler while it goes on.
    """
    requests = [Request(prompts[e].ids, int(e), sample) for e in chosen[here.rank :: here.size] for sample in range(n)]
    finished: list[tuple[int, Rollout]] = []

    def rows():
        for index, rollout in sampler.stream(requests, params, seed=seed, step=step):
            finished.append((index, rollout))
            ids = rollout.response_ids[:-1] if rollout.finish_reason == "stop" else rollout.response_ids
            prompt = prompts[rollout.example]
            yield base.chat.tokenizer.decode(ids, skip_special_tokens=False), prompt.ground_truth, prompt.dataset

    verdicts = list(pool.imap(rows()))
    mine = [(rollout, verdict) for (_, rollout), verdict in zip(finished, verdicts, strict=True)]
    place = {int(e): i for i, e in enumerate(chosen)}
    everyone = [pair for part in here.gather(mine) for pair in part]
    everyone.sort(key=lambda pair: (place[pair[0].example], pair[0].sample))
    return [rollout for rollout, _ in everyone], [verdict for _, verdict in everyone]


def experience(rollouts: list[Rollout], verdicts: list[Verdict], config: Config) -> Experience:
    """The responses that have a verdict, with their scores. Raises UserError if more than 1 % have none."""
    errors = [v.reason for v in verdicts if v.status == "error"]
    if len(errors) > MAX_ERROR_RATE * len(verdicts):
        raise UserError(f"{len(errors)} of {len(verdicts)} responses could not be verified, the first: {errors[0]}")
    judged = [(r, v) for r, v in zip(rollouts, verdicts, strict=True) if v.status == "ok"]
    scores = [
        (
            config.missing_eos_penalty
            if r.finish_reason == "length" and config.missing_eos_penalty is not None
            else config.verification_reward * v.score
        )
        for r, v in judged
    ]
    return Experience(
        [r for r, _ in judged],
        scores,
        slot_after_end=config.score_slot == "after_eos",
        response_length=config.response_length,
    )


def minibatches(n: int, config: Config, step: int) -> Iterator[np.ndarray]:
    """The responses of every optimizer step of the iteration: a permutation per pass, cut into --num_mini_batches."""
    for epoch in range(config.num_ppo_epochs):
        yield from np.array_split(permutation(n, config.seed, "ppo", step, epoch), min(config.num_mini_batches, n))


def update(
    policy: model.Policy,
    value_model: model.ValueModel,
    batch: Experience,
    minibatch: np.ndarray,
    old_R: Tensor,
    advantages_R: Tensor,
    values_R: Tensor,
    returns_R: Tensor,
    config: Config,
    step: int,
    here: World,
    totals: log.Totals,
    throughput: log.Throughput,
) -> None:
    """Adds the gradients of L_policy and vf_coef L_value over one mini-batch, and their sums to `totals`."""
    n_tokens, n_slots = int(batch.tokens.counted[minibatch].sum()), int(batch.slots.counted[minibatch].sum())
    totals.add(tokens=n_tokens / here.size, slots=n_slots / here.size)
    if step >= config.value_warmup_steps:
        for mb, last in batching.step_batches(batch.tokens, minibatch, config.micro_batch_tokens, here):
            policy.sync_gradients(last)
            mb_old_R, mb_advantages_R = (
                world.on_device(batch.tokens.rows(x_R, mb.examples).float(), here.device)
                for x_R in (old_R, advantages_R)
            )

            def loss_of_logprobs(
                logprobs_R: Tensor, rows: slice, mb_old_R=mb_old_R, mb_advantages_R=mb_advantages_R
            ) -> Tensor:
                loss_R = losses.ppo_policy(logprobs_R, mb_old_R[rows], mb_advantages_R[rows], config.cliprange)
                seen = losses.diagnostics(logprobs_R, mb_old_R[rows], config.cliprange)
                totals.add(
                    loss__policy=loss_R,
                    val__ratio=seen["ratio"],
                    policy__clipfrac=seen["clipfrac"],
                    policy__approxkl=seen["approxkl"],
                )
                return loss_R.sum() / n_tokens

            policy(mb, loss_of_logprobs).backward()
            throughput.count(mb, totals)
    for mb, last in batching.step_batches(batch.slots, minibatch, config.micro_batch_tokens, here):
        value_model.sync_gradients(last)
        mb_old_R, mb_returns_R = (
            world.on_device(batch.slots.rows(x_R, mb.examples).float(), here.device) for x_R in (values_R, returns_R)
        )
        loss_R = losses.ppo_value(value_model(mb), mb_old_R, mb_returns_R, config.cliprange_value)
        totals.add(loss__value=loss_R)
        (config.vf_coef * loss_R.sum() / n_slots).backward()


def summary(
    batch: Experience, rollouts, verdicts, prompts, kl_R, entropy_R, values_R, returns_R, sums: dict[str, float]
) -> dict[str, float]:
    """One row of metrics: means over the iteration's responses, and over all its updates' tokens or slots."""
    row = {name: sums[name] / max(1, sums["slots" if name == "loss/value" else "tokens"]) for name in METRICS[:-2]}
    verified: dict[str, list[float]] = {}
    for rollout, verdict in zip(rollouts, verdicts, strict=True):
        if verdict.status == "ok":
            verified.setdefault(str(prompts[rollout.example].dataset).lower(), []).append(verdict.score)
    return (
        row
        | {f"verified/{name}": float(np.mean(scores)) for name, scores in verified.items()}
        | {
            "loss": row["loss/policy"],
            "objective/scores": batch.scores_S.mean().item(),
            "objective/kl": (kl_R.sum() / len(batch)).item(),
            "objective/entropy": entropy_R.mean().item(),
            "val/explained_variance": losses.explained_variance(values_R, returns_R).item(),
            "rollout/length": float(np.mean([len(r.response_ids) for r in rollouts])),
            "rollout/stop_rate": float(np.mean([r.finish_reason == "stop" for r in rollouts])),
            "rollout/errors": sum(v.status == "error" for v in verdicts),
        }
    )


def held_out_accuracy(
    sampler: Sampler,
    policy: model.Policy,
    held_out: list[Prompt],
    params: SamplingParams,
    config: Config,
    here: World,
    base: setup.Base,
    pool: Pool,
    metrics: log.Metrics,
    samples: log.JsonLines | None,
    step: int,
) -> None:
    """Verified accuracy on the held-out prompts with a 95 % interval (engine/interval.py), and a few responses with
    their verdicts.
    """
    if not held_out:
        return
    sampler.load(policy)
    rollouts, verdicts = sample_and_verify(
        sampler,
        held_out,
        np.arange(len(held_out)),
        config.eval_samples,
        params,
        config.seed + EVALUATION,
        step,
        here,
        base,
        pool,
    )
    scores_NK = np.array([v.score if v.status == "ok" else math.nan for v in verdicts]).reshape(
        len(held_out), config.eval_samples
    )
    accuracy, low, high = accuracy_interval(scores_NK)
    if math.isnan(accuracy):
        raise UserError(f"no held-out prompt could be verified, the first: {verdicts[0].reason}")
    metrics.write(
        step,
        {
            "eval/accuracy": accuracy,
            "eval/low": low,
            "eval/high": high,
            "eval/length": float(np.mean([len(r.response_ids) for r in rollouts])),
        },
    )
    lines = [
        f"held out, after iteration {step}: verified {accuracy:.1%} (95 % interval {low:.1%} to {high:.1%},"
        f" {np.isfinite(scores_NK).sum()} responses)"
    ]
    for rollout, verdict in list(zip(rollouts, verdicts, strict=True))[:: max(1, len(rollouts) // 4)][:4]:
        text = base.chat.tokenizer.decode(rollout.response_ids)
        lines.append(f"  {verdict.score:g} ({verdict.reason[:80]}): {text[:160]!r}")
        if samples:
            prompt = base.chat.tokenizer.decode(rollout.prompt_ids)
            samples.write(
                {"step": step, "prompt": prompt, "response": text, "score": verdict.score, "reason": verdict.reason}
            )
    metrics.say("\n".join(lines))


# --- identities of a fresh run
# ---------------------------------------------------------------------------------------------------


def rounding(base: setup.Base) -> float:
    """By how much two ways to compute a log-prob may differ on average: 16 roundings of the compute dtype, in float32
    1e-4.
    """
    return max(16 * torch.finfo(base.dtype).eps, 1e-4)


def check_sampler(batch: Experience, old_R: Tensor, config: Config, base: setup.Base, here: World) -> None:
    """The sampler's log-probs are the trainer's, on average, up to what rounding can do to them. Raises UserError."""
    if config.top_k or config.top_p < 1 or config.temperature == 0:
        here.say(
            "the policy is not what was sampled from (temperature 0, --top_k or --top_p): log-probs are of the whole"
            " distribution"
        )
        return
    sampled_R = torch.as_tensor(np.concatenate([r.logprobs for r in batch.rollouts])).double()
    difference_R = (sampled_R - old_R).abs()
    bound = rounding(base) * max(1.0, old_R.abs().mean().item())
    here.say(
        f"step 0: sampler's and trainer's log-probs differ by {difference_R.mean():.1e} on average,"
        f" {difference_R.max():.1e} at most; rounding allows {bound:.1e} on average"
    )
    if not difference_R.mean() <= bound:
        raise UserError(
            f"step 0: the sampler is not the policy (log-probs differ by {difference_R.mean():.1e}, allowed"
            f" {bound:.1e})"
        )


def check_ratio(sums: dict[str, float], config: Config, base: setup.Base, here: World) -> None:
    """In the first update the policy is still pi_old: the ratio is 1. Raises UserError."""
    if not sums["val/ratio"]:  # the value model's warm-up: no policy update
        return
    off, bound = abs(sums["val/ratio"] / sums["tokens"] - 1), rounding(base)
    here.say(f"step 0: mean ratio of the first update off 1 by {off:.1e}, rounding allows {bound:.1e}")
    if not off <= bound:
        raise UserError(f"step 0: the first update's ratio is off 1 by {off:.1e}, allowed {bound:.1e}")


# --- before the algorithm begins
# --------------------------------------------------------------------------------------------------


def embedded_flags(config: Config, made: Embedded, tuned: Path) -> Config:
    """What is not given, for the embedded model."""
    defaults = {"batch_size": 32, "num_samples_per_prompt": 4, "learning_rate": 1e-3, "response_length": 24}
    filled = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    if config.dataset_name is None and config.mixer_list is None:
        filled |= {
            "dataset_name": str(made.train_problems),
            "eval_dataset_name": config.eval_dataset_name or str(made.held_out_problems),
        }
        filled |= {} if {"max_steps", "num_train_epochs"} & config.given.keys() else {"max_steps": 30}
    return replace(
        config, model_name_or_path=str(tuned / "final"), max_seq_length=min(config.max_seq_length, 256), **filled
    )


def validate(config: Config, base: setup.Base) -> None:
    """Raises UserError for what cannot be, in one line."""
    require_positive(
        config,
        "num_samples_per_prompt",
        "response_length",
        "cliprange",
        "cliprange_value",
        "num_ppo_epochs",
        "num_mini_batches",
        "rollout_slots",
        "eval_samples",
        "value_learning_rate",
    )
    for name, low, high in (
        ("gamma", 0, 1),
        ("lam", 0, 1),
        ("top_p", 1e-9, 1),
        ("temperature", 0, 1e3),
        ("kl_coef", 0, 1e9),
        ("top_k", 0, 1e9),
    ):
        if not low <= getattr(config, name) <= high:
            raise UserError(f"--{name} must be between {low:g} and {high:g}, got {getattr(config, name)}")
    if config.value_model_name_or_path:
        model.load_value_config(
            weights.resolve(config.value_model_name_or_path, None, "--value_model_name_or_path")[0],
            base.config.vocab_size,
        )
        setup.value_adapters(config, base)
    if config.vf_coef < 0 or config.value_warmup_steps < 0:
        raise UserError("--vf_coef and --value_warmup_steps must not be negative")
    longest = getattr(base.config, "max_position_embeddings", config.max_seq_length)
    if config.response_length >= min(config.max_seq_length, longest):
        raise UserError(
            f"--response_length {config.response_length} leaves no room for a prompt in"
            f" {min(config.max_seq_length, longest)} tokens (--max_seq_length {config.max_seq_length}, the model's"
            f" limit {longest})"
        )


def load_data(config: Config, here: World, base: setup.Base) -> tuple[list[Prompt], list[Prompt]]:
    """(prompts, held-out prompts). Raises UserError."""
    limit = (
        min(config.max_seq_length, getattr(base.config, "max_position_embeddings", config.max_seq_length))
        - config.response_length
    )

    def load(name: str, amount: str, split: str) -> list[Prompt]:
        source = open_source(name, split, config.dataset_revision)
        found, lines = load_prompts(
            source, base.chat, limit, partial(check, mode=config.verifier_mode), config.on_bad_row
        )
        here.say(*lines)
        return [found[i] for i in mixture_index(len(found), amount, config.seed, name)] if amount else found

    prompts = [prompt for name, amount in mixture(config) for prompt in load(name, amount, config.dataset_split)]
    if here.size > len(prompts):
        raise UserError(f"{here.size} ranks for {len(prompts)} prompts: lower --nproc_per_node")
    here.agree("prompts", fingerprint_of(prompts))
    return prompts, load(config.eval_dataset_name, "", config.eval_split) if config.eval_dataset_name else []


def first_screen(config: Config, here: World, base: setup.Base, prompts: list[Prompt], steps: Steps) -> list[str]:
    name = (base.config.architectures or [base.config.model_type])[0]
    counts: dict[str, int] = {}
    for prompt in prompts:
        counts[str(prompt.dataset).lower()] = counts.get(str(prompt.dataset).lower(), 0) + 1
    lines = [
        (
            f"model: {name} from {base.directory}; value model from"
            f" {config.value_model_name_or_path or 'the policy, with a head of zeros'}"
        ),
        (
            f"world: {here.size} x {here.device.type}, compute {str(base.dtype).removeprefix('torch.')}, masters"
            f" {config.master_dtype}, attention {base.backend} ({base.why_backend})"
        ),
        *setup.describe_adapters(config, base),
        f"chat template: {base.chat.template_origin}; a turn ends with {base.chat.end_of_turn!r}",
        f"data: {len(prompts):,} prompts ({', '.join(f'{n} {k}' for k, n in counts.items())})",
        (
            f"iteration: {min(config.batch_size, len(prompts))} prompts x {config.num_samples_per_prompt} responses of"
            f" at most {config.response_length} tokens, {config.num_ppo_epochs} x {config.num_mini_batches} updates;"
            f" {steps.total} iterations"
        ),
        (
            f"loss: kl_coef {config.kl_coef:g} ({config.kl_estimator}), gamma {config.gamma:g}, lambda {config.lam:g},"
            f" cliprange {config.cliprange:g}, value clipping {config.cliprange_value or 'off'}, learning rate"
            f" {config.learning_rate:g}"
        ),
    ]
    return lines + (["the first prompt:", base.chat.tokenizer.decode(prompts[0].ids)] if config.dry_run else [])


def load_models(
    config: Config, here: World, base: setup.Base
) -> tuple[model.Policy, FrozenPolicy | None, model.ValueModel, str]:
    """(policy, frozen reference or None where the penalty is 0, value model, identity of the policy's numbers).
    Collective.
    """
    policy, identity = setup.load_policy(config, here, base)
    policy.temperature = config.temperature or 1.0
    reference = frozen(config, here, base, policy) if config.kl_coef else None
    how = base.how(config)
    del how["head"]
    how["adapters"] = setup.value_adapters(config, base)
    if config.value_model_name_or_path:  # another model: what the policy's adapter starts from does not fit it
        how["start"] = None
    source = (
        weights.resolve(config.value_model_name_or_path, None, "--value_model_name_or_path")[0]
        if config.value_model_name_or_path
        else base.directory
    )
    value_model = model.load_value_model(source, here, vocab_size=base.config.vocab_size, **how)
    setup.transform_layers(value_model, config)
    value_model.gradient_sync = policy.gradient_sync
    on = f", adapters on {len(value_model.adapters.modules)} layers" if value_model.adapters else ""
    here.say(
        f"value model: {value_model.num_parameters:,} parameters, {value_model.num_trained:,} trained{on}, weights"
        f" {value_model.identity}"
    )
    return policy, reference, value_model, identity


if __name__ == "__main__":
    world.run(lambda: train(parse(Config)))
