"""Run by test_jax_tensor.py in a process with four devices: attention and scans, whole and in parts; prints JSON."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx
from jax_on_four_devices import applied, normal

from perfkit.backends import backend
from perfkit.parallel.jax_collectives import collectives

BATCH, LENGTH, WIDTH, HEADS = 4, 6, 16, 4
DIM = WIDTH // HEADS


class Nnx(nnx.Module):
    def __init__(self, *, rngs):
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)

    def __call__(self, x):
        return self.attention(x)


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.MultiHeadDotProductAttention(HEADS)(x, x)


class Recurrent(nnx.Module):
    def __init__(self, cell, *, rngs):
        self.rnn = nnx.RNN(cell(WIDTH, WIDTH, rngs=rngs), rngs=False)

    def __call__(self, x):
        return self.rnn(x, initial_carry=(jnp.zeros((BATCH, WIDTH)),) * 2)


def three(how):
    """Functions with one weight for queries, keys and values: as blocks, beside each other, or in a dimension."""
    shapes = {"blocks": (WIDTH, 3 * WIDTH), "beside": (WIDTH, 3 * WIDTH), "own": (WIDTH, 3, HEADS, DIM)}

    def attend(params, x):
        y = jnp.tensordot(x, params["qkv"], 1)
        if how == "blocks":
            q, k, v = (part.reshape(*x.shape[:2], HEADS, DIM) for part in jnp.split(y, 3, -1))
        elif how == "beside":
            q, k, v = jnp.split(y.reshape(*x.shape[:2], HEADS, 3 * DIM), 3, -1)
        else:
            q, k, v = y[:, :, 0], y[:, :, 1], y[:, :, 2]
        weights = jax.nn.softmax(jnp.einsum("blhd,bshd->bhls", q, k) / DIM**0.5)
        y = jnp.einsum("bhls,bshd->blhd", weights, v).reshape(x.shape)
        return y @ params["out"]

    return attend, {"qkv": jnp.asarray(normal(*shapes[how]) / 4), "out": jnp.asarray(normal(WIDTH, WIDTH) / 4)}


def compare(model, params, chain="tensor_parallel(4)"):
    """Outputs and gradients in parts against those of one device; and what the programs send."""
    x = normal(BATCH, LENGTH, WIDTH)
    about = {"mode": "training", "loss": lambda y, t: jnp.mean((y - t) ** 2), "targets": x, "optimizer": optax.sgd(0.1)}
    work = backend("jax").bind(model, params, (x,), seed=0, **about)
    spread, effect = applied(work, chain)

    def both(work):
        function = work.model.function()
        args = work.model.placement.batch((x,))

        def loss(params, rest, x):
            return jnp.mean((function(params, rest, x)[0] - x) ** 2)

        lies = jax.tree.map(lambda leaf: leaf.sharding, work.model.params)
        step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, lies) if work is spread else None)
        forward = jax.jit(lambda params, rest, x: function(params, rest, x)[0])
        given = (work.model.params, work.model.rest, *args)
        return forward(*given), step(*given)[1], [call.lower(*given).compile().as_text() for call in (forward, step)]

    (expected, gradients, _), (found, parts, programs) = both(work), both(spread)

    def off(a, b):
        return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())

    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients))
    differences = jax.tree.map(
        lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()) / largest, parts, gradients
    )
    return {
        "off": off(found, expected),
        "gradients": max(jax.tree.leaves(differences)),
        "parts": spread.spread.parts,
        "skipped": {item.name: item.reason for item in effect.skipped},
        "sent": [
            [[item.kind, item.runs, item.looped, item.bytes] for item in collectives(program, 4)]
            for program in programs
        ],
        "notes": effect.notes,
    }


def main():
    found = {"nnx": compare(Nnx(rngs=nnx.Rngs(0)), None)}
    found["linen"] = compare(Linen(), Linen().init(jax.random.key(0), normal(BATCH, LENGTH, WIDTH)))
    for how in ("blocks", "beside", "own"):
        found[how] = compare(*three(how))
    for cell in (nnx.LSTMCell, nnx.OptimizedLSTMCell):
        model = Recurrent(cell, rngs=nnx.Rngs(0))
        found[cell.__name__] = compare(model, None, "tensor_parallel(4, recurrent=True)")
        alone = {"mode": "inference", "loss": None, "targets": None, "optimizer": None, "seed": 0}
        work = backend("jax").bind(model, None, (normal(BATCH, LENGTH, WIDTH),), **alone)
        reasons = {item.reason for item in applied(work, "tensor_parallel(4)")[1].skipped}
        found[cell.__name__]["whole"] = sorted(reasons)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
