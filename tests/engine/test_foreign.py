"""Flags of other trainers: every name of the table through every command's own `parse`, and docs/flags.md."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import config as configuration
from engine.config import as_dict, flags_of, parse
from engine.errors import UserError
from engine.flags import table
from engine.flags.foreign import ANY, No, Row
from engine.flags.words import DOTTED
from launch import commands
from launch.planner.plans import STAGES
from tests import flags_page

# a command whose file stands without a name has no flags of other trainers
POSITIONAL = {name: c for name, c in commands().items() if any(f.positional for f in flags_of(c).values())}
COMMANDS = {name: c for name, c in commands().items() if name != "launch.plan" and name not in POSITIONAL}
WORDS = {bool: "true", int: "3", float: "0.25", str: "word"}
STRANGE = "no_such_word_7"
NAMES = [(row, name.replace("*", "mode")) for row in table.TABLE for name in row.names]


@functools.cache
def default(config_class: type) -> dict:
    return as_dict(config_class())


@functools.cache
def row_for(name: str, config_class: type) -> Row | None:
    """The table's rule, once more: the first row of which the command has all flags."""
    has = flags_of(config_class).keys()
    rows = [r for r in table.TABLE if name in r.names] + [
        r for r in table.TABLE if any(n.endswith("*") and name.startswith(n[:-1]) for n in r.names)
    ]
    return next((r for r in rows if r.needs <= has), None)


def changes(config_class: type, argv: list[str]) -> dict:
    """What a command line sets, of what is not the default."""
    got = vars(parse(config_class, argv, elsewhere=commands))
    return {name: value for name, value in got.items() if value != default(config_class)[name]}


def what(config_class: type, name: str, word: str, recipe: Path | None = None) -> dict | str:
    """What `name: word` changes, or how it is refused; the same in a recipe, where a path for it is given."""
    said = []
    if recipe:
        recipe.write_text(f"{name}: {word}\n", encoding="utf-8")
    for argv in ([f"--{name}", *word.split()], ["--config", str(recipe)])[: 1 + bool(recipe)]:
        try:
            said.append(changes(config_class, argv))
        except UserError as error:
            assert "\n" not in str(error)
            said.append(str(error).replace(f"{recipe}: ", "").removeprefix("command line: ").replace("--", ""))
    assert said[0] == said[-1], (name, word)
    return said[0]


@pytest.mark.parametrize("command", POSITIONAL)
def test_a_command_without_them_refuses_every_name_in_one_line(command):
    for name in dict.fromkeys(name for _, name in NAMES):
        if name not in flags_of(POSITIONAL[command]):
            with pytest.raises(UserError, match=r"unknown flag|belongs to launch|here"):
                parse(POSITIONAL[command], ["file", f"--{name}", "true"], elsewhere=commands)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_name_of_the_table(command, tmp_path, capsys, monkeypatch):
    """What means the same changes the same; what is done anyway changes nothing; the rest is refused with the reason;
    what belongs to another command says so. The first name of a row by all its words in every command that has it, and
    in a recipe too.
    """
    config_class = COMMANDS[command]
    flags = flags_of(config_class)
    monkeypatch.setattr(configuration, "flags_of", functools.cache(flags_of))  # the types of a class are read once
    for name in dict.fromkeys(name for _, name in NAMES):
        row = row_for(name, config_class)
        if row is None:
            assert name in flags or "belongs to launch." in what(config_class, name, "3"), name
            continue
        if any(f.positional for f in flags.values()):  # whose words could not be told from those of other names
            assert f"is {min(row.needs)} here" in what(config_class, name, "3"), name
            continue
        first = name == row.names[0].replace("*", "mode")
        where = next(c for c, other in COMMANDS.items() if row_for(name, other) is row)
        if where != command and not first:
            continue  # the same row, under another name
        recipe = tmp_path / "recipe.yaml" if first and where == command else None
        if row.takes == ANY:
            assert what(config_class, name, STRANGE, recipe) == {}
            assert f"--{name} is not used: {row.why}\n" in capsys.readouterr().out
        elif row.takes is not None:
            for word in row.takes if first else row.takes[:1]:
                # YAML's null says nothing, on a command line it is a word
                assert what(config_class, name, word, None if word == "none" else recipe) == {}, (name, word)
                assert f"--{name} {word}: {row.why}\n" in capsys.readouterr().out
            why = row.why.replace("--", "")
            assert what(config_class, name, STRANGE, recipe) == f"{name} {STRANGE} is refused: {why}"
        elif row.words is not None:
            for word, ours in [*row.words.items()][:: 1 if first else 99]:
                check_word(config_class, row, name, word, ours, recipe)
        elif row.read is None:
            f = flags[row.ours]
            word = f.choices[-1] if f.choices else WORDS.get(f.type, "word")
            got = what(config_class, name, word, recipe)
            assert f"--{name} {word} is --{row.ours} {word}\n" in capsys.readouterr().out
            assert got == changes(config_class, [f"--{row.ours}", word]), name


