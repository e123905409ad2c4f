"""Local SGD in JAX: every device trains a model of its own, and every few steps they are brought together.

The state of training has a first dimension more, along the devices of the mesh. Steps are one program without any
exchange, averages another one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from perfkit._batch import axis_of
from perfkit._report import Effect
from perfkit._workload import Workload
from perfkit.backends.jax_compile import Program
from perfkit.backends.jax_keys import is_key
from perfkit.backends.jax_placement import Placement
from perfkit.backends.jax_trees import leaves_with_names
from perfkit.memory.jax_low_bit import state_held_as, state_in_full
from perfkit.parallel.jax_mesh import OnMesh, mesh_of, replicated, shared_rows
from perfkit.parallel.spread import Spread

if TYPE_CHECKING:
    from perfkit.backends.jax_model import Function
    from perfkit.recipes.local_sgd import LocalSgd

AXIS = "data"
EACH, ALL = PartitionSpec(AXIS), PartitionSpec()


def local_sgd(work: Workload, recipe: LocalSgd) -> tuple[Workload, Effect]:
    """Each device trains on its part of the batch by itself, until the next average."""
    mesh, spread = mesh_of(work.layout), work.spread or Spread()
    told = (*spread.parts, recipe.told(mesh.shape[AXIS]))
    work = work.replace(
        model=replace(work.model, placement=Replicas(mesh, recipe)),
        spread=replace(spread, parts=told, period=recipe.sync_every),
    )
    touched = tuple(name for name, _ in leaves_with_names(work.model.params)[0])
    return work, Effect(
        touched, notes=(f"one program for steps and one for averages, on {work.layout}", *recipe.notes())
    )


class Replicas(Placement):
    """A model and an optimizer of its own on each device.

    Args:
        mesh: the devices, along "data".
    """

    def __init__(self, mesh: Mesh, recipe: LocalSgd):
        self.mesh, self.recipe = mesh, recipe
        self.shares = recipe.shares(mesh.shape[AXIS])
        self.synchronous = False
        """Read while a step is traced: whether gradients are averaged in it."""

    def state(self, state: Any) -> Any:
        """The same on every device; random keys are each device's own."""
        count = self.mesh.shape[AXIS]

        def spread(leaf: Any) -> Any:
            if is_key(leaf):
                return jax.vmap(partial(jax.random.fold_in, leaf))(jnp.arange(count))
            return jnp.broadcast_to(leaf, (count, *leaf.shape))

        whole = replicated(state, self.mesh)
        return jax.jit(partial(jax.tree.map, spread), out_shardings=NamedSharding(self.mesh, EACH))(whole)

    def batch(self, batch: Any) -> Any:
        return OnMesh(self.mesh, self.recipe.batch_dim).batch(batch)

    def function(self, function: Function) -> Function:
        return function

    def averaged(self, found: Any) -> Any:
        return jax.tree.map(self.mean, found) if self.synchronous else found

    def mean(self, leaf: jax.Array) -> jax.Array:
        """The weighted mean over the devices, of what is one device's; integers and keys stay as they are."""
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        share = jnp.asarray(self.shares, leaf.dtype)[jax.lax.axis_index(AXIS)]
        return jax.lax.psum(leaf * share, AXIS)

    def program(self, step: Callable, donate: tuple[int, ...], state: Any) -> Steps:
        return Steps(self, step, donate, state)

    def held(self, tree: Any) -> Any:
        """What this process' first device holds."""
        return _first(jax.tree.map(lambda leaf: leaf.addressable_data(0), tree))

    def on_each(self, function: Callable, specs: tuple[Any, ...], out: tuple[Any, ...]) -> Callable:
        """A function of one device's state as one of all devices': arguments and results by their specs."""
        return jax.shard_map(function, mesh=self.mesh, in_specs=specs, out_specs=out, check_vma=False)


