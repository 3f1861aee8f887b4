"""Reinforcement learning with verifiable rewards, by PPO.         torchrun --nproc_per_node 8 -m launch.ppo --help

An iteration samples responses y to prompts x from the policy pi, has a program verify them, and takes several passes of
clipped policy and value updates on them. With d_t = log pi(y_t) - log pi_ref(y_t) estimating the KL divergence:

    r_t = - kl_coef d_t  + verification_reward * verdict in the last slot
    A_t = sum_k (gamma lam)^k ( r_{t+k} + gamma V_{t+k+1} - V_{t+k} ),   G_t = A_t + V_t,   A whitened over the batch
    L_policy = (1/N) sum_t max( - A_t rho_t, - A_t clip(rho_t, 1 - eps, 1 + eps) ),   rho_t = pi(y_t) / pi_old(y_t)
    L_value  = (1/N) sum_t (V_t - G_t)^2 / 2

N counts the response tokens of the mini-batch over all ranks. pi_ref is a frozen copy of the initial policy (with
adapters, the model under them, or the adapter that training starts from), V a model of its own. A step is an iteration:
--batch_size prompts times --num_samples_per_prompt responses, then all updates. Left out of the original on purpose:
whitening per rank, means of micro-batch means. Sampling one step stale is a choice, --rollout_ahead 1: pi_old is then
the policy of one iteration ago, by the log-probs that the sampler wrote down.

With no argument it fine-tunes the embedded tiny model on sums of which half are wrong, and reinforces the right ones.

S responses · R response tokens (or slots) of all of them, end to end.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

import losses
from engine.config import as_dict, parse
from engine.data import MicroBatch, Prompt, PromptReader, Steps, fingerprint_of, read_prompts
from engine.flags import RlvrFlags, flag, override, require_between, require_not_negative, require_positive
from engine.log import Totals
from engine.model import Policy, ValueModel, check_value_model, load_policy, load_value_model, release
from engine.train import Clock, Run, optim, reference, screen
from engine.world import World, main, start
from launch.resolve import (
    after,
    checker,
    commands,
    each_seed,
    open_rlvr,
    pinned,
    resolve,
    sampler_beside,
    show_plan,
    with_tuned_model,
)
from rollout import (
    Collector,
    Sampling,
    check_form,
    check_ratio,
    check_sampler,
    evaluate,
    experience_of,
    held_out_accuracy,
    minibatches,
    of_responses,
    of_sampler,
    of_sampling,
)
from verifiers import MODES, Pool

DEFAULTS = {"batch_size": 224, "num_samples_per_prompt": 1, "num_train_epochs": 1, "response_length": 1024}
Columns = list[torch.Tensor]  # two numbers of every token, or of every slot
METRICS = ("loss/policy", "loss/value", "val/ratio", "policy/clipfrac", "policy/approxkl", "tokens", "slots")


@dataclass(frozen=True, kw_only=True)
class Config(RlvrFlags):
    __doc__ = __doc__
    output_dir: str = override("output/ppo")
    batch_size: int = override(None, "prompts per iteration, whatever the machine; 224, embedded 32")
    num_samples_per_prompt: int = override(None, "responses per prompt; 1, embedded 4")
    learning_rate: float = override(
        None, "peak, of the policy; 3e-7 (Tülu 3 8B), with adapters 3e-6, for the embedded model 1e-3"
    )
    value_learning_rate: float | None = flag(None, "peak, of the value model; without it the policy's")
    verifier_mode: str = override("default", choices=MODES)
    kl_coef: float = flag(0.05, "weight of the KL penalty in the reward (0: no reference is loaded)")
    kl_estimator: str = flag("k1", "of the penalty", choices=("k1", "k2", "k3"))
    gamma: float = flag(1.0, "discount")
    lam: float = flag(0.95, "GAE's lambda")
    cliprange: float = flag(0.2, "eps of the policy's clipping")
    cliprange_value: float | None = flag(
        None, "clip value updates to old +- this (the original: 0.2; from a fresh head it cannot follow large rewards)"
    )
    vf_coef: float = flag(0.1, "weight of the value loss")
    num_ppo_epochs: int = override(4)
    score_slot: str = flag(
        "last",
        "where the score is credited: at the last token, or in a slot after the end (the original)",
        choices=("last", "after_eos"),
    )
    value_model_name_or_path: str | None = flag(
        None, "reward model or decoder to start the value model from; without it the policy"
    )
    value_warmup_steps: int = flag(0, "iterations in which only the value model learns")

    def check(self) -> None:
        super().check()
        require_positive(self, "cliprange", "cliprange_value", "value_learning_rate")
        require_between(self, gamma=(0, 1), lam=(0, 1), kl_coef=(0, 1e9))
        require_not_negative(self, "vf_coef", "value_warmup_steps")


def train(config: Config) -> None:
    """Iterates the six numbered steps of this file's head."""
    world = start(config.deterministic, config.quiet)
    config = resolve_ppo(config, world)
    base = open_rlvr(config, world)
    if config.value_model_name_or_path:
        check_value_model(base, config.value_model_name_or_path)
    longest = base.longest_prompt(config.max_seq_length, config.response_length)
    with checker(config.verifier_mode, config.verifier_module) as check:
        read = PromptReader(base.chat, config, check, fold_system=config.system_role == "fold")
        prompts, held_out = read_prompts(config, read, longest, world)
    steps = Steps(len(prompts), config.batch_size, config.num_train_epochs, config.max_steps, config.seed)
    screen.show(base, world, **describe(config, prompts, held_out, steps))
    if config.dry_run:
        world.say("the first prompt:", base.chat.tokenizer.decode(prompts[0].ids))
        show_plan("ppo", config, world, np.array([len(p.ids) for p in prompts]) + config.response_length)
        return

    run = Run(config, base, steps, world, values=as_dict(config), data=fingerprint_of(prompts), unit="iteration")
    with Pool(world.cores, config.verifier_mode, module=config.verifier_module) as pool, run:
        if run.is_finished:
            return
        policy = load_policy(base, world, models=2, temperature=config.temperature or 1.0)
        ref = reference.frozen(config.reference, base, world, policy) if config.kl_coef else None
        value_model = load_value_model(base, world, config.value_model_name_or_path, policy)
        window = max(len(prompt.ids) for prompt in prompts + held_out) + config.response_length
        sampler = sampler_beside(base, config, world, window, policy, value_model)
        collect = Collector(sampler, pool, base.chat, config, config.seed, world)
        draw = lambda by, step: by(prompts, steps.examples(step), config.num_samples_per_prompt, step)
        sample = Sampling(collect, policy, draw, run, config.rollout_ahead)
        trained = {of: (m, optim.adamw(m, config, world)) for of, m in (("policy", policy), ("value", value_model))}

        for step in run.steps(**trained):
            if step == 0:
                held_out_accuracy(sample, held_out, config, 0)
            clock = Clock()

            # 1. sample responses from the policy (`age` updates ago), and 2. verify each as soon as it ends
            drawn, age = sample(step)
            experience = experience_of(drawn, config, base.chat.response_text, config.score_slot)
            times = {"time/rollout": clock.lap()}

            # 3. evaluate them: pi_old, pi_ref and V, before any update
            now_R, entropy_R = evaluate(policy.logprobs_and_entropy, experience.tokens, config, world)
            old_R = experience.sampled_R if age else now_R
            ref_R = evaluate(ref.logprobs, experience.tokens, config, world) if ref else old_R
            values_R = evaluate(value_model, experience.slots, config, world)
            release(policy, ref, value_model)
            if step == 0:
                check_sampler(experience, old_R, config, base.dtype, world)

            # 4. rewards, advantages, returns
            counts_S = experience.slot_counts_S
            kl_R = losses.kl(old_R, ref_R, config.kl_estimator)
            rewards_R = losses.token_rewards(experience.on_slots(kl_R), experience.scores_S, counts_S, config.kl_coef)
            advantages_R, returns_R = losses.gae(rewards_R, values_R, counts_S, config.gamma, config.lam)
            advantages_R = losses.whiten(advantages_R[experience.is_token_R])
            run.stop_unless_all_finite(step, {"returns": returns_R, "advantages": advantages_R}, steps.examples(step))
            times["time/evaluate"] = clock.lap()

            # 5. several passes of clipped updates
            lr, totals = learning_rates(config, step, steps.total), Totals(world)
            for number, minibatch in enumerate(world.each("updating", minibatches(experience.all, config, step))):
                n_tokens, n_slots = experience.counts(minibatch)
                totals.add({"tokens": n_tokens / world.size, "slots": n_slots / world.size})
                if step >= config.value_warmup_steps:
                    for batch in run.micro_batches(policy, experience.tokens, minibatch, totals):
                        old = experience.tokens.of(batch, old_R, advantages_R)
                        policy_loss(policy, batch, old, n_tokens, config.cliprange, totals).backward()
                for batch in run.micro_batches(value_model, experience.slots, minibatch, totals, counted=False):
                    old = experience.slots.of(batch, values_R, returns_R)
                    loss = value_loss(value_model, batch, old, n_slots, config.cliprange_value, totals)
                    (config.vf_coef * loss).backward()
                norms = {of: optim.step(o, world, lr[of], config.max_grad_norm) for of, (_, o) in trained.items()}
                run.stop_unless_finite(step, norms, "prompts", steps.examples(step), experience.prompts_S)
                if step == number == 0:
                    check_ratio(totals.reduce(METRICS), base.dtype, world)
            times["time/update"] = clock.lap()

            # 6. the new weights reach the sampler at the top of the loop
            sums = totals.reduce((*METRICS, *run.throughput.COUNTED))
            row = means(sums) | of_responses(experience, drawn, prompts) | of_sampler(experience, now_R, age) | times
            row |= drawn.row | {"learning_rate": lr["policy"], "grad_norm": norms["policy"]}
            row |= {"grad_norm/value": norms["value"], "objective/entropy": entropy_R.mean().item()}
            row["objective/kl"] = (kl_R.sum() / len(experience)).item()
            row["val/explained_variance"] = losses.explained_variance(values_R, returns_R).item()
            run.write(step, row, sums, f"score {row['objective/scores']:.3f}, kl {row['objective/kl']:.3f}")
            if run.evaluates(step + 1):
                held_out_accuracy(sample, held_out, config, step + 1)
        run.export(policy, after("ppo", config, world, config.response_length), value=value_model)