def check_word(config_class: type, row: Row, name: str, word: str, ours: str, recipe: Path | None) -> None:
    """One word of a row that translates words."""
    if name == row.ours and word in flags_of(config_class)[name].choices:
        return
    got = what(config_class, name, word, recipe)
    if isinstance(ours, No):
        assert got == f"{name} {word} is refused: {ours.replace('--', '')}"
    else:
        pairs = [pair.partition("=") for pair in ours.split()] if "=" in ours else [(row.ours, "", ours)]
        argv = [w for flag, _, value in pairs for w in (f"--{flag}", value)] if ours else []
        assert got == changes(config_class, argv), (name, word)


# --- by hand ----------------------------------------------------------------------------------------------------------

SAME = [
    ("dpo", "--bf16", "--dtype bfloat16"),
    ("dpo", "--bf16 true --seed 3", "--dtype bfloat16 --seed 3"),
    ("sft", "--bf16=False", "--dtype float32"),
    ("sft", "--optim adamw_torch_fused", "--optimizer adamw"),
    ("sft", "--optim paged_adamw_8bit", "--optimizer adamw_8bit"),
    ("sft", "--optimizer adamw_bnb_8bit", "--optimizer adamw_8bit"),
    ("sft", "--gradient_checkpointing", "--gradient_checkpointing full"),
    ("sft", "--gradient_checkpointing False", "--gradient_checkpointing none"),
    ("sft", "--gradient_checkpointing selective", "--gradient_checkpointing selective"),
    ("sft", "--attn_implementation flash_attention_2", "--attention flash2"),
    ("sft", "--attn_implementation kernels-community/vllm-flash-attn3", "--attention flash3"),
    ("sft", "--attn_implementation eager", "--attention eager"),
    ("ppo", "--max_new_tokens 64", "--response_length 64"),
    ("ppo", "--max_completion_length 64 --num_generations 8", "--response_length 64 --num_samples_per_prompt 8"),
    ("evaluate", "--limit 10 --max_tokens 64", "--num_prompts 10 --response_length 64"),
    ("sft", "--lr_scheduler_type constant_with_warmup", "--lr_scheduler_type constant"),
    (
        "sft",
        '--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {"min_lr_rate":0.1}',
        "--lr_scheduler_type cosine_with_min_lr --min_lr_ratio 0.1",
    ),
    ("sft", '--lr_scheduler_kwargs {"num_decay_steps":50,"decay_type":"cosine"}', "--decay_steps 50"),
    ("sft", "--adam_betas 0.9 0.95", "--adam_beta1 0.9 --adam_beta2 0.95"),
    ("sft", "--use_qlora", "--use_lora --load_in_4bit"),
    ("sft", "--target_modules q_proj v_proj", "--lora_target_modules q_proj v_proj"),
    ("sft", "--warmup_steps 100", "--warmup_steps 100"),
    ("sft", "--save_strategy no", "--save_steps 0"),
    ("sft", "--resume_from_checkpoint out/checkpoints/step-000004", "--resume out/checkpoints/step-000004"),
    ("sft", "--epochs 3 --lr 1e-5", "--num_train_epochs 3 --learning_rate 1e-5"),
    ("ppo", "--max_epochs 3 --lambd 0.9 --eps_clip 0.3", "--num_ppo_epochs 3 --lam 0.9 --cliprange 0.3"),
    ("dpo", "--max_epochs 3 --dpo_beta 0.2", "--num_train_epochs 3 --beta 0.2"),
    ("dpo", "--packing --padding_free true --logging_steps 10 --fp16 false --local_rank 0", ""),
    ("dpo", "--warmup_ratio 0.2 --lr_warmup_ratio 0.2", "--warmup_ratio 0.2"),
    ("grpo", "--epsilon 0.1", "--clip_low 0.1 --clip_high 0.1"),
    ("grpo", "--epsilon 0.1 --epsilon_high 0.28", "--clip_low 0.1 --clip_high 0.28"),
    ("grpo", "--clip_high 0.3 --clip_ratio 0.1", "--clip_low 0.1 --clip_high 0.3"),
    ("grpo", "--eps_clip_low_high 0.2 0.3", "--clip_low 0.2 --clip_high 0.3"),
    ("grpo", "--clip_lower 0.2 --clip_higher 0.272 --delta 4", "--clip_low 0.2 --clip_high 0.272 --dual_clip 4"),
    ("grpo", "--dual_clip 3", "--dual_clip 3"),
    ("grpo", "--beta 0.04 --num_iterations 2", "--kl_coef 0.04 --num_ppo_epochs 2"),
    ("grpo", "--beta 0.01 --use_bias_correction_kl", "--kl_coef 0.01 --kl_estimator unbiased"),
    ("grpo", "--beta 0.01 --kl_estimator 2", "--kl_coef 0.01 --kl_estimator k3"),
    ("grpo", "--init_kl_coef 0.01", "--kl_coef 0.01 --kl_in reward"),
    ("grpo", "--init_kl_coef 0.01 --use_kl_loss --kl_estimator k3", "--kl_coef 0.01 --kl_in loss --kl_estimator k3"),
    ("grpo", "--init_kl_coef 0", "--kl_coef 0"),
    (
        "grpo",
        "--kl_loss_coef 0.001 --use_kl_loss true --kl_loss_type low_var_kl",
        "--kl_coef 0.001 --kl_in loss --kl_estimator k3",
    ),
    ("grpo", "--loss_type dapo", "--aggregate token"),
    ("grpo", "--loss_type grpo --scale_rewards none", "--aggregate sequence --advantage dr_grpo"),
    ("grpo", "--loss_type cispo", "--surrogate cispo --aggregate token"),
    ("grpo", "--scale_rewards True", "--advantage grpo"),
    ("grpo", "--importance_sampling_level sequence --loss_type grpo", "--surrogate gspo --aggregate sequence"),
    ("grpo", "--advantage_estimator group_norm", "--advantage grpo"),
    ("grpo", "--adv_estimator rloo --loss_agg_mode seq-mean-token-mean", "--advantage rloo --aggregate sequence"),
    ("grpo", "--mask_truncated_completions true --entropy_loss_coef 0.01", "--mask_truncated --entropy_coef 0.01"),
    ("grpo", "--vllm_importance_sampling_cap 2", "--tis_cap 2"),
    ("grpo", "--truncated_importance_sampling_ratio_cap 0", ""),
    ("grpo", "--truncated_importance_sampling_ratio_cap 2.0", "--tis_cap 2.0"),
    ("grpo", "--max_completion_length 64 --num_generations 4", "--response_length 64 --num_samples_per_prompt 4"),
    ("ppo", "--epsilon 0.1 --init_kl_coef 0.1", "--cliprange 0.1 --kl_coef 0.1"),
]


