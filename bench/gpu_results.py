"""What `python -m bench.gpu` writes down and tells: its file, row by row."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import os
from pathlib import Path
from typing import Any

PARTS = ("check", "compile", "stress", "tune", "time", "profile")


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a run before."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def told(row: dict[str, Any]) -> str:
    """A row for people."""
    for word in ("failed", "refused", "skipped"):
        if word in row:
            return f"{word}: {row[word]}"
    if "outcomes" in row:
        return ", ".join(f"{name} {told.partition(':')[0]}" for name, told in row["outcomes"].items())
    if "repeats" in row:
        return f"{row['repeats']} times the same bits, {row['programs']} programs on {row['processors']} processors"
    if "compiled" in row:
        return f"{row['compiled']} candidates compiled, {len(row['dropped'])} cannot run, {row['late']} too late"
    if "step_ms" in row:
        return f"{row['step_ms']:.3g} ms a step, {len(row['findings'])} findings, {row['written']}"
    if "busy_w" in row:
        return f"{row['idle_w']:.0f} W idle, {row['busy_w']:.0f} W at work, {row['written']}"
    if "fastest" in row:
        times = ", ".join(f"{name} {ms:.3g} ms" for name, ms in row["ms"].items())
        return f"{row['fastest']} {row['configuration'] or 'by its rule'} ({times})"
    ratios = (f"{rival} {_ratio(found)}" for rival, found in row["rivals"].items())
    return f"{row['ran']} against {'; '.join(ratios)}"


def _ratio(found: dict[str, Any]) -> str:
    """A comparison for people."""
    if "refused" in found:
        return found["refused"]
    alone = f", {found['device']['ratio']:.2f}x on the device alone" if "device" in found else ""
    return "{ratio:.2f}x [{low:.2f}, {high:.2f}] {verdict}".format(**found) + alone


def past(rows: list[dict[str, Any]]) -> frozenset[tuple[str, str]]:
    """What a run that goes on need not do again. Compiled is what is tuned: the compiler's cache may be gone."""
    right = [row for row in rows if "skipped" not in row and "failed" not in row and row["part"] != "compile"]
    done = {(row["part"], row["name"]) for row in right}
    return frozenset(done | {("compile", name) for part, name in done if part == "tune"})


def merged(kept: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """New rows in the place of those of the same name, but for such as there was no time for this time."""
    rows = {(row["part"], row["name"]): row for row in kept}
    for row in found:
        if "skipped" not in row or (row["part"], row["name"]) not in rows:
            rows[row["part"], row["name"]] = row
    return sorted(rows.values(), key=lambda row: PARTS.index(row["part"]))


def about() -> dict[str, Any]:
    """The file's head."""
    from perfkit.measure.environment import environment

    return {"environment": dataclasses.asdict(environment()), "date": dt.date.today().isoformat()}


def write(path: Path, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """The file, whole or not at all: one row a line."""
    head = json.dumps(about, indent=1, sort_keys=True).removesuffix("\n}")
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    partial = path.with_suffix(".partial")
    partial.write_text(f'{head},\n "rows": [\n  {lines}\n ]\n}}\n')
    os.replace(partial, path)
