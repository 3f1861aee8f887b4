"""The reference cache: no needless forward pass, no stale number, no damaged file used."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from engine import world
from engine.data.chat import load_tokenizer
from engine.data.preferences import PairEncoder
from engine.data.sources import load_examples
from engine.errors import UserError
from engine.flags import MemoryFlags, MixtureFlags
from engine.train import refcache
from engine.train.refcache import reference_logprobs
from tests.families import load

CPU, FP32 = torch.device("cpu"), torch.float32
ROWS = 60


@pytest.fixture(scope="module")
def here():
    return world.start()


@pytest.fixture
def setting(tmp_path, embedded_dir):
    """(model directory, path of a small preference file, cache directory)."""
    shutil.copytree(embedded_dir[0], tmp_path / "model")
    lines = embedded_dir[1].read_text().splitlines(keepends=True)[:ROWS]
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    return tmp_path / "model", tmp_path / "pairs.jsonl", tmp_path / "cache"


def pairs_of(setting, here, max_seq_length=2048, last=True):
    source, path, cache = setting
    chat = load_tokenizer(source, 512)
    config = MixtureFlags(max_seq_length=max_seq_length, cache_dir=str(cache))
    prepare = lambda source: (source, PairEncoder(chat, max_seq_length, last))
    return load_examples(
        [(str(path), "")], config, here, chat, prepare, split="train", per_example=2, kind={"last": last}
    )


class Counting:
    """A policy that counts the sequences it is asked for."""

    def __init__(self, policy):
        self.policy, self.sequences, self.identity = policy, 0, policy.identity

    def logprobs(self, batch):
        self.sequences += len(batch.lengths)
        return self.policy.logprobs(batch)

    def release(self):
        self.policy.release()


def reference(setting, here, pairs=None, used=None, dtype=FP32, backend="sdpa", budget=1000):
    source, _, cache = setting
    policy = load(source, here, dtype=dtype, backend=backend)
    memory = MemoryFlags(micro_batch_tokens=budget)
    how = SimpleNamespace(backend=backend)
    base = SimpleNamespace(config=policy.lm.config, dtype=dtype, how=how, memory=memory)
    pairs = pairs or pairs_of(setting, here)
    counting = Counting(policy)
    used = np.arange(len(pairs)) if used is None else used
    found = reference_logprobs(counting, base, pairs, used, here, cache_dir=str(cache))
    assert found.computed == counting.sequences
    return found


def test_sums_are_those_of_transformers(setting, here):
    pairs = pairs_of(setting, here)
    found = reference(setting, here, pairs)
    lm = AutoModelForCausalLM.from_pretrained(setting[0], attn_implementation="eager")
    for example in range(0, ROWS, 7):
        for side, (ids, mask) in enumerate(pairs.sequences(example)):
            ids = torch.as_tensor(np.array(ids), dtype=torch.int64)
            logprobs = lm(ids[None, :-1]).logits[0].double().log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            assert found.sums[example, side] == pytest.approx(
                logprobs[torch.as_tensor(np.array(mask[1:]))].sum().item(), abs=1e-4
            )


def test_a_second_run_computes_nothing(setting, here, capsys):
    first = reference(setting, here)
    assert first.computed == 2 * ROWS and "miss (no model was cached here yet)" in capsys.readouterr().out
    second = reference(setting, here, budget=300)
    assert second.computed == 0 and "hit, all 120 sequences" in capsys.readouterr().out
    assert np.array_equal(first.sums, second.sums)


def test_another_order_a_subset_and_a_grown_dataset_reuse_what_is_there(setting, here, capsys):
    _source, path, _cache = setting
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:40]))
    assert reference(setting, here).computed == 80
    path.write_text("".join(reversed(lines[5:30])))
    subset = reference(setting, here)
    assert subset.computed == 0
    path.write_text("".join(lines))
    capsys.readouterr()
    grown = reference(setting, here)
    assert grown.computed == 40 and "partial hit (80 of 120)" in capsys.readouterr().out
    assert np.array_equal(subset.sums, grown.sums[5:30][::-1])


def test_only_what_the_run_uses_is_computed(setting, here):
    found = reference(setting, here, used=np.array([3, 9]))
    assert found.computed == 4 and np.isnan(found.sums[0]).all() and np.isfinite(found.sums[[3, 9]]).all()


def test_a_row_that_stands_twice_is_computed_once(setting, here):
    _, path, _ = setting
    lines = path.read_text().splitlines(keepends=True)[:5]
    path.write_text("".join(lines + lines[::-1]))
    found = reference(setting, here)
    assert found.computed == 10 and np.array_equal(found.sums[:5], found.sums[5:][::-1])


def change_one_weight(setting):
    tensors = load_file(setting[0] / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].view(np.int32)[0, 0] ^= 1
    save_file(tensors, setting[0] / "model.safetensors", metadata={"format": "pt"})


def change_the_config(setting):
    path = setting[0] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-4}))


STALE = {
    "one weight": (change_one_weight, {}, "other weights than"),
    "config": (change_the_config, {}, "other config than"),
    "dtype": (lambda s: None, {"dtype": torch.bfloat16}, "other dtype than"),
    "attention": (lambda s: None, {"backend": "eager"}, "other attention than"),
}


@pytest.mark.parametrize("what", STALE)
def test_no_stale_number_of_another_model_is_used(what, setting, here, capsys):
    change, options, said = STALE[what]
    reference(setting, here)
    change(setting)
    assert reference(setting, here, **options).computed == 2 * ROWS
    assert said in capsys.readouterr().out


def test_another_length_is_other_rows_and_only_where_it_cuts(setting, here):
    keys = lambda pairs: {key.tobytes() for key in pairs.keys(np.arange(len(pairs))).reshape(-1)}
    reference(setting, here)
    cut = pairs_of(setting, here, max_seq_length=44)
    changed = len(keys(cut) - keys(pairs_of(setting, here)))
    assert 0 < changed < len(keys(cut)) and reference(setting, here, cut).computed == changed


def test_counting_all_turns_changes_nothing_where_there_is_one(setting, here):
    reference(setting, here)
    assert reference(setting, here, pairs_of(setting, here, last=False)).computed == 0


def test_another_template_is_other_rows(setting, here, capsys):
    reference(setting, here)
    config = setting[0] / "tokenizer_config.json"
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}{% if"
        " add_generation_prompt %}assistant: {% endif %}"
    )
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": template}))
    capsys.readouterr()
    assert reference(setting, here).computed == 2 * ROWS
    assert "none of the 120 sequences (other rows, template" in capsys.readouterr().out


DAMAGE = {
    "a flipped bit": lambda content: content[:-5] + bytes([content[-5] ^ 1]) + content[-4:],
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_file_is_named_and_not_used(what, setting, here, capsys):
    first = reference(setting, here)
    (segment,) = (setting[2] / "reference").rglob("rows-*.safetensors")
    segment.write_bytes(DAMAGE[what](segment.read_bytes()))
    capsys.readouterr()
    again = reference(setting, here)
    assert again.computed == 2 * ROWS and np.array_equal(first.sums, again.sums)
    assert f"{segment} is damaged" in capsys.readouterr().out
    assert reference(setting, here).computed == 0


def test_a_segment_of_another_model_is_named_and_not_used(setting, here, capsys):
    """Of the same rows: its checksum and its keys are right, its numbers are not. One that says nothing, as an earlier
    version wrote it, is used.
    """
    first = reference(setting, here)
    (segment,) = (setting[2] / "reference").rglob("rows-*.safetensors")
    arrays = load_file(segment)
    arrays["logprobs"] = arrays["logprobs"] - 1
    about = {"sha256": refcache._checksum(arrays)}
    save_file(arrays, segment, metadata=about | {"model": "another"})
    capsys.readouterr()
    again = reference(setting, here)
    assert again.computed == 2 * ROWS and np.array_equal(first.sums, again.sums)
    assert f"{segment} is damaged (its numbers are another model's)" in capsys.readouterr().out
    for path in (setting[2] / "reference").rglob("rows-*.safetensors"):
        path.unlink()
    save_file(arrays, segment, metadata=about)
    assert reference(setting, here).computed == 0


def test_every_byte_of_a_segments_header_counts(tmp_path, capsys):
    """With one of its bits flipped a segment is named and put aside, or holds what it held."""
    keys = np.arange(48, dtype=np.uint8).view("V16")
    refcache._append(tmp_path, keys, np.arange(3, dtype=np.float32), np.arange(1, 4, dtype=np.int32))
    (segment,) = tmp_path.glob("rows-*")
    content, (whole,) = segment.read_bytes(), refcache._segments(tmp_path)
    segment.unlink()
    end, used = 8 + int.from_bytes(content[:8], "little"), 0
    for bit in range(8 * end):
        path = tmp_path / f"rows-{bit}.safetensors"  # a file that was not there: what is there is read once
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        for arrays in refcache._segments(tmp_path):
            used += 1
            assert arrays.keys() == whole.keys() and all((arrays[name] == whole[name]).all() for name in whole), flipped
            assert arrays["keys"].shape == (3, 16)
            path.unlink()
        assert path.with_name(f"{path.name}.damaged").is_file() == (f"{path} is damaged (" in capsys.readouterr().out)
        path.with_name(f"{path.name}.damaged").unlink(missing_ok=True)
    assert used < end / 100


def test_a_damaged_header_of_another_model_explains_nothing(setting, here):
    for number, content in enumerate(("[]", '{"identity": 3}', "", "nul")):
        (other := setting[2] / "reference" / f"other-{number}").mkdir(parents=True)
        (other / "header.json").write_text(content)
    assert reference(setting, here).computed == 2 * ROWS


@pytest.mark.parametrize("poison", [np.nan, -np.inf])
def test_a_number_that_is_not_finite_is_computed_again(poison, setting, here):
    first = reference(setting, here)
    (segment,) = (setting[2] / "reference").rglob("rows-*.safetensors")
    arrays = load_file(segment)
    arrays["logprobs"][7] = poison
    save_file(arrays, segment, metadata={"sha256": refcache._checksum(arrays)})
    again = reference(setting, here)
    assert again.computed == 1 and np.array_equal(first.sums, again.sums)


def test_a_broken_reference_is_never_cached(setting, here):
    tensors = load_file(setting[0] / "model.safetensors")
    tensors["model.norm.weight"] *= np.float32(1e30)
    tensors["lm_head.weight"] *= np.float32(1e30)
    save_file(tensors, setting[0] / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError):
        reference(setting, here)
    assert not list((setting[2] / "reference").rglob("rows-*"))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_not_finite_stops_the_pass(poison, here):
    """Among sound ones, and it names the example."""
    sequences = [[(np.arange(n), np.arange(n) > 1)] for n in (4, 5, 6)]
    examples = SimpleNamespace(sequences=lambda i: sequences[i])
    values = lambda batch: torch.where(torch.isin(batch.targets_R, torch.tensor(5)), poison, -1.0)
    compute = lambda logprobs: refcache._compute(
        SimpleNamespace(logprobs=logprobs), examples, np.arange(3), np.arange(3), here, 1000
    )
    assert compute(lambda batch: -torch.ones(len(batch.targets_R))).tolist() == [-2.0, -3.0, -4.0]
    with pytest.raises(UserError, match="the reference log-prob of example 2 is not finite"):
        compute(values)


def test_a_killed_pass_goes_on_where_it_was(setting, here, monkeypatch):
    monkeypatch.setattr(refcache, "SEQUENCES_PER_SEGMENT", 32)
    append, calls = refcache._append, iter(range(10))

    def die_at_the_third(*arguments):
        if next(calls) == 2:
            raise KeyboardInterrupt
        append(*arguments)

    monkeypatch.setattr(refcache, "_append", die_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        reference(setting, here)
    monkeypatch.setattr(refcache, "_append", append)
    assert reference(setting, here).computed == 2 * ROWS - 64


def test_a_million_rows_are_found_wherever_they_stand(tmp_path):
    n = 1_000_000
    keys = (
        np.random.Generator(np.random.Philox(key=0)).integers(0, 255, (n, 16), dtype=np.uint8).view("V16").reshape(-1)
    )
    refcache._append(tmp_path, keys, np.arange(n, dtype=np.float32), np.ones(n, np.int32))
    found = refcache._look_up(tmp_path, keys[::-1].reshape(-1, 2), np.ones((n // 2, 2), np.int32))
    assert np.array_equal(found.reshape(-1), np.arange(n, dtype=np.float32)[::-1])


def test_keys_that_agree_in_half_are_others(tmp_path):
    """The first half is what is searched by, the second tells apart; and the other way round."""
    keys = np.array([[1, 2], [3, 4]], "<u8").view("V16").reshape(-1)
    refcache._append(tmp_path, keys, np.array([-1, -2], np.float32), np.ones(2, np.int32))
    wanted = np.array([[1, 2], [1, 4], [3, 2], [2, 4], [3, 4]], "<u8").view("V16").reshape(-1, 1)
    found = refcache._look_up(tmp_path, wanted, np.ones((5, 1), np.int32))
    np.testing.assert_array_equal(found[:, 0], np.array([-1, np.nan, np.nan, np.nan, -2], np.float32))


def test_every_loss_and_beta_shares_the_cache(tmp_path, embedded_dir):
    """Through the entry point: only the first of four runs computes; simpo needs none."""
    from tests.ranks import launch

    pairs, said = tmp_path / "pairs.jsonl", []
    pairs.write_text("".join(embedded_dir.train_pairs.read_text().splitlines(keepends=True)[:200]))
    for i, extra in enumerate(
        (["--cache_logprobs_only"], ["--loss_type", "dpo", "--beta", "0.3"], ["--seed", "9"], ["--loss_type", "simpo"])
    ):
        argv = [
            "--model_name_or_path",
            embedded_dir.model,
            "--dataset_name",
            pairs,
            "--cache_dir",
            tmp_path / "cache",
            "--output_dir",
            tmp_path / str(i),
            *extra,
        ]
        result = launch(argv, 1 + i % 2, log=tmp_path / f"{i}.log")
        assert result.ok, result.output
        said.append(result.output)
    assert "miss" in said[0] and not (tmp_path / "0" / "final").exists()
    assert "hit, all 400" in said[1] and "hit, all 400" in said[2] and "reference:" not in said[3]
