"""The verbs of a run: steps, optimizers, checkpoints, references, what is said and measured. Start reading at
stage.py.
"""

from engine.train.stage import Run
from engine.train.throughput import Clock

__all__ = ["Clock", "Run"]
