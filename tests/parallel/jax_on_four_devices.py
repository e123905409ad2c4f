"""Run by test_jax_data.py in a process with four devices: trains on one and on all of them, and prints JSON."""

from __future__ import annotations

import json

import haste
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import perfkit
from perfkit._chain import chain_of
from perfkit.backends import backend
from perfkit.parallel.gathering import gathered
from perfkit.reference._in_jax import binary_cross_entropy, cross_entropy
from perfkit.reference.flax_models import CNN2, TextLSTM

STEPS, BATCH, WIDTH = 5, 8, 16
ENGINES = {
    "jit": "data_parallel",
    "shard": "data_parallel(shard=True)",
    "pmap": "compile+data_parallel(engine='pmap')",
}
RANDOM = np.random.default_rng(0)


class Block(nnx.Module):
    """One block of a transformer, and a linear layer that reads its first position."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=WIDTH, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, x):
        """x: (B, T, WIDTH). Returns class scores: (B, 10)."""
        x = x + self.attention(self.norm1(x))
        x = x + self.down(nnx.relu(self.up(self.norm2(x))))
        return self.head(x[:, 0])


class Noisy(nnx.Module):
    """Dropout before one weight a feature, and a batch norm."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.dropout, self.norm = nnx.Dropout(0.5, rngs=rngs), nnx.BatchNorm(1000, rngs=rngs)
        self.weight = nnx.Param(jnp.ones(1000))

    def __call__(self, x):
        self.norm(x)
        return self.dropout(x) * self.weight


def normal(*size):
    return RANDOM.normal(size=size).astype(np.float32)


def integers(high, *size, low=0, dtype=np.int32):
    return RANDOM.integers(low, high, size).astype(dtype)


def squared(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


# Each with the terms of the longest sum that is added up in another order: over rows, and places in an image or text.
CASES = {
    "cnn2": (CNN2, (normal(BATCH, 28, 28, 1),), integers(10, BATCH), cross_entropy, BATCH * 28 * 28),
    "text_lstm": (
        lambda rngs: TextLSTM(52, 8, 16, rngs=rngs),
        (integers(52, BATCH, 6), integers(7, BATCH, low=1)),
        integers(2, BATCH, 1, dtype=np.float32),
        binary_cross_entropy,
        BATCH * 6,
    ),
    "transformer": (Block, (normal(BATCH, 6, WIDTH),), integers(10, BATCH), cross_entropy, BATCH * 6),
}


def bound(model, inputs, targets, loss, optimizer, params=None):
    return backend("jax").bind(
        model, params, inputs, mode="training", loss=loss, targets=targets, optimizer=optimizer, seed=0
    )


def applied(work, recipe):
    """The workload with each recipe of the chain applied, and the last one's effect."""
    chain, effect = chain_of(recipe), None
    work = gathered(work, chain)
    for step in chain:
        work, effect = step.jax(work)
    return work, effect


def trained(work):
    """Losses of some steps, the parameters after them, and what is told of the program."""
    finished = work.backend.finish(work)
    batch = work.inputs, work.training.targets
    losses = [float(finished.train_step(batch)) for _ in range(STEPS)]
    traffic = work.backend.traffic(work, finished)
    return losses, params_of(finished.model), traffic, finished


def params_of(model):
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(model, nnx.Param))
    }


def off(found, expected, start, terms):
    """By how much parameters differ, as a share of what rounding may do: above 1 is wrong.

    A sum of `terms` numbers in another order is off by about √terms · 2⁻²⁴ of what it adds up, in each step; the sum of
    a parameter and its update is rounded once in each. What is added up is bounded by the update of all parameters: of
    one alone (the bias of an attention's keys) terms may cancel to nothing but their rounding.
    """
    moved = np.sqrt(sum(np.linalg.norm(value - start[name]) ** 2 for name, value in expected.items()))
    sums = np.sqrt(terms) * moved
    return max(
        float(np.linalg.norm(found[name] - value) / (STEPS * 2.0**-24 * (sums + np.linalg.norm(value))))
        for name, value in expected.items()
    )


