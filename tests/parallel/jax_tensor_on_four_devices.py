"""Run by test_jax_tensor.py in a process with four devices: models whole and split, and prints JSON."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax_on_four_devices import CASES, applied, bound, normal, off, params_of, trained

from perfkit._chain import chain_of
from perfkit.backends import backend

CHAINS = {"tensor": "tensor_parallel", "both": "data_parallel(2)+tensor_parallel(2)"}


def compare(name):
    make, inputs, targets, loss, terms = CASES[name]
    model = make(rngs=nnx.Rngs(0))
    whole = bound(model, inputs, targets, loss, optax.sgd(0.05, momentum=0.9))
    start = params_of(model)
    losses, expected, _, _ = trained(whole)
    found = {"losses": losses, "inference": infer(model, inputs)}
    for chain, recipe in CHAINS.items():
        work, _ = applied(whole, recipe)
        losses, params, traffic, _ = trained(work)
        found[chain] = {
            "losses": losses,
            "off": off(params, expected, start, terms),
            "told": traffic.sent_bytes.method,
            "parts": work.spread.parts,
        }
    found["unchanged"] = all(np.array_equal(value, start[name]) for name, value in params_of(model).items())
    return found


def inference(model, inputs, params=None):
    settings = {"mode": "inference", "loss": None, "targets": None, "optimizer": None, "seed": 0}
    return backend("jax").bind(model, params, inputs, **settings)


def infer(model, inputs):
    work = inference(model, inputs)
    spread, effect = applied(work, "tensor_parallel(4)")
    expected, finished = work.backend.outputs(work, work.backend.finish(work)), spread.backend.finish(spread)
    (wanted,), (output,) = expected, spread.backend.outputs(spread, finished)
    committed = jax.device_put(inputs, jax.devices()[0])
    return {
        "off": float(np.linalg.norm(output - wanted) / np.linalg.norm(wanted)),
        "committed": bool(np.array_equal(finished.call(*committed), output)),
        "whole": finished.call(*inputs).is_fully_replicated,
        "skipped": {item.name: item.reason for item in effect.skipped},
        "touched": effect.touched,
        "notes": effect.notes,
        "bytes": [spread.backend.size(spread)[0], work.backend.size(work)[0]],
    }


def shards():
    """How a plain function's weights are cut, whichever way round they are multiplied."""
    params = {"a": normal(8, 16), "b": normal(4, 16), "tied": normal(8, 4), "odd": normal(4, 6), "used": normal(4, 8)}

    def model(params, x):
        hidden = jnp.tanh(x @ params["a"]) @ params["b"].T
        return (hidden @ params["odd"]).sum() + hidden @ params["used"] + params["tied"].T.sum()

    chain = chain_of("tensor_parallel(4, exclude='used')")
    work, effect = applied(inference(model, (normal(3, 8),), params), chain)
    return {
        "skipped": {item.name: item.reason for item in effect.skipped},
        "parts": work.spread.parts,
        "shapes": {name: leaf.addressable_shards[0].data.shape for name, leaf in work.model.params.items()},
    }


if __name__ == "__main__":
    print(json.dumps({name: compare(name) for name in CASES} | {"shards": shards()}))
