"""Every file of an interrupted run, damaged in every way: the same bits in the end, or one line that names it.

A run was killed in its export: its checkpoints are there, its final/ is not (or, for the damage of final/ itself, it
is whole). One file is damaged, and the same command is given again. It must end in the bits of a run that nothing
happened to, its rows too, and say what it passed over where that is what it should have begun with; or refuse in one
line that names the file, or what it is a part of.
"""

from __future__ import annotations

import functools
import json
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from benchmarks.faultdrill import baseline
from benchmarks.faultdrill.scenes import End, Scene, refused, said
from benchmarks.faultdrill.suite import Case, Suite
from engine.data.mixture import permutation
from tests.families import save_family

NEWEST, OLDER = "run/checkpoints/step-000003", "run/checkpoints/step-000002"
SHARD = "shard-00001-model-00001-of-00001.safetensors"
RUN = {
    "shard": f"{NEWEST}/{SHARD}",
    "state": f"{NEWEST}/state.json",
    "manifest": f"{NEWEST}/COMPLETE",
    "older-shard": f"{OLDER}/{SHARD}",
    "older-manifest": f"{OLDER}/COMPLETE",
    "config": "run/config.yaml",
    "metrics": "run/metrics.jsonl",
    "lock": "run/.lock",
    "weights": "model/model.safetensors",
    "model-config": "model/config.json",
    "tokenizer": "model/tokenizer.json",
    "final": "run/final/model.safetensors",
    "final-config": "run/final/config.json",
}
STORE = {
    f"store-{name}": f"cache/tokens/*/{name}" for name in ("ids", "mask", "offsets", "keys", "counts", "header.json")
}
STORE |= {"store-lock": "cache/tokens/.*.lock"}
CACHE = {"reference": "cache/reference/*/rows-*.safetensors", "reference-header": "cache/reference/*/header.json"}
ADAPTER = {"adapter": "adapter/adapter_model.safetensors", "adapter-config": "adapter/adapter_config.json"}
ADAPTER |= {"final-adapter": "run/final/adapter/adapter_model.safetensors"}
VALUE = {"value": "value/model.safetensors", "final-value": "run/final/value/model.safetensors"}
SECOND = {"second-shard": f"{NEWEST}/{SHARD.replace('00001', '00002', 1)}"}
SCENES: dict[str, dict[str, str]] = {
    "sft-2": RUN | SECOND | STORE,
    "dpo-1": RUN | STORE | CACHE,
    "dpo-lora-2": RUN | SECOND | STORE | CACHE | ADAPTER,
    "ppo-1": RUN | VALUE,
    "grpo-lora-1": RUN | {"final-adapter": ADAPTER["final-adapter"]},
}
KINDS = ("truncate", "flip", "empty", "delete", "swap", "copy", "zeros")
PARTS = ("model", "adapter", "value")  # of which a checkpoint knows the numbers
# what a resumed run would have begun with: that it began with something else is said
BEGINS_WITH = ("shard", "second-shard", "state", "manifest")


@functools.cache
def scene(name: str) -> Scene:
    """An interrupted run, its end when nothing happens to it, and files of others beside it to be mistaken for its
    own: of another model, of the same rows in another order.
    """
    stage, *form, ranks = name.split("-")
    made = Scene(stage, form[0] if form else "whole", save_steps=1, save_total_limit=9)
    save_family("llama", made.now / "other_model", made.now / "model", seed=1, initializer_range=0.05)
    data = Path(str(made.flags["dataset_name"]))
    lines = data.read_text(encoding="utf-8").splitlines(keepends=True)
    others = data.with_name(f"other_{data.name}")
    others.write_text("".join(reversed(lines)), encoding="utf-8")
    if "ppo" in name:
        shutil.copytree(made.now / "other_model", made.now / "value")
        made.flags["value_model_name_or_path"] = made.now / "value"
    changes = {"model_name_or_path": made.now / "other_model", "dataset_name": others, "save_steps": 1}
    if stage in ("sft", "dpo"):
        made.whole("other", **changes, max_steps=2)
    if "dpo-lora" in name:
        shutil.copytree(made.now / "other" / "final" / "adapter", made.now / "other_adapter")
        made.whole("before", max_steps=2)
        shutil.copytree(made.now / "before" / "final" / "adapter", made.now / "adapter")
        made.flags.pop("lora_r")  # is the adapter's
        made.flags["adapter_name_or_path"] = made.now / "adapter"
    made.whole("run", int(ranks))
    made.end = End.of(made.now / "run")
    made.keep()
    return made


