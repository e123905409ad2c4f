"""What a launcher told this process about the others, by environment variables."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from perfkit._errors import InvalidInputError

DEFAULT_PORT = 29500
"""torchrun's."""


@dataclass(frozen=True)
class Launched:
    """A process as its launcher sees it.

    Args:
        rank, size: its number among all, and how many there are.
        local_rank, local_size: the same on its machine.
        address, port: where rank 0 can be reached.
        launcher: who told.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int
    launcher: str


def launched(variables: Mapping[str, str] = os.environ) -> Launched | None:
    """What torchrun (and `perfkit launch`) or Slurm's srun set; None where this process was started by neither.

    Raises:
        InvalidInputError: some of the variables are there, and others missing or no numbers.
    """
    if "RANK" in variables and "WORLD_SIZE" in variables:
        return _by_torchrun(variables)
    if "SLURM_PROCID" in variables and int(variables.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_ID" in variables:
        return _by_slurm(variables)
    return None


def _by_torchrun(variables: Mapping[str, str]) -> Launched:
    rank, size = _number(variables, "RANK"), _number(variables, "WORLD_SIZE")
    local = _number(variables, "LOCAL_RANK", rank), _number(variables, "LOCAL_WORLD_SIZE", size)
    if not 0 <= rank < size:
        raise InvalidInputError(f"RANK={rank} and WORLD_SIZE={size}: expected a rank from 0 to {size - 1}")
    address, port = variables.get("MASTER_ADDR", "127.0.0.1"), _number(variables, "MASTER_PORT", DEFAULT_PORT)
    return Launched(rank, size, *local, address, port, "torchrun")


def _by_slurm(variables: Mapping[str, str]) -> Launched:
    nodes = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST", "")
    address = variables.get("MASTER_ADDR") or first_host(nodes)
    # Steps of one job may run at the same time, and jobs on one machine: a port of each step's own.
    own = 10_000 + (_number(variables, "SLURM_JOB_ID", 0) * 31 + _number(variables, "SLURM_STEP_ID", 0)) % 20_000
    tasks_here = re.match(r"\d+", variables.get("SLURM_STEP_TASKS_PER_NODE", variables.get("SLURM_NTASKS", "1")))
    return Launched(
        _number(variables, "SLURM_PROCID"),
        _number(variables, "SLURM_NTASKS"),
        _number(variables, "SLURM_LOCALID", 0),
        int(tasks_here.group()) if tasks_here else 1,
        address,
        _number(variables, "MASTER_PORT", own),
        "Slurm",
    )


def first_host(nodes: str) -> str:
    """The first machine of Slurm's short form: "gpu[07-09,12],cpu3" is gpu07."""
    first = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodes.strip())
    if first is None:
        raise InvalidInputError(f"SLURM_STEP_NODELIST={nodes!r}: expected names of machines; or set MASTER_ADDR")
    return first.group(1) + (first.group(2) or "")


def _number(variables: Mapping[str, str], name: str, otherwise: int | None = None) -> int:
    given = variables.get(name)
    if given is None and otherwise is not None:
        return otherwise
    try:
        return int(given)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(
            f"{name} is {given!r}: a launcher sets it to a number; start the script with 'perfkit launch'"
        ) from error
