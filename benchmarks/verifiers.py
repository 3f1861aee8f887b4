"""Verdicts per second and core, and the time of hostile responses, beside the checkers that others use.

    python -m benchmarks.verifiers                 # ours
    python -m benchmarks.verifiers --peers         # and math-verify, sympy's LaTeX parser, where they are installed

One process, one core, CPU seconds; needs the labelled cases in ../shared/data/verifiers. The peers' agreement with the
same labels is printed beside their speed. Hostile responses are those of tests/verifiers/test_hostile.py.
"""

import argparse
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.verifiers.test_hostile import FAMILIES, WITH_LANGUAGE, hostile, truths
from verifiers import Pool, verify
from verifiers.ifeval.instructions import GOOGLE, INSTRUCTIONS
from verifiers.ifeval.language import log_likelihoods
from verifiers.math.equal import read
from verifiers.math.open_instruct import prefix
from verifiers.math.words import plain_words

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "verifiers"
LANGUAGE = set(WITH_LANGUAGE)
MEMORIES = (read, plain_words, prefix.read, log_likelihoods)


def cases(name: str) -> list[dict]:
    """The labelled cases of one file of DATA."""
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def speed(label: str, rows: list, verdict: Callable, expected: Callable | None = None, seconds: float = 2.0) -> None:
    """Print verdicts/s over passes of all `rows` that take about `seconds`, with nothing remembered from one pass to
    the next, and the agreement with `expected`."""
    verdict(rows[0])  # compiles patterns, loads profiles
    start, passes = time.process_time(), 0
    while not passes or time.process_time() - start < seconds:
        for memory in MEMORIES:
            memory.cache_clear()
        results = [verdict(row) for row in rows]
        passes += 1
    rate = passes * len(rows) / (time.process_time() - start)
    known = [
        (bool(result), expected(row))
        for result, row in zip(results, rows, strict=True)
        if expected and expected(row) is not None
    ]
    agree = f"   agrees with {sum(a == b for a, b in known)}/{len(known)} labels" if known else ""
    print(f"{label:44} {rate:10,.0f} /s{agree}", flush=True)


