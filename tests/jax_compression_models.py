"""JAX models and recipe classes that the pruning and low-rank tests share."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx

from perfkit import LayerRecipe, Stage
from perfkit._report import Effect
from perfkit._workload import Inputs, Workload
from perfkit.backends.jax_backend import BACKEND
from perfkit.backends.jax_model import FunctionModel, LinenModel, NnxModel


@dataclass(frozen=True, kw_only=True)
class Prune(LayerRecipe):
    """The recipe of that name as the backend sees it; it may change the outputs as it likes."""

    stage = Stage.STRUCTURE
    tolerance = 1e3
    retrains = True

    amount: float = 0.5
    structure: str = "channels"
    criterion: str = "magnitude"
    schedule: int = 0
    round_to: int = 1
    distill: bool = False

    def jax(self, work):
        from perfkit.pruning.jax_prune import pruned

        return pruned(work, self)


@dataclass(frozen=True, kw_only=True)
class LowRank(LayerRecipe):
    """The recipe of that name as the backend sees it."""

    stage = Stage.STRUCTURE
    tolerance = 1e3
    retrains = True

    energy: float = 0.99
    distill: bool = False

    def jax(self, work):
        from perfkit.pruning.jax_low_rank import factorized

        return factorized(work, self)


class ConvNet(nnx.Module):
    """Convolution → norm → pool → flatten → linear, with dropout."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 12, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(12, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.fc = nnx.Linear(12 * 4 * 4, 16, rngs=rngs)
        self.out = nnx.Linear(16, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.norm(self.conv(x))), (2, 2), (2, 2))
        return self.out(nnx.relu(self.fc(self.drop(x.reshape(x.shape[0], -1)))))


class Residual(nnx.Module):
    """A stem, a residual block, a depthwise convolution, and two branches concatenated."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.first = nnx.Conv(8, 12, (3, 3), rngs=rngs)
        self.second = nnx.Conv(12, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.depthwise = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
        self.left, self.right = nnx.Conv(8, 4, (1, 1), rngs=rngs), nnx.Conv(8, 6, (1, 1), rngs=rngs)
        self.fc = nnx.Linear(10, 5, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        x = nnx.relu(x + self.norm(self.second(nnx.relu(self.first(x)))))
        x = nnx.relu(self.depthwise(x))
        return self.fc(jnp.concatenate([self.left(x), self.right(x)], -1).mean((1, 2)))


class Recurrent(nnx.Module):
    """Any cell in an RNN, and a linear layer on its last output."""

    def __init__(self, cell, rngs):
        self.rnn = nnx.RNN(cell(6, 10, rngs=rngs))
        self.fc = nnx.Linear(10, 3, rngs=rngs)

    def __call__(self, x):
        return self.fc(self.rnn(x)[:, -1])


class Bidirectional(nnx.Module):
    """Two GRUs whose outputs are concatenated, a norm, and another recurrent layer."""

    def __init__(self, rngs):
        forward, backward = (nnx.RNN(nnx.GRUCell(6, 8, rngs=rngs)) for _ in range(2))
        self.both = nnx.Bidirectional(forward, backward, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.rnn = nnx.RNN(nnx.GRUCell(16, 10, rngs=rngs))
        self.fc = nnx.Linear(10, 3, rngs=rngs)

    def __call__(self, x):
        return self.fc(self.rnn(self.norm(self.both(x)))[:, -1])


class Encoder(nnx.Module):
    """One block of a transformer."""

    def __init__(self, rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(num_heads=4, in_features=8, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(8, 12, rngs=rngs), nnx.Linear(12, 8, rngs=rngs)
        self.out = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return self.out(x + self.down(nnx.gelu(self.up(self.norm2(x)))))


SEQUENCES = (3, 5, 6)

MODELS = {
    "conv": (ConvNet, (4, 8, 8, 1)),
    "residual": (Residual, (2, 8, 8, 3)),
    "fused_lstm": (functools.partial(Recurrent, nnx.OptimizedLSTMCell), SEQUENCES),
    "lstm": (functools.partial(Recurrent, nnx.LSTMCell), SEQUENCES),
    "gru": (functools.partial(Recurrent, nnx.GRUCell), SEQUENCES),
    "simple": (functools.partial(Recurrent, nnx.SimpleCell), SEQUENCES),
    "bidirectional": (Bidirectional, SEQUENCES),
    "encoder": (Encoder, (2, 5, 8)),
}


def made(name):
    """A model with no two parameters equal (fresh biases are), in inference mode, and its inputs."""
    kind, shape = MODELS[name]
    model = filled(lambda: kind(nnx.Rngs(0)))
    model.eval()
    return model, rows(*shape)


def filled(make):
    """The module that `make` makes, with numbers from numpy: JAX compiles its random numbers for every shape."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    generator = np.random.default_rng(1)

    def number(path, leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        values = generator.standard_normal(leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]) or 1)
        positive = "var" in jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        return jnp.asarray(np.abs(values) + 0.5 if positive else values, leaf.dtype)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(number, state))


def rows(*shape):
    return jnp.asarray(np.random.default_rng(7).standard_normal(shape), jnp.float32)


def flat(model):
    """path -> array, of the parameters."""
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in state}


class Applied(NamedTuple):
    """A recipe applied to a model by itself, without the pipeline's measuring."""

    model: Any
    effect: Effect
    before: Workload
    after: Workload

    @property
    def parameters(self):
        """How many there were, and how many there are."""
        return tuple(BACKEND.size(work)[1] for work in (self.before, self.after))


def applied(recipe, model, inputs, params=None, calibration=()):
    if isinstance(model, nnx.Module):
        held = NnxModel.of(model)
    elif isinstance(model, linen.Module):
        held = LinenModel(original=model, params=params["params"], rest={})
    else:
        held = FunctionModel(original=model, params=params)
    inputs = None if inputs is None else Inputs(inputs if isinstance(inputs, tuple) else (inputs,))
    work = Workload(BACKEND, held, inputs, "inference", "cpu", calibration=tuple(Inputs((x,)) for x in calibration))
    after, effect = recipe.jax(work)
    return Applied(BACKEND.finish(after).model, effect, work, after)


def outputs(model, *inputs):
    """What an nnx module answers, compiled once for one structure."""
    return np.asarray(_call(*nnx.split(model), *inputs))


@functools.partial(jax.jit, static_argnums=0)
def _call(structure, state, *inputs):
    return nnx.merge(structure, state)(*inputs)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def training(name, classes):
    """A model and a batch of random rows to learn by heart, as arguments of `optimize(mode="training")`."""
    kind, shape = MODELS[name]
    return {
        "model": filled(lambda: kind(nnx.Rngs(0))),
        "example_inputs": (rows(32, *shape[1:]),),
        "targets": jnp.arange(32) % classes,
        "loss": cross_entropy,
        "optimizer": optax.adam(1e-2),
        "mode": "training",
    }


def prune(model, x, params=None, calibration=(), **options):
    return applied(Prune(**options), model, x, params, calibration)
