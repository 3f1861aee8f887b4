"""The page of launch.report: what is read, judged, drawn and written, on runs made of numbers and on hostile ones."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.config import parse
from engine.errors import UserError
from engine.train import card
from launch.report import Config, report
from launch.reports import catalogue, health, planned, results, runs, samples, verdict
from launch.reports import page as page_of
from tests import needs
from tests.launch import recorded as made
from tests.launch.recorded import curve, lines, recorded, write

ROOT = Path(__file__).parents[2]
STAGES = runs.STAGES
HOSTILE = '</script></td><img src=x onerror="document.title=1"><script>document.title=2</script>{{ 7*7 }}'


# --- what is read -----------------------------------------------------------------------------------------------------


def test_a_run_as_a_stage_leaves_it(tmp_path):
    run = runs.read_run(write(tmp_path / "ppo", "ppo"))
    assert (run.stage, run.status, run.steps, run.total, run.unit) == ("ppo", "finished", 60, 60, "iteration")
    assert run.facts["machine"] == "2 x NVIDIA H100 80GB HBM3" and run.config["kl_coef"] == 0.05
    assert run.series["eval/accuracy"].values.tolist() == [0.34, 0.6, 0.77] and len(run.samples) == 12
    assert run.notes == []


@pytest.mark.parametrize(
    ("line", "note"),
    [
        ("{torn", "metrics.jsonl: 1 line torn or no JSON object, left out"),
        ("[1, 2]", "metrics.jsonl: 1 line torn or no JSON object, left out"),
        ('{"loss": 1}', "metrics.jsonl: 1 line without a step, left out"),
        ('{"step": true, "loss": 1}', "metrics.jsonl: 1 line without a step, left out"),
        ('{"step": -1, "loss": 1}', "metrics.jsonl: 1 line without a step, left out"),
        ('{"step": 1e3, "loss": 1}', "metrics.jsonl: 1 line without a step, left out"),
        ('{"step": 2, "loss": 7}', "metrics.jsonl: 1 line or values for a step that had one: the last counts"),
        ('{"step": 9, "said": "x"}', "metrics.jsonl: values that are no numbers are not drawn: said (1)"),
        ("[" * 100_000, "metrics.jsonl: 1 line torn or no JSON object, left out"),
    ],
)
def test_what_is_wrong_with_a_file_is_counted(line, note, tmp_path):
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, line, {"step": 3, "loss": 1.0}]
    run = runs.read_run(write(tmp_path / "run", "sft", rows=rows))
    assert run.notes == [note]
    assert run.series["loss"].steps.tolist() == [1, 2, 3]
    assert run.series["loss"].values[1] == (7 if '"loss": 7' in line else 2)


def test_a_last_line_that_is_being_written_is_called_so(tmp_path):
    run = write(tmp_path / "run", "sft")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "lo')
    (note,) = runs.read_run(run).notes
    assert "without its end" in note


def test_infinite_numbers_are_kept_apart(tmp_path):
    rows = ['{"step": 1, "loss": NaN}', '{"step": 2, "loss": -Infinity}', '{"step": 3, "loss": 1}']
    rows += ['{"step": 4, "loss": 1' + "0" * 400 + "}", '{"step": 5, "loss": 1e305}']
    loss = runs.read_run(write(tmp_path / "run", "sft", rows=rows)).series["loss"]
    assert loss.steps.tolist() == [3] and loss.bad_steps.tolist() == [1, 2, 4, 5]


def test_status_total_and_names(tmp_path):
    first, second = write(tmp_path / "a" / "ppo", "ppo"), write(tmp_path / "b" / "ppo", "ppo")
    assert runs.names_of([first, second]) == ["a/ppo", "b/ppo"] and runs.names_of([first]) == ["ppo"]
    (second / "final" / "config.json").unlink()
    assert runs.status_of(second, time.time() - 3600) == "stopped"
    (second / ".lock").write_text("1")
    lock = str(second / ".lock")
    script = f"import fcntl, time; f = open({lock!r}); fcntl.flock(f, 2); print(1, flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"1\n"
        assert runs.status_of(second, time.time() - 3600) == "running"
    finally:
        holder.kill()
        holder.wait()
    assert runs.status_of(second, time.time() - 3600) == "stopped"


def test_directories_that_cannot_be_shown(tmp_path):
    """Each is a line, and the others are shown."""
    good = write(tmp_path / "sft", "sft")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "unborn", "sft", rows=[])
    bad = [tmp_path / "stf", tmp_path / "empty", tmp_path / "unborn"]
    found, left_out = runs.read_runs([good, *bad, good])
    assert [run.name for run in found] == ["sft"]
    assert left_out == [
        f"{tmp_path}/stf: no such directory (did you mean {tmp_path}/sft?)",
        f"{tmp_path}/empty: no run, neither config.yaml nor metrics.jsonl is in it",
        f"{tmp_path}/unborn: the run has no row in metrics.jsonl yet",
    ]
    with pytest.raises(UserError, match=r"no such directory.*; .*the run has no row"):
        report([tmp_path / "stf", tmp_path / "unborn"], tmp_path / "page.html")
    with pytest.raises(UserError, match="RUNS is missing"):
        report([], tmp_path / "page.html")


def test_a_directory_that_holds_runs_stands_for_them(tmp_path):
    for name, stage in (("ppo/seed-10", "ppo"), ("ppo/seed-2", "ppo"), ("sft", "sft")):
        write(tmp_path / name, stage, rows=[{"step": 1, "loss": 1.0}])
    (tmp_path / "evaluations").mkdir()
    found, left_out = runs.read_runs([tmp_path / "ppo", tmp_path])
    assert [run.name for run in found] == ["sft", "seed-2", "seed-10"] and left_out == []


@pytest.mark.parametrize("text", ["seed: [1", "- a list", "\x00", "x: !!python/object:os.system {}"])
def test_a_configuration_that_is_damaged_or_of_another_version(text, tmp_path):
    run = write(tmp_path / "run", "dpo")
    (run / "config.yaml").write_text(text)
    found = runs.read_run(run)
    assert found.stage == "dpo" and found.notes == ["config.yaml is damaged"]  # by its metrics
    (run / "config.yaml").write_text("flag_of_the_future: 1\n")
    lines(run / "metrics.jsonl", [{"step": 1, "new/metric": 1.0}])
    found = runs.read_run(run)
    assert found.stage == "other" and "names no stage that this version knows" in found.notes[0]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    rows=st.lists(
        st.one_of(
            st.text(max_size=40),
            st.dictionaries(
                st.one_of(st.just("step"), st.sampled_from(list(catalogue.KNOWN)), st.text(max_size=12)),
                st.one_of(st.integers(), st.floats(), st.text(max_size=5), st.none(), st.booleans(), st.just([1])),
                max_size=6,
            ).map(json.dumps),
            st.integers(0, 50).flatmap(
                lambda s: st.dictionaries(st.text(max_size=8), st.floats(), max_size=4).map(
                    lambda d: json.dumps(d | {"step": s, "loss": float(s)})
                )
            ),
        ),
        max_size=30,
    ),
    stage=st.sampled_from(STAGES),
)
def test_any_file_is_read_and_judged(rows, stage, tmp_path):
    """No line breaks it; every number of every whole row is in a series, drawn or counted."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(rows), encoding="utf-8", errors="surrogatepass")
    notes: list[str] = []
    series = runs.read_metrics(path, notes)
    expected: dict[str, set[int]] = {}
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line.decode("utf-8", errors="replace"))
            step = row.pop("step")
        except (ValueError, AttributeError, KeyError, TypeError):
            continue
        if type(step) is int and 0 <= step < 2**53:
            for key, value in row.items():
                if isinstance(value, int | float):
                    expected.setdefault(key, set()).add(step)
    assert {key: {*s.steps.tolist(), *s.bad_steps.tolist()} for key, s in series.items()} == expected
    run = runs.Recorded(tmp_path, "x", stage, "stopped", {}, {}, series, [], notes)
    assert all(mark.level in ("ok", "warning", "bad") for mark in health.examine(run))
    assert verdict.sentence(run) and catalogue.order_of(set(series)) and verdict.next_steps(run) if series else True


