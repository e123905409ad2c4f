"""Run by test_jax_low_bit.py in a process with four devices: moments in few bits there and on one; prints JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax_on_four_devices import applied, bound, normal, squared

from perfkit.memory.jax_few_bits import Held
from perfkit.memory.jax_low_bit import state_in_full
from perfkit.parallel import jax_checkpoint

BATCH, STEPS = 8, 6
X, Y = normal(BATCH, 64), normal(BATCH, 32)
# Along the first dimension of one and the second of the other is most: each is shared out along that.
PARAMS = {"wide": normal(64, 1024) / 8, "long": normal(1024, 32) / 32, "bias": normal(32)}


def model(params, x):
    return jnp.tanh(x @ params["wide"]) @ params["long"] + params["bias"]


def trained(recipe, steps=STEPS):
    work = bound(model, (X,), Y, squared, optax.adam(1e-2), jax.tree.map(jnp.asarray, PARAMS))
    work, _ = applied(work, f"low_bit_optimizer+{recipe}" if recipe else "low_bit_optimizer")
    finished = work.backend.finish(work)
    return finished, [float(finished.train_step((X, Y))) for _ in range(steps)]


def held_bytes(finished):
    """Bytes of codes and scales on the first device."""
    found = {"codes": 0, "scales": 0}
    for leaf in jax.tree.leaves(finished.trainer.state[2], is_leaf=lambda node: isinstance(node, Held)):
        if isinstance(leaf, Held):
            for name in found:
                found[name] += getattr(leaf, name).addressable_shards[0].data.nbytes
    return found


def compared(recipe):
    finished, losses = trained(recipe)
    return {"losses": losses, "held": held_bytes(finished)}


def averaged():
    """How far averaged moments are from the mean of what the devices had, and how far rounding may bring them."""
    apart, _ = trained("local_sgd(sync_every=3, average_state=True)", 2)
    moments = in_each(apart.trainer.state[2])
    expected = np.mean(moments, axis=0)
    apart.rounds.settle()
    found = in_each(apart.trainer.state[2])[0]
    return {
        "off": float(np.abs(found - expected).max()),
        "step": float(np.abs(expected).max()) * 0.9 / 64 / 2 * 1.01,  # half of the coarsest step of a signed moment
        "apart": float(np.abs(moments[0] - moments[1]).max()),
    }


def in_each(state):
    """The first moment of "wide" on each device, in full.

    On one device: operations one by one on four would have several programs wait for each other's devices at once.
    """
    held = jax.device_get(state)
    return [
        np.asarray(state_in_full(jax.tree.map(lambda leaf, at=at: jnp.asarray(leaf[at]), held))[0].mu["wide"])
        for at in range(4)
    ]


def resumed(folder: Path):
    """Losses after a checkpoint of sharded training, on four devices and on one."""
    four, _ = trained("data_parallel(shard=True)")
    jax_checkpoint.write(folder / "state", four)
    one, _ = trained("", 0)
    jax_checkpoint.read(folder / "state", one)
    return {
        name: [float(side.train_step((X, Y))) for _ in range(3)] for name, side in {"four": four, "one": one}.items()
    }


if __name__ == "__main__":
    recipes = ("data_parallel", "data_parallel(shard=True)", "data_parallel(engine='pmap')")
    found = {recipe: compared(recipe) for recipe in recipes} | {"one": compared("")}
    found |= {"averaged": averaged(), "resumed": resumed(Path(os.environ["CHECKPOINTS"]))}
    print(json.dumps(found))
