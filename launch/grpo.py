"""Reinforcement learning with verifiable rewards, by GRPO and kin. torchrun --nproc_per_node 8 -m launch.grpo --help

An iteration samples a group of K responses to each prompt from the policy pi, has a program verify them, and takes
clipped policy updates on them. What a response is worth is what its reward r_i is above that of its group: there is no
value model.

    A_i = ( r_i - mean r ) / ( std r + 1e-6 )                                                  over the group of i
    L   = sum_i sum_t w_t [ max( - A_i rho_t, - A_i clip(rho_t, 1 - low, 1 + high) ) + kl_coef KL_t - entropy_coef H_t ]
    rho_t = pi(y_t) / pi_old(y_t)

The weights w_t make a mean over the mini-batch, of all ranks, and are known before its first forward: --aggregate token
is 1 / N for its N tokens. --advantage names the baseline: grpo, dr_grpo (no deviation), rloo (the others' mean) or
reinforce_pp (no group, the batch whitened); --surrogate how far an update goes: clip, cispo or gspo. Recipes, with
`python -m launch.grpo --config launch/recipes/NAME`: tulu3.1_8b_grpo.yaml, dapo_32b_grpo.yaml, one_node_8b_grpo.yaml,
one_card_1b_lora_grpo.yaml. A step is an iteration: --batch_size prompts times --num_samples_per_prompt responses, then
all updates. Left out on purpose: curricula by observed accuracy, sampling with weights that are older than the policy.

With no argument it fine-tunes the embedded tiny model on sums of which half are wrong, and reinforces the right ones.

S responses · G groups · R response tokens of all responses, end to end.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

import losses
from engine.config import as_dict, parse
from engine.data import MicroBatch, Prompt, PromptReader, Steps, fingerprint_of, read_prompts, sum_by_sequence
from engine.errors import UserError
from engine.flags import RlvrFlags, fill, flag, override, require_between, require_not_negative, require_positive
from engine.log import Totals
from engine.model import Policy, load_policy, release
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
    Experience,
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
    sample_groups,
)
from verifiers import MODES, Pool

DEFAULTS = {"batch_size": 48, "num_samples_per_prompt": 16, "num_train_epochs": 1, "response_length": 1024}
CLIPS = {"clip": (0.2, 0.2), "cispo": (1.0, 4.0), "gspo": (3e-4, 4e-4)}  # --clip_low, --clip_high: of each paper
ADVANTAGES = {"grpo": losses.grpo_advantages, "dr_grpo": losses.dr_grpo_advantages, "rloo": losses.rloo_advantages}
METRICS = ("loss/policy", "loss/kl", "val/ratio", "policy/clipfrac", "policy/approxkl", "tokens", "updates")
OF_A_TOKEN = METRICS[2:5]  # the others are weighted means of an update


@dataclass(frozen=True, kw_only=True)
class Config(RlvrFlags):
    __doc__ = __doc__
    output_dir: str = override("output/grpo")
    batch_size: int = override(None, "prompts per iteration, whatever the machine; 48 (Tülu 3.1), embedded 32")
    num_samples_per_prompt: int = override(None, "responses per prompt, a group; 16, embedded 8")
    learning_rate: float = override(None, "peak; 5e-7 (Tülu 3.1 8B), with adapters 5e-6, for the embedded model 1e-3")
    lr_scheduler_type: str = override("constant")
    verifier_mode: str = override("default", choices=MODES)
    advantage: str = flag(
        "grpo",
        "a reward less its group's mean, over the deviation (grpo) or not (dr_grpo); less the others' mean (rloo); or"
        " whitened over the batch (reinforce_pp)",
        choices=(*ADVANTAGES, "reinforce_pp"),
    )
    surrogate: str = flag(
        "clip",
        "how far an update goes: until a token's ratio leaves the range (clip), or its response's (gspo); with a"
        " clipped weight (cispo)",
        choices=tuple(CLIPS),
    )
    clip_low: float = flag(None, "the ratio is clipped at 1 - this; clip 0.2, cispo 1 (off), gspo 3e-4")
    clip_high: float = flag(None, "and at 1 + this; clip 0.2 (DAPO: 0.28), cispo 4, gspo 4e-4")
    dual_clip: float | None = flag(None, "bound on the ratio where the advantage is negative, greater than 1 (3)")
    aggregate: str = flag(
        "token",
        "the mean: every token alike, every response alike (the first GRPO), or divided by --response_length (dr_grpo)",
        choices=("token", "sequence", "dr_grpo"),
    )
    kl_coef: float = flag(0.0, "weight of the KL divergence to pi_ref (Tülu 3.1: 0.01; 0: no reference is loaded)")
    kl_in: str = flag(
        "auto",
        "where it stands: in the loss (auto, with --kl_coef) or in the reward",
        choices=("auto", "loss", "reward", "none"),
    )
    kl_estimator: str = flag(
        None,
        "loss: k3 (the default), k2 or unbiased; reward: k1 (the default), k2 or k3",
        choices=("k1", "k2", "k3", "unbiased"),
    )
    entropy_coef: float = flag(0.0, "weight of an entropy bonus (costs another product with the head)")
    tis_cap: float | None = flag(
        None, "weigh tokens by policy over sampler, up to this (truncated importance sampling)"
    )
    num_ppo_epochs: int = override(1, "passes over an iteration's responses (GRPO's mu)")
    dynamic_sampling: int = flag(
        0, "draw up to so many more times, other prompts in place of groups that are all right or all wrong (DAPO)"
    )
    mask_truncated: bool = flag(False, "responses without an end are not learnt from, only compared with")

    def check(self) -> None:
        super().check()
        require_positive(self, "clip_low", "clip_high", "tis_cap")
        require_not_negative(self, "entropy_coef", "dynamic_sampling")
        require_between(self, kl_coef=(0, 1e9))
        self.check_group()
        self.check_kl()

    def check_group(self) -> None:
        """Raises UserError for groups and rewards that cannot be."""
        if self.num_samples_per_prompt == 1 and self.advantage != "reinforce_pp":
            raise UserError(
                f"--num_samples_per_prompt 1: --advantage {self.advantage} compares the responses to one prompt and"
                " needs at least 2 (--advantage reinforce_pp needs no group, launch.ppo has a value model)"
            )
        if self.dual_clip is not None and self.surrogate == "cispo":
            raise UserError("--dual_clip is not read by --surrogate cispo")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise UserError(f"--dual_clip must be greater than 1, got {self.dual_clip:g}")
        if self.rollout_ahead and self.tis_cap is not None:
            raise UserError("--tis_cap is not read with --rollout_ahead 1: pi_old is then the sampler's own")
        responses = (self.batch_size or 0) * (self.num_samples_per_prompt or 0)  # 0: not filled in yet
        if responses % self.num_mini_batches:
            raise UserError(
                f"--num_mini_batches {self.num_mini_batches} does not divide the {responses} responses of an iteration"
                f" ({self.batch_size} x {self.num_samples_per_prompt})"
            )

    def check_kl(self) -> None:
        """Raises UserError for a KL divergence without a weight, a place or an estimator."""
        if self.kl_coef and self.kl_in == "none":
            raise UserError(f"--kl_coef {self.kl_coef:g} is not read with --kl_in none")
        if not self.kl_coef and self.kl_in in ("loss", "reward"):
            raise UserError(f"--kl_in {self.kl_in} needs a --kl_coef greater than 0: without it no reference is loaded")
        if not self.kl_coef and (self.kl_estimator is not None or self.reference != "auto"):
            name = "reference" if self.kl_estimator is None else "kl_estimator"
            raise UserError(f"--{name} is not read without --kl_coef: no reference is loaded")
        in_reward = self.kl_in == "reward"
        if in_reward and self.kl_estimator == "unbiased":
            raise UserError("--kl_estimator unbiased is a loss: in the reward it is k1, k2 or k3")
        if self.kl_coef and not in_reward and self.kl_estimator == "k1":
            raise UserError(
                "--kl_estimator k1 has no gradient on average in the loss: k2, k3 or unbiased, or --kl_in reward"
            )

    def with_loss(self) -> "Config":
        """With the surrogate's own clip range, and the place and estimator of a KL divergence, if there is one."""
        low, high = CLIPS[self.surrogate]
        kl_in = ("loss" if self.kl_coef else "none") if self.kl_in == "auto" else self.kl_in
        config = fill(replace(self, kl_in=kl_in), clip_low=low, clip_high=high)
        return fill(config, kl_estimator="k1" if kl_in == "reward" else "k3") if self.kl_coef else config


