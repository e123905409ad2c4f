"""The processor's energy counters (RAPL), as Linux shows them under /sys/class/powercap.

Source: docs.kernel.org/power/powercap/powercap.html.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from perfkit.profiling.counter import Counter, Unavailable

POWERCAP = Path("/sys/class/powercap")
COUNTED = ("package", "dram")
"""Zones that hold no other of these: cores are in their package; "psys", the whole board, holds all."""


@dataclass(frozen=True)
class Zone:
    """A part of the machine with a counter of its own.

    Args:
        limit_uj: where the counter starts again from 0.
    """

    name: str
    path: Path
    limit_uj: float


class Rapl(Counter):
    """All processors and their memory together, other processes included.

    Args:
        root: the folder of the zones.

    Raises:
        Unavailable: there are none, or they may not be read.
    """

    window_s = 1.0

    def __init__(self, root: str | Path = POWERCAP):
        self._zones = zones(Path(root))
        self.source = f"RAPL {', '.join(zone.name for zone in self._zones)}, other processes included"
        self._last = [_read(zone.path / "energy_uj") for zone in self._zones]
        self._total_uj = 0.0

    def joules(self) -> float:
        for place, zone in enumerate(self._zones):
            now = _read(zone.path / "energy_uj")
            moved = now - self._last[place]
            self._total_uj += moved if moved >= 0 else moved + zone.limit_uj
            self._last[place] = now
        return self._total_uj / 1e6


def zones(root: Path) -> tuple[Zone, ...]:
    """The zones to add up.

    Raises:
        Unavailable: none is there.
    """
    found = []
    for path in sorted(root.glob("*-rapl:*")):
        try:
            name = (path / "name").read_text().strip()
        except OSError:
            continue
        if name.startswith(COUNTED):
            number = path.name.split(":")[1]
            label = name if name.startswith("package") else f"{name} of package {number}"
            found.append(Zone(label, path, _read(path / "max_energy_range_uj")))
    if not found:
        raise Unavailable(
            f"{root} has no energy counters of a processor: a virtual machine, or the driver is not loaded"
        )
    return tuple(found)


def _read(path: Path) -> float:
    try:
        return float(path.read_text())
    except PermissionError:
        raise Unavailable(
            f"{path} may be read by root only: `chmod a+r {path}` allows it, at the cost of a side channel"
        ) from None
    except (OSError, ValueError) as error:
        raise Unavailable(f"{path} cannot be read: {error}") from None
