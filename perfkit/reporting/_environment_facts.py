"""The machine and the libraries that something was measured on, in words."""

from __future__ import annotations

from perfkit._environment import Environment
from perfkit.reporting._format import counted, with_reason


def environment_line(environment: Environment) -> str:
    """The machine and the libraries in one line."""
    parts = [
        f"{environment.cpu} ({counted(environment.cores, 'core')})",
        ", ".join(environment.accelerators) or "no accelerator",
        environment.os,
        f"Python {environment.python}",
        *(f"{name} {version}" for name, version in sorted(environment.libraries.items())),
        f"fingerprint {environment.fingerprint}",
    ]
    return " · ".join(parts)


def environment_rows(environment: Environment) -> tuple[tuple[str, str], ...]:
    """The machine and the libraries, as label and value."""

    def pairs(values: dict) -> str:
        return ", ".join(f"{name} {value}" for name, value in sorted(values.items())) or "none"

    settings = dict(environment.settings)
    why = settings.pop("NVML", "")
    return (
        ("processor", f"{environment.cpu}, {counted(environment.cores, 'core')}"),
        ("instruction sets", ", ".join(environment.instruction_sets) or "none known"),
        ("memory", with_reason(environment.memory_bytes)),
        ("accelerators", ", ".join(environment.accelerators) or (f"none: {why}" if why else "none")),
        ("system", f"{environment.os}, Python {environment.python}"),
        ("libraries", pairs(environment.libraries)),
        ("threads", pairs(environment.threads)),
        ("settings", pairs(settings)),
        ("fingerprint", environment.fingerprint),
    )
