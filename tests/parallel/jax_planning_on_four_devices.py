"""Run by test_jax_planning.py in a process with four devices: layouts compiled and predicted, and prints JSON."""

from __future__ import annotations

import dataclasses
import json
from unittest import mock

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jax_on_four_devices import Noisy, bound, normal, squared

from perfkit._errors import InvalidInputError, UnsupportedError
from perfkit.measure.kept_memory import KEPT_BYTES
from perfkit.parallel import jax_costs, jax_link, jax_piped, jax_programs, jax_shares, planning_layouts
from perfkit.parallel.planning import candidates

IN, HIDDEN, OUT, ROWS = 8, 16, 4, 32
PARAMS = {"up": normal(IN, HIDDEN), "down": normal(HIDDEN, OUT)}
INPUTS, TARGETS = normal(ROWS, IN), normal(ROWS, OUT)
MEMORY = {"kept": KEPT_BYTES // 2, "fresh": KEPT_BYTES * 3 // 2}


def model(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def step(along=0):
    function = model if along == 0 else lambda params, x: model(params, x.T).T
    inputs, targets = (INPUTS, TARGETS) if along == 0 else (INPUTS.T, TARGETS.T)
    return jax_costs.Step(bound(function, (inputs,), targets, squared, optax.adam(1e-3), PARAMS), along)


def programs(along=0):
    one = step(along)
    ways = [way for way in candidates(one.rows, jax.device_count()) if way.pipeline == 1 or way.tensor == 1]
    found, refused = jax_programs.programs(one, ways)
    return {str(way): dataclasses.asdict(each) for way, each in found.items()}, refused


def costs():
    one = step()
    found = jax_costs.measured(one, 4, budget_s=0.0)
    together, cluster, others = jax_link.calibrated(one.work, 0, 2, {"other": lambda: None})
    inputs, targets = one.batch(8)[0][0], one.batch(8)[2]
    calls = {name: jax_costs.alone(*jax_costs.touching(size)) for name, size in MEMORY.items()}
    return {
        "rows": [sorted(each.pass_s) for each in (found, together)],
        "gradients": found.gradients,
        "seconds": [*found.pass_s.values(), found.update_s, *together.pass_s.values()],
        "again": found.again,
        "adding": found.adding_s,
        "fresh": found.fresh_s,
        "temporary": found.temporary,
        "memory": [calls[name].temporary for name in ("kept", "fresh")],
        "turns": [size for size, _ in cluster.turns],
        "crowding": cluster.crowding,
        "kinds": sorted(cluster.link.points),
        "others": {name: len(seconds) for name, seconds in others.items()},
        "batch": [inputs.shape, targets.shape],
    }


def loops():
    """Shares of operations where features in parts go into a loop; and where its own weights are in parts."""
    params = {"into": normal(IN, HIDDEN), "own": normal(HIDDEN, HIDDEN)}

    def looping(params, x):
        def turn(state, features):
            return jnp.tanh(features @ params["own"] + state), None

        state, _ = jax.lax.scan(turn, jnp.zeros(HIDDEN), x @ params["into"])
        return state.sum()

    operations = jax_piped.operations_of(lambda params, rest, x: (looping(params, x), rest), params, (), (INPUTS,), {})
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    columns, whole = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((None, "tensor"), ()))
    found = {}
    for name, lies in {"gathered": (columns, whole), "weights": (columns, columns)}.items():
        given = [jax.device_put(params[each], where) for each, where in zip(params, lies, strict=True)]
        shares = jax_shares.shares(operations, [*given, jax.device_put(INPUTS, whole)])
        primitives = [eqn.primitive.name.removeprefix("reduce_") for eqn in operations.eqns]
        found[name] = dict(zip(primitives, shares, strict=True))
    return found


def convolutions():
    """Shares of a convolution, with elements for seconds: its kernel in parts by outputs; and an input by channels."""
    images, kernel = normal(2, 8, 8, 4), normal(3, 3, 4, 16)

    def convolved(params, rest, x):
        return jax.lax.conv_general_dilated(x, params, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")), rest

    operations = jax_piped.operations_of(convolved, kernel, (), (images,), {})
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    last, whole = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((None, None, None, "tensor"), ()))
    with mock.patch.object(
        jax_shares, "quickest", lambda program, given: (sum(x.size for x in given), program(*given))
    ):
        return [
            jax_shares.shares(operations, [jax.device_put(kernel, first), jax.device_put(images, second)])
            for first, second in ((last, whole), (whole, last))
        ]


def each_by_itself():
    """Every device makes a whole call, and they agree with one device's."""
    one = step()
    mesh = jax.make_mesh((4,), ("each",))
    program, given = one.whole(ROWS, 1)
    (weights, _, _, _), loss = program(*given)
    everywhere, losses = jax_costs.on_all(mesh, program, given)()
    off = [float(jnp.abs(everywhere[0][name] - weights[name]).max()) for name in weights]
    (_, waited), met = jax_costs.waited_for(mesh, program, given)()
    forward, given = one.whole(ROWS, 1, forward=True)
    (_, _, moments, _), alone = forward(*given)
    return {
        "off": max(off),
        "losses": losses.tolist(),
        "loss": float(loss),
        "waited for": waited.tolist(),
        "met": float(met[0]),
        "forward": [float(alone), max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(moments[0].mu))],
    }


def layouts(function=model, params=PARAMS, inputs=INPUTS, targets=TARGETS, devices=4, **options):
    about = {"example_inputs": (inputs,), "targets": targets, "loss": squared, "optimizer": optax.adam(1e-3)}
    return planning_layouts.layouts(function, params=params, devices=devices, budget_s=0.0, **about, **options)


def refused(**options):
    try:
        layouts(**options)
    except (UnsupportedError, InvalidInputError) as error:
        return str(error)
    return "nothing was refused"


def told(found):
    ways = [str(item.way) for item in found.predictions]
    return {"ways": ways, "steps": [item.step_s for item in found.predictions], "text": str(found)}


if __name__ == "__main__":
    planning_layouts.ROUNDS = 1
    noisy = {"function": Noisy(rngs=nnx.Rngs(0)), "params": None}
    noisy |= {"inputs": normal(ROWS, 1000), "targets": normal(ROWS, 1000)}
    found = {
        "programs": programs(),
        "second dimension": programs(along=1),
        "costs": costs(),
        "each": each_by_itself(),
        "loops": loops(),
        "convolutions": convolutions(),
        "given": told(layouts(link_gbps=10)),
        "measured": told(layouts()),
        "changing": told(layouts(link_gbps=10, **noisy)),
        "eight": refused(devices=8, link_gbps=10),
    }
    print(json.dumps(found))
