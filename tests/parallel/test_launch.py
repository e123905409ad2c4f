"""Processes started, watched and ended together."""

import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from perfkit import InvalidInputError
from perfkit.measure import kept_memory
from perfkit.parallel import heartbeat, launching
from perfkit.parallel.launching import Ended, Launch
from perfkit.parallel.watching import Silence
from perfkit.parallel.worker import share_cores

needs_torch = pytest.mark.skipif(not find_spec("torch"), reason="torch is not installed")
needs_jax = pytest.mark.skipif(not find_spec("jax"), reason="jax is not installed")
LIMIT_S = 30
"""By then a faulty run must be over: a bound that a hang fails, not a speed."""

SCRIPT = """
import os, signal, sys, time
from perfkit.parallel import heartbeat

rank, fault = int(os.environ["RANK"]), sys.argv[1]
for step in range(1, 4):
    heartbeat.beat(step)
    if step == 3 and rank == 1:
        while (other := heartbeat.read_beat(heartbeat.folder(), 0)) is None or other.step != 3: time.sleep(0.01)
        if fault == "raise": raise ValueError("a value of the second rank")
        if fault == "exit": sys.exit(7)
        if fault == "kill": os.kill(os.getpid(), signal.SIGKILL)
        if fault == "stop": os.kill(os.getpid(), signal.SIGSTOP)
heartbeat.rest()
share = os.environ["OMP_NUM_THREADS"]
sys.stdout.write(f"{rank} {os.environ['WORLD_SIZE']} {share} {sys.argv[2:]}\\n")  # at once: both write to one pipe
sys.stdout.flush()
if fault != "none":
    time.sleep(1000)
"""
TWO_MACHINES = """
import torch, torch.distributed as dist
from perfkit.parallel import torch_world
world = torch_world.world()
total = torch.tensor(float(world.rank + 1))
dist.all_reduce(total)
print("rank", world.rank, "of", world.size, "sum", total.item(), flush=True)
"""
JAX = """
import jax
from perfkit.parallel import jax_world
world = jax_world.world()
print(f"rank {world.rank} of {world.size} all {world.gather(world.rank)}", flush=True)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return str(path)


def perfkit(*arguments, **variables) -> subprocess.Popen:
    command = [sys.executable, "-m", "perfkit.cli", *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | variables
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def done(process: subprocess.Popen, limit_s: float = 200) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=limit_s)
    return process.returncode, out, err


def test_processes_get_ranks_arguments_and_their_share_of_the_cores(script, capfd, tmp_path, monkeypatch):
    (tmp_path / "perfkit").mkdir()  # where the user is may be a folder of this name; it is not the package
    monkeypatch.chdir(tmp_path)
    assert launching.launch([script, "none", "--option", "x"], Launch(processes=2, framework="")) == []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = str(max(1, cores // 2))
    said = sorted(capfd.readouterr().out.split("\n")[:2])
    assert said == [f"{rank} 2 {share} ['--option', 'x']" for rank in (0, 1)]


@needs_jax
@pytest.mark.skipif(bool(kept_memory.unavailable()), reason="not glibc's malloc")
def test_processes_that_keep_memory_are_started_so(tmp_path, capfd):
    path = tmp_path / "script.py"
    path.write_text("from perfkit.measure import kept_memory\nprint(kept_memory.kept())\n")
    assert launching.launch([str(path)], Launch(processes=1, framework="jax", keep_memory=True)) == []
    assert capfd.readouterr().out == "True\n"
    assert not kept_memory.SETTINGS.keys() & os.environ.keys()


@pytest.mark.parametrize(
    ("fault", "code", "cause"),
    [
        ("raise", 1, "exit code 1: ValueError: a value of the second rank"),
        ("exit", 7, "exit code 7: sys.exit(7)"),
        ("kill", -signal.SIGKILL, "SIGKILL"),
        ("stop", -signal.SIGKILL, "it does not answer"),
    ],
)
def test_a_fault_ends_all_and_is_named(script, capfd, fault, code, cause):
    first, second = launching.launch([script, fault], Launch(processes=2, framework="", timeout_s=1))
    assert (first.rank, first.code, first.step) == (1, code, 3)
    assert cause in first.cause
    assert (second.rank, second.code) == (0, -signal.SIGTERM)
    told = launching.told([first, second])
    assert f"rank 1 ended first at step 3: {first.cause}" in told
    assert "then rank 0 at step 3: ended by the launcher" in told
    assert launching.exit_code([first, second]) == max(1, code)
    said = capfd.readouterr().err
    if fault == "raise":
        assert said == "rank 1, step 3: ValueError: a value of the second rank\n"
        assert "line 10, in <module>" in told, "the script's own frame"
        assert "runpy" not in told
    assert heartbeat.FOLDER not in os.environ


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_outlives_its_launcher(script, tmp_path, number):
    code = f"from perfkit.parallel.launching import *; launch([{script!r}, 'sleep'], Launch(processes=2, framework=''))"
    launcher = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"TMPDIR": str(tmp_path)})
    beats = [seen(launcher, tmp_path, rank, lambda beat: beat.step == 3) for rank in (0, 1)]
    launcher.send_signal(number)
    assert launcher.wait(LIMIT_S) == (-number if number == signal.SIGKILL else 128 + number)
    for beat in beats:
        over(beat.pid)


def over(pid: int) -> None:
    """Returns when there is no such process."""
    until = time.monotonic() + LIMIT_S
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} is still there")


def seen(launcher: subprocess.Popen, folder: Path, rank: int, wanted) -> heartbeat.Beat:
    """The sign of life of that rank that is wanted, once there is one."""
    while launcher.poll() is None:
        for run in folder.glob("perfkit-run-*"):
            beat = heartbeat.read_beat(run, rank)
            if beat is not None and wanted(beat):
                return beat
        time.sleep(0.05)
    raise AssertionError(launcher.communicate())


def ended(rank, code, *, cause="", communication=False, when=0.0, silence=None) -> Ended:
    failure = heartbeat.Failure(3, when, cause, communication) if cause else None
    return Ended(rank, code, 3, failure, silence)


def test_who_fails_alike_is_told_once():
    told = launching.told([ended(rank, 2, cause="InvalidInputError: such", when=1.0) for rank in (0, 1, 2)])
    assert told.splitlines() == [
        "perfkit launch: rank 0 ended first at step 3: exit code 2: InvalidInputError: such",
        "  then ranks 1, 2 at step 3: the same",
    ]


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (ended(1, 1, cause="ValueError", when=2.0), ended(0, 1, cause="closed", communication=True, when=1.0)),
        (ended(1, 1, cause="ValueError", when=1.0), ended(0, 1, cause="ValueError", when=2.0)),
        (ended(1, -signal.SIGKILL), ended(0, 1, cause="closed", communication=True)),
        (ended(1, 9), ended(0, 1, cause="closed", communication=True)),
        (ended(1, 1, cause="closed", communication=True), ended(0, -signal.SIGABRT)),
        (ended(1, -signal.SIGABRT), ended(0, -signal.SIGTERM)),
        (ended(1, -9, silence=Silence(9, "", (False, False, 3, 2.0))), ended(0, 1, cause="timed out")),
        (
            ended(1, -9, silence=Silence(9, "", (True, False, 3, 2.0))),
            ended(0, -9, silence=Silence(9, "", (True, True, 3, 1.0))),
        ),
    ],
)
def test_who_ended_first_is_who_did_not_fail_because_of_another(first, then):
    assert launching.ordered([then, first]) == [first, then]


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"nodes": 2}, "--address and --port"), ({"nodes": 2, "node": 2, "address": "a", "port": 1}, "0 to 1")],
)
def test_what_cannot_be_started_is_refused(settings, said):
    with pytest.raises(InvalidInputError, match=said):
        Launch(processes=1, **settings)


def test_threads_that_were_set_stay(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    share_cores(launching_as(local_size=2))
    assert os.environ["OMP_NUM_THREADS"] == "3"


def launching_as(local_size):
    from perfkit.parallel.environment import Launched

    return Launched(0, local_size, 0, local_size, "127.0.0.1", 1, "torchrun")


@needs_jax
def test_jax_has_joined_before_the_script_begins(tmp_path):
    (tmp_path / "script.py").write_text(JAX)
    process = perfkit("launch", "--nproc", 2, "--framework", "jax", tmp_path / "script.py", JAX_PLATFORMS="cpu")
    code, out, err = done(process)
    assert code == 0, err
    for rank in (0, 1):
        assert f"rank {rank} of 2 all [0, 1]" in out  # among gloo's own lines


@needs_torch
def test_two_machines_on_loopback(tmp_path):
    (tmp_path / "script.py").write_text(TWO_MACHINES)
    port = launching._free_port()
    shared = ("--nproc", 1, "--nnodes", 2, "--address", "127.0.0.1", "--port", port)
    machines = [perfkit("launch", *shared, "--node-rank", node, tmp_path / "script.py") for node in (0, 1)]
    for node, (code, out, err) in enumerate(map(done, machines)):
        assert code == 0, err
        assert out == f"rank {node} of 2 sum 3.0\n"


@needs_torch
def test_a_worker_killed_in_mid_training_ends_the_run(tmp_path):
    arguments = ("rnn", "--recipe", "data_parallel", "--nproc", 2, "--steps", 100_000, "--budget", 0.1)
    process = perfkit("train", *arguments, TMPDIR=str(tmp_path))
    try:
        beats = [seen(process, tmp_path, rank, lambda beat: beat.watched and beat.step >= 3) for rank in (0, 1)]
        os.kill(beats[1].pid, signal.SIGKILL)
        code, out, err = done(process, LIMIT_S)
    finally:
        process.kill()
    assert code == 1
    assert re.search(r"rank 1 ended first at step \d+: SIGKILL", err), err
    assert "then rank 0 at step" in err
    assert "held-out" not in out
    for beat in beats:
        over(beat.pid)
    assert not list(tmp_path.glob("perfkit-run-*"))
