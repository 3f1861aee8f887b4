"""What a stage checks of itself at step 0, and what must be unchanged where it evaluates or resumes."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from engine.data.chat import load_tokenizer
from engine.data.conversations import ConversationEncoder
from engine.errors import UserError
from engine.train import refcache
from launch import dpo, ppo
from rollout import Experience, Rollout, identities
from tests.families import save_family
from tests.launch.test_equivalence import Runs, rows

EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7}
JUST_INSIDE, JUST_OUTSIDE = 1 - 1e-6, 1 + 1e-6


class Said(list):
    """A world that keeps what is said."""

    def say(self, *lines: str) -> None:
        self.extend(lines)


# --- the checks' bounds -----------------------------------------------------------------------------------------------


def check_identity(
    margin: float, loss: float, nll: float, tokens: float, pairs: int, dtype: torch.dtype, **flags
) -> list[str]:
    row = {"rewards/margins": margin, "loss": loss, "nll": nll}
    said = Said()
    _, objective = dpo.resolve_loss(dpo.Config(**flags))
    dpo.check_identity(row, tokens, pairs, objective, dtype, said, reference="cache")
    return said


def check_sampler(
    sampled: list[float], evaluated: list[float], dtype: torch.dtype = torch.float32, **flags
) -> list[str]:
    """Of one response whose tokens have these log-probs."""
    n = len(sampled)
    rollout = Rollout(0, 0, np.array([5, 6]), np.arange(n), np.array(sampled), np.array(sampled), "length")
    batch, said = Experience([rollout], [1.0], slot_after_end=False, response_length=n), Said()
    identities.check_sampler(batch, torch.tensor(evaluated, dtype=torch.float64), ppo.Config(**flags), dtype, said)
    return said


def check_ratio(ratio: float, tokens: float = 1000, dtype: torch.dtype = torch.float32) -> list[str]:
    """Of a mean ratio; the sums are what is handed over."""
    said = Said()
    identities.check_ratio({"val/ratio": ratio * tokens, "tokens": tokens}, dtype, said)
    return said


# beta, the power of the number of tokens
LOSSES = {"dpo_norm": (5.0, -0.5), "ipo": (0.1, -0.5), "dpo": (0.1, 0.5), "wpo": (0.1, 0.5)}


def identity_bound(loss_type: str, nll: float, tokens: float, pairs: int, dtype: torch.dtype) -> float:
    """32 roundings of a log-prob's size, in means or sums of so many tokens, of two answers, of so many pairs."""
    beta, power = LOSSES[loss_type]
    return 2 * beta * 32 * EPS[dtype] * max(1.0, nll) * tokens**power / math.sqrt(pairs)


CASES = [(0.5, 16.0, 1, torch.float32), (0.5, 64.0, 9, torch.float32), (3.0, 100.0, 4, torch.bfloat16)]


@pytest.mark.parametrize("nll, tokens, pairs, dtype", CASES)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_margins_at_step_0_may_be_off_by_rounding_alone(loss_type, nll, tokens, pairs, dtype):
    bound = identity_bound(loss_type, nll, tokens, pairs, dtype)
    other = (nll, tokens, pairs, dtype)
    for sign in (1, -1):
        assert check_identity(sign * JUST_INSIDE * bound, math.log(2), *other, loss_type=loss_type)
        with pytest.raises(UserError, match="step 0: the policy is not its reference"):
            check_identity(sign * JUST_OUTSIDE * bound, math.log(2), *other, loss_type=loss_type)


@pytest.mark.parametrize("loss_type", ["dpo", "dpo_norm"])
def test_the_loss_at_step_0_is_log_2(loss_type):
    other = (0.5, 64.0, 9, torch.float32)
    bound = identity_bound(loss_type, *other)
    for sign in (1, -1):
        assert check_identity(0.0, math.log(2) + sign * 0.99 * bound, *other, loss_type=loss_type)
        with pytest.raises(UserError, match="step 0"):
            check_identity(0.0, math.log(2) + sign * 1.01 * bound, *other, loss_type=loss_type)
    assert check_identity(0.0, 5.0, *other, loss_type=loss_type, rpo_alpha=0.5)  # another term's: margins alone tell
    with pytest.raises(UserError, match="step 0"):
        check_identity(1.01 * bound, 5.0, *other, loss_type=loss_type, rpo_alpha=0.5)


