"""One of several processes: `python -m perfkit.parallel.worker [--framework jax] script.py [arguments]`.

`perfkit launch` starts these, and torchrun and srun can: `srun python -m perfkit.parallel.worker script.py`. A worker
takes its share of the cores, joins the others (JAX must before it does anything; torch joins at the first need), runs
the script as `python script.py` would, and says in one line what ended it.
"""

from __future__ import annotations

import faulthandler
import os
import re
import runpy
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import NoReturn

from perfkit._errors import InvalidInputError, PerfkitError
from perfkit.parallel import heartbeat
from perfkit.parallel.environment import Launched, launched

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
LOOK_S = 0.5
COMMUNICATION = re.compile(
    r"connection (was )?(closed|reset|refused)|timed out|broken pipe|socket|nccl|gloo|unavailable|heartbeat",
    re.IGNORECASE,
)
"""How the frameworks' errors sound when another process cannot be reached any more."""
NOISE = re.compile(r"^\[\S+\.(cc|cpp|h):\d+\] | This is typically caused by .*", re.DOTALL)
"""What gloo says around what happened."""


def main(arguments: list[str]) -> None:
    """Run the script that the arguments name; ends the process where it fails."""
    framework = ""
    if arguments[:1] == ["--framework"]:
        framework, arguments = arguments[1], arguments[2:]
    about = launched()
    share_cores(about)
    heartbeat.rest()
    if heartbeat.folder() is not None:
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    if (folder := heartbeat.folder()) is not None and hasattr(faulthandler, "register"):
        # open as long as the process lives: the launcher asks a silent one where it is
        faulthandler.register(signal.SIGUSR1, open(folder / f"{about.rank}.stack", "w"), all_threads=False)  # noqa: SIM115
    try:
        if framework == "jax":
            from perfkit.parallel.jax_world import join

            join()
        run(arguments)
        heartbeat.rest()
    except SystemExit as error:
        heartbeat.rest()
        if error.code not in (0, None):
            _end(about, _exit_cause(error.code), error.code if isinstance(error.code, int) else FAILED)
        raise
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        told = "" if isinstance(error, PerfkitError) else _of_script(error)
        code = BAD_INPUT if isinstance(error, InvalidInputError) else FAILED
        _end(about, one_line(error), code, told, communication=bool(COMMUNICATION.search(str(error))))


def run(arguments: list[str]) -> None:
    """Run a script, or after "-m" a module, as python would."""
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")


def _end_with(launcher: int) -> None:
    """End this process when its launcher is gone, which would have ended it."""
    while os.getppid() == launcher:
        time.sleep(LOOK_S)
    os._exit(FAILED)


def share_cores(about: Launched | None) -> None:
    """As many threads as this process' share of the machine's cores, unless OMP_NUM_THREADS says otherwise."""
    if about is None or "OMP_NUM_THREADS" in os.environ:
        return
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = str(max(1, there // about.local_size))
    os.environ["OMP_NUM_THREADS"] = share
    os.environ.setdefault("PJRT_NPROC", share)  # XLA's own pool


def one_line(error: BaseException) -> str:
    """The error's type and the first line of what it says."""
    lines = NOISE.sub("", str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _exit_cause(code: object) -> str:
    return f"sys.exit({code})" if isinstance(code, int) else str(code).strip()


def _of_script(error: Exception) -> str:
    """The traceback from the script on, without the frames that ran it."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        index for index, frame in enumerate(frames) if frame.filename in (__file__, runpy.__file__, "<frozen runpy>")
    ]
    limit = len(frames) - (own[-1] + 1 if own else 0)
    return "".join(traceback.format_exception(type(error), error, error.__traceback__, limit=-limit or None))


def _end(about: Launched | None, cause: str, code: int, told: str = "", communication: bool = False) -> NoReturn:
    """Say what happened and end at once: whoever cleans up would wait for the others, which wait for this one."""
    step = heartbeat.last_step()
    rank = "" if about is None else f"rank {about.rank}" + ("" if step is None else f", step {step}") + ": "
    heartbeat.failed(cause, communication, told)
    if heartbeat.folder() is None and told:
        sys.stderr.write(told)
    sys.stdout.flush()
    sys.stderr.write(f"{rank}{cause}\n")
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
