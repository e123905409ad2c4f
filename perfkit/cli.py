"""The command line: `perfkit optimize`, `plan`, `profile`, `train`, `launch`, `recipes`, `doctor`, `demo`.

Exit codes: 0 done, 1 refused or failed, 2 bad input, 3 the result is slower, 4 too noisy to tell, 130 interrupted.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from rich.table import Table

import perfkit
from perfkit import _cli_common as common
from perfkit import _cli_parallel, _cli_profile
from perfkit._cli_common import BAD_INPUT, EXIT_CODES, INTERRUPTED, REFUSED
from perfkit._errors import InvalidInputError, PerfkitError
from perfkit._report import Report


class _Group(click.Group):
    """Turns perfkit's errors into one line on stderr and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PerfkitError as error:
            if _cli_parallel.started_by_launcher():
                raise  # the worker tells it with its rank, and the launcher who was first
            common.err.print(f"[bold red]{type(error).__name__}[/]: ", end="")
            common.err.print(str(error), markup=False, highlight=False, soft_wrap=True)
            ctx.exit(BAD_INPUT if isinstance(error, InvalidInputError) else REFUSED)
        except KeyboardInterrupt:
            common.err.print("interrupted: nothing was written")
            ctx.exit(INTERRUPTED)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(perfkit.__version__, prog_name="perfkit")
def main() -> None:
    """Make a PyTorch or JAX model faster with one call, and prove it.

    \b
    perfkit demo                             see it on the reference models
    perfkit doctor                           what this machine can do
    perfkit profile cnn                      where time and memory go
    perfkit optimize cnn                     find the best recipe
    perfkit optimize my.models:make          for a model of your own
    perfkit optimize cnn --recipe bf16       what one recipe gives
    """


@common.telling_of_models
@main.command(short_help="Find or apply a recipe, and measure it.", epilog=common.EXIT_HELP)
@click.argument("model")
@common.framework_option
@common.recipe_option
@common.mode_option()
@common.batch_option
@click.option("--budget", type=float, help="Seconds to spend.  [default: 90 for a search, 6 for a recipe]")
@click.option("--tolerance", type=float, help="Relative error that the result may add.  [default: the recipe's]")
@click.option("--strict", is_flag=True, help="A recipe that touches nothing is an error.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON instead.")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write the report as one HTML page.")
@click.option("--save-report", type=click.Path(dir_okay=False, path_type=Path), help="Write the report as JSON.")
@click.option("--save", type=click.Path(dir_okay=False, path_type=Path), help="Write the result, for perfkit.load.")
def optimize(
    model, framework, recipe, mode, batch_size, budget, tolerance, strict, as_json, html, save_report, save
) -> None:
    """Apply a recipe to MODEL, measure it against the original, and report."""
    if save and mode == "training":
        raise InvalidInputError("--save is for inference: what a training has learnt goes into the original")
    common.check_writable(html, save_report, save)
    with common.status() as progress:
        progress(f"loading {model}")
        arguments = common.load(model, framework, mode, batch_size)
        given = {"budget_s": budget, "tolerance": tolerance}
        arguments |= {name: value for name, value in given.items() if value is not None}
        with common.warnings_as_notes():
            result = perfkit.optimize(**arguments, recipe=recipe, mode=mode, strict=strict, progress=progress)
    report = result.report
    click.echo(report.to_json(), nl=False) if as_json else common.out.print(report)
    write(report, html, save_report)
    if save:
        result.save(save, **common.taken_by(result.save, arguments))
        common.err.print(f"wrote {save}")
    sys.exit(EXIT_CODES.get(report.speedup.verdict, 0) if report.speedup and not report.savings else 0)