@pytest.mark.parametrize("margin, loss", [(math.nan, math.log(2)), (math.inf, math.log(2)), (-math.inf, math.log(2))])
def test_what_is_no_number_is_no_identity(margin, loss):
    with pytest.raises(UserError, match="step 0"):
        check_identity(margin, loss, 0.5, 64.0, 9, torch.float32, loss_type="dpo")


@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1e-4), (torch.bfloat16, 16 * 2.0**-7)])
@pytest.mark.parametrize("size", [0.25, 8.0])
def test_the_samplers_log_probs_may_be_off_by_rounding_alone(size, dtype, rounding):
    """On average, as a share of their mean size or of 1: some above and some below do not cancel."""
    bound = rounding * max(1.0, size)
    evaluated = [-size, -size, -size, -size]
    for factor, fails in ((JUST_INSIDE, False), (JUST_OUTSIDE, True)):
        for offs in ((1, 1, 1, 1), (1, -1, 1, -1), (4, 0, 0, 0)):
            sampled = [x + off * factor * bound for x, off in zip(evaluated, offs, strict=True)]
            if fails:
                with pytest.raises(UserError, match="step 0: the sampler is not the policy"):
                    check_sampler(sampled, evaluated, dtype)
            else:
                assert "rounding allows" in check_sampler(sampled, evaluated, dtype)[0]
    with pytest.raises(UserError, match="step 0"):
        check_sampler([math.nan, -size], [-size, -size], dtype)


@pytest.mark.parametrize("flags", [{"top_k": 5}, {"top_p": 0.9}, {"temperature": 0.0}])
def test_another_distribution_than_the_policys_is_said_and_not_compared(flags):
    assert "the policy is not what was sampled from" in check_sampler([-1.0], [-9.0], **flags)[0]
    with pytest.raises(UserError):
        check_sampler([-1.0], [-9.0])


@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1e-4), (torch.bfloat16, 16 * 2.0**-7)])
def test_the_first_updates_ratio_may_be_off_1_by_rounding_alone(dtype, rounding):
    for sign in (1, -1):
        assert check_ratio(1 + sign * 0.99 * rounding, dtype=dtype)
        with pytest.raises(UserError, match="step 0: the first update's ratio is off 1"):
            check_ratio(1 + sign * 1.01 * rounding, dtype=dtype)
    with pytest.raises(UserError, match="step 0"):
        check_ratio(math.nan, dtype=dtype)


def test_without_a_policy_update_there_is_no_ratio():
    assert check_ratio(0.0) == []


# --- whole runs -------------------------------------------------------------------------------------------------------


def first_lines(source, target, n: int):
    target.write_text("".join(source.read_text(encoding="utf-8").splitlines(keepends=True)[:n]), encoding="utf-8")
    return target


@pytest.fixture(scope="module")
def preferences(tmp_path_factory, embedded_dir):
    """(runs of two steps, the output of one that saved after the first)."""
    root = tmp_path_factory.mktemp("dpo")
    flags = {
        "model_name_or_path": save_family("llama", root / "model", embedded_dir.model, initializer_range=0.05),
        "cache_dir": root / "cache",
        "dataset_name": first_lines(embedded_dir.train_pairs, root / "pairs.jsonl", 12),
        "batch_size": 6,
        "max_steps": 2,
        "learning_rate": 5e-3,
        "warmup_ratio": 0,
        "micro_batch_tokens": 500,
    }
    runs = Runs("dpo", root, flags)
    return runs, runs.run("whole", save_steps=1)


def segment_of(runs: Runs, cache: str = "cache"):
    (segment,) = (runs.root / cache / "reference").rglob("rows-*.safetensors")
    return segment