def hostile_times(family: str, all_truths: list, responses: list[str]) -> None:
    """Print the median, the 99th percentile and the maximum of the time of a verdict."""
    times = []
    for response in responses:
        for truth in all_truths:
            start = time.process_time()
            verify(response, truth, family)
            times.append(time.process_time() - start)
    times.sort()
    p50, p99 = times[len(times) // 2], times[int(len(times) * 0.99)]
    quantiles = f"p50 {p50 * 1e3:.3f}  p99 {p99 * 1e3:.3f}  max {times[-1] * 1e3:.3f} ms"
    print(f"{len(responses)} hostile responses x {len(all_truths):2}   {quantiles}")


def ours() -> None:
    """Print the speed of every verifier of ours on the labelled cases."""
    rows = cases("gsm8k")
    speed("gsm8k", rows, lambda r: verify(r["response"], r["ground_truth"], "gsm8k").score, lambda r: r["correct"])
    speed(
        "gsm8k, reference",
        rows,
        lambda r: verify(r["response"], r["ground_truth"], "gsm8k", "reference").score,
        lambda r: r["labels"]["open_instruct_gsm8k"],
    )
    rows = cases("math_equiv")
    speed(
        "math, equivalence cases",
        rows,
        lambda r: verify(r["prediction"], r["answer"], "math").score,
        lambda r: r["equal"],
    )
    rows = cases("math_extract")
    speed(
        "math, extraction cases",
        rows,
        lambda r: verify(r["response"], r["ground_truth"], "math").score,
        lambda r: r["intended_correct"],
    )
    speed(
        "math, reference",
        rows,
        lambda r: verify(r["response"], r["ground_truth"], "math", "reference").score,
        lambda r: r["verdict"]["open_instruct_math"],
    )
    rows = [
        (row["response"], {"instruction_id": [name], "kwargs": [row["kwargs"][i]]}, name)
        for row in cases("ifeval")
        for i, name in enumerate(row["instruction_id_list"])
        if name in INSTRUCTIONS and name != "words:start_verb"  # which needs a tagger
    ]
    speed(
        "ifeval, without language detection",
        [r for r in rows if r[2] in GOOGLE and r[2] not in LANGUAGE],
        lambda r: verify(r[0], r[1], "ifeval").score,
    )
    speed(
        "ifeval, IFEvalG's and IFBench's instructions",
        [r for r in rows if r[2] not in GOOGLE],
        lambda r: verify(r[0], r[1], "ifeval").score,
    )
    speed(
        "ifeval, language detection",
        [r for r in rows if r[2] in LANGUAGE],
        lambda r: verify(r[0], r[1], "ifeval").score,
    )
    rows = [row for row in cases("rlvr_if_functions") if row["func_name"] != "validate_response_language"]
    speed(
        "ifeval_old, without language detection",
        rows,
        lambda r: verify(r["response"], r["ground_truth"], "ifeval_old").score,
    )


def peers() -> None:
    """Print the speed and the agreement of the peers that are installed, beside ours on the same pairs."""
    rows = cases("math_equiv")
    bare = [row for row in rows if row["kind"] == "answer"]
    ours_bare = lambda r: verify(r["prediction"], r["answer"], "math").score
    speed("ours, bare pairs", bare, ours_bare, lambda r: r["equal"])
    try:
        import math_verify
    except ImportError:
        print("math-verify is not installed")
    else:

        def math_verify_verdict(row):
            # it reads LaTeX only between delimiters
            answer, prediction = (
                text if "$" in text or "boxed" in text else f"${text}$" for text in (row["answer"], row["prediction"])
            )
            return math_verify.verify(
                math_verify.parse(answer),
                math_verify.parse(prediction if row["kind"] == "answer" else row["prediction"]),
            )

        speed("math-verify, all pairs", rows, math_verify_verdict, lambda r: r["equal"])
        speed("math-verify, bare pairs", bare, math_verify_verdict, lambda r: r["equal"])
    try:
        import antlr4  # noqa: F401
        import sympy
        from sympy.parsing.latex import parse_latex
    except ImportError:
        print("sympy's LaTeX parser (antlr4 4.11) is not installed")
        return

    def sympy_verdict(row):  # what open-instruct's and lm-eval's Minerva graders call, with their five seconds
        signal.alarm(5)
        try:
            return sympy.simplify(parse_latex(row["prediction_bare"]) - parse_latex(row["answer_bare"])) == 0
        except Exception:
            return False
        finally:
            signal.alarm(0)

    signal.signal(signal.SIGALRM, timed_out)
    speed("sympy parse_latex + simplify, bare pairs", bare, sympy_verdict, lambda r: r["equal"], seconds=0)


def timed_out(*_) -> None:
    """What SIGALRM calls. Raises TimeoutError."""
    raise TimeoutError


def pool(workers: int) -> None:
    """Print the speed of a pool of so many workers."""
    rows = [(row["response"], row["ground_truth"], "gsm8k") for row in cases("gsm8k")] * 10
    with Pool(workers) as running:
        running.score(rows[:1000])
        start = time.process_time()
        running.score(rows)
        print(f"pool of {workers}, gsm8k {len(rows) / (time.process_time() - start):10,.0f} /s in all")


def main() -> None:
    """The command."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    flags.add_argument("--peers", action="store_true", help="also measure what of the peers is installed")
    flags.add_argument("--workers", type=int, default=2, help="size of the pool")
    options = flags.parse_args()
    ours()
    pool(options.workers)
    for family in FAMILIES:
        print(f"{family:16}", end="")
        hostile_times(family, truths(family), hostile(family))
    print(f"{'language':16}", end="")
    detection = [{"instruction_id": [name], "kwargs": [arguments]} for name, arguments in WITH_LANGUAGE.items()]
    hostile_times("ifeval", detection, hostile("language"))
    if options.peers:
        peers()


if __name__ == "__main__":
    main()
