"""A profile in the terminal: one screen, what costs most first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from perfkit.profiling._profile import Profile
from perfkit.reporting import _environment_facts, _profile_facts, _profile_rows
from perfkit.reporting._format import (
    clean,
    counted,
    format_bytes,
    format_flops,
    format_ms,
    format_percent,
    format_quantity,
    shorten,
)
from perfkit.reporting.terminal import BAR_CELLS, bar, cell, indented, line, text_table

MOST_FINDINGS, MOST_MODULES, MOST_OPS, MOST_ALLOCATIONS = 5, 8, 10, 3
MOST_NAME, MOST_OP, MOST_TOLD = 40, 32, 300
SMALLEST_SHARE = 0.005
# What the columns of the modules' table take beside names and bars.
WITH_BACKWARD, WITHOUT_BACKWARD = 67, 54


def render(profile: Profile) -> RenderableType:
    """The profile as something rich can print at any width."""
    return _Screen(profile)


@dataclass(frozen=True)
class _Screen:
    profile: Profile

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from _header(self.profile)
        yield from _findings(self.profile)
        yield from _modules(self.profile, options.max_width)
        yield from _ops(self.profile, wide=options.max_width >= 90)
        yield from _parts(self.profile)
        yield from _devices(self.profile)
        yield from _notes(self.profile)


def _header(profile: Profile) -> Iterator[RenderableType]:
    identity = (profile.framework, profile.mode, profile.device)
    yield line(" · ".join((shorten(clean(profile.model), 2 * MOST_NAME), *map(clean, identity))), "bold")
    if profile.inputs:
        yield line(f"inputs {profile.inputs}", "dim")
    yield Text()
    head = _profile_facts.headline(profile)
    yield line(f"{head.figure} {head.about}".strip(), "bold green" if profile.time else "bold yellow")
    if head.evidence:
        yield line(head.evidence, "dim")
    for alarm in _profile_facts.alarms(profile):
        yield line(f"! {alarm}", "bold red")
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    for figure in _profile_facts.figures(profile):
        table.add_row(*map(cell, (figure.label, figure.value, figure.detail)))
    yield table
    yield Text()


def _findings(profile: Profile) -> Iterator[RenderableType]:
    for finding in profile.findings[:MOST_FINDINGS]:
        facts = _profile_facts.finding_facts(finding, profile)
        yield Text.assemble((clean(facts.kind), "bold"), (f"  {clean(facts.share)}", "bold yellow"))
        yield _below(line(shorten(clean(facts.told), MOST_TOLD)))
        yield _below(line(shorten(clean(facts.advice), MOST_TOLD)))
        if facts.command:
            yield _below(Text.assemble((clean(facts.command), "cyan"), (f"  {clean(facts.gain)}", "dim")))
        else:
            yield _below(line(facts.gain, "dim"))
    if (rest := len(profile.findings) - MOST_FINDINGS) > 0:
        yield indented(f"{counted(rest, 'more finding')} in the HTML and JSON profiles")
    if profile.findings:
        yield Text()


def _modules(profile: Profile, width: int) -> Iterator[RenderableType]:
    facts = sorted(_profile_rows.module_facts(profile), key=lambda item: -item.self_share)
    shown = [item for item in facts if item.self_share >= SMALLEST_SHARE][:MOST_MODULES]
    if not shown:
        return
    trains, wide = profile.mode == "training", width >= 90
    longest = max(len(item.path) + 2 + len(item.module.kind) for item in shown)
    bars = wide and width - (WITH_BACKWARD if trains else WITHOUT_BACKWARD) - BAR_CELLS - 2 >= min(longest, MOST_NAME)
    columns = [("own share", "right"), *([("", "left")] if bars else []), ("forward", "right")]
    columns += [("backward", "right")] if trains else []
    columns += [("FLOP", "right"), ("parameters", "right"), ("activations" if trains else "output", "right")]
    table = text_table("module", *columns)
    most = shown[0].self_share
    for item in shown:
        module = item.module
        name = cell(shorten(clean(item.path), MOST_NAME), "bold")
        if wide and item.path == module.path:
            name.append(f"  {shorten(clean(module.kind), MOST_NAME)}", "dim")
        row = [name, cell(format_percent(item.self_share)), *([bar(item.self_share, most)] if bars else [])]
        row += [cell(format_ms(module.forward_ms))] + ([cell(format_ms(module.backward_ms))] if trains else [])
        row += [cell(format_flops(module.flops) if module.flops else "")]
        row += [cell(_profile_rows.parameters(module.parameters) if module.parameters else "")]
        row += [cell(format_bytes(module.saved_bytes if trains else module.output_bytes))]
        table.add_row(*row)
    yield table
    yield from _rest(len(facts) - len(shown), "module")


def _ops(profile: Profile, *, wide: bool) -> Iterator[RenderableType]:
    facts = _profile_rows.op_facts(profile)
    shown = [item for item in facts if item.share >= SMALLEST_SHARE][:MOST_OPS]
    if not shown:
        return
    columns = [("share", "right"), ("time", "right"), ("calls", "right")]
    columns += [("GFLOP/s", "right"), ("roof", "left"), ("module", "prose")] if wide else [("module", "prose")]
    table = text_table("kernel" if shown[0].op.kind == "kernel" else "operation", *columns)
    for item in shown:
        op = item.op
        row = [shorten(clean(op.name), MOST_OP), format_percent(item.share), item.ms, item.calls]
        row += [item.rate, item.bound] if wide else []
        where = " · ".join(part for part in (shorten(clean(op.module), MOST_NAME), op.phase) if part)
        table.add_row(*map(cell, (*row, where)))
    yield table
    yield from _rest(len(facts) - len(shown), "operation")


def _parts(profile: Profile) -> Iterator[RenderableType]:
    """What a step and its peak consist of, one thing a line."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    phases = [f"{name} {format_percent(share)}" for name, _, share in _profile_rows.phase_rows(profile) if share]
    if phases:
        table.add_row("phases", line(" · ".join(phases)))
    if (memory := profile.memory) is not None:
        held = [f"{name} {size}" for name, size, share in _profile_rows.category_rows(memory) if share >= 0.001]
        if held:
            table.add_row("held at the peak", line(" · ".join(held)))
        for piece in memory.largest[:MOST_ALLOCATIONS]:
            where = " · ".join(part for part in (piece.module, piece.op, piece.shape) if part)
            table.add_row("", line(f"{format_bytes(piece.bytes)} {piece.category}  {where}", "dim"))
        pairs = [
            f"{name} {format_quantity(value)}"
            for name, value in _profile_rows.memory_pairs(memory)
            if value.value is not None
        ]
        if pairs:
            table.add_row("memory", line(" · ".join(pairs)))
    if table.row_count:
        yield table


def _devices(profile: Profile) -> Iterator[RenderableType]:
    for device in profile.devices:
        known = [f"{name} {text}" for name, text in _profile_rows.reading_rows(device)]
        told = [*known, *(f"clock held down: {reason}" for reason in device.reasons)]
        told += [f"also computing: {process}" for process in device.processes]
        yield Text()
        yield Text.assemble((clean(device.name), "bold"), f"  {clean(' · '.join(told))}")


def _notes(profile: Profile) -> Iterator[RenderableType]:
    yield Text()
    for labels, reason in _profile_rows.missing(profile):
        yield line(f"unavailable: {labels}: {reason}", "dim")
    for note in (_profile_rows.overhead(profile), *profile.notes):
        if note:
            yield line(f"note: {note}")
    yield line(f"measured on {_environment_facts.environment_line(profile.environment)}", "dim")


def _below(text: Text) -> Padding:
    return Padding(text, (0, 0, 0, 2))


def _rest(count: int, noun: str) -> Iterator[RenderableType]:
    if count > 0:
        yield indented(f"{counted(count, f'more {noun}')} in the HTML and JSON profiles")
    yield Text()