@common.telling_of_models
@main.command(short_help="Show what a recipe would do, and what is refused.")
@click.argument("model")
@common.framework_option
@common.recipe_option
@common.mode_option()
@common.batch_option
@click.option("--parallel", is_flag=True, help="Predict which layout of several devices trains it the quickest.")
@click.option("--devices", type=click.IntRange(min=2), help="How many, with --parallel.")
@click.option("--link-gbps", type=click.FloatRange(min=0, min_open=True), help="Gbit/s that each sends; else measured.")
@click.option("--link-latency-us", type=click.FloatRange(min=0, min_open=True), help="Of a message.  [default: 10]")
def plan(model, framework, recipe, mode, batch_size, parallel, devices, link_gbps, link_latency_us) -> None:
    """Show what a recipe would do to MODEL, and what is refused and why. Nothing is timed or changed.

    With --parallel its parts are timed, and the training step is predicted for each layout of --devices. Without
    --link-gbps as many processes (in JAX: devices of one) are started here, and what lies between them is measured.
    Exits with 1 if a step is refused.

    \b
    perfkit plan cnn --recipe bf16+compile
    perfkit plan text_lstm --parallel --devices 8 --link-gbps 400
    perfkit plan text_lstm --parallel --devices 2
    """
    options = {"devices": devices, "link_gbps": link_gbps, "link_latency_us": link_latency_us}
    if parallel:
        told = {"framework": framework, "recipe": None if recipe == "auto" else recipe, "batch_size": batch_size}
        return _cli_parallel.plan_layouts(model, told | options)
    if given := [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]:
        raise InvalidInputError(f"{', '.join(given)}: about several devices, add --parallel")
    with common.status() as progress:
        progress(f"loading {model}")
        arguments = common.taken_by(perfkit.plan, common.load(model, framework, mode, batch_size))
        found = perfkit.plan(**arguments, recipe=recipe, mode=mode)
    common.out.print(found)
    sys.exit(0 if found.ok else REFUSED)


@main.command(short_help="Train a reference model, and evaluate it.")
@click.argument("model")
@common.framework_option
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Over all processes.")
@click.option("--steps", type=click.IntRange(min=1), help="[default: what the model needs]")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--recipe", help="Train what this recipe makes of the model.  [default: the model as it is]")
@click.option("--budget", type=float, help="Seconds to spend measuring the recipe.")
@click.option("--nproc", type=click.IntRange(min=1), help="Start so many processes for a recipe that takes several.")
@_cli_parallel.timeout_option
@_cli_parallel.keep_memory_option
@click.option("--checkpoint", type=click.Path(file_okay=False, path_type=Path), help="Folder for checkpoints.")
@click.option("--checkpoint-every", type=click.IntRange(min=1), help="Steps.  [default: after the last one]")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint.")
def train(
    model,
    framework,
    batch_size,
    steps,
    seed,
    recipe,
    budget,
    nproc,
    timeout,
    keep_memory,
    checkpoint,
    checkpoint_every,
    resume,
) -> None:
    """Train the reference model MODEL on its data, and evaluate it on held-out data.

    \b
    perfkit train cnn --recipe data_parallel --nproc 2 --checkpoint run1
    perfkit train cnn --steps 800 --checkpoint run1 --resume
    """
    from perfkit import reference

    options = {
        "framework": framework,
        "batch_size": batch_size,
        "steps": steps,
        "seed": seed,
        "recipe": recipe,
        "checkpoint": checkpoint,
        "checkpoint_every": checkpoint_every,
        "resume": resume,
    }
    if (resume or checkpoint_every) and not checkpoint:
        raise InvalidInputError("--resume and --checkpoint-every are about checkpoints: add --checkpoint FOLDER")
    if nproc or keep_memory:  # what keeps memory must be there before a process starts
        _cli_parallel.start_training(model, options | {"budget": budget}, nproc, timeout, keep_memory)
    with (
        _cli_parallel.first_alone(common.training_progress(f"{model} ({framework})")) as progress,
        common.warnings_as_notes(),
    ):
        trained = reference.train(model, **options, budget_s=budget, progress=progress)
    if _cli_parallel.leads():
        if trained.report:
            common.out.print(trained.report)
        common.out.print(common.trained_line(model, framework, trained), highlight=False, soft_wrap=True)


main.add_command(_cli_parallel.launch)
main.add_command(_cli_profile.profile)