# --- health -----------------------------------------------------------------------------------------------------------

N = made.STEPS
FEW_DIFFER = "Few groups differ"
SICK = {
    "not_finite": ("sft", {"grad_norm": [1.0, np.nan, *[1.0] * (N - 2)]}, "bad", "Numbers that are not finite"),
    "reference": ("dpo", {"loss": curve(0.9, 0.3)}, "bad", "Does not start at the reference"),
    "margins": ("dpo", {"rewards__margins": curve(1.0, 3.0)}, "bad", "Does not start at the reference"),
    "ratio": ("ppo", {"val__ratio": curve(1.2, 1.0)}, "warning", "Ratio far from 1"),
    "ratio_lost": ("ppo", {"val__ratio": curve(2.0, 1.0)}, "bad", "Ratio far from 1"),
    "learning_rate": ("sft", {"learning_rate": np.zeros(N)}, "bad", "Learning rate is zero"),
    "loss": ("sft", {"loss": curve(1.0, 1.05)}, "warning", "Loss rises"),
    "loss_diverges": ("dpo", {"loss": curve(0.693, 1.4)}, "bad", "Loss rises"),
    "overfit": ("sft", {"eval__loss": {0: 6.0, 30: 0.5, 60: 0.55}}, "warning", "Held-out loss has turned up"),
    "overfit_much": ("dpo", {"eval__loss": {0: 0.69, 30: 0.3, 60: 0.5}}, "bad", "Held-out loss has turned up"),
    "accuracy": ("sft", {"eval__token_accuracy": {0: 0.0, 30: 0.8, 60: 0.72}}, "warning", "Accuracy has fallen"),
    "accuracy_interval": (
        "ppo",
        {
            "eval__accuracy": {0: 0.3, 30: 0.8, 60: 0.5},
            "eval__low": {30: 0.75, 60: 0.45},
            "eval__high": {30: 0.85, 60: 0.55},
        },
        "bad",
        "Accuracy has fallen",
    ),
    "preference": ("dpo", {"rewards__margins": curve(0.0, -0.5)}, "bad", "No preference is learnt"),
    "unlearnt": ("dpo", {"logps__chosen": curve(-100, -160)}, "warning", "Chosen answers are unlearnt"),
    "unlearnt_all": ("dpo", {"logps__chosen": curve(-100, -300)}, "bad", "Chosen answers are unlearnt"),
    "no_reward": ("ppo", {"objective__scores": np.zeros(N)}, "bad", "No response is ever right"),
    "all_reward": ("ppo", {"objective__scores": [0.5] * 30 + [1.0] * (N - 30)}, "warning", "Every response is right"),
    "kl": ("ppo", {"objective__kl": curve(0.0, 5.0)}, "warning", "KL is large"),
    "kl_gone": ("ppo", {"objective__kl": curve(0.0, 40.0)}, "bad", "KL is large"),
    "kl_negative": ("ppo", {"objective__kl": curve(0.0, -3.0)}, "warning", "KL is negative"),
    "updates": ("ppo", {"policy__clipfrac": curve(0.1, 0.4)}, "warning", "Updates are large"),
    "updates_kl": ("ppo", {"policy__approxkl": curve(0.1, 0.7)}, "bad", "Updates are large"),
    "entropy": ("ppo", {"objective__entropy": curve(0.5, 0.05)}, "warning", "Entropy collapses"),
    "entropy_gone": ("ppo", {"objective__entropy": curve(0.5, 0.003, 0)}, "bad", "Entropy collapses"),
    "groups": ("grpo", {"groups__signal": curve(0.9, 0.2), "groups__all_right": curve(0, 0.1)}, "warning", FEW_DIFFER),
    "groups_none": (
        "grpo",
        {"groups__signal": curve(0.3, 0.02), "groups__all_right": 0 * curve(0, 1)},
        "bad",
        FEW_DIFFER,
    ),
    "groups_solved": (
        "grpo",
        {"groups__signal": curve(0.9, 0.02), "groups__all_right": curve(0, 1)},
        "warning",
        FEW_DIFFER,
    ),
    "sampler": ("grpo", {"sampler__ratio": curve(1.03, 1.03)}, "warning", "The sampler is not the policy"),
    "sampler_token": ("grpo", {"sampler__ratio_max": curve(1.0, 30.0)}, "bad", "The sampler is not the policy"),
    "cut_off_groups": ("grpo", {"rollout__stop_rate": curve(1.0, 0.3)}, "bad", "Responses are cut off"),
    "kl_negative_of_a_group": ("grpo", {"objective__kl": curve(0.0, -3.0)}, "warning", "KL is negative"),
    "values": ("ppo", {"val__explained_variance": curve(-1.0, -0.2)}, "warning", "The value model explains nothing"),
    "cut_off": ("ppo", {"rollout__stop_rate": curve(1.0, 0.7)}, "warning", "Responses are cut off"),
    "cut_off_most": ("ppo", {"rollout__stop_rate": curve(1.0, 0.3)}, "bad", "Responses are cut off"),
    "alike": (
        "ppo",
        {"samples": [{"prompt": str(i), "response": " 42" if i % 3 else "42 ", "step": 1} for i in range(8)]},
        "bad",
        "Responses are alike",
    ),
    "half_alike": (
        "ppo",
        {"samples": [{"prompt": str(i), "response": f"{i % 3}", "step": 1} for i in range(8)]},
        "warning",
        "Responses are alike",
    ),
    "errors": ("ppo", {"rollout__errors": [0, 2, *[0] * (N - 2)]}, "warning", "Some responses could not be verified"),
    "spike": ("sft", {"grad_norm": [*[1.0] * 40, 30.0, *[1.0] * (N - 41)]}, "warning", "Gradient norm spikes"),
    "spike_huge": ("ppo", {"grad_norm": [*[1.0] * 40, 300.0, *[1.0] * (N - 41)]}, "bad", "Gradient norm spikes"),
    "spikes": ("dpo", {"grad_norm": [30.0 if i % 12 == 11 else 1.0 for i in range(N)]}, "bad", "Gradient norm spikes"),
    "slow": ("sft", {"perf__tokens_per_second_per_gpu": [1000] * 30 + [600] * (N - 30)}, "warning", "Throughput drops"),
}


