"""The algorithms, one file a stage: `python -m launch.dpo --help`."""

import sys
from importlib import import_module
from types import TracebackType

if sys.version_info < (3, 11):  # noqa: UP036 - whoever starts it on an older one reads this line, not a traceback
    sys.exit(
        f"error: Triptych needs Python 3.11 or newer, this is {sys.version.split()[0]}: start it by another python"
    )

OURS = ("engine", "launch", "losses", "rollout", "verifiers")


def _in_one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A package that is not installed is named, with what to do; any other error is Python's to show."""
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if package and package not in OURS:
        print(
            f"error: the package {package} is not installed here: pip install -e . in Triptych's folder",
            file=sys.stderr,
        )
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _in_one_line

COMMANDS = (  # in the order of the recipe
    *("sft", "dpo", "ppo"),
    *("demo", "generate", "chat", "evaluate", "compare", "verify", "report", "export", "doctor"),
)


def commands() -> dict[str, type]:
    """Every command's configuration, by the command: where a flag belongs. Imported when it is asked for."""
    from launch.inspection.opened import InspectionFlags
    from launch.planner.plans import PlanFlags

    configurations = {f"launch.{name}": import_module(f"launch.{name}").Config for name in COMMANDS}
    return configurations | {"launch.plan": PlanFlags, "launch.data": InspectionFlags}
