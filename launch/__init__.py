"""The algorithms, one file a stage: `python -m launch.dpo --help`."""


def commands() -> dict[str, type]:
    """Every command's configuration, by the command: where a flag belongs. Imported when it is asked for."""
    from launch import dpo, evaluate, ppo, sft, verify
    from launch.inspection.opened import InspectionFlags
    from launch.planner.plans import PlanFlags

    modules = {f"launch.{name}": of.Config for name, of in (("sft", sft), ("dpo", dpo), ("ppo", ppo))}
    modules |= {"launch.evaluate": evaluate.Config, "launch.verify": verify.Config, "launch.plan": PlanFlags}
    return modules | {"launch.data": InspectionFlags}