@pytest.mark.parametrize("name", SICK)
def test_a_rule_is_raised_by_a_run_that_should(name):
    stage, changes, level, title = SICK[name]
    found = {mark.title: mark for mark in health.examine(recorded(stage, **dict(changes)))}
    assert title in found and found[title].level == level, list(found)
    assert found[title].seen and found[title].advice


@pytest.mark.parametrize("stage", STAGES)
def test_a_healthy_run_raises_none(stage):
    marks = health.examine(recorded(stage))
    assert [mark.title for mark in marks if mark.level != "ok"] == []
    assert len(marks) >= {"sft": 6, "dpo": 8, "ppo": 13, "grpo": 14}[stage]
    assert all(mark.metric in recorded(stage).series for mark in marks if mark.metric)


def test_every_rule_is_raised_by_one_and_passed_by_one():
    """Also a rule that is added."""
    passed = {m.title for s in STAGES for m in health.examine(recorded(s))}
    assert len(passed) == len(health.RULES)
    raised = {case[3] for case in SICK.values()} - {
        "KL is negative",
        "No response is ever right",
        "Every response is right",
    }
    assert len(raised) == len(health.RULES) - 1  # of scores that do not vary there are two


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("dpo", {"config": {"loss_type": "simpo"}, "loss": curve(1.4, 1.0), "rewards__margins": curve(1.0, 3.0)}),
        ("dpo", {"config": {"loss_type": "ipo"}, "loss": curve(25.0, 1.0)}),
        ("dpo", {"config": {"rpo_alpha": 1.0}, "loss": curve(2.7, 1.0)}),
        ("dpo", {"grad_norm": np.geomspace(3, 1e-4, N)}),
        ("ppo", {"val__ratio": [0.0] * 10 + [1.0] * (N - 10)}),
        ("ppo", {"config": {"kl_coef": 0}, "objective__kl": curve(0, 90.0)}),
        (
            "ppo",
            {"samples": [{"prompt": str(i), "response": "11", "score": 1, "reason": "expected 11"} for i in range(8)]},
        ),
        ("grpo", {"groups__signal": {1: 0.0, 2: 0.1}}),  # two steps are no trend
        ("grpo", {"config": {"kl_coef": 0.0}, "objective__kl": curve(0, 90.0)}),
        ("ppo", {"learning_rate": [0.0, *[1e-3] * (N - 2), 0.0]}),
    ],
)
def test_what_looks_like_a_fault_and_is_none(stage, changes):
    assert [m.title for m in health.examine(recorded(stage, **changes)) if m.level != "ok"] == []