@pytest.mark.parametrize("stage, theirs, ours", SAME, ids=[theirs for _, theirs, _ in SAME])
def test_what_means_the_same(stage, theirs, ours):
    config_class = COMMANDS[f"launch.{stage}"]
    assert parse(config_class, theirs.split()) == parse(config_class, ours.split())


REFUSED = [
    ("sft", "--max-new-tokens 3", "command line: unknown flag --max-new-tokens (did you mean max_new_tokens?)"),
    ("sft", "--fp16", "--fp16 true is refused: float16 needs loss scaling"),
    ("sft", "--packing false", "--packing false is refused: always on: sequences share a micro-batch"),
    ("sft", "--optim adafactor", "--optim adafactor is refused: AdamW is what is built"),
    ("sft", "--optimizer sgd", "--optimizer: sgd is not one of adamw, adamw_8bit"),
    (
        "sft",
        "--max_new_tokens 3",
        "command line: --max_new_tokens is --response_length here, which belongs to launch.ppo",
    ),
    ("sft", "--limit 3", "--limit 3 is refused: give --mixer_list NAME N in place of --dataset_name NAME"),
    ("sft", "--beta 0.1", "command line: --beta belongs to launch.dpo"),
    ("ppo", "--beta 0.1", "--beta 0.1 is refused: the KL penalty is --kl_coef, in the reward"),
    ("ppo", "--epsilon_high 0.28", "--epsilon_high 0.28 is refused: clipping is one --cliprange on both sides"),
    ("ppo", "--use_kl_loss", "--use_kl_loss true is refused: the KL penalty is in the reward: --kl_coef"),
    ("ppo", "--advantage_estimator group_norm", "is refused: advantages are GAE's, of a value model"),
    ("sft", "--epsilon_high 0.28", "--epsilon_high is --clip_high here, which belongs to launch.grpo"),
    ("sft", "--loss_type dapo", "command line: --loss_type belongs to launch.dpo"),
    ("grpo", "--epsilon_high 5", "--epsilon_high 5 is refused: above 1 it is CISPO's bound on the weight itself: give"),
    ("grpo", "--epsilon x", "--epsilon x is refused: expected a finite number, got x"),
    ("grpo", "--eps_clip_low_high 0.2", "--eps_clip_low_high 0.2 is refused: expected two numbers"),
    ("grpo", "--scale_rewards batch", "--scale_rewards batch is refused: the batch's deviation is not built"),
    ("grpo", "--loss_type sapo", "--loss_type sapo is refused: it is not built; dapo, grpo, dr_grpo, bnpo and cispo"),
    ("grpo", "--advantage_estimator gae", "is refused: it needs a value model: that is launch.ppo"),
    ("grpo", "--active_sampling", "--active_sampling true is refused: give --dynamic_sampling N"),
    ("grpo", "algorithm.adv_estimator=grpo", "command line: algorithm.adv_estimator is --advantage here"),
    ("grpo", "actor_rollout_ref.actor.clip_ratio=0.2", "actor_rollout_ref.actor.clip_ratio is --clip_low here (flags"),
    ("ppo", "actor_rollout_ref.actor.clip_ratio=0.2", "actor_rollout_ref.actor.clip_ratio is --cliprange here (flags"),
    ("dpo", "--batch_sise 4", "command line: unknown flag --batch_sise (did you mean batch_size?)"),
    ("evaluate", "--gpus 8", "command line: --gpus belongs to launch.plan"),
    ("evaluate", "--learning_rate 1", "--learning_rate belongs to launch.sft, launch.dpo, launch.ppo and launch.grpo"),
    (
        "sft",
        "--max_length 5 --max_seq_length 6",
        "--max_length and --max_seq_length say the same thing, --max_seq_length",
    ),
    ("sft", "--bf16 --dtype float32", "--dtype and --bf16 say the same thing, --dtype, in two ways: give one of them"),
    ("sft", "--lr 1 --learning_rate 2", "--learning_rate and --lr say the same thing, --learning_rate, in two ways"),
    ("sft", "--lr fast", "--lr: expected a finite number, got 'fast'"),
    ("sft", "--lr 1 2", "--lr: expected a finite number"),
    ("sft", "--warmup_steps 3 --warmup_ratio 0.1", "--warmup_steps and --warmup_ratio are two ways to say one thing"),
    ("sft", '--lr_scheduler_kwargs {"min_lr":1}', "is refused: min_lr: the floor is a share of the peak here"),
    ("sft", '--lr_scheduler_kwargs {"num_cycles":3}', "is refused: num_cycles: read are min_lr_rate"),
    ("sft", "--lr_scheduler_kwargs {", "is refused: expected a JSON object"),
    ("sft", "--lr_scheduler_kwargs [1]", "is refused: expected an object"),
    ("sft", "--adam_betas 0.9", "--adam_betas 0.9 is refused: expected two numbers"),
    ("sft", "--adam_betas 0.9 x", "is refused: expected a finite number, got x"),
    ("sft", "--use_wandb 0123456789secret", "--use_wandb ... is refused: --report_to says it"),
    (
        "sft",
        "optimizer.lr=2e-5",
        "command line: optimizer.lr is --learning_rate here (flags are given as --name value)",
    ),
    ("sft", "--adam.lr 2e-5", "command line: adam.lr is --learning_rate here"),
    (
        "sft",
        "actor_rollout_ref.rollout.n=5",
        "here, which belongs to launch.ppo, launch.grpo, launch.generate and launch.evaluate",
    ),
    ("sft", "epochs=3", "command line: epochs=3: flags are given as --name value, this one is --num_train_epochs"),
    ("sft", "seed=3", "command line: seed=3: flags are given as --name value, this one is --seed"),
    ("sft", "color=3", "command line: unexpected word 'color=3'"),
]


