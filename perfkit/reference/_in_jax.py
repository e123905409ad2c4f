"""What the reference models need of JAX: making one, feeding it, fitting it, asking it."""

import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from ._catalog import Card, Kind
from .flax_models import BY_NAME


def cross_entropy(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean cross-entropy of class scores (B, C) against class numbers (B,)."""
    return optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean()


def mean_squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean squared difference of two arrays of one shape."""
    return optax.squared_error(outputs, targets).mean()


def binary_cross_entropy(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean cross-entropy of logits (B, 1) against 0.0 or 1.0, (B, 1)."""
    return optax.sigmoid_binary_cross_entropy(outputs, targets).mean()


LOSSES = {"images": cross_entropy, "sequences": mean_squared_error, "texts": binary_cross_entropy}


def build(name: str, *, seed: int) -> nnx.Module:
    """A new model, in training mode."""
    return BY_NAME[name](rngs=nnx.Rngs(seed))


def set_mode(model: nnx.Module, *, training: bool) -> None:
    """Switch between training and inference. (No layer of these models differs, but one put into them might.)"""
    model.train() if training else model.eval()


def model_inputs(kind: Kind, arrays: Sequence[np.ndarray]) -> tuple[jax.Array, ...]:
    """Rows of a data set, laid out as the models read them."""
    if kind == "images":
        arrays = [arrays[0][..., None]]  # (B, 28, 28) to (B, 28, 28, 1)
    if kind == "sequences":
        arrays = [arrays[0].swapaxes(0, 1)]  # (B, T, F) to (T, B, F)
    return tuple(_to_jax(array) for array in arrays)


def model_targets(array: np.ndarray) -> jax.Array:
    """Targets of a data set, as the losses read them."""
    return _to_jax(array)


def _to_jax(array: np.ndarray) -> jax.Array:
    return jnp.asarray(array.astype(np.int32) if array.dtype == np.int64 else array)  # JAX counts in 32 bits


@functools.cache  # one object for one recipe, so that `train_step` is compiled once for it
def optimizer(card: Card) -> optax.GradientTransformation:
    """The optimizer of a model's parameters."""
    adam = optax.adam(card.learning_rate)
    return adam if card.max_norm is None else optax.chain(optax.clip_by_global_norm(card.max_norm), adam)


def fit(
    model: nnx.Module,
    *,
    loss: Callable[[jax.Array, jax.Array], jax.Array],
    optimizer: optax.GradientTransformation,
    batches: Iterable[tuple[tuple[jax.Array, ...], jax.Array]],
    report: Callable[[int, jax.Array], None],
) -> None:
    """Train `model` in place, one compiled step for each batch; `report` is told each step's number and loss."""
    structure, parameters = nnx.split(model)
    state = optimizer.init(parameters)
    for step, (inputs, targets) in enumerate(batches, start=1):
        parameters, state, value = train_step(structure, loss, optimizer, parameters, state, inputs, targets)
        report(step, value)
    nnx.update(model, parameters)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def train_step(structure, loss, optimizer, parameters, state, inputs, targets):
    """The parameters and the optimizer's state after one batch, and the loss before it."""

    def objective(parameters):
        return loss(nnx.merge(structure, parameters)(*inputs), targets)

    value, gradients = jax.value_and_grad(objective)(parameters)
    updates, state = optimizer.update(gradients, state, parameters)
    return optax.apply_updates(parameters, updates), state, value


def predictor(model: Callable[..., jax.Array]) -> Callable[..., np.ndarray]:
    """A function from the model's inputs to its outputs as float32 numpy; a flax module is compiled first."""
    call = functools.partial(call_module, *nnx.split(model)) if isinstance(model, nnx.Module) else model
    return lambda *inputs: np.asarray(call(*inputs), dtype=np.float32)


@functools.partial(jax.jit, static_argnums=0)
def call_module(structure, state, *inputs):
    """The outputs of the module that `nnx.split` made these two of."""
    return nnx.merge(structure, state)(*inputs)
