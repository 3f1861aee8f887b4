"""The sampler: continuous batching over slots of a KV cache, on the modules that are trained.

    while a request waits or a slot is active:
        every free slot takes the next request: its prompt (all but the last token) is in a slot already, or prefilled
        one token for every active slot: forward, logits, choice
        responses that end leave their slots

A prompt's last token is the first input of decoding, so prefill needs no logits and the n samples of a prompt share all
of its keys and values: it is run once, and its slot's contents are copied to the others. A finished response's slot is
filled again before the next token; when nothing waits, the last active slot moves into the gap, so that the active
slots are always the first ones. For given float32 weights a response depends on (seed, step, example, sample), its
prompt and the parameters alone (noise.py).

T tokens of a stream · A active slots · D hidden · V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine import signals
from engine.model import attention
from engine.model.policy import Policy
from engine.world import World, on_device
from rollout import cache as caching
from rollout import handover
from rollout.choice import SamplingParams, choose
from rollout.noise import response_key

PREFILL_TOKENS = 8192  # of one prefill pass
TAIL = 16  # tokens decoded beyond the characters of the longest stop string: tokens may be less than a character


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
class _Sequence:
    """A response in the making."""

    index: int  # of its request
    request: Request
    prompt: list[int]
    prompt_name: bytes
    key: int
    limit: int
    response: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    logprobs_t1: list[float] = field(default_factory=list)

    @property
    def position(self) -> int:
        """Of its next input: the last token that there is."""
        return len(self.prompt) + len(self.response) - 1

    def rollout(self, reason: str) -> Rollout:
        return Rollout(
            self.request.example,
            self.request.sample,
            prompt_ids=np.asarray(self.prompt, np.int64),
            response_ids=np.asarray(self.response, np.int64),
            logprobs=np.asarray(self.logprobs, np.float32),
            logprobs_t1=np.asarray(self.logprobs_t1, np.float32),
            finish_reason=reason,
        )


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
        slots: int,
        decode: Callable[[list[int]], str] | None = None,
        backend: str = "auto",
        make_cache: Callable[[int, int], caching.SlotCache] = caching.SlotCache,
    ) -> None:
        """The modules of `config`'s family, empty until `load`, on the policy's device.

        Args: `dtype` to compute in; `max_length` tokens of prompt and response together; `slots` responses at once (the
        cache holds slots x max_length); `decode` ids to text, for stop strings; `backend` of the prompts' attention;
        `make_cache` makes a cache of (slots, max_length). Raises ValueError.
        """
        if slots < 1 or max_length < 2:
            raise ValueError(f"slots >= 1 and max_length >= 2, not {slots} and {max_length}")
        if backend == "auto":
            backend, _ = attention.choose_backend("auto", world.device, config, dtype)
        self.lm: Any = handover.skeleton(config, caching.register(attention.packed(backend)), dtype, world.device)
        self.transform, self.make_cache = policy.transform, make_cache
        self.world, self.decode = world, decode
        self.slots, self.max_length = slots, max_length
        self._holds: list[bytes | None] = []  # the prompt whose keys and values a slot's beginning holds
        self.release()

    def load(self, policy: Policy) -> None:
        """The policy's current weights into the sampler. Collective."""
        handover.load(self.lm, policy.lm, self.world)
        self._holds = [None] * self.slots

    def release(self) -> None:
        """Frees the cache; the next `generate` makes it again."""
        self.cache = self.make_cache(self.slots, self.max_length)
        self._holds = [None] * self.slots

    def generate(self, requests: Sequence[Request], params: SamplingParams, *, seed: int, step: int) -> list[Rollout]:
        """A response for every request, in the order of the requests. No collective. Raises ValueError as `stream`
        does.
        """
        rollouts: dict[int, Rollout] = dict(self.stream(requests, params, seed=seed, step=step))
        return [rollouts[i] for i in range(len(requests))]

    @torch.inference_mode()
    def stream(
        self, requests: Sequence[Request], params: SamplingParams, *, seed: int, step: int
    ) -> Iterator[tuple[int, Rollout]]:
        """(index of the request, response) as they finish, so that they can be verified while others are sampled.

        Requests start in their order, or longest `expected_length` first where they have one. Raises ValueError for a
        request that does not fit `max_length`, an empty prompt, ids beyond the vocabulary, or stop strings without a
        `decode`.
        """
        self._check(requests, params)
        order = sorted(range(len(requests)), key=lambda i: -(requests[i].expected_length or 0.0))  # stable
        waiting = deque(self._sequence(i, requests[i], params, seed, step) for i in order)
        active: list[_Sequence | None] = []  # by slot; None: a gap
        while waiting or active:
            self._fill(active, waiting)
            signals.between_tokens()
            for slot, sequence, reason in self._advance(active, params):
                active[slot] = None
                yield sequence.index, sequence.rollout(reason)
            if len(waiting) < self.slots:  # too few to fill every gap, perhaps
                self._close_gaps(active)

    @torch.inference_mode()
    def tokens(
        self, request: Request, params: SamplingParams, *, seed: int, step: int
    ) -> Iterator[tuple[list[int], str]]:
        """One response as it grows: (its tokens so far, why it ended or '') after each of them; the tokens are those
        that `generate` gives. Left before its end, the sampler is as good as before. Raises ValueError as `stream`
        does.
        """
        self._check([request], params)
        sequence = self._sequence(0, request, params, seed, step)
        active: list[_Sequence | None] = []
        self._fill(active, deque([sequence]))
        reason = ""
        while not reason:
            for _, _, ended in self._advance(active, params):  # none, or this one
                reason = ended
            yield list(sequence.response), reason

    def _check(self, requests: Sequence[Request], params: SamplingParams) -> None:
        if params.stop_strings and self.decode is None:
            raise ValueError("stop_strings need a sampler with `decode`")
        vocab = self.lm.get_output_embeddings().weight.shape[0]
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

    def _sequence(self, index: int, request: Request, params: SamplingParams, seed: int, step: int) -> _Sequence:
        ids = np.asarray(request.prompt_ids, np.int64)
        key = response_key(seed, step, request.example, request.sample)
        return _Sequence(index, request, ids.tolist(), ids.tobytes(), key, _limit(request, params))

    # --- slots --------------------------------------------------------------------------------------------------------

    def _fill(self, active: list[_Sequence | None], waiting: deque[_Sequence]) -> None:
        """Free slots take the next requests, each preferably one that holds its prompt already; prompts nowhere held
        are prefilled.
        """
        active += [None] * (min(self.slots, len(active) + len(waiting)) - len(active))
        free = [slot for slot, sequence in enumerate(active) if sequence is None]
        joined = []
        while free and waiting:
            sequence = waiting.popleft()
            slot = next((s for s in free if self._holds[s] == sequence.prompt_name), free[0])
            free.remove(slot)
            active[slot] = sequence
            if self._holds[slot] != sequence.prompt_name:
                self._holds[slot] = None
                joined.append((slot, sequence))
        if not joined:
            return
        source: dict[bytes, int] = {name: slot for slot, name in enumerate(self._holds) if name is not None}
        prefill = {}
        for slot, sequence in joined:
            if sequence.prompt_name not in source:
                source[sequence.prompt_name] = slot
                prefill[slot] = sequence.prompt[:-1]
        self.prefill(prefill)
        for slot, sequence in joined:
            if source[sequence.prompt_name] != slot:
                self.cache.copy(source[sequence.prompt_name], slot, len(sequence.prompt) - 1)
            self._holds[slot] = sequence.prompt_name

    def _close_gaps(self, active: list[_Sequence | None]) -> None:
        """Moves the last active slots into the gaps."""
        slot = 0
        while slot < len(active):
            if active[slot] is not None:
                slot += 1
            elif (last := active.pop()) is not None:
                self.cache.copy(len(active), slot, last.position)
                active[slot], self._holds[slot] = last, self._holds[len(active)]

    # --- forwards -----------------------------------------------------------------------------------------------------

    def prefill(self, prompts: dict[int, list[int]]) -> None:
        """Runs prompts (by slot) as packed streams of at most PREFILL_TOKENS, or of one prompt."""
        stream: list[tuple[int, list[int]]] = []
        for slot, ids in prompts.items():
            if not ids:
                continue
            if stream and sum(len(x) for _, x in stream) + len(ids) > PREFILL_TOKENS:
                self._prefill_stream(stream)
                stream = []
            stream.append((slot, ids))
        if stream:
            self._prefill_stream(stream)

    def _prefill_stream(self, stream: list[tuple[int, list[int]]]) -> None:
        lengths = tuple(len(ids) for _, ids in stream)
        rows = [(token, slot, position) for slot, ids in stream for position, token in enumerate(ids)]
        ids_T, slots_T, positions_T = on_device(torch.tensor(rows).T.contiguous(), self.world.device)
        self.forward(ids_T, caching.Pass(self.cache, slots_T, positions_T, max(lengths), lengths))

    def forward(self, ids_T: Tensor, rollout: caching.Pass) -> Tensor:
        body = self.lm.base_model
        return body(
            input_ids=ids_T[None], position_ids=rollout.positions_T[None], use_cache=False, rollout=rollout
        ).last_hidden_state[0]

    def _advance(self, active: list[_Sequence | None], params: SamplingParams) -> list[tuple[int, _Sequence, str]]:
        """One token for every active slot. Returns the slots that are finished, with what they hold, and why."""
        sequences = [sequence for sequence in active if sequence is not None]  # no gap is left by now
        rows = [
            ((s.response or s.prompt)[-1], slot, s.position, len(s.response), s.key) for slot, s in enumerate(sequences)
        ]
        ids_A, slots_A, positions_A, taken_A, keys_A = on_device(torch.tensor(rows).T.contiguous(), self.world.device)
        longest = 1 + max(s.position for s in sequences)
        hidden_AD = self.forward(ids_A, caching.Pass(self.cache, slots_A, positions_A, longest))
        chosen = choose(self.logits(hidden_AD), params, keys_A, taken_A)
        together = torch.stack([x.double() for x in chosen])
        tokens, logprobs, logprobs_t1 = together.tolist()  # the one synchronisation of a token
        finished = []
        for slot, sequence in enumerate(sequences):
            sequence.response.append(int(tokens[slot]))
            sequence.logprobs.append(logprobs[slot])
            sequence.logprobs_t1.append(logprobs_t1[slot])
            if reason := self._reason_to_stop(sequence, params):
                finished.append((slot, sequence, reason))
        return finished

    def logits(self, hidden_AD: Tensor) -> Tensor:
        """(A, V) fp32, by the products that the trainer's head takes."""
        weight_VD = self.lm.get_output_embeddings().weight
        if hidden_AD.is_cuda and hidden_AD.dtype != torch.float32:
            # the tensor cores' own accumulator, not rounded to bf16
            return self.transform(torch.mm(hidden_AD, weight_VD.T, out_dtype=torch.float32))
        return self.transform((hidden_AD @ weight_VD.T).float())

    def _reason_to_stop(self, sequence: _Sequence, params: SamplingParams) -> str:
        if sequence.response[-1] in params.stop_ids:
            return "stop"
        if params.stop_strings:
            assert self.decode is not None, "_check has seen it"
            tail = self.decode(sequence.response[-(max(map(len, params.stop_strings)) + TAIL) :])
            if any(string in tail for string in params.stop_strings):
                return "stop"
        return "length" if len(sequence.response) == sequence.limit else ""


def _limit(request: Request, params: SamplingParams) -> int:
    return request.max_new_tokens if request.max_new_tokens is not None else params.max_new_tokens
