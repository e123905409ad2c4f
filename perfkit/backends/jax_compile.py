"""Ahead-of-time compilation in JAX, with a persistent cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from perfkit._errors import UnsupportedError
from perfkit.backends.adapter import CompileLog
from perfkit.backends.jax_inputs import tracing

_STAGES = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)
WITHOUT_YNNPACK = {"xla_cpu_experimental_ynn_fusion_type": ""}
"""Compiler options of a CPU program in which XLA knows of all memory."""

_HIT = "/jax/compilation_cache/cache_hits"
_SETTINGS = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


class Program:
    """A function compiled ahead of time on its first call; other shapes go through `jax.jit`.

    Args:
        function: what is compiled; positional arguments only.
        donate: positions of arguments whose memory the outputs may take over.
        jit: `jax.jit` with other options, or `jax.pmap`.
    """

    def __init__(self, function: Callable, donate: tuple[int, ...] = (), jit: Callable = jax.jit):
        self.jitted = jit(function, donate_argnums=donate)
        self.lowered: jax.stages.Lowered | None = None
        self.compiled: jax.stages.Compiled | None = None

    rounds: bool = False
    """Whether the devices' models differ for some steps of training, so that they must be settled."""

    remembered: Any = ()
    """What it knows of earlier calls; values that nobody changes."""

    def begun(self, state: Any) -> Any:
        """What it remembers at the beginning of a training in that state."""
        return ()

    def skip_warm_up(self) -> None:
        """Go on as after any warm-up."""

    def settled(self, state: Any) -> Any:
        """The state of training with the devices' models brought together."""
        return state

    def whole(self, state: Any) -> Any:
        """The settled state as it is for any number of devices."""
        return state

    def parts(self) -> list[tuple[Any, int]]:
        """The compiled programs behind it, each with in how many calls it runs once."""
        return [(self.compiled, 1)]

    def __call__(self, *args: Any) -> Any:
        if self.compiled is None:
            if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(args)):
                return self.jitted(*args)
            with persistent_cache(), tracing():
                self.lowered = self.jitted.lower(*args)
                self.compiled = self.lowered.compile()
        try:
            return self.compiled(*args)
        except (
            TypeError,
            ValueError,
        ):  # other shapes, dtypes or devices, or a trace: jit takes them all, or says why not
            return self.jitted(*args)


def counted_bytes(lowered: jax.stages.Lowered, device: str) -> float:
    """Temporary bytes of a program, by XLA's memory analysis; on CPU of one without YNNPACK, whose XLA does not count.

    Raises:
        UnsupportedError: XLA gives no analysis on this device.
    """
    compiled = lowered.compile(compiler_options=WITHOUT_YNNPACK if device == "cpu" else None)
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise UnsupportedError(f"XLA gives no memory analysis on {device!r}")
    return float(analysis.temp_size_in_bytes)


@contextmanager
def persistent_cache() -> Iterator[None]:
    """Within it, compiled programs are kept on disk for the next process; a cache of the caller's is used as it is."""
    folder = cache_folder()
    if jax.config.jax_compilation_cache_dir or folder is None:
        yield
        return
    before = {name: getattr(jax.config, name) for name in ("jax_compilation_cache_dir", *_SETTINGS)}
    try:
        for name, value in {"jax_compilation_cache_dir": str(folder), **_SETTINGS}.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # jax looks at the setting once and remembers
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def cache_folder() -> Path | None:
    """Where compiled programs are kept, one folder per machine and versions; None where it cannot be written.

    `PERFKIT_CACHE` sets it, else it lies in the user's cache folder.
    """
    from perfkit.measure.environment import environment

    root = os.environ.get("PERFKIT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "perfkit"
    folder = Path(root) / "jax" / environment().fingerprint
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


@contextmanager
def watching() -> Iterator[Callable[[], CompileLog]]:
    """Within it, JAX's compilations are recorded; the function tells them so far."""
    seconds, counts = [], {"graphs": 0, "cached": 0}

    def on_duration(event: str, duration: float, **_: Any) -> None:
        if event in _STAGES:
            seconds.append(duration)
            counts["graphs"] += event == _STAGES[-1]

    def on_event(event: str, **_: Any) -> None:
        counts["cached"] += event == _HIT

    jax.monitoring.register_event_duration_secs_listener(on_duration)
    jax.monitoring.register_event_listener(on_event)
    try:
        yield lambda: CompileLog(**counts, seconds=sum(seconds))
    finally:
        jax.monitoring.unregister_event_duration_listener(on_duration)
        jax.monitoring.unregister_event_listener(on_event)
