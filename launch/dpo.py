"""Length-normalised DPO over cached reference log-probs.        torchrun --nproc_per_node 8 -m launch.dpo --help

    L = - (1/N) sum over pairs of log sigma( beta [ r(w) - r(l) ] ),    r(y) = ( log pi(y|x) - log pi_ref(y|x) ) / |y|

w is the chosen and l the rejected answer to prompt x; |y| counts the trained tokens of y (content and end of turn).
pi_ref is the policy before its first update: its log-probs are numbers in a cache, computed once, and there is no
second model. With adapters (--use_lora) the frozen model is there anyway, and --reference base or adapter asks it in
every step instead. --loss_type picks another loss of losses/preference.py or losses/preference_variants.py.

With no argument it trains an embedded tiny model on embedded preferences, in about a minute on two CPU cores.

P pairs of a chunk · S sequences of a micro-batch (chosen, rejected, chosen, ...) · R counted tokens.
"""

import dataclasses
import inspect
from collections.abc import Callable

import numpy as np
import torch

import losses
from engine.config import as_dict, parse
from engine.data import Examples, MicroBatch, Steps, read_pairs, sum_by_sequence
from engine.errors import UserError, nearest
from engine.flags import PairFlags, ReferenceFlags, StageFlags, flag, override
from engine.log import Totals
from engine.model import Base, Policy, load_policy, open_model
from engine.train import Run, interval, optim, refcache, reference, screen
from engine.world import World, main, start
from launch.resolve import after, commands, each_seed, resolve, show_plan

