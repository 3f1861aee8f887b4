"""Supervised fine-tuning with a token-sum loss.                 torchrun --nproc_per_node 8 -m launch.sft --help

    L = - sum over sequences s and trained tokens t of log pi(y_st | y_s<t) / N

N counts the trained tokens of the whole step, over all ranks and micro-batches (--reduce_loss token), so every token
weighs the same and no gradient depends on the machine. Trained are the content and the end-of-turn token of every
assistant turn. --reduce_loss sum is the original's scale (N = sequences), mean the field's accumulation bug; see
losses/sft.py.

With no argument it trains an embedded tiny model on embedded conversations, in about a minute on two CPU cores.

S sequences of a micro-batch · R trained tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch

import losses
from engine.config import as_dict, parse
from engine.data import Examples, MicroBatch, Steps, read_conversations, sum_by_sequence
from engine.flags import ConversationFlags, StageFlags, flag, override
from engine.log import Totals
from engine.model import Policy, load_policy, open_model
from engine.train import Run, interval, optim, sample, screen
from engine.world import main, start
from launch.resolve import after, commands, each_seed, resolve, show_plan
from losses.sft import REDUCTIONS, denominator, token_weights

DEFAULTS = {"batch_size": 128}


@dataclass(frozen=True, kw_only=True)
class Config(StageFlags, ConversationFlags):
    __doc__ = __doc__
    output_dir: str = override("output/sft")
    reduce_loss: str = flag(
        "token",
        "the denominator: trained tokens, sequences (the original's), or a mean of sequences' means",
        choices=REDUCTIONS,
    )
    batch_size: int = override(None, "conversations per optimizer step, whatever the machine; 128, embedded 16")
    learning_rate: float = override(None, "peak; 5e-6 (Tülu 3 8B), with adapters 1e-4, for the embedded model 3e-3")
    num_train_epochs: int = override(2)
    max_seq_length: int = override(4096, "tokens of a conversation; longer ones are cut")
    warmup_ratio: float = override(0.03)
    sample_tokens: int = flag(32, "length of the greedy sample shown before and after training (0: none)")


def train(config: Config) -> None:
    """Descends L of this file's head, from the model as it is to `final/`."""
    world = start(config.deterministic, config.quiet)
    config = resolve(
        config,
        world,
        defaults=DEFAULTS | {"learning_rate": 1e-4 if config.use_lora else 5e-6},
        embedded_defaults={"learning_rate": 3e-3, "batch_size": 16},
        data="conversations",
    )
    base = open_model(config, world, memory=config, adapters=config)
    data, held_out = read_conversations(config, base.chat, world, rows=config)
    steps = Steps(len(data), config.batch_size, config.num_train_epochs, config.max_steps, config.seed)
    trained = int(data.counts(np.arange(len(data))).sum())
    share = trained / data.tokens.sum()
    screen.show(
        base,
        world,
        data=screen.of_examples(data, held_out, steps, base, "conversations"),
        training=[
            screen.Row("loss", f"{config.reduce_loss}, of {trained:,} trained tokens ({share:.0%})"),
            *screen.of_training(config, config.output_dir, steps),
        ],
    )
    if config.dry_run:
        world.say(*screen.first_example(data, base.chat))
        show_plan("sft", config, world, data.tokens + 1, share)
        return

    with Run(config, base, steps, world, values=as_dict(config), data=data.fingerprint) as run:
        if run.is_finished:
            return
        policy = load_policy(base, world)
        optimizer = optim.adamw(policy, config, world)
        prompt = sample.first_prompt(held_out or data)
        for step in run.steps(policy=(policy, optimizer)):
            if step == 0:
                evaluate(policy, held_out, prompt, config.sample_tokens, run, 0)

            # descend L
            examples = steps.examples(step)
            num_tokens = int(data.counts(examples).sum())  # of all ranks and micro-batches, before the first forward
            n = denominator(num_tokens, len(examples), config.reduce_loss)
            totals = Totals(world)
            for batch in run.micro_batches(policy, data, examples, totals, then=steps.after(step)):
                sft_loss(policy, batch, config.reduce_loss, n, totals).backward()
            sums = totals.reduce(("loss", *run.throughput.COUNTED))
            lr = optim.learning_rate(config, step, steps.total)
            grad_norm = optim.step(optimizer, world, lr=lr, max_norm=config.max_grad_norm)

            run.stop_unless_finite(step, {"loss": sums["loss"], "grad_norm": grad_norm}, "conversations", examples)
            row = {"loss": sums["loss"], "trained_tokens": num_tokens, "learning_rate": lr, "grad_norm": grad_norm}
            run.write(step, row, sums, f"loss {sums['loss']:.4f}")
            if run.evaluates(step + 1):
                evaluate(policy, held_out, prompt, config.sample_tokens, run, step + 1)
        run.export(policy, after("sft", config, world))


def sft_loss(policy: Policy, batch: MicroBatch, reduce: str, n: int, totals: Totals) -> torch.Tensor:
    """This micro-batch's part of L; adds its value to `totals`."""
    weights_R = (
        token_weights(batch.counts_S, reduce, batch.cuts[-1])
        if batch.examples
        else torch.zeros(0, device=batch.ids_T.device)
    )

    def loss_of_logprobs(logprobs_R: torch.Tensor, rows: slice) -> torch.Tensor:
        loss = losses.sft(logprobs_R, weights_R[rows]) / n
        totals.add({"loss": loss})
        return loss

    return policy.loss(batch, loss_of_logprobs)


@torch.no_grad()
def evaluate(
    policy: Policy, held_out: Examples | None, prompt: np.ndarray, sample_tokens: int, run: Run, done: int
) -> None:
    """Loss per token, with a 95 % interval, and token accuracy on held-out conversations, as eval/*; a sample."""
    if held_out:
        totals = Totals(run.world)
        for batch in run.evaluation_batches(held_out):
            logprobs_R, argmax_R = policy.logprobs(batch), policy.argmax(batch)
            nll_S, tokens_S = sum_by_sequence(-logprobs_R.double(), batch.counts_S), batch.counts_S.double()
            totals.add({"a": nll_S, "b": tokens_S, "correct": argmax_R == batch.targets_R})
            totals.add({"aa": nll_S * nll_S, "ab": nll_S * tokens_S, "bb": tokens_S * tokens_S})
        policy.release()
        sums = totals.reduce(("a", "b", "correct", "aa", "ab", "bb"))
        loss, low, high = interval.of_ratio(sums, len(held_out))
        accuracy = sums["correct"] / sums["b"]
        line = f"held out, after step {done}: loss {loss:.4f} per token, token accuracy {accuracy:.1%}"
        run.write_evaluation(done, {"loss": loss, "low": low, "high": high, "token_accuracy": accuracy}, line)
    if sample_tokens:
        chat = run.base.chat
        text = sample.greedy(policy, chat, prompt, sample_tokens, run.world)
        run.world.say(f"greedy sample after step {done}: {chat.tokenizer.decode(prompt)[-120:]!r} -> {text!r}")


if __name__ == "__main__":
    main(lambda: each_seed(train, parse(Config, elsewhere=commands)))
