"""`perfkit profile` as a user meets it."""

import dataclasses
import json
import sys

import pytest
import sample_profile_parts
import sample_profiles
from click.testing import CliRunner
from rich.console import Console

import perfkit
from perfkit import _cli_common, _cli_profile, cli

FACTORY = """
import torch
def pair():
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU()), (torch.ones(32, 64),)
def everything():
    return {"model": torch.nn.Linear(4, 4), "example_inputs": (torch.ones(2, 4),), "tolerance": 0.1}
def breaks():
    class Model(torch.nn.Module):
        def forward(self, x):
            raise ValueError("no such shape")
    return Model(), (torch.ones(2, 4),)
"""


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Call the command line in a folder of the user's; returns exit code, stdout and stderr."""
    (tmp_path / "users_models.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(_cli_common, "out", Console(width=100))
        monkeypatch.setattr(_cli_common, "err", Console(width=100, stderr=True))
        done = CliRunner().invoke(cli.main, ["profile", *arguments], catch_exceptions=False)
        return done.exit_code, done.stdout, done.stderr

    yield call
    sys.modules.pop("users_models", None)


@pytest.fixture
def profiled(monkeypatch):
    """Profiles made by hand in place of profiling; returns what `perfkit.profile` was called with."""
    calls = []

    def stand_in(made):
        def profile(
            model, *, example_inputs, params=None, mode, loss=None, targets=None, optimizer=None, recipe=None,
            calibration=None, budget_s=6.0, snapshot=None, progress=None,
        ):  # fmt: skip
            calls.append({"mode": mode, "recipe": recipe, "budget_s": budget_s, "snapshot": snapshot})
            if isinstance(made, BaseException):
                raise made
            return made

        monkeypatch.setattr(perfkit, "profile", profile)
        monkeypatch.setattr(_cli_common, "load", lambda *_: {"model": "a model", "example_inputs": (), "seed": 3})
        return calls

    return stand_in


def test_profiles_a_model_and_writes_what_is_asked_for(run, monkeypatch, tmp_path):
    """The one run that profiles for real; the others are about what is made of a profile."""
    pytest.importorskip("torch")
    # Measuring those takes seconds and has tests of its own.
    monkeypatch.setattr("perfkit.profiling.ceilings.measured", lambda *_: sample_profile_parts.ceilings())
    files = ("--html", "a.html", "--json", "a.json", "--trace", "a.trace.json")
    code, out, err = run("users_models:pair", "--budget", "0.2", *files)
    assert code == 0, out
    assert "Sequential · torch · inference · cpu" in out
    assert "per call" in out
    profile = perfkit.Profile.from_json(tmp_path / "a.json")
    assert profile.command == "perfkit optimize users_models:pair"
    assert {"aten::addmm", "aten::linear"} & {op.name for op in profile.time.ops}
    assert "<html" in (tmp_path / "a.html").read_text()
    assert json.loads((tmp_path / "a.trace.json").read_text())["traceEvents"]
    assert [line for line in err.splitlines() if line] == ["wrote a.html", "wrote a.json", "wrote a.trace.json"]
    code, out, _ = run("--diff", "a.json", "a.json", "--html", "d.html")
    assert code == 0
    assert "1.00× as fast" in out
    assert "<html" in (tmp_path / "d.html").read_text()


def test_a_model_that_raises_is_a_failed_profile_that_is_written_all_the_same(run, tmp_path):
    pytest.importorskip("torch")
    code, out, _ = run("users_models:breaks", "--json", "a.json")
    assert code == _cli_common.REFUSED
    assert "! Failed: while running the model for the first time" in out
    assert "no such shape" in " ".join(out.split())
    assert perfkit.Profile.from_json(tmp_path / "a.json").outcome == "failed"


def test_an_interrupt_keeps_what_was_collected(run, profiled, tmp_path):
    interrupt = KeyboardInterrupt()
    interrupt.profile = sample_profiles.interrupted()
    profiled(interrupt)
    code, out, _ = run("cnn", "--html", "a.html", "--json", "a.json")
    assert code == _cli_common.INTERRUPTED
    assert "! Interrupted: Interrupted while memory was traced." in out
    assert perfkit.Profile.from_json(tmp_path / "a.json").time is not None
    profiled(KeyboardInterrupt())
    code, _, err = run("cnn", "--html", "b.html")
    assert (code, "nothing was written" in err) == (_cli_common.INTERRUPTED, True)


def test_json_to_standard_output(run, profiled):
    profiled(sample_profiles.cnn())
    code, out, _ = run("cnn", "--json", "-")
    assert code == 0
    assert perfkit.Profile.from_json(out).model == "MnistCNN"


def test_findings_name_the_command_for_this_model(run, profiled):
    calls = profiled(sample_profiles.cnn())
    code, out, _ = run(
        "cnn", "--framework", "jax", "--mode", "training", "--batch-size", "128", "--recipe", "compile", "--budget", "2"
    )
    assert code == 0
    assert calls == [{"mode": "training", "recipe": "compile", "budget_s": 2.0, "snapshot": None}]
    command = "perfkit optimize cnn --framework jax --mode training --batch-size 128 --recipe compile+channels_last"
    assert command in " ".join(out.split())
    assert "--recipe compile+bf16" in out, "what was profiled stays part of it"


def test_optimize_goes_on_with_the_most_promising_finding(run, profiled, monkeypatch):
    calls = []
    report = type("Report", (), {"speedup": None, "__str__": lambda self: "the report"})()

    def optimize(**arguments):
        calls.append(arguments)
        return type("Result", (), {"report": report})

    monkeypatch.setattr(perfkit, "optimize", optimize)
    profiled(sample_profiles.cnn())
    code, out, err = run("cnn", "--mode", "training", "--optimize")
    assert code == 0
    assert "the report" in out
    assert "optimizing for convolution layout: perfkit optimize cnn --mode training --recipe" in " ".join(err.split())
    assert calls[0]["recipe"] == "channels_last+compile"
    assert calls[0]["mode"] == "training"
    assert calls[0]["seed"] == 3, "what only optimize takes is not lost"
    profiled(sample_profiles.unavailable())
    _, _, err = run("cnn", "--optimize")
    assert "no finding names a recipe: perfkit optimize cnn searches for one" in err
    assert len(calls) == 1


def test_the_most_promising_finding():
    finding = sample_profile_parts.findings()[0]
    quantity = sample_profile_parts.quantity

    def made(recipe, gain, resource="time"):
        predicted = (
            quantity(gain, "ratio") if gain else dataclasses.replace(finding.predicted, value=None, unavailable="")
        )
        return dataclasses.replace(finding, recipe=recipe, predicted=predicted, resource=resource)

    costliest, best, smaller, unknown = made("a", 1.2), made("b", 1.9), made("c", 4.0, "memory"), made("d", None)
    assert _cli_profile._most_promising((unknown, costliest, smaller, best)) is best
    assert _cli_profile._most_promising((smaller, made("", 3.0))) is smaller
    assert _cli_profile._most_promising((made("", 3.0),)) is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "Missing argument 'MODEL'"),
        (("cmm",), "'cnn'"),
        (("cnn", "--diff", "a.json", "b.json"), "--diff compares two files"),
        (("cnn", "--optimize", "--json", "-"), "name a file"),
        (("--diff", "a.json", "b.json"), "cannot read a.json"),
        (("--diff", "users_models.py", "b.json"), "is not JSON"),
        (("cnn", "--html", "nowhere/page.html"), "cannot write"),
        (("cnn", "--recipe", "bf17"), "'bf16'"),
        (("cnn", "--recipe", "auto"), "searches"),
        (("cnn", "--budget", "0"), "--budget"),
    ],
)
def test_bad_input_is_one_message_and_an_exit_code(run, tmp_path, arguments, said):
    pytest.importorskip("torch")
    code, out, err = run(*arguments)
    assert code == _cli_common.BAD_INPUT
    assert said in err
    assert "Traceback" not in out + err
    assert not list(tmp_path.glob("*.html"))
