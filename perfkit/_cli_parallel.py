"""The command line's part about several processes: `perfkit launch`, and what `perfkit train` needs of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from typing import Any, NoReturn

import click

from perfkit._errors import InvalidInputError

TIMEOUT_HELP = "Seconds after which a process that reports no step is taken for hung."
timeout_option = click.option(
    "--timeout", type=click.FloatRange(min=0, min_open=True), default=600.0, show_default=True, help=TIMEOUT_HELP
)

keep_memory_option = click.option(
    "--keep-memory", is_flag=True, help="On a CPU: keep memory from call to call, as docs/memory.md has it."
)


@click.command(
    short_help="Run a script in several processes.",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.option("--nproc", type=click.IntRange(min=1), required=True, help="Processes on this machine.")
@click.option("--nnodes", type=click.IntRange(min=1), default=1, show_default=True, help="Machines.")
@click.option("--node-rank", type=click.IntRange(min=0), default=0, show_default=True, help="Which one this is.")
@click.option("--address", help="Of the first machine.")
@click.option("--port", type=click.IntRange(1, 65534), help="A free one of the first machine.")
@click.option("--framework", type=click.Choice(["torch", "jax"]), help="[default: torch, where it is installed]")
@timeout_option
@keep_memory_option
@click.option("-m", "--module", is_flag=True, help="SCRIPT is the name of a module, as in python -m.")
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def launch(nproc, nnodes, node_rank, address, port, framework, timeout, keep_memory, module, script, arguments) -> None:
    """Run SCRIPT in several processes that find each other; if one fails, end all and tell which and why.

    \b
    perfkit launch --nproc 2 train.py --epochs 3
    perfkit launch --nproc 8 --nnodes 2 --node-rank 0 \\
        --address gpu01 --port 29500 train.py
    """
    from perfkit.parallel.launching import Launch

    start(
        [*(["-m"] if module else []), script, *arguments],
        Launch(
            processes=nproc,
            nodes=nnodes,
            node=node_rank,
            address=address,
            port=port,
            framework=framework or ("torch" if find_spec("torch") else "jax"),
            timeout_s=timeout,
            keep_memory=keep_memory,
        ),
    )


def start(command: list[str], how: Any) -> NoReturn:
    """Run the command in several processes, tell what went wrong, and exit as they did."""
    from perfkit.parallel import launching

    ended = launching.launch(command, how)
    if ended:
        click.echo(launching.told(ended), err=True)
    sys.exit(launching.exit_code(ended))


def start_training(
    model: str, options: Mapping[str, Any], processes: int | None, timeout_s: float, keep_memory: bool
) -> NoReturn:
    """`perfkit train` in several processes, each without --nproc; or in one of its own, which keeps memory.

    Raises:
        InvalidInputError: no recipe for several processes was named.
    """
    from perfkit._chain import chain_of
    from perfkit._recipe import ParallelRecipe
    from perfkit.parallel.launching import Launch

    chain = chain_of(options["recipe"] or [])
    if processes and not any(isinstance(recipe, ParallelRecipe) for recipe in chain):
        raise InvalidInputError(
            f"--nproc {processes} with --recipe {options['recipe'] or '(none)'}: name a recipe that takes several "
            "processes, such as data_parallel"
        )
    command = ["-m", "perfkit.cli", "train", model, *as_arguments(options)]
    about = {"framework": options["framework"], "timeout_s": timeout_s, "keep_memory": keep_memory}
    start(command, Launch(processes=processes or 1, **about))


def plan_layouts(model: str, options: Mapping[str, Any]) -> None:
    """`perfkit plan --parallel`: in this process where the link was given, else in as many as there are devices.

    In JAX in one process that is started with as many devices.

    Raises:
        InvalidInputError: no number of devices.
    """
    from perfkit import _cli_common as common
    from perfkit.parallel.environment import launched
    from perfkit.parallel.launching import Launch
    from perfkit.parallel.planning_layouts import LATENCY_US, layouts

    if options["devices"] is None:
        raise InvalidInputError("--parallel: say how many --devices there are")
    in_jax = options["framework"] == "jax"
    if launched() is None and (in_jax or options["link_gbps"] is None):
        command = ["-m", "perfkit.cli", "plan", model, "--parallel", *as_arguments(options)]
        about = {"processes": 1, "devices": options["devices"]} if in_jax else {"processes": options["devices"]}
        start(command, Launch(framework=options["framework"], **about))
    with first_alone(common.status()) as progress:
        given = common.load(model, options["framework"], "training", options["batch_size"])
        found = layouts(
            **common.taken_by(layouts, given),
            devices=options["devices"],
            link_gbps=options["link_gbps"],
            link_latency_us=options["link_latency_us"] or LATENCY_US,
            recipe=options["recipe"],
            batch_dim=batch_dim(model),
            progress=progress or str,
        )
    if leads():
        common.out.print(found)


def batch_dim(model: str) -> int:
    """Of a reference model; sequences lie in time first."""
    from perfkit.reference._catalog import CARDS

    return 1 if model in CARDS and CARDS[model].kind == "sequences" else 0


def leads() -> bool:
    """Whether this process is the first or only one: the one that talks to the user."""
    from perfkit.parallel.environment import launched

    about = launched()
    return about is None or about.rank == 0


def started_by_launcher() -> bool:
    """Whether `perfkit launch` watches this process."""
    from perfkit.parallel import heartbeat

    return heartbeat.folder() is not None


@contextmanager
def first_alone(shown: AbstractContextManager[Any]) -> Iterator[Any]:
    """A progress display in the first process; None in the others."""
    if leads():
        with shown as progress:
            yield progress
    else:
        yield None


def as_arguments(options: Mapping[str, Any]) -> list[str]:
    """A command's options, as they are typed."""
    typed: list[str] = []
    for name, value in options.items():
        if value is True:
            typed.append(f"--{name.replace('_', '-')}")
        elif value is not None and value is not False:
            typed += [f"--{name.replace('_', '-')}", str(value)]
    return typed
