"""The model that `launch.ppo` starts from when none is named: the embedded one, fine-tuned by `launch.sft` on sums half
of which are wrong.
"""

from __future__ import annotations

from pathlib import Path

from engine import run
from engine.embedded import Embedded, embedded
from engine.world import World
from launch import sft


def tuned_on_sums(cache: Path, here: World) -> tuple[Embedded, Path]:
    """(the embedded data, the fine-tuned model's run), made under `cache` if it is not there; runs that start together
    make it once. Collective.
    """
    made = here.once("embedded", lambda: embedded(cache))
    tuned = made.model.parent / "tuned_on_sums"
    with run.waiting_for(tuned.with_suffix(".lock"), here):
        if not all(here.gather((tuned / "final" / "config.json").is_file())):
            here.say(
                "fine-tuning the embedded tiny Llama on sums of which half are wrong (once; it is kept in --cache_dir)"
            )
            sft.train(
                sft.Config(
                    model_name_or_path=str(made.model),
                    dataset_name=str(made.train_sums),
                    output_dir=str(tuned),
                    cache_dir=str(cache),
                    batch_size=48,
                    num_train_epochs=8,
                    learning_rate=5e-3,
                    sample_tokens=0,
                    max_seq_length=128,
                )
            )
    return made, tuned
