"""The algorithms, one file a stage: `python -m launch.dpo --help`."""

import sys
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


def commands() -> dict[str, type]:
    """Every command's configuration, by the command: where a flag belongs. Imported when it is asked for."""
    from launch import dpo, evaluate, ppo, sft, verify
    from launch.inspection.opened import InspectionFlags
    from launch.planner.plans import PlanFlags

    modules = {f"launch.{name}": of.Config for name, of in (("sft", sft), ("dpo", dpo), ("ppo", ppo))}
    modules |= {"launch.evaluate": evaluate.Config, "launch.verify": verify.Config, "launch.plan": PlanFlags}
    return modules | {"launch.data": InspectionFlags}
