"""What a training step of a JAX model costs on one device, measured for `planning`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
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
from perfkit.backends.jax_trees import leaves_with_names
from perfkit.parallel.batch import length
from perfkit.parallel.jax_mesh import replicated
from perfkit.parallel.jax_piped import operations_of
from perfkit.parallel.planning_parts import Costs
from perfkit.parallel.planning_timing import in_turn, needed_passes, within

Run = Callable[[Callable, tuple], Callable[[], Any]]
"""Makes a call of a function and what it is given: on one device, or on all of them."""


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


def alone(function: Callable, given: tuple) -> Callable[[], Any]:
    """A call on one device; it returns when the results are there."""
    program = jax.jit(lambda *given: function(*given))  # its own program: nothing that is given is donated
    return lambda: jax.block_until_ready(program(*given))


def on_all(mesh: Mesh, function: Callable, given: tuple) -> Callable[[], Any]:
    """A call on every device of a mesh at a time, each by itself and with all that is given."""
    (axis,) = mesh.axis_names

    def each(*given: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf[None], function(*given))

    whole, apart = PartitionSpec(), PartitionSpec(axis)
    program = jax.jit(jax.shard_map(each, mesh=mesh, in_specs=whole, out_specs=apart, check_vma=False))
    everywhere = replicated(given, mesh)
    return lambda: jax.block_until_ready(program(*everywhere))


def waited_for(mesh: Mesh, function: Callable, given: tuple) -> Callable[[], Any]:
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
    everywhere = replicated(given, mesh)
    return lambda: jax.block_until_ready(program(*everywhere))


def timed_calls(step: Step, devices: int, run: Run) -> dict[Any, Callable[[], Any]]:
    """What is timed: steps by the rows of their micro-batches, "update", "adding", and "forward" of the smallest."""
    passes = needed_passes(step.rows, devices)
    calls: dict[Any, Callable[[], Any]] = {rows: run(*step.whole(rows, times)) for rows, times in passes.items()}
    rows = min(passes)
    forward = run(*step.whole(rows, passes[rows], forward=True))
    return calls | {"update": run(*step.update()), "adding": run(*step.adding()), "forward": forward}


def costs(step: Step, devices: int, times: Mapping[Any, float]) -> Costs:
    """What `planning` asks beside the programs of layouts, from times of `timed_calls`."""
    passes = needed_passes(step.rows, devices)
    trained, update_s = jax.tree.leaves(step.work.model.params), times["update"]
    in_passes = {name: max(seconds - update_s, 0.0) for name, seconds in times.items()}
    return Costs(
        rows=step.rows,
        pass_s={rows: in_passes[rows] / count for rows, count in passes.items()},
        update_s=update_s,
        forward_s=0.0,
        units=(),
        splits={},
        gradients=tuple(leaf.nbytes for leaf in reversed(trained)),
        again=1 + in_passes["forward"] / (in_passes[min(passes)] or math.inf),
        adding_s=times["adding"],
    )


def measured(step: Step, devices: int, budget_s: float) -> Costs:
    """The same, timed here on one device, all batch sizes in turn."""
    times = in_turn(timed_calls(step, devices, alone), within(budget_s))
    return costs(step, devices, {name: median(found) for name, found in times.items()})


def share_reading(work: Workload, names: Iterable[str]) -> float:
    """The share of a forward call's time that operations take which read these parameters, each run by itself."""
    model, inputs, wanted = work.model, work.inputs, set(names)
    args, kwargs = inputs.args, dict(inputs.kwargs)
    operations = operations_of(model.function(), model.params, model.rest, args, kwargs)
    whole = jax.tree.leaves(model.params)
    parts = [whole[index] if row is None else whole[index][row] for index, row in operations.parts]
    seconds = operations.costs([*parts, *jax.tree.leaves((model.rest, args, kwargs))], trains=False).seconds
    named = [name for name, _ in leaves_with_names(model.params)[0]]
    reading = {place for place, (index, _) in enumerate(operations.parts) if named[index] in wanted}
    read_s = sum(each for eqn, each in zip(operations.eqns, seconds, strict=True) if operations.weights(eqn) & reading)
    return read_s / (sum(seconds) or 1.0)