# --- the verdict ------------------------------------------------------------------------------------------------------


def ending_at(accuracy: float, low: float, high: float) -> dict:
    """From 34 % (28 to 40) to this."""
    return {
        "eval__accuracy": {0: 0.34, 60: accuracy},
        "eval__low": {0: 0.28, 60: low},
        "eval__high": {0: 0.4, 60: high},
    }


@pytest.mark.parametrize(
    ("stage", "changes", "expected"),
    [
        ("ppo", {}, "It worked: held-out verified accuracy went from 34.0\xa0% to 77.0\xa0%; the 95 %"),
        ("ppo", ending_at(0.38, 0.32, 0.44), "No clear difference: "),
        ("ppo", ending_at(0.1, 0.05, 0.2), "It made the model worse: "),
        ("sft", {"eval__token_accuracy": {}}, "It worked: held-out loss went from 6.1 to 0.55."),
        ("sft", {"eval__token_accuracy": {}, "eval__loss": {0: 1.0, 60: 1.5}}, "It made the model worse: held-out"),
        ("dpo", {"eval__logps__accuracies": {0: 0.5, 60: 0.505}}, "No clear difference: held-out preference"),
    ],
)
def test_whether_it_worked(stage, changes, expected):
    assert verdict.sentence(recorded(stage, **changes)).startswith(expected)


