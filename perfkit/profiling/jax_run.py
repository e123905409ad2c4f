"""A JAX workload whose operations tell where in the model they stand, ready to be run and looked at."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax

from perfkit._workload import Workload
from perfkit.backends.adapter import Finished
from perfkit.backends.jax_inputs import READS_VALUES
from perfkit.profiling import jax_flops, jax_recorded
from perfkit.profiling.jax_scopes import Called, Place, marked, place

WITHOUT_LIBRARY_FUSIONS = {"xla_cpu_experimental_ynn_fusion_type": ""}
"""Compiler options under which XLA on a CPU gives no whole layers to a library, so that each has its own time."""


@dataclass(frozen=True)
class Run:
    """A copy of the workload with its modules marked.

    Args:
        called: its modules, by path, as one call calls them.
        jaxpr: of one call or training step.
        read_at: where the model reads a value in Python, so that it runs operation by operation, and its jaxpr is what
            one run of it did; else empty.
        call: one whole, synchronized call.
        jitted: what the jaxpr is of.
    """

    work: Workload
    finished: Finished
    called: dict[str, Called]
    jaxpr: Any
    call: Callable[[], Any]
    jitted: Any
    read_at: str = ""

    @functools.cached_property
    def scopes(self) -> frozenset[str]:
        """The author's own scopes."""
        return jax_flops.own_scopes(self.jaxpr)

    def place(self, op_name: str, *, alone: bool = False) -> Place:
        """See `jax_scopes.place`."""
        return place(op_name, self.work.trains, self.scopes, alone=alone)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Of one call, as the jaxpr takes them.

        In inference parameters, other state, args and kwargs; in training the trainer's state, which a step may take
        over, args, kwargs and targets.
        """
        return _arguments(self.work, self.finished)

    def again(self, options: dict[str, Any] | None = None) -> Any:
        """Compile what the jaxpr is of, with options for the compiler."""
        return self.jitted.lower(*self.arguments).compile(compiler_options=options)

    @property
    def compiled(self) -> Any:
        """The program behind it; None where the model runs operation by operation. It was called before."""
        return self.finished.program() if self.finished.program else None


@contextmanager
def marking(work: Workload, *, run: bool = True) -> Iterator[Run]:
    """Within it, the workload can be run with its modules marked.

    Args:
        run: make a first call of it.
    """
    found = marked(work.model)
    work = work.replace(model=found.model)
    with _names_kept():
        finished = work.backend.finish(work)
        jitted = _jitted(work, finished)
        jaxpr, read_at = _traced(work, finished, jitted, found.called)
        called = {path: Called(**vars(item)) for path, item in found.called.items()}
        call = work.backend.caller(work, finished)
        if run:
            call()
        yield Run(work, finished, called, jaxpr, call, jitted, read_at)


def _traced(work: Workload, finished: Finished, jitted: Any, called: dict[str, Called]) -> tuple[Any, str]:
    """The jaxpr, and where a value is read that no jaxpr can hold."""
    try:
        return jitted.trace(*_arguments(work, finished)).jaxpr, ""
    except READS_VALUES as error:
        read_at = jax_recorded.read_at(error) or "a line of a library"
    called.clear()  # of what was traced until then
    if work.training is not None:
        jax_recorded.by_operation(finished)
    return jax_recorded.recorded(jitted.__wrapped__, *_arguments(work, finished)), read_at


def _jitted(work: Workload, finished: Finished) -> Any:
    """The call or step as one jitted function, whether it runs as one or not."""
    if work.training is not None:
        return finished.trainer.program.jitted
    function = work.model.function()

    def call(params, rest, args, kwargs):
        return function(params, rest, *args, **kwargs)[0]

    return jax.jit(call)


def _arguments(work: Workload, finished: Finished) -> tuple[Any, ...]:
    inputs = work.inputs.args, dict(work.inputs.kwargs)
    if work.training is None:
        return work.model.params, work.model.rest, *inputs
    trainer = finished.trainer
    return trainer.state, *trainer.placement.batch((*inputs, work.training.targets))


@contextmanager
def _names_kept() -> Iterator[None]:
    """Within it, no program comes from a cache that was compiled for the same operations under other names."""
    name = "jax_compilation_cache_include_metadata_in_key"
    before = getattr(jax.config, name)
    jax.config.update(name, True)
    try:
        yield
    finally:
        jax.config.update(name, before)
