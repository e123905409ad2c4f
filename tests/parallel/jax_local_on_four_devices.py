"""Run by test_jax_local.py in a process with four devices: local_sgd against its formulas; prints JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import haste
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax_on_four_devices import applied, bound, normal, squared

import perfkit
from perfkit._chain import chain_of
from perfkit.parallel import jax_checkpoint

STEPS, WIDTH, BATCH = 7, 6, 8
OPTIMIZERS = {"sgd": optax.sgd(0.1), "momentum": optax.sgd(0.1, momentum=0.9), "adam": optax.adam(0.01)}
CASES = {
    "every step": ("local_sgd(sync_every=1)", "sgd"),
    "every third": ("local_sgd(sync_every=3)", "adam"),
    "warm-up": ("local_sgd(sync_every=2, warmup_steps=3)", "momentum"),
    "weights": ("local_sgd(sync_every=3, weights=(3, 1, 2, 2))", "sgd"),
    "state": ("compile+local_sgd(sync_every=3, average_state=True)", "adam"),
    "diloco": ("compile+local_sgd(sync_every=3, diloco=True)", "adam"),
    "diloco after warm-up": ("local_sgd(sync_every=2, diloco=True, warmup_steps=2, outer_momentum=0.0)", "sgd"),
}
X, Y = normal(BATCH, WIDTH), normal(BATCH, 2)
PARAMS = {"first": normal(WIDTH, 8), "second": normal(8, 2)}


def model(params, x):
    return jnp.tanh(x @ params["first"]) @ params["second"]


def trained(recipe, kind, x=X, y=Y):
    work, effect = applied(bound(model, (x,), y, squared, OPTIMIZERS[kind], PARAMS), recipe)
    return work, work.backend.finish(work), effect


def simulated(recipe, optimizer):
    """The same on one device: all models, one after the other; written from the papers' formulas."""
    shares = recipe.shares(4)
    sides = [(PARAMS, optimizer.init(PARAMS)) for _ in shares]
    anchor, velocity = PARAMS, jax.tree.map(jnp.zeros_like, PARAMS)
    losses, since = [], 0

    def mean(trees):
        return jax.tree.map(lambda *leaves: sum(s * leaf for s, leaf in zip(shares, leaves, strict=True)), *trees)

    rows = list(zip(np.split(X, 4), np.split(Y, 4), strict=True))
    for step in range(STEPS):
        told = [
            jax.value_and_grad(lambda p, x=x, y=y: squared(model(p, x), y))(params)
            for (params, _), (x, y) in zip(sides, rows, strict=True)
        ]
        warm = step < recipe.warmup_steps
        losses.append([float(loss) for loss, _ in told])
        gradients = [mean([g for _, g in told])] * 4 if warm else [g for _, g in told]
        moved = [optimizer.update(g, state, params) for g, (params, state) in zip(gradients, sides, strict=True)]
        sides = [(optax.apply_updates(p, u), state) for (p, _), (u, state) in zip(sides, moved, strict=True)]
        since = 0 if warm else since + 1
        anchor = sides[0][0] if warm else anchor
        if since == recipe.sync_every:
            since, params = 0, mean([p for p, _ in sides])
            if recipe.diloco:
                m, change = recipe.outer_momentum, jax.tree.map(jnp.subtract, anchor, params)
                velocity = jax.tree.map(lambda v, c, m=m: m * v + c, velocity, change)
                params = jax.tree.map(lambda a, c, v, m=m: a - recipe.outer_lr * (c + m * v), anchor, change, velocity)
                anchor = params
            states = [state for _, state in sides]
            if recipe.average_state:
                counts = states[0]
                states = [jax.tree.map(lambda m, c: m if c.ndim else c, mean(states), counts)] * 4
            sides = [(params, state) for state in states]
    return losses, sides


def off(found, expected):
    return max(
        float(np.linalg.norm(found[name] - expected[name]) / np.linalg.norm(expected[name])) for name in expected
    )


