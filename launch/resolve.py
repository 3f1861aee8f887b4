"""What a stage's flags mean on this machine: batch sizes by ranks, the embedded model and data, defaults that depend on
others.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

from engine import run, terminal
from engine.data.embedded import embedded
from engine.errors import UserError
from engine.flags import MemoryFlags, StageFlags, fill
from engine.model import Base, layers, open_model
from engine.world import World
from launch import commands
from launch.after import after
from launch.inference import sampler_beside
from launch.judges import checker, pinned
from launch.planner.dry_run import show_plan
from launch.seeds import each_seed
from rollout import parallel

__all__ = ["after", "checker", "commands", "each_seed", "open_rlvr", "pinned", "resolve", "sampler_beside", "show_plan"]
__all__ += ["with_tuned_model"]
Config = TypeVar("Config", bound=StageFlags)
FAR_OFF = 300  # times the usual learning rate, of which a factor of 100 is within what papers use
TINY = 64 * 2**20  # bytes of weights: such a model takes a hundred times as much
PATHS = ("model_name_or_path", "value_model_name_or_path", "adapter_name_or_path", "output_dir", "resume")


def resolve(
    config: Config, world: World, *, defaults: dict[str, Any], embedded_defaults: dict[str, Any], data: str
) -> Config:
    """Fills what was left open, and refuses what cannot be. Raises UserError.

    `defaults` are for flags left at None, `embedded_defaults` for them without a model, when the embedded one is
    trained, on the embedded `data` ('pairs', 'conversations') if none is named.
    """
    world.agree("configuration", repr(config))
    config.check()
    check_memory(config, world)
    if config.master_dtype == "bfloat16" and config.optimizer == "adamw":
        world.say(
            "warning: under --master_dtype bfloat16 AdamW's second moment is in bfloat16 too, where it stalls;"
            " --optimizer adamw_8bit keeps it better in fewer bytes"
        )
    batch_size, line = config.batch_size_on(world.size)
    if line:
        world.say(line)
        config = dataclasses.replace(
            config, batch_size=batch_size, per_device_train_batch_size=None, gradient_accumulation_steps=None
        )
    # a shell expands ~, a YAML file does not
    given = {name: str(vars(config).get(name)) for name in PATHS}
    paths: dict[str, Any] = {name: str(Path(p).expanduser()) for name, p in given.items() if p.startswith("~/")}
    config = dataclasses.replace(config, **paths)
    if config.model_name_or_path is None:
        world.say("no --model_name_or_path: training the embedded tiny Llama (a demonstration, not a useful model)")
        config = with_embedded(config, world, data)
        defaults = defaults | embedded_defaults
        return fill(config, **defaults)
    world.say(*warnings(config, world, defaults["learning_rate"]))
    return fill(config, **defaults)


def warnings(config: StageFlags, world: World, usual: float) -> list[str]:
    """Lines on flags that are possible and hardly meant."""
    found = []
    rate = config.learning_rate
    weights = Path(str(config.model_name_or_path)).glob("*.safetensors")  # of a local directory; none of a hub id
    is_tiny = 0 < sum(file.stat().st_size for file in weights) < TINY
    if rate is not None and rate > FAR_OFF * usual * (100 if is_tiny else 1):
        found.append(
            f"warning: --learning_rate {rate:g} is {rate / usual:,.0f} times the usual {usual:g}: it may diverge"
        )
    if rate is not None and config.use_lora and 0 < rate <= usual / 10:
        found.append(
            f"warning: --learning_rate {rate:g} is one for training all weights: adapters take about {usual:g}"
        )
    if config.batch_size is not None and config.batch_size < world.size:
        idle = world.size - config.batch_size
        found.append(
            f"warning: --batch_size {config.batch_size} on {world.size} ranks: {idle} of them have nothing to do in a"
            " step"
        )
    return found


def with_embedded(config: Config, world: World, data: str) -> Config:
    """With the embedded model, and the embedded data if none is named."""
    made = world.once("embedded", lambda: embedded(Path(config.cache_dir).expanduser()))
    config = dataclasses.replace(config, model_name_or_path=str(made.model))
    if config.names_data:
        return config
    train, held_out = (str(made._asdict()[f"{split}_{data}"]) for split in ("train", "held_out"))
    return dataclasses.replace(config, dataset_name=train, eval_dataset_name=config.eval_dataset_name or held_out)


def open_rlvr(config: Any, world: World) -> Base:
    """The model that is sampled from and trained, nothing read of it yet but its description. Raises UserError, also
    where the sampler cannot be split as it is asked to be.
    """
    keep_initial = config.reference == "adapter" and config.kl_coef != 0
    base = open_model(config, world, memory=config, adapters=config, keep_initial=keep_initial)
    parallel.check(base.config, config.rollout_tensor_parallel, world)
    return base


def check_memory(flags: MemoryFlags, world: World) -> None:
    """Raises UserError for what this machine cannot do, and says what it does in vain."""
    if flags.compile and (why_not := layers.why_not_compile(world.device)):
        raise UserError(f"--compile: {why_not}")
    if flags.activation_offload and world.device.type == "cpu":
        world.say(
            "--activation_offload: on a CPU what waits is copied from host memory to host memory; it saves nothing here"
        )


def with_tuned_model(config: Config, world: World) -> Config:
    """For `launch.ppo` without a model: the embedded one, fine-tuned by `launch.sft` on sums half of which are wrong,
    and problems whose right answers can be verified. Made once in --cache_dir; runs that start together wait.
    Collective.
    """
    made = world.once("embedded", lambda: embedded(Path(config.cache_dir).expanduser()))
    tuned = made.model.parent / "tuned_on_sums"
    with run.waiting_for(tuned.with_suffix(".lock"), world):
        if not all(world.gather((tuned / "final" / "config.json").is_file())):
            world.say(
                "fine-tuning the embedded tiny Llama on sums of which half are wrong (once; it is kept in --cache_dir)"
            )
            _fine_tune(str(made.model), str(made.train_sums), str(tuned), config.cache_dir, config.quiet)
    config = dataclasses.replace(config, model_name_or_path=str(tuned / "final"))
    if config.names_data:
        return config
    held_out = config.eval_dataset_name or str(made.held_out_problems)
    return dataclasses.replace(config, dataset_name=str(made.train_problems), eval_dataset_name=held_out)


def _fine_tune(model: str, sums: str, output_dir: str, cache_dir: str, quiet: bool) -> None:
    from launch import sft  # which imports this file

    with terminal.subdued():
        sft.train(
            sft.Config(
                model_name_or_path=model,
                dataset_name=sums,
                output_dir=output_dir,
                cache_dir=cache_dir,
                batch_size=48,
                num_train_epochs=8,
                learning_rate=5e-3,
                sample_tokens=0,
                max_seq_length=128,
                quiet=quiet,
            )
        )
