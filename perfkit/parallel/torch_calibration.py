"""What planning needs of a torch model and of the processes that run here: all of it timed in turn."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from perfkit._recipe_files import names
from perfkit._workload import Workload
from perfkit.parallel import planning, torch_world
from perfkit.parallel.gathering import trained
from perfkit.parallel.links import Measured
from perfkit.parallel.pipeline_plan import MICRO_BATCHES
from perfkit.parallel.planning_parts import Cluster, Costs, Overheads, Way
from perfkit.parallel.planning_timing import in_turn, needed_passes
from perfkit.parallel.torch_costs import Step, costs, timed_calls
from perfkit.parallel.torch_link import link_of, operations

WIDTH = 64
"""Of the small models whose steps show what the framework adds."""


def steps_together(step: Step) -> dict[Any, Callable[[], None]]:
    """A step's parts as all processes make them at a time; each ends when the last process has come to its end."""
    word = torch.zeros(1, device=step.work.device)

    def meeting(call: Callable[[], None], times: int) -> Callable[[], None]:
        def met() -> None:
            for _ in range(times):
                call()
            dist.all_reduce(word)

        return met

    ranks = dist.get_world_size()
    passes = needed_passes(step.rows, ranks)
    # An update as well: where processes share cores, the first to end has taken them from the others.
    return {name: meeting(call, passes.get(name, 1)) for name, call in timed_calls(step, ranks).items()}


def costs_of(step: Step, times: Mapping[Any, float], link: Measured) -> Costs:
    """The costs that times of `steps_together` show, without what the meeting itself takes."""
    meeting_s = link.seconds("all_reduce", 4, link.ranks)
    alone_s = {name: max(seconds - meeting_s, 0.0) for name, seconds in times.items()}
    each = {rows: alone_s[rows] / passes for rows, passes in needed_passes(step.rows, link.ranks).items()}
    return costs(step, link.ranks, each, alone_s["update"])


def ladders(work: Workload) -> dict[str, tuple[Workload, str, Way]]:
    """Small models whose steps show what the framework adds: with a recipe and its layout."""
    ranks = dist.get_world_size()
    narrow = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())))
    wide = nn.Sequential(*(nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4))) for _ in range(2)))
    found = {
        "step": (narrow, f"data_parallel({ranks})", Way(data=ranks)),
        "narrow": (narrow, f"data_parallel({ranks}, shard=True)", Way(data=ranks, shard=True)),
        "wide": (wide, f"data_parallel({ranks}, shard=True)", Way(data=ranks, shard=True)),
        "split": (narrow, f"tensor_parallel({ranks})", Way(tensor=ranks)),
    }
    x = torch.randn(8 * ranks, WIDTH, device=work.device)
    bind = partial(
        work.backend.bind,
        params=None,
        example_inputs=(x,),
        mode="training",
        loss=nn.functional.mse_loss,
        targets=x,
        optimizer=partial(torch.optim.Adam, lr=1e-3),
        seed=0,
    )
    if "pipeline_parallel" in names():
        micro_batches = ranks * MICRO_BATCHES
        recipe = f"pipeline_parallel({ranks}, micro_batches={micro_batches})"
        found["micro_batch"] = narrow, recipe, Way(pipeline=ranks, micro_batches=micro_batches)
    bound = {id(model): bind(model.to(work.device)) for model in (narrow, wide)}
    return {name: (bound[id(model)], recipe, way) for name, (model, recipe, way) in found.items()}


def overheads_of(measured: Mapping[str, float], expected: Mapping[str, float], splits: int, rounds: int) -> Overheads:
    """What the steps of `ladders` take longer than they should.

    FSDP2's is one for each unit and one for each parameter: 4 and 8 of them in one ladder, 2 and 16 in the other.
    """
    over = {name: max(measured[name] - expected[name], 0.0) for name in measured}
    tensor = min(max((2 * over["wide"] - over["narrow"]) / 24, 0.0), over["narrow"] / 8)
    return Overheads(
        step=over["step"],
        unit=(over["narrow"] - 8 * tensor) / 4,
        tensor=tensor,
        split=over["split"] / splits,
        micro_batch=over.get("micro_batch", 0.0) / rounds,
    )


def calibrated(
    work: Workload,
    batch_dim: int,
    rounds: int,
    others: Mapping[str, Callable[[], Any]] | None = None,
    told: Callable[[str], Any] = str,
) -> tuple[Costs, Cluster, dict[str, list[float]]]:
    """What planning needs of a model and of the processes that run here.

    Everything is timed in turn, round by round, so that what else the machine does hits all alike.

    Args:
        others: what else is timed in each round, by every process; its seconds come last.
    """
    step = Step(work, batch_dim)
    small = ladders(work)
    small_steps = {id(bound.model): Step(bound, 0) for bound, _, _ in small.values()}
    calls: dict[Any, Callable[[], Any]] = {("link", key): call for key, call in operations(work.device).items()}
    calls |= {("model", key): call for key, call in steps_together(step).items()}
    for key, each in small_steps.items():
        calls |= {(key, name): call for name, call in steps_together(each).items()}
    calls |= {("ladder", name): trained(bound, recipe).call for name, (bound, recipe, _) in small.items()}
    calls |= {("other", name): call for name, call in (others or {}).items()}
    times = in_turn(calls, range(rounds), torch_world.world(), told)

    def part(group: Any) -> dict[Any, float]:
        return {key: median(found) for (of, key), found in times.items() if of == group}

    link = link_of(part("link"))
    shared = work.device == "cpu"
    crowding = max(link.ranks * torch.get_num_threads() / (os.cpu_count() or 1), 1.0) if shared else 1.0
    plain = Cluster(link.ranks, link, overlaps=not shared, crowding=crowding)
    costs_small = {key: costs_of(each, part(key), link) for key, each in small_steps.items()}
    expected = {
        name: planning.predict(costs_small[id(bound.model)], way, plain).step_s
        for name, (bound, _, way) in small.items()
    }
    found = overheads_of(part("ladder"), expected, splits=4, rounds=link.ranks * (MICRO_BATCHES + 1) - 1)
    cluster = replace(plain, overheads=found)
    last = {key: found for (of, key), found in times.items() if of == "other"}
    return costs_of(step, part("model"), link), cluster, last
