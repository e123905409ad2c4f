"""The command line: `perfkit optimize`, `plan`, `train`, `launch`, `recipes`, `doctor`, `demo`.

Exit codes: 0 done, 1 refused or failed, 2 bad input, 3 the result is slower, 4 too noisy to tell, 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

import perfkit
from perfkit import _cli_parallel
from perfkit._errors import InvalidInputError, PerfkitError
from perfkit._report import Report, Verdict
from perfkit._workload import MODES

REFUSED, BAD_INPUT, SLOWER, NOISY, INTERRUPTED = 1, 2, 3, 4, 130
EXIT_CODES = {Verdict.SLOWER: SLOWER, Verdict.NOISY: NOISY}

out, err = Console(), Console(stderr=True)

framework_option = click.option(
    "--framework", type=click.Choice(["torch", "jax"]), default="torch", show_default=True, help="Of a reference model."
)


def mode_option(default: str = "inference") -> Callable:
    return click.option("--mode", type=click.Choice(MODES), default=default, show_default=True)


batch_option = click.option("--batch-size", type=click.IntRange(min=1), help="Of a reference model.  [default: 64]")
recipe_option = click.option(
    "--recipe", default="auto", show_default=True, help="'auto', or names joined by '+': 'channels_last+bf16+compile'."
)
MODEL_HELP = """MODEL is a reference model (cnn, cnn2, rnn, lstm, text_rnn, text_lstm) or PACKAGE.MODULE:FACTORY, a
function that returns the model and its example inputs, or a dict of the arguments of perfkit.optimize."""
EXIT_HELP = "Exit codes: 0 done, 1 refused or failed, 2 bad input, 3 the result is slower, 4 too noisy to tell."


class _Group(click.Group):
    """Turns perfkit's errors into one line on stderr and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PerfkitError as error:
            if _cli_parallel.started_by_launcher():
                raise  # the worker tells it with its rank, and the launcher who was first
            err.print(f"[bold red]{type(error).__name__}[/]: ", end="")
            err.print(str(error), markup=False, highlight=False, soft_wrap=True)
            ctx.exit(BAD_INPUT if isinstance(error, InvalidInputError) else REFUSED)
        except KeyboardInterrupt:
            err.print("interrupted: nothing was written")
            ctx.exit(INTERRUPTED)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(perfkit.__version__, prog_name="perfkit")
def main() -> None:
    """Make a PyTorch or JAX model faster with one call, and prove it.

    \b
    perfkit demo                                   see it on the reference models
    perfkit doctor                                 what this machine can do
    perfkit optimize cnn --batch-size 512          find the best recipe
    perfkit optimize my.models:make --recipe bf16  on a model of your own
    """


@main.command(
    epilog="Exit codes: 0 done, 1 refused or failed, 2 bad input, 3 the result is slower, 4 too noisy to tell."
)
@click.argument("model")
@framework_option
@recipe_option
@mode_option()
@batch_option
@click.option("--budget", type=float, help="Seconds to spend on searching or measuring.")
@click.option("--tolerance", type=float, help="Relative error that the result may add.")
@click.option("--strict", is_flag=True, help="A recipe that touches nothing is an error.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON instead.")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write the report as one HTML page.")
@click.option("--save-report", type=click.Path(dir_okay=False, path_type=Path), help="Write the report as JSON.")
def optimize(model, framework, recipe, mode, batch_size, budget, tolerance, strict, as_json, html, save_report) -> None:
    """Apply a recipe to MODEL, measure it against the original, and report."""
    _writable(html, save_report)
    with status() as progress:
        progress(f"loading {model}")
        arguments = load(model, framework, mode, batch_size)
        with _warnings_as_notes():
            result = perfkit.optimize(
                **arguments,
                recipe=recipe,
                mode=mode,
                budget_s=budget,
                tolerance=tolerance,
                strict=strict,
                progress=progress,
            )
    report = result.report
    click.echo(report.to_json(), nl=False) if as_json else out.print(report)
    write(report, html, save_report)
    sys.exit(EXIT_CODES.get(report.speedup.verdict, 0) if report.speedup and not report.savings else 0)


optimize.help += f"\n\n{MODEL_HELP}"