def test_the_commands_that_come_next(tmp_path):
    """Every one is a command line that this version understands."""
    from launch import commands

    for stage in STAGES:
        for status in ("finished", "running", "stopped"):
            directory = write(tmp_path / f"{stage} {status}", stage)
            run = runs.read_run(directory)
            object.__setattr__(run, "status", status)
            found = verdict.next_steps(run)
            assert found
            for _, words in found:
                command, *flags = shlex.split(words)[2:]
                parse(commands()[command], flags)


# --- what is drawn ----------------------------------------------------------------------------------------------------


@needs.matplotlib
def test_thinning_keeps_peaks_and_means():
    from launch.reports import plots

    values = np.zeros(100_000)
    values[54_321] = 1e6
    steps, means, lowest, highest = plots.thinned(runs.Series(np.arange(100_000), values))
    assert len(steps) == plots.POINTS and highest.max() == 1e6 and lowest.max() == 0
    assert np.isclose(means.mean(), 10.0)
    assert np.allclose(plots.smoothed(np.full(500, 1e299)), 1e299)
    assert np.allclose(plots.smoothed(np.arange(500.0)), np.arange(500.0))


@needs.matplotlib
@pytest.mark.parametrize(
    ("places", "share", "expected"),
    [
        ([0, 1.5, 3, 4.5], False, ["0", "1.5", "3.0", "4.5"]),
        ([0, 5000, 10000], False, ["0", "5k", "10k"]),
        ([0, 50_000, 100_000, 150_000], False, ["0", "50k", "100k", "150k"]),
        ([0.46, 0.465, 0.47], False, ["0.460", "0.465", "0.470"]),
        ([0, 2e-7, 4e-7], False, ["0", "2e−7", "4e−7"]),
        ([-0.008, -0.007], False, ["−0.008", "−0.007"]),
        ([0, 0.2, 0.4], True, ["0\xa0%", "20\xa0%", "40\xa0%"]),
        ([0.01, 0.1, 1, 10], False, ["0.01", "0.1", "1", "10"]),
        ([0, 2e6, 4e6], False, ["0", "2000k", "4000k"]),
    ],
)
def test_tick_labels(places, share, expected):
    from launch.reports import plots

    formatter = plots.Short(share)
    formatter.set_locs(places)
    assert [formatter(x) for x in places] == expected


@pytest.mark.parametrize(
    ("values", "share"),
    [(1 + 1e-7 * np.arange(6.0), False), (1 - 0.0125 * np.linspace(0, 1, 6), True), (4 - 1e-5 * np.arange(6.0), False)],
)
def test_what_differs_by_rounding_is_level_and_its_labels_are_short(values, share):
    from launch.reports import plots

    line = plots.Line(runs.series_of(dict(enumerate(values.tolist(), 1))), 0)
    svg = plots.lines_plot([line], "", share=share, xlabel="step", name="x")
    labels = [text for text in re.findall(r">([^<>]+)</text>", svg) if text.strip() and text != "step"]
    assert len(labels) > 4 and max(map(len, labels)) <= 7, labels


# --- the page ---------------------------------------------------------------------------------------------------------


