"""Run by test_jax_pipeline.py in a process with four devices: models whole and in stages, and prints JSON."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import haste
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax_on_four_devices import CASES, STEPS, WIDTH, applied, bound, integers, normal, off, params_of, squared, trained

import perfkit
from perfkit._chain import chain_of
from perfkit.backends import backend
from perfkit.parallel import jax_checkpoint
from perfkit.parallel.gathering import gathered

CHAINS = {
    "pipeline": "pipeline_parallel(4)",
    "both": "pipeline_parallel(2)+data_parallel(2)",
    "shard": "pipeline_parallel(2)+data_parallel(2, shard=True)",
}
STATEFUL = {  # four micro-batches of four rows, however many pipelines there are
    "pipeline": "pipeline_parallel(4, micro_batches=4)",
    "both": "pipeline_parallel(2, micro_batches=2)+data_parallel(2)",
}


def compare(name):
    make, inputs, targets, loss, terms = CASES[name]
    model = make(rngs=nnx.Rngs(0))
    whole = bound(model, inputs, targets, loss, optax.sgd(0.05, momentum=0.9))
    start = params_of(model)
    losses, expected, _, finished = trained(whole)
    outputs, found = finished.call(*inputs), {"losses": losses, "moved": off(start, expected, start, terms)}
    for chain, recipe in CHAINS.items():
        if chain == "shard" and name != "text_lstm":
            continue
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
        def block(x, own):
            return x + jnp.tanh(x @ own["w"] + own["b"]), None

        return jax.lax.scan(block, x, params["blocks"])[0] @ params["head"]

    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.01))
    whole = bound(model, (normal(8, 16),), normal(8, 4), squared, optimizer, params)
    batch = whole.inputs, whole.training.targets
    works = whole, *(applied(whole, CHAINS[chain])[0] for chain in ("pipeline", "both", "shard"))
    one, four, two, shares = (work.backend.finish(work) for work in works)
    losses = [[float(each.train_step(batch)) for _ in range(STEPS)] for each in (one, four)]
    with tempfile.TemporaryDirectory() as folder:
        jax_checkpoint.write(Path(folder) / "four", four)
        jax_checkpoint.read(Path(folder) / "four", two)
        jax_checkpoint.write(Path(folder) / "two", two)
        jax_checkpoint.read(Path(folder) / "two", shares)
        jax_checkpoint.write(Path(folder) / "shares", shares)
        jax_checkpoint.read(Path(folder) / "shares", one)
    then = [float(each.train_step(batch)) for each in (four, two, shares, one)]
    parts = applied(whole, "pipeline_parallel(2, split_at='blocks[3]')+data_parallel(2)")[0].spread.parts
    return {"losses": losses, "then": then, "parts": parts, "params": jax.tree.map(jnp.shape, four.params())}


class Stateful(nnx.Module):
    """Dropout and batch norms between four layers."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(4)])
        self.norms = nnx.List([nnx.BatchNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.first, self.second = nnx.Dropout(0.3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        x = self.first(nnx.relu(self.norms[0](self.layers[0](x))))
        x = nnx.relu(self.norms[1](self.layers[1](x)))
        return self.layers[3](nnx.tanh(self.second(self.layers[2](x))))


class Counts(nnx.Module):
    """Counts the positive numbers that it has seen."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(4)])
        self.seen = nnx.BatchStat(jnp.int32(0))

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        self.seen[...] += (x > 0).sum()
        return x


def stateful():
    """Models that change state, against their micro-batches one after the other on one device."""
    model = Stateful(rngs=nnx.Rngs(0))
    optimizer = optax.sgd(0.1, momentum=0.9)
    whole = bound(model, (normal(16, WIDTH),), normal(16, WIDTH), squared, optimizer)
    start, found, all_finished = params_of(model), {}, []
    for chain, (pipelines, count) in {"pipeline": (1, 4), "both": (2, 2)}.items():
        work, effect = applied(whole, STATEFUL[chain])
        losses, params, _, finished = trained(work)
        wanted = in_turn(whole, pipelines, count)
        x = whole.inputs.args[0]
        finished.model.eval()
        twin = nnx.merge(whole.model.graphdef, *wanted["state"])
        twin.eval()
        new, old = jax.tree.leaves(nnx.state(finished.model, nnx.Not(nnx.Param))), jax.tree.leaves(wanted["state"][1])
        found[chain] = {
            "losses": [losses, wanted["losses"]],
            "off": off(params, params_of(twin), start, 16),
            "moved": off(start, params_of(twin), start, 16),
            "state": [_distance(mine, own) for mine, own in zip(new, old, strict=True)],
            "outputs": _distance(finished.call(x), twin(x)),
            "notes": effect.notes,
        }
        all_finished.append(finished)
    fresh = work.backend.finish(work)
    with tempfile.TemporaryDirectory() as folder:
        jax_checkpoint.write(Path(folder) / "four", all_finished[0])
        jax_checkpoint.read(Path(folder) / "four", fresh)
    batch = whole.inputs, whole.training.targets
    found["then"] = [float(each.train_step(batch)) for each in (*all_finished, fresh)]
    return found


def _distance(found, expected):
    """Of numbers, as a share of the largest; of keys and counters whether they differ."""
    if jax.dtypes.issubdtype(found.dtype, jax.dtypes.prng_key):
        found, expected = map(jax.random.key_data, (found, expected))
    found, expected = np.asarray(found), np.asarray(expected)
    if found.dtype.kind != "f":
        return float(not np.array_equal(found, expected))
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def in_turn(work, pipelines, count):
    """Losses and state of training in micro-batches, of which each begins with what the one before it left.

    Running statistics go on along the micro-batches of one pipeline, and are averaged after the step.
    """
    model, optimizer, (x,) = work.model, work.training.optimizer, work.inputs.args
    function, (params, rest) = model.function(), (model.params, model.rest)
    moments, losses, parts = optimizer.init(params), [], pipelines * count

    def loss_of(params, rest, x, targets):
        outputs, new = function(params, rest, x)
        return squared(outputs, targets), new

    def is_float(leaf):
        return jnp.issubdtype(leaf.dtype, jnp.floating)

    step = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
    for _ in range(STEPS):
        statistics, each, total = [rest] * pipelines, [], None
        for part, (rows, targets) in enumerate(
            zip(np.split(x, parts), np.split(work.training.targets, parts), strict=True)
        ):
            pipeline = part // count
            given = jax.tree.map(lambda old, own: own if is_float(old) else old, rest, statistics[pipeline])
            (loss, rest), gradients = step(params, given, rows, targets)
            statistics[pipeline] = rest
            each.append(float(loss))
            total = gradients if total is None else jax.tree.map(jnp.add, total, gradients)
        averaged = jax.tree.map(
            lambda *leaves: sum(leaves) / pipelines if is_float(leaves[0]) else leaves[-1], *statistics
        )
        rest = averaged
        updates, moments = optimizer.update(jax.tree.map(lambda leaf: leaf / parts, total), moments, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(np.mean(each)))
    return {"losses": losses, "state": (params, rest)}


def accumulated():
    """Losses where `accumulate` cuts the batch first, and those of one device."""
    make, inputs, targets, loss, _ = CASES["transformer"]
    whole = bound(make(rngs=nnx.Rngs(0)), inputs, targets, loss, optax.sgd(0.05, momentum=0.9))
    work, _ = applied(whole, "accumulate(2)+pipeline_parallel(2)+data_parallel(2)")
    return {"losses": [trained(each)[0] for each in (work, whole)], "parts": work.spread.parts}


def inference():
    """Outputs of models in stages, called by themselves and in a program, and with other weights; and those of one."""
    found = {}
    for name, (make, inputs, *_) in CASES.items():
        model = make(rngs=nnx.Rngs(0))
        whole = backend("jax").bind(
            model, None, inputs, mode="inference", loss=None, targets=None, optimizer=None, seed=0
        )
        work, effect = applied(whole, "pipeline_parallel(4)")
        finished, one = work.backend.finish(work), whole.backend.finish(whole)
        expected, outputs = one.call(*inputs), finished.call(*inputs)
        held = jax.tree.leaves(nnx.state(finished.model, nnx.Param))
        found[name] = {
            "off": _distance(outputs, expected),
            "in a program": _distance(jax.jit(finished.call)(*inputs), expected),
            "devices": len({next(iter(leaf.devices())) for leaf in held}),
            "stages": sum(map(bool, work.model.placement.cuts.owned)),
            "same": isinstance(finished.model, type(model)),
            "sent": work.backend.traffic(work, finished).sent_bytes.method,
            "notes": effect.notes,
        }
        for each in (finished.model, one.model):
            nnx.update(each, jax.tree.map(lambda leaf: np.asarray(leaf) * 2, nnx.state(each, nnx.Param)))
        found[name]["changed"] = _distance(finished.call(*inputs), one.call(*inputs))
    return found


def inference_of_a_function():
    """`optimize` from its way in to its report, of a function over stacked blocks; its params and others."""
    params, x = {"blocks": {"w": normal(8, 16, 16) / 8}, "head": normal(16, 4)}, normal(8, 16)

    def model(params, x):
        return jax.lax.scan(lambda x, own: (x + jnp.tanh(x @ own["w"]), None), x, params["blocks"])[0] @ params["head"]

    result = perfkit.optimize(model, "pipeline_parallel(4)", params=params, example_inputs=(x,))
    others = jax.tree.map(lambda leaf: leaf * 2, params)
    report = result.report.to_dict()

    def by_inputs(of):
        return jax.grad(lambda x: jnp.sin(of(others, x)).sum())

    return {
        "own": _distance(result(x), model(params, x)),
        "given": _distance(result.model(result.params, x), model(params, x)),
        "others": _distance(result.model(others, x), model(others, x)),
        "own after others": _distance(result(x), model(params, x)),
        "params after others": _distance(result.params["head"], params["head"]),
        "own again": _distance(result.model(params, x), model(params, x)),
        "in a program": _distance(jax.jit(result.model)(others, x), model(others, x)),
        "by inputs": _distance(jax.jit(by_inputs(result.model))(x), by_inputs(model)(x)),
        "fidelity": report["fidelity"]["relative_error"],
        "bytes": report["parallel"]["rank_model_bytes"],
    }


def keyed():
    """The outputs of equal micro-batches where random numbers come from a key among the inputs, and what is told."""
    params = {name: normal(4, 4) for name in "abcd"}

    def model(params, x, key):
        x = x @ params["a"]
        x = x * jax.random.bernoulli(key, 0.5, x.shape)
        for name in "bcd":
            x = jnp.tanh(x @ params[name])
        return x

    inputs = np.ones((8, 4), np.float32), jax.random.key(1)
    work = backend("jax").bind(model, params, inputs, mode="inference", loss=None, targets=None, optimizer=None, seed=0)
    work, effect = applied(work, "pipeline_parallel(4, micro_batches=4)")
    outputs = work.backend.finish(work).call(*inputs)
    one = model(params, inputs[0][:2], inputs[1])
    found = {"off": _distance(outputs, jnp.tile(one, (4, 1))), "notes": effect.notes}

    def keyed_first(params, key, x):
        return (
            jnp.tanh(x @ params["a"] * jax.random.bernoulli(key, 0.5, (4,))) @ params["b"] @ params["c"] @ params["d"]
        )

    inputs = jax.random.PRNGKey(1), normal(8, 4)  # two numbers, and no typed key
    whole = bound(keyed_first, inputs, normal(8, 4), squared, optax.sgd(0.01), params)
    works = whole, applied(whole, "pipeline_parallel(4)")[0], applied(whole, CHAINS["both"])[0]
    finished = [work.backend.finish(work) for work in works]
    batch = whole.inputs, whole.training.targets
    return found | {"first": [[float(each.train_step(batch)) for _ in range(STEPS)] for each in finished]}


def refused(recipe, work):
    try:
        chain_work, _ = applied(work, recipe)
    except perfkit.PerfkitError as error:
        return str(error)
    return str(chain_work.spread)


def refusals():
    def model(params, x):
        return jnp.tanh(x @ params["a"]) @ params["b"]

    params = {"a": normal(4, 8), "b": normal(8, 2)}
    work = bound(model, (normal(8, 4),), normal(8, 2), squared, optax.adam(0.1), params)
    looks = bound(model, (normal(8, 4),), normal(8, 2), squared, optax.adafactor(0.1), params)
    total = bound(
        lambda params, x: model(params, x).sum(), (normal(8, 4),), jnp.float32(0), squared, optax.sgd(1.0), params
    )
    counts = bound(Counts(rngs=nnx.Rngs(0)), (normal(8, 4),), normal(8, 4), squared, optax.sgd(1.0))
    ids = bound(
        lambda params, x: params["a"][x] @ params["b"], (integers(4, 8),), normal(8, 2), squared, optax.sgd(0.1), params
    )
    tied = bound(
        lambda params, x: jnp.tanh(params["a"][x] @ params["b"]) @ params["a"].T,
        (integers(4, 8),),
        normal(8, 4),
        squared,
        optax.sgd(0.1),
        params | {"b": normal(8, 8)},
    )
    found = {
        "few": refused("pipeline_parallel(4)", ids),
        "tied": refused("pipeline_parallel(4)", tied),
        "split": refused("pipeline_parallel(2, split_at='c')+data_parallel(2)", work),
        "optimizer": refused("pipeline_parallel(2)+data_parallel(2)", looks),
        "state": refused("pipeline_parallel(4)", counts),
        "rows": refused("pipeline_parallel(2)+data_parallel(2)", total),
    }
    for name, recipe, given in (
        ("schedule", "pipeline_parallel(4, schedule='1f1b')", work),
        ("stages", "pipeline_parallel(2, stages=4)+data_parallel(2)", work),
        ("tensor", "pipeline_parallel(2)+tensor_parallel(2)", work),
        ("rounds", "pipeline_parallel(2)+local_sgd(2)", work),
        ("accumulate", "pipeline_parallel(4)", work.replace(training=replace(work.training, micro_batches=4))),
        ("dims", "pipeline_parallel(4)", work.replace(training=replace(work.training, micro_batches=2, batch_dim=1))),
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
    haste.begin()
    told = {name: compare(name) for name in CASES}
    told |= {"blocks": blocks(), "stateful": stateful(), "accumulated": accumulated(), "inference": inference()}
    told |= {"function": inference_of_a_function(), "keyed": keyed(), "refusals": refusals()}
    print(json.dumps(told))