def compared(recipe, kind):
    work, finished, effect = trained(recipe, kind)
    plain = next(step for step in chain_of(recipe) if step.name == "local_sgd")
    losses = [float(finished.train_step((X, Y))) for _ in range(STEPS)]
    expected, sides = simulated(plain, OPTIMIZERS[kind])
    held = finished.trainer.state[0]
    found = {
        "losses": losses,
        "expected": [float(np.mean(step)) for step in expected],
        "off": max(off({k: v[place] for k, v in held.items()}, sides[place][0]) for place in range(4)),
        "first": off(finished.params(), sides[0][0]),
        "differed": max(off(sides[0][0], side) for side, _ in sides[1:]),
        "notes": effect.notes,
    }
    traffic = work.backend.traffic(work, finished) if plain.warmup_steps == 0 else None
    finished.rounds.settle()
    after = finished.trainer.state[0]
    found["settled"] = all(np.array_equal(v[0], v[place]) for v in after.values() for place in range(4))
    found["sent"] = traffic and [traffic.sent_bytes.value, traffic.sent_bytes.method]
    return found


class Noisy(nnx.Module):
    """Dropout before one weight a feature, and a batch norm."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.dropout, self.norm = nnx.Dropout(0.5, rngs=rngs), nnx.BatchNorm(1000, rngs=rngs)
        self.weight = nnx.Param(jnp.ones(1000))

    def __call__(self, x):
        self.norm(x)
        return self.dropout(x) * self.weight


def noise():
    """How many weights stand still after one step and its average, where all devices see the same row."""
    work = bound(Noisy(rngs=nnx.Rngs(0)), (np.ones((4, 1000), np.float32),), normal(4, 1000), squared, optax.sgd(1.0))
    work, _ = applied(work, "local_sgd(sync_every=1)")
    finished = work.backend.finish(work)
    finished.train_step((work.inputs, work.training.targets))
    return float((finished.model.weight[...] == 1).mean())


def resumed(folder: Path):
    """Losses with a checkpoint in the middle of a round, and those of trainings that go on from there."""
    recipe, batch = "local_sgd(sync_every=4, diloco=True)", (X, Y)
    _, straight, _ = trained(recipe, "adam")
    for _ in range(6):
        straight.train_step(batch)
    (folder / "a").mkdir()
    jax_checkpoint.write(folder / "a" / "state", straight)
    found = {"straight": [float(straight.train_step(batch)) for _ in range(5)]}
    for name, other in {
        "again": recipe,
        "plain": "data_parallel",
        "average alone": "local_sgd(sync_every=4)",
    }.items():
        _, finished, _ = trained(other, "adam")
        jax_checkpoint.read(folder / "a" / "state", finished)
        found[name] = [float(finished.train_step(batch)) for _ in range(5)]
        if name == "plain":
            (folder / "b").mkdir()
            jax_checkpoint.write(folder / "b" / "state", finished)
            _, back, _ = trained(recipe, "adam")
            jax_checkpoint.read(folder / "b" / "state", back)
            found["back"] = [float(finished.train_step(batch)), float(back.train_step(batch))]
    return found


def reported():
    """`optimize` from its way in to its report."""
    result = perfkit.optimize(
        model,
        "local_sgd(sync_every=5, warmup_steps=2)",
        params=PARAMS,
        mode="training",
        example_inputs=(X,),
        targets=Y,
        loss=squared,
        optimizer=optax.sgd(0.1),
    )
    for _ in range(3):
        result.train_step((X, Y))
    result.settle()
    report = result.report
    return {"parallel": report.to_dict()["parallel"], "ok": report.fidelity.ok, "losses": report.losses.after[:1]}


def refused():
    work = bound(model, (X,), Y, squared, OPTIMIZERS["sgd"], PARAMS)
    from perfkit.parallel.layout import Layout

    (recipe,) = chain_of("local_sgd")
    return recipe.refusal(work.replace(layout=Layout(("data", "tensor"), (2, 2))))


if __name__ == "__main__":
    haste.begin()
    found = {name: compared(*case) for name, case in CASES.items()}
    found |= {"noise": noise(), "resumed": resumed(Path(sys.argv[1])), "reported": reported(), "refused": refused()}
    print(json.dumps(found))
