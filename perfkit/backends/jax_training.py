"""One training step of a JAX workload."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from perfkit._batch import axis_of, even_rows
from perfkit._errors import InvalidInputError, PerfkitWarning
from perfkit.backends.jax_convolutions import channels_last

if TYPE_CHECKING:
    from perfkit._workload import Inputs, Training, Workload
    from perfkit.backends.jax_model import Function

FIRST_SCALE, GROWTH_INTERVAL = 2.0**15, 2000

LOSS, OPTIMIZER = "{:loss}", "{:optimizer}"
"""Scopes in the names of a step's operations, for profiles."""


class Trainer:
    """`forward → loss → gradients → optimizer update` as one compiled function, on state of its own.

    Nobody trains op by op in JAX, so the original's step is one program too. Under the recipes `compile` and `donate`
    its outputs also take over its inputs' memory (donation).

    Args:
        work: a training workload.
    """

    def __init__(self, work: Workload):
        model, training = work.model, work.training
        self.placement = model.placement
        params = self.placement.trained(model.params)
        state = params, model.rest, training.optimizer.init(params), _first_scale()
        self.state = _owned(self.placement.state(state))
        looped = training.micro_batches > 1 or self.placement.scattered  # micro-batches, or a pipeline's turns
        in_order = channels_last if looped and work.device == "cpu" else _as_it_is
        step = _step(self.placement.function(model.function()), training, self.placement.averaged, in_order)
        self.program = self.placement.program(step, (0,) if model.ahead or training.donates else (), self.state)

    @property
    def held(self) -> tuple[Any, Any]:
        """Parameters and other state as the caller's model takes them."""
        return self.placement.held(self.state[:2])

    @property
    def pieces(self) -> tuple[Any, Any]:
        """Parameters and other state as the caller's module holds them from step to step."""
        return self.placement.pieces(self.state[:2])

    def step(self, inputs: Inputs, targets: Any) -> jax.Array:
        """Train on one batch; returns the loss before the step, a float32 scalar."""
        batch = self.placement.batch((inputs.args, dict(inputs.kwargs), targets))
        self.state, loss = self.program(self.state, *batch)
        return loss

    @contextmanager
    def keeping_state(self) -> Iterator[None]:
        """Within it the model may be trained; after it, its state is as before."""
        before, remembered = _owned(self.state), self.program.remembered
        try:
            yield
        finally:
            self.state, self.program.remembered = before, remembered

    def settle(self) -> None:
        """Bring the devices' models together, where they differ for some steps."""
        self.state = self.program.settled(self.state)

    @property
    def settled(self) -> tuple[Any, Any]:
        """The state as it is for any number of devices, and what the program remembers; after `settle`."""
        return self.program.whole(self.state), self.program.remembered

    def restore(self, state: Any, remembered: Any) -> None:
        """Take over what `settled` told; where nothing is known to be remembered, training begins from that state."""
        self.state = _owned(self.placement.state(state))
        self.program.remembered = self.program.begun(self.state) if remembered is None else remembered


def checked_optimizer(optimizer: Any, params: Any) -> optax.GradientTransformation:
    """The optimizer as an optax transformation that takes a step on these parameters.

    Raises:
        InvalidInputError: it is none, or cannot; or a parameter is nothing to differentiate by.
    """
    if isinstance(optimizer, optax.MultiSteps):
        optimizer = optimizer.gradient_transformation()
    if not isinstance(optimizer, optax.GradientTransformation):
        inner = " (an nnx.Optimizer holds one as its .tx)" if hasattr(optimizer, "tx") else ""
        raise InvalidInputError(
            f"optimizer is a {type(optimizer).__name__}: expected an optax transformation such as "
            f"optax.adam(1e-3){inner}"
        )
    if not jax.tree.leaves(params):
        raise InvalidInputError("params hold no array: there is nothing to train")
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise InvalidInputError(
                f"parameter {name!r} is {leaf.dtype}, and training differentiates by every parameter: keep it out of "
                "params, for instance with functools.partial(function, ...)"
            )

    if (error := _failing(optimizer, params)) is None:
        return optimizer
    without_loss = optax.GradientTransformation(optimizer.init, optimizer.update)
    if isinstance(error, TypeError) and _failing(without_loss, params) is None:
        return without_loss  # it takes more than optimizers do, such as optax.contrib.sam, and no value=
    if "value_fn" in str(error):
        raise InvalidInputError(
            "the optimizer searches along a line by computing the loss again (value_fn), and a training step here "
            "computes it once: pass it without, such as optax.lbfgs(learning_rate, linesearch=None)"
        ) from error
    raise InvalidInputError(
        f"optimizer takes no step on these parameters: {type(error).__name__}: {error}. It is called as "
        "optimizer.update(gradients, state, params), with value=loss where it takes more"
    ) from error


def warn_of_ascent(optimizer: optax.GradientTransformation, params: Any) -> None:
    """Say which complex parameters an optimizer would move uphill: JAX's gradients are conjugates of the slope."""
    if not any(map(jnp.iscomplexobj, jax.tree.leaves(params))):
        return
    gradients = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1j if jnp.iscomplexobj(leaf) else 0), params)
    steps, _ = update(optimizer, gradients, optimizer.init(params), params, jnp.float32(0))
    climbing = [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, step in jax.tree_util.tree_leaves_with_path(steps)
        if jnp.iscomplexobj(step) and float(step.imag.sum()) < 0
    ]
    if climbing:
        warnings.warn(
            f"the optimizer takes the complex parameter(s) {', '.join(climbing)} uphill in their imaginary parts, "
            "since JAX's gradients are conjugated: pass optax.chain(optax.stateless(lambda gradients, _: "
            "jax.tree.map(jnp.conj, gradients)), optimizer)",
            PerfkitWarning,
            stacklevel=5,
        )