@pytest.mark.parametrize("stage, theirs, line", REFUSED, ids=[theirs for _, theirs, _ in REFUSED])
def test_what_is_refused(stage, theirs, line):
    with pytest.raises(UserError) as error:
        parse(COMMANDS[f"launch.{stage}"], theirs.split(), elsewhere=commands)
    assert line in str(error.value) and "secret" not in str(error.value)


AXOLOTL = """
base_model: NousResearch/Meta-Llama-3-8B
load_in_8bit: false
load_in_4bit: true
strict: false
mixer_list: [tatsu-lab/alpaca, 1.0]
dataset_prepared_path:
val_set_size: 0
output_dir: ./outputs/qlora-out
adapter: qlora
lora_model_dir:
sequence_len: 4096
sample_packing: true
pad_to_sequence_len: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0
lora_target_linear: true
wandb_project:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: paged_adamw_32bit
lr_scheduler: cosine
learning_rate: 0.0002
train_on_inputs: false
group_by_length: false
bf16: auto
fp16:
tf32: false
gradient_checkpointing: true
logging_steps: 1
flash_attention: true
warmup_steps: 10
weight_decay: 0.0
deepspeed:
fsdp:
"""


def test_a_recipe_of_axolotl(tmp_path, capsys):
    """As its QLoRA example stands, but for datasets in a list of objects, for two words per epoch, and dropout."""
    (tmp_path / "qlora.yml").write_text(AXOLOTL)
    config = parse(COMMANDS["launch.sft"], ["--config", str(tmp_path / "qlora.yml"), "--dtype", "float32"])
    set_ = {k: v for k, v in as_dict(config).items() if v != default(COMMANDS["launch.sft"])[k]}
    assert set_ == {
        "model_name_or_path": "NousResearch/Meta-Llama-3-8B",
        "mixer_list": ("tatsu-lab/alpaca", "1.0"),
        "use_lora": True,
        "load_in_4bit": True,
        "lora_rank": 32,
        "lora_alpha": 16.0,
        "lora_target_modules": ("all-linear",),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "num_train_epochs": 4,
        "lr_scheduler_type": "cosine",
        "learning_rate": 2e-4,
        "warmup_steps": 10.0,
        "warmup_ratio": None,
        "gradient_checkpointing": "full",
        "attention": "flash2",
        "dtype": "float32",
        "output_dir": "./outputs/qlora-out",
    }
    lines = capsys.readouterr().out.splitlines()
    assert f"{tmp_path / 'qlora.yml'}: adapter qlora is use_lora true load_in_4bit true" in lines
    assert not [line for line in lines if ": bf16 " in line]  # the command line says another dtype
    for text, line in (
        ("datasets: [{path: tatsu-lab/alpaca, type: alpaca}]", "is refused: give mixer_list: [NAME, AMOUNT"),
        ("lora_dropout: 0.05", "lora_dropout 0.05 is refused: adapters are trained without dropout"),
        ("evals_per_epoch: 4", "evals_per_epoch 4 is refused: give a number of steps"),
        ("optimizer: {_component_: torch.optim.AdamW, lr: 3e-4}", "optimizer._component_ is optimizer here"),
        ("tokenizer: {max_seq_len: 3}", "tokenizer.max_seq_len is max_seq_length here (keys stand at the margin)"),
        ("base_model: [a, b]", "base_model: expected text"),
        ("bf16: {a: 1}", "bf16 {'a': 1} is refused: it is dtype here"),
        ("max_length: 3\nsequence_len: 4", "max_length and sequence_len say the same thing, max_seq_length"),
    ):
        (tmp_path / "qlora.yml").write_text(text)
        with pytest.raises(UserError) as error:
            parse(COMMANDS["launch.sft"], ["--config", str(tmp_path / "qlora.yml")], elsewhere=commands)
        assert line in str(error.value) and "\n" not in str(error.value)


