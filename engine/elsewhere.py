"""A second home for a run's rows: TensorBoard's event files, or Weights & Biases.

Both continue where the run continues. metrics.jsonl is cut back to the resumed step and its later rows are written
again; TensorBoard is told to forget its own (`purge_step`), Weights & Biases goes on in the same run and keeps the
rows that it has: a step is there once in either.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any, Protocol

import yaml

from engine.errors import UserError


class Elsewhere(Protocol):
    """Where rows go besides metrics.jsonl."""

    def write(self, step: int, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def elsewhere(report_to: str, output_dir: Path, start: int) -> Elsewhere | None:
    """The home that --report_to names, for a run that starts after step `start`; none for 'none'. The package is there:
    the flag was checked. Raises UserError.
    """
    if report_to == "tensorboard":
        return _TensorBoard(output_dir, start)
    return _WandB(output_dir, start) if report_to == "wandb" else None


class _TensorBoard:
    def __init__(self, output_dir: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # events of this step and later ones, of a session before this one, are not shown
        purge = start + 1 if start else 0
        self._writer: Any = SummaryWriter(str(output_dir / "tensorboard"), purge_step=purge, flush_secs=10)

    def write(self, step: int, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """The run's name there is kept in wandb_run.txt, so that a resumed run is one run."""

    def __init__(self, output_dir: Path, start: int) -> None:
        import wandb

        name, config = output_dir / "wandb_run.txt", output_dir / "config.yaml"
        if not start or not name.is_file():
            name.write_text(secrets.token_hex(8) + "\n", encoding="ascii")
        flags = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else None
        try:
            self._run: Any = wandb.init(
                project="triptych",
                name=output_dir.name,
                dir=str(output_dir),
                id=name.read_text(encoding="ascii").strip(),
                resume="allow",
                config=flags,
            )
        except Exception as error:  # not logged in, no network: whatever it raises, training has not begun
            why = " ".join(str(error).split())[:200]
            raise UserError(f"--report_to wandb: {why} (wandb login, or WANDB_MODE=offline)") from None

    def write(self, step: int, row: dict[str, Any]) -> None:
        self._run.log(row, step=step)

    def close(self) -> None:
        self._run.finish()