def train(config: Config) -> None:
    """Iterates the six numbered steps of this file's head."""
    world = start(config.deterministic, config.quiet)
    config = resolve_grpo(config, world)
    base = open_rlvr(config, world)
    longest = base.longest_prompt(config.max_seq_length, config.response_length)
    with checker(config.verifier_mode, config.verifier_module) as check:
        read = PromptReader(base.chat, config, check, fold_system=config.system_role == "fold")
        prompts, held_out = read_prompts(config, read, longest, world)
    steps = Steps(len(prompts), config.batch_size, config.num_train_epochs, config.max_steps, config.seed)
    screen.show(base, world, **describe(config, prompts, held_out, steps))
    if config.dry_run:
        world.say("the first prompt:", base.chat.tokenizer.decode(prompts[0].ids))
        show_plan("grpo", config, world, np.array([len(p.ids) for p in prompts]) + config.response_length)
        return

    run = Run(config, base, steps, world, values=as_dict(config), data=fingerprint_of(prompts), unit="iteration")
    with Pool(world.cores, config.verifier_mode, module=config.verifier_module) as pool, run:
        if run.is_finished:
            return
        policy = load_policy(base, world, temperature=config.temperature or 1.0)
        ref = reference.frozen(config.reference, base, world, policy) if config.kl_coef else None
        window = max(len(prompt.ids) for prompt in prompts + held_out) + config.response_length
        sampler = sampler_beside(base, config, world, window, policy)
        collect = Collector(sampler, pool, base.chat, config, config.seed, world)
        draw = lambda by, step: sample_groups(by, prompts, steps.examples(step), config, step, config.dynamic_sampling)
        sample = Sampling(collect, policy, draw, run, config.rollout_ahead)
        optimizer = optim.adamw(policy, config, world)

        for step in run.steps(policy=(policy, optimizer)):
            if step == 0:
                held_out_accuracy(sample, held_out, config, 0)
            clock = Clock()

            # 1. sample a group of responses to each prompt (`age` updates ago), and 2. verify each as soon as it ends
            drawn, age = sample(step)
            experience = experience_of(drawn, config, base.chat.response_text)
            times = {"time/rollout": clock.lap()}

            # 3. evaluate them: pi_old and pi_ref, before any update
            now_R, entropy_R = evaluate(policy.logprobs_and_entropy, experience.tokens, config, world)
            old_R = experience.sampled_R if age else now_R
            ref_R = evaluate(ref.logprobs, experience.tokens, config, world) if ref else old_R
            release(policy, ref)
            if step == 0:
                check_sampler(experience, old_R, config, base.dtype, world)

            # 4. advantages: what a response is above the others to its prompt
            advantages_R = advantages_of(experience, old_R, ref_R, config)
            run.stop_unless_all_finite(
                step, {"scores": experience.scores_S, "advantages": advantages_R}, steps.examples(step)
            )
            times["time/evaluate"] = clock.lap()

            # 5. clipped updates, on the responses that are learnt from
            lr, totals, norm = optim.learning_rate(config, step, steps.total, config.learning_rate), Totals(world), 0.0
            counts_S, learnt = experience.token_counts_S, learnt_from(experience, config)
            moves = has_gradient(experience, advantages_R, config)
            for number, minibatch in enumerate(world.each("updating", minibatches(learnt, config, step))):
                weights_S = torch.zeros(len(experience), dtype=torch.float64)
                weights_S[minibatch] = losses.token_weights(
                    counts_S[minibatch], config.aggregate, config.response_length
                )
                columns = (old_R, advantages_R, ref_R, experience.on_tokens(weights_S))
                moving = minibatch[moves[minibatch]]
                totals.add({"tokens": experience.counts(moving)[0] / world.size, "updates": 1 / world.size})
                for batch in run.micro_batches(policy, experience.tokens, moving, totals):
                    group_loss(policy, batch, experience.tokens.of(batch, *columns), config, totals).backward()
                norm = optim.step(optimizer, world, lr, config.max_grad_norm)
                run.stop_unless_finite(step, {"grad_norm": norm}, "prompts", steps.examples(step), experience.prompts_S)
                if step == number == 0:
                    check_ratio(totals.reduce(METRICS), base.dtype, world)
            times["time/update"] = clock.lap()

            # 6. the new weights reach the sampler at the top of the loop
            sums = totals.reduce((*METRICS, *run.throughput.COUNTED))
            row = means(sums) | of_responses(experience, drawn, prompts) | drawn.row | times
            row |= of_sampler(experience, now_R, age, config.tis_cap)
            row |= {"objective/kl": ((old_R - ref_R).sum() / len(experience)).item()} if ref else {}
            row |= {"learning_rate": lr, "grad_norm": norm, "objective/entropy": entropy_R.mean().item()}
            row["rollout/masked"] = len(experience) - len(learnt)
            run.write(step, row, sums, f"score {row['objective/scores']:.3f}, signal {row['groups/signal']:.0%}")
            if run.evaluates(step + 1):
                held_out_accuracy(sample, held_out, config, step + 1)
        run.export(policy, after("grpo", config, world, config.response_length))


