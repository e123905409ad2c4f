"""The models of `bench.plan` in both frameworks, with all that their training steps need."""

from __future__ import annotations

import functools
from typing import Any

from perfkit import reference
from perfkit._workload import Workload
from perfkit.backends import backend

MODELS = ("cnn2", "text_lstm", "transformer")
BATCH_SIZE, POSITIONS, WIDTH, HEADS, CLASSES = 64, 64, 128, 4, 10
LEARNING_RATE = 1e-3


def workload(framework: str, name: str) -> Workload:
    """A model in a batch of 64 rows, with Adam."""
    if name == "transformer":
        model, inputs, targets, loss = _in_torch() if framework == "torch" else _in_jax()
    else:
        task = reference.task(name, framework=framework, batch_size=BATCH_SIZE)
        model, inputs, targets, loss = task.model, task.example_inputs, task.targets, task.loss
    about = {"mode": "training", "loss": loss, "targets": targets, "optimizer": _adam(framework), "seed": 0}
    return backend(framework).bind(model, None, inputs, **about)


def _adam(framework: str) -> Any:
    if framework == "torch":
        import torch

        return functools.partial(torch.optim.Adam, lr=LEARNING_RATE)
    import optax

    return optax.adam(LEARNING_RATE)


def _in_torch() -> tuple[Any, Any, Any, Any]:
    """One block of a transformer, and a linear layer that reads all positions."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(POSITIONS * WIDTH, CLASSES))
    inputs, targets = torch.randn(BATCH_SIZE, POSITIONS, WIDTH), torch.randint(0, CLASSES, (BATCH_SIZE,))
    return model, (inputs,), targets, nn.functional.cross_entropy


def _in_jax() -> tuple[Any, Any, Any, Any]:
    """The same."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    class Transformer(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.attention = nnx.MultiHeadAttention(num_heads=HEADS, in_features=WIDTH, decode=False, rngs=rngs)
            self.norm1, self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
            self.up, self.down = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
            self.head = nnx.Linear(POSITIONS * WIDTH, CLASSES, rngs=rngs)

        def __call__(self, x):
            x = self.norm1(x + self.attention(x))
            x = self.norm2(x + self.down(nnx.relu(self.up(x))))
            return self.head(x.reshape(x.shape[0], -1))

    def loss(scores, labels):
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

    inputs = jax.random.normal(jax.random.key(0), (BATCH_SIZE, POSITIONS, WIDTH))
    return Transformer(nnx.Rngs(0)), (inputs,), jnp.arange(BATCH_SIZE) % CLASSES, loss
