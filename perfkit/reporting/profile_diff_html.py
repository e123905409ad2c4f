"""The difference of two profiles as HTML: a page of its own, or an output in a notebook."""

from __future__ import annotations

from typing import Any

from perfkit.profiling._align import Change
from perfkit.profiling.diff import ProfileDiff
from perfkit.reporting import _diff_facts, _rows, _svg, html, profile_html
from perfkit.reporting._format import clean, format_ms, shorten
from perfkit.reporting._svg import Canvas, Scale

MOST_BARS, MOST_ROWS, MOST_TITLE = 14, 300, 120


def render(diff: ProfileDiff) -> str:
    """The difference as one self-contained page; no network is needed to view it."""
    title = f"{shorten(clean(diff.after.model), MOST_TITLE)} · perfkit profile, before and after"
    return profile_html.page("diff.html", title, _view(diff))


def embedded(diff: ProfileDiff) -> str:
    """The difference for a notebook: an element whose style and script touch nothing around it."""
    return profile_html.fragment("diff.html", _view(diff))


def _view(diff: ProfileDiff) -> dict[str, Any]:
    """Everything the templates show, in words: they decide nothing."""
    times, ratio = _diff_facts.headline(diff)
    ops, modules = _diff_facts.weighty(diff, diff.ops), _diff_facts.weighty(diff, diff.modules)
    return {
        "model": shorten(clean(diff.after.model), MOST_TITLE),
        "identity": " · ".join(part for part in (diff.after.framework, diff.after.mode, diff.after.device) if part),
        "times": times,
        "ratio": ratio,
        "tone": "good" if diff.saved_ms > 0 else "",
        "cautions": diff.cautions,
        "how": _diff_facts.HOW,
        "waterfall": html.both(lambda width: waterfall(diff, width), profile_html.WIDE, profile_html.NARROW),
        "ops": _rows_of(ops[:MOST_ROWS]),
        "foot": _diff_facts.foot(diff, ops[:MOST_ROWS]),
        "modules": _rows_of(modules[:MOST_ROWS]),
        "memory": _diff_facts.byte_rows(change for change in diff.categories if change.status != "same"),
        "peak": _diff_facts.peak(diff),
        "sides": [
            (name, " · ".join(part for part in (side.inputs, side.created, f"fingerprint {side.fingerprint}") if part))
            for name, side in (("before", diff.before), ("after", diff.after))
        ],
    }


def _rows_of(changes: tuple[Change, ...]) -> list[dict[str, Any]]:
    return [
        {"words": row, "before": change.before_ms, "after": change.after_ms, "saved": change.saved_ms}
        for change, row in zip(changes, _diff_facts.time_rows(changes), strict=True)
    ]


def waterfall(diff: ProfileDiff, width: float) -> str:
    """From the step before to the step after: what each operation took away or added, the largest first."""
    bars = [(change.name, change.module, change.saved_ms) for change in _diff_facts.weighty(diff, diff.ops)[:MOST_BARS]]
    rest = diff.saved_ms - diff.outside.saved_ms - sum(saved for _, _, saved in bars)
    bars += [("other operations", "", rest), ("outside of operations", "", diff.outside.saved_ms)]
    narrow = width < _rows.NARROW
    name_width, value_width, row = (0.0, 0.0, 40.0) if narrow else (280.0, 90.0, 24.0)
    levels, level = [diff.before.step_ms], diff.before.step_ms
    for _, _, saved in bars:
        level -= saved
        levels.append(level)
    x = Scale(min(0.0, *levels), max(levels), name_width, width - value_width)
    height = row * (len(bars) + 2)
    told = "; ".join(f"{name} {_diff_facts.signed_ms(saved)}" for name, _, saved in bars)
    canvas = Canvas(width, height, "What the difference consists of", f"Saved: {told}.")

    def line(index: int, name: str, about: str, value: str, start: float, end: float, kind: str) -> None:
        top = index * row
        text = f"{name}  {about}" if about else name
        room = name_width - 12 if name_width else width - _svg.text_width(value, "small") - 12
        canvas.text(0, top + 13, text, "small mono", width=room)
        canvas.text(width, top + 13, value, "small", anchor="end")
        left, right = sorted((x(start), x(end)))
        canvas.rect(left, top + (20 if narrow else 3), max(right - left, 1.0), 14, f"bar {kind}")

    line(0, "before", "", format_ms(diff.before.step_ms), 0, diff.before.step_ms, "before")
    for index, (name, about, saved) in enumerate(bars):
        kind = "gain" if saved >= 0 else "loss"
        amount = "0 ms" if not saved else ("−" if saved > 0 else "+") + format_ms(abs(saved))
        line(index + 1, name, about, amount, levels[index], levels[index + 1], kind)
    line(len(bars) + 1, "after", "", format_ms(diff.after.step_ms), 0, diff.after.step_ms, "after")
    return canvas.svg()
