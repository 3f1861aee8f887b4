"""The command: judge many pairs, print the counts of every kind and each wrong pair; exit 1 if there is one."""

import argparse
import collections
import sys

from tests.verifiers.grammar import Pair, pairs
from verifiers import verify


def judge(pair: Pair) -> bool:
    """True if the verdict on the pair is the truth."""
    verdict = verify(pair.response, pair.label, pair.dataset)
    return verdict.status == "ok" and (verdict.score == 1) == pair.equal


def main() -> int:
    """The command."""
    flags = argparse.ArgumentParser(prog="python -m tests.verifiers.grammar", description=__doc__, allow_abbrev=False)
    flags.add_argument("--pairs", type=int, default=20_000, help="how many pairs")
    flags.add_argument("--seed", type=int, default=0, help="of the generator")
    options = flags.parse_args()
    counts: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0, 0])
    for pair in pairs(options.pairs, options.seed):
        right = judge(pair)
        counts[pair.kind][0 if pair.equal else 1] += 1
        counts[pair.kind][2] += not right
        if not right:
            print(f"{pair.kind}: {'equal' if pair.equal else 'not equal'}: {pair.response!r} against {pair.label!r}")
    print(f"{'kind':16} {'equal':>7} {'unequal':>8} {'wrong':>6}")
    for kind, (equal, unequal, wrong) in sorted(counts.items()):
        print(f"{kind:16} {equal:7} {unequal:8} {wrong:6}")
    total = [sum(column) for column in zip(*counts.values(), strict=True)]
    print(f"{'all':16} {total[0]:7} {total[1]:8} {total[2]:6}")
    return int(total[2] > 0)


if __name__ == "__main__":
    sys.exit(main())