LOSSES = {"dpo_norm": losses.dpo_norm, "dpo": losses.dpo, "simpo": losses.simpo, "ipo": losses.ipo, "wpo": losses.wpo}
ALSO_KNOWN_AS = {"dpo_n": "dpo_norm", "sigmoid_norm": "dpo_norm", "sigmoid": "dpo"}
REFERENCE_FREE = ("simpo",)
DEFAULTS: dict[str, int] = {}
HYPER = ("beta", "gamma_beta_ratio", "label_smoothing")
METRICS = (
    *("loss", "nll", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
    *("logps/chosen", "logps/rejected", "logps/accuracies"),
)
Reference = Callable[[MicroBatch], torch.Tensor]  # sum log pi_ref of every sequence, (S,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(StageFlags, PairFlags, ReferenceFlags):
    __doc__ = __doc__
    output_dir: str = override("output/dpo")
    loss_type: str = flag(
        "dpo_norm", f"one of {', '.join(LOSSES)} (also {', '.join(f'{a} = {b}' for a, b in ALSO_KNOWN_AS.items())})"
    )
    beta: float = flag(None, "strength of the preference; by loss: dpo_norm 5, dpo, ipo and wpo 0.1, simpo 2.5")
    gamma_beta_ratio: float | None = flag(None, "simpo only: the margin over beta; 0.3")
    label_smoothing: float | None = flag(None, "probability that a label is flipped (dpo_norm, dpo, simpo, wpo); 0")
    rpo_alpha: float = flag(0.0, "coefficient of the chosen answer's mean negative log-likelihood, added to the loss")
    count_turns: str = flag(
        "last", "tokens counted: of the last assistant turn, or of all (the original's)", choices=("last", "all")
    )
    batch_size: int = override(32, "pairs per optimizer step, whatever the machine")
    learning_rate: float = override(None, "peak; 5e-7 (Tülu 3 8B), with adapters 5e-6, for the embedded model 1e-3")
    reference: str = override(
        "auto",
        "log pi_ref from the cache (auto), or in every step from the frozen base or adapter under the trained one, or"
        " from a copy",
    )
    cache_logprobs_only: bool = flag(False, "fill the reference cache and stop")

    def check(self) -> None:
        super().check()
        self.check_pairs()
        if self.cache_logprobs_only and self.seeds:
            raise UserError("--cache_logprobs_only: the cache is the same under every one of --seeds, give one")


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss of a pair: which one, with its hyper-parameters, and the weight of the chosen answer's likelihood."""

    loss_type: str
    hyper: dict[str, float]
    rpo_alpha: float

    @property
    def beta(self) -> float:
        return self.hyper["beta"]


def train(config: Config) -> None:
    """Descends L of this file's head, from the reference policy to `final/`."""
    world = start(config.deterministic, config.quiet)
    config = resolve(
        config,
        world,
        defaults={"learning_rate": 5e-6 if config.use_lora else 5e-7},
        embedded_defaults={"learning_rate": 1e-3},
        data="pairs",
    )
    config, objective = resolve_loss(config)
    keep_initial = config.reference == "adapter"
    base = open_model(config, world, memory=config, adapters=config, keep_initial=keep_initial)
    pairs, held_out = read_pairs(config, config.count_turns, base.chat, world, rows=config)
    steps = Steps(len(pairs), config.batch_size, config.num_train_epochs, config.max_steps, config.seed)
    hyper = ", ".join(f"{name} {value:g}" for name, value in objective.hyper.items())
    screen.show(
        base,
        world,
        data=screen.of_examples(pairs, held_out, steps, base, "pairs"),
        training=[
            screen.Row("loss", f"{config.loss_type} ({hyper})"),
            *screen.of_training(config, config.output_dir, steps),
        ],
    )
    if config.dry_run:
        world.say(*screen.first_example(pairs, base.chat))
        show_plan(
            "dpo", config, world, pairs.tokens / 2 + 1, pairs.counts(np.arange(len(pairs))).sum() / pairs.tokens.sum()
        )
        return

    with Run(config, base, steps, world, values=as_dict(config), data=pairs.fingerprint) as run:
        if run.is_finished:
            return

        # log pi_ref(y) for every pair of the run: of the policy as it was loaded, also when a checkpoint is resumed
        # below
        policy = load_policy(base, world)
        references = reference_sums(config, policy, base, (pairs, held_out), steps, world)
        if config.cache_logprobs_only:
            for cached in references:
                if isinstance(cached, refcache.Reference):
                    cached.require_cached()
            return

        # descend L
        optimizer = optim.adamw(policy, config, world)
        for step in run.steps(policy=(policy, optimizer)):
            if held_out and step == 0:
                evaluate(policy, held_out, references[1], objective, run, 0)

            examples = steps.examples(step)
            totals = Totals(world)
            for batch in run.micro_batches(policy, pairs, examples, totals, then=steps.after(step)):
                preference_loss(policy, batch, references[0], objective, len(examples), totals).backward()
            sums = totals.reduce((*METRICS, *run.throughput.COUNTED))
            lr = optim.learning_rate(config, step, steps.total)
            grad_norm = optim.step(optimizer, world, lr=lr, max_norm=config.max_grad_norm)

            row = {name: sums[name] / len(examples) for name in METRICS} | {"learning_rate": lr, "grad_norm": grad_norm}
            run.stop_unless_finite(step, row, "pairs", examples)
            if step == 0 and references[0]:
                tokens = pairs.counts(examples).mean()
                check_identity(row, tokens, len(examples), objective, base.dtype, world, reference=config.reference)
            run.write(step, row, sums, f"loss {row['loss']:.4f}")
            if held_out and run.evaluates(step + 1):
                evaluate(policy, held_out, references[1], objective, run, step + 1)
        run.export(policy, after("dpo", config, world))


def reference_sums(
    config: Config, policy: Policy, base: Base, data: tuple[Examples, Examples | None], steps: Steps, world: World
) -> tuple[Reference | None, Reference | None]:
    """log pi_ref of the training and of the held-out pairs; None where the loss has no reference."""
    pairs, held_out = data
    if config.loss_type in REFERENCE_FREE:
        return None, None
    if config.reference != "cache":
        sums = reference.frozen(config.reference, base, world, policy).sums
        return sums, sums
    cached = refcache.reference_logprobs(policy, base, pairs, steps.used(), world, cache_dir=config.cache_dir)
    if not held_out:
        return cached, None
    everything, name = np.arange(len(held_out)), "held-out reference"
    return cached, refcache.reference_logprobs(
        policy, base, held_out, everything, world, cache_dir=config.cache_dir, name=name
    )


def preference_loss(
    policy: Policy, batch: MicroBatch, reference: Reference | None, objective: Objective, n_pairs: int, totals: Totals
) -> torch.Tensor:
    """This micro-batch's part of L: the sum of its pairs' losses over the pairs of the whole step; adds its metrics to
    `totals`.
    """
    ref_S = reference(batch) if reference else torch.zeros(len(batch.counts_S), device=batch.ids_T.device)

    def loss_of_logprobs(logprobs_R: torch.Tensor, chunk: slice) -> torch.Tensor:
        sequences = slice(2 * chunk.start, 2 * chunk.stop)
        logps_S = sum_by_sequence(logprobs_R.double(), batch.counts_S[sequences]).float()
        chosen_P, rejected_P = logps_S.view(-1, 2).unbind(1)
        ref_chosen_P, ref_rejected_P = ref_S[sequences].view(-1, 2).unbind(1)
        chosen_len_P, rejected_len_P = batch.counts_S[sequences].view(-1, 2).unbind(1)

        loss_of_pairs, lengths = LOSSES[objective.loss_type], (chosen_len_P, rejected_len_P)
        loss_P, chosen_rewards_P, rejected_rewards_P = loss_of_pairs(
            chosen_P,
            rejected_P,
            ref_chosen_P,
            ref_rejected_P,
            *lengths,
            **objective.hyper,  # type: ignore[arg-type]
        )
        nll_P = losses.chosen_nll(chosen_P, chosen_len_P)
        loss_P = loss_P + objective.rpo_alpha * nll_P

        totals.add(
            {
                "loss": loss_P,
                "nll": nll_P,
                "logps/chosen": chosen_P,
                "logps/rejected": rejected_P,
                "logps/accuracies": chosen_P / chosen_len_P > rejected_P / rejected_len_P,
                "rewards/chosen": chosen_rewards_P,
                "rewards/rejected": rejected_rewards_P,
                "rewards/margins": chosen_rewards_P - rejected_rewards_P,
                "rewards/accuracies": chosen_rewards_P > rejected_rewards_P,
            }
        )
        return loss_P.sum() / n_pairs

    return policy.loss(batch, loss_of_logprobs, sequences_per_group=2)


@torch.no_grad()
def evaluate(
    policy: Policy, held_out: Examples, reference: Reference | None, objective: Objective, run: Run, done: int
) -> None:
    """The training metrics on held-out pairs, as eval/*. logps/accuracies: how often the chosen answer is likelier per
    token.
    """
    totals = Totals(run.world)
    for batch in run.evaluation_batches(held_out):
        preference_loss(policy, batch, reference, objective, len(held_out), totals)
    policy.release()
    row = {name: total / len(held_out) for name, total in totals.reduce(METRICS).items()}
    line = (
        f"held out, after step {done}: loss {row['loss']:.4f}, chosen likelier per token in"
        f" {row['logps/accuracies']:.1%}"
    )
    accuracy, n = row["rewards/accuracies"], len(held_out)
    row |= dict(zip(("low", "high"), interval.wilson(accuracy * n, n), strict=True))
    run.write_evaluation(done, row, f"{line}, reward accuracy {accuracy:.1%}")


def check_identity(
    row: dict[str, float],
    tokens: float,
    pairs: int,
    objective: Objective,
    dtype: torch.dtype,
    world: World,
    *,
    reference: str,
) -> None:
    """Before the first update the policy is the reference: every log-ratio is 0, so margins are 0 and dpo's loss is log
    2.

    Allowed is what rounding can do: log-probs of tokens off by 32 roundings of their size under the compute dtype,
    independently, so by 1 / sqrt(n) in a mean over n `tokens` of an answer (sqrt(n) in a sum) and by 1 / sqrt(P) in a
    mean over P `pairs`, times beta, for both answers. Raises UserError beyond: cache and policy disagree.
    """
    normalised = objective.loss_type in ("dpo_norm", "ipo")
    per_answer = 32 * torch.finfo(dtype).eps * max(1.0, row["nll"]) * tokens ** (-0.5 if normalised else 0.5)
    bound = 2 * objective.beta * per_answer / pairs**0.5
    margin = abs(row["rewards/margins"])
    exact = objective.loss_type in ("dpo", "dpo_norm") and not objective.rpo_alpha
    off = abs(row["loss"] - np.log(2)) if exact else margin
    loss = f", |loss - log 2| {off:.1e}" if exact else ""
    world.say(f"step 0: margins {margin:.1e}{loss}, rounding allows {bound:.1e}")
    if not max(margin, off) <= bound:
        found = f"margins {margin:.2e}, allowed {bound:.2e}; --reference {reference}"
        raise UserError(f"step 0: the policy is not its reference ({found})")


def resolve_loss(config: Config) -> tuple[Config, Objective]:
    """The loss by its own name, with its own defaults; a hyper-parameter that it does not read is an error. Raises
    UserError.
    """
    loss_type = ALSO_KNOWN_AS.get(config.loss_type, config.loss_type)
    if loss_type not in LOSSES:
        close = nearest(loss_type, [*LOSSES, *ALSO_KNOWN_AS])
        raise UserError(f"--loss_type {loss_type} is not one of {', '.join(LOSSES)}{close}")
    parameters = inspect.signature(LOSSES[loss_type]).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY}
    given = {name: vars(config)[name] for name in HYPER if vars(config)[name] is not None}
    if unread := [name for name in given if name not in defaults]:
        reads = ", ".join(defaults)
        raise UserError(f"--{unread[0]} is not read by --loss_type {loss_type}, which reads {reads}")
    hyper = {name: given.get(name, default) for name, default in defaults.items()}
    if not hyper["beta"] > 0:
        raise UserError(f"--beta must be greater than 0, got {hyper['beta']}")
    if config.rpo_alpha < 0:
        raise UserError(f"--rpo_alpha must not be negative, got {config.rpo_alpha}")
    if not 0 <= hyper.get("label_smoothing", 0) < 0.5:
        raise UserError(f"--label_smoothing must be in [0, 0.5), got {hyper['label_smoothing']}")
    if loss_type in REFERENCE_FREE and config.reference not in ("auto", "cache"):
        raise UserError(f"--reference is not read by --loss_type {loss_type}")
    kind = reference.resolve_reference(config.reference, config, without_lora="cache", with_lora="cache")
    if config.cache_logprobs_only and (loss_type in REFERENCE_FREE or kind != "cache"):
        raise UserError(f"--cache_logprobs_only: --loss_type {loss_type} with --reference {kind} needs no cache")
    resolved = dataclasses.replace(config, loss_type=loss_type, reference=kind, **hyper)
    return resolved, Objective(loss_type, hyper, config.rpo_alpha)


if __name__ == "__main__":
    main(lambda: each_seed(train, parse(Config, elsewhere=commands)))
