"""What a recipe is: a documented step whose fields are its options.

A recipe is one file in `recipes/`; its file name is its name. The file holds one frozen dataclass, `RECIPE`, that may
define

    torch(work) -> (Workload, Effect)    what it does to a PyTorch model; without it, PyTorch is not supported
    jax(work) -> (Workload, Effect)      the same for JAX
    refusal(work) -> str | None          why it cannot work on this model; None where it can
    unavailable(framework, device)       why it cannot run on this machine; None where it can
    unprofitable(framework, device)      why it can hardly pay on this machine; None where it may
    observed(effect, log)                the Effect, completed from what was compiled on the first call
    unsought(work) -> str | None         why recipe="auto" leaves it out; None where it may be tried
    judged_at(steps) -> Sequence[int]    of so many training steps those whose losses can be compared with the
                                         original's, where it trains another way by design: it is judged by how far it
                                         comes
    variants(work) -> tuple[Recipe]      the option settings that recipe="auto" should try

and nothing about other recipes: `stage` orders a chain, and two recipes that `provide` the same thing exclude each
other. A recipe may change the model it is given: the pipeline hands it a copy.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from perfkit._errors import InvalidInputError
from perfkit._selection import patterns, selected

if TYPE_CHECKING:
    from perfkit._chain import Chain
    from perfkit._workload import Workload

PACKAGE = "perfkit.recipes"


class Stage(enum.IntEnum):
    """The order of a chain."""

    STRUCTURE = 1
    PRECISION = 2
    QUANTIZATION = 3
    KERNELS = 4
    CALLS = 5
    MEMORY = 6
    COMPILE = 7
    RUNTIME = 8
    PIPELINE = 9
    TENSOR = 10
    DATA = 11


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Base of every recipe; its fields are its options.

    Class attributes:
        stage: where in a chain it stands.
        provides: what at most one recipe of a chain may provide, e.g. "precision"; None for no such claim.
        tolerance: relative error of the outputs that it may add, unitless.
        positional: the options that may be given without their names: "data_parallel(2)".
        retrains: its training starts from another loss than the original's, and is judged by where it ends.
        aim: what it is for, "speed" or "memory". Where it is memory, more time is its price and no failure.
        keeps_memory: calls find memory as the last one left it, which is its gain and no other recipe's.
        calibrates: what it makes of a model depends on the calibration data.
    """

    stage: ClassVar[Stage]
    provides: ClassVar[str | None] = None
    tolerance: ClassVar[float] = 0.0
    positional: ClassVar[tuple[str, ...]] = ()
    retrains: ClassVar[bool] = False
    aim: ClassVar[str] = "speed"
    keeps_memory: ClassVar[bool] = False
    calibrates: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The file's name for a recipe in `recipes/`; elsewhere the class's name in snake case."""
        package, _, module = type(self).__module__.rpartition(".")
        if package == PACKAGE:
            return module
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()

    def __str__(self) -> str:
        options = [
            f"{item.name}={getattr(self, item.name)!r}"
            for item in dataclasses.fields(self)
            if getattr(self, item.name) != item.default
        ]
        return f"{self.name}({', '.join(options)})" if options else self.name

    def __or__(self, other: Any) -> Chain:
        from perfkit._chain import chain_of

        return chain_of([self, other])

    def __ror__(self, other: Any) -> Chain:
        from perfkit._chain import chain_of

        return chain_of([other, self])


@dataclass(frozen=True, kw_only=True)
class LayerRecipe(Recipe):
    """Base of the recipes that work on a model layer by layer, and can leave layers alone.

    Class attributes:
        gives_back: where the result's numbers are too far off, the pipeline adds the most sensitive layers to `exclude`
            until they hold. The names in the effect's `touched` are those that `exclude` understands.

    Args:
        include: names or shell patterns of the layers to work on ("encoder.*"); all where empty.
        exclude: names or shell patterns of the layers to leave alone.
    """

    gives_back: ClassVar[bool] = False

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self):
        for option in ("include", "exclude"):
            object.__setattr__(self, option, patterns(getattr(self, option), f"{self.name}({option}"))

    def selected(self, names: Iterable[str]) -> set[str]:
        """Those of the model's layers that this recipe shall work on.

        Raises:
            InvalidInputError: a pattern matches none of them.
        """
        return selected(names, self.include, self.exclude, self.name)


@dataclass(frozen=True, kw_only=True)
class ParallelRecipe(Recipe):
    """Base of the recipes that spread a model over several processes or devices; see `perfkit.parallel`.

    Every process calls `optimize` with the same arguments. What it returns on each is that one's part.

    Class attributes:
        axis: the axis of the mesh that it takes: "pipeline", "data" or "tensor".

    Args:
        size: how many devices along the axis; None for all that the chain's other recipes leave.
    """

    positional = ("size",)
    axis: ClassVar[str]

    size: int | None = None

    def __post_init__(self):
        if self.size is not None and not (isinstance(self.size, int) and self.size >= 1):
            raise InvalidInputError(f"{self.name}(size={self.size!r}): expected a number of devices, or None")

    def refusal(self, work: Workload) -> str | None:
        if work.layout is None:
            more = "" if work.framework == "torch" else ", or with several devices (XLA_FLAGS=…device_count=2 on CPU)"
            return (
                f"there is one process with one device here: start several, 'perfkit launch --nproc 2 script.py'{more}"
            )
        return None

    def unsought(self, work: Workload) -> str:
        return "it takes several processes: choose it by name, and start them with 'perfkit launch'"


def supports(recipe: Recipe | type[Recipe], framework: str) -> bool:
    return hasattr(recipe, framework)


def ask(recipe: Recipe, question: str, *args: Any) -> Any:
    """The answer of one of a recipe's optional methods; None where it has no such method."""
    method = getattr(recipe, question, None)
    return method(*args) if method else None


def refusal(recipe: Recipe, work: Workload) -> str | None:
    """Why `recipe` cannot be applied to `work`; None where it can."""
    return unavailable(recipe, work.framework, work.device) or ask(recipe, "refusal", work)


def unavailable(recipe: Recipe, framework: str, device: str) -> str | None:
    """Why `recipe` cannot run on this machine, whatever the model; None where it can."""
    reason = ask(recipe, "unavailable", framework, device)
    return reason or (None if supports(recipe, framework) else f"it is not there for {framework}")
