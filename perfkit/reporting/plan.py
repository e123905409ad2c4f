"""A plan in the terminal: what would be applied where, and what is refused and why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType

from perfkit.reporting._format import counted, listing, spaced
from perfkit.reporting.terminal import cell, line, text_table

if TYPE_CHECKING:
    from perfkit._optimize import Plan, PlannedStep

MOST_NAMES = 6


def render(plan: Plan) -> RenderableType:
    """The plan as something rich can print."""
    return Group(*_parts(plan))


def _parts(plan: Plan) -> Iterator[RenderableType]:
    yield line(f"{plan.model} · {plan.framework} · {plan.mode} · {plan.device}", "bold")
    if plan.steps:
        yield line("")
        yield _steps(plan.steps)
    if plan.candidates:
        tried = [item.recipe for item in plan.candidates if not item.reason]
        yield line(
            f"recipe='auto' would try {counted(len(tried), 'chain')} while its budget lasts, those first that what it "
            "measured promises most of, and return the original if none is faster:"
        )
        yield line("")
        single = [recipe for recipe in tried if spaced(recipe) == recipe]
        yield from map(line, single)
        if together := len(tried) - len(single):
            yield line(f"and {counted(together, 'combination')} of these")
        yield line("")
        left_out = text_table("recipe", ("outcome", "left"), ("why", "prose"))
        for item in plan.candidates:
            if item.reason:
                left_out.add_row(cell(item.recipe), cell(item.outcome), cell(item.reason))
        yield left_out


def _steps(steps: tuple[PlannedStep, ...]) -> RenderableType:
    found = text_table("step", ("stage", "left"), ("what it would do", "prose"))
    for step in steps:
        refused = bool(step.refusal)
        found.add_row(
            cell(step.recipe, "bold red" if refused else "bold"),
            cell(step.stage.lower()),
            cell("\n".join(_told(step)), "red" if refused else ""),
        )
    return found


def _told(step: PlannedStep) -> Iterator[str]:
    if step.refusal:
        yield f"refused: {step.refusal}"
    elif step.effect.touched:
        yield f"touches {counted(len(step.effect.touched), 'part')}: {listing(step.effect.touched, MOST_NAMES)}"
    else:
        yield "NO EFFECT on this model"
    if step.effect:
        yield from (f"leaves {item.name}: {item.reason}" for item in step.effect.skipped)
        yield from step.effect.notes
    if step.caution:
        yield f"caution: {step.caution}"
