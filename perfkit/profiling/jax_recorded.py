"""JAX models that read values in Python while they run: `float(y.max())`, `if y.sum() > 0:`.

What such a model does depends on what it reads, so XLA cannot compile it as a whole, and it has no jaxpr. One run of it
is recorded in its place, operation by operation: the branch that was taken, loops as often as they went round.
"""

from __future__ import annotations

import linecache
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.extend import source_info_util
from jax.extend.core import (
    ClosedJaxpr,
    DebugInfo,
    Jaxpr,
    JaxprEqn,
    Literal,
    Var,
    new_jaxpr_eqn,
    no_effects,
    set_current_trace,
    take_current_trace,
)

from perfkit.backends.adapter import Finished
from perfkit.backends.jax_compile import Program

_LIBRARIES = frozenset(["jax", "jaxlib", "numpy", "flax", "optax", "perfkit"])


def read_at(error: BaseException) -> str:
    """Where the caller's code reads the value: "net.py:12 (`if y.sum() > 0:`)"; "" where no line of it is known."""
    found, step = None, error.__traceback__
    while step is not None:
        package = str(step.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        if package not in _LIBRARIES:
            found = step.tb_frame.f_code.co_filename, step.tb_lineno
        step = step.tb_next
    if found is None:
        return ""
    path, number = found
    short = Path(path).relative_to(Path.cwd()) if Path(path).is_relative_to(Path.cwd()) else path
    line = linecache.getline(path, number).strip()
    return f"{short}:{number}" + (f" (`{line}`)" if line else "")


def by_operation(finished: Finished) -> None:
    """Let a training step run operation by operation from now on."""
    finished.trainer.program = _ByOperation(finished.trainer.program)


class _ByOperation(Program):
    """A training step as the Python function that it is, never compiled as a whole."""

    def __init__(self, program: Program):
        self.jitted, self.lowered, self.compiled = program.jitted, None, None

    def __call__(self, *args: Any) -> Any:
        return self.jitted.__wrapped__(*args)


def recorded(function: Callable[..., Any], *args: Any) -> ClosedJaxpr:
    """What a function does on these arguments; it is run once, with their values."""
    with take_current_trace() as outside:
        trace = _Recording(outside)
        inputs = [trace.made(leaf) for leaf in jax.tree.leaves(args)]
        with set_current_trace(trace):
            outputs = function(*args)
        results = [trace.read(leaf) for leaf in jax.tree.leaves(outputs)]
    about = DebugInfo("recorded", getattr(function, "__name__", "<unknown>"), None, None)
    return ClosedJaxpr(Jaxpr((), inputs, results, trace.eqns, debug_info=about), ())


class _Recording(jax.core.Trace):
    """Computes with values, as JAX does outside of all transformations, and notes each operation.

    Args:
        outside: the trace that computes.
    """

    def __init__(self, outside: Any):
        super().__init__()
        self.outside = outside
        self.eqns: list[JaxprEqn] = []
        self._known: dict[int, tuple[weakref.ref, Var]] = {}

    def process_primitive(self, primitive, tracers, params, /):
        inputs = [self.read(value) for value in tracers]
        results = self.outside.process_primitive(primitive, tracers, params)
        outputs = [self.made(value) for value in (results if primitive.multiple_results else [results])]
        at = source_info_util.new_source_info().replace(name_stack=source_info_util.current_name_stack())
        self.eqns.append(new_jaxpr_eqn(inputs, outputs, primitive, params, no_effects, at))
        return results

    def process_call(self, primitive, function, tracers, params, /):
        with set_current_trace(self):
            return function.call_wrapped(*tracers)

    def process_custom_jvp_call(self, *args, **options):
        with set_current_trace(self):
            return self.outside.process_custom_jvp_call(*args, **options)

    def process_custom_vjp_call(self, *args, **options):
        with set_current_trace(self):
            return self.outside.process_custom_vjp_call(*args, **options)

    def stage_value(self, val):
        return self.outside.stage_value(val)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.outside, name)

    def read(self, value: Any) -> Var | Literal:
        """What stands for a value that was made before, or is a constant."""
        array, var = self._known.get(id(value), (lambda: None, None))
        if var is not None and array() is value:
            return var
        return self.made(value) if isinstance(value, jax.Array) else Literal(value, jax.typeof(value))

    def made(self, value: Any) -> Var:
        """A name for what was made just now. Values are not kept, so that they are freed as in any run."""
        var = Var(jax.typeof(value))
        if isinstance(value, jax.Array):
            self._known[id(value)] = weakref.ref(value), var
        return var
