"""The part of docs/memory.md that shows what `python -m bench.caches` measured."""

from __future__ import annotations

from typing import Any

from bench.pages import DOCS, NOTHING, machine, put, recorded
from perfkit.reporting._format import format_bytes

PAGE = DOCS / "memory.md"
MARKS = "<!-- measured: written by python -m bench.caches -->", "<!-- end -->"


def write() -> None:
    """Put what was recorded between the marks of the page."""
    put(PAGE, MARKS, measured())


def measured() -> list[str]:
    lines = []
    for path, found in recorded("caches"):
        lines += [
            "",
            f"{machine(found)}, training steps of an 18-layer CNN at batch {found['batch_size']}; "
            f"source: `bench/results/{path.name}`.",
            *_told(found["rows"]),
        ]
    return [*lines, ""] if lines else NOTHING


def _told(rows: list[dict[str, Any]]) -> list[str]:
    settings = [row for row in rows if row["case"] == "settings"]
    lines = []
    if settings:
        lines += ["", "| the C library | framework | a step | page faults in it | resident |", "|---|---|---|---|---|"]
        for row in settings:
            variables = " ".join(f"`{name}={value}`" for name, value in row["variables"].items())
            cells = (
                f"{row['setting']} {variables}".strip(), row["framework"], f"{row['step_ms']:.0f} ms",
                f"{row['faults']:.0f}", format_bytes(row["resident_bytes"]),
            )  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    told = [ABOUT[row["case"]](row) for row in rows if row["case"] in ABOUT]
    return [*lines, "", *(f"- {line}" for line in told)] if told else lines


def _about_trim(row: dict[str, Any]) -> str:
    plain, trimmed = row["without"], row["with"]
    return (
        f"`malloc_trim` between two steps takes {row['trim_ms']:.1f} ms and gives back "
        f"{format_bytes(row['given_back_bytes'])} of {format_bytes(row['resident_bytes'])}. The next step takes "
        f"{trimmed['step_ms']:.0f} ms with {trimmed['faults']:.0f} page faults, in place of "
        f"{plain['step_ms']:.0f} ms with {plain['faults']:.0f}."
    )


def _about_small_blocks(row: dict[str, Any]) -> str:
    again, faults = row["again_ms"], row["again_faults"]
    held, freed, trimmed = (format_bytes(row[f"{name}_bytes"]) for name in ("held", "freed", "trimmed"))
    return (
        f"{row['blocks']} tensors of {format_bytes(row['block_bytes'])} take {held}. With all but {row['kept']} of "
        f"them freed, {freed} stay resident; after `malloc_trim`, which takes {row['trim_ms']:.0f} ms, {trimmed}. "
        f"Making as many again takes {again[0]:.0f} ms with {faults[0]} page faults before it, and {again[1]:.0f} ms "
        f"with {faults[1]} after it."
    )


def _about_clear_caches(row: dict[str, Any]) -> str:
    return (
        f"`jax.clear_caches()` gives back {format_bytes(max(row['given_back_bytes'], 0))}. The next step compiles "
        f"{row['programs']} program(s) again and takes {row['next_ms'] / 1e3:.1f} s in place of "
        f"{row['step_ms'] / 1e3:.2f} s."
    )


def _about_empty_cache(row: dict[str, Any]) -> str:
    never, each = row["never"], row["each step"]
    reserved, after = map(format_bytes, row["reserved_bytes"])
    return (
        f"`torch.cuda.empty_cache()` in each step: {each['step_ms']:.1f} ms with {each['device_allocations']:.0f} "
        f"allocations by the driver, in place of {never['step_ms']:.1f} ms with {never['device_allocations']:.0f}. "
        f"It leaves {after} reserved of {reserved}, with {format_bytes(row['allocated_bytes'])} in tensors."
    )


ABOUT = {
    "trim": _about_trim,
    "small blocks": _about_small_blocks,
    "clear_caches": _about_clear_caches,
    "empty_cache": _about_empty_cache,
}
