"""python -m tests.mutants [--only NAME ...] [--json FILE]        (make mutants)

Every mutant of the catalogue is planted in a copy of the tracked files, alone, and its tests are run there: a line for
each says which test caught it, or that it SURVIVED, or that it is STALE. Exit status 1 if one is stale, or more than
3 % of those that can be seen survive.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from tests.mutants.catalogue import MUTANTS
from tests.mutants.run import drill, status, table


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description="a drill: the suite against mistakes")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these mutants alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the outcomes to this file")
    arguments = parser.parse_args()
    known = {mutant.name: mutant for mutant in MUTANTS}
    if unknown := [name for name in arguments.only or () if name not in known]:
        parser.error(f"no mutant is called {', '.join(unknown)}")
    start = time.monotonic()
    outcomes = drill([known[name] for name in arguments.only or known], lambda line: print(line, flush=True))
    print("", *table(outcomes), f"{time.monotonic() - start:.0f} s", sep="\n")
    if arguments.json:
        rows = [
            {"name": o.mutant.name, "room": o.mutant.room, "verdict": o.verdict, "by": o.by, "seconds": o.seconds}
            for o in outcomes
        ]
        arguments.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return status(outcomes)


if __name__ == "__main__":
    sys.exit(main())
