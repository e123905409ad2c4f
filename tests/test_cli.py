"""The command line as a user meets it."""

import json
import runpy
import subprocess
import sys

import pytest
from click.testing import CliRunner
from rich.console import Console

import perfkit
from perfkit import _cli_common, cli
from perfkit._recipe_files import names


@pytest.fixture
def run(monkeypatch):
    """Call the command line; returns exit code, stdout and stderr."""

    def call(*arguments):
        # the consoles write to the streams as they are when they print, so a fresh pair sees the runner's
        monkeypatch.setattr(_cli_common, "out", Console(width=100))
        monkeypatch.setattr(_cli_common, "err", Console(width=100, stderr=True))
        done = CliRunner().invoke(cli.main, arguments, catch_exceptions=False)
        return done.exit_code, done.stdout, done.stderr

    return call


FACTORY = """
import torch
def pair():
    return torch.nn.Linear(4, 4), (torch.ones(2, 4),)
def everything():
    settled = {"seed": 3, "tolerance": 0.5, "evaluate": lambda model: 1.0}
    return {"model": torch.nn.Linear(4, 4), "example_inputs": (torch.ones(2, 4),)} | settled
def nothing():
    return None
model = torch.nn.Linear(4, 4)
def needing(data):
    return data
def misspelt():
    return {"model": model, "example_input": torch.ones(2, 4)}
def optioned():
    return {"model": model, "example_inputs": torch.ones(2, 4), "mode": "training"}
def late():
    import users_parts
    return users_parts.pair()
def wrong():
    return torch.nn.Linear(4, 4), (torch.ones(2, 5),)
"""


@pytest.fixture
def factory(tmp_path, monkeypatch):
    """A module of the user's in the current folder."""
    (tmp_path / "users_models.py").write_text(FACTORY)
    (tmp_path / "users_parts.py").write_text(FACTORY)
    (tmp_path / "users_broken.py").write_text("import no_such_library")
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith(("users_", "profile_of_the_user"))]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "command", [(), ("optimize",), ("plan",), ("profile",), ("train",), ("recipes",), ("doctor",), ("demo",)]
)
def test_help_teaches(run, command):
    code, out, _ = run(*command, "--help")
    assert code == 0
    assert "Usage:" in out
    assert len(out.splitlines()) > 4


@pytest.mark.parametrize("command", [[], *([name] for name in cli.main.commands)], ids=lambda command: "".join(command))
def test_help_fits_a_terminal(command):
    text = CliRunner().invoke(cli.main, [*command, "--help"], terminal_width=80).stdout
    assert not [line for line in text.splitlines() if len(line) > 80]
    assert "..." not in text.partition("Commands:")[2], "no summary is cut"


def test_help_tells_how_long_it_takes(run):
    from perfkit._optimize import CHAIN_BUDGET_S, SEARCH_BUDGET_S
    from perfkit.profiling._run import BUDGET_S

    told = {name: " ".join(run(name, "--help")[1].split()) for name in ("optimize", "profile")}
    assert f"[default: {SEARCH_BUDGET_S:g} for a search, {CHAIN_BUDGET_S:g} for a recipe]" in told["optimize"]
    assert f"[default: {BUDGET_S:g}]" in told["profile"]


def test_max_batch_is_for_reference_models(run):
    code, _, err = run("max-batch", "users_models:pair")
    assert code == _cli_common.BAD_INPUT
    assert "for yours call perfkit.max_batch_size" in err


def test_recipes_lists_every_recipe(run):
    code, out, _ = run("recipes")
    assert code == 0
    assert all(name in out for name in (*names(), "auto"))


def test_doctor(run):
    code, out, _ = run("doctor")
    assert code == 0
    assert "instruction sets" in out
    assert "NVIDIA" in out, "why tf32 is not ready"
    assert "memory on CPU" in out


def test_optimize_writes_what_is_asked_for(run, factory):
    pytest.importorskip("torch")
    code, out, err = run(
        "optimize", "users_models:pair", "--recipe", "half", "--budget", "0.3", "--json",
        "--html", "page.html", "--save-report", "report.json", "--save", "model.perfkit",
    )  # fmt: skip
    assert code in (0, _cli_common.SLOWER, _cli_common.NOISY)
    report = json.loads(out)
    assert report["recipe"] == "half"
    assert report == json.loads((factory / "report.json").read_text())
    assert "<html" in (factory / "page.html").read_text()
    assert "page.html" in err
    model, _ = sys.modules["users_models"].pair()
    assert perfkit.load(factory / "model.perfkit", model).recipe == "half"
    verdicts = {"slower": _cli_common.SLOWER, "too noisy": _cli_common.NOISY}
    assert code == verdicts.get(report["speedup"]["verdict"], 0)