@main.command(short_help="Find the largest batch that fits into memory.")
@click.argument("model")
@common.framework_option
@common.mode_option("training")
@click.option("--recipe", help="Of the model under this recipe.  [default: the model as it is]")
@click.option("--limit-mb", type=click.FloatRange(min=1), help="Memory to stay within.  [default: what is free]")
@click.option("--multiple-of", type=click.IntRange(min=1), help="Try multiples only.  [default: of micro-batches]")
def max_batch(model, framework, mode, recipe, limit_mb, multiple_of) -> None:
    """Find the largest batch of the reference model MODEL that fits into memory."""
    from perfkit._chain import chain_of
    from perfkit.reference._train_run import suited

    if ":" in model:
        raise InvalidInputError(f"MODEL={model!r}: expected a reference model; for yours call perfkit.max_batch_size")
    with common.status() as progress:
        loaded = common.load(model, framework, mode, 64)
        found = perfkit.max_batch_size(
            **{name: value for name, value in loaded.items() if name != "calibration"},
            mode=mode,
            recipe=suited(chain_of(recipe or ()), model),
            limit_bytes=None if limit_mb is None else int(limit_mb * 1e6),
            batch_dim=_cli_parallel.batch_dim(model),
            multiple_of=multiple_of,
            progress=progress,
        )
    common.out.print(str(found), highlight=False, soft_wrap=True)


@main.command()
def recipes() -> None:
    """List the recipes there are."""
    table = Table("recipe", "stage", "frameworks", "what it does", box=None, header_style="bold", pad_edge=False)
    for info in perfkit.recipes():
        options = ", ".join(f"{name}={default!r}" for name, default in info.options.items())
        summary = f"{info.summary}\n[dim]{options}[/]" if options else info.summary
        table.add_row(info.name, info.stage.lower(), ", ".join(info.frameworks), summary)
    table.add_row(
        "auto", "", "torch, jax", "Try the sensible chains of these, keep the fastest that holds, else the original."
    )
    common.out.print(table)


@main.command(short_help="Tell what this machine can do.")
def doctor() -> None:
    """Tell what this machine can do, and which recipes are ready on it. Exits with 1 if no framework is usable."""
    with common.status() as progress:
        progress("looking around")
        found = perfkit.doctor()
    common.out.print(found)
    sys.exit(0 if any(item.ready for item in found.recipes) else REFUSED)


@main.command(short_help="See it on the document's CNN and LSTM.")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), default="report.html", show_default=True)
@click.option("--budget", type=float, default=45.0, show_default=True, help="Seconds to search on each model.")
def demo(html, budget) -> None:
    """Train the reference CNN and LSTM on real data and make them faster in both frameworks."""
    from perfkit import _demo

    common.check_writable(html)
    _demo.run(html, budget)


def lesson(recipe: str) -> None:
    """What `python -m perfkit.recipes.NAME` runs: one recipe on one reference model, before and after."""
    from perfkit._recipe_files import recipe_class

    kind = recipe_class(recipe)

    @click.command(cls=click.Command, help=kind.__doc__, context_settings={"help_option_names": ["-h", "--help"]})
    @click.option("--model", default="cnn", show_default=True, help="A reference model.")
    @common.framework_option
    @common.mode_option("training" if kind.retrains else "inference")
    @common.batch_option
    def command(model, framework, mode, batch_size):
        with common.status() as progress, common.warnings_as_notes():
            arguments = common.load(model, framework, mode, batch_size)
            result = perfkit.optimize(**arguments, recipe=recipe, mode=mode, progress=progress)
        common.out.print(f"[bold]{recipe}[/]: {kind.__doc__.strip().splitlines()[0]}\n")
        common.out.print(result.report)

    _Group(f"perfkit.recipes.{recipe}", commands={recipe: command})([recipe, *sys.argv[1:]])


def write(report: Report, html: Path | None, save_report: Path | None) -> None:
    """Write the report to the files asked for, and say where."""
    if html:
        report.to_html(html)
        common.err.print(f"wrote {html}")
    if save_report:
        report.to_json(save_report)
        common.err.print(f"wrote {save_report}")


if __name__ == "__main__":
    main()
