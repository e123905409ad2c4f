"""Whose the time of a fusion is that holds several layers of a model."""

from __future__ import annotations

from collections.abc import Callable

from perfkit.profiling.jax_hlo import NO_WORK, Program
from perfkit.profiling.jax_hlo_read import Instruction
from perfkit.profiling.jax_scopes import Place

Shares = dict[Place, float]
"""The parts of one instruction's time, by place in the model; together 1."""


def by_place(program: Program, item: Instruction, place: Callable[[str], Place]) -> dict[Place, list[Instruction]]:
    """What a fusion is made of, by place; a place's `primitive` is left out."""
    found: dict[Place, list[Instruction]] = {}
    for inner in program.inside(item):
        if inner.opcode not in NO_WORK and "/" in inner.op_name:
            at = place(inner.op_name)
            found.setdefault(Place(at.module, at.phase), []).append(inner)
    return found


def holds_layers(program: Program, item: Instruction, place: Callable[[str], Place]) -> bool:
    """Whether a fusion holds products of more than one place of the model, so that its time is theirs together."""
    if item.opcode != "fusion":
        return False
    groups = by_place(program, item, place).values()
    return sum(any(each.product_flops for each in group) for group in groups) > 1


def shares_by_work(program: Program, item: Instruction, place: Callable[[str], Place]) -> Shares:
    """By operations and bytes: where nothing better is known."""
    work = {
        at: sum(each.product_flops + each.bytes for each in group)
        for at, group in by_place(program, item, place).items()
    }
    return {at: each / sum(work.values()) for at, each in work.items()}


def shares_by_time(
    program: Program, item: Instruction, place: Callable[[str], Place], ms_by_place: dict[Place, float]
) -> Shares:
    """By the times that the places in it take where they are not fused; empty where one with products has none."""
    groups = by_place(program, item, place)
    times = {at: ms_by_place.get(at, 0.0) for at in groups}
    if any(not times[at] and any(each.product_flops for each in group) for at, group in groups.items()):
        return {}
    return {at: ms / sum(times.values()) for at, ms in times.items()}