# --- the steps of an iteration ----------------------------------------------------------------------------------------


def advantages_of(experience: Experience, old_R: torch.Tensor, ref_R: torch.Tensor, config: Config) -> torch.Tensor:
    """The advantage of every token; all of a response have the same, but for a KL penalty under reinforce_pp."""
    scores_S, counts_S = experience.scores_S, experience.token_counts_S
    penalty_R = torch.zeros_like(old_R)
    if config.kl_in == "reward":
        penalty_R = config.kl_coef * losses.kl(old_R, ref_R, config.kl_estimator)
    if config.advantage == "reinforce_pp":
        rewards_R = losses.token_rewards(penalty_R, scores_S, counts_S, kl_coef=1.0)
        advantages_R = losses.reinforce_pp_advantages(rewards_R, counts_S)
    else:
        rewards_S = scores_S - sum_by_sequence(penalty_R, counts_S)
        advantages_R = experience.on_tokens(ADVANTAGES[config.advantage](rewards_S, experience.prompts_S))
    if config.tis_cap is None:
        return advantages_R
    return advantages_R * losses.truncated_ratio(old_R, experience.sampled_R, config.tis_cap)


def learnt_from(experience: Experience, config: Config) -> np.ndarray:
    """The responses that count in the loss, in numerator and denominator alike."""
    ended = [r.finish_reason == "stop" or not config.mask_truncated for r in experience.rollouts]
    return np.flatnonzero(ended)


