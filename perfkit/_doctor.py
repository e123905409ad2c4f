"""`doctor`: what this machine can do."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING

from perfkit import backends
from perfkit._environment import Environment
from perfkit._recipe import ask, unavailable
from perfkit._recipe_files import names, recipe_class
from perfkit._showing import InTerminal
from perfkit.measure import kept_memory
from perfkit.measure.environment import compilers, environment

if TYPE_CHECKING:
    from perfkit.profiling._profile import DeviceState


@dataclass(frozen=True)
class Readiness:
    """Whether a recipe can run here.

    Args:
        reason: why it cannot; or, where it can, why it can hardly pay. Empty where nothing speaks against it.
    """

    recipe: str
    framework: str
    ready: bool
    reason: str = ""


@dataclass(frozen=True)
class Diagnosis(InTerminal):
    """What `doctor` found.

    Args:
        compilers: name and version; None where it was not found.
        devices: the device that each framework would use, or why it cannot be used.
        energy: the counter that a profile would read energy from, by device, or why there is none.
        cards: what each NVIDIA card says of itself; empty where there is none.
        memory: whether memory that models take on a CPU is kept from call to call.
    """

    _terminal = "diagnosis"

    environment: Environment
    compilers: dict[str, str | None]
    devices: dict[str, str]
    recipes: tuple[Readiness, ...]
    energy: dict[str, str] = field(default_factory=dict)
    cards: tuple[DeviceState, ...] = ()
    memory: str = ""


def doctor() -> Diagnosis:
    """What this machine can do: CPU instructions, GPUs, compilers, library versions, and which recipes are ready here.

    Imports the frameworks that are installed, to ask them for their devices.

    Example:
        >>> print(perfkit.doctor())
    """
    devices, recipes = {}, []
    for framework in backends.FRAMEWORKS:
        absent = next((name for name in backends.REQUIRED[framework] if find_spec(name) is None), None)
        if absent:
            devices[framework] = f"{absent} is not installed: pip install 'perfkit[{framework}]'"
            device = None
        else:
            device = devices[framework] = _device(framework)
        recipes += [_readiness(name, framework, device, devices[framework]) for name in names()]
    memory = kept_memory.told()
    return Diagnosis(environment(), compilers(), devices, tuple(recipes), *_counters_and_cards(), memory)


def _counters_and_cards() -> tuple[dict[str, str], tuple[DeviceState, ...]]:
    from perfkit.profiling import energy, telemetry

    counters = {"cpu": energy.source("cpu")}
    if not environment().accelerators:
        return counters, ()
    with telemetry.watching("cuda") as watch:
        return counters | {"cuda": energy.source("cuda")}, watch.states()


def _device(framework: str) -> str:
    module = importlib.import_module(framework)
    if framework == "torch":
        accelerator = module.accelerator.current_accelerator()
        return accelerator.type if accelerator and module.accelerator.is_available() else "cpu"
    return module.default_backend()


def _readiness(name: str, framework: str, device: str | None, where: str) -> Readiness:
    try:
        recipe = recipe_class(name)()
    except Exception as error:
        return Readiness(name, framework, False, f"cannot be imported: {type(error).__name__}: {error}")
    if device is None:
        return Readiness(name, framework, False, where)
    if reason := unavailable(recipe, framework, device):
        return Readiness(name, framework, False, reason)
    return Readiness(name, framework, True, ask(recipe, "unprofitable", framework, device) or "")
