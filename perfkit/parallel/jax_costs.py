"""What a training step of a JAX model costs on one device, measured for `planning`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from perfkit._batch import sliced
from perfkit._errors import InvalidInputError
from perfkit._workload import Workload
from perfkit.backends.jax_training import Trainer
from perfkit.measure.kept_memory import KEPT_BYTES, fresh
from perfkit.parallel.batch import length
from perfkit.parallel.jax_mesh import replicated
from perfkit.parallel.planning_parts import Costs
from perfkit.parallel.planning_timing import in_turn, needed_passes, within

MORE = 3
"""How many times as much memory is touched where it comes from the system anew as where it is kept."""


TOUCHES = 3
"""How often all of that memory is written, in one call."""


class Step:
    """A training step of a workload, on any number of rows of its example batch.

    Args:
        work: a training workload on one device.
        batch_dim: the dimension of the inputs that is the batch.
    """

    def __init__(self, work: Workload, batch_dim: int):
        rows = length(work, batch_dim)
        if rows is None:
            raise InvalidInputError(f"no input has a dimension {batch_dim} to share out")
        self.work, self.rows, self.batch_dim = work, rows, batch_dim

    def batch(self, rows: int) -> tuple[Any, Any, Any]:
        """The first rows of the example batch: arguments, keyword arguments and targets."""
        inputs, targets = self.work.inputs, self.work.training.targets
        batch = (inputs.args, dict(inputs.kwargs), targets)
        return self.work.backend.mapped(sliced(self.rows, self.rows // rows, 0, self.batch_dim), batch)

    def whole(self, rows: int, micro_batches: int, forward: bool = False) -> tuple[Callable, tuple]:
        """Forward, backward and update on so many micro-batches of so many rows; with what the function is given.

        Args:
            forward: without the backward, all gradients being 0.
        """
        training = replace(self.work.training, micro_batches=micro_batches, batch_dim=self.batch_dim)
        model = self.work.model.then(_fixed) if forward else self.work.model
        trainer = Trainer(self.work.replace(model=model, training=training))
        return trainer.program.jitted, (trainer.state, *self.batch(rows * micro_batches))

    def update(self) -> tuple[Callable, tuple]:
        """The optimizer's step alone."""
        params, optimizer = self.work.model.params, self.work.training.optimizer

        def step(params: Any, moments: Any, gradients: Any) -> Any:
            updates, moments = optimizer.update(gradients, moments, params)
            return optax.apply_updates(params, updates), moments

        return step, (params, optimizer.init(params), params)

    def adding(self) -> tuple[Callable, tuple]:
        """Adding gradients to others."""
        params = self.work.model.params
        return partial(jax.tree.map, jnp.add), (params, params)


def _fixed(function: Callable) -> Callable:
    """The model with weights that nothing is differentiated by."""
    return lambda params, *others, **named: function(jax.lax.stop_gradient(params), *others, **named)


class Call:
    """A program and what it is given; it returns when the results are there."""

    def __init__(self, program: Any, given: tuple):
        self.compiled, self.given = program.lower(*given).compile(), given

    @property
    def temporary(self) -> int:
        """Bytes of memory that it takes while it runs, on one device."""
        return self.compiled.memory_analysis().temp_size_in_bytes

    def __call__(self) -> Any:
        return jax.block_until_ready(self.compiled(*self.given))


Run = Callable[[Callable, tuple], Call]
"""Makes a call of a function and what it is given: on one device, or on all of them."""


def alone(function: Callable, given: tuple) -> Call:
    """A call on one device."""
    return Call(jax.jit(lambda *given: function(*given)), given)  # its own program: nothing that is given is donated


def on_all(mesh: Mesh, function: Callable, given: tuple) -> Call:
    """A call on every device of a mesh at a time, each by itself and with all that is given."""
    (axis,) = mesh.axis_names

    def each(*given: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf[None], function(*given))

    whole, apart = PartitionSpec(), PartitionSpec(axis)
    program = jax.jit(jax.shard_map(each, mesh=mesh, in_specs=whole, out_specs=apart, check_vma=False))
    return Call(program, replicated(given, mesh))


def waited_for(mesh: Mesh, function: Callable, given: tuple) -> Call:
    """A call on the first device of a mesh, while the others wait for it within the same program."""
    (axis,) = mesh.axis_names

    def each(*given: Any) -> Any:
        forms = jax.eval_shape(function, *given)
        nothing = partial(jax.tree.map, lambda form: jnp.zeros(form.shape, form.dtype), forms)
        found = jax.lax.cond(jax.lax.axis_index(axis) == 0, function, lambda *_: nothing(), *given)
        met = jax.lax.psum(jax.tree.leaves(found)[-1].ravel()[:1], axis)
        return jax.tree.map(lambda leaf: leaf[None], found), met

    whole, apart = PartitionSpec(), PartitionSpec(axis)
    program = jax.jit(jax.shard_map(each, mesh=mesh, in_specs=whole, out_specs=(apart, whole), check_vma=False))
    return Call(program, replicated(given, mesh))


def touching(size: int) -> tuple[Callable, tuple]:
    """Going through so many bytes of memory, which the program takes while it runs, and no others."""

    def touch(value: jax.Array) -> jax.Array:
        begun = jnp.broadcast_to(value, size // value.nbytes)
        return jax.lax.fori_loop(1, TOUCHES, lambda _, memory: memory + value, begun)[
            0
        ]  # a loop's arrays lie in memory

    return touch, (jnp.float32(1),)


def timed_calls(step: Step, devices: int, run: Run) -> dict[Any, Call]:
    """What is timed: steps by the rows of their micro-batches, and by name what else `costs` reads."""
    passes = needed_passes(step.rows, devices)
    calls: dict[Any, Call] = {rows: run(*step.whole(rows, times)) for rows, times in passes.items()}
    rows = min(passes)
    calls["forward"] = run(*step.whole(rows, passes[rows], forward=True))
    calls |= {"update": run(*step.update()), "adding": run(*step.adding())}
    return calls | {"kept": run(*touching(KEPT_BYTES // 2)), "fresh": run(*touching(MORE * KEPT_BYTES // 2))}


def costs(step: Step, devices: int, calls: Mapping[Any, Call], times: Mapping[Any, float]) -> Costs:
    """What `planning` asks beside the programs of layouts.

    Args:
        calls: those of `timed_calls`.
        times: of each the seconds.
    """
    passes = needed_passes(step.rows, devices)
    trained, update_s = jax.tree.leaves(step.work.model.params), times["update"]
    fresh_s = max(times["fresh"] - MORE * times["kept"], 0.0) / calls["fresh"].temporary

    def in_passes(name: Any) -> float:
        return max(times[name] - update_s - fresh_s * fresh(calls[name].temporary), 0.0)

    return Costs(
        rows=step.rows,
        pass_s={rows: in_passes(rows) / count for rows, count in passes.items()},
        update_s=update_s,
        forward_s=0.0,
        units=(),
        splits={},
        gradients=tuple(leaf.nbytes for leaf in reversed(trained)),
        again=1 + in_passes("forward") / (in_passes(min(passes)) or math.inf),
        adding_s=times["adding"],
        temporary=calls[step.rows].temporary,
        fresh_s=fresh_s,
        filling_s=times["kept"] / TOUCHES / calls["kept"].temporary,
    )


def measured(step: Step, devices: int, budget_s: float) -> Costs:
    """The same, timed here on one device, all batch sizes in turn."""
    calls = timed_calls(step, devices, alone)
    times = in_turn(calls, within(budget_s))
    return costs(step, devices, calls, {name: median(found) for name, found in times.items()})
