"""What `doctor` found, in the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType

from perfkit.reporting._environment_facts import environment_rows
from perfkit.reporting._format import format_quantity
from perfkit.reporting.terminal import cell, line, text_table

if TYPE_CHECKING:
    from perfkit._doctor import Diagnosis, Readiness
    from perfkit.profiling._profile import DeviceState


def render(diagnosis: Diagnosis) -> RenderableType:
    """The diagnosis as something rich can print."""
    return Group(*_parts(diagnosis))


def _parts(diagnosis: Diagnosis) -> Iterator[RenderableType]:
    machine = text_table("machine", ("", "prose"))
    for name, value in environment_rows(diagnosis.environment):
        machine.add_row(cell(name), cell(value))
    for name, version in diagnosis.compilers.items():
        machine.add_row(cell(name), cell(version or "not found"))
    for name, device in diagnosis.devices.items():
        machine.add_row(cell(f"{name} uses"), cell(device))
    if diagnosis.memory:
        machine.add_row(cell("memory on CPU"), cell(diagnosis.memory))
    for name, counter in diagnosis.energy.items():
        machine.add_row(cell(f"energy of {name}"), cell(counter))
    for card in diagnosis.cards:
        machine.add_row(cell(card.name), cell(card_now(card)))
    yield machine
    yield line("")
    recipes = text_table("recipe", ("framework", "left"), ("", "left"), ("why", "prose"))
    for item in diagnosis.recipes:
        recipes.add_row(cell(item.recipe), cell(item.framework), _state(item), cell(item.reason))
    yield recipes


CARD = ("power", "sm clock", "memory clock", "temperature", "utilization", "memory used", "ECC uncorrected")


def card_now(card: DeviceState) -> str:
    """What a card says at the moment, in a line; what it does not tell is left to a profile."""
    told = [f"{name} {format_quantity(card.readings[name])}" for name in CARD if _tells(card, name)]
    held = [f"clock held down by {', '.join(card.reasons)}"] if card.reasons else []
    others = [f"also computing: {', '.join(card.processes)}"] if card.processes else []
    return "; ".join([*told, *held, *others]) or "it tells nothing of itself"


def _tells(card: DeviceState, name: str) -> bool:
    return name in card.readings and card.readings[name].value is not None


def _state(item: Readiness) -> RenderableType:
    if not item.ready:
        return cell("no", "red")
    return cell("ready, hardly pays", "yellow") if item.reason else cell("ready", "green")
