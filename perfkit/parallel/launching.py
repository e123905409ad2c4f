"""Starting several processes on this machine, watching them, and telling which one ended first and why.

On torchrun's agent where torch is the framework, else one by one, with the same environment variables.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from perfkit._errors import InvalidInputError, UnsupportedError
from perfkit.measure import kept_memory
from perfkit.parallel import heartbeat
from perfkit.parallel.watching import Silence, Watch

GRACE_S = 10.0
"""How long the others may take to end once one has failed, before they are killed."""
COLLECTIVE_EXTRA_S = 10.0
"""By how much longer a collective waits than the launcher, so that the launcher tells which rank was silent."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How processes are started.

    Args:
        processes: on this machine.
        nodes, node: how many machines, and which of them this one is.
        address, port: of the first machine; needed where there are several.
        framework: "torch" or "jax"; "" for a script without either.
        timeout_s: a process that tells of its steps and is silent for so long is taken for hung.
        devices: JAX on a CPU: how many each process makes of it; None for one.
        keep_memory: on a CPU: whether processes keep memory from call to call, by settings of glibc.
    """

    processes: int
    nodes: int = 1
    node: int = 0
    address: str | None = None
    port: int | None = None
    framework: str = "torch"
    timeout_s: float = 600.0
    devices: int | None = None
    keep_memory: bool = False

    def __post_init__(self):
        if self.keep_memory and (reason := kept_memory.unavailable()):
            raise UnsupportedError(f"--keep-memory cannot work here: its settings do nothing, since {reason}")
        if self.nodes > 1 and (self.address is None or self.port is None):
            raise InvalidInputError(
                f"{self.nodes} machines find each other by --address and --port: give those of the first machine"
            )
        if not 0 <= self.node < self.nodes:
            raise InvalidInputError(f"--node-rank {self.node} of {self.nodes}: expected 0 to {self.nodes - 1}")

    @property
    def ranks(self) -> range:
        """The ranks on this machine."""
        return range(self.node * self.processes, (self.node + 1) * self.processes)


@dataclass(frozen=True)
class Ended:
    """How one process ended that did not end well.

    Args:
        code: its exit code; the negative of a signal's number.
        step: the step that it began last, where it told.
        failure: what it said itself; None where it had no time to.
        silence: how the launcher found it, where that killed it for being silent.
    """

    rank: int
    code: int
    step: int | None
    failure: heartbeat.Failure | None
    silence: Silence | None

    @property
    def how(self) -> str:
        """In a few words: "SIGKILL", "exit code 1"."""
        return f"exit code {self.code}" if self.code >= 0 else _signal_name(-self.code)

    @property
    def cause(self) -> str:
        """What is known about it, in one line."""
        if self.silence is not None:
            return f"silent for {self.silence.seconds:.0f} s, and then ended by the launcher; {self.silence.where}"
        return f"{self.how}: {self.failure.cause}" if self.failure else self.how


def launch(command: list[str], how: Launch) -> list[Ended]:
    """Run `python -m perfkit.parallel.worker COMMAND` in several processes.

    Returns:
        Those that failed, the one that ended first at the head; none where all ended well. Whoever was still at work
        when the first one failed has been ended, and is among them.
    """
    start = _by_torchrun if how.framework == "torch" else _by_hand
    # -P: or a folder of this name where the user happens to be hides the package
    worker = ["-P", "-m", "perfkit.parallel.worker", "--framework", how.framework, *command]
    with tempfile.TemporaryDirectory(prefix="perfkit-run-") as named:
        folder = Path(named)
        collectives_s = os.environ.get("PERFKIT_TIMEOUT_S", str(how.timeout_s + COLLECTIVE_EXTRA_S))
        told = {heartbeat.FOLDER: named, "PERFKIT_TIMEOUT_S": collectives_s}
        if how.keep_memory:
            told |= kept_memory.SETTINGS
        if how.devices is not None:
            flags = (os.environ.get("XLA_FLAGS", ""), f"--xla_force_host_platform_device_count={how.devices}")
            told["XLA_FLAGS"] = " ".join(filter(None, flags))
        with _environment(told), Watch(folder, how.ranks, how.timeout_s) as watch:
            codes = start(worker, how)
        return ordered([_ended(folder, rank, code, watch) for rank, code in codes.items() if code != 0])


def ordered(ended: list[Ended]) -> list[Ended]:
    """The one that failed by itself first, then those that failed because of it, then those that were ended."""
    return sorted(ended, key=_precedence)


def _precedence(ended: Ended) -> tuple:
    when = ended.failure.when if ended.failure else 0.0
    if ended.silence is not None:
        return 0, ended.silence.order
    if -ended.code in (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE):
        return 1, when  # nobody dies of these because another process did
    if ended.failure is not None and not ended.failure.communication:
        return 2, when
    if ended.code > 0 and ended.failure is None:
        return 3, when
    return (6 if ended.code == -signal.SIGTERM else 5 if ended.code < 0 else 4), when


def told(ended: list[Ended]) -> str:
    """Which rank ended first and why, and where the others were: for the user."""
    first, others = ended[0], ended[1:]
    lines = [first.failure.traceback.rstrip()] if first.failure and first.failure.traceback else []
    lines.append(f"perfkit launch: rank {first.rank} ended first{_at(first.step)}: {first.cause}")
    for (step, what), alike in groupby(others, key=lambda other: (other.step, _what(other, first))):
        ranks = [str(other.rank) for other in alike]
        lines.append(f"  then rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)}{_at(step)}: {what}")
    return "\n".join(lines)


def exit_code(ended: list[Ended]) -> int:
    """The launcher's own: 0 where all ended well, the first one's, 1 where a signal ended it."""
    return max(1, ended[0].code) if ended else 0


def _what(other: Ended, first: Ended) -> str:
    if other.code == -signal.SIGTERM:
        return "ended by the launcher"
    return "the same" if other.cause == first.cause else other.cause


def _at(step: int | None) -> str:
    return "" if step is None else f" at step {step}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # real-time signals have no names
        return f"signal {number}"


def _ended(folder: Path, rank: int, code: int, watch: Watch) -> Ended:
    beat = heartbeat.read_beat(folder, rank)
    step = beat.step if beat else None
    return Ended(rank, code, step, heartbeat.read_failure(folder, rank), watch.silent.get(rank))


def _by_torchrun(arguments: list[str], how: Launch) -> dict[int, int]:
    """Under torchrun's agent; its log, which says the same at length, is off."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    several = how.nodes > 1 or how.address is not None
    config = LaunchConfig(
        min_nodes=how.nodes,
        max_nodes=how.nodes,
        nproc_per_node=how.processes,
        run_id="perfkit" if several else uuid.uuid4().hex,
        rdzv_backend="static" if several else "c10d",
        rdzv_endpoint=f"{how.address or 'localhost'}:{how.port or 0}",
        rdzv_configs={"rank": how.node, "timeout": how.timeout_s} if several else {},
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        local_addr=None if several else "localhost",
        shutdown_timeout=int(GRACE_S),
    )
    logging.disable(logging.ERROR)
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        return {rank: failure.exitcode for rank, failure in error.failures.items()}
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from error
        sys.exit(128 + error.sigval)
    finally:
        logging.disable(logging.NOTSET)
    return {}


