"""The command line's part about several processes, as far as no process is started."""

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from perfkit import _cli_common, _cli_parallel, cli
from perfkit.measure import kept_memory
from perfkit.parallel import launching
from perfkit.parallel.launching import Launch

PAGE = (Path(__file__).parents[2] / "docs" / "parallel.md").read_text()


@pytest.fixture
def started(monkeypatch):
    """What would be started: (command, how)."""
    calls = []

    def launch(command, how):
        calls.append((command, how))
        return []

    monkeypatch.setattr(launching, "launch", launch)
    return calls


@pytest.fixture
def run(monkeypatch):
    def call(*arguments):
        monkeypatch.setattr(_cli_common, "err", Console(width=400, stderr=True))
        done = CliRunner().invoke(cli.main, arguments, catch_exceptions=False)
        return done.exit_code, done.stderr

    return call


def commands() -> list[str]:
    fenced = re.findall(r"^```\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return [line for block in fenced for line in block.splitlines() if line.startswith("perfkit")]


def test_there_are_commands():
    assert {line.split()[1] for line in commands()} == {"launch", "train"}


@pytest.mark.parametrize("line", commands())
def test_commands_of_the_page_are_understood(line):
    _, name, *arguments = shlex.split(line)
    cli.main.commands[name].make_context(name, arguments)


def test_the_example_of_the_page_runs():
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    exec(code, {})


def test_what_stands_after_the_script_is_its_own(run, started):
    line = "launch --nproc 2 --framework jax --timeout 5 script.py --nproc 3 --help x"
    assert run(*line.split()) == (0, "")
    command = ["script.py", "--nproc", "3", "--help", "x"]
    assert started == [(command, Launch(processes=2, framework="jax", timeout_s=5.0))]


def test_a_module_instead_of_a_script(run, started):
    assert run("launch", "--nproc", "1", "--framework", "torch", "-m", "package.module", "y") == (0, "")
    assert started[0][0] == ["-m", "package.module", "y"]


def test_train_starts_itself_without_nproc(run, started):
    line = "train rnn --recipe data_parallel --nproc 2 --steps 3 --checkpoint c --resume --timeout 7"
    assert run(*line.split()) == (0, "")
    (command, how), expected = (
        started[0],
        "-m perfkit.cli train rnn --framework torch --batch-size 64 --steps 3 --seed 0",
    )
    assert command == [*expected.split(), "--recipe", "data_parallel", "--checkpoint", "c", "--resume"]
    assert how == Launch(processes=2, timeout_s=7.0)
    cli.main.commands["train"].make_context("train", command[3:])


def test_processes_that_keep_memory_are_started_even_where_it_is_one(run, started, monkeypatch):
    monkeypatch.setattr(kept_memory, "unavailable", str)
    line = "launch --nproc 2 --framework jax --keep-memory script.py --keep-memory"
    assert run(*line.split()) == (0, "")
    assert started.pop() == (["script.py", "--keep-memory"], Launch(processes=2, framework="jax", keep_memory=True))
    line = "train rnn --framework jax --batch-size 64 --steps 3 --seed 0"
    assert run(*line.split(), "--keep-memory") == (0, "")
    command, how = started.pop()
    assert command == ["-m", "perfkit.cli", *line.split()]
    assert how == Launch(processes=1, framework="jax", keep_memory=True)


def test_memory_is_not_kept_without_glibc(run, started, monkeypatch):
    monkeypatch.setattr(kept_memory, "unavailable", lambda: "this is another C library")
    code, err = run("train", "rnn", "--framework", "jax", "--keep-memory")
    assert code == cli.REFUSED
    assert "since this is another C library" in err
    assert not started


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("train cnn --nproc 2", "--recipe (none)"),
        ("train cnn --nproc 2 --recipe bf16", "name a recipe that takes several processes"),
        ("train cnn --nproc 2 --recipe data_paralel", "'data_parallel'"),
        ("train cnn --nproc 2 --framework jax --keep-memory", "--recipe (none)"),
        ("train cnn --resume", "--checkpoint FOLDER"),
        ("train cnn --checkpoint-every 3", "--checkpoint FOLDER"),
        ("launch --nproc 2 --nnodes 2 script.py", "--address and --port"),
        ("launch --nproc 0 script.py", "--nproc"),
        ("launch script.py", "--nproc"),
    ],
)
def test_bad_input_is_one_message(run, started, line, said):
    code, err = run(*line.split())
    assert code == cli.BAD_INPUT
    assert said in err
    assert not started


def test_options_as_they_are_typed():
    typed = _cli_parallel.as_arguments({"a_b": 1, "c": True, "d": False, "e": None, "f": Path("x y")})
    assert typed == ["--a-b", "1", "--c", "--f", "x y"]
