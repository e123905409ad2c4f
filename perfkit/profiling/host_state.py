"""The processor's clock and temperature, as Linux tells them."""

from __future__ import annotations

import statistics
from pathlib import Path

from perfkit._quantity import Quantity
from perfkit.measure.environment import environment

SENSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal")
"""Drivers of processors' temperature sensors."""


def name() -> str:
    return environment().cpu


def readings(root: str | Path = "/") -> dict[str, Quantity]:
    """Every reading by name, or why there is none."""
    clock, temperature = _clock_mhz(Path(root)), _temperature_c(Path(root))
    return {
        "clock": Quantity.missing("MHz", "this system does not tell its processors' clocks")
        if clock is None
        else Quantity(clock, "MHz", method="median of the processors"),
        "temperature": Quantity.missing("°C", "not supported: this system has no temperature sensor of its processor")
        if temperature is None
        else Quantity(temperature, "°C", method="the hottest sensor"),
    }


def varying(root: str | Path = "/") -> dict[str, float]:
    """What can be read, as plain numbers."""
    return {name: told.value for name, told in readings(root).items() if told.value is not None}


def _clock_mhz(root: Path) -> float | None:
    files = root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")
    clocks = [found / 1e3 for found in map(_number, files) if found is not None]
    if not clocks:
        try:
            lines = (root / "proc/cpuinfo").read_text().splitlines()
        except OSError:
            return None
        clocks = [float(line.partition(":")[2]) for line in lines if line.lower().startswith("cpu mhz")]
    return statistics.median(clocks) if clocks else None


def _temperature_c(root: Path) -> float | None:
    found = []
    for monitor in root.glob("sys/class/hwmon/hwmon*"):
        try:
            if (monitor / "name").read_text().strip() not in SENSORS:
                continue
        except OSError:
            continue
        found += [told / 1e3 for told in map(_number, monitor.glob("temp*_input")) if told is not None]
    return max(found, default=None)


def _number(path: Path) -> float | None:
    try:
        return float(path.read_text())
    except (OSError, ValueError):
        return None
