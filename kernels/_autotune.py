"""What was measured to be fastest, by device: shipped as `tuned/<device>.json`, added to in the user's cache folder.

    {"device": "NVIDIA H100 80GB HBM3", "environment": {...}, "date": "2026-01-31",
     "entries": {"rnn/torch/bfloat16/<bucket>": {"implementation": "triton", "configuration": {"block_b": 16},
                                                 "ms": 0.41, "others_ms": {"library": 0.93}}}}

What the user's own machine measured comes before what is shipped for its kind. `_tune.py` measures.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perfkit._errors import InvalidInputError
from perfkit.kernels._cache import cache_folder

Configuration = tuple[tuple[str, int], ...]
"""Tile sizes and the like, as sorted (name, value) pairs."""

SHIPPED = Path(__file__).parent / "tuned"

# What os.environ looks names up in. Asking os.environ takes 1 µs for each that is not there, of a small call's 20 µs.
_environment = getattr(os.environ, "_data", os.environ)
_CACHE_NAMES = tuple(
    name if _environment is os.environ else os.environ.encodekey(name) for name in ("PERFKIT_CACHE", "XDG_CACHE_HOME")
)

_lock = threading.Lock()
_generation = 0
_assumed: dict[str, tuple[str, Configuration]] = {}


@dataclass(frozen=True)
class Tuned:
    """What was measured best for one bucket.

    Args:
        implementation: its name.
        configuration: that it ran with; empty for its own rule.
        device: where that was measured, as the device names itself.
    """

    implementation: str
    configuration: Configuration
    device: str


def lookup(op: str, problem: Any) -> Tuned | None:
    """What was measured best for such a problem on this device; None where nothing was."""
    device = device_name(problem.framework, problem.device)
    if assumed := _assumed.get(key(op, problem)):
        return Tuned(*assumed, device)
    table = _table(slug(device), *state())
    entry = table.get(key(op, problem))
    if entry is None:
        return None
    return Tuned(entry["implementation"], tuple(sorted(entry.get("configuration", {}).items())), device)


@contextmanager
def assume(op: str, problem: Any, implementation: str, configuration: Configuration) -> Iterator[None]:
    """Inside, `lookup` answers this for such problems, in every thread: how a configuration is tried."""
    global _generation
    name = key(op, problem)
    with _lock:
        before = _assumed.get(name)
        _assumed[name] = implementation, configuration
        _generation += 1
    try:
        yield
    finally:
        with _lock:
            if before is None:
                del _assumed[name]
            else:
                _assumed[name] = before
            _generation += 1


def record(
    op: str,
    problem: Any,
    times_ms: Mapping[tuple[str, Configuration], float],
    folder: Path | None = None,
    **about: Any,
) -> None:
    """Keep the fastest of what was timed for `problem` in a table, written whole or not at all.

    Args:
        times_ms: latency by (implementation, configuration).
        folder: where the device's table is; None for the user's.
        about: more fields for the table's head: environment, date.

    Raises:
        InvalidInputError: nothing was timed, or the table in the cache folder is damaged.
    """
    global _generation
    if not times_ms:
        raise InvalidInputError(f"nothing was timed for {op}: expected at least one implementation's latency")
    best = min(times_ms, key=times_ms.__getitem__)
    others: dict[str, float] = {}
    for (name, _), ms in times_ms.items():
        if name != best[0]:
            others[name] = min(ms, others.get(name, ms))
    entry = {"implementation": best[0], "configuration": dict(best[1]), "ms": times_ms[best], "others_ms": others}
    device = device_name(problem.framework, problem.device)
    path = (folder or cache_folder("tuned")) / f"{slug(device)}.json"
    with _lock:
        written = _read(path) if path.exists() else {"device": device, "entries": {}}
        written.update(about)
        written["entries"][key(op, problem)] = entry
        _write(path, written)
        _generation += 1


def state() -> tuple[Any, Any, int]:
    """Changes when the tables do: choices made before may no longer hold. Quick, as every call asks for it."""
    cache, home = _CACHE_NAMES
    return _environment.get(cache), _environment.get(home), _generation


def key(op: str, problem: Any) -> str:
    """The name of a problem's entry."""
    return f"{op}/{problem.framework}/{problem.dtype}/{problem.bucket}"


def slug(device: str) -> str:
    """A device's name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


@functools.cache
def device_name(framework: str, device: str) -> str:
    """The device as it names itself: "NVIDIA H100 80GB HBM3"; a CPU with its number of cores."""
    if device == "cuda" and framework == "torch":
        return sys.modules["torch"].cuda.get_device_name()
    if device in ("cuda", "tpu"):
        return sys.modules["jax"].devices(device)[0].device_kind
    from perfkit.measure.environment import environment

    found = environment()
    return f"{found.cpu} {found.cores} cores"


@functools.lru_cache(maxsize=32)
def _table(name: str, *_state: str | int | None) -> dict[str, Any]:
    """The entries of both tables, of the `state()` that is given; the user's come first."""
    entries: dict[str, Any] = {}
    for path in (SHIPPED / f"{name}.json", cache_folder("tuned") / f"{name}.json"):
        if path.exists():
            entries.update(_read(path)["entries"])
    return entries


def _read(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text())
        if not all(isinstance(entry["implementation"], str) for entry in table["entries"].values()):
            raise TypeError("an implementation's name is no string")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInputError(f"{path} is no table of tuned kernels ({error}): delete it and tune again") from error
    return table


def _write(path: Path, table: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps(table, indent=1, sort_keys=True) + "\n")
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)
