"""launch.grpo beside TRL's GRPOTrainer on recorded responses: losses and gradients, step by step.

`python -m benchmarks.against_trl grpo` runs it. TRL's side is its own trainer, whose `rollout_func` returns the
recorded responses: advantages, old and reference log-probs, micro-batches and the loss are its own. Ours is
launch.grpo's `advantages_of`, `learnt_from` and `group_loss`, with `losses.token_weights`. Both take STEPS optimizer
steps on the same responses, each along its own gradient and all by the same distance, so that ratios leave 1 however
large a loss is. The reference is another model than the policy. Ours is cut into several micro-batches throughout.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.group_cases import CASES, WITHOUT_COUNTERPART, Case
from benchmarks.measure import relative_error

STEPS, PROMPTS, SAMPLES, LONGEST = 3, 8, 4, 48
DISTANCE = 0.1  # that all weights together move in a step: a third of the ratios leave 1 +- 0.1
TOLERANCE = 1e-5  # of losses, over the largest of them; of gradients, over their norm
Steps = list[tuple[float, dict[str, Tensor]]]  # the loss and the gradients of every step


# --- the responses ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorded:
    """PROMPTS prompts with SAMPLES responses each, group by group, and a reward of every response."""

    prompts: list[list[int]]
    responses: list[list[int]]
    rewards: list[float]
    end: int

    @property
    def is_ended(self) -> list[bool]:
        return [ids[-1] == self.end for ids in self.responses]


def record(vocab: int, end: int, seed: int = 0) -> Recorded:
    """Random tokens of many lengths; three of four end. Rewards differ in spread from group to group; one group is all
    alike.
    """
    draw = np.random.default_rng(seed)
    tokens = lambda n: draw.integers(2, vocab, n).tolist()
    prompts = [tokens(draw.integers(3, 24)) for _ in range(PROMPTS)]
    responses = []
    for _ in range(PROMPTS * SAMPLES):
        ended = draw.random() < 0.75
        responses.append([*tokens(draw.integers(1, LONGEST)), end] if ended else tokens(LONGEST))
    rewards = draw.choice([0.0, 0.25, 0.5, 1.0], (PROMPTS, SAMPLES))
    rewards[:, 0], rewards[:, 1], rewards[0] = 0.0, draw.choice([0.5, 1.0], PROMPTS), 1.0
    return Recorded(prompts, responses, rewards.flatten().tolist(), end)


class Along(torch.optim.Optimizer):
    """Moves all weights together by DISTANCE against the gradient; keeps the gradients by name."""

    def __init__(self, model: torch.nn.Module, prefix: str = "") -> None:
        self.named = {name.removeprefix(prefix): p for name, p in model.named_parameters()}
        self.seen: list[dict[str, Tensor]] = []
        super().__init__(self.named.values(), {"lr": DISTANCE})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        grads = {name: local(p.grad).clone() for name, p in self.named.items()}
        norm = torch.stack([g.double().norm() for g in grads.values()]).norm()
        for name, p in self.named.items():
            local(p).sub_(grads[name] * (DISTANCE / norm).float())
        self.seen.append(grads)
        self.zero_grad()


def local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, torch.distributed.tensor.DTensor) else x


# --- both sides -------------------------------------------------------------------------------------------------------


def trl_steps(case: Case, recorded: Recorded, root: Path) -> Steps:
    """What TRL's trainer logs and computes."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    logged: list[float] = []

    class Record(TrainerCallback):
        def on_log(self, arguments, state, control, logs=None, **_):
            if logs and "loss" in logs:
                logged.append(float(logs["loss"]))

    def give(prompts: list[str], trainer: Any) -> dict[str, list]:
        places = [int(p) * SAMPLES + i % SAMPLES for i, p in enumerate(prompts)]
        assert places == list(range(PROMPTS * SAMPLES)), "TRL asks for other prompts than expected"
        return {
            "prompt_ids": [recorded.prompts[int(p)] for p in prompts],
            "completion_ids": recorded.responses,
            "logprobs": None,
            "recorded": recorded.rewards,
        }

    words = {"epsilon": 0.1, "temperature": 1.0} | case.of_trl()
    micro_batches = int(words.pop("steps", 1))
    config = GRPOConfig(
        output_dir=str(root / "trl"),
        per_device_train_batch_size=PROMPTS * SAMPLES // micro_batches,
        gradient_accumulation_steps=micro_batches,
        num_generations=SAMPLES,
        num_iterations=STEPS,
        max_steps=STEPS,
        max_completion_length=LONGEST,
        shuffle_dataset=False,
        gradient_checkpointing=False,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        **words,
    )
    model = AutoModelForCausalLM.from_pretrained(root / "policy", dtype=torch.float32)
    model.config._name_or_path = str(root / "reference")
    optimizer = Along(model)
    GRPOTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(PROMPTS)]}),
        processing_class=AutoTokenizer.from_pretrained(root / "policy"),
        reward_funcs=lambda recorded, **_: recorded,
        rollout_func=give,
        callbacks=[Record()],
        optimizers=(optimizer, None),
    ).train()
    return list(zip(logged, optimizer.seen, strict=True))