def test_a_factory_may_return_every_argument(run, factory):
    pytest.importorskip("torch")
    code, out, _ = run("plan", "users_models:everything", "--recipe", "bf16")
    assert code == 0
    assert "Linear" in out


@pytest.mark.parametrize("path", ["users_models.py", "./users_models.py", "sub/profile.py", "{absolute}"])
def test_a_factory_is_named_by_its_file(run, factory, path):
    """Also one that is named as a module of Python's, and that imports what lies beside it, when it is called."""
    pytest.importorskip("torch")
    (factory / "sub").mkdir()
    (factory / "sub" / "profile.py").write_text(FACTORY)
    path = path.format(absolute=factory / "users_models.py")
    code, out, _ = run("plan", f"{path}:late", "--recipe", "bf16")
    assert code == 0
    assert "Linear" in out


def test_what_a_users_module_does_not_find_is_its_own_error(run, factory):
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        run("plan", "users_broken:pair")


def test_plan_exits_with_one_where_a_step_is_refused(run, factory):
    pytest.importorskip("torch")
    code, out, _ = run("plan", "users_models:pair", "--recipe", "tf32")
    assert code == cli.REFUSED
    assert "refused" in out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("optimize", "cmm"), cli.BAD_INPUT, "'cnn'"),
        (("optimize", "users_models:pair", "--recipe", "bf17"), cli.BAD_INPUT, "'bf16'"),
        (("optimize", "users_models:pair", "--budget", "-1"), cli.BAD_INPUT, "budget_s=-1"),
        (("optimize", "users_models:pair", "--batch-size", "4"), cli.BAD_INPUT, "factory"),
        (("optimize", "users_models:pair", "--recipe", "tf32"), cli.REFUSED, "NVIDIA"),
        (("optimize", "users_models:pair", "--html", "nowhere/page.html"), cli.BAD_INPUT, "cannot write"),
        (("optimize", "users_models:nothing"), cli.BAD_INPUT, "NoneType"),
        (("optimize", "users_models:wrong", "--recipe", "half"), cli.BAD_INPUT, "does not run on example_inputs"),
        (("optimize", "users_models:absent"), cli.BAD_INPUT, "absent"),
        (("optimize", "no_such_module:make"), cli.BAD_INPUT, "no_such_module"),
        (("optimize", "./no_such_file.py:make"), cli.BAD_INPUT, "no file"),
        (("optimize", "../models:make"), cli.BAD_INPUT, "no module's name"),
        (("optimize", "users_models:paiir"), cli.BAD_INPUT, "'pair'"),
        (("optimize", "users_models:model"), cli.BAD_INPUT, "is a Linear"),
        (("optimize", "users_models:needing"), cli.BAD_INPUT, "'data'"),
        (("profile", "users_models:misspelt"), cli.BAD_INPUT, "'example_inputs'"),
        (("optimize", "users_models:optioned"), cli.BAD_INPUT, "option of the command"),
        (("optimize", "cnn", "--framework", "tensorflow"), cli.BAD_INPUT, "torch"),
        (("optimise", "cnn"), cli.BAD_INPUT, "No such command"),
    ],
)
def test_bad_input_is_one_message_and_an_exit_code(run, factory, arguments, code, said):
    pytest.importorskip("torch")
    found, out, err = run(*arguments)
    assert found == code
    assert said in err
    assert "Traceback" not in out + err
    assert not list(factory.glob("*.html"))


def test_an_interrupt_leaves_nothing_half_written(run, factory, monkeypatch):
    pytest.importorskip("torch")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("perfkit._pipeline.run", interrupted)
    before = sorted(factory.iterdir())
    code, _, err = run("optimize", "users_models:pair", "--recipe", "half", "--html", "page.html")
    assert code == cli.INTERRUPTED
    assert "interrupted" in err
    assert sorted(path for path in factory.iterdir() if path.suffix or path in before) == before


def test_the_package_runs_as_its_script_does(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["perfkit", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("perfkit", run_name="__main__")
    assert ended.value.code == 0
    assert perfkit.__version__ in capsys.readouterr().out


def test_every_recipe_file_runs_by_itself():
    """One of them for real; that each has the same last lines is seen in the files."""
    import perfkit.recipes

    for name in names():
        path = f"{perfkit.recipes.__path__[0]}/{name}.py"
        with open(path) as file:
            assert file.read().endswith(f'    lesson("{name}")\n')
    command = [sys.executable, "-m", "perfkit.recipes.channels_last", "--model", "cnn", "--batch-size", "4"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "channels_last" in done.stdout
    assert "median latency" in done.stdout
