"""The sampler: continuous batching over pages of a KV cache, on the modules that are trained.

    while a response waits or is active:
        waiting responses join while there is room (schedule.py): their prompts are run, once for all samples of one
        one token for every active response (decoder.py): forward, logits, choice
        responses that end leave, and give their pages back

A prompt's last token is the first input of decoding, so prefill needs no logits and the n samples of a prompt share all
of its keys and values. For given float32 weights a response depends on (seed, step, example, sample), its prompt and
the parameters alone (noise.py): not on how many pages there are, who else is sampled, or how often it was set back.

T tokens of a stream · A active responses · D hidden · V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine import signals
from engine.model import attention
from engine.model.policy import Policy
from engine.world import World, on_device
from rollout import cache as caching
from rollout import handover, parallel, room
from rollout.choice import SamplingParams
from rollout.decoder import LAG, Decoder, Launched
from rollout.noise import response_key
from rollout.schedule import Joined, Response, Schedule

PREFILL_TOKENS = 8192  # of one prefill pass
TAIL = 16  # tokens decoded beyond the characters of the longest stop string: tokens may be less than a character
BLOCK = 32  # positions of a page
FEW_ROWS = range(4, 17)  # of which a CPU's product with a large matrix takes up to twice as long as the other way round
SLOTS = {"cpu": 64, "cuda": 512}  # responses at a time, where nobody says how many: more are no faster
HOW = {"cpu": "rows", "cuda": "graphs"}  # to decode: page by page, or in batches that are graphs
SHARE = {"cpu": 0.5, "cuda": 0.9}  # of the memory that is free when sampling begins
SHARE_BESIDE = {"cpu": 0.25, "cuda": 0.3}  # the same where training goes on beside it


def default_share(kind: str, weights: str = "shared") -> float:
    """Of the memory that is free, where nobody says how much the cache may take."""
    return (SHARE_BESIDE if weights == "apart" else SHARE)[kind]


@dataclass(frozen=True)
class Request:
    """One response wanted: sample `sample` of example `example`, whose prompt is `prompt_ids` (int array, at least one
    token).

    `max_new_tokens` overrides the parameters'; `expected_length` (any unit) lets the longest start first.
    """

    prompt_ids: np.ndarray
    example: int
    sample: int = 0
    max_new_tokens: int | None = None
    expected_length: float | None = None


@dataclass(frozen=True)
class Rollout:
    """One response. Example, of the prompt [5, 9, 4] with the stop id 2:

    Rollout(example=17, sample=0, prompt_ids=[5, 9, 4], response_ids=[8, 6, 2], logprobs=[-1.25, -0.5, -0.125],
            logprobs_t1=[-1.5, -0.75, -0.25], finish_reason='stop')
    """

    example: int
    sample: int
    prompt_ids: np.ndarray  # int64
    response_ids: np.ndarray  # int64; the stop token is its last where finish_reason is 'stop'
    logprobs: np.ndarray  # float32, under the distribution that was sampled: after temperature, top-k and top-p
    logprobs_t1: np.ndarray  # float32, at temperature 1 from the whole distribution: what the trainer computes
    finish_reason: str  # 'stop' | 'length'


@dataclass
class Used:
    """What a stream has taken so far."""

    bytes: int = 0  # the most that its pages in use came to
    set_back: int = 0  # times that a response was


class Sampler:
    """Samples responses of the policy on its own copy of the weights, each rank for itself."""

    def __init__(
        self,
        config: Any,
        policy: Policy,
        world: World,
        *,
        dtype: torch.dtype,
        max_length: int,
        slots: int | None = None,
        memory: float | None = None,
        block: int = BLOCK,
        decode: Callable[[list[int]], str] | None = None,
        backend: str = "auto",
        tensor_parallel: int = 1,
        weights: str = "shared",
    ) -> None:
        """The modules of `config`'s family, empty until `load`, on the policy's device.

        Args: `dtype` to compute in; `max_length` tokens of prompt and response together; `slots` responses at once, at
        most (None: SLOTS); `memory` of the cache as a share of what is free when sampling begins (None: SHARE), of
        which no more is taken than the requests can need; `block` positions of a page; `decode` ids to text, for stop
        strings; `backend` of the prompts' attention; `tensor_parallel` neighbouring ranks share one sampler, and draw
        the same responses together; `weights`: 'shared' with the policy where they need no copy, 'gathered' to give
        back what is a copy on `release`, 'apart' where the policy is trained meanwhile. Raises ValueError, and
        UserError for a model that cannot be shared.
        """
        kind = world.device.type
        slots = SLOTS[kind] if slots is None else slots
        if slots < 1 or max_length < 2 or block < 1:
            raise ValueError(f"slots >= 1, max_length >= 2 and block >= 1, not {slots}, {max_length} and {block}")
        if backend == "auto":
            backend, _ = attention.choose_backend("auto", world.device, config, dtype)
        self.team = parallel.Team.of(world, tensor_parallel)
        attention_name = caching.register(attention.packed(backend))
        shared = policy.lm if world.size == 1 and weights != "apart" else None
        self.lm: Any = parallel.build(config, attention_name, dtype, world.device, self.team, shared)
        self.transform = policy.transform
        self.world, self.decode = world, decode
        self.slots, self.max_length, self.block = slots, max_length, block
        self.share = default_share(kind, weights) if memory is None else memory
        self.gathers = weights == "gathered"
        self.lag, self.how = LAG[kind], HOW[kind]
        self.cache: caching.PagedCache | None = None
        self.used = Used()
        self.layers: dict[int, caching.Layer] = {}  # what each keeps of a token: known after the first forward
        self._streams = 0

    def load(self, policy: Policy) -> None:
        """The policy's current weights into the sampler. Collective."""
        handover.load(self.lm, policy.lm, self.world)

    def release(self) -> None:
        """Frees the cache, which the next `generate` makes again, and weights that the next `load` gathers again."""
        self.cache = None
        if self.gathers:
            handover.give_back(self.lm)

    def generate(self, requests: Sequence[Request], params: SamplingParams, *, seed: int, step: int) -> list[Rollout]:
        """A response for every request, in the order of the requests. No collective. Raises ValueError as `stream`
        does.
        """
        rollouts: dict[int, Rollout] = dict(self.stream(requests, params, seed=seed, step=step))
        return [rollouts[i] for i in range(len(requests))]

    def stream(
        self, requests: Sequence[Request], params: SamplingParams, *, seed: int, step: int
    ) -> Iterator[tuple[int, Rollout]]:
        """(index of the request, response) as they finish, so that they can be verified while others are sampled.

        Requests start in their order, or longest `expected_length` first where they have one. Raises ValueError for a
        request that does not fit `max_length`, an empty prompt, ids beyond the vocabulary, or stop strings without a
        `decode`; UserError where the memory does not hold the longest of them. A stream ends where another begins.
        """
        self._check(requests, params)
        order = sorted(range(len(requests)), key=lambda i: -(requests[i].expected_length or 0.0))  # stable
        responses = [self._response(i, requests[i], params, seed, step) for i in order]
        for response in self._run(responses, params):
            if response.reason:
                yield response.index, _rollout(requests[response.index], response)

    def tokens(
        self, request: Request, params: SamplingParams, *, seed: int, step: int
    ) -> Iterator[tuple[list[int], str]]:
        """One response as it grows: (its tokens so far, why it ended or '') after each of them; the tokens are those
        that `generate` gives. Left before its end, the sampler is as good as before. Raises as `stream` does.
        """
        self._check([request], params)
        for response in self._run([self._response(0, request, params, seed, step)], params):
            yield list(response.tokens), response.reason

    def _check(self, requests: Sequence[Request], params: SamplingParams) -> None:
        if params.stop_strings and self.decode is None:
            raise ValueError("stop_strings need a sampler with `decode`")
        vocab = len(self.lm.get_input_embeddings().weight)
        for request in requests:
            length, limit = len(request.prompt_ids), _limit(request, params)
            if length + limit > self.max_length:
                raise ValueError(
                    f"example {request.example}: a prompt of {length} tokens and a response of {limit} do not fit"
                    f" max_length {self.max_length}"
                )
            if length == 0 or limit < 1:
                raise ValueError(
                    f"example {request.example}: a prompt of {length} tokens and a response of {limit}; both need one"
                )
            if np.min(request.prompt_ids) < 0 or np.max(request.prompt_ids) >= vocab:
                raise ValueError(f"example {request.example}: prompt ids beyond the vocabulary of {vocab}")

    def _response(self, index: int, request: Request, params: SamplingParams, seed: int, step: int) -> Response:
        ids = np.asarray(request.prompt_ids, np.int64)
        key = response_key(seed, step, request.example, request.sample)
        return Response(index, ids.tolist(), ids.tobytes(), key, _limit(request, params))

    # --- the loop -----------------------------------------------------------------------------------------------------

    def _run(self, responses: list[Response], params: SamplingParams) -> Iterator[Response]:
        """Every response, each time that the host sees a token of it; the last time it has a `reason`."""
        self._streams += 1
        number = self._streams
        with torch.inference_mode():
            cache = self.make_room(responses)
            schedule = Schedule(cache, responses)
            decoder = Decoder(self.forward, self.logits, cache, params, self.world.device, self.how)
        launched: deque[Launched] = deque()
        self.used = Used()
        while schedule.waiting or schedule.active or launched:
            if number != self._streams:
                raise RuntimeError("another stream of this sampler has begun, and has its pages")
            signals.between_tokens(alone=self.team.size == 1)  # a team would have to agree first: it draws to the end
            with torch.inference_mode():  # never while the consumer runs
                self.prefill(schedule.admit())
                if schedule.active and not (launched and schedule.is_short()):  # to set back is to know what there is
                    schedule.grow()
                    self.used = Used(max(self.used.bytes, cache.held_bytes), schedule.set_back)
                    launched.append(decoder.launch(schedule))
                    self._leave_at_their_limits(schedule)
                seen = []
                if len(launched) > self.lag or not schedule.active or schedule.is_short():
                    seen = self._see(launched.popleft(), schedule, params)
            yield from seen

    @staticmethod
    def _leave_at_their_limits(schedule: Schedule) -> None:
        """Who has been asked for the last token that it may have, gives its pages back."""
        for response in [r for r in schedule.active if r.launched == r.limit]:
            schedule.leave(response)

    def _see(self, launched: Launched, schedule: Schedule, params: SamplingParams) -> list[Response]:
        """The host learns of a token of each response; what came after an end is thrown away."""
        seen = []
        for response, token, *logprobs in zip(launched.responses, *launched.read(), strict=True):
            if response.reason:
                continue
            response.tokens.append(int(token))
            response.logprobs.append(logprobs[0])
            response.logprobs_t1.append(logprobs[1])
            response.reason = self._reason_to_stop(response, params)
            if response.reason and response.launched < response.limit:
                schedule.leave(response)
            seen.append(response)
        return seen

    def _reason_to_stop(self, response: Response, params: SamplingParams) -> str:
        if response.tokens[-1] in params.stop_ids:
            return "stop"
        if params.stop_strings:
            assert self.decode is not None, "_check has seen it"
            tail = self.decode(response.tokens[-(max(map(len, params.stop_strings)) + TAIL) :])
            if any(string in tail for string in params.stop_strings):
                return "stop"
        return "length" if len(response.tokens) == response.limit else ""

    # --- memory -------------------------------------------------------------------------------------------------------

    def make_room(self, responses: Sequence[Response]) -> caching.PagedCache:
        """The cache, with no owner of its pages: as many as these can need, or as the memory holds. Raises UserError
        where that is less than the longest of them needs.
        """
        if not self.layers:
            probe = caching.Probe(on_device(torch.zeros(1, dtype=torch.int64), self.world.device))
            self.forward(probe.positions_T, probe)
            self.layers = probe.layers
        slots = max(1, min(self.slots, len(responses))) if self.how == "rows" else self.slots
        scattered, layout = room.wanted(responses, self.layers, slots, self.block), None
        wanted = scattered
        if self.how == "rows" and None in scattered:
            layout = room.layout_of(responses, slots, self.block)
            wanted = scattered | {None: (scattered[None][0], layout.prompts.end)}
        if self.cache is not None and self.cache.holds(wanted, layout):
            self.cache.reset(slots, layout)
            return self.cache
        self.cache = None  # its memory is free before the next is made
        memory = int(self.share * self.team.least(room.free_memory(self.world)))  # all of a team set back the same
        counts = room.counts(memory, wanted, self.layers, self.block)
        if layout and any(counts[w] < most for w, (_, most) in wanted.items()):
            counts, layout = room.counts(memory, scattered, self.layers, self.block), None
        self.cache = caching.PagedCache(self.layers, counts, slots, self.max_length, self.block, layout)
        self.cache.allocate(self.world.device)
        return self.cache

    # --- forwards -----------------------------------------------------------------------------------------------------

    def prefill(self, joined: Joined) -> None:
        """Runs prompts as packed streams of at most PREFILL_TOKENS, or of one prompt; then copies pages."""
        assert self.cache is not None
        begin, tokens = 0, 0
        for i, ids in enumerate(joined.prompts):
            if i > begin and tokens + len(ids) > PREFILL_TOKENS:
                self._prefill_stream(joined, slice(begin, i))
                begin, tokens = i, 0
            tokens += len(ids)
        if joined.prompts:
            self._prefill_stream(joined, slice(begin, None))
        for window, sources in joined.sources.items():
            self.cache.copy(window, sources, joined.targets[window])

    def _prefill_stream(self, joined: Joined, some: slice) -> None:
        assert self.cache is not None
        prompts = joined.prompts[some]
        ids_T = on_device(torch.tensor([token for ids in prompts for token in ids]), self.world.device)
        self.forward(ids_T, caching.Prefill.of(self.cache, joined.columns[some], [len(ids) for ids in prompts]))

    def forward(self, ids_T: Tensor, rollout: caching.Prefill | caching.Decode | caching.Probe) -> Tensor:
        body = self.lm.base_model
        return body(
            input_ids=ids_T[None], position_ids=rollout.positions_T[None], use_cache=False, rollout=rollout
        ).last_hidden_state[0]

    def logits(self, hidden_AD: Tensor) -> Tensor:
        """(A, V) fp32, by the products that the trainer's head takes."""
        weight_VD = self.team.head(self.lm)  # of a team: this rank's rows
        if hidden_AD.is_cuda and hidden_AD.dtype != torch.float32:
            # the tensor cores' own accumulator, not rounded to bf16
            part_AV = torch.mm(hidden_AD, weight_VD.T, out_dtype=torch.float32)
        elif not hidden_AD.is_cuda and len(hidden_AD) in FEW_ROWS:
            part_AV = (weight_VD @ hidden_AD.T).T.contiguous().float()
        else:
            part_AV = (hidden_AD @ weight_VD.T).float()
        return self.transform(self.team.join(part_AV, len(self.lm.get_input_embeddings().weight)))


def _limit(request: Request, params: SamplingParams) -> int:
    return request.max_new_tokens if request.max_new_tokens is not None else params.max_new_tokens


def _rollout(request: Request, response: Response) -> Rollout:
    return Rollout(
        request.example,
        request.sample,
        prompt_ids=np.asarray(response.prompt, np.int64),
        response_ids=np.asarray(response.tokens, np.int64),
        logprobs=np.asarray(response.logprobs, np.float32),
        logprobs_t1=np.asarray(response.logprobs_t1, np.float32),
        finish_reason=response.reason,
    )
