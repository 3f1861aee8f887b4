"""The screen of whole runs: what stands on the first, and that nobody but us says anything."""

from __future__ import annotations

import pytest

from tests import ranks
from tests.needs import bitsandbytes

QUIET = [
    pytest.param("launch.dpo", ["--use_lora", "--load_in_4bit", "--save_steps", "1"], 2, marks=bitsandbytes),
    pytest.param("launch.dpo", ["--gradient_checkpointing=full", "--optimizer=adamw_8bit"], 1, marks=bitsandbytes),
    pytest.param("launch.ppo", ["--batch_size", "4", "--num_samples_per_prompt", "2", "--eval_samples", "1"], 2),
]


@pytest.mark.parametrize("module, words, size", QUIET)
def test_a_quiet_run_says_its_last_line_alone(module, words, size, tmp_path, tuned):
    """Of all ranks, on standard output and error: no library has anything to say."""
    words = [*words, "--quiet", "--max_steps", "2", "--output_dir", tmp_path / "out", "--cache_dir", tuned]
    result = ranks.launch(words, size, module, tmp_path / "log")
    (line,) = result.output.splitlines()
    assert result.ok and line.startswith(f"done: {tmp_path}/out/final loads with AutoModelForCausalLM"), result.output
    again = ranks.launch(words, size, module, tmp_path / "again")
    assert again.ok and again.output == f"{tmp_path}/out is finished, final/ is written: nothing to do\n"


def test_the_first_screen_and_the_last_lines(tmp_path, tuned):
    words = ["--max_steps", "2", "--output_dir", tmp_path / "out", "--cache_dir", tuned, "--batch_size", "4"]
    result = ranks.launch([*words, "--eval_samples", "1"], 1, "launch.ppo", tmp_path / "log")
    said = result.output.splitlines()
    assert result.ok and [said.index(heading) for heading in ("model", "data", "training", "machine")]
    for row in (
        "  value model     from the policy, with a head of zeros",
        "  iterations      4 prompts per iteration, 2 iterations, 0.031 epochs",
        "  optimizer       adamw, learning rate 0.001, linear",
        f"  output          {tmp_path}/out",
        "  world           1 x cpu, compute float32, masters float32",
        f"next: python -m launch.report {tmp_path}/out",
    ):
        assert row in said, result.output
    assert "\x1b" not in result.output and "\r" not in result.output
    (done,) = [line for line in said if line.startswith("done: ")]
    assert ", 2 iterations in 0:" in done and "; held out: verified " in done
    assert [line for line in said if line.startswith("iteration 2/2: 0:")]  # in place of a bar


def test_quiet_does_not_hide_what_a_dry_run_is_for(tmp_path):
    result = ranks.launch(["--quiet", "--dry_run", "--output_dir", tmp_path / "out"], 1, log=tmp_path / "log")
    assert result.codes == [2] and result.output.startswith("error: --quiet would hide what --dry_run is for:")