def _failing(optimizer: optax.GradientTransformation, params: Any) -> Exception | None:
    """What a step on these parameters raises; None where it raises nothing."""

    def step(gradients):
        return update(optimizer, gradients, optimizer.init(params), params, jnp.float32(0))

    try:
        jax.eval_shape(step, params)
    except Exception as error:  # whatever the caller's code may raise
        return error
    return None


def update(optimizer: optax.GradientTransformation, gradients: Any, moments: Any, params: Any, loss: Any) -> Any:
    """One update of an optimizer, which is told the loss where it may ask for it (`reduce_on_plateau` does)."""
    if isinstance(optimizer, optax.GradientTransformationExtraArgs):
        return optimizer.update(gradients, moments, params, value=loss)
    return optimizer.update(gradients, moments, params)


def _step(function: Function, training: Training, averaged: Callable[[Any], Any], in_order: Callable):
    optimizer, scaling = training.optimizer, training.loss_scaling

    def gradients_of(params, rest, scale, args, kwargs, targets):
        def scaled_loss(params):
            outputs, new_rest = function(params, rest, *args, **kwargs)
            with jax.named_scope(LOSS):
                loss = training.loss(outputs, targets)
                if training.teacher is not None:
                    loss = (loss + _distance(outputs, training.teacher(*args, **kwargs))) / 2
                return (loss * scale.astype(loss.dtype) if scaling else loss), (loss, new_rest)

        return jax.grad(scaled_loss, has_aux=True)(params)

    ordered = in_order(gradients_of)
    of_batch = ordered if training.micro_batches == 1 else _accumulated(ordered, training)

    def step(state, args, kwargs, targets):
        params, rest, moments, (scale, clean_steps) = state
        gradients, (loss, new_rest) = averaged(of_batch(params, rest, scale, args, kwargs, targets))
        with jax.named_scope(OPTIMIZER):
            if not scaling:
                updates, moments = update(optimizer, gradients, moments, params, loss)
                return (optax.apply_updates(params, updates), new_rest, moments, (scale, clean_steps)), loss
            gradients = jax.tree.map(lambda gradient: gradient / scale.astype(gradient.dtype), gradients)
            finite = jnp.all(jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients)]))
            updates, new_moments = update(optimizer, gradients, moments, params, loss)
            kept = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old),
                (optax.apply_updates(params, updates), new_moments),
                (params, moments),
            )
            return (kept[0], new_rest, kept[1], _next_scale(scale, clean_steps, finite)), loss

    return step


def _accumulated(gradients_of: Callable, training: Training) -> Callable:
    """The mean of the gradients and losses of the micro-batches, one after the other in a loop.

    Micro-batch i takes the rows i, i + n, i + 2n, …, so that on a mesh every device has its share of each.
    """
    parts, batch_dim = training.micro_batches, training.batch_dim

    def of_batch(params, rest, scale, *batch):
        rows = even_rows(jax.tree.leaves(batch[:2]), batch_dim, parts, jax.tree.leaves(batch[2]))

        def micro_batch(index):
            def of(leaf):
                dim = axis_of(leaf.shape, rows, batch_dim)
                if dim is None:
                    return leaf
                cut = leaf.reshape(*leaf.shape[:dim], rows // parts, parts, *leaf.shape[dim + 1 :])
                return jax.lax.dynamic_index_in_dim(cut, index, dim + 1, keepdims=False)

            return jax.tree.map(of, batch)

        def add(carry, index):
            total, rest = carry
            gradients, (loss, rest) = gradients_of(params, rest, scale, *micro_batch(index))
            return (jax.tree.map(jnp.add, total, gradients), rest), loss

        shapes, _ = jax.eval_shape(gradients_of, params, rest, scale, *micro_batch(0))
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        (total, rest), losses = jax.lax.scan(add, (nothing, rest), jnp.arange(parts))
        return jax.tree.map(lambda leaf: leaf / parts, total), (losses.mean(), rest)

    return of_batch


def _as_it_is(function: Callable) -> Callable:
    return function


def teacher(work: Workload) -> Callable[..., Any]:
    """The model as it is now, frozen: what `Training.teacher` asks for."""
    function, params, rest = work.model.function(), work.model.params, work.model.rest
    return lambda *args, **kwargs: function(params, rest, *args, **kwargs)[0]


def _distance(outputs: Any, taught: Any) -> jax.Array:
    """Mean squared distance to the teacher's outputs, in units of their variance.

    Source: Ba and Caruana, "Do deep nets really need to be deep?" (2014): logits are matched, not probabilities.
    """
    pairs = zip(jax.tree.leaves(outputs), map(jax.lax.stop_gradient, jax.tree.leaves(taught)), strict=True)
    terms = [
        jnp.square(o - t).mean() / jnp.maximum(t.var(), 1e-12)
        for o, t in pairs
        if jnp.issubdtype(t.dtype, jnp.floating)
    ]
    return jnp.stack(terms).mean()


def _first_scale() -> tuple[jax.Array, jax.Array]:
    return jnp.float32(FIRST_SCALE), jnp.int32(0)


def _next_scale(scale, clean_steps, finite):
    """Halve after an overflow, double after GROWTH_INTERVAL steps without one."""
    clean_steps = jnp.where(finite, clean_steps + 1, 0)
    grow = clean_steps >= GROWTH_INTERVAL
    scale = jnp.where(finite, jnp.where(grow, scale * 2, scale), jnp.maximum(scale / 2, 1))
    return scale, jnp.where(grow, 0, clean_steps)


def _owned(tree: Any) -> Any:
    """Copies of the arrays, so that donating them takes nothing from anyone else."""
    return jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, jax.Array) else leaf, tree)
