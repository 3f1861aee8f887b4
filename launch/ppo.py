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
sampling one step stale, whitening per rank, means of micro-batch means.

With no argument it fine-tunes the embedded tiny model on sums of which half are wrong, and reinforces the right ones.

S responses · R response tokens (or slots) of all of them, end to end.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

import losses
from engine.config import as_dict, parse
from engine.data import MicroBatch, Prompt, PromptReader, Steps, fingerprint_of, permutation, read_prompts
from engine.errors import UserError
from engine.flags import (
    PromptFlags,
    ReferenceFlags,
    SamplingFlags,
    StageFlags,
    flag,
    override,
    require_between,
    require_not_negative,
    require_positive,
)
from engine.log import Totals
from engine.model import (
    Policy,
    ValueModel,
    check_value_model,
    load_policy,
    load_value_model,
    open_model,
    release,
    rounding,
)
from engine.train import Clock, Run, interval, optim, reference, screen
from engine.world import World, main, start
from launch.resolve import after, checker, commands, each_seed, pinned, resolve, show_plan, with_tuned_model
from rollout import Collector, Experience, Rollout, Sampler, evaluate
from verifiers import MAX_ERROR_RATE, MODES, Pool, Verdict

DEFAULTS = {"batch_size": 224, "num_samples_per_prompt": 1, "num_train_epochs": 1, "response_length": 1024}
Columns = list[torch.Tensor]  # two numbers of every token, or of every slot
EVALUATION = 1_000_003  # added to the seed: held-out responses are other draws than the training's
METRICS = ("loss/policy", "loss/value", "val/ratio", "policy/clipfrac", "policy/approxkl", "tokens", "slots")


