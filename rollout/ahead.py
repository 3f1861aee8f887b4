"""The responses of a step: drawn by its own weights or, with --rollout_ahead 1, while the step before is learnt from.

    step s      takes the responses of s                          drawn by theta_(s-1); in the first step by theta_0
                begins those of s + 1, in a thread beside         drawn by theta_s
                learns: theta_s -> theta_(s+1), meanwhile

What is drawn is a function of weights, seed, step, example and sample alone, so it does not depend on how fast either
side is: the thread changes when a response is known, and not what it is. pi_old of responses that are one update old is
what they were drawn from, by the log-probs that the sampler wrote down: the weights are gone. A checkpoint holds the
responses that are under way; it waits for them.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from engine import signals
from engine.model import Policy
from engine.train import Run
from rollout.collect import Collector, Drawn
from rollout.sampler import Rollout
from verifiers import Verdict

ARRAYS = {"prompt_ids": np.int64, "response_ids": np.int64, "logprobs": np.float32, "logprobs_t1": np.float32}


Draw = Callable[[Collector, int], Drawn]
"""How the responses of a step are drawn, on every rank. Collective."""


class Sampling:
    """What a run learns from, step by step; also what is drawn beside its steps, which its checkpoints hold."""

    def __init__(self, collect: Collector, policy: Policy, draw: Draw, run: Run, ahead: int = 0) -> None:
        """`ahead`: 0, or 1 to draw the next step's responses while one is learnt from. Collective."""
        self.collect, self.policy, self.draw, self.run = collect, policy, draw, run
        self._beside: Collector | None = None
        self._thread: _Thread | None = None
        self._drawn: Drawn | None = None  # of the step after this one
        if ahead:
            self._beside = copy.copy(collect)
            self._beside.world = collect.world.beside()
            run.remember(self)

    def __call__(self, step: int) -> tuple[Drawn, int]:
        """(the responses of a step, how many updates old the weights are that drew them). Collective. Raises Stopped,
        and what the sampler or a verifier raises.
        """
        drawn, age = self.wait(), 1
        if drawn is None:
            self.load()
            drawn, age = self.draw(self.collect, step), 0
        else:
            self.collect.world.end_if_asked()  # before a step that a checkpoint of these responses makes needless
        self._drawn = None
        if self._beside is not None and step + 1 < self.run.plan.total:
            self.load()
            self._thread = _Thread(self.draw, self._beside, step + 1)
        else:
            self.collect.sampler.release()  # its cache makes room for activations
        return drawn, age

    def load(self) -> None:
        """The policy's current weights into the sampler, once nothing is drawn by others. Collective."""
        self.wait()
        self.collect.sampler.load(self.policy)

    def wait(self) -> Drawn | None:
        """What is drawn beside, when it is there."""
        if self._thread is not None:
            self.collect.world.phase("sampling")
            thread, self._thread = self._thread, None
            self._drawn = thread.result()
        return self._drawn

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any] | None:
        """The responses of the next step, as JSON has it: float32 survives it to the bit."""
        drawn = self.wait()
        if drawn is None:
            return None
        responses = [
            vars(rollout) | {name: vars(rollout)[name].tolist() for name in ARRAYS} for rollout in drawn.rollouts
        ]
        return {"responses": responses, "verdicts": drawn.verdicts, "row": drawn.row}

    def restore(self, state: dict[str, Any]) -> None:
        """Those of a checkpoint."""
        rollouts = [
            Rollout(**response | {name: np.array(response[name], dtype) for name, dtype in ARRAYS.items()})
            for response in state["responses"]
        ]
        self._drawn = Drawn(rollouts, [Verdict(*verdict) for verdict in state["verdicts"]], state["row"])

    def close(self) -> None:
        """Ends what is drawn beside, at its next token."""
        if self._thread is not None:
            signals.drop_what_is_drawn_beside(True)
            self._thread.join(timeout=30)  # a rank that waits for one that is gone may never hear of it
            signals.drop_what_is_drawn_beside(False)
            self._thread = None


class _Thread(threading.Thread):
    """Draws the responses of a step, on a stream of its own where the device has streams."""

    def __init__(self, draw: Draw, collect: Collector, step: int) -> None:
        super().__init__(name="sampling", daemon=True)
        self._work = lambda: draw(collect, step)
        self._drawn: Drawn | None = None
        self._error: BaseException | None = None
        self._device, self._stream = collect.world.device, None
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)
            self._stream.wait_stream(torch.cuda.current_stream(self._device))  # the weights are there
        self.start()

    def run(self) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # which is a thread's own
            with torch.cuda.stream(self._stream):  # of None: nothing
                self._drawn = self._work()
        except BaseException as error:  # raised where it is waited for
            self._error = error

    def result(self) -> Drawn | None:
        self.join()
        if self._error is not None:
            raise self._error
        return self._drawn
