"""What a turn of a JAX pipeline takes beside its stages' work, measured for `planning`."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from perfkit._chain import chain_of
from perfkit._variant import apply
from perfkit._workload import Workload
from perfkit.backends import backend
from perfkit.backends.jax_training import Trainer
from perfkit.parallel.gathering import gathered
from perfkit.parallel.jax_costs import Call, Step, on_all
from perfkit.parallel.pipeline_plan import MICRO_BATCHES

SIZES = (1 << 12, 1 << 16, 1 << 18, 1 << 19)
"""Bytes that a stage hands on."""


def handing(mesh: Mesh) -> dict[tuple[str, int], Call]:
    """Steps of a model of one product for each stage, by bytes handed on: as a pipeline over all devices, and "whole".

    On one device the products are fused: that is as much work as one stage has.
    """
    devices, found = mesh.devices.size, {}
    for size in SIZES:
        work = _multiplying(devices, size // 4)
        step = Step(work, 0)
        found["whole", size] = on_all(mesh, *step.whole(1, step.rows))
        chain = chain_of(f"pipeline_parallel({devices}, micro_batches={step.rows})")
        trainer = Trainer(apply(chain, gathered(work, chain)).works[-1])
        batch = trainer.placement.batch(step.batch(step.rows))
        found["pipeline", size] = Call(trainer.program.jitted, (trainer.state, *batch))
    return found


def turns_of(devices: int, times: Mapping[tuple[str, int], float]) -> tuple[tuple[float, float], ...]:
    """Seconds of a turn without its work, by bytes handed on, from times of `handing`."""
    passes = devices * MICRO_BATCHES
    return tuple(
        (size, max(times["pipeline", size] / (passes + devices - 1) - times["whole", size] / passes, 0.0))
        for size in SIZES
    )


def _multiplying(devices: int, width: int) -> Workload:
    """A training of a model of as many products, on one row of so many numbers in each micro-batch."""
    rows = MICRO_BATCHES * devices
    params = {f"stage{index}": jnp.float32(1) for index in range(devices)}

    def model(params, x):
        for index in range(devices):
            x = x * params[f"stage{index}"]
        return x[:, :1]

    about = {"loss": lambda found, wanted: jnp.mean(found - wanted), "optimizer": optax.sgd(0.0), "seed": 0}
    given = (jnp.ones((rows, width)),)
    return backend("jax").bind(model, params, given, mode="training", targets=jnp.zeros((rows, 1)), **about)
