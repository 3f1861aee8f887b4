"""The rollout engine beside transformers' generate and the trainer's log-probs, in every layout; stops, errors,
hand-over.
"""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from transformers import AttentionInterface, AutoModelForCausalLM

from engine import world
from engine.data.batch import micro_batch
from engine.model import Policy, attention
from rollout import Request, Rollout, Sampler, SamplingParams
from rollout import cache as caching
from tests import ranks
from tests.families import COMMON, FAMILIES, load, save_family
from tests.rollout.test_choice import oracle

FP32, VOCAB = torch.float32, 512
LENGTHS = (5, 1, 23, 12, 2)  # beyond the window of 8, and a prompt of one token


@pytest.fixture(scope="module")
def here():
    return world.start()


@pytest.fixture(scope="module")
def families(tmp_path_factory, embedded_dir, here):
    """(directory, policy) of a family, made once."""
    root, made = tmp_path_factory.mktemp("families"), {}

    def get(name: str):
        if name not in made:
            directory = save_family(name, root / name, embedded_dir[0])
            policy = load(directory, here, dtype=FP32)
            made[name] = directory, policy
        return made[name]

    return get


def make_sampler(families, here, name="llama", slots=3, max_length=64, **options) -> Sampler:
    _, policy = families(name)
    sampler = Sampler(policy.lm.config, policy, here, dtype=FP32, max_length=max_length, slots=slots, **options)
    sampler.load(policy)
    return sampler


def prompts(lengths=LENGTHS, seed=3) -> list[np.ndarray]:
    generator = np.random.Generator(np.random.Philox(key=seed))
    return [generator.integers(2, VOCAB, n) for n in lengths]


def requests_of(lengths=LENGTHS, samples=1, **options) -> list[Request]:
    return [
        Request(ids, example, sample, **options)
        for example, ids in enumerate(prompts(lengths))
        for sample in range(samples)
    ]


def same(a: Rollout, b: Rollout) -> bool:
    return (
        a.response_ids.tolist() == b.response_ids.tolist()
        and a.finish_reason == b.finish_reason
        and (a.example, a.sample) == (b.example, b.sample)
    )


# --- against transformers and the trainer -----------------------------------------------------------------------------


def generated(lm, stops: set[int]) -> list[list[int]]:
    """transformers' greedy continuations of `prompts()`, one by one."""
    options = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": sorted(stops), "pad_token_id": 0}
    return [lm.generate(torch.as_tensor(ids)[None], **options)[0, len(ids) :].tolist() for ids in prompts()]


def greedy(sampler: Sampler, stops: set[int]) -> list[Rollout]:
    """Mixed prompt lengths, early stops and two samples a prompt."""
    return sampler.generate(
        requests_of(samples=2), SamplingParams(max_new_tokens=14, temperature=0, stop_ids=tuple(stops)), seed=0, step=0
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_is_generate(name, families, here):
    stops = set(range(0, VOCAB, 16))
    expected = generated(
        AutoModelForCausalLM.from_pretrained(families(name)[0], attn_implementation="eager").eval(), stops
    )
    rollouts = greedy(make_sampler(families, here, name), stops)
    assert [r.response_ids.tolist() for r in rollouts] == [ids for ids in expected for _ in range(2)]
    assert [r.finish_reason for r in rollouts] == [
        "stop" if r.response_ids[-1] in stops else "length" for r in rollouts
    ]


MIXED_WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
FEW_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
MORE_FAMILIES = {  # sinks, experts, latent attention (keys and values of unlike sizes), parallel blocks
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2} | MIXED_WINDOWS,
    "Qwen3Moe": {"num_experts": 4} | FEW_EXPERTS,
    "DeepseekV3": (
        {
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
        }
        | FEW_EXPERTS
    ),
    "Cohere2": {"logit_scale": 0.3} | MIXED_WINDOWS,
    "GPTNeoX": {},
}


