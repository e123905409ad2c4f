"""A JAX workload whose operations tell where in the model they stand, ready to be run and looked at."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax

from perfkit._workload import Workload
from perfkit.backends import Finished
from perfkit.profiling import jax_flops
from perfkit.profiling.jax_scopes import Called, Place, marked, place

WITHOUT_LIBRARY_FUSIONS = {"xla_cpu_experimental_ynn_fusion_type": ""}
"""Compiler options under which XLA on a CPU gives no whole layers to a library, so that each has its own time."""


@dataclass(frozen=True)
class Run:
    """A copy of the workload with its modules marked.

    Args:
        called: its modules, by path, as one call calls them.
        jaxpr: of one call or training step.
        arguments: of one call, as the jaxpr takes them: one flat list of arrays.
        names: of the arguments: "state[0].conv1.kernel", by which they are told apart.
        call: one whole, synchronized call.
        again: compiles it with other options for the compiler; the result is such a call.
    """

    work: Workload
    finished: Finished
    called: dict[str, Called]
    jaxpr: Any
    arguments: tuple[Any, ...]
    call: Callable[[], Any]
    again: Callable[[dict[str, Any]], Callable[[], Any]]

    @functools.cached_property
    def scopes(self) -> frozenset[str]:
        """The author's own scopes."""
        return jax_flops.own_scopes(self.jaxpr)

    def place(self, op_name: str) -> Place:
        return place(op_name, self.work.trains, self.scopes, alone=self.compiled is None)

    @property
    def compiled(self) -> Any:
        """The program behind it; None where the model runs operation by operation. It was called before."""
        return self.finished.program() if self.finished.program else None


@contextmanager
def marking(work: Workload) -> Iterator[Run]:
    """Within it, the workload can be run with its modules marked."""
    found = marked(work.model)
    work = work.replace(model=found.model)
    with _names_kept():
        finished = work.backend.finish(work)
        jitted, arguments, keywords = _program(work, finished)
        jaxpr = jitted.trace(*arguments, **keywords).jaxpr
        called = {path: Called(**vars(item)) for path, item in found.called.items()}
        call = work.backend.caller(work, finished)
        call()

        def again(options: dict[str, Any]) -> Callable[[], Any]:
            compiled = jitted.lower(*arguments, **keywords).compile(compiler_options=options)
            state = arguments[0]

            def run() -> Any:
                owned = jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, jax.Array) else leaf, state)
                return jax.block_until_ready(compiled(owned, *arguments[1:], **keywords))

            return run

        yield Run(work, finished, called, jaxpr, tuple(jax.tree.leaves((arguments, keywords))), call, again)


def _program(work: Workload, finished: Finished) -> tuple[Any, tuple, dict]:
    """The call or step as one jitted function, whether it runs as one or not, and what it is called with."""
    if work.training is None:
        model, inputs = work.model, work.inputs
        return jax.jit(model.function()), (model.params, model.rest, *inputs.args), dict(inputs.kwargs)
    trainer, inputs = finished.trainer, work.inputs
    batch = trainer.placement.batch((inputs.args, dict(inputs.kwargs), work.training.targets))
    return trainer.program.jitted, (trainer.state, *batch), {}


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