def compare(name):
    make, inputs, targets, loss, terms = CASES[name]
    model = make(rngs=nnx.Rngs(0))
    work = bound(model, inputs, targets, loss, optax.sgd(0.05, momentum=0.9))
    start = params_of(model)
    losses, expected, _, finished = trained(work)
    devices = {str(device) for leaf in jax.tree.leaves(nnx.state(finished.model)) for device in leaf.devices()}
    found = {"one": {"losses": losses, "devices": sorted(devices)}, "moved": off(start, expected, start, terms)}
    for engine, recipe in ENGINES.items():
        spread, effect = applied(work, recipe)
        losses, params, traffic, finished = trained(spread)
        found[engine] = {
            "losses": losses,
            "off": off(params, expected, start, terms),
            "sent": traffic.sent_bytes.value,
            "told": traffic.sent_bytes.method,
            "bytes": spread.backend.size(spread),
            "skipped": [[item.name, item.reason] for item in effect.skipped],
            "parts": spread.spread.parts,
        }
    found["unchanged"] = all(np.array_equal(value, start[name]) for name, value in params_of(model).items())
    return found


def shards():
    """Shapes of each array of the training's state and of the parts that devices hold, before and after a step."""
    from perfkit.backends.jax_training import Trainer

    params = {"wide": normal(16, 64), "long": normal(64, 10), "bias": normal(10)}
    work = bound(
        lambda params, x: x @ params["wide"] @ params["long"] + params["bias"],
        (normal(BATCH, 16),),
        normal(BATCH, 10),
        squared,
        optax.adam(1e-3),
        params,
    )
    work, _ = applied(work, ENGINES["shard"])
    trainer = Trainer(work)
    before = _shapes(trainer.state)
    with trainer.keeping_state():
        trainer.step(work.inputs, work.training.targets)
        after = _shapes(trainer.state)
    return {"before": before, "after": after, "kept": _shapes(trainer.state)}


def _shapes(state):
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): [
            list(leaf.shape),
            sorted(list(shard.data.shape) for shard in leaf.addressable_shards),
        ]
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def two_axes():
    """Losses where another recipe has laid a weight along an axis of its own before, and those of one device."""
    from jax.sharding import NamedSharding, PartitionSpec

    from perfkit.parallel.jax_mesh import mesh_of
    from perfkit.parallel.layout import Layout

    params = {"w": normal(4, 6)}
    one = bound(
        lambda params, x: x @ params["w"], (normal(BATCH, 4),), normal(BATCH, 6), squared, optax.sgd(0.1), params
    )
    work = one.replace(layout=Layout(("data", "tensor"), (2, 2)))
    (recipe,) = chain_of(ENGINES["shard"])
    across = NamedSharding(mesh_of(work.layout), PartitionSpec(None, "tensor"))
    work = work.replace(model=work.model.with_state(jax.device_put(work.model.params, across), work.model.rest))
    work, _ = recipe.jax(work)
    refused = type(recipe)(engine="pmap").refusal(work)
    batch = work.inputs, work.training.targets
    steps = [finished.train_step for finished in (one.backend.finish(one), work.backend.finish(work))]
    losses = [[float(step(batch)) for _ in range(2)] for step in steps]
    return {"losses": losses, "parts": _shapes(work.model.params), "refused": refused}


def noise():
    """The share of weights that no device's dropout let through, when all devices see the same row."""
    work = bound(Noisy(rngs=nnx.Rngs(0)), (np.ones((4, 1000), np.float32),), normal(4, 1000), squared, optax.sgd(1.0))
    spread, effect = applied(work, ENGINES["pmap"])
    finished = spread.backend.finish(spread)
    finished.train_step((work.inputs, work.training.targets))
    return {"still": float((finished.model.weight[...] == 1).mean()), "notes": effect.notes}


def refusals():
    """Messages of what is refused, by what was asked."""
    work = bound(lambda params, x: x @ params, (normal(8, 4),), normal(8, 2), squared, optax.sgd(0.1), normal(4, 2))
    found = {}
    for recipe in (
        "data_parallel(compress=True)",
        "data_parallel(shard=True, offload=True)",
        "data_parallel(shard=True, engine='pmap')",
        "data_parallel(batch_dim=1)",
        "data_parallel(batch_dim=2)",
    ):
        chain = chain_of(recipe)
        wide = work.replace(inputs=type(work.inputs)((normal(8, 6),)))
        found[recipe] = next(iter(chain)).refusal(gathered(wide, chain))
    for engine in ("jit", "pmap"):
        finished = work.backend.finish(applied(work, ENGINES[engine])[0])
        try:
            finished.train_step((normal(6, 4), normal(6, 2)))
        except perfkit.InvalidInputError as error:
            found[f"a batch of 6 by {engine}"] = str(error)
    return found