def test_a_resumed_run_has_the_reference_of_the_model_as_it_was_loaded(preferences):
    """Its cache is gone, so it is computed anew: by the weights of the start, not by those of the checkpoint."""
    runs, whole = preferences
    first = load_file(segment_of(runs))
    shutil.rmtree(runs.root / "cache" / "reference")
    result = runs.launch("resumed", resume=whole / "checkpoints" / "step-000001")
    assert result.ok and "resuming after step 1" in result.output and "no model was cached here yet" in result.output, (
        result.output
    )
    again = load_file(segment_of(runs))
    assert first.keys() == again.keys() and all(np.array_equal(first[name], again[name]) for name in first)
    expected, found = rows(whole)[-1], rows(whole.parent / "resumed")[-1]
    for name in ("step", "loss", "rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert found[name] == expected[name], name
    assert abs(found["rewards/margins"]) > 1e-3  # the first step had moved it


def test_a_wrong_reference_ends_the_run_before_it_trains(preferences):
    """A cached number that is off by 0.5, under a sound checksum."""
    runs, _ = preferences
    shutil.copytree(runs.root / "cache", runs.root / "wrong_cache")
    segment = segment_of(runs, "wrong_cache")
    arrays = load_file(segment)
    arrays["logprobs"] = arrays["logprobs"] + np.where(np.arange(len(arrays["logprobs"])) % 2, 0.5, -0.5).astype(
        np.float32
    )
    save_file(arrays, segment, metadata={"sha256": refcache._checksum(arrays)})
    result = runs.launch("wrong", cache_dir=runs.root / "wrong_cache")
    assert result.codes == [2] and "step 0: the policy is not its reference" in result.output, result.output
    assert not rows(runs.root / "wrong") and not (runs.root / "wrong" / "final").exists()


def test_the_last_evaluation_is_of_the_model_that_is_exported(tmp_path, embedded_dir):
    """On two ranks that keep gathered weights, saved after every step, against transformers' loss in float64."""
    source = save_family("llama", tmp_path / "model", embedded_dir.model, initializer_range=0.05)
    held_out = first_lines(embedded_dir.held_out_conversations, tmp_path / "held_out.jsonl", 6)
    flags = {
        "model_name_or_path": source,
        "cache_dir": tmp_path / "cache",
        "batch_size": 6,
        "max_steps": 2,
        "learning_rate": 5e-3,
        "warmup_ratio": 0,
        "dataset_name": first_lines(embedded_dir.train_conversations, tmp_path / "train.jsonl", 12),
        "eval_dataset_name": held_out,
        "eval_steps": 1,
        "save_steps": 1,
        "sample_tokens": 0,
        "gradient_sync": "keep",
        "micro_batch_tokens": 200,
        "lr_scheduler_type": "constant",
    }
    out = Runs("sft", tmp_path, flags).run("out", 2)
    evaluated = {row["step"]: row["eval/loss"] for row in rows(out) if "eval/loss" in row}
    assert evaluated.keys() == {0, 1, 2} and evaluated[0] > evaluated[1] + 0.01 > evaluated[2] + 0.02
    assert evaluated[0] == pytest.approx(loss_of(source, held_out), rel=1e-5)
    assert evaluated[2] == pytest.approx(loss_of(out / "final", held_out), rel=1e-5)


def loss_of(directory, conversations) -> float:
    """Per trained token, by transformers, one conversation at a time."""
    lm = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float64)
    encode = ConversationEncoder(load_tokenizer(directory, 512), 4096, "messages")
    total, tokens = 0.0, 0
    for line in conversations.read_text(encoding="utf-8").splitlines():
        ((ids, mask),) = encode(json.loads(line))
        ids, mask = torch.as_tensor(ids.astype("int64")), torch.as_tensor(mask[1:].copy())
        with torch.no_grad():
            logprobs = lm(ids[None, :-1]).logits[0].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        total, tokens = total - logprobs[mask].sum().item(), tokens + int(mask.sum())
    return total / tokens
