"""The reference models: six small networks in PyTorch and in flax, with real data, trained and judged alike.

Importing this package imports no framework; asking for a model imports the one that is asked for.
"""

from . import data
from ._catalog import MODELS
from ._convert import to_jax, to_torch
from ._evaluate import Evaluation, evaluate
from ._load import Framework, Loaded, Task, calibration, load, task
from ._train import Trained, batches, train

__all__ = [
    "MODELS",
    "Evaluation",
    "Framework",
    "Loaded",
    "Task",
    "Trained",
    "batches",
    "calibration",
    "data",
    "evaluate",
    "load",
    "task",
    "to_jax",
    "to_torch",
    "train",
]