# --- the steps of an iteration ----------------------------------------------------------------------------------------


def learning_rates(config: Config, step: int, total: int) -> dict[str, float]:
    """Of the policy and of the value model."""
    peaks = {"policy": config.learning_rate, "value": config.value_learning_rate or config.learning_rate}
    return {of: optim.learning_rate(config, step, total, peak) for of, peak in peaks.items()}


def policy_loss(
    policy: Policy, batch: MicroBatch, old: Columns, n_tokens: int, cliprange: float, totals: Totals
) -> torch.Tensor:
    """This micro-batch's part of L_policy, against `old` log-probs and advantages; adds its sums to `totals`."""
    old_logprobs_R, advantages_R = old

    def loss_of_logprobs(logprobs_R: torch.Tensor, rows: slice) -> torch.Tensor:
        loss_R = losses.ppo_policy(logprobs_R, old_logprobs_R[rows], advantages_R[rows], cliprange)
        seen = losses.diagnostics(logprobs_R, old_logprobs_R[rows], cliprange)
        totals.add({"loss/policy": loss_R, "val/ratio": seen["ratio"]})
        totals.add({f"policy/{name}": seen[name] for name in ("clipfrac", "approxkl")})
        return loss_R.sum() / n_tokens

    return policy.loss(batch, loss_of_logprobs)


