"""Run twice by test_jax_data.py, as a launcher would: two processes with two devices each train together; JSON."""

from __future__ import annotations

import json

import haste
import jax
import jax.numpy as jnp
import numpy as np
import optax

import perfkit
from perfkit.parallel import jax_world

STEPS = 3


def squared(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


def trained(recipe, w, x, y):
    result = perfkit.optimize(
        lambda params, x: x @ params["w"],
        recipe,
        params={"w": w},
        mode="training",
        example_inputs=(x,),
        targets=y,
        loss=squared,
        optimizer=optax.sgd(0.1),
    )
    return {
        "losses": [float(result.train_step((x, y))) for _ in range(STEPS)],
        "parallel": result.report.to_dict()["parallel"],
        "ok": result.report.fidelity.ok,
        "parts": [list(shard.data.shape) for shard in result.params["w"].addressable_shards],
    }


def in_stages(x, y):
    """A pipeline through both processes, each of which shares the batch out among its devices."""
    params = {"first": np.eye(8, 5, dtype=np.float32), "second": np.full((5, 2), 0.1, np.float32)}
    result = perfkit.optimize(
        lambda params, x: jnp.tanh(x @ params["first"]) @ params["second"],
        "pipeline_parallel(2)+data_parallel(2)",
        params=params,
        mode="training",
        example_inputs=(x,),
        targets=y,
        loss=squared,
        optimizer=optax.adam(0.1),
    )
    losses = [float(result.train_step((x, y))) for _ in range(STEPS)]
    report = result.report
    return {
        "losses": losses,
        "one": report.losses.before[:STEPS],
        "parallel": report.to_dict()["parallel"],
        "loss of params": float(squared(result.model(result.params, x), y)),
        "next": float(result.train_step((x, y))),
    }


def called_in_stages(x):
    """By how much outputs of a pipeline through both processes are off: on its own parameters, as given, on others."""
    random = np.random.default_rng(1)
    params = {name: random.normal(size=(8, 8)).astype(np.float32) / 4 for name in "abcd"}

    def model(params, x):
        for name in "abcd":
            x = jnp.tanh(x @ params[name])
        return x

    result = perfkit.optimize(model, "pipeline_parallel(4)", params=params, example_inputs=(x,))
    others = {name: leaf * 2 for name, leaf in params.items()}
    pairs = (
        (result(x), model(params, x)),
        (result.model(result.params, x), model(params, x)),
        (result.model(others, x), model(others, x)),
    )
    return [float(jnp.abs(found - expected).max() / jnp.abs(expected).max()) for found, expected in pairs]


if __name__ == "__main__":
    haste.begin()
    jax_world.join()
    random = np.random.default_rng(0)
    w, x, y = (random.normal(size=size).astype(np.float32) for size in ((8, 2), (12, 8), (12, 2)))
    found = {
        "devices": [jax.local_device_count(), jax.device_count()],
        "jit": trained("data_parallel(shard=True)", w, x, y),
        "pmap": trained("data_parallel(engine='pmap')", w, x, y),
        "stages": in_stages(x, y),
        "called": called_in_stages(x),
        "local": trained("local_sgd(sync_every=1)", w, x, y),
        "expected": [],
    }
    for _ in range(STEPS):
        error = x @ w - y
        found["expected"].append(float(np.mean(error**2)))
        w = w - 0.1 * 2 * x.T @ error / error.size
    print(json.dumps(found))
