"""What is asked of an NVIDIA card, and how its answers become numbers with units."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from perfkit._quantity import Quantity
from perfkit.profiling.nvml import Card, Refused, Source

# Numbers of nvml.h, which never change: the replay of a recording must not need the binding.
SM, MEMORY = 1, 2
TEMPERATURE_GPU = 0
SENT, RECEIVED = 0, 1
CORRECTED, UNCORRECTED, SINCE_BOOT = 0, 1, 0
POWER_INSTANT = 186
KINDS = {0: "dVal", 1: "uiVal", 2: "ulVal", 3: "ullVal"}

HELD_DOWN = {
    0x2: "the applications' clock setting",
    0x4: "the power limit",
    0x8: "a hardware slowdown",
    0x10: "sync boost with other cards",
    0x20: "its temperature (driver)",
    0x40: "its temperature (hardware)",
    0x80: "the power supply's brake",
    0x100: "the display's clock setting",
}
"""Why a clock may be held down, by NVML's bit; the one that says that the card idles is not among them."""


@dataclass(frozen=True)
class Reading:
    """A number that a card tells of itself.

    Args:
        read: from a source and a card's UUID; raises `Refused`.
        varies: it is asked again and again while the model runs.
        method: what it is, where the name does not say it.
    """

    name: str
    unit: str
    read: Callable[[Source, str], float]
    varies: bool = False
    method: str | None = None


def power_w(source: Source, card: str) -> float:
    """The power now; what drivers give instead that have no such field is the mean of the last second."""
    now = _instant_w(source, card)
    return source.ask("nvmlDeviceGetPowerUsage", card) / 1e3 if now is None else now


def _instant_w(source: Source, card: str) -> float | None:
    try:
        (field,) = source.ask("nvmlDeviceGetFieldValues", card, POWER_INSTANT)
    except Refused:
        return None
    kind = KINDS.get(field["valueType"])
    return None if field["nvmlReturn"] or kind is None else field["value"][kind] / 1e3


def energy_j(source: Source, card: str) -> float:
    """What the card has used since its driver was loaded."""
    return source.ask("nvmlDeviceGetTotalEnergyConsumption", card) / 1e3


def _plain(function: str, *arguments: int, scale: float = 1.0) -> Callable[[Source, str], float]:
    return lambda source, card: source.ask(function, card, *arguments) * scale


def _field(function: str, field: Any, scale: float = 1.0) -> Callable[[Source, str], float]:
    return lambda source, card: source.ask(function, card)[field] * scale


READINGS = (
    Reading("power", "W", power_w, True, "instant; of drivers that have none, the mean of a second"),
    Reading("sm clock", "MHz", _plain("nvmlDeviceGetClockInfo", SM), True),
    Reading("memory clock", "MHz", _plain("nvmlDeviceGetClockInfo", MEMORY), True),
    Reading("temperature", "°C", _plain("nvmlDeviceGetTemperature", TEMPERATURE_GPU), True),
    Reading("utilization", "%", _field("nvmlDeviceGetUtilizationRates", "gpu"), True, "time in which any kernel ran"),
    Reading("memory used", "B", _field("nvmlDeviceGetMemoryInfo", "used"), True, "by everything on the card"),
    Reading("memory", "B", _field("nvmlDeviceGetMemoryInfo", "total")),
    Reading("highest sm clock", "MHz", _plain("nvmlDeviceGetMaxClockInfo", SM)),
    Reading("power limit", "W", _plain("nvmlDeviceGetEnforcedPowerLimit", scale=1e-3)),
    Reading("energy", "J", energy_j, method="since the driver was loaded"),
    Reading("PCIe generation", "generation", _plain("nvmlDeviceGetCurrPcieLinkGeneration")),
    Reading("PCIe lanes", "lanes", _plain("nvmlDeviceGetCurrPcieLinkWidth")),
    Reading("PCIe sent", "B/s", _plain("nvmlDeviceGetPcieThroughput", SENT, scale=1e3), method="over 20 ms"),
    Reading("PCIe received", "B/s", _plain("nvmlDeviceGetPcieThroughput", RECEIVED, scale=1e3), method="over 20 ms"),
    Reading("ECC corrected", "errors", _plain("nvmlDeviceGetTotalEccErrors", CORRECTED, SINCE_BOOT)),
    Reading("ECC uncorrected", "errors", _plain("nvmlDeviceGetTotalEccErrors", UNCORRECTED, SINCE_BOOT)),
    Reading("MIG", "on or off", _field("nvmlDeviceGetMigMode", 0)),
)


def quantity(reading: Reading, source: Source, card: str) -> Quantity:
    """A reading, or why there is none."""
    try:
        return Quantity(float(reading.read(source, card)), reading.unit, method=reading.method)
    except Refused as refused:
        return Quantity.missing(reading.unit, f"not supported: {refused}")


def name_of(source: Source, card: Card) -> str:
    """ "NVIDIA H100 80GB HBM3 (0)"; of a part, "…, part 1"."""
    try:
        name = source.ask("nvmlDeviceGetName", card.uuid)
    except Refused:
        name = "NVIDIA card"
    return f"{name} ({card.index})" + ("" if card.part is None else f", part {card.part}")


def held_down(source: Source, card: str) -> int:
    """The bits of why the clock is held down at the moment; 0 where it is not, or the card does not tell."""
    for function in ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"):
        try:
            return source.ask(function, card)
        except Refused:  # the second is the name that drivers before 535 know it by
            continue
    return 0


def others(source: Source, card: str, own: int | None = None) -> tuple[str, ...]:
    """Processes that compute on the card besides this one; within a container only its own may be seen."""
    own = os.getpid() if own is None else own
    try:
        processes = source.ask("nvmlDeviceGetComputeRunningProcesses", card)
    except Refused:
        return ()
    told = []
    for process in processes:
        if process["pid"] != own:
            held = process.get("usedGpuMemory")
            size = "" if held is None else f", {held / 2**20:.0f} MiB"
            told.append(f"{_program(source, process['pid'])} (process {process['pid']}{size})")
    return tuple(told)


def _program(source: Source, pid: int) -> str:
    try:
        return source.ask("nvmlSystemGetProcessName", "", pid).rsplit("/", 1)[-1] or "unnamed"
    except Refused:
        return "unnamed"
