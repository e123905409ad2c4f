"""A profile as HTML: a page of its own, or an output in a notebook."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from perfkit.profiling import _views
from perfkit.profiling._memory_data import Memory
from perfkit.profiling._profile import DeviceState, Profile
from perfkit.reporting import (
    _environment_facts,
    _profile_data,
    _profile_facts,
    _profile_rows,
    html,
    plots,
    profile_plots,
)
from perfkit.reporting._format import (
    clean,
    format_bytes,
    format_count,
    format_flops,
    format_ms,
    format_percent,
    shorten,
    with_reason,
)

# The column's width on a desk and in a hand; the page shows the picture that fits.
WIDE, NARROW, CURVE = 900, 350, 420
# More belongs into the JSON: the page is read by a person.
MOST_OPS, MOST_MODULES, MOST_ALLOCATIONS, MOST_FINDINGS = 200, 300, 40, 20
# A distribution of a handful of steps has no shape.
FEWEST_STEPS = 20
MOST_TITLE, MOST_TEXT, MOST_PATH = 120, 1000, 48

Cell = tuple[str, float]
"""What a cell shows, and the number that it is sorted by."""


def render(profile: Profile) -> str:
    """The profile as one self-contained page; no network is needed to view it."""
    title = f"{shorten(clean(profile.model), MOST_TITLE)} · perfkit profile"
    return page("profile.html", title, _view(profile))


def embedded(profile: Profile) -> str:
    """The profile for a notebook: an element whose style and script touch nothing around it."""
    return fragment("profile.html", _view(profile))


def page(body: str, title: str, view: dict[str, Any]) -> str:
    """A page of the article that the template `body` makes of `view`, with the script."""
    template = html.templates().get_template("scripted_page.html")
    return template.render(body=body, title=title, view=view, script=script())


def fragment(body: str, view: dict[str, Any]) -> str:
    """The same for a notebook."""
    return html.templates().get_template("scripted_embedded.html").render(body=body, view=view, script=script())


@functools.cache
def script() -> Markup:
    """The page's script: our own, without a library."""
    folder = files("perfkit.reporting") / "script"
    parts = [
        (folder / f"{name}.js").read_text(encoding="utf-8")
        for name in ("base", "timeline", "modules", "memory", "page")
    ]
    # Safe as markup: these are files of ours, and hold no data.
    return Markup('(() => {\n"use strict";\n' + "\n".join(parts) + "})();")


def _view(profile: Profile) -> dict[str, Any]:
    """Everything the templates show, in words: they decide nothing."""
    facts = _profile_facts
    ops, modules = _profile_rows.op_facts(profile), _profile_rows.module_facts(profile)
    root = _profile_data.tree(profile)
    colours = _profile_data.colours(root)
    on_device = profile.time is not None and _views.on_device(profile.time)
    phases = _profile_rows.phase_rows(profile)
    steps = [(facts.per(profile), profile.time.step)] if profile.time is not None else []
    steps = [(name, step) for name, step in steps if len(step.samples_ms) >= FEWEST_STEPS]
    held = _profile_rows.category_rows(profile.memory) if profile.memory else ()
    return {
        "model": shorten(clean(profile.model), MOST_TITLE),
        "identity": " · ".join(part for part in (profile.framework, profile.mode, profile.device) if part),
        "inputs": shorten(clean(profile.inputs), MOST_TEXT),
        "per": facts.per(profile),
        "trains": profile.mode == "training",
        "head": facts.headline(profile),
        "alarms": facts.alarms(profile),
        "figures": facts.figures(profile),
        "findings": [facts.finding_facts(finding, profile) for finding in profile.findings[:MOST_FINDINGS]],
        "phases": [
            {"name": name, "amount": f"{amount}, {format_percent(share)}", "swatch": f"p{index}"}
            for index, (name, amount, share) in enumerate(phases)
        ],
        "has_spans": bool(profile.time and profile.time.spans),
        "left_out": format_count(left_out) if (left_out := _profile_data.left_out(profile)) else "",
        "legend": [{"name": _tail(path), "amount": "", "swatch": f"c{index}"} for path, index in colours.items()],
        "has_map": bool(root.children),
        "modules": [_module_row(item, profile) for item in modules[:MOST_MODULES]],
        "more_modules": max(0, len(modules) - MOST_MODULES),
        "op_noun": "kernel" if on_device else "operation",
        "ops_title": "Kernels" if on_device else "Operations",
        "ops": [_op_row(item) for item in ops[:MOST_OPS]],
        "more_ops": max(0, len(ops) - MOST_OPS),
        "no_roofline": _no_roofline(profile),
        "memory": _memory(profile.memory) if profile.memory else None,
        "devices": [_device(device) for device in profile.devices],
        "overhead": _profile_rows.overhead(profile),
        "methods": _profile_rows.methods(profile),
        "missing": _profile_rows.missing(profile),
        "notes": profile.notes,
        "environment": _environment_facts.environment_rows(profile.environment),
        "footer": " · ".join(part for part in (f"perfkit {profile.perfkit_version}".strip(), profile.created) if part),
        "pictures": {
            "steps": _both(lambda width: plots.distributions(steps, width, facts.per(profile))),
            "phases": _both(profile_plots.shares, phases, [f"p{index}" for index in range(len(phases))], "Phases"),
            "roofline": _both(profile_plots.roofline, profile),
            "memory": _both(profile_plots.memory, profile.memory) if profile.memory else "",
            "categories": _both(
                profile_plots.shares, held, [profile_plots.colour(name) for name, _, _ in held], "Held at the peak"
            ),
        },
        "data": _profile_data.script_data(profile, root, colours),
    }


