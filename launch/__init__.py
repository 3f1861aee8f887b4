"""The algorithms, one file a stage: `python -m launch.dpo --help`."""

import sys
from importlib import import_module
from importlib.util import find_spec

if sys.version_info < (3, 11):  # noqa: UP036 - whoever starts it on an older one reads this line, not a traceback
    sys.exit(
        f"error: Triptych needs Python 3.11 or newer, this is {sys.version.split()[0]}: start it by another python"
    )

for _package in ("torch", "transformers", "safetensors", "numpy", "tqdm", "yaml", "jinja2"):
    if find_spec(_package) is None:
        sys.exit(f"error: the package {_package} is not installed here: pip install -e . in Triptych's folder")

COMMANDS = (  # in the order of the recipe
    *("sft", "dpo", "ppo", "grpo"),
    *("demo", "generate", "chat", "evaluate", "compare", "verify", "report", "export", "doctor"),
)


def commands() -> dict[str, type]:
    """Every command's configuration, by the command: where a flag belongs. Imported when it is asked for."""
    from launch.inspection.opened import InspectionFlags
    from launch.planner.plans import PlanFlags

    configurations = {f"launch.{name}": import_module(f"launch.{name}").Config for name in COMMANDS}
    return configurations | {"launch.plan": PlanFlags, "launch.data": InspectionFlags}
