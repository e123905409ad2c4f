"""Run by test_jax_pipeline.py in a process with four devices: models whole and in stages, and prints JSON."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax_on_four_devices import CASES, STEPS, Noisy, applied, bound, integers, normal, off, params_of, squared, trained

import perfkit
from perfkit._recipe import chain_of
from perfkit.parallel import jax_checkpoint
from perfkit.parallel.gathering import gathered

CHAINS = {"pipeline": "pipeline_parallel(4)", "both": "pipeline_parallel(2)+data_parallel(2)"}


def compare(name):
    make, inputs, targets, loss, terms = CASES[name]
    model = make(rngs=nnx.Rngs(0))
    whole = bound(model, inputs, targets, loss, optax.sgd(0.05, momentum=0.9))
    start = params_of(model)
    losses, expected, _, finished = trained(whole)
    outputs, found = finished.call(*inputs), {"losses": losses, "moved": off(start, expected, start, terms)}
    for chain, recipe in CHAINS.items():
        work, effect = applied(whole, recipe)
        losses, params, traffic, finished = trained(work)
        stages = work.model.placement.cuts.owned
        call = jax.jit(finished.call) if chain == "both" else finished.call
        found[chain] = {
            "losses": losses,
            "off": off(params, expected, start, terms),
            "outputs": float(jnp.abs(call(*inputs) - outputs).max() / jnp.abs(outputs).max()),
            "told": traffic.sent_bytes.method,
            "spread": [work.spread.parts, work.spread.balance, work.spread.bubble],
            "bytes": [work.backend.size(work)[0], whole.backend.size(whole)[0]],
            "devices": len({next(iter(leaf.devices())) for leaf in jax.tree.leaves(nnx.state(finished.model))}),
            "owned": sorted(number for each in stages for number in each),
            "notes": effect.notes,
        }
    found["unchanged"] = all(np.array_equal(value, start[name]) for name, value in params_of(model).items())
    return found


def blocks():
    """A function over stacked blocks, clipped Adam; a checkpoint goes on in another number of stages, and in none."""
    params = {"blocks": {"w": normal(8, 16, 16) / 8, "b": normal(8, 16) / 8}, "head": normal(16, 4)}

    def model(params, x):
        block = lambda x, own: (x + jnp.tanh(x @ own["w"] + own["b"]), None)  # noqa: E731
        return jax.lax.scan(block, x, params["blocks"])[0] @ params["head"]

    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.01))
    whole = bound(model, (normal(8, 16),), normal(8, 4), squared, optimizer, params)
    batch = whole.inputs, whole.training.targets
    one, four, two = (
        work.backend.finish(work)
        for work in (whole, applied(whole, CHAINS["pipeline"])[0], applied(whole, CHAINS["both"])[0])
    )
    losses = [[float(each.train_step(batch)) for _ in range(STEPS)] for each in (one, four)]
    with tempfile.TemporaryDirectory() as folder:
        jax_checkpoint.write(Path(folder) / "four", four)
        jax_checkpoint.read(Path(folder) / "four", two)
        jax_checkpoint.write(Path(folder) / "two", two)
        jax_checkpoint.read(Path(folder) / "two", one)
    then = [float(each.train_step(batch)) for each in (four, two, one)]
    parts = applied(whole, "pipeline_parallel(2, split_at='blocks[3]')+data_parallel(2)")[0].spread.parts
    return {"losses": losses, "then": then, "parts": parts, "params": jax.tree.map(jnp.shape, four.params())}


def refused(recipe, work):
    try:
        chain_work, _ = applied(work, recipe)
    except perfkit.PerfkitError as error:
        return str(error)
    return str(chain_work.spread)


def refusals():
    model = lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"]  # noqa: E731
    params = {"a": normal(4, 8), "b": normal(8, 2)}
    work = bound(model, (normal(8, 4),), normal(8, 2), squared, optax.adam(0.1), params)
    looks = bound(model, (normal(8, 4),), normal(8, 2), squared, optax.adafactor(0.1), params)
    total = bound(
        lambda params, x: model(params, x).sum(), (normal(8, 4),), jnp.float32(0), squared, optax.sgd(1.0), params
    )
    noisy = bound(Noisy(rngs=nnx.Rngs(0)), (np.ones((8, 1000), np.float32),), normal(8, 1000), squared, optax.sgd(1.0))
    ids = bound(
        lambda params, x: params["a"][x] @ params["b"], (integers(4, 8),), normal(8, 2), squared, optax.sgd(0.1), params
    )
    found = {
        "few": refused("pipeline_parallel(4)", ids),
        "split": refused("pipeline_parallel(2, split_at='c')+data_parallel(2)", work),
        "optimizer": refused("pipeline_parallel(2)+data_parallel(2)", looks),
        "state": refused("pipeline_parallel(4)", noisy),
        "rows": refused("pipeline_parallel(2)+data_parallel(2)", total),
    }
    for name, recipe, given in (
        ("schedule", "pipeline_parallel(4, schedule='1f1b')", work),
        ("stages", "pipeline_parallel(2, stages=4)+data_parallel(2)", work),
        ("tensor", "pipeline_parallel(2)+tensor_parallel(2)", work),
        ("shard", "pipeline_parallel(2)+data_parallel(2, shard=True)", work),
        ("inference", "pipeline_parallel(4)", work.replace(mode="inference", training=None)),
    ):
        chain = chain_of(recipe)
        found[name] = next(filter(None, (step.refusal(gathered(given, chain)) for step in chain)))
    finished = work.backend.finish(applied(work, "pipeline_parallel(2)+data_parallel(2)")[0])
    try:
        finished.train_step((normal(6, 4), normal(6, 2)))
    except perfkit.InvalidInputError as error:
        found["odd"] = str(error)
    return found


if __name__ == "__main__":
    print(json.dumps({name: compare(name) for name in CASES} | {"blocks": blocks(), "refusals": refusals()}))