# --- the damage -------------------------------------------------------------------------------------------------------


def counterpart(place: Path, path: Path, mine: list[Path]) -> Path | None:
    """Another file that could stand where this one does."""
    name = str(path.relative_to(place))
    candidates = {
        NEWEST: place / name.replace(NEWEST, OLDER),
        OLDER: place / name.replace(OLDER, NEWEST),
        "run/final/value": place / "value" / path.name,
        "run/final/adapter": place / "other_adapter" / path.name,
        "run/final": place / "model" / path.name,
        "run/": place / name.replace("run/", "other/", 1),
        "model/": place / "other_model" / path.name,
        "value/": place / "model" / path.name,
        "adapter/": place / "other_adapter" / path.name,
    }
    found = next((other for start, other in candidates.items() if name.startswith(start)), None)
    if name.startswith("cache/"):
        found = next((p for p in mine if p != path), None)
    return found if found and found.is_file() and found.read_bytes() != path.read_bytes() else None


def damage(place: Path, path: Path, kind: str, draw: random.Random, mine: list[Path]) -> None:
    """Does it to a file that is there; what leaves it as it was (to swap it with nothing) is another kind instead."""
    content = path.read_bytes()
    other = counterpart(place, path, mine) if kind == "swap" else None
    if kind == "swap" and other is None:
        kind = "zeros"
    if kind in ("truncate", "flip", "empty", "zeros") and not content:
        kind = "delete"
    if kind == "truncate":
        path.write_bytes(content[: draw.choice([len(content) // 4, len(content) // 2, len(content) - 1])])
    elif kind == "flip":
        at = draw.randrange(len(content))
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "delete":
        path.unlink()
    elif kind == "zeros":
        kept = draw.choice([0, len(content) // 2])
        path.write_bytes(content[:kept] + bytes(len(content) - kept))
    elif kind == "swap" and other is not None:
        theirs = other.read_bytes()
        other.write_bytes(content)
        path.write_bytes(theirs)
    elif kind == "copy":
        path.with_name(draw.choice([f"copy-of-{path.name}", f"{path.name}.bak"])).write_bytes(content)
    elif kind == "unlisted":  # of a manifest: it lists a shard no more, which is damaged
        shard = path.parent / SHARD
        listed = {name: facts for name, facts in json.loads(content).items() if name != SHARD}
        path.write_text(json.dumps(draw.choice([listed, {}])), encoding="utf-8")
        damage(place, shard, "numbers", draw, [])
    elif kind == "numbers":  # a bit of each of the first tensor's, its header as it was
        changed = bytearray(content)
        start, end = _first_tensor(content)
        for at in range(start + 2, end, 4):
            changed[at] ^= 8
        path.write_bytes(changed)
    elif kind == "step":  # the whole checkpoint under the name of a later one
        shutil.copytree(path.parent, path.parent.with_name("step-000009"))


def _first_tensor(content: bytes) -> tuple[int, int]:
    """Where the first fp32 numbers of a safetensors file begin and end."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    begin, end = min(t["data_offsets"] for n, t in header.items() if n != "__metadata__" and t["dtype"] == "F32")
    return 8 + length + begin, 8 + length + end


def run(name: str, hook: str, directory: Path) -> str:
    """Plants the damage of that name, gives the command again, and judges the end."""
    of, target, kind, _ = name.split("/")
    made, draw = scene(of), random.Random(name)
    place = made.again()
    if not target.startswith("final"):
        shutil.rmtree(place / "run" / "final")
    files = sorted(place.glob(SCENES[of][target]))
    used = [path for path in files if _is_used(path)]
    path = draw.choice(used or files)
    damage(place, path, kind, draw, files)
    result = made.launch("run", int(of.rsplit("-", 1)[1]), hook, log="again")
    wrong = _judged(made, result, path, target, kind)
    if wrong:
        shutil.copytree(place, directory, dirs_exist_ok=True, symlinks=True)
    return wrong


def _is_used(path: Path) -> bool:
    """Whether a cache's file is of the run, and not of the other beside it."""
    config = (path.parents[3] / "run" / "config.yaml") if "cache" in path.parts else None
    if config is None or (path.name == "header.json" and "reference" in path.parts):
        return True
    of = path if path.name.endswith(".lock") else path.parent
    newest = max((p.stat().st_mtime_ns, p) for p in of.parent.iterdir() if p.is_dir() != path.name.endswith(".lock"))
    return newest[1] == of


def _judged(made: Scene, result, path: Path, target: str, kind: str) -> str:
    lines = said(result.output)
    if not result.ok:
        if wrong := refused(result):
            return wrong
        return "" if _names(lines, path) else f"refused without naming {path.name}: {lines}"
    if "Traceback" in result.output:
        return f"a traceback: {result.output[-300:]}"
    end = End.of(made.now / "run")
    if end.weights != made.end.weights:
        return "other bits, and the run ended as if they were right"
    if end.rows != made.end.rows and not _names(lines, path):
        return f"other rows of metrics.jsonl, and not a word: {lines}"
    begins = target in BEGINS_WITH and kind not in ("copy", "step")
    return f"not a word of {path.name}, which it should have begun with: {lines}" if begins and not lines else ""


def _names(lines: list[str], path: Path) -> bool:
    """Whether a line has the file's name, or that of the directory that it is a part of."""
    names = [path.name, path.parent.name]
    names += ["of another model", "of another value model"] if path.parent.name in PARTS else []
    return any(name in line for line in lines for name in names)


# --- the cases --------------------------------------------------------------------------------------------------------


def case(name: str, hook: str = "") -> Case:
    """That of a name: scene/target/kind/number."""
    return Case(name, partial(run, name, hook))


def cases(count: int, seed: int) -> Iterator[Case]:
    """Drawn evenly: every target once before any is drawn twice, with another kind each time."""
    targets = [(of, target) for of, there in SCENES.items() for target in there]
    for number in range(count):
        turn, position = divmod(number, len(targets))
        of, target = targets[permutation(len(targets), seed, "damage", turn)[position]]
        more = ("unlisted", "step") if target == "manifest" else ()
        more = ("numbers",) if SCENES[of][target].endswith(".safetensors") else more
        kinds = [*KINDS, *more]
        first = int(permutation(len(kinds), seed, of, target)[0])
        yield case(f"{of}/{target}/{kinds[(first + turn) % len(kinds)]}/{seed}.{turn}")


def planted(hook: str, *names: str) -> Callable[[int, int], Iterator[Case]]:
    """A control: these cases, with a check taken away."""
    return lambda count, seed: (case(name, hook) for name in names[:count])


SUITE = Suite(
    name="damage",
    unit="damaged files",
    promise="the same bits, or one line that names it",
    sizes=(40, 200),
    cases=cases,
    controls={
        "shards are not verified": planted("shards_are_not_verified", "dpo-1/shard/numbers/0"),
        "what a manifest does not list is taken for sound": planted(
            "manifests_may_list_nothing", "dpo-1/manifest/unlisted/0"
        ),
        "segments of the reference cache are not checked": planted(
            "segments_are_not_checked", "dpo-1/reference/numbers/0"
        ),
        "examples of the token store are not checked": planted("examples_are_not_checked", "dpo-1/store-ids/zeros/0"),
    },
    baselines=baseline.DAMAGE,
    left_out=(
        "two files at once, and damage while a run reads (only between two runs)",
        "damage in the hardware's own way (a sector that cannot be read): the file system here has none",
    ),
)
