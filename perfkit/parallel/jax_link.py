"""What sending takes between JAX's devices, and what planning needs beside it: all of it timed in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec

from perfkit._workload import Workload
from perfkit.parallel.jax_costs import Step, costs, on_all, timed_calls, waited_for
from perfkit.parallel.jax_handing import handing, turns_of
from perfkit.parallel.links import Measured
from perfkit.parallel.planning_parts import Cluster, Costs
from perfkit.parallel.planning_timing import in_turn, needed_passes

SIZES = (4, 1 << 14, 1 << 18, 1 << 21, 1 << 24)
"""Bytes that are sent."""

TIMES = 16
"""Operations in one program: a program's start takes longer than a small message."""

AXIS = "each"


def operations(mesh: Mesh) -> dict[tuple[str, int], Callable[[], Any]]:
    """Programs of `TIMES` operations between all devices, by kind and size; "nothing" has none in it."""
    ranks = mesh.devices.size
    onwards = [(rank, (rank + 1) % ranks) for rank in range(ranks)]

    def gathered(part: jax.Array) -> jax.Array:
        return lax.all_gather(part, AXIS, tiled=True)[: part.size]

    def scattered(whole: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice(whole, lax.psum_scatter(whole, AXIS, tiled=True), (0,))

    found = {("nothing", 0): _repeated(mesh, lambda given: given + 1, jnp.zeros(1))}
    for size in SIZES:
        values = max(size // 4, 1)
        whole = jnp.zeros(-(-values // ranks) * ranks)
        part = whole[: whole.size // ranks]
        found["all_reduce", size] = _repeated(mesh, partial(lax.psum, axis_name=AXIS), jnp.zeros(values))
        found["all_gather", size] = _repeated(mesh, gathered, part)
        found["reduce_scatter", size] = _repeated(mesh, scattered, whole)
        send = partial(lax.ppermute, axis_name=AXIS, perm=onwards)
        found["send", size] = _repeated(mesh, send, jnp.zeros(values))
    return found


def _repeated(mesh: Mesh, operation: Callable[[jax.Array], jax.Array], given: jax.Array) -> Callable[[], Any]:
    """A call of a program in which every device makes an operation some times, on what the last one gave."""

    def body(given: jax.Array) -> jax.Array:
        return lax.fori_loop(0, TIMES, lambda _, carried: operation(carried), given)

    whole = PartitionSpec()
    program = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False))
    return lambda: jax.block_until_ready(program(given))


def link_of(ranks: int, times: Mapping[Any, float]) -> Measured:
    """The link that times of `operations` show, without what their programs take around them."""
    points: dict[str, list[tuple[float, float]]] = {}
    for (kind, size), seconds in times.items():
        if kind != "nothing":
            points.setdefault(kind, []).append((size, max(seconds - times["nothing", 0], 0.0) / TIMES))
    return Measured(ranks, points)


def calibrated(
    work: Workload,
    batch_dim: int,
    rounds: int,
    others: Mapping[str, Callable[[], Any]] | None = None,
    told: Callable[[str], Any] = str,
) -> tuple[Costs, Cluster, dict[str, list[float]]]:
    """What planning needs of a model, programs left out, and of JAX's devices that are here.

    Args:
        others: what else is timed in each round; its seconds come last.
    """
    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), (AXIS,), axis_types=(AxisType.Auto,))
    step = Step(work, batch_dim)
    passes = needed_passes(step.rows, devices)
    rows = min(passes)
    own = timed_calls(step, devices, partial(on_all, mesh))
    calls: dict[Any, Callable[[], Any]] = {("link", key): call for key, call in operations(mesh).items()}
    calls |= {("model", name): call for name, call in own.items()}
    calls |= {("turn", key): call for key, call in handing(mesh).items()}
    calls["waited for", rows] = waited_for(mesh, *step.whole(rows, passes[rows]))
    calls |= {("other", name): call for name, call in (others or {}).items()}
    times = in_turn(calls, range(rounds), told=told)

    def part(group: str) -> dict[Any, float]:
        return {key: median(found) for (of, key), found in times.items() if of == group}

    model, link = part("model"), link_of(devices, part("link"))
    crowding = min(max(model[rows] / part("waited for")[rows], 1.0), devices)
    last = {key: found for (of, key), found in times.items() if of == "other"}
    turns = turns_of(devices, part("turn"))
    cluster = Cluster(devices, link, overlaps=False, crowding=crowding, turns=turns)
    return costs(step, devices, own, model), cluster, last