def test_a_translated_recipe_is_saved_as_ours(tmp_path):
    from engine.config import save

    config = parse(COMMANDS["launch.sft"], ["--bf16", "--warmup_steps", "10", "--optim", "adamw_torch", "--lr=1e-5"])
    save(as_dict(config), tmp_path / "config.yaml", {})
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()).keys() <= flags_of(COMMANDS["launch.sft"]).keys()
    assert parse(COMMANDS["launch.sft"], ["--config", str(tmp_path / "config.yaml")]) == config


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from([name for _, name in NAMES] + list(DOTTED)),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=6,
    ),
    st.sampled_from(list(COMMANDS)),
)
def test_no_value_of_a_foreign_name_ends_in_a_traceback(tmp_path_factory, name, value, command):
    """In a recipe whatever YAML can hold; on a command line its words."""
    path = tmp_path_factory.getbasetemp() / "foreign.yaml"
    path.write_text(yaml.safe_dump({name: value}, allow_unicode=True), encoding="utf-8")
    for argv in (["--config", str(path)], [f"--{name}", *str(value).split()], [f"--{name}={value}"]):
        try:
            parse(COMMANDS[command], argv, elsewhere=commands)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000


def test_what_nothing_else_says_is_the_weakest(tmp_path, capsys):
    """One clip range of theirs is both of ours: unless the other is given, wherever that stands."""
    grpo, recipe = COMMANDS["launch.grpo"], tmp_path / "recipe.yaml"
    for text, words, low, high in (
        ("epsilon: 0.1", "", 0.1, 0.1),
        ("epsilon: 0.1", "--clip_high 0.3", 0.1, 0.3),
        ("clip_high: 0.3", "--epsilon 0.1", 0.1, 0.3),
        ("epsilon: 0.1\nepsilon_high: 0.4", "--epsilon 0.2", 0.2, 0.4),
        ("epsilon: 0.1", "--epsilon 0.2", 0.2, 0.2),
    ):
        recipe.write_text(text)
        config = parse(grpo, ["--config", str(recipe), *words.split()])
        assert (config.clip_low, config.clip_high) == (low, high), (text, words)
    assert "--epsilon 0.2 is --clip_low 0.2, and --clip_high 0.2 unless it is said\n" in capsys.readouterr().out


