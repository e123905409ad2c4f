"""JAX models to profile, and how they are bound."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from perfkit import reference
from perfkit._workload import Workload
from perfkit.backends import backend

WIDTH = 16


class Block(nnx.Module):
    """One block of a transformer with a head of self-attention for every eight features."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=WIDTH, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs), nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        """x: (B, T, WIDTH). Returns the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(nnx.relu(self.up(self.norm2(x))))


def block() -> tuple[nnx.Module, tuple[jax.Array]]:
    return Block(rngs=nnx.Rngs(0)), (jax.random.normal(jax.random.key(1), (3, 7, WIDTH)),)


def small(rows: int = 64) -> tuple[nnx.Module, tuple[jax.Array]]:
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(8, 32, rngs=rngs), nnx.relu, nnx.Linear(32, 4, rngs=rngs))
    return model, (jax.random.normal(jax.random.key(1), (rows, 8)),)


@functools.cache
def loaded(name: str, batch_size: int = 4) -> tuple[Any, tuple]:
    """A reference model and its inputs."""
    return reference.load(name, framework="jax", batch_size=batch_size)


def squares(outputs: Any, targets: jax.Array) -> jax.Array:
    return jnp.mean((outputs - targets) ** 2)


def work_of(model: Any, inputs: Any, mode: str = "inference", *, params: Any = None, optimizer: Any = None) -> Workload:
    """A workload; in training, squares towards 0 under Adam."""
    settings: dict[str, Any] = {"mode": mode, "loss": None, "targets": None, "optimizer": None, "seed": 0}
    jax_backend = backend("jax")
    if mode == "training":
        optimizer = optimizer or optax.adam(1e-3)
        settings |= {"loss": squares, "targets": jnp.float32(0), "optimizer": optimizer}
    return jax_backend.bind(model, params, inputs, **settings)


def compiled(work: Workload) -> Workload:
    """The same in inference, as one XLA program."""
    return work.replace(model=work.model.compiled_ahead())
