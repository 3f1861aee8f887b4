"""Pages and who holds them, by property; attention over them beside its definition; responses whatever the pages."""

from __future__ import annotations

import sys
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from engine import world
from engine.errors import UserError
from rollout import Request, Sampler, SamplingParams, dense, room, rows, strips
from rollout.cache import Decode, Layer, PagedCache, Prefill, zeros
from rollout.dense import Dense
from rollout.kernels import eager
from rollout.pages import Layout, Pages, PagesInStrips, Strip
from rollout.sampler import BLOCK
from rollout.schedule import Response, Schedule
from tests.families import FAMILIES, load, save_family
from tests.rollout import naive

FP32, VOCAB = torch.float32, 512
CPU = torch.device("cpu")
LAYERS = {0: Layer(None, 1, 2, 2, FP32), 1: Layer(5, 1, 2, 2, FP32)}  # one layer that sees all, one with a window


# --- bookkeeping ------------------------------------------------------------------------------------------------------


def response(index: int, prompt: list[int], limit: int) -> Response:
    return Response(index, prompt, bytes(prompt), key=index, limit=limit)


def holders(schedule: Schedule, window: int | None) -> np.ndarray:
    """How many hold each page, counted from what everybody's tables say."""
    kind = schedule.kinds[window]
    counts = np.zeros(len(kind.users), np.int64)
    counts[0] = 1
    for r in schedule.active:
        counts[kind.tables[r.slot, kind.first[r.slot] : kind.end[r.slot]]] += 1
    for held in schedule._held.values():
        counts[[*held[window].whole, *([held[window].tail] if held[window].tail else [])]] += 1
    return counts


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 4), st.integers(1, 25)), min_size=1, max_size=6),
    block=st.sampled_from((1, 2, 4, 16)),
    slots=st.integers(1, 6),
    part=st.one_of(st.floats(0, 1), st.just("in strips")),
    order=st.sampled_from(("prompt by prompt", "sample by sample")),
    ends=st.randoms(use_true_random=False),
)
def test_every_page_has_the_users_that_hold_it(prompts, block, slots, part, order, ends):
    """Through joining, growing, setting back and ending at random, in pools from the least that is allowed to all that
    can be needed, and in strips: no page has two owners that do not share it, none is lost, what a query sees is there,
    and all end.
    """
    responses = [
        response(i, [number + 1] * length, limit)
        for i, (number, length, limit) in enumerate(
            (number, length, limit) for number, (length, samples, limit) in enumerate(prompts) for _ in range(samples)
        )
    ]
    if order == "sample by sample":
        number = {r.index: sum(o.prompt == r.prompt for o in responses[: r.index]) for r in responses}
        responses.sort(key=lambda r: number[r.index])
    asked, layout = room.wanted(responses, LAYERS, slots, block), None
    if part == "in strips":
        layout = room.layout_of(responses, slots, block)
        asked[None] = 0, layout.prompts.end
    share = 1.0 if layout else part
    counts = {window: least + int(share * (most - least)) for window, (least, most) in asked.items()}
    cache = PagedCache(LAYERS, counts, slots, max(r.room for r in responses) + 1, block, layout)
    schedule, ended = Schedule(cache, responses), set()
    while schedule.waiting or schedule.active:
        schedule.admit()
        before = list(schedule.active)
        schedule.grow()
        assert schedule.active, "somebody always goes on"
        assert schedule.active == before[: len(schedule.active)], "the youngest are set back"
        for window, kind in schedule.kinds.items():
            np.testing.assert_array_equal(holders(schedule, window), kind.users)
            assert kind.free == int((kind.users == 0).sum())
            own: list[int] = []
            for r in schedule.active:
                first, shared, end = (int(x[r.slot]) for x in (kind.first, kind.shared, kind.end))
                assert end * block > r.position and first == kind.unseen(r.position)
                own += kind.tables[r.slot, max(first, shared) : end].tolist()
                if kind.layout:  # side by side, in the slot's strip and in the prompt's
                    strip = kind.layout.own
                    begin = strip.first_page + r.slot * strip.pages
                    assert kind.tables[r.slot, shared:end].tolist() == [*range(begin, begin + end - shared)]
                    assert (np.diff(kind.tables[r.slot, :shared]) == 1).all() and end - shared <= strip.pages
            assert len(set(own)) == len(own) and 0 not in own
        for r in list(schedule.active):
            r.tokens.append(7)
            r.launched += 1
            if r.launched == r.limit or ends.random() < 0.05:
                schedule.leave(r)
                ended.add(r.index)
    assert ended == {r.index for r in responses}
    for kind in schedule.kinds.values():
        assert kind.free == len(kind.users) - 1 and not kind.tables.any()
    if part in (1, "in strips"):
        assert not schedule.set_back, "all that can be needed is enough"


