"""Responses of a model to prompts.                              torchrun --nproc_per_node 8 -m launch.generate --help

    python -m launch.generate --model_name_or_path output/sft --prompt 'Name three rivers.' 'And three lakes?'
    python -m launch.generate --model_name_or_path output/ppo --dataset_name problems.jsonl --output responses.jsonl

Prompts are texts, or rows as training reads them: messages, prompt, question, instruction and their like; an answer at
the end of a row is cut off. --output writes a JSON object for each response, in the order of the prompts: prompt,
messages, response, finish_reason (stop or length), tokens, and the row's ground_truth and dataset, so that
launch.verify reads the file. Responses are a function of the model, the prompt's place, and --seed, on one process as
on eight. --temperature 0 decodes greedily. A run that was stopped goes on with the same command: the
responses that had ended lie beside --output until all have.

With no argument the embedded tiny model answers embedded questions.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from engine.config import parse
from engine.data import Question, QuestionReader, prompts_of
from engine.errors import UserError
from engine.flags import DataFlags, InferenceFlags, PromptFlags, QuestionFlags, RolloutFlags, fill, flag, override
from engine.model import open_model
from engine.world import World, main, start
from launch import commands
from launch.inference import cautions, embedded_questions, open_sampler, resolve_model
from launch.journal import Journal, line_of, run_of
from launch.mail import Mail
from launch.responses import check_output, questions_of, summary, write
from rollout import Request, Sampler, SamplingParams

SHOWN = 4  # responses on the screen, where --output has them all
EMBEDDED = 4  # questions that are asked without --prompt and --dataset_name


@dataclass(frozen=True, kw_only=True)
class Config(InferenceFlags, DataFlags, QuestionFlags, RolloutFlags):
    __doc__ = __doc__
    prompt: tuple[str, ...] | None = flag(
        None,
        "what the user says: one text or several, each a prompt of its own",
        texts=True,
        excludes=("dataset_name",),
    )
    output: str | None = flag(None, "file of all responses as JSON lines; without it they are printed")
    dataset_name: str = override(
        None, "file, 'data/*.jsonl', directory, hub id or id:config with prompts, in any form that training reads"
    )
    max_seq_length: int = override(
        2048, "prompt + response, in tokens; prompts that leave no room are dropped and counted"
    )
    system_prompt: str | None = override(None, "system turn of the prompts that have none")
    response_length: int = override(
        None, "longest response in tokens; 1024, or half of what the model can hold, embedded 48"
    )
    num_samples_per_prompt: int = override(1, "responses per prompt")


def generate(config: Config) -> None:
    """Samples the responses, each rank its share of the prompts, and prints or writes them in the prompts' order."""
    world = start()
    is_embedded = config.model_name_or_path is None
    config = resolve(config, world)
    base = open_model(config, world)
    config = fill(config, response_length=48 if is_embedded else base.usual_response(config.max_seq_length))
    room = base.longest_prompt(config.max_seq_length, config.response_length)
    world.say(*cautions(base, is_embedded))
    words = PromptFlags(system_prompt=config.system_prompt, prompt_template=config.prompt_template)
    read = QuestionReader(base.chat, words, fold_system=config.system_role == "fold")
    if config.prompt is not None:  # whose length is said where it is too much
        questions = questions_of(config.prompt, read, room)
    else:
        read = replace(read, longest=room)
        found = prompts_of(config.dataset_name, config.dataset_split, config, read, world, longest=room)
        questions = [question for question in found if isinstance(question, Question)]
    window = max(len(question.ids) for question in questions) + config.response_length
    sampler, weights = open_sampler(base, world, window=window, flags=config)
    params = SamplingParams.of(config, *base.chat.end_ids)
    drawn = {"seed": config.seed, "samples": config.num_samples_per_prompt, "dtype": str(base.dtype)}
    run = run_of(weights, questions, asdict(params) | drawn)
    journal = world.on_main("journal", lambda: Journal(config.output, run, questions, world))
    journal = journal or Journal(None, run, questions, world)
    sample(sampler, journal, config, params, world)
    if not world.is_main:
        return
    rollouts = [journal.rollouts[name] for name in sorted(journal.rollouts)]
    if config.output:
        write(Path(config.output), rollouts, questions, base.chat)
    journal.close()
    print(*summary(rollouts, base.chat, SHOWN if config.output else len(rollouts)), sep="\n", flush=True)


def resolve(config: Config, world: World) -> Config:
    """Fills what is left open. Raises UserError."""
    world.agree("configuration", repr(config))
    config.check_rollout()
    config.check_rows()
    config.check_prompts()
    config.check_decoding()
    if config.prompt is not None and not all(text.strip() for text in config.prompt):
        raise UserError("--prompt: expected texts, got an empty one")
    check_output(config.output)
    if config.temperature == 0 and config.num_samples_per_prompt > 1:
        world.say("--temperature 0: greedy answers to one prompt are the same, so one is taken")
        config = replace(config, num_samples_per_prompt=1)
    embeds = config.model_name_or_path is None
    if not embeds and config.prompt is None and config.dataset_name is None:
        raise UserError("nothing to answer: give --prompt TEXT or --dataset_name FILE")
    config = resolve_model(config, world)
    if config.prompt is None and config.dataset_name is None:
        config = replace(config, prompt=embedded_questions(config.cache_dir, EMBEDDED))
    return config


def sample(sampler: Sampler, journal: Journal, config: Config, params: SamplingParams, world: World) -> None:
    """The responses that are not in rank 0's journal yet, into it as they end. Collective."""
    wanted = [(i, j) for i in range(len(journal.questions)) for j in range(config.num_samples_per_prompt)]
    missing = journal.missing(wanted, world)
    examples = sorted({example for example, _ in missing})
    team = sampler.team
    mine = set(examples[team.number :: team.count])
    requests = [Request(journal.questions[i].ids, i, j) for i, j in missing if i in mine]
    hidden = None if world.is_main and len(requests) > 1 else True  # None: shown on a terminal alone
    with tqdm(total=len(missing), unit="response", disable=hidden, dynamic_ncols=True, leave=False) as bar:

        def take(line: str) -> None:
            journal.take(line)
            bar.update(1)

        with Mail(world, take, journal.path) as mail:
            for _, rollout in sampler.stream(requests, params, seed=config.seed, step=0):
                if team.leads:  # of the ranks that share a sampler, one
                    mail.send(line_of(rollout))


if __name__ == "__main__":
    main(lambda: generate(parse(Config, elsewhere=commands)), resumable=True)
