"""The algorithms, one file a stage: `python -m launch.dpo --help`."""

from importlib import import_module

COMMANDS = (  # in the order of the recipe
    *("sft", "dpo", "ppo"),
    *("demo", "generate", "evaluate", "compare", "verify", "report", "doctor"),
)


def commands() -> dict[str, type]:
    """Every command's configuration, by the command: where a flag belongs. Imported when it is asked for."""
    from launch.planner.plans import PlanFlags

    configurations = {f"launch.{name}": import_module(f"launch.{name}").Config for name in COMMANDS}
    return configurations | {"launch.plan": PlanFlags}