def test_samples_hold_their_prompts_whole_pages_once():
    pages = Pages(20, 3, 40, 4, None)
    prompt = pages.hold(10)  # two whole pages and one with two positions on it
    assert len(prompt.whole) == 2 and prompt.tail and pages.free == 16
    own = [pages.join(slot, prompt) for slot in range(3)]
    assert pages.free == 13 and len({*own, prompt.tail}) == 4
    pages.drop(prompt)
    assert pages.free == 14 and pages.users[prompt.whole].tolist() == [3, 3]
    assert {tuple(pages.tables[slot, :2]) for slot in range(3)} == {tuple(prompt.whole)}
    for slot in range(3):
        pages.finish(slot)
    assert pages.free == 19


def test_a_window_gives_back_what_it_has_left():
    pages = Pages(50, 1, 200, 4, window=9)
    pages.begin(0, 0)
    for position in range(150):
        pages.slide(0, position)
        if pages.wants(0, position):
            pages.take(0)
        held = range(int(pages.first[0]) * 4, int(pages.end[0]) * 4)
        assert all(s in held for s in range(max(0, position - 8), position + 1)) and len(held) <= 9 + 7


# --- attention --------------------------------------------------------------------------------------------------------


def filled(pages: Pages, slots: int, groups: int, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Responses of random lengths in all slots, some of one prompt; returns their last positions."""
    last = np.zeros(slots, np.int64)
    for group in range(groups):
        length = int(rng.integers(0, 60))
        prompt = pages.hold(length) if samples > 1 else None
        for slot in range(group * samples, (group + 1) * samples):
            if prompt is None or rng.random() < 0.2:  # among those that share, one that does not
                pages.begin(slot, length)
            else:
                pages.join(slot, prompt)
            last[slot] = length + int(rng.integers(0, 40))
            for position in range(length, int(last[slot]) + 1):
                pages.slide(slot, position)
                if pages.wants(slot, position):
                    pages.take(slot)
        if prompt is not None:
            pages.drop(prompt)
    return last


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    block=st.sampled_from((1, 4, 16, 32)),
    window=st.one_of(st.none(), st.integers(1, 50)),
    softcap=st.sampled_from((None, 1.5)),
    sinks=st.booleans(),
    samples=st.sampled_from((1, 2, 5)),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    value_size=st.sampled_from((8, 6)),
    in_strips=st.booleans(),
    call=st.sampled_from((1, 300, 10**4)),
)
def test_attention_on_a_cpu_is_the_definition(
    seed, block, window, softcap, sinks, samples, kv_heads, group, value_size, in_strips, call
):
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    groups = 3
    if window is None and in_strips:
        own = Strip(1, -(-100 // block) + 1, groups * samples)
        layout = Layout(own, Strip(own.end, -(-60 // block), groups))
        pages = PagesInStrips(layout.prompts.end, groups * samples, 110, block, layout)
    else:
        pages = Pages(1500, groups * samples, 110, block, window)
    last = filled(pages, groups * samples, groups, samples, rng)
    count = len(pages.users)
    keys, values = (torch.randn(kv_heads, count, block, size).transpose(0, 1) for size in (8, value_size))
    order = rng.permutation(groups * samples)[: int(rng.integers(1, groups * samples + 1))]
    lengths = last[order] - pages.shared[order] * block + 1
    q_ANH = torch.randn(len(order), kv_heads * group, 8)
    sinks_N = torch.randn(kv_heads * group) if sinks else None
    tables, positions = torch.from_numpy(pages.tables[order]), torch.from_numpy(last[order])
    how = {"scale": 0.3, "softcap": softcap, "sinks_N": sinks_N}
    expected = eager.paged_attention(q_ANH.double(), keys, values, tables, positions, window=window, **how)
    plans = [rows.rows_of(pages, order, last[order], CPU), Dense.of(pages, order, last[order], CPU)]
    if pages.layout:
        size = kv_heads, strips.CALL // call  # as if it were so large
        last_but_two = strips.Strips.of(pages, order, last[order] - 2, size) if (lengths > 2).all() else None
        plans = [strips.Strips.of(pages, order, last[order], size, before) for before in (None, last_but_two)]
    for out in (plan.attend(q_ANH, keys, values, **how) for plan in plans):
        torch.testing.assert_close(out.double(), expected, atol=4e-6, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(1, 50)), min_size=1, max_size=7, unique_by=lambda of: of[0]),
    st.floats(0, 200),
    st.floats(0, 50),
)
def test_strips_are_read_together_where_that_is_cheapest(filled, call, strip):
    """Beside all ways to cut them."""
    places, lengths = (np.array(x) for x in zip(*sorted(filled), strict=True))

    def cost(cuts):
        return sum(call + (places[e - 1] - places[b] + 1) * (strip + lengths[b:e].max()) for b, e in pairwise(cuts))

    n = len(filled)
    inner = (some for size in range(n) for some in combinations(range(1, n), size))
    best = min(cost([0, *some, n]) for some in inner)
    found = strips._cuts(places, lengths, call, strip)
    assert found[0] == 0 and found[-1] == n and cost(found) == pytest.approx(best)


@pytest.mark.parametrize("by_rows", (True, False))
def test_what_is_written_is_read(by_rows):
    """Keys and values of a prefilled prompt and of a decoded token, from where the passes put them."""
    layers = {0: Layer(None, 1, 2, 2, FP32)}
    cache = PagedCache(layers, {None: 30}, 2, 40, 4)
    cache.allocate(CPU)
    pages = cache.kinds[None]
    pages.begin(1, 7)
    k, v = torch.randn(8, 1, 2), torch.randn(8, 1, 2)
    prefill = Prefill.of(cache, [{None: pages.tables[1]}], [7])
    prefill.write(0, k[:7], v[:7], None)
    tables = {None: torch.from_numpy(pages.tables[[1]])}
    slots, positions = np.array([1]), np.array([7])
    if by_rows:
        token = Decode.by_rows(cache, slots, positions, CPU)
    else:
        token = Decode.by_tables(cache, torch.from_numpy(positions), tables)
    token.write(0, k[7:], v[7:], None)
    q = torch.randn(1, 1, 2)
    out = token.read(0, q, scale=1.0, window=None, softcap=None, sinks_N=None)
    expected = (k[:, 0] @ q[0, 0]).softmax(0) @ v[:, 0]
    torch.testing.assert_close(out[0, 0], expected)


# --- responses --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory, embedded_dir):
    """(policy, the library's model) of a family, made once."""
    root, kept, here = tmp_path_factory.mktemp("families"), {}, world.start()

    def get(name: str):
        if name not in kept:
            directory = save_family(name, root / name, embedded_dir[0])
            lm = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
            kept[name] = load(directory, here, dtype=FP32), lm, here
        return kept[name]

    return get


def requests_of(seed: int) -> list[Request]:
    """Prompts of 1 to 40 tokens, 1 to 3 samples of each, limits of 1 to 20."""
    rng = np.random.default_rng(seed)
    return [
        Request(ids, example, sample, max_new_tokens=int(rng.integers(1, 21)))
        for example, ids in enumerate(rng.integers(2, VOCAB, int(rng.integers(1, 41))) for _ in range(4))
        for sample in range(int(rng.integers(1, 4)))
    ]


def sampler_of(made, name: str, *, pages: int | None = None, lag: int = 0, how: str = "rows", **layout) -> Sampler:
    policy, _, here = made(name)
    sampler = Sampler(policy.lm.config, policy, here, dtype=FP32, max_length=64, **layout)
    sampler.lag, sampler.how = lag, how
    sampler.load(policy)
    if pages is not None:
        inner = sampler.make_room

        def make_room(responses):
            """Of so many pages, or the least that the longest response needs."""
            before = room.counts
            room.counts = lambda memory, asked, *others: {
                w: max(low, min(high, pages)) for w, (low, high) in asked.items()
            }
            try:
                return inner(responses)
            finally:
                room.counts = before

        sampler.make_room = make_room
    return sampler


LAYOUTS = {
    "side by side": {"slots": 5, "block": 8},
    "one slot": {"slots": 1},
    "pages of 4": {"slots": 3, "block": 4},
    "pages of 64": {"slots": 64, "block": 64},
    "few pages": {"slots": 9, "block": 4, "pages": 24},
    "the fewest pages": {"slots": 9, "block": 2, "pages": 0},
    "results two tokens late": {"slots": 5, "lag": 2, "block": 8},
    "late, few pages": {"slots": 9, "block": 4, "pages": 0, "lag": 2},
    "by tables, late, few pages": {"slots": 9, "block": 4, "pages": 0, "how": "tables", "lag": 2},
    "by tables": {"slots": 5, "block": 8, "how": "tables", "lag": 1},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_responses_are_those_of_the_sampler_written_out(name, made, monkeypatch):
    """Whatever the pages, the order and the lag; log-probs to the rounding of a sum."""
    wanted = requests_of(1)
    params = SamplingParams(temperature=0.9, stop_ids=tuple(range(0, VOCAB, 40)))
    expected = naive.sample(made(name)[1], wanted, params, seed=3, step=2)
    for layout in LAYOUTS if name in ("llama", "gemma2", "gemma3") else ("few pages", "late, few pages"):
        sampler = sampler_of(made, name, **LAYOUTS[layout])
        monkeypatch.setattr(dense, "FEW", 4096 if layout == "side by side" else 0)
        order = np.random.default_rng(len(layout)).permutation(len(wanted))
        rollouts = sampler.generate([wanted[i] for i in order], params, seed=3, step=2)
        for i, r in zip(order, rollouts, strict=True):
            tokens, reason, logprobs, logprobs_t1 = expected[i]
            assert (r.response_ids.tolist(), r.finish_reason) == (tokens, reason), layout
            np.testing.assert_allclose(r.logprobs, logprobs, atol=2e-5)
            np.testing.assert_allclose(r.logprobs_t1, logprobs_t1, atol=2e-5)
        assert all(kind.free == len(kind.users) - 1 for kind in sampler.cache.kinds.values()), layout


def test_a_pool_that_runs_dry_sets_the_youngest_back(made, monkeypatch):
    """And they come to the same responses, run again from their own tokens."""
    wanted = [Request(ids, i, max_new_tokens=30) for i, ids in enumerate(np.arange(2, 82).reshape(8, 10))]
    reference = sampler_of(made, "llama", slots=8).generate(wanted, SamplingParams(), seed=0, step=0)
    seen: list[Schedule] = []
    grow = Schedule.grow
    monkeypatch.setattr(Schedule, "grow", lambda self: (seen.append(self), grow(self))[1])
    sampler = sampler_of(made, "llama", slots=8, block=4, pages=30)
    rollouts = sampler.generate(wanted, SamplingParams(), seed=0, step=0)
    assert seen[0].set_back > 5
    for a, b in zip(rollouts, reference, strict=True):
        assert a.response_ids.tolist() == b.response_ids.tolist()


def test_the_cache_holds_what_the_tokens_take(made, monkeypatch):
    """At every token, the memory of the pages in use is that of the tokens held, a prompt's whole pages once, and less
    than a page of each response and of the prompt beside.
    """
    wanted = [Request(np.arange(2, 42), 0, sample, max_new_tokens=20) for sample in range(6)]
    sampler = sampler_of(made, "llama", slots=6, block=4)
    bytes_of_token = sum(2 * 2 * 8 * 4 for _ in range(2))  # layers x (keys, values) x heads x size x float32
    found = []
    launch = Schedule.grow

    def looked(self: Schedule) -> None:
        launch(self)
        tokens = 36 + sum(r.position + 1 - 36 for r in self.active)
        found.append((self.cache.held_bytes, tokens * bytes_of_token, 4 * bytes_of_token * (len(self.active) + 1)))

    monkeypatch.setattr(Schedule, "grow", looked)
    sampler.generate(wanted, SamplingParams(), seed=0, step=0)
    assert len(found) == 20 and all(least <= held < least + rest for held, least, rest in found)


def test_what_is_held_beside_tokens_is_a_tenth():
    """Of 64 responses to 8 prompts, of lengths as they come, in pages of the sampler's size, over their whole lives."""
    rng = np.random.default_rng(0)
    limits = np.clip(512 * np.exp(rng.standard_normal(64) - 0.5), 1, 4096).astype(int)
    responses = [response(i, [i // 8 + 1] * int(200 + 7 * (i // 8)), int(limit)) for i, limit in enumerate(limits)]
    layers = {0: Layer(None, 1, 2, 2, FP32)}
    asked = room.wanted(responses, layers, 64, BLOCK)
    cache = PagedCache(layers, {w: most for w, (_, most) in asked.items()}, 64, 8192, BLOCK)
    schedule = Schedule(cache, responses)
    held = tokens = 0
    while schedule.waiting or schedule.active:
        schedule.admit()
        schedule.grow()
        held += cache.held_bytes
        prompts = {r.prompt_name: len(r.prompt) - 1 for r in schedule.active}
        tokens += sum(prompts.values()) + sum(r.position + 2 - len(r.prompt) for r in schedule.active)
        for r in list(schedule.active):
            r.launched += 1
            if r.launched == r.limit:
                schedule.leave(r)
    assert 1 < held / (tokens * layers[0].bytes_of(1)) < 1.1


def test_a_pool_takes_memory_as_it_is_written():
    """On a CPU, so that a pool of all that could be needed costs what is."""
    before = _resident()
    pool = zeros((8000, 4, 32, 64), torch.bfloat16, CPU)  # 125 MiB: more than malloc ever keeps for itself
    assert pool.shape == (8000, 4, 32, 64) and pool.dtype == torch.bfloat16 and _resident() - before < 8 * 2**20
    pool[:2000] = 1
    assert 30 * 2**20 < _resident() - before < 48 * 2**20 and not pool[2000:2100].any()


@pytest.mark.skipif(sys.platform != "linux", reason="what is given back may stay elsewhere")
def test_strips_take_what_their_responses_hold():
    """And give it back when these end, all of it and nothing of their neighbours'."""
    layer = Layer(None, 4, 64, 64, FP32)
    layout = Layout(Strip(1, 400, 8), Strip(1 + 8 * 400, 4, 3))
    cache = PagedCache({0: layer}, {None: layout.prompts.end}, 8, 400 * 16, 16, layout)
    before = _resident()
    cache.allocate(CPU)
    for slot in range(8):
        cache.kinds[None].begin(slot, 100 * 16)
        pages = torch.from_numpy(cache.kinds[None].tables[slot, :100].astype(np.int64))
        cache.keys[0][pages] = cache.values[0][pages] = slot + 1.0
    held = cache.held_bytes
    assert held == 800 * layer.bytes_of(16) == 25 * 2**20 and held <= _resident() - before < 1.1 * held
    for slot in (0, 1, 2, 4, 5, 7):
        cache.leave(slot)
    assert cache.held_bytes == held / 4 and held / 4 <= _resident() - before < 1.1 * held / 4 + 2**20
    for slot in (3, 6):
        own = slice(1 + 400 * slot, 1 + 400 * slot + 100)
        assert (cache.keys[0][own] == slot + 1).all() and (cache.values[0][own] == slot + 1).all()


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return 4096 * int(statm.read().split()[1])


def test_a_cache_that_does_not_hold_one_response_is_refused(made):
    policy, _, here = made("llama")
    sampler = Sampler(policy.lm.config, policy, here, dtype=FP32, max_length=64, memory=1e-12)
    sampler.load(policy)
    with pytest.raises(UserError, match=r"the cache of the longest response takes .* raise --rollout_memory"):
        sampler.generate(requests_of(0), SamplingParams(), seed=0, step=0)


@pytest.mark.parametrize("lag", (0, 2))
def test_a_response_ends_where_it_ends_however_late_that_is_heard(lag, made):
    """Token by token: what was computed after the end is not shown, and the end is said once."""
    sampler = sampler_of(made, "llama", lag=lag, how="tables", slots=1)
    params = SamplingParams(max_new_tokens=40, stop_ids=tuple(range(0, VOCAB, 8)))
    for sample in range(6):
        seen = list(sampler.tokens(Request(np.arange(2, 12), 0, sample), params, seed=0, step=0))
        assert [len(tokens) for tokens, _ in seen] == list(range(1, len(seen) + 1))
        assert [reason for _, reason in seen] == [""] * (len(seen) - 1) + ["stop" if len(seen) < 40 else "length"]
        assert not set(seen[-1][0][:-1]) & set(params.stop_ids)


def test_a_stream_ends_where_another_begins(made):
    sampler = sampler_of(made, "llama", slots=2)
    first = sampler.stream(requests_of(0), SamplingParams(), seed=0, step=0)
    next(first)
    second = sampler.generate(requests_of(0), SamplingParams(), seed=0, step=0)
    with pytest.raises(RuntimeError, match="another stream"):
        list(first)
    again = sampler.generate(requests_of(0), SamplingParams(), seed=0, step=0)
    assert [r.response_ids.tolist() for r in second] == [r.response_ids.tolist() for r in again]