class Seen(HTMLParser):
    """Tags with attributes, and the text of each."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    """Four acts, two runs of one, with hostile samples, evaluations, a plan and results."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    root = tmp_path_factory.mktemp("page")
    kept = [
        *made.samples(),
        {"step": 60, "prompt": HOSTILE, "response": HOSTILE, "score": 1, "reason": HOSTILE},
        {"step": 60, "prompt": "long", "response": "x" * 30_000, "score": float("nan"), "reason": None},
        {"step": 60, "prompt": "signs", "response": "a\x00\x1b[2J\u202egnp.exe\ud800\u2028", "score": 0.5},
        '{"step": 60, "prompt": "torn',
    ]
    acts = [write(root / stage, stage) for stage in ("ppo", "grpo", "sft", "dpo")]
    other = write(root / "<b>other", "ppo", kept=kept, kl_coef=0.2, seed=7)
    with (other / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "<img src=x onerror=1>": 1.0, "$x_{1}$": 2.0, "only/nan": NaN}\n')
    (acts[0] / "plan.json").write_text(json.dumps({"needed": 2**30, "seconds": 1.75, "ranks": 2}))
    answers = root / "answers.jsonl"
    scores = [0, 1, 1, 1, 0, 1]
    lines(
        answers,
        [
            {"seed": i % 2, "prompt": str(i // 2), "response": "x", "score": s, "dataset": "gsm8k"}
            for i, s in enumerate(scores)
        ],
    )
    table = {
        "title": "base to " + HOSTILE,
        "rows": [
            {"name": HOSTILE, "accuracy": 0.1, "low": 0.05, "high": 0.2},
            {"name": "ppo", "accuracy": 0.7, "n": 512},
        ],
        "answers": [{"prompt": HOSTILE, "answers": {"base": HOSTILE, "ppo": {"text": "4", "score": 1}}}],
    }
    said = report([*acts, other, root / "nowhere"], root / "page.html", results=table, evaluations=[answers])
    assert said[0].startswith(f"{root}/nowhere: no such directory") and said[1].endswith("MiB")
    return (root / "page.html").read_text(encoding="utf-8")


def test_the_page_says_what_was_done(page):
    text = " ".join(" ".join(Seen(page).text).split())
    for words in (
        "From base to SFT → DPO → PPO and GRPO",
        "advantage grpo, surrogate clip, clip_low 0.2, clip_high 0.28, aggregate token, kl_coef 0.01, kl_in loss, kl_",
        "Solved by one of 8",
        "32 prompts × 8 responses per iteration",
        "It worked: held-out verified accuracy went from 34.0 % to 77.0 %; the 95 % intervals do not overlap.",
        "2 x NVIDIA H100 80GB HBM3",
        "triptych 9.9, abc123",
        "python -m launch.evaluate --model_name_or_path",
        "60 of 60",
        "samples.jsonl: 1 line torn or without a response, left out",
        "NaN or infinite: only/nan (1); the first at iteration 61.",
        "No samples were kept",
        "66.7 %",
        "peak memory of a rank 1 GiB 0.5 GiB 0.5 × the plan",
        "time of an iteration 1.75 s (at best) 3.5 s 2 × the plan",
        "--kl_coef 0.05 0.2",
        "nowhere: no such directory",
        "and 10,000 characters that are not in this page",
        "only/nan",
    ):
        assert words.replace("\xa0", " ") in text.replace("\xa0", " "), words
    assert text.index("Supervised fine-tuning") < text.index("Preference optimization") < text.index("Reinforcement")


def test_a_stage_is_known_by_its_flags_and_without_them_by_its_metrics(tmp_path):
    for stage in STAGES:
        directory = write(tmp_path / stage, stage)
        assert runs.read_run(directory).stage == card.Facts(made.CONFIGS[stage], *["x"] * 4).stage == stage
        (directory / "config.yaml").unlink()
        assert runs.read_run(directory).stage == stage


def test_what_no_flag_asked_for_is_not_drawn():
    """No KL, no mask: a number in the table, not a flat line."""
    zeros = np.zeros(N)
    groups, tabled = page_of.plots_of("grpo", [recorded("grpo", loss__kl=zeros, rollout__masked=zeros)])
    drawn = {plot.name: plot for _, plots in groups for plot in plots}
    assert {"loss/kl", "rollout/masked"} == {name for name, _ in tabled}
    assert {"groups/signal", "groups/all_right", "groups/pass_at_8", "groups/drawn", "sampler/ratio_max"} <= {*drawn}
    assert not [name for name in drawn if "value" in name or "variance" in name or name == drawn[name].title]
    assert drawn["loss"].caption == catalogue.RLVR_LOSS.caption


def test_what_a_run_descended_is_said_without_what_is_off():
    off = {"kl_coef": 0.0, "kl_in": "none", "kl_estimator": "k3", "dual_clip": 3.0}
    said = "advantage grpo, surrogate clip, clip_low 0.2, clip_high 0.28, dual_clip 3, aggregate token, kl_coef 0"
    assert verdict.loss_of(recorded("grpo", config=off)) == said


def test_every_metric_is_on_the_page(page):
    names = set().union(*(made.healthy(stage) for stage in STAGES)) | {"$x_{1}$", "<img src=x onerror=1>"}
    with_band = {"eval/low", "eval/high"}
    phases = {name for name in names if name.startswith("time/")}
    shown = {dict(attributes).get("id") for tag, attributes in Seen(page).tags if tag == "figure"}
    for name in names - with_band - phases:
        assert any(f"{stage}-{name}" in shown for stage in STAGES), name
    assert {"ppo-time/*: ppo", "ppo-time/*: <b>other"} <= shown and all(
        f">{phase[5:]}</span>" in page for phase in phases
    )


def test_nothing_that_a_model_says_is_more_than_text(page):
    seen = Seen(page)
    scripts = [attributes for tag, attributes in seen.tags if tag == "script"]
    assert scripts == [{}] and page.count("</script>") == 1
    assert not [
        t
        for t, a in seen.tags
        if t in ("img", "iframe", "object", "link", "base", "embed") or any(k.startswith("on") for k in a)
    ]
    words = """html head meta title style body header h1 h2 h3 h4 h5 p nav a section div table thead tbody tr th td
        span b i em small figure figcaption svg g path defs use line text clippath rect article progress dl dt dd
        code ul li details summary form label input select option output main script"""
    assert {tag for tag, _ in seen.tags} <= {*words.split()}
    text = "".join(seen.text)
    assert text.count(HOSTILE) >= 6
    assert "a␀␛[2J⟨U+202E⟩gnp.exe⟨U+D800⟩⟨U+2028⟩" in text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", page)


def test_the_page_is_one_file_that_loads_nothing(page):
    (policy,) = [a["content"] for t, a in Seen(page).tags if t == "meta" and a.get("http-equiv")]
    script = page[page.index("<script>") + 8 : page.index("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy is not None and "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
    assert not re.search(r"(?:src|href)=\"(?!#)", page) and "url(h" not in page and "@import" not in page
    assert len(page) < 3e6
    ids = re.findall(r'\sid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    targets = {a["href"] for t, a in Seen(page).tags if t == "a"}
    assert {str(target)[1:] for target in targets} <= {a.get("id") for _, a in Seen(page).tags}


def test_drawings_are_whole_and_in_the_pages_colours(page):
    drawings = re.findall(r"<svg viewBox.*?</svg>", page, re.S)
    assert len(drawings) > 40
    for drawing in drawings:
        ElementTree.fromstring(drawing)
        assert "#00cc" not in drawing and not re.search(r"(?:fill|stroke): #", drawing)
    variables = set(re.findall(r"var\((--\w+)\)", page))
    dark = page[page.index("prefers-color-scheme: dark") :]
    for variable in variables:
        assert f"{variable}: #" in page[: page.index("prefers-color-scheme: dark")] and f"{variable}: #" in dark[:1500]


@needs.matplotlib
def test_the_same_runs_give_the_same_bytes(tmp_path, monkeypatch):
    run = write(tmp_path / "sft", "sft", rows=[{"step": i, "loss": 1 / i, "new": i} for i in range(1, 9)])
    pages = []
    for _ in range(2):
        report([run], tmp_path / "page.html")
        page = (tmp_path / "page.html").read_text(encoding="utf-8")
        pages.append(re.sub(r"written [0-9: -]*", "", page))
    assert pages[0] == pages[1]


@needs.matplotlib
@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    found=st.dictionaries(
        st.text(min_size=1, max_size=10),
        st.lists(st.one_of(st.floats(), st.sampled_from([1e299, -1e299, 5e-324, 0.0, 1.0])), min_size=1, max_size=6),
        min_size=1,
        max_size=4,
    )
)
def test_any_numbers_under_any_names_are_drawn(found, tmp_path):
    run = tmp_path / "run"
    if not run.exists():
        write(run, "sft")
    rows = [{"step": i, **{k: v[i] for k, v in found.items() if i < len(v) and k != "step"}} for i in range(6)]
    lines(run / "metrics.jsonl", [{"step": 0, "loss": 1.0}, *rows])
    report([run], tmp_path / "page.html")
    text = "".join(Seen((tmp_path / "page.html").read_text(encoding="utf-8")).text)
    for name in found:
        assert name == "step" or samples.shown_text(name) in text


@needs.matplotlib
def test_a_long_run_stays_small_and_fast(tmp_path):
    """100,000 steps, and a million characters of samples."""
    rng = np.random.default_rng(0)
    names = [*made.healthy("dpo")][:8]
    values = rng.lognormal(size=(100_000, len(names)))
    text = "\n".join(
        f'{{"step":{i + 1},' + ",".join(f'"{n}":{x:.4g}' for n, x in zip(names, row, strict=True)) + "}"
        for i, row in enumerate(values)
    )
    run = write(
        tmp_path / "dpo",
        "dpo",
        kept=[{"step": i, "prompt": "p", "response": "r" * 2000, "score": 0} for i in range(1000)],
    )
    (run / "metrics.jsonl").write_text(text)
    start = time.process_time()
    report([run], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert len(page.encode()) < 3e6 and time.process_time() - start < 30
    assert "of 1,000 responses, evenly over time" in page


# --- results and evaluations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"row": []}, "results: unknown key row (did you mean rows?)"),
        ({"rows": 3}, "results: expected an object with a list `rows`"),
        ([{"name": "a"}], "results, row 1: accuracy is missing"),
        ([{"name": "a", "acuracy": 0.5}], "results, row 1: accuracy is missing (did you mean acuracy?)"),
        ([{"name": "a", "accuracy": 50}], "results, row 1: expected accuracy in [0, 1], got 50"),
        ([{"name": "a", "accuracy": 0.5, "low": "x"}], "results, row 1: expected low in [0, 1], got 'x'"),
        ({"rows": [], "answers": ["x"]}, "results, answer 1: expected an object with prompt and answers"),
        (["x"], "results, row 1: expected an object with name and accuracy"),
    ],
)
def test_a_table_that_is_wrong_is_refused_in_one_line(given, expected):
    with pytest.raises(UserError) as refused:
        results.read_results(given)
    assert str(refused.value).startswith(expected)


def test_files_of_results_and_evaluations_that_are_not_there(tmp_path):
    (tmp_path / "torn.json").write_text("{")
    (tmp_path / "verdicts.jsonl").write_text('{"line": 1}\n')
    for call, expected in [
        (lambda: results.read_results(tmp_path / "no.json"), "No such file"),
        (lambda: results.read_results(tmp_path / "torn.json"), "not JSON"),
        (lambda: results.read_evaluations([tmp_path / "verdict.jsonl"]), "did you mean verdicts.jsonl?"),
        (lambda: results.read_evaluations([tmp_path / "verdicts.jsonl"]), "no row with response and score"),
    ]:
        with pytest.raises(UserError, match=re.escape(expected)):
            call()


def test_an_evaluation_is_that_of_the_command(tmp_path):
    """Prompts by seeds, as engine/train/interval.py wants them, whatever the order; errors are no wrong answers."""
    from engine.train import interval

    rng = np.random.default_rng(1)
    scores = rng.integers(0, 2, (40, 3)).astype(float)
    rows = [
        {
            "seed": j,
            "prompt": f"p{i // 2}",
            "response": "",
            "dataset": "Math",
            "score": scores[i, j],
        }  # two of each prompt
        for j in range(3)
        for i in range(40)
    ]
    rows += [
        {"seed": j, "prompt": "bad", "response": "", "dataset": "ifeval", "score": 0.0, "status": "error"}
        for j in range(3)
    ]
    rows += [{"seed": j, "prompt": "good", "response": "", "dataset": "ifeval", "score": 1.0} for j in range(3)]
    lines(tmp_path / "x.jsonl", rows)
    (table,) = results.read_evaluations([tmp_path / "x.jsonl"])
    of = {row.name: row for row in table.rows}
    assert (of["math"].accuracy, of["math"].low, of["math"].high) == pytest.approx(interval.accuracy(scores))
    assert of["math"].also == {"prompts": "40", "samples": "3"}
    assert of["ifeval"].accuracy == 1 and of["ifeval"].also["left out"] == "1 prompts without all verdicts"
    assert set(of) == {"math", "ifeval", "all"}


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_step_time_where_no_phase_was_written():
    tokens = {i: 1000.0 * i for i in range(1, 9)}
    run = recorded("sft", num_tokens=tokens, perf__tokens_per_second_per_gpu=dict.fromkeys(range(1, 9), 250.0))
    assert planned.step_seconds(run, ranks=2) == pytest.approx(2.0)
    assert planned.step_seconds(recorded("ppo"), ranks=2) == pytest.approx(3.5)
    assert planned.compare(run) is None


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        ("8 x NVIDIA H100 80GB HBM3", (8, "h100-80gb")),
        ("1 x NVIDIA A100-SXM4-40GB", (1, "a100-40gb")),
        ("2 x cpu (2 cores)", (2, "cpu")),
        ("", (1, "cpu")),
    ],
)
def test_the_machine_that_a_run_names_is_one_of_the_planners(machine, expected):
    run = recorded("sft")
    run.facts["machine"] = machine
    assert planned.machine_of(run) == expected


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_line():
    config = parse(Config, ["a", "--output", "x.html", "b", "--plan", "c", "--evaluations", "e", "f"])
    assert config.runs == ("a", "b", "c") and config.evaluations == ("e", "f") and config.plan
    with pytest.raises(UserError, match="unknown flag --outptu"):
        parse(Config, ["a", "--outptu", "x"])


def test_without_matplotlib_it_is_one_line_and_other_commands_know_its_flags(tmp_path):
    def run(program: str) -> subprocess.CompletedProcess:
        program = f"import runpy, sys; sys.modules['matplotlib'] = None; {program}"
        return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)

    words = ["launch.report", str(write(tmp_path / "sft", "sft"))]
    done = run(f"sys.argv = {words!r}; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)")
    assert done.returncode == 2
    assert done.stderr == "error: launch.report needs matplotlib: pip install -e '.[report]'\n"
    done = run("from launch.report import Config; print(Config().output, 'torch' in sys.modules)")
    assert done.stdout == "report.html False\n", done.stderr


@needs.matplotlib
def test_a_page_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"--output .*no/page.html: No such file or directory"):
        run = write(tmp_path / "sft", "sft", rows=[{"step": 1, "loss": 1.0}])
        report([run], tmp_path / "no" / "page.html")
