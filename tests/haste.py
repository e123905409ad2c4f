"""As little measuring as makes a report: for tests of all else that `optimize` does."""

from __future__ import annotations

import gc
import warnings
from importlib import import_module

SETTINGS = {
    "perfkit._optimize.CHAIN_BUDGET_S": 0.01,
    "perfkit._optimize.SEARCH_BUDGET_S": 10.0,
    "perfkit._search.QUICK_BUDGET_S": 0.01,
    "perfkit._search.FINAL_SHARE": 0.0,  # of the budget; two seconds at least
    "perfkit.measure.timing.CONFIDENCE": 0.5,  # one quadruple of blocks is enough for a verdict: chance may decide it
    "perfkit.recipes.threads.CHOOSING_S": 0.01,
    "perfkit.measure.environment.cores_allowed": lambda: 2,  # also where the run gives each of its workers one
    "perfkit.measure.environment.threads_allowed": lambda: 2,
}


def settle_heap() -> None:
    """Do not look through all that is held now again at each collection.

    `optimize` collects a dozen times: a tenth of a second each with both frameworks loaded, more than a small model
    takes for all else.
    """
    gc.collect()
    gc.freeze()


def begin(**also: float) -> None:
    """How a process of a test's own begins, once all is imported: little measuring, and no word about its times.

    Args:
        also: what is set beside, by its name in `perfkit._numbers`.
    """
    from perfkit import PerfkitWarning

    warnings.simplefilter("ignore", PerfkitWarning)
    for place, value in (SETTINGS | {f"perfkit._numbers.{name}": value for name, value in also.items()}).items():
        module, _, name = place.rpartition(".")
        setattr(import_module(module), name, value)
    settle_heap()
