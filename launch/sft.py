"""Supervised fine-tuning with a token-sum loss.                 torchrun --nproc_per_node 8 -m launch.sft --help

    L = - sum over sequences s and trained tokens t of log pi(y_st | y_s<t) / N

N counts the trained tokens of the whole step, over all ranks and micro-batches (--reduce_loss token), so every token
weighs the same and no gradient depends on the machine. Trained are the content and the end-of-turn token of every
assistant turn. --reduce_loss sum is the original's scale (N = sequences), mean the field's accumulation bug; see
losses/sft.py.

With no argument it trains an embedded tiny model on embedded conversations, in about a minute on two CPU cores.

S sequences of a micro-batch · R trained tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import losses
from engine import batch as batching
from engine import data, log, optim, run, sample, setup, world
from engine.batch import MicroBatch
from engine.chat import ChatTokenizer
from engine.checkpoint import Checkpoints
from engine.config import RunConfig, flag, parse
from engine.conversations import ConversationEncoder, first_form
from engine.dry_run import show_plan
from engine.errors import UserError
from engine.model import Policy
from engine.store import Examples, Steps
from engine.world import World
from losses.sft import REDUCTIONS, denominator, token_weights


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    __doc__ = __doc__
    output_dir: str = flag("output/sft", "directory of the run: config.yaml, metrics.jsonl, checkpoints/, final/")
    reduce_loss: str = flag(
        "token",
        "the denominator: trained tokens, sequences (the original's), or a mean of sequences' means",
        choices=REDUCTIONS,
    )
    batch_size: int | None = flag(
        None, "conversations per optimizer step, whatever the machine; 128, for the embedded model 16"
    )
    learning_rate: float | None = flag(None, "peak; 5e-6 (Tülu 3 8B), with adapters 1e-4, for the embedded model 3e-3")
    num_train_epochs: int = flag(2, "passes over the data", aliases=("num_epochs",))
    max_seq_length: int = flag(4096, "tokens of a conversation; longer ones are cut", aliases=("max_length",))
    warmup_ratio: float = flag(0.03, "share of the steps in which the learning rate rises linearly from 0")
    sample_tokens: int = flag(32, "length of the greedy sample shown before and after training (0: none)")


def train(config: Config) -> None:
    here = world.start(config.deterministic)
    config = setup.resolve(
        config,
        here,
        defaults={"learning_rate": 1e-4 if config.use_lora else 5e-6, "batch_size": 128},
        embedded_defaults={"learning_rate": 3e-3, "batch_size": 16},
        embedded_data="conversations",
    )
    base = setup.prepare(config, here)
    conversations, held_out = load_conversations(config, here, base.chat)
    steps = Steps(len(conversations), config.batch_size, config.num_train_epochs, config.max_steps, config.seed)
    trained = int(conversations.counts(np.arange(len(conversations))).sum())
    lines = [
        f"loss: {config.reduce_loss}, {trained:,} trained tokens ({trained / conversations.tokens.sum():.0%}), learning"
        f" rate {config.learning_rate:g}"
    ]
    setup.first_screen(config, here, base, conversations, steps, unit="conversations", extra=lines)
    if config.dry_run:
        show_plan("sft", config, here, conversations.tokens + 1, trained / conversations.tokens.sum())
        return

    output_dir = Path(config.output_dir)
    with run.open_run(config, here, {"model_revision": base.revision}) as finished:
        if finished:
            here.say(f"{output_dir} is finished, final/ is written: nothing to do")
            return
        policy, weights = setup.load_policy(config, here, base)
        optimizer = optim.adamw(policy, config.weight_decay, config.optimizer, here)
        identity = {"model": weights, "dataset": conversations.fingerprint}
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
        batches = batching.MicroBatches(conversations, config.micro_batch_tokens, here)
        prompt = sample.first_prompt(held_out or conversations)
        if state["step"] == 0:
            evaluate(policy, held_out, prompt, base.chat, config, here, metrics, 0)

        with run.profiler(config.profile, output_dir, here) as profile, checkpoints:
            for step in range(state["step"], steps.total):
                chosen = steps.examples(step)
                num_tokens = int(
                    conversations.counts(chosen).sum()
                )  # of all ranks and micro-batches, known before the first forward
                n = denominator(num_tokens, len(chosen), config.reduce_loss)
                totals = log.Totals(here)
                upcoming = steps.examples(step + 1) if step + 1 < steps.total else None
                for batch, last in batches(chosen, then=upcoming):
                    policy.sync_gradients(last)
                    loss = sft_loss(policy, batch, config.reduce_loss, n, totals)
                    loss.backward()
                    throughput.count(batch, totals)
                sums = totals.reduce(("loss", *throughput.COUNTED))
                lr = optim.learning_rate(
                    step,
                    peak=config.learning_rate,
                    steps=steps.total,
                    warmup_ratio=config.warmup_ratio,
                    schedule=config.lr_scheduler_type,
                )
                grad_norm = optim.step(optimizer, here, lr=lr, max_norm=config.max_grad_norm)
                row = {"loss": sums["loss"], "trained_tokens": num_tokens}
                if not math.isfinite(grad_norm + row["loss"]):
                    raise UserError(
                        f"step {step + 1}: loss {row['loss']}, gradient norm {grad_norm}, on conversations"
                        f" {chosen.tolist()[:8]} ...; the weights were left as they are"
                    )
                row |= {"learning_rate": lr, "grad_norm": grad_norm, **throughput.row(sums)}
                metrics.write(
                    step + 1, row, f"loss {row['loss']:.4f}, {row['perf/tokens_per_second_per_gpu']:.0f} tokens/s"
                )
                if profile is not None:
                    profile.step()
                if step + 1 < steps.total:
                    if config.eval_steps and (step + 1) % config.eval_steps == 0:
                        evaluate(policy, held_out, prompt, base.chat, config, here, metrics, step + 1)
                    if config.save_steps and (step + 1) % config.save_steps == 0:
                        checkpoints.save(step + 1, {"num_tokens": throughput.num_tokens})

        evaluate(policy, held_out, prompt, base.chat, config, here, metrics, steps.total)
        metrics.close()
        here.say(f"done: {setup.export(policy, base, config, here, output_dir / 'final')}")


def sft_loss(policy: Policy, batch: MicroBatch, reduce: str, n: int, totals: log.Totals) -> Tensor:
    """This micro-batch's part of L; adds its value to `totals`."""
    weights_R = (
        token_weights(batch.counts_S, reduce, batch.cuts[-1])
        if batch.examples
        else torch.zeros(0, device=batch.ids_T.device)
    )

    def loss_of_logprobs(logprobs_R: Tensor, rows: slice) -> Tensor:
        loss = losses.sft(logprobs_R, weights_R[rows]) / n
        totals.add(loss=loss)
        return loss

    return policy(batch, loss_of_logprobs)


