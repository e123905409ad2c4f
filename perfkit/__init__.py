"""perfkit makes a PyTorch or JAX model faster with one call, and proves it.

    import perfkit

    result = perfkit.optimize(model, recipe="auto", example_inputs=(x,))
    result.model      # in place of the original
    result.report     # measured before and after

Importing perfkit loads neither torch nor jax: every public name is loaded at first use.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "optimize": "perfkit._optimize",
    "apply": "perfkit._optimize",
    "load": "perfkit._artifact",
    "plan": "perfkit._optimize",
    "max_batch_size": "perfkit._max_batch",
    "MaxBatch": "perfkit._max_batch",
    "Result": "perfkit._optimize",
    "Plan": "perfkit._optimize",
    "profile": "perfkit.profiling._run",
    "Profile": "perfkit.profiling._profile",
    "doctor": "perfkit._doctor",
    "Chain": "perfkit._chain",
    "LayerRecipe": "perfkit._recipe",
    "ParallelRecipe": "perfkit._recipe",
    "Recipe": "perfkit._recipe",
    "Stage": "perfkit._recipe",
    "Inputs": "perfkit._workload",
    "Workload": "perfkit._workload",
    "Comparison": "perfkit._quantity",
    "Effect": "perfkit._report",
    "Quantity": "perfkit._quantity",
    "Report": "perfkit._report",
    "Skipped": "perfkit._report",
    "Verdict": "perfkit._quantity",
    "ChainError": "perfkit._errors",
    "DoesNotRunError": "perfkit._errors",
    "FidelityError": "perfkit._errors",
    "InvalidInputError": "perfkit._errors",
    "MissingDependencyError": "perfkit._errors",
    "NoEffectError": "perfkit._errors",
    "PerfkitError": "perfkit._errors",
    "PerfkitWarning": "perfkit._errors",
    "SlowerError": "perfkit._errors",
    "UnknownRecipeError": "perfkit._errors",
    "UnsupportedError": "perfkit._errors",
}
_PACKAGES = ("kernels", "measure", "parallel", "profiling", "recipes", "reference")

__all__ = ["__version__", *_PACKAGES, *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(import_module(_PUBLIC[name]), name)
    elif name in _PACKAGES:
        value = import_module(f"perfkit.{name}")
    else:
        raise AttributeError(f"module 'perfkit' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
