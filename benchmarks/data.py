"""The size of the real mixture: tokenise, plan and open a million synthetic conversations.

    python -m benchmarks.data [--rows 1000000] [--workers N] [--json FILE]

The file is generated from a seed (lengths log-normal, two thirds of one turn). Measured: tokenised rows a second, the
peak of host memory (of the reading process; a worker holds a few chunks of 256 rows) at a quarter and at all of the
rows, which shows whether it grows with the dataset, the time to plan every step of an epoch and how level 8 ranks are
at 128 conversations a step, and the time of a second start.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

# fmt: off
WORDS = [
    "the", "of", "and", "a", "to", "in", "is", "it", "you", "that", "he", "was", "for", "on", "are",
    "with", "as", "his", "they", "be", "at", "one", "have", "this", "from", "or", "had", "by", "hot", "but",
    "some", "what", "there", "we", "can", "out", "other", "were", "all", "your", "when", "up", "use", "word", "how",
    "said", "an", "each", "she", "which", "do", "their", "time", "if", "will", "way", "about", "many", "then", "them",
]
# fmt: on


def generate(path: Path, rows: int) -> None:
    generator = np.random.Generator(np.random.Philox(key=7))
    vocabulary = np.array(WORDS)
    with open(path, "w", encoding="utf-8") as f:
        for start in range(0, rows, 10_000):
            n = min(10_000, rows - start)
            lengths = np.clip(generator.lognormal(3.6, 0.9, (n, 4)), 2, 900).astype(int)
            turns = generator.random(n) < 1 / 3
            words = vocabulary[generator.integers(0, len(WORDS), 4000)]
            offsets = generator.integers(0, 3000, (n, 4))
            for i in range(n):
                contents = [" ".join(words[o : o + length]) for o, length in zip(offsets[i], lengths[i], strict=True)]
                roles = ("user", "assistant") * (2 if turns[i] else 1)
                messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
                f.write(json.dumps({"id": str(start + i), "source": "synthetic", "messages": messages}) + "\n")


def tokenise(path: str, root: str, workers: int, results: multiprocessing.Queue) -> None:
    """In a process of its own, so that its peak of memory is its own."""
    from engine.data.chat import load_tokenizer
    from engine.data.conversations import ConversationEncoder, first_form
    from engine.data.embedded import embedded
    from engine.data.files import open_source
    from engine.data.store import open_or_build

    chat = load_tokenizer(embedded(Path(root)).model, 512)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(2):
        start = time.perf_counter()
        source = open_source(path, "train", None)
        encode = ConversationEncoder(chat, 4096, first_form(source))
        store = open_or_build(Path(root) / "tokens", source, encode, {"max_seq_length": 4096}, workers=workers)
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results.put(
        {
            "rows": len(store),
            "seconds": times[0],
            "second_start": times[1],
            "before_mib": before / 1024,
            "peak_mib": peak / 1024,
            "tokens": int(store.offsets[-1]),
            "directory": str(store.directory),
        }
    )


def plan(directory: str) -> dict:
    """Every step of an epoch at 128 conversations, packed for 8 ranks."""
    from engine.data.mixture import Steps
    from engine.data.packing import pack
    from engine.data.store import Examples, TokenStore

    start = time.perf_counter()
    store = TokenStore(Path(directory))
    examples = Examples([store], [np.arange(len(store))])
    steps = Steps(len(examples), 128, 1, -1, 1)
    order = [steps.examples(step) for step in range(steps.total)]
    drawn = time.perf_counter() - start
    ratios = []
    for chosen in order[:: max(1, len(order) // 200)]:
        loads = [
            sum(int(examples.tokens[chosen[i]]) for b in bins for i in b)
            for bins in pack(examples.tokens[chosen].tolist(), 16384, 8)
        ]
        ratios.append(max(loads) * 8 / sum(loads))
    packed = (time.perf_counter() - start - drawn) / len(ratios)
    return {
        "steps": steps.total,
        "draw_seconds": drawn,
        "pack_milliseconds": 1e3 * packed,
        "busiest_over_mean": sorted(ratios)[int(0.99 * len(ratios))],
    }


def main() -> None:
    from engine.world import available_cores

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=available_cores())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    found = []
    with tempfile.TemporaryDirectory() as root:
        for rows in (args.rows // 4, args.rows):
            path = Path(root) / f"{rows}.jsonl"
            generate(path, rows)
            results = context.Queue()
            process = context.Process(target=tokenise, args=(str(path), root, args.workers, results))
            process.start()
            figures = results.get() | {"file_mib": path.stat().st_size / 2**20}
            process.join()
            found.append(figures)
            print(
                f"{rows:>9,} conversations ({figures['file_mib']:.0f} MiB, {figures['tokens'] / 1e6:.0f} M tokens):"
                f" {rows / figures['seconds']:,.0f} rows/s with {args.workers} workers; peak memory of the reading"
                f" process {figures['peak_mib']:.0f} MiB (before: {figures['before_mib']:.0f}); second start"
                f" {figures['second_start']:.2f} s"
            )
        planned = plan(found[-1]["directory"])
    print(
        f"an epoch of {planned['steps']:,} steps is drawn in {planned['draw_seconds']:.2f} s, a step packed for 8 ranks"
        f" in {planned['pack_milliseconds']:.2f} ms; the busiest rank has {planned['busiest_over_mean']:.4f} of the"
        " mean (99th percentile)"
    )
    if args.json:
        args.json.write_text(json.dumps({"tokenise": found, "plan": planned}, indent=1))


if __name__ == "__main__":
    main()