@dataclass(frozen=True, kw_only=True)
class Config(StageFlags, PromptFlags, ReferenceFlags, SamplingFlags):
    __doc__ = __doc__
    output_dir: str = override("output/ppo")
    batch_size: int = override(None, "prompts per iteration, whatever the machine; 224, embedded 32")
    num_samples_per_prompt: int = override(None, "responses per prompt; 1, embedded 4")
    learning_rate: float = override(
        None, "peak, of the policy; 3e-7 (Tülu 3 8B), with adapters 3e-6, for the embedded model 1e-3"
    )
    value_learning_rate: float | None = flag(None, "peak, of the value model; without it the policy's")
    num_train_epochs: int = override(None, "passes over the data; 1, embedded: 30 iterations")
    warmup_ratio: float = override(0.0)
    temperature: float = override(1.0, "of sampling, and of all log-probs")
    verifier_mode: str = override("default", choices=MODES)
    kl_coef: float = flag(0.05, "weight of the KL penalty in the reward (0: no reference is loaded)")
    reference: str = override(
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
    eval_samples: int = flag(4, "samples per held-out prompt")

    def check(self) -> None:
        super().check()
        self.check_prompts()
        self.check_sampling()
        require_positive(self, "num_samples_per_prompt", "cliprange", "cliprange_value", "num_ppo_epochs")
        require_positive(self, "num_mini_batches", "eval_samples", "value_learning_rate")
        require_between(self, gamma=(0, 1), lam=(0, 1), kl_coef=(0, 1e9))
        require_not_negative(self, "vf_coef", "value_warmup_steps")


def train(config: Config) -> None:
    """Iterates the six numbered steps of this file's head."""
    world = start(config.deterministic, config.quiet)
    config = resolve_ppo(config, world)
    keep_initial = config.reference == "adapter" and config.kl_coef != 0
    base = open_model(config, world, memory=config, adapters=config, keep_initial=keep_initial)
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
    with run, Pool(world.cores, config.verifier_mode, module=config.verifier_module) as pool:
        if run.is_finished:
            return
        policy = load_policy(base, world, models=2, temperature=config.temperature or 1.0)
        ref = reference.frozen(config.reference, base, world, policy) if config.kl_coef else None
        value_model = load_value_model(base, world, config.value_model_name_or_path, policy)
        window = max(len(prompt.ids) for prompt in prompts + held_out) + config.response_length
        sampler = Sampler(base.config, policy, world, dtype=base.dtype, max_length=window, slots=config.rollout_slots)
        collect = Collector(sampler, pool, base.chat, config, config.seed, world)
        roots = {"policy": policy, "value": value_model}
        trained = {of: (root, optim.adamw(root, config, world)) for of, root in roots.items()}

        for step in run.steps(**trained):
            if step == 0:
                held_out_accuracy(collect, policy, held_out, config, run, 0)
            clock = Clock()

            # 1. sample responses from the policy, and 2. verify each as soon as it ends
            sampler.load(policy)
            examples = steps.examples(step)
            rollouts, verdicts = collect(prompts, examples, config.num_samples_per_prompt, step)
            experience = experience_of(rollouts, verdicts, config)
            sampler.release()  # its cache makes room for activations
            times = {"time/rollout": clock.lap()}

            # 3. evaluate them: pi_old, pi_ref and V, before any update
            old_R, entropy_R = evaluate(policy.logprobs_and_entropy, experience.tokens, config, world)
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
            times["time/evaluate"] = clock.lap()

            # 5. several passes of clipped updates
            lr, totals = learning_rates(config, step, steps.total), Totals(world)
            for number, minibatch in enumerate(world.each("updating", minibatches(len(experience), config, step))):
                n_tokens, n_slots = experience.counts(minibatch)
                totals.add({"tokens": n_tokens / world.size, "slots": n_slots / world.size})
                if step >= config.value_warmup_steps:
                    for batch in run.micro_batches(policy, experience.tokens, minibatch, totals):
                        old = experience.tokens.of(batch, old_R, advantages_R)
                        policy_loss(policy, batch, old, n_tokens, config.cliprange, totals).backward()
                for batch in run.micro_batches(value_model, experience.slots, minibatch):
                    old = experience.slots.of(batch, values_R, returns_R)
                    loss = value_loss(value_model, batch, old, n_slots, config.cliprange_value, totals)
                    (config.vf_coef * loss).backward()
                norms = {of: optim.step(o, world, lr[of], config.max_grad_norm) for of, (_, o) in trained.items()}
                run.stop_unless_finite(step, norms, "prompts", examples)
                if step == number == 0:
                    check_ratio(totals.reduce(METRICS), base.dtype, world)
            times["time/update"] = clock.lap()

            # 6. the new weights reach the sampler at the top of the loop
            sums = totals.reduce((*METRICS, *run.throughput.COUNTED))
            row = summary(sums, experience, rollouts, verdicts, prompts) | times | {"learning_rate": lr["policy"]}
            row |= {"grad_norm": norms["policy"], "grad_norm/value": norms["value"]}
            row |= {"objective/kl": (kl_R.sum() / len(experience)).item(), "objective/entropy": entropy_R.mean().item()}
            row["val/explained_variance"] = losses.explained_variance(values_R, returns_R).item()
            run.write(step, row, sums, f"score {row['objective/scores']:.3f}, kl {row['objective/kl']:.3f}")
            if run.evaluates(step + 1):
                held_out_accuracy(collect, policy, held_out, config, run, step + 1)
        run.export(policy, after("ppo", config, world, config.response_length), value=value_model)


# --- the steps of an iteration ----------------------------------------------------------------------------------------


def experience_of(rollouts: list[Rollout], verdicts: list[Verdict], config: Config) -> Experience:
    """The responses that have a verdict, with their scores. Raises UserError if more than 1 % have none."""
    errors = [verdict.reason for verdict in verdicts if verdict.status == "error"]
    if len(errors) > MAX_ERROR_RATE * len(verdicts):
        raise UserError(f"{len(errors)} of {len(verdicts)} responses could not be verified, the first: {errors[0]}")
    judged = [(r, v) for r, v in zip(rollouts, verdicts, strict=True) if v.status == "ok"]
    scores = [config.verification_reward * verdict.score for _, verdict in judged]
    if config.missing_eos_penalty is not None:
        penalty = config.missing_eos_penalty
        scores = [penalty if r.finish_reason == "length" else x for (r, _), x in zip(judged, scores, strict=True)]
    after_end = config.score_slot == "after_eos"
    responses = [rollout for rollout, _ in judged]
    return Experience(responses, scores, slot_after_end=after_end, response_length=config.response_length)


def minibatches(n: int, config: Config, step: int) -> list[np.ndarray]:
    """The responses of every optimizer step of the iteration: a permutation per pass, cut into --num_mini_batches."""
    count = min(config.num_mini_batches, n)
    orders = [permutation(n, config.seed, "ppo", step, epoch) for epoch in range(config.num_ppo_epochs)]
    return [minibatch for order in orders for minibatch in np.array_split(order, count)]


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


def summary(
    sums: dict[str, float],
    experience: Experience,
    rollouts: list[Rollout],
    verdicts: list[Verdict],
    prompts: list[Prompt],
) -> dict[str, float]:
    """One row of metrics: means over the iteration's responses, and over all its updates' tokens or slots."""
    row = {name: sums[name] / max(1, sums["slots" if name == "loss/value" else "tokens"]) for name in METRICS[:-2]}
    verified: dict[str, list[float]] = {}
    for rollout, verdict in zip(rollouts, verdicts, strict=True):
        if verdict.status == "ok":
            verified.setdefault(prompts[rollout.example].verifier, []).append(verdict.score)
    row |= {f"verified/{name}": float(np.mean(scores)) for name, scores in verified.items()}
    return row | {
        "loss": row["loss/policy"],
        "objective/scores": experience.scores_S.mean().item(),
        "rollout/length": float(np.mean([len(r.response_ids) for r in rollouts])),
        "rollout/stop_rate": float(np.mean([r.finish_reason == "stop" for r in rollouts])),
        "rollout/errors": sum(v.status == "error" for v in verdicts),
    }


def held_out_accuracy(
    collect: Collector, policy: Policy, held_out: list[Prompt], config: Config, run: Run, done: int
) -> None:
    """Verified accuracy on the held-out prompts with a 95 % interval (engine/train/interval.py), and a few responses
    with their verdicts.
    """
    if not held_out:
        return
    collect.sampler.load(policy)
    everyone, samples = np.arange(len(held_out)), config.eval_samples
    rollouts, verdicts = collect(held_out, everyone, samples, done, seed=config.seed + EVALUATION, shown="held out: ")
    scores_NK = np.array([v.score if v.status == "ok" else np.nan for v in verdicts]).reshape(-1, samples)
    scores_NK /= np.array([[prompt.best_score] for prompt in held_out])
    accuracy, low, high = interval.accuracy(scores_NK)
    if np.isnan(accuracy):
        raise UserError(f"no held-out prompt could be verified, the first: {verdicts[0].reason}")
    length = float(np.mean([len(r.response_ids) for r in rollouts]))
    between = f"95 % interval {low:.1%} to {high:.1%}, {np.isfinite(scores_NK).sum()} responses"
    lines = [f"held out, after iteration {done}: verified {accuracy:.1%} ({between})"]
    decode, shown = run.base.chat.tokenizer.decode, []
    for rollout, verdict in list(zip(rollouts, verdicts, strict=True))[:: max(1, len(rollouts) // 4)][:4]:
        prompt, text = decode(rollout.prompt_ids), decode(rollout.response_ids)
        lines.append(f"  {verdict.score:g} ({verdict.reason[:80]}): {text[:160]!r}")
        shown.append({"prompt": prompt, "response": text, "score": verdict.score, "reason": verdict.reason})
    run.write_evaluation(done, {"accuracy": accuracy, "low": low, "high": high, "length": length}, *lines)
    run.write_samples(done, shown)


# --- identities of a fresh run ----------------------------------------------------------------------------------------


def check_sampler(
    experience: Experience, old_R: torch.Tensor, config: SamplingFlags, dtype: torch.dtype, world: World
) -> None:
    """The sampler's log-probs are the trainer's, on average, up to what rounding can do to them. Raises UserError."""
    if config.top_k or config.top_p < 1 or config.temperature == 0:
        world.say(
            "the policy is not what was sampled from (temperature 0, --top_k or --top_p): log-probs are of the whole"
            " distribution"
        )
        return
    sampled_R = torch.as_tensor(np.concatenate([r.logprobs for r in experience.rollouts])).double()
    difference_R = (sampled_R - old_R).abs()
    mean, most = difference_R.mean().item(), difference_R.max().item()
    bound = rounding(dtype) * max(1.0, old_R.abs().mean().item())
    world.say(
        f"step 0: sampler's and trainer's log-probs differ by {mean:.1e} on average, {most:.1e} at most; rounding"
        f" allows {bound:.1e} on average"
    )
    if not mean <= bound:
        found = f"log-probs differ by {mean:.1e}, allowed {bound:.1e}"
        raise UserError(f"step 0: the sampler is not the policy ({found})")


def check_ratio(sums: dict[str, float], dtype: torch.dtype, world: World) -> None:
    """In the first update the policy is still pi_old: the ratio is 1. Raises UserError."""
    if not sums["val/ratio"]:  # the value model's warm-up: no policy update
        return
    off, bound = abs(sums["val/ratio"] / sums["tokens"] - 1), rounding(dtype)
    world.say(f"step 0: mean ratio of the first update off 1 by {off:.1e}, rounding allows {bound:.1e}")
    if not off <= bound:
        raise UserError(f"step 0: the first update's ratio is off 1 by {off:.1e}, allowed {bound:.1e}")


# --- before the algorithm begins --------------------------------------------------------------------------------------


def resolve_ppo(config: Config, world: World) -> Config:
    """The configuration with what was left open. Raises UserError for what cannot be."""
    config.check()  # before a model is tuned for it
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
    asked = f"{len(held_out):,} prompts, {config.eval_samples} responses to each" if held_out else screen.NONE
    sampled = f"{config.num_samples_per_prompt} responses to each prompt, of at most {config.response_length} tokens"
    reward = f"{config.verification_reward:g} x verdict, less kl_coef {config.kl_coef:g} x KL ({config.kl_estimator})"
    clipped = f"cliprange {config.cliprange:g}, value clipping {config.cliprange_value or 'off'}"
    steps_of = screen.of_steps(len(prompts), steps, "prompts", "iteration")
    training: list[str] = [
        row("iteration", f"{sampled}; {config.num_ppo_epochs} x {config.num_mini_batches} updates"),
        row("reward", reward),
        row("loss", f"gamma {config.gamma:g}, lambda {config.lam:g}, {clipped}"),
        *screen.of_training(config, config.output_dir, steps),
    ]
    return {
        "model": [row("value model", config.value_model_name_or_path or "from the policy, with a head of zeros")],
        "data": [screen.of_prompts([p.verifier for p in prompts]), row("held out", asked), steps_of],
        "training": [*([row("verifier", f"verifier of your own: {own}")] if own else []), *training],
    }


if __name__ == "__main__":
    main(lambda: each_seed(train, parse(Config, elsewhere=commands)))
