"""The command line's part about profiles: `perfkit profile`, `perfkit profile --diff`."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

import perfkit
from perfkit import _cli_common as common
from perfkit._chain import chain_of
from perfkit._cli_common import INTERRUPTED, REFUSED
from perfkit._errors import InvalidInputError
from perfkit.profiling._profile import Finding, Profile

STDOUT = Path("-")


def _file(name: str, about: str) -> Callable:
    """An option that names a file to write."""
    return click.option(name, type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help=about)


@common.telling_of_models
@click.command(
    short_help="Tell where time, memory and energy go, and what addresses it.",
    epilog="Exit codes: 0 done, 1 refused or the profile failed, 2 bad input, 130 interrupted; with --optimize those "
    "of perfkit optimize. What was collected before a failure or an interrupt is shown and written all the same.",
)
@click.argument("model", required=False)
@common.framework_option
@common.mode_option()
@common.batch_option
@click.option("--recipe", help="Profile what this chain makes of the model.  [default: the model as it is]")
@click.option("--budget", type=click.FloatRange(min=0, min_open=True), help="Seconds for timing steps.  [default: 6]")
@_file("--html", "Write the profile as one HTML page.")
@_file("--json", "Write the profile as JSON; - for standard output, instead of the screen.")
@_file("--trace", "Write the profiled step as a trace that ui.perfetto.dev opens.")
@_file("--snapshot", "torch: write the allocations of a step, for pytorch.org/memory_viz.")
@click.option("--diff", "pair", nargs=2, metavar="BEFORE AFTER", help="Compare two profiles that --json wrote.")
@click.option("--optimize", is_flag=True, help="Then optimize with the recipe of the most promising finding.")
def profile(model, framework, mode, batch_size, recipe, budget, html, json, trace, snapshot, pair, optimize) -> None:
    """Where the time, the memory and the energy of MODEL go, and which recipe addresses it.

    \b
    perfkit profile cnn --html profile.html --json before.json
    perfkit profile cnn --recipe compile --json after.json
    perfkit profile --diff before.json after.json
    """
    common.check_writable(html, json if json != STDOUT else None, trace, snapshot)
    if pair:
        if model or recipe or trace or snapshot or optimize:
            raise InvalidInputError("--diff compares two files: of the other options only --html and --json go with it")
        _show_diff(pair, html, json)
        return
    if optimize and json == STDOUT:
        raise InvalidInputError("--json - fills standard output, where --optimize prints its report: name a file")
    if not model:
        raise click.UsageError("Missing argument 'MODEL' (or --diff BEFORE AFTER).")
    with common.status() as progress, common.warnings_as_notes():
        progress(f"loading {model}")
        arguments = common.load(model, framework, mode, batch_size)
        options = {"mode": mode, "recipe": recipe, "snapshot": snapshot, "progress": progress}
        if budget:
            options["budget_s"] = budget
        found, code = _collected(arguments, options)
    found = _addressed(found, _command(model, framework, mode, batch_size), recipe)
    _show(found, json)
    _write(found, html, json, trace)
    if code or not optimize:
        sys.exit(code)
    _optimize(found, arguments, mode)


def _collected(arguments: Mapping[str, Any], options: dict[str, Any]) -> tuple[Profile, int]:
    """The profile as far as it came, and the exit code that tells how far that was."""
    try:
        found = perfkit.profile(**(common.taken_by(perfkit.profile, arguments) | options))
    except KeyboardInterrupt as interrupt:
        if (kept := getattr(interrupt, "profile", None)) is None:
            raise
        return kept, INTERRUPTED
    return found, 0 if found.outcome == "complete" else REFUSED


def _command(model: str, framework: str, mode: str, batch_size: int | None) -> str:
    """What optimizes the same model, without what is the default."""
    words = ["perfkit", "optimize", model]
    if ":" not in model and framework != "torch":
        words += ["--framework", framework]
    if mode != "inference":
        words += ["--mode", mode]
    if batch_size is not None:
        words += ["--batch-size", str(batch_size)]
    return shlex.join(words)


def _addressed(found: Profile, command: str, recipe: str | None) -> Profile:
    """The profile with the command that its findings lead to; what it was profiled with stays part of it."""
    findings = tuple(dataclasses.replace(item, recipe=_joined(recipe, item.recipe)) for item in found.findings)
    return dataclasses.replace(found, command=command, findings=findings)


def _joined(profiled: str | None, recipe: str) -> str:
    if not profiled or not recipe:
        return recipe
    there = {part.name for part in chain_of(profiled)}
    return "+".join([profiled, *(str(part) for part in chain_of(recipe) if part.name not in there)])


def _show(found: Any, json: Path | None) -> None:
    click.echo(found.to_json(), nl=False) if json == STDOUT else common.out.print(found)


def _write(found: Any, html: Path | None, json: Path | None, trace: Path | None = None) -> None:
    """Write the files asked for, and say where."""
    for path, write in ((html, "to_html"), (None if json == STDOUT else json, "to_json"), (trace, "to_trace")):
        if path:
            getattr(found, write)(path)
            common.err.print(f"wrote {path}")


def _show_diff(pair: tuple[str, str], html: Path | None, json: Path | None) -> None:
    from perfkit.profiling import diff

    found = diff.diff(*pair)
    _show(found, json)
    _write(found, html, json)


def _optimize(found: Profile, arguments: Mapping[str, Any], mode: str) -> None:
    """Apply what the most promising finding names, measure it, and exit as `perfkit optimize` does."""
    best = _most_promising(found.findings)
    if best is None:
        common.err.print(f"no finding names a recipe: {found.command} searches for one")
        sys.exit(0)
    common.err.print(f"optimizing for {best.kind}: {found.command} --recipe {shlex.quote(best.recipe)}")
    with common.status() as progress, common.warnings_as_notes():
        result = perfkit.optimize(**arguments, recipe=best.recipe, mode=mode, progress=progress)
    common.out.print(result.report)
    speedup = result.report.speedup
    sys.exit(common.EXIT_CODES.get(speedup.verdict, 0) if speedup else 0)


def _most_promising(findings: tuple[Finding, ...]) -> Finding | None:
    """The finding with a recipe whose predicted gain is the largest; time before memory, the costliest first."""
    named = [item for item in findings if item.recipe]
    return max(named, key=lambda item: (item.resource == "time", item.predicted.value or 1.0), default=None)