def end_to_end():
    """`optimize` from its way in to its report; batches along the second dimension."""
    w, x, y = normal(4, 2), normal(3, 8, 4), normal(3, 8, 2)
    result = perfkit.optimize(
        lambda params, x: x @ params["w"],
        "data_parallel(4, batch_dim=1)",
        params={"w": w},
        mode="training",
        example_inputs=(x,),
        targets=y,
        loss=squared,
        optimizer=optax.sgd(0.1),
    )
    steps = []
    for _ in range(2):
        error = x @ w - y
        steps.append([float(result.train_step((x, y))), float(np.mean(error**2))])
        w = w - 0.1 * 2 * np.einsum("tbi,tbo->io", x, error) / error.size
    report = result.report.to_dict()
    return {"parallel": report["parallel"], "ok": report["fidelity"]["ok"], "steps": steps}


def recurrent(params, x):
    """tanh(x·u + h·v + b) over the first dimension of x: (T, B, WIDTH); returns the last h."""

    def step(h, x):
        return jnp.tanh(x @ params["u"] + h @ params["v"] + params["b"]), None

    return jax.lax.scan(step, jnp.zeros_like(x[0]), x)[0]


def rounded(params, x):
    """The same in bfloat16, with parameters in float32 that every step rounds."""

    def step(h, x):
        u, v, b = (params[name].astype(jnp.bfloat16) for name in "uvb")
        return jnp.tanh(x @ u + h @ v + b), None

    return jax.lax.scan(step, jnp.zeros_like(x[0], jnp.bfloat16), x.astype(jnp.bfloat16))[0].astype(jnp.float32)


def read_on_the_way(params, x):
    """A sum over the batch that every step adds to, and that the next one reads."""

    def step(total, x):
        total = total + (x @ params["u"]).sum(0)
        return total, total @ params["v"]

    return jax.lax.scan(step, params["b"], x)[1]


LOOPS = {"recurrent": recurrent, "rounded": rounded, "read_on_the_way": read_on_the_way}


def loops():
    """Gradients by the sums of loops as they are and apart, how far they may differ, and what is sent for them."""
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from perfkit.parallel.jax_loop_sums import summed_apart

    mesh, found = Mesh(np.array(jax.devices()), "data"), {}
    for rows, turns in ((BATCH, 6), (WIDTH, 6)):  # the second as long as the weights are wide
        params = {"u": normal(WIDTH, WIDTH) / 4, "v": normal(WIDTH, WIDTH) / 4, "b": normal(WIDTH)}
        x = jax.device_put(normal(turns, rows, WIDTH), NamedSharding(mesh, PartitionSpec(None, "data")))
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        for name, function in LOOPS.items():

            def gradient(params, x, function=function):
                return jax.grad(lambda params: jnp.square(function(params, x)).sum())(params)

            programs = [jax.jit(each) for each in (gradient, summed_apart(gradient, mesh, rows))]
            one, apart = (jax.tree.map(np.asarray, program(params, x)) for program in programs)
            found[f"{name} {rows}"] = {
                "off": max(float(np.linalg.norm(apart[key] - one[key]) / np.linalg.norm(one[key])) for key in one),
                "terms": rows * turns,
                "in_loops": sent_in_loops(programs[1], params, x),
            }
    return found


def sent_in_loops(program, *given):
    from perfkit.parallel.jax_collectives import collectives

    return sum(each.looped for each in collectives(program.lower(*given).compile().as_text(), len(jax.devices())))


def shared_cell():
    """What the loops of a cell send with its weights in parts: as they are, and with sums apart."""
    from flax import linen as nn
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from perfkit.parallel.jax_loop_sums import summed_apart

    mesh, model, rows, turns = Mesh(np.array(jax.devices()), "data"), nn.RNN(nn.LSTMCell(2 * WIDTH)), WIDTH, 6
    x = jax.device_put(normal(rows, turns, WIDTH), NamedSharding(mesh, PartitionSpec("data")))
    lies = jax.eval_shape(model.init, jax.random.key(0), x)
    lies = jax.tree.map(lambda leaf: NamedSharding(mesh, PartitionSpec(*(None,) * (leaf.ndim - 1), "data")), lies)
    params = jax.device_put(model.init(jax.random.key(0), x), lies)

    def gradient(params, x):
        return jax.grad(lambda params: jnp.square(model.apply(params, x)).sum())(params)

    return [
        sent_in_loops(jax.jit(each, out_shardings=lies), params, x)
        for each in (gradient, summed_apart(gradient, mesh, rows))
    ]


if __name__ == "__main__":
    haste.begin()
    print(
        json.dumps(
            {name: compare(name) for name in CASES}
            | {
                "shards": shards(),
                "two_axes": two_axes(),
                "noise": noise(),
                "loops": loops(),
                "shared_cell": shared_cell(),
                "refusals": refusals(),
                "end_to_end": end_to_end(),
            }
        )
    )