def has_gradient(experience: Experience, advantages_R: torch.Tensor, config: Config) -> np.ndarray:
    """Of each response, whether anything follows from it: one without an advantage counts in the mean and is not
    computed, unless its KL divergence or its entropy is part of the loss.
    """
    if config.kl_in == "loss" or config.entropy_coef:
        return np.ones(len(experience), bool)
    return (sum_by_sequence(advantages_R.abs(), experience.token_counts_S) > 0).numpy()


def group_loss(
    policy: Policy, batch: MicroBatch, columns: list[torch.Tensor], config: Config, totals: Totals
) -> torch.Tensor:
    """This micro-batch's part of L; `columns` are pi_old, advantages, pi_ref and weights. Adds its sums to `totals`."""
    low, high, whole_responses = config.clip_low, config.clip_high, config.surrogate == "gspo"

    def loss_of_logprobs(logprobs_R: torch.Tensor, part: slice) -> torch.Tensor:
        rows = slice(batch.cuts[part.start], batch.cuts[part.stop]) if whole_responses else part
        old_R, advantages_R, ref_R, weights_R = (x_R[rows] for x_R in columns)
        moved_R = losses.gspo_logprobs(logprobs_R, old_R, batch.counts_S[part]) if whole_responses else logprobs_R
        if config.surrogate == "cispo":
            loss_R = losses.cispo(logprobs_R, old_R, advantages_R, low, high)
        else:
            loss_R = losses.clipped_surrogate(moved_R, old_R, advantages_R, low, high, config.dual_clip)
        seen = losses.diagnostics(moved_R, old_R, low, high)
        totals.add({"loss/policy": weights_R * loss_R, "val/ratio": seen["ratio"]})
        totals.add({f"policy/{name}": seen[name] for name in ("clipfrac", "approxkl")})
        if config.kl_in == "loss":
            kl_R = losses.kl_loss(logprobs_R, old_R, ref_R, config.kl_estimator)
            totals.add({"loss/kl": weights_R * kl_R})
            loss_R = loss_R + config.kl_coef * kl_R
        return (weights_R * loss_R).sum()

    if not config.entropy_coef:
        return policy.loss(batch, loss_of_logprobs, sequences_per_group=1 if whole_responses else None)
    logprobs_R, entropy_R = policy.logprobs_and_entropy(batch)
    loss = loss_of_logprobs(logprobs_R, slice(0, len(batch.cuts) - 1 if whole_responses else len(logprobs_R)))
    return loss - config.entropy_coef * (columns[3] * entropy_R).sum()


