"""A JAX model in stages as its caller calls it: each device holds its stage, and outputs are whole."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from perfkit._errors import InvalidInputError
from perfkit.backends.adapter import Finished
from perfkit.backends.jax_compile import Program
from perfkit.backends.jax_dress import DressedFunction, changing, keeping_variables, run_by, writer
from perfkit.backends.jax_model import JaxModel, LinenModel, NnxModel
from perfkit.parallel.jax_mesh import local
from perfkit.parallel.jax_piped import Piped

if TYPE_CHECKING:
    from perfkit.backends.jax_model import Function


def in_stages(model: JaxModel) -> Finished:
    """An inference model whose calls go through the stages of all devices; every process makes the same calls."""
    stages = Stages(model)
    if isinstance(model, NnxModel):
        module = model.module()
        writer(module)(*stages.pieces())
        run_by(module, model, stages.run)
        return Finished(module, module, lambda: keeping_variables(module), program=stages.compiled)

    def function(params: Any, rest: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return stages.run(model.function(), None, params, rest, args, kwargs)[0], rest

    called = DressedFunction(model, function)

    def params() -> Any:
        params, rest = stages.pieces()
        return {"params": params, **rest} if isinstance(model, LinenModel) else params

    def call(*args: Any, **kwargs: Any) -> Any:
        return stages.on_packed(stages.own, model.function(), None, model.rest, args, kwargs)[0]

    return Finished(called, call, nullcontext, params=params, program=stages.compiled)


class Stages:
    """One program over the mesh, on parameters that are packed once: the model's own, and others as they come.

    Args:
        model: placed by `Piped`.
    """

    def __init__(self, model: JaxModel):
        assert isinstance(model.placement, Piped)
        self.placement: Piped = model.placement
        self.own, self.rest = self.placement.trained(model.params), self.placement.state(model.rest)
        self.packed = self.own
        self.packed_of: list[weakref.ref] = []
        self.programs: dict[Any, Program] = {}

    def compiled(self) -> Any:
        """The program of the first call; None before it."""
        return next((program.compiled for program in self.programs.values()), None)

    def pieces(self) -> tuple[Any, Any]:
        """Parameters and other state as the caller's model holds them."""
        params, rest = self.placement.pieces((self.own, self.rest))
        self.packed = self.own
        self.packed_of = list(map(weakref.ref, jax.tree.leaves(params)))
        return params, rest

    def run(self, function: Function, key: Any, params: Any, rest: Any, args: tuple, kwargs: dict) -> tuple[Any, dict]:
        """The outputs; and by their numbers the leaves of `rest` that changed.

        Args:
            function: the model.
            key: tells it from others.
            params: as `pieces` told them, or others: these are packed anew.

        Raises:
            InvalidInputError: they lie on other processes' devices.
        """
        leaves = jax.tree.leaves(params)
        if _traced(leaves):  # in a program of the caller's, with parameters that come from it
            return changing(function)(params, rest, args, kwargs)
        packed_of = [each() for each in self.packed_of]
        if len(packed_of) != len(leaves) or any(one is not other for one, other in zip(packed_of, leaves, strict=True)):
            self._pack(params, leaves)
        return self.on_packed(self.packed, function, key, rest, args, kwargs)

    def on_packed(
        self, packed: dict[str, jax.Array], function: Function, key: Any, rest: Any, args: tuple, kwargs: dict
    ) -> tuple[Any, dict]:
        """The same on packed parameters."""
        if key not in self.programs:
            whole = NamedSharding(self.placement.mesh, PartitionSpec())
            run = changing(self.placement.function(function))
            self.programs[key] = Program(run, jit=partial(jax.jit, out_shardings=whole))
        program = self.programs[key]
        if _traced(jax.tree.leaves((rest, args, kwargs))):
            return program(packed, rest, args, kwargs)
        args, kwargs = self.placement.batch((args, kwargs))
        return local(program(packed, self.placement.state(rest), args, kwargs))

    def _pack(self, params: Any, leaves: list[Any]) -> None:
        if elsewhere := [leaf for leaf in leaves if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable]:
            raise InvalidInputError(
                f"a parameter of shape {list(elsewhere[0].shape)} lies on devices of several processes, and is not the "
                "one that this model was given: pass the result's params, or whole arrays"
            )
        with jax.ensure_compile_time_eval():  # also where the model is called in a program of the caller's
            self.packed = self.placement.trained(params)
        self.packed_of = list(map(weakref.ref, leaves))


def _traced(leaves: list[Any]) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