class Ours:
    """launch.grpo's loss on the recorded responses, on models that are loaded once."""

    def __init__(self, recorded: Recorded, root: Path) -> None:
        from engine.model import load_policy, open_model
        from engine.world import start

        self.recorded, self.root, self.world = recorded, root, start(quiet=True)
        config = self.config(CASES[0])
        base = open_model(config, self.world, memory=config)
        self.policy = load_policy(base, self.world)
        self.start = {name: local(p).detach().clone() for name, p in self.policy.named_parameters()}
        reference = open_model(self.config(CASES[0], "reference"), self.world, memory=config)
        self.reference = load_policy(reference, self.world)

    def config(self, case: Case, model: str = "policy") -> Any:
        from launch import grpo

        flags = {
            "model_name_or_path": str(self.root / model),
            "dataset_name": str(self.root / "rows.jsonl"),
            "batch_size": PROMPTS,
            "num_samples_per_prompt": SAMPLES,
            "response_length": LONGEST,
            "micro_batch_tokens": 400,
            "clip_low": 0.1,
            "clip_high": 0.1,
        }
        return grpo.resolve_grpo(grpo.Config(**flags | case.of_ours()), self.world)

    def __call__(self, case: Case) -> tuple[Steps, float]:
        """(the steps, the share of tokens whose ratio was out of range in the last)."""
        from engine.data.batch import step_batches
        from engine.log import Totals
        from engine.model import release
        from launch import grpo
        from rollout import evaluate

        config, policy = self.config(case), self.policy
        policy.temperature = self.reference.temperature = config.temperature
        with torch.no_grad():
            for name, p in policy.named_parameters():
                local(p).copy_(self.start[name])
        experience = self.experience()
        old_R = evaluate(policy.logprobs, experience.tokens, config, self.world)
        ref_R = evaluate(self.reference.logprobs, experience.tokens, config, self.world) if config.kl_coef else old_R
        release(policy, self.reference)
        with epsilon_of_groups(case.epsilon):
            advantages_R = grpo.advantages_of(experience, old_R, ref_R, config)
        learnt = grpo.learnt_from(experience, config)
        weights_S = torch.zeros(len(experience), dtype=torch.float64)
        weights_S[learnt] = grpo.losses.token_weights(
            experience.token_counts_S[learnt], config.aggregate, config.response_length
        )
        columns = (old_R, advantages_R, ref_R, experience.on_tokens(weights_S))
        optimizer, found, budget = Along(policy, "lm."), [], config.micro_batch_tokens
        for _ in range(STEPS):
            totals, total = Totals(self.world), 0.0
            for batch, last in step_batches(experience.tokens, learnt, budget, self.world):
                policy.sync_gradients(last)
                loss = grpo.group_loss(policy, batch, experience.tokens.of(batch, *columns), config, totals)
                loss.backward()
                total += loss.item()
            optimizer.step()
            found.append(total)
        clipped = totals.reduce(("policy/clipfrac",))["policy/clipfrac"] / experience.counts(learnt)[0]
        return list(zip(found, optimizer.seen, strict=True)), clipped

    def experience(self) -> Any:
        from rollout import Experience, Rollout

        rollouts = []
        for i, ids in enumerate(self.recorded.responses):
            prompt, finish = self.recorded.prompts[i // SAMPLES], "stop" if self.recorded.is_ended[i] else "length"
            unused = np.zeros(len(ids), np.float32)
            rollouts.append(Rollout(i // SAMPLES, i % SAMPLES, np.array(prompt), np.array(ids), unused, unused, finish))
        return Experience(rollouts, self.recorded.rewards, slot_after_end=False, response_length=LONGEST)


@contextlib.contextmanager
def epsilon_of_groups(epsilon: float) -> Iterator[None]:
    """launch.grpo's advantages with another epsilon beside a group's deviation."""
    import losses
    from launch import grpo

    own = grpo.ADVANTAGES["grpo"]
    grpo.ADVANTAGES["grpo"] = partial(losses.grpo_advantages, epsilon=epsilon)
    try:
        yield
    finally:
        grpo.ADVANTAGES["grpo"] = own


# --- the comparison ---------------------------------------------------------------------------------------------------


def make_models(root: Path, rows: Path) -> Recorded:
    """The embedded model as the reference, another near it as the policy; `rows` are only what the flags name."""
    import shutil

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from engine.data.embedded import embedded

    made = embedded(root)
    shutil.copytree(made.model, root / "reference")
    shutil.copy(rows, root / "rows.jsonl")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(made.model), AutoTokenizer.from_pretrained(made.model)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05 * p.std())
    model.save_pretrained(root / "policy")
    tokenizer.save_pretrained(root / "policy")
    return record(model.config.vocab_size, tokenizer.eos_token_id)


def difference(ours: Steps, trl: Steps, share: float = 1.0) -> tuple[float, float]:
    """Of losses, over the largest of them (a loss of group-relative advantages may be 0); of gradients, over their
    norm.
    """
    largest = max(abs(loss) for loss, _ in trl)
    losses = max(abs(share * a - b) for (a, _), (b, _) in zip(ours, trl, strict=True)) / largest
    flat = lambda grads: torch.cat([grads[name].flatten() for name in sorted(trl[0][1])])
    gradients = max(relative_error(share * flat(a), flat(b)) for (_, a), (_, b) in zip(ours, trl, strict=True))
    return losses, gradients


def compare(root: Path, cases: tuple[Case, ...] = CASES) -> list[dict[str, Any]]:
    """A row of every case."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    warnings.filterwarnings("ignore")
    from engine.data.embedded import embedded

    recorded = make_models(root, embedded(root).train_problems)
    ours, rows = Ours(recorded, root), []
    for case in cases:
        mine, clipped = ours(case)
        with contextlib.redirect_stdout(io.StringIO()):  # the trainer prints its logs
            theirs = trl_steps(case, recorded, root)
        share = float(np.mean(recorded.is_ended)) if case.by_ended else 1.0
        apart = dict(zip(("losses", "gradients"), difference(mine, theirs, share), strict=True))
        within = max(apart.values()) <= TOLERANCE
        rows.append(
            {
                **vars(case),
                **apart,
                "agrees": case.agrees,
                "within": within,
                "clipped": clipped,
                "loss": theirs[-1][0],
                "factor": share,
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    """Two lines a case; then why the last ones differ."""
    lines, notes = ["losses    gradients  clipped  last loss  TRL's GRPOConfig, launch.grpo", "-" * 120], []
    for row in rows:
        mark = ""
        if row["why"]:
            notes += [] if row["why"] in notes else [row["why"]]
            mark = f"  [{notes.index(row['why']) + 1}]" + (f" times {row['factor']:.4f}" if row["by_ended"] else "")
        figures = f"{row['losses']:.1e}   {row['gradients']:.1e}  {row['clipped']:7.0%}  {row['loss']:9.5f}"
        lines += [f"{figures}  {row['trl']}", f"{'':38}  {row['ours']}{mark}"]
    equal = [row for row in rows if row["agrees"]]
    worst = max(max(row["losses"], row["gradients"]) for row in equal)
    lines.append(
        f"\n{sum(row['within'] for row in equal)} of {len(equal)} that must agree do, to {worst:.1e}; where not:"
    )
    return "\n".join([*lines, *(f"[{i + 1}] {why}" for i, why in enumerate(notes)), *WITHOUT_COUNTERPART])