def means(sums: dict[str, float]) -> dict[str, float]:
    """Over the tokens of all updates, or over the updates, which are means already."""
    per = {name: "tokens" if name in OF_A_TOKEN else "updates" for name in METRICS[:-2]}
    row = {name: sums[name] / max(1, sums[of]) for name, of in per.items()}
    return {"loss": row["loss/policy"]} | row


# --- before the algorithm begins --------------------------------------------------------------------------------------


def resolve_grpo(config: Config, world: World) -> Config:
    """The configuration with what was left open. Raises UserError for what cannot be."""
    config.check()  # before a model is tuned for it
    check_form(config)
    config = replace(config, verifier_module=pinned(config.verifier_module))
    config = config.with_loss()
    defaults = DEFAULTS | {"learning_rate": 5e-6 if config.use_lora else 5e-7}
    if config.model_name_or_path is None:
        if not config.names_data and config.max_steps == -1 and config.num_train_epochs is None:
            config = replace(config, max_steps=30)
        config = replace(with_tuned_model(config, world), max_seq_length=min(config.max_seq_length, 256))
        defaults |= {"batch_size": 32, "num_samples_per_prompt": 8, "learning_rate": 1e-3, "response_length": 24}
    config = resolve(config, world, defaults=defaults, embedded_defaults={}, data="problems")
    config.check()  # with what was filled in
    if not config.kl_coef:
        return config
    return replace(config, reference=reference.resolve_reference(config.reference, config, without_lora="copy"))


def describe(config: Config, prompts: list[Prompt], held_out: list[Prompt], steps: Steps) -> dict[str, list[str]]:
    """The rows of the first screen on the data, an iteration, and the loss."""
    row, own = screen.Row, config.verifier_module
    iteration, asked = of_sampling(config, held_out)
    kl = f"kl_coef {config.kl_coef:g} ({config.kl_estimator}) in the {config.kl_in}" if config.kl_coef else "no KL"
    loss = f"{config.surrogate} at -{config.clip_low:g} and +{config.clip_high:g}, mean by {config.aggregate}, {kl}"
    training: list[str] = [
        iteration,
        row("advantage", f"{config.advantage} of {config.verification_reward:g} x verdict"),
        row("loss", loss),
        *screen.of_training(config, config.output_dir, steps),
    ]
    steps_of = screen.of_steps(len(prompts), steps, "prompts", "iteration")
    return {
        "data": [screen.of_prompts([p.verifier for p in prompts]), asked, steps_of],
        "training": [*([row("verifier", f"verifier of your own: {own}")] if own else []), *training],
    }


if __name__ == "__main__":
    main(lambda: each_seed(train, parse(Config, elsewhere=commands)))