@pytest.mark.parametrize("name", MORE_FAMILIES)
def test_greedy_is_generate_for_families_never_prepared_for(name, here):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(COMMON | MORE_FAMILIES[name]))
    lm = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    policy, stops = Policy(lm, "fused"), set(range(0, VOCAB, 16))
    sampler = Sampler(config, policy, here, dtype=FP32, max_length=64, slots=3)
    sampler.load(policy)
    assert [r.response_ids.tolist() for r in greedy(sampler, stops)] == [
        ids for ids in generated(lm, stops) for _ in range(2)
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ("llama", "gemma2", "gemma3"))
def test_on_cuda(name, families, here):
    """float32: greedy is generate on a CPU; bfloat16: log-probs are the trainer's."""
    directory, policy = families(name)
    expected = generated(AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval(), {1})
    assert [r.response_ids.tolist() for r in greedy(make_sampler(families, here, name), {1})] == [
        ids for ids in expected for _ in range(2)
    ]
    policy = load(directory, here, dtype=torch.bfloat16)
    sampler = Sampler(policy.lm.config, policy, here, dtype=torch.bfloat16, max_length=64, slots=3)
    sampler.load(policy)
    rollouts = sampler.generate(requests_of(samples=2), SamplingParams(max_new_tokens=14), seed=0, step=0)
    differences = [
        r.logprobs_t1 - expected for r, expected in zip(rollouts, trainers_logprobs(policy, rollouts), strict=True)
    ]
    assert np.abs(np.concatenate(differences)).mean() < 0.05


def trainers_logprobs(policy, rollouts: list[Rollout]) -> list[np.ndarray]:
    sequences = []
    for r in rollouts:
        mask = np.zeros(len(r.prompt_ids) + len(r.response_ids), bool)
        mask[len(r.prompt_ids) :] = True
        sequences.append((np.concatenate([r.prompt_ids, r.response_ids]), mask))
    with torch.no_grad():
        flat = (
            policy.logprobs(micro_batch(sequences, range(len(sequences)), next(policy.parameters()).device))
            .cpu()
            .numpy()
        )
    policy.release()
    return np.split(flat, np.cumsum([len(r.response_ids) for r in rollouts])[:-1])


@pytest.mark.parametrize("name", FAMILIES)
def test_logprobs_are_the_trainers(name, families, here):
    rollouts = make_sampler(families, here, name).generate(
        requests_of(samples=2), SamplingParams(max_new_tokens=14), seed=0, step=0
    )
    for r, expected in zip(rollouts, trainers_logprobs(families(name)[1], rollouts), strict=True):
        np.testing.assert_allclose(r.logprobs_t1, expected, atol=1e-5)
        np.testing.assert_array_equal(r.logprobs, r.logprobs_t1)
        assert r.logprobs.dtype == np.float32 and r.finish_reason == "length"


