"""What sending takes between the processes of a torch.distributed group, and what the framework adds to it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from perfkit._recipe import chain_of, names
from perfkit._variant import apply
from perfkit._workload import Workload
from perfkit.parallel import planning
from perfkit.parallel.gathering import gathered
from perfkit.parallel.links import Measured
from perfkit.parallel.planning import MICRO_BATCHES
from perfkit.parallel.planning_parts import Cluster, Costs, Overheads, Way
from perfkit.parallel.torch_costs import Step, costs, needed_passes, seconds_of, timed_calls

SIZES = (4, 1 << 14, 1 << 18, 1 << 21, 1 << 24)
"""Bytes that are sent."""

WIDTH, ROWS = 64, 64
SHORT = 0.1
"""Calls that take less than this many seconds are timed several at a time."""

Times = dict[Any, list[float]]


def operations(device: str) -> dict[tuple[str, int], Callable[[], Any]]:
    """The operations between all processes, by kind and size; each returns when it is done."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    found: dict[tuple[str, int], Callable[[], Any]] = {}
    for size in SIZES:
        values = max(size // 4, ranks)
        whole = torch.zeros(values // ranks * ranks, device=device)
        part = torch.zeros(values // ranks, device=device)
        alone = torch.zeros(max(size // 4, 1), device=device)
        found["all_reduce", size] = partial(dist.all_reduce, alone)
        found["all_gather", size] = partial(_ALL_GATHER, whole, part)
        found["gather_inside", size] = partial(_gather_inside, whole, part, ranks)
        found["reduce_scatter", size] = partial(_REDUCE_SCATTER, part, whole)
        found["send", size] = partial(_there_and_back, alone, rank, ranks)
    return found


_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _gather_inside(whole: torch.Tensor, part: torch.Tensor, ranks: int) -> None:
    """As a layer split by columns does it: gather, and put the parts of each row side by side."""
    _ALL_GATHER(whole, part)
    rows = math.gcd(part.numel(), ROWS)
    torch.cat(whole.view(ranks, rows, -1).unbind(0), dim=1)


def _there_and_back(tensor: torch.Tensor, rank: int, ranks: int) -> None:
    """Pairs of processes send each other a tensor; with an odd number the last one has nobody."""
    other = rank ^ 1
    if other >= ranks:
        return
    for sends in (rank < other, rank > other):
        dist.send(tensor, other) if sends else dist.recv(tensor, other)


def link_of(times: Mapping[Any, float]) -> Measured:
    """The link that times of `operations` show."""
    points: dict[str, list[tuple[float, float]]] = {}
    for (kind, size), seconds in times.items():
        points.setdefault(kind, []).append((size, seconds / (2 if kind == "send" else 1)))
    return Measured(dist.get_world_size(), points)


def interleaved(calls: Mapping[Any, Callable[[], Any]], rounds: int, told: Callable[[str], Any] = str) -> dict:
    """The median seconds of each call, all of them in turn in every round; every process makes the same calls.

    Processes meet before each: what is timed is how long one takes when all make it.
    """
    times: Times = {name: [] for name in calls}
    for call in calls.values():
        call()
    counts = {}
    for name, call in calls.items():
        dist.barrier()
        seconds = torch.tensor(seconds_of(call, 1))
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        counts[name] = 3 if seconds < SHORT else 1
    for number in range(rounds):
        told(f"round {number + 1} of {rounds}")
        for name, call in calls.items():
            dist.barrier()
            times[name].append(seconds_of(call, counts[name]))
    return {name: median(found) for name, found in times.items()}


def steps_together(step: Step) -> dict[Any, Callable[[], None]]:
    """A step's parts as all processes make them at a time; passes end when the last process has come to its end."""
    word = torch.zeros(1, device=step.work.device)

    def meeting(call: Callable[[], None], passes: int) -> Callable[[], None]:
        def met() -> None:
            for _ in range(passes):
                call()
            dist.all_reduce(word)

        return met

    ranks = dist.get_world_size()
    passes = needed_passes(step.rows, ranks)
    calls = timed_calls(step, ranks)
    return {name: call if name == "update" else meeting(call, passes[name]) for name, call in calls.items()}


def costs_of(step: Step, times: Mapping[Any, float], link: Measured) -> Costs:
    """The costs that times of `steps_together` show, without what the meeting itself takes."""
    meeting_s = link.seconds("all_reduce", 4, link.ranks)
    each = {
        rows: max(times[rows] - meeting_s, times[rows] / 2) / passes
        for rows, passes in needed_passes(step.rows, link.ranks).items()
    }
    return costs(step, link.ranks, each, times["update"])


def trained(work: Workload, recipe: str) -> Callable[[], None]:
    """A step of the model spread by that recipe, as its user would make it."""
    from perfkit.parallel.batch import dealer

    chain = chain_of(recipe)
    deal = dealer(chain, "torch")
    batch = deal((work.inputs.args, work.training.targets))
    spread = apply(chain, gathered(work, chain)).works[-1]
    finished = spread.backend.finish(spread)

    def step() -> None:
        spread.backend.synchronize(finished.train_step(batch))

    return step


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
    return {name: (bind(model.to(work.device)), recipe, way) for name, (model, recipe, way) in found.items()}


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
    layouts: Sequence[str] = (),
    told: Callable[[str], Any] = str,
) -> tuple[Costs, Cluster, dict[str, float]]:
    """What planning needs of a model and of the processes that run here, and how long steps under some recipes take.

    Everything is timed in turn, round by round, so that what else the machine does hits all alike.
    """
    step = Step(work, batch_dim)
    small = ladders(work)
    small_steps = {id(bound.model): Step(bound, 0) for bound, _, _ in small.values()}
    calls: dict[Any, Callable[[], Any]] = {("link", key): call for key, call in operations(work.device).items()}
    calls |= {("model", key): call for key, call in steps_together(step).items()}
    for key, each in small_steps.items():
        calls |= {(key, name): call for name, call in steps_together(each).items()}
    calls |= {("ladder", name): trained(bound, recipe) for name, (bound, recipe, _) in small.items()}
    calls |= {("layout", recipe): trained(work, recipe) for recipe in layouts}
    times = interleaved(calls, rounds, told)

    def part(group: Any) -> dict[Any, float]:
        return {key: seconds for (of, key), seconds in times.items() if of == group}

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
    return costs_of(step, part("model"), link), cluster, part("layout")