def _by_hand(arguments: list[str], how: Launch) -> dict[int, int]:
    """Started one by one; the first that fails ends all."""
    address, port = how.address or "127.0.0.1", how.port or _free_port()
    running: dict[int, subprocess.Popen] = {}
    with _ended_by_sigterm():
        try:
            for local, rank in enumerate(how.ranks):
                variables = {
                    "RANK": rank,
                    "WORLD_SIZE": how.processes * how.nodes,
                    "LOCAL_RANK": local,
                    "LOCAL_WORLD_SIZE": how.processes,
                    "MASTER_ADDR": address,
                    "MASTER_PORT": port,
                }
                environment = os.environ | {name: str(value) for name, value in variables.items()}
                running[rank] = subprocess.Popen([sys.executable, *arguments], env=environment, start_new_session=True)
            while not any(process.poll() for process in running.values()):
                if all(process.poll() == 0 for process in running.values()):
                    break
                time.sleep(0.05)
        finally:
            late = _end(list(running.values()))
    return {rank: -signal.SIGTERM if process in late else process.returncode for rank, process in running.items()}


def _end(processes: list[subprocess.Popen]) -> list[subprocess.Popen]:
    """End those that still run, with their own children: politely first. Returns them."""
    deadline = time.monotonic() + GRACE_S
    late = [process for process in processes if process.poll() is None]
    for process in late:
        os.killpg(process.pid, signal.SIGTERM)
    for process in late:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return late


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Within it SIGTERM is an exception, so that what was started is ended too."""

    def leave(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Within it these environment variables are set, for the processes started."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _free_port() -> int:
    """A port that is free now, and whose next one is as well: JAX's coordinator takes that."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port