def _module_row(facts: _profile_rows.ModuleFacts, profile: Profile) -> dict[str, Any]:
    module, trains = facts.module, profile.mode == "training"
    kept = module.saved_bytes if trains else module.output_bytes
    return {
        "path": facts.path,
        "kind": module.kind,
        "share": _cell(facts.share, format_percent),
        "own": _cell(facts.self_share, format_percent),
        "forward": _cell(module.forward_ms, format_ms),
        "backward": _cell(module.backward_ms, format_ms),
        "flops": _cell(module.flops, format_flops),
        "parameters": _cell(module.parameters, _profile_rows.parameters),
        "kept": _cell(kept, format_bytes),
    }


def _op_row(facts: _profile_rows.OpFacts) -> dict[str, Any]:
    op = facts.op
    return {
        "name": shorten(clean(op.name), MOST_TITLE),
        "shapes": shorten(clean(op.shapes), MOST_TITLE),
        "module": shorten(clean(op.module), MOST_TITLE),
        "phase": op.phase,
        "share": _cell(facts.share, format_percent),
        "ms": _cell(op.self_ms, format_ms),
        "calls": (facts.calls, _finite(op.calls)),
        "rate": (facts.rate, _finite(op.flops / op.self_ms) if op.self_ms else 0.0),
        "roof": (facts.bound, _finite(facts.reached)),
    }


def _memory(memory: Memory) -> dict[str, Any]:
    shown = memory.largest[:MOST_ALLOCATIONS]
    return {
        "categories": [
            {
                "name": name,
                "amount": f"{size}, {format_percent(share)}",
                "swatch": profile_plots.colour(name),
            }
            for name, size, share in _profile_rows.category_rows(memory)
        ],
        "largest": [
            {
                "bytes": _cell(piece.bytes, format_bytes),
                "category": piece.category,
                "module": shorten(clean(piece.module), MOST_TITLE),
                "op": shorten(clean(piece.op), MOST_TITLE),
                "shape": shorten(clean(piece.shape), MOST_TITLE),
                "born": ("before", -1.0) if piece.born_ms < 0 else _moment(piece.born_ms),
                "freed": ("kept", math.inf) if piece.freed_ms is None else _moment(piece.freed_ms),
            }
            for piece in shown
        ],
        "more": len(memory.largest) - len(shown),
        "pairs": [
            (
                "activations at the peak",
                shorten(clean(_profile_rows.by_module(memory) or "none known by module"), MOST_TEXT),
            ),
            *((label, with_reason(quantity)) for label, quantity in _profile_rows.memory_pairs(memory)),
        ],
    }


def _device(device: DeviceState) -> dict[str, Any]:
    curves = (profile_plots.series(item, CURVE) for item in device.series)
    return {
        "name": shorten(clean(device.name), MOST_TITLE),
        # Safe as markup: the canvas escapes every text it is given.
        "curves": [Markup(curve) for curve in curves if curve],
        "reasons": device.reasons,
        "processes": ", ".join(device.processes),
        "readings": _profile_rows.reading_rows(device),
    }


def _both(draw: Callable[..., str], *what: Any) -> Markup:
    return html.both(lambda width: draw(*what, width), WIDE, NARROW)


def _no_roofline(profile: Profile) -> str:
    """Why there is no roofline, where there is none."""
    if profile.ceilings is None:
        return "the machine's ceilings were not measured."
    if (bandwidth := profile.ceilings.bandwidth_gb_s).value is None:
        return f"{bandwidth.unavailable}."
    return "no operation has both a number of FLOPs and of bytes."


def _tail(path: str) -> str:
    """The end of a long path: what tells modules of one model apart."""
    path = clean(path)
    return path if len(path) <= MOST_PATH else f"…{path[-MOST_PATH + 1 :]}"


def _cell(value: float, shown: Callable[[Any], str]) -> Cell:
    return (shown(value), _finite(value)) if value else ("", 0.0)


def _moment(at_ms: float) -> Cell:
    """A time of the step; its beginning is one too."""
    return format_ms(at_ms), _finite(at_ms)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0