class Steps(Program):
    """A step of training that every few calls ends with an average.

    What it remembers: the number of steps so far; of those, how many since the models were last the same; and with
    `diloco` the parameters where the round began, with the outer optimizer's state.
    """

    rounds = True

    def __init__(self, replicas: Replicas, step: Callable, donate: tuple[int, ...], state: Any):
        super().__init__(self._step(step, synchronous=False), donate)
        self.replicas, self.recipe = replicas, (recipe := replicas.recipe)
        self.optimizer = optax.sgd(recipe.outer_lr, recipe.outer_momentum, nesterov=recipe.outer_momentum > 0)
        self.together = Program(self._step(step, synchronous=True), donate)
        self.average = Program(self._average(recipe.average_state), donate)
        self.settling = Program(self._average(with_state=True))
        self.remembered = self.begun(state)

    def __call__(self, state: Any, *batch: Any) -> tuple[Any, jax.Array]:
        taken, since, outer = self.remembered
        if taken < self.recipe.warmup_steps:
            state, loss = self.together(state, *batch)
            since, outer = 0, self.begun(state)[2] if taken + 1 == self.recipe.warmup_steps else outer
        else:
            (state, loss), since = super().__call__(state, *batch), since + 1
        if since == self.recipe.sync_every:
            (state, outer), since = self.average(state, outer), 0
        self.remembered = taken + 1, since, outer
        return state, _of_this_process(loss)

    def begun(self, state: Any) -> tuple[int, int, Any]:
        if not self.recipe.diloco:
            return 0, 0, ()
        anchor = self.whole(state[0])
        return 0, 0, (anchor, self.optimizer.init(anchor))

    def skip_warm_up(self) -> None:
        taken, *others = self.remembered
        self.remembered = (max(taken, self.recipe.warmup_steps), *others)

    def settled(self, state: Any) -> Any:
        taken, since, outer = self.remembered
        if not taken:
            return state
        met, moved = self.settling(state, outer)
        if since:
            state, outer = met, moved
        else:
            state = (*state[:2], *met[2:])  # averaged already: once more would round, or move an outer optimizer
        self.remembered = taken, 0, outer
        return self.replicas.state(self.whole(state))

    def whole(self, state: Any) -> Any:
        return jax.jit(_unstacked, out_shardings=NamedSharding(self.replicas.mesh, ALL))(state)

    def parts(self) -> list[tuple[Any, int]]:
        return [*super().parts(), (self.average.compiled, self.recipe.sync_every)]

    def _step(self, step: Callable, synchronous: bool) -> Callable:
        def on_one(state, args, kwargs, targets):
            new, loss = step(_unstacked(state), args, kwargs, targets)
            return _stacked(new), jnp.reshape(loss, (1,))

        def on_all(state, args, kwargs, targets):
            replicas = self.replicas
            rows = shared_rows((args, kwargs, targets), self.recipe.batch_dim, replicas.mesh.shape[AXIS])

            def spec(leaf: Any) -> PartitionSpec:
                dim = axis_of(jnp.shape(leaf), rows, self.recipe.batch_dim)
                return ALL if dim is None else PartitionSpec(*(None,) * dim, AXIS)

            batch = args, kwargs, targets
            replicas.synchronous = synchronous
            specs = (EACH, *(jax.tree.map(spec, part) for part in batch))
            return replicas.on_each(on_one, specs, (EACH, EACH))(state, *batch)

        return on_all

    def _average(self, with_state: bool) -> Callable:
        recipe, mean = self.recipe, self.replicas.mean

        def on_one(state, outer):
            params, rest, moments, scale = _unstacked(state)
            params, rest = jax.tree.map(mean, (params, rest))
            if recipe.diloco:
                anchor, momentum = outer
                change = jax.tree.map(jnp.subtract, anchor, params)
                updates, momentum = self.optimizer.update(change, momentum, anchor)
                params = optax.apply_updates(anchor, updates)
                outer = params, momentum
            if with_state:
                means = jax.tree.map(lambda leaf: mean(leaf) if leaf.ndim else leaf, state_in_full(moments))
                moments = state_held_as(means, moments)
            return _stacked((params, rest, moments, scale)), outer

        return self.replicas.on_each(on_one, (EACH, ALL), (EACH, ALL))


def _unstacked(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], tree)


def _stacked(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[None], tree)


_first = jax.jit(_unstacked)


def _of_this_process(loss: jax.Array) -> jax.Array:
    """The mean loss of this process' devices, without asking others."""
    parts = [shard.data for shard in loss.addressable_shards]
    if len(parts) == 1:
        return parts[0][0]
    device = next(iter(parts[0].devices()))
    return jnp.concatenate([jax.device_put(part, device) for part in parts]).mean()