@pytest.mark.parametrize("softcap", (None, 1.5))
@pytest.mark.parametrize("sinks", (False, True))
@pytest.mark.parametrize("window", (None, 8))
def test_cached_attention_is_the_formula(window, sinks, softcap):
    """Three sequences of different lengths, prefilled but for their last tokens and then decoded together, in slots out
    of order.
    """
    heads, kv_heads, size, lengths, slots = 4, 2, 16, (12, 3, 20), (2, 0, 1)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, sum(lengths), size, generator=generator) for n in (heads, kv_heads, kv_heads))
    s_aux = torch.randn(heads, generator=generator) if sinks else None
    options = {"scaling": 0.3, "sliding_window": window, "softcap": softcap, "s_aux": s_aux}
    expected = torch.zeros(1, sum(lengths), heads, size)
    starts = [0, *np.cumsum(lengths).tolist()]
    for t, head in itertools.product(range(sum(lengths)), range(heads)):  # token by token
        start = max(max(s for s in starts if s <= t), t + 1 - (window or 99))
        scores = 0.3 * k[0, head // 2, start : t + 1] @ q[0, head, t]
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        weights = torch.cat([scores, s_aux[head : head + 1]] if sinks else [scores]).softmax(0)[: len(scores)]
        expected[0, t, head] = weights @ v[0, head // 2, start : t + 1]

    cached = AttentionInterface()[caching.register(attention.packed("sdpa"))]
    module, layer = SimpleNamespace(layer_idx=0), caching.Layer(window, kv_heads, size, size, FP32)
    cache = caching.PagedCache({0: layer}, {window: 40}, 4, 32, 4)
    cache.allocate(torch.device("cpu"))
    pages = cache.kinds[window]
    for slot, length in zip(slots, lengths, strict=True):
        pages.begin(slot, length - 1)
    positions_T = torch.cat([torch.arange(n) for n in lengths])
    last_T = positions_T == torch.tensor(lengths).repeat_interleave(torch.tensor(lengths)) - 1
    columns = [{window: pages.tables[slot]} for slot in slots]
    prefill = caching.Prefill.of(cache, columns, [n - 1 for n in lengths])
    assert torch.equal(prefill.positions_T, positions_T[~last_T])
    out, _ = cached(module, *(x[:, :, ~last_T] for x in (q, k, v)), None, **options, rollout=prefill)
    torch.testing.assert_close(out, expected[:, ~last_T], atol=2e-6, rtol=1e-5)
    for slot, length in zip(slots, lengths, strict=True):
        if pages.wants(slot, length - 1):
            pages.take(slot)
    last = np.array(lengths) - 1
    tables = {window: torch.from_numpy(pages.tables[list(slots)])}
    for decode in (
        caching.Decode.by_rows(cache, np.array(slots), last, torch.device("cpu")),
        caching.Decode.by_tables(cache, torch.from_numpy(last), tables),
    ):
        out, _ = cached(module, *(x[:, :, last_T] for x in (q, k, v)), None, **options, rollout=decode)
        torch.testing.assert_close(out, expected[:, last_T], atol=2e-6, rtol=1e-5)


def test_load_casts_to_the_compute_dtype(families, here):
    _, policy = families("gemma3")
    sampler = Sampler(policy.lm.config, policy, here, dtype=torch.bfloat16, max_length=64, slots=4)
    sampler.load(policy)
    theirs = dict(policy.lm.named_parameters())
    for name, p in sampler.lm.named_parameters():
        assert torch.equal(p, theirs[name].full_tensor().bfloat16()), name
    assert {b.dtype for b in sampler.lm.buffers()} == {b.dtype for b in policy.lm.buffers()}  # frequencies stay fp32
    rollouts = sampler.generate(requests_of(), SamplingParams(max_new_tokens=8), seed=0, step=0)
    for r, expected in zip(rollouts, trainers_logprobs(policy, rollouts), strict=True):
        np.testing.assert_allclose(r.logprobs_t1, expected, atol=0.3)


def test_load_hands_over_new_weights_at_the_same_addresses(families, here, tmp_path, embedded_dir):
    directory = save_family("llama_biased", tmp_path / "m", embedded_dir[0])
    policy = load(directory, here, dtype=FP32)
    sampler = Sampler(policy.lm.config, policy, here, dtype=FP32, max_length=64, slots=4)
    sampler.load(policy)
    addresses = [p.data_ptr() for p in sampler.lm.parameters()]
    before = sampler.generate(requests_of(), SamplingParams(max_new_tokens=8), seed=0, step=0)
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(1.3)
    sampler.load(policy)
    assert addresses == [p.data_ptr() for p in sampler.lm.parameters()]
    after = sampler.generate(requests_of(), SamplingParams(max_new_tokens=8), seed=0, step=0)
    assert not all(same(a, b) for a, b in zip(before, after, strict=True))
    for r, expected in zip(after, trainers_logprobs(policy, after), strict=True):
        np.testing.assert_allclose(r.logprobs_t1, expected, atol=1e-5)


# --- the same text whatever the layout --------------------------------------------------------------------------------


def test_text_does_not_depend_on_slots_or_order(families, here):
    params = SamplingParams(
        max_new_tokens=20, temperature=0.7, top_k=50, top_p=0.9, stop_ids=tuple(range(0, VOCAB, 16))
    )
    wanted = requests_of(samples=4)
    reference = make_sampler(families, here, slots=1).generate(wanted, params, seed=5, step=2)
    assert len({tuple(r.response_ids) for r in reference}) > 15  # samples differ
    for slots in (3, 64):
        sampler = make_sampler(families, here, slots=slots)
        assert all(map(same, sampler.generate(wanted, params, seed=5, step=2), reference))
        order = np.random.Generator(np.random.Philox(key=1)).permutation(len(wanted))
        for i, r in zip(order, sampler.generate([wanted[i] for i in order], params, seed=5, step=2), strict=True):
            assert same(r, reference[i])
    assert not any(map(same, sampler.generate(wanted, params, seed=5, step=3), reference))
    assert not any(map(same, sampler.generate(wanted, params, seed=6, step=2), reference))


def test_slots_that_are_taken_again_hold_nothing_of_before(families, here):
    """All slots are freed at once and refilled in every order of prompts: a copy must not come from a page that was
    given away.
    """
    params = SamplingParams(max_new_tokens=2)
    wanted = [Request(ids, example, sample) for sample in range(6) for example, ids in enumerate(prompts((7, 9, 5)))]
    reference = make_sampler(families, here, slots=1).generate(wanted, params, seed=0, step=0)
    for slots, seed in ((2, 1), (2, 2), (4, 3), (5, 4)):
        order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(wanted))
        for i, r in zip(
            order,
            make_sampler(families, here, slots=slots).generate([wanted[i] for i in order], params, seed=0, step=0),
            strict=True,
        ):
            assert same(r, reference[i])


def test_text_does_not_depend_on_the_world_size(tmp_path, embedded_dir):
    """Two ranks that share the requests, from shards of tensors that do not divide evenly (511 rows), against one
    rank.
    """
    directory = save_family("llama_biased", tmp_path / "m", embedded_dir[0], vocab_size=511, intermediate_size=57)
    for count in (1, 2):
        argv = ["--directory", directory, "--output", tmp_path / f"{count}.json"]
        result = ranks.launch(argv, count, module="tests.rollout.stage", log=tmp_path / f"{count}.log")
        assert result.ok, result.output
    alone, shared = ((tmp_path / f"{count}.json").read_text() for count in (1, 2))
    assert alone == shared and len(alone) > 500


def test_longest_expected_first_and_streaming(families, here):
    wanted = [
        Request(ids, i, max_new_tokens=n, expected_length=n)
        for i, (ids, n) in enumerate(zip(prompts(), (3, 9, 1, 6, 2), strict=True))
    ]
    order = []
    for i, _ in make_sampler(families, here, slots=1).stream(wanted, SamplingParams(), seed=0, step=0):
        assert not torch.is_inference_mode_enabled()  # it must not leak into who consumes the stream
        order.append(i)
    assert order == [1, 3, 0, 4, 2]
    sampler = make_sampler(families, here, slots=2)
    reference = sampler.generate(wanted, SamplingParams(), seed=0, step=0)
    stream = sampler.stream(wanted[::-1], SamplingParams(), seed=0, step=1)
    next(stream)
    stream.close()  # given up half-way: its pages are nobody's
    rollouts = sampler.generate(wanted, SamplingParams(), seed=0, step=0)
    assert all(map(same, rollouts, reference))
    assert [len(r.response_ids) for r in rollouts] == [3, 9, 1, 6, 2] and [r.example for r in rollouts] == list(
        range(5)
    )


def test_a_prompt_is_prefilled_once_for_its_samples(families, here, monkeypatch):
    sampler = make_sampler(families, here, slots=3)
    seen = []
    inner = sampler.prefill
    monkeypatch.setattr(sampler, "prefill", lambda joined: (seen.extend(map(tuple, joined.prompts)), inner(joined)))
    sampler.generate(requests_of(samples=5), SamplingParams(max_new_tokens=6), seed=0, step=0)
    assert sorted(seen) == sorted(tuple(ids[:-1].tolist()) for ids in prompts() if len(ids) > 1)


# --- stops and errors -------------------------------------------------------------------------------------------------


def test_stop_strings_end_with_the_token_that_completes_them(families, here):
    decode = lambda ids: "".join(f"{i % 10}" for i in ids)
    params = SamplingParams(max_new_tokens=60, stop_strings=("37", "911"))
    sampler = make_sampler(families, here, slots=4, max_length=96, decode=decode)
    rollouts = sampler.generate(requests_of(samples=4), params, seed=0, step=0)
    free = sampler.generate(requests_of(samples=4), SamplingParams(max_new_tokens=60), seed=0, step=0)
    assert {r.finish_reason for r in rollouts} >= {"stop"}
    for r, whole in zip(rollouts, free, strict=True):
        ends = [n for n in range(1, 61) if any(s in decode(whole.response_ids[:n]) for s in params.stop_strings)]
        assert len(r.response_ids) == (ends[0] if ends else 60) and r.finish_reason == ("stop" if ends else "length")
        assert r.response_ids.tolist() == whole.response_ids[: len(r.response_ids)].tolist()


def test_bad_requests_get_one_line(families, here):
    sampler = make_sampler(families, here)
    with pytest.raises(
        ValueError, match="example 4: a prompt of 60 tokens and a response of 5 do not fit max_length 64"
    ):
        sampler.generate([Request(np.arange(60), 4)], SamplingParams(max_new_tokens=5), seed=0, step=0)
    with pytest.raises(ValueError, match="example 0: a prompt of 0 tokens"):
        sampler.generate([Request(np.zeros(0, np.int64), 0)], SamplingParams(max_new_tokens=5), seed=0, step=0)
    with pytest.raises(ValueError, match="example 2: prompt ids beyond the vocabulary of 512"):
        sampler.generate([Request(np.array([512]), 2)], SamplingParams(max_new_tokens=5), seed=0, step=0)
    with pytest.raises(ValueError, match="decode"):
        sampler.generate(requests_of(), SamplingParams(max_new_tokens=5, stop_strings=("x",)), seed=0, step=0)
    assert (
        len(
            sampler.generate([Request(np.arange(60), 4)], SamplingParams(max_new_tokens=4), seed=0, step=0)[
                0
            ].response_ids
        )
        == 4
    )
    assert sampler.generate([], SamplingParams(), seed=0, step=0) == []
    for bad in (
        {"top_p": 0.0},
        {"temperature": -1.0},
        {"max_new_tokens": 0},
        {"stop_strings": "text"},
        {"temperature": math.nan},
    ):
        with pytest.raises(ValueError, match=r"stop_strings|max_new_tokens"):
            SamplingParams(**bad)


def test_temperature_in_whole_responses(families, here):
    """logprobs under temperature, top-k and top-p from the model's own logits, by hand."""
    directory, _ = families("gemma2")
    lm = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    params = SamplingParams(max_new_tokens=6, temperature=0.6, top_k=40, top_p=0.9)
    for r in make_sampler(families, here, "gemma2").generate(requests_of(), params, seed=1, step=0):
        with torch.no_grad():
            z_LV = lm(torch.as_tensor(np.concatenate([r.prompt_ids, r.response_ids]))[None]).logits[
                0, len(r.prompt_ids) - 1 : -1
            ]
        for z_V, token, lp in zip(z_LV, r.response_ids.tolist(), r.logprobs, strict=True):
            assert abs(math.log(oracle(z_V.double().tolist(), params)[token]) - lp) < 2e-5