GRPO_OF_TRL = """
beta: 0.001
num_generations: 8
max_completion_length: 2048
num_iterations: 1
epsilon: 0.2
epsilon_high: 0.28
loss_type: dapo
scale_rewards: group
mask_truncated_completions: true
importance_sampling_level: token
use_vllm: true
vllm_mode: colocate
vllm_importance_sampling_correction: true
vllm_importance_sampling_mode: token_truncate
vllm_importance_sampling_cap: 2.0
temperature: 1.0
learning_rate: 1.0e-6
max_grad_norm: 0.2
bf16: true
logging_steps: 1
log_completions: true
"""


def test_a_recipe_of_trl(tmp_path):
    """As its users write one for DAPO; what has no name here would be refused."""
    grpo = COMMANDS["launch.grpo"]
    (tmp_path / "dapo.yaml").write_text(GRPO_OF_TRL)
    config = parse(grpo, ["--config", str(tmp_path / "dapo.yaml")])
    config.check()
    assert {k: v for k, v in as_dict(config).items() if v != default(grpo)[k]} == {
        **{"kl_coef": 0.001, "num_samples_per_prompt": 8, "response_length": 2048, "clip_low": 0.2, "clip_high": 0.28},
        **{"mask_truncated": True, "tis_cap": 2.0, "learning_rate": 1e-6, "max_grad_norm": 0.2, "dtype": "bfloat16"},
    }


# --- the table itself -------------------------------------------------------------------------------------------------


def test_the_table_is_sound():
    """Names, not rows, are counted; rows speak of flags that exist; a name of ours is in it only for other words."""
    every = {name for c in COMMANDS.values() for f in flags_of(c).values() for name in (f.name, *f.aliases)}
    assert len({name for _, name in NAMES}) > 350
    for row, name in NAMES:
        assert row.needs <= every, row
        with_both = [c for c in COMMANDS.values() if {name, *row.needs} <= flags_of(c).keys()]
        assert name not in every or name == row.ours or row.near or not with_both, name
        assert row.why or row.ours or row.words, row
        assert set(row.whose.split()) <= flags_page.WHOSE.keys(), row
    assert {name for names in DOTTED.values() for name in names.split()} <= every
    assert len(NAMES) == len({(name, *sorted(row.needs)) for row, name in NAMES})


def test_the_page_is_made_of_the_table():
    assert flags_page.PAGE.read_text(encoding="utf-8") == flags_page.page(), "python -m tests.flags_page writes it"


def test_the_plan_takes_what_its_stage_takes():
    for stage, (_, config_class) in STAGES.items():
        words = ["--bf16", "--optim", "adamw_8bit", "--packing", "--gpus", "2"]
        plan, run = parse(config_class, words), parse(COMMANDS[f"launch.{stage}"], words[:-2])
        assert as_dict(plan) | as_dict(run) == as_dict(plan) and plan.gpus == 2