@main.command()
@click.argument("model")
@framework_option
@recipe_option
@mode_option()
@batch_option
def plan(model, framework, recipe, mode, batch_size) -> None:
    """Show what a recipe would do to MODEL, and what is refused and why. Nothing is timed or changed.

    Exits with 1 if a step is refused.
    """
    with status() as progress:
        progress(f"loading {model}")
        found = perfkit.plan(**load(model, framework, mode, batch_size), recipe=recipe, mode=mode)
    out.print(found)
    sys.exit(0 if found.ok else REFUSED)


@main.command()
@click.argument("model")
@framework_option
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Over all processes.")
@click.option("--steps", type=click.IntRange(min=1), help="[default: what the model needs]")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--recipe", help="Train what this recipe makes of the model.  [default: the model as it is]")
@click.option("--budget", type=float, help="Seconds to spend measuring the recipe.")
@click.option("--nproc", type=click.IntRange(min=1), help="Start so many processes for a recipe that takes several.")
@_cli_parallel.timeout_option
@click.option("--checkpoint", type=click.Path(file_okay=False, path_type=Path), help="Folder for checkpoints.")
@click.option("--checkpoint-every", type=click.IntRange(min=1), help="Steps.  [default: after the last one]")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint.")
def train(
    model, framework, batch_size, steps, seed, recipe, budget, nproc, timeout, checkpoint, checkpoint_every, resume
) -> None:
    """Train the reference model MODEL on its data, and evaluate it on held-out data.

    \b
    perfkit train cnn --recipe data_parallel --nproc 2 --checkpoint run1
    perfkit train cnn --recipe data_parallel --nproc 2 --checkpoint run1 --steps 800 --resume
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
    if nproc:
        _cli_parallel.start_training(model, options | {"budget": budget}, nproc, timeout)
    with _cli_parallel.first_alone(training_progress(f"{model} ({framework})")) as progress, _warnings_as_notes():
        trained = reference.train(model, **options, budget_s=budget, progress=progress)
    if _cli_parallel.leads():
        if trained.report:
            out.print(trained.report)
        out.print(trained_line(model, framework, trained), highlight=False, soft_wrap=True)


main.add_command(_cli_parallel.launch)


@main.command()
@click.argument("model")
@framework_option
@mode_option("training")
@click.option("--recipe", help="Of the model under this recipe.  [default: the model as it is]")
@click.option("--limit-mb", type=click.FloatRange(min=1), help="Memory to stay within.  [default: what is free]")
@click.option("--multiple-of", type=click.IntRange(min=1), default=1, show_default=True, help="Try multiples only.")
def max_batch(model, framework, mode, recipe, limit_mb, multiple_of) -> None:
    """Find the largest batch of the reference model MODEL that fits into memory."""
    with status() as progress:
        loaded = load(model, framework, mode, 64)
        found = perfkit.max_batch_size(
            **{name: value for name, value in loaded.items() if name != "calibration"},
            mode=mode,
            recipe=recipe,
            limit_bytes=None if limit_mb is None else int(limit_mb * 1e6),
            multiple_of=multiple_of,
            progress=progress,
        )
    out.print(str(found), highlight=False, soft_wrap=True)


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
    out.print(table)


@main.command()
def doctor() -> None:
    """Tell what this machine can do, and which recipes are ready on it. Exits with 1 if no framework is usable."""
    with status() as progress:
        progress("looking around")
        found = perfkit.doctor()
    out.print(found)
    sys.exit(0 if any(item.ready for item in found.recipes) else REFUSED)


@main.command()
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), default="report.html", show_default=True)
@click.option("--budget", type=float, default=45.0, show_default=True, help="Seconds to search on each model.")
def demo(html, budget) -> None:
    """Train the reference CNN and LSTM on real data and make them faster in both frameworks."""
    from perfkit import _demo

    _writable(html)
    _demo.run(html, budget)


def lesson(recipe: str) -> None:
    """What `python -m perfkit.recipes.NAME` runs: one recipe on one reference model, before and after."""
    kind = perfkit._recipe.recipe_class(recipe)

    @click.command(cls=click.Command, help=kind.__doc__, context_settings={"help_option_names": ["-h", "--help"]})
    @click.option("--model", default="cnn", show_default=True, help="A reference model.")
    @framework_option
    @mode_option("training" if kind.retrains else "inference")
    @batch_option
    def command(model, framework, mode, batch_size):
        with status() as progress, _warnings_as_notes():
            arguments = load(model, framework, mode, batch_size)
            result = perfkit.optimize(**arguments, recipe=recipe, mode=mode, progress=progress)
        out.print(f"[bold]{recipe}[/]: {kind.__doc__.strip().splitlines()[0]}\n")
        out.print(result.report)

    _Group(f"perfkit.recipes.{recipe}", commands={recipe: command})([recipe, *sys.argv[1:]])


def load(model: str, framework: Any, mode: str, batch_size: int | None) -> dict[str, Any]:
    """The arguments of `perfkit.optimize` for a reference model, or from a factory of the user's.

    Raises:
        InvalidInputError: no such reference model or factory, or the factory returned something else.
    """
    if ":" in model:
        if batch_size is not None:
            raise InvalidInputError("--batch-size is for reference models: your factory decides on its own inputs")
        return _from_factory(model)
    from perfkit import reference

    if mode == "inference":
        loaded, example_inputs = reference.load(model, framework=framework, batch_size=batch_size)
        calibration = reference.calibration(model, framework=framework)
        return {"model": loaded, "example_inputs": example_inputs, "calibration": calibration}
    task = reference.task(model, framework=framework, batch_size=batch_size)
    names = ("model", "example_inputs", "targets", "loss", "optimizer")
    return {name: getattr(task, name) for name in names}


def _from_factory(path: str) -> dict[str, Any]:
    module, _, name = path.partition(":")
    sys.path.insert(0, os.getcwd())  # as `python -m` does: the user's module lies where they are
    try:
        factory = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InvalidInputError(
            f"MODEL={path!r}: {error}; expected PACKAGE.MODULE:FACTORY, importable from here"
        ) from error
    finally:
        sys.path.pop(0)
    made = factory()
    if isinstance(made, Mapping) and "model" in made:
        return dict(made)
    if isinstance(made, tuple) and len(made) == 2:
        return {"model": made[0], "example_inputs": made[1]}
    raise InvalidInputError(
        f"{path} returned a {type(made).__name__}: expected (model, example_inputs), or a dict of optimize's arguments"
    )


def write(report: Report, html: Path | None, save_report: Path | None) -> None:
    """Write the report to the files asked for, and say where."""
    if html:
        report.to_html(html)
        err.print(f"wrote {html}")
    if save_report:
        report.to_json(save_report)
        err.print(f"wrote {save_report}")


def trained_line(model: str, framework: str, trained: Any) -> str:
    """One line on a trained reference model."""
    return (
        f"{model} ({framework}): held-out {trained.metric} {trained.value:.4g} "
        f"(baseline {trained.baseline:.4g}) after {trained.train_seconds:.1f} s of training"
    )


@contextmanager
def training_progress(label: str) -> Iterator[Callable[[int, int, float], None]]:
    """A progress bar as `reference.train` feeds it: step, total, loss."""
    from rich.progress import Progress

    with Progress(console=err, transient=True) as bar:
        task = bar.add_task(f"training {label}", total=None)

        def progress(step: int, total: int, loss: float) -> None:
            bar.update(task, completed=step, total=total, description=f"training {label}, loss {loss:.4f}")

        yield progress


@contextmanager
def status(label: str = "") -> Iterator[Callable[[str], None]]:
    """A line on stderr that tells what is being done, where stderr is a terminal."""
    prefix = f"{label}: " if label else ""
    with err.status(prefix) as shown:
        yield lambda message: shown.update(f"{prefix}{message} …")


@contextmanager
def _warnings_as_notes() -> Iterator[None]:
    """perfkit's own warnings are in the report already."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", perfkit.PerfkitWarning)
        yield


def _writable(*paths: Path | None) -> None:
    for path in filter(None, paths):
        folder = path.absolute().parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise InvalidInputError(f"cannot write {path}: there is no writable folder {folder}")


if __name__ == "__main__":
    main()
