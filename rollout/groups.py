"""Groups of responses to one prompt each: sampled, and sampled again where all of a group are right or all wrong.

K responses of a group.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.data.mixture import permutation
from engine.data.prompts import Prompt
from engine.flags import RlvrFlags
from rollout.collect import Collector, Drawn
from rollout.sampler import Rollout
from verifiers import Verdict

Group = list[tuple[Rollout, Verdict]]


def sample_groups(
    collect: Collector, prompts: Sequence[Prompt], examples: np.ndarray, flags: RlvrFlags, step: int, redraws: int
) -> Drawn:
    """The responses to learn from, group by group, with what the groups were like. Collective.

    With `redraws` (DAPO's dynamic sampling, arXiv 2503.14476, section 3.2), groups whose verdicts are all the same make
    place for those of other prompts, in an order that is a function of (seed, step), for as many rounds. What is still
    missing then is left out; where no group differs at all, the step's own are kept.
    """
    samples = flags.num_samples_per_prompt
    order = permutation(len(prompts), flags.seed, "dynamic", step)
    wanted, others = examples, order[~np.isin(order, examples)]
    drawn: list[Group] = []
    kept: list[Group] = []
    for number in range(1 + redraws):
        found = collect(prompts, wanted, samples, step, shown="again: " if number else "")
        pairs = list(zip(found.rollouts, found.verdicts, strict=True))
        groups = [pairs[i : i + samples] for i in range(0, len(pairs), samples)]
        drawn, kept = drawn + groups, kept + [group for group in groups if differs(group)]
        missing = len(examples) - len(kept)
        wanted, others = others[:missing], others[missing:]
        if not len(wanted):
            break
    used = kept if redraws and kept else drawn[: len(examples)]
    row = found.row | tally(drawn)
    return Drawn([r for group in used for r, _ in group], [v for group in used for _, v in group], row)


def differs(group: Group) -> bool:
    """Whether some responses of a group were judged better than others."""
    return len({verdict.score for _, verdict in group if verdict.status == "ok"}) > 1


def tally(groups: list[Group]) -> dict[str, float]:
    """How many there were; the shares in which responses differ, all are right, and at least one is."""
    right = [[verdict.score > 0 for _, verdict in group] for group in groups]
    return {
        "groups/drawn": len(groups),
        "groups/signal": float(np.mean([differs(group) for group in groups])),
        "groups/all_right": float(np.mean([all(group) for group in right])),
        f"groups/pass_at_{len(groups[0])}": float(np.mean([any(group) for group in right])),
    }
