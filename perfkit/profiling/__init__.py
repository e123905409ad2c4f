"""Where the time, the memory and the energy of a model go, and which recipe addresses it."""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "steps": "perfkit.profiling._steps",
    "merged": "perfkit.profiling._step_report",
    "Steps": "perfkit.profiling._step_data",
    "MergedSteps": "perfkit.profiling._step_data",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'perfkit.profiling' has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value
