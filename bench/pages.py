"""Where results are kept and shown: results/<kind>-<device>.json, and from there between two marks of a page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from perfkit.measure.environment import environment

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"

NOTHING = ["", "Not measured yet.", ""]

Marks = tuple[str, str]
"""The lines of a page before and behind what is written there."""


def device_slug() -> str:
    """This machine as part of a file's name."""
    found = environment()
    told = " ".join((*found.accelerators, found.cpu, f"{found.cores} cores"))
    return re.sub(r"[^a-z0-9]+", "-", told.lower()).strip("-")


def recorded(kind: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every machine's file of results of that kind, and what it holds."""
    for path in sorted(RESULTS.glob(f"{kind}-*.json")):
        yield path, json.loads(path.read_text())


def machine(found: dict[str, Any]) -> str:
    """What a file's results were measured on: its accelerators, its processor, and how many cores."""
    about = found["environment"]
    return ", ".join([*about["accelerators"], about["cpu"], f"{about['cores']} cores"])


def put(page: Path, marks: Marks, lines: Iterable[str]) -> None:
    """Put lines between the marks of a page, in place of what stands there."""
    begin, end = marks
    before, _, rest = page.read_text().partition(begin)
    page.write_text("\n".join([before + begin, *lines, end]) + rest.partition(end)[2])


def between(page: Path, marks: Marks) -> str:
    """What stands between the marks of a page."""
    begin, end = marks
    return page.read_text().partition(begin)[2].partition(end)[0]
