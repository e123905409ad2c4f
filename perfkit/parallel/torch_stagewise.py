"""What a recipe does to each stage of a pipeline by itself, told as one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import takewhile

from perfkit._report import Effect
from perfkit._workload import Workload
from perfkit.backends.torch_surgery import WRAPPED
from perfkit.parallel.spread import Spread
from perfkit.parallel.torch_pipe import pipelined


def in_each_stage(work: Workload, change: Callable[[Workload], tuple[Workload, Effect]]) -> tuple[Workload, Effect]:
    """`change(work)`; where this process holds stages of a pipeline, with what it did to those of the others.

    Args:
        change: gives the workload with lines added to its spread's parts; raises on every process or on none.
    """
    before, kind = work.spread or Spread(), type(work.model)
    work, effect = change(work)
    pipe = pipelined(work.model)
    if pipe is None:
        return work, effect
    put_around = takewhile(lambda each: each is not kind, type(work.model).__mro__)
    wraps = tuple(vars(each)[WRAPPED][1] for each in put_around if WRAPPED in vars(each))
    for stage in pipe.stages.values():  # training calls these, and not the model
        stage.wraps = (*wraps, *stage.wraps)
    layout, after = work.layout, work.spread or Spread()
    told = work.world.gather((effect, after.parts[len(before.parts) :]))
    devices = layout.size("pipeline")
    first = [rank for rank in range(work.world.size) if not layout.place("data", rank) + layout.place("tensor", rank)]
    assert [layout.place("pipeline", rank) for rank in first] == list(range(devices))

    def of_stage(lines: tuple[str, ...], place: int) -> list[str]:
        return [f"{line}, on device {place + 1} of {devices} along the pipeline" for line in lines]

    effects, added = zip(*(told[rank] for rank in first), strict=True)
    notes = [line for place, each in enumerate(effects) for line in of_stage(each.notes, place)]
    parts = [line for place, lines in enumerate(added) for line in of_stage(lines, place)]
    skipped = tuple(dict.fromkeys(item for each in effects for item in each.skipped))
    touched = tuple(dict.fromkeys(name for each in effects for name in each.touched))
    work = work.replace(spread=replace(after, parts=(*before.parts, *parts)))
    return work, Effect(touched, skipped, tuple(notes))