@torch.no_grad()
def evaluate(
    policy: Policy,
    held_out: Examples | None,
    prompt: np.ndarray,
    chat: ChatTokenizer,
    config: Config,
    here: World,
    metrics: log.Metrics,
    step: int,
) -> None:
    """Loss per token and token accuracy on held-out conversations, as eval/*, and a greedy sample."""
    if held_out:
        totals = log.Totals(here)
        for batch, _ in batching.step_batches(held_out, np.arange(len(held_out)), config.micro_batch_tokens, here):
            logprobs_R, argmax_R = policy(batch), policy(batch, mode="argmax")
            totals.add(nll=-logprobs_R, correct=argmax_R == batch.targets_R, tokens=torch.ones_like(logprobs_R))
        policy.release()
        sums = totals.reduce(("nll", "correct", "tokens"))
        loss, accuracy = sums["nll"] / sums["tokens"], sums["correct"] / sums["tokens"]
        metrics.write(step, {"eval/loss": loss, "eval/token_accuracy": accuracy})
        metrics.say(f"held out, after step {step}: loss {loss:.4f} per token, token accuracy {accuracy:.1%}")
    if config.sample_tokens:
        text = sample.greedy(policy, chat, prompt, config.sample_tokens, here)
        metrics.say(f"greedy sample after step {step}: {chat.tokenizer.decode(prompt)[-120:]!r} -> {text!r}")


def load_conversations(config: Config, here: World, chat: ChatTokenizer) -> tuple[Examples, Examples | None]:
    """(training conversations, held-out conversations or None). Raises UserError."""
    encoder_of = lambda source: ConversationEncoder(chat, config.max_seq_length, first_form(source))
    options = {"per_example": 1, "kind": {"conversations": "all turns"}}
    conversations = data.load_examples(
        data.mixture(config), config, here, chat, encoder_of, split=config.dataset_split, **options
    )
    if here.size > len(conversations):
        raise UserError(f"{here.size} ranks for {len(conversations)} conversations: lower --nproc_per_node")
    if config.eval_dataset_name is None:
        return conversations, None
    return conversations, data.load_examples(
        [(config.eval_dataset_name, "")], config, here, chat, encoder_of, split=config.eval_split, **options
    )


if __name__ == "__main__":
    world.run(lambda: train(parse(Config)))
