"""Accuracy of a model on problems with verifiable answers.      torchrun --nproc_per_node 8 -m launch.evaluate --help

    python -m launch.evaluate --model_name_or_path DIR --dataset_name problems.jsonl --temperature 0 --output a.jsonl
    python -m launch.evaluate ... --num_few_shot 8 --few_shot_file train.jsonl        worked answers before the question
    python -m launch.evaluate ... --num_samples_per_prompt 16                         pass@k and majority@16 as well
    python -m launch.evaluate ... --output b.jsonl --baseline a.jsonl                 is it better than that one?

    p = mean over prompts i and responses j of score_ij   95 % interval: Wilson's, for N K / (1 + (K - 1) rho) responses

N prompts are answered K = seeds x samples times. Answers to one prompt resemble each other (rho, their intraclass
correlation), so N K of them say less than as many prompts would: the interval is that of the effective number. A seed
is a repetition of the whole evaluation (--num_seeds: the spread between them is shown); pass@k and majority@n are of
the samples of one seed (--num_samples_per_prompt), and their mean over seeds. --temperature 0 decodes greedily, once.

Rows are RLVR's: `messages`, `ground_truth`, `dataset` (the verifier's name). --output is written as responses come: the
same command goes on where a killed one stopped. docs/evaluating.md has the settings of the Tülu 3 paper.

With no argument it evaluates the embedded tiny Llama (as `launch.ppo` fine-tuned it, where it did) on held-out
problems.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.config import parse
from engine.data import PromptReader, embedded, fingerprint_of, prompts_of
from engine.errors import UserError
from engine.flags import DataFlags, InferenceFlags, PromptFlags, SamplingFlags, fill, flag, override, require_positive
from engine.model import Base, open_model
from engine.world import World, main, start
from launch import commands
from launch.compare import compared, matched
from launch.evaluation import answers, few_shot, file, results, table
from launch.inference import cautions, resolve_model
from launch.judges import checker, pinned
from verifiers import MODES


@dataclass(frozen=True, kw_only=True)
class Config(InferenceFlags, DataFlags, PromptFlags, SamplingFlags):
    __doc__ = __doc__
    dataset_name: str = override(
        None, "file, 'data/*.jsonl', directory, hub id or id:config, as in training; without it, embedded problems"
    )
    dataset_split: str = override("test")
    num_prompts: int | None = flag(None, "only the first N prompts")
    max_seq_length: int = override(
        4096, "prompt, examples and response, in tokens; prompts that leave no room are dropped and counted"
    )
    source_column: str | None = flag(
        None, "column to group by (MATH's type); without it source or data_source, else the file"
    )
    num_few_shot: int = flag(0, "worked answers before each question")
    few_shot_file: str | None = flag(
        None, "where they are from: rows in any form that launch.sft reads (question and answer, messages, ...)"
    )
    few_shot_as: str = flag(
        "turns", "earlier turns of the chat, or text in the question's own turn", choices=("turns", "text")
    )
    few_shot_choice: str = flag(
        "first", "the file's first ones, or for each question others, drawn by --seed", choices=("first", "random")
    )
    seed: int = override(1, "the first seed")
    num_seeds: int = flag(
        None,
        "repetitions of the whole evaluation, each under a seed of its own; 3, or 1 if greedy or with several samples",
    )
    num_samples_per_prompt: int = override(
        1, "samples under each seed: more give pass@k, k = 1, 2, 4, ..., and the majority's answer"
    )
    cache_dir: str = override("~/.cache/triptych", "where the embedded model and problems lie")
    verifier_mode: str = override("default", choices=MODES)
    output: str | None = flag(
        None, "file of all responses with verdicts and reasons, as JSON lines; one that is there is gone on with"
    )
    baseline: str | None = flag(None, "another model's --output: compared with this one at the end (launch.compare)")


def evaluate(config: Config) -> results.Evaluation:
    """Samples answers under every seed, verifies them, prints what is measured and returns it, the same on every rank.

    From Python: `evaluate(Config(model_name_or_path=..., dataset_name=..., temperature=0.0, output="a.jsonl"))`, then
    `compare("a.jsonl", "b.jsonl")` of launch.compare. Raises UserError.
    """
    world = start()
    is_embedded = config.model_name_or_path is None
    config = resolve(config, world)
    baseline = world.on_main("baseline", lambda: config.baseline and file.read_responses(Path(config.baseline)))
    base = open_model(config, world)
    world.say(*cautions(base, is_embedded))
    examples, questions, too_long = read_questions(config, base, world)
    wanted = {
        (question.key, seed, sample): question.verifier
        for seed in range(config.seed, config.seed + config.num_seeds)
        for question in questions
        for sample in range(config.num_samples_per_prompt)
    }
    if config.baseline:
        judged_by = {question.key: question.verifier for question in questions}
        world.on_main("matched", lambda: matched({of.key: of.verifier for of in baseline[0]}, judged_by))
    output = Path(config.output) if config.output else None
    there = world.on_main("output", lambda: file.ResponseFile(output, wanted))
    try:
        settings = settings_of(config, base, examples)
        world.on_main("settings", lambda: there.check(settings, unknown=("weights",)))
        world.say(*first_screen(config, base, questions, examples))
        answers.ask(base, world, config, questions, there, settings)
        world.on_main("order", lambda: there.finish())
        found = results.evaluation(there.responses, list(wanted), output, too_long) if there else None
        found = world.gather(found)[0]
    finally:
        if there:
            there.close()
    if there:
        world.say(*table.table(found, [there.responses[name] for name in wanted]))
        if baseline:
            comparison = compared(baseline[0], there.responses.values(), baseline[1], there.settings)
            world.say(f"the baseline: {config.baseline}", *comparison.lines("the baseline", "this model"))
        world.say(*last_lines(config, len(wanted)))
    return found


def read_questions(config: Config, base: Base, world: World) -> tuple[few_shot.FewShot, list[few_shot.Question], int]:
    """(the examples, the questions behind them, how many were too long); says what was kept, dropped and not used.
    Raises UserError.
    """
    room = base.longest_prompt(config.max_seq_length, config.response_length)
    examples = few_shot.FewShot()
    if config.num_few_shot and config.few_shot_file:
        examples, lines = few_shot.read_exemplars(
            config.few_shot_file,
            config.num_few_shot,
            base.chat,
            form=config.few_shot_as,
            drawn=config.few_shot_choice == "random",
            seed=config.seed,
        )
        world.say(*lines)
    with checker(config.verifier_mode, config.verifier_module) as check:
        reader = PromptReader(base.chat, config, check, config.system_role == "fold", longest=room)
        read = few_shot.QuestionReader(reader, examples, config.source_column)
        prompts = prompts_of(config.dataset_name, config.dataset_split, config, read, world, longest=room)
    world.say(*examples.lines())
    world.agree("prompts", fingerprint_of(prompts))
    return examples, few_shot.told_apart(prompts)[: config.num_prompts], examples.met["read"] - len(prompts)


def settings_of(config: Config, base: Base, examples: few_shot.FewShot) -> dict[str, Any]:
    """What decides what is answered and how it is judged, but for the weights; what is not in use is left out."""
    named = ("temperature", "top_k", "top_p", "response_length", "prompt_template", "system_prompt", "system_role")
    settings: dict[str, Any] = {name: vars(config)[name] for name in (*named, "verifier", "verifier_mode")}
    settings |= {"verifier_module": config.verifier_module, "tokenizer": base.chat.fingerprint[:16]}
    settings |= {"dtype": str(base.dtype).removeprefix("torch."), "num_few_shot": config.num_few_shot}
    if config.num_few_shot:
        settings |= {"few_shot_as": config.few_shot_as, "few_shot_choice": config.few_shot_choice}
        settings |= {"few_shot_examples": examples.digest, "few_shot_seed": config.seed if examples.drawn else None}
    return {name: value for name, value in settings.items() if value is not None}


def first_screen(
    config: Config, base: Base, questions: list[few_shot.Question], examples: few_shot.FewShot
) -> list[str]:
    """What is evaluated, on what, and how."""
    drawn = table.sampled_how(config, config.num_seeds, config.seed)
    how = [table.examples_how(examples, config.few_shot_file), drawn]
    end = base.chat.tokenizer.decode(questions[0].ids, skip_special_tokens=False)[-100:]
    return table.first_screen(questions, base.name, config.dataset_name, how, end)


def last_lines(config: Config, responses: int) -> list[str]:
    """What was written, and what to type next."""
    if not config.output:
        return ["nothing was written: --output FILE keeps the responses, and goes on where a killed run stopped"]
    written = f"written: {config.output}, {responses:,} responses"
    if config.baseline:
        return [f"{written}; next: python -m launch.verify {config.output} --failures_only"]
    return [f"{written}; next, for another model's file: python -m launch.compare {config.output} OTHER.jsonl"]


def resolve(config: Config, world: World) -> Config:
    """Fills what is left open. Raises UserError."""
    config = replace(config, verifier_module=pinned(config.verifier_module))
    world.agree("configuration", repr(config))
    if config.verifier_module:
        world.say(f"verifier of your own: {config.verifier_module}")
    require_positive(config, "num_prompts", "max_seq_length", "num_seeds", "num_samples_per_prompt")
    config.check_rows()
    config.check_prompts()
    config.check_sampling()
    check_few_shot(config)
    if config.output and not Path(config.output).absolute().parent.is_dir():
        raise UserError(f"--output {config.output}: no such directory")
    if config.output and config.baseline and Path(config.output).absolute() == Path(config.baseline).absolute():
        raise UserError(f"--baseline {config.baseline} is --output: expected another model's file")
    if config.temperature == 0 and config.num_samples_per_prompt > 1:
        raise UserError(
            f"--num_samples_per_prompt {config.num_samples_per_prompt}: greedy samples are all the same, expected"
            " --temperature above 0"
        )
    if config.temperature == 0 and (config.num_seeds or 1) > 1:
        world.say("--temperature 0: greedy answers are the same under every seed, so one is taken")
        config = replace(config, num_seeds=1)
    config = fill(config, num_seeds=1 if config.temperature == 0 or config.num_samples_per_prompt > 1 else 3)
    if config.model_name_or_path is not None:
        if config.dataset_name is None:
            raise UserError("--model_name_or_path needs --dataset_name (without either, all is embedded)")
        return fill(resolve_model(config, world), response_length=1024)
    config = resolve_model(config, world)
    held_out = embedded(Path(config.cache_dir).expanduser()).held_out_problems
    config = replace(config, max_seq_length=min(config.max_seq_length, 256))
    return fill(config, dataset_name=str(held_out), response_length=24)


def check_few_shot(config: Config) -> None:
    """Raises UserError for flags that contradict each other."""
    if config.num_few_shot < 0:
        raise UserError(f"--num_few_shot must not be negative, got {config.num_few_shot}")
    if config.num_few_shot and config.few_shot_file is None:
        raise UserError(f"--num_few_shot {config.num_few_shot} needs --few_shot_file, worked answers to take them from")
    if config.few_shot_file is not None and not config.num_few_shot:
        raise UserError("--few_shot_file is not read without --num_few_shot")
    for name in ("few_shot_as", "few_shot_choice"):
        if not config.num_few_shot and vars(config)[name] not in ("turns", "first"):
            raise UserError(f"--{name} is not read without --num_few_shot")


if __name__ == "__main__":
    main(lambda: evaluate(parse(Config, elsewhere=commands)), resumable=True)