def value_loss(
    value_model: ValueModel, batch: MicroBatch, old: Columns, n_slots: int, cliprange: float | None, totals: Totals
) -> torch.Tensor:
    """This micro-batch's part of L_value, against `old` values and returns; adds its sum to `totals`."""
    old_values_R, returns_R = old
    loss_R = losses.ppo_value(value_model(batch), old_values_R, returns_R, cliprange)
    totals.add({"loss/value": loss_R})
    return loss_R.sum() / n_slots


def means(sums: dict[str, float]) -> dict[str, float]:
    """Over all updates' tokens, or slots."""
    row = {name: sums[name] / max(1, sums["slots" if name == "loss/value" else "tokens"]) for name in METRICS[:-2]}
    return {"loss": row["loss/policy"]} | row


# --- before the algorithm begins --------------------------------------------------------------------------------------


def resolve_ppo(config: Config, world: World) -> Config:
    """The configuration with what was left open. Raises UserError for what cannot be."""
    config.check()  # before a model is tuned for it
    check_form(config)
    config = replace(config, verifier_module=pinned(config.verifier_module))
    defaults = DEFAULTS | {"learning_rate": 3e-6 if config.use_lora else 3e-7}
    if config.model_name_or_path is None:
        if not config.names_data and config.max_steps == -1 and config.num_train_epochs is None:
            config = replace(config, max_steps=30)
        config = replace(with_tuned_model(config, world), max_seq_length=min(config.max_seq_length, 256))
        defaults |= {"batch_size": 32, "num_samples_per_prompt": 4, "learning_rate": 1e-3, "response_length": 24}
    config = resolve(config, world, defaults=defaults, embedded_defaults={}, data="problems")
    kind = reference.resolve_reference(config.reference, config, without_lora="copy")
    return replace(config, reference=kind)


def describe(config: Config, prompts: list[Prompt], held_out: list[Prompt], steps: Steps) -> dict[str, list[str]]:
    """The rows of the first screen on the value model, the data, an iteration, and the loss."""
    row, own = screen.Row, config.verifier_module
    iteration, asked = of_sampling(config, held_out)
    reward = f"{config.verification_reward:g} x verdict, less kl_coef {config.kl_coef:g} x KL ({config.kl_estimator})"
    clipped = f"cliprange {config.cliprange:g}, value clipping {config.cliprange_value or 'off'}"
    steps_of = screen.of_steps(len(prompts), steps, "prompts", "iteration")
    training: list[str] = [
        iteration,
        row("reward", reward),
        row("loss", f"gamma {config.gamma:g}, lambda {config.lam:g}, {clipped}"),
        *screen.of_training(config, config.output_dir, steps),
    ]
    return {
        "model": [row("value model", config.value_model_name_or_path or "from the policy, with a head of zeros")],
        "data": [screen.of_prompts([p.verifier for p in prompts]), asked, steps_of],
        "training": [*([row("verifier", f"verifier of your own: {own}")] if own else []), *training],
    }


if __name__ == "__main__":
    main(lambda: each_seed(train, parse(Config, elsewhere=commands)))
