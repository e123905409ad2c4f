"""Where something was measured, as plain data: of reports, profiles and what `perfkit doctor` tells."""

from __future__ import annotations

from dataclasses import dataclass

from perfkit._quantity import Quantity


@dataclass(frozen=True)
class Environment:
    """The machine and the libraries; `fingerprint` is equal only where timings may be compared."""

    fingerprint: str
    cpu: str
    cores: int
    instruction_sets: tuple[str, ...]
    memory_bytes: Quantity
    accelerators: tuple[str, ...]
    os: str
    python: str
    libraries: dict[str, str]
    threads: dict[str, int]
    settings: dict[str, str]
