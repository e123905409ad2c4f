"""Layouts of a model, from what is passed to what is told; the command line; processes that measure."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from perfkit import InvalidInputError, UnsupportedError, cli

ROOT = Path(__file__).parents[2]


def test_layouts_of_a_model():
    torch = pytest.importorskip("torch")
    from perfkit.parallel.planning_layouts import layouts

    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 8))
    before = [p.detach().clone() for p in model.parameters()]
    given = {"example_inputs": (torch.randn(8, 16),), "targets": torch.randn(8, 8), "loss": torch.nn.MSELoss()}
    given |= {"optimizer": torch.optim.SGD, "devices": 2, "budget_s": 0.01}
    found = layouts(model, link_gbps=10, **given)
    assert {str(item.way) for item in found.predictions} == {"data 2", "data 2, sharded", "tensor 2", "pipeline 2 of 8"}
    steps = [item.step_s for item in found.predictions]
    assert steps == sorted(steps)
    tensor = next(item for item in found.predictions if item.way.tensor == 2)
    assert tensor.sent_bytes == 8 * 8 * 4, "a pair of layers, of which the first one's inputs do not learn"
    assert found.best.way.recipe in str(found)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    with pytest.raises(UnsupportedError, match=r"1 process\(es\) for 2 devices"):
        layouts(model, **given)
    with pytest.raises(InvalidInputError, match="link_gbps=-1"):
        layouts(model, link_gbps=-1, **given)


def test_attention_is_planned_by_heads():
    """Its output, its bias' gradient and that of its inputs where they learn; and a pair of linear layers."""
    torch = pytest.importorskip("torch")
    from perfkit.parallel.planning_layouts import layouts

    x = torch.randn(8, 5, 16)
    layer = torch.nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    norm = torch.nn.LayerNorm(16)
    for model, learning in ((layer, 0), (torch.nn.Sequential(norm, layer), x.nbytes)):
        found = layouts(
            model, link_gbps=10, devices=2, budget_s=0.01, example_inputs=(x,), targets=x, loss=torch.nn.MSELoss(),
            optimizer=torch.optim.SGD,
        )  # fmt: skip
        tensor = next(item for item in found.predictions if item.way.tensor == 2)
        attention = x.nbytes + 3 * 16 * 4 + learning
        assert tensor.sent_bytes == attention + 2 * x.nbytes
        held = sum(p.nbytes for p in model.parameters())
        assert held / 2 < tensor.held_bytes / 4 < held * 0.6, (
            "weights, gradients and two moments, of half of the layers"
        )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--devices", "2"], "--devices: about several devices, add --parallel"),
        (["--parallel"], "say how many --devices"),
    ],
)
def test_the_command_line_says_what_is_missing(arguments, said):
    done = CliRunner().invoke(cli.main, ["plan", "cnn", *arguments])
    assert done.exit_code == 2
    assert said in done.output


FACTORY = """
import functools, torch

def make():
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 8))
    adam = functools.partial(torch.optim.Adam, lr=1e-3)
    x, y = torch.randn(8, 16), torch.randn(8, 8)
    return {"model": model, "example_inputs": (x,), "targets": y, "loss": torch.nn.MSELoss(), "optimizer": adam}

if __name__ == "__main__":
    from perfkit import cli
    from perfkit.parallel import planning_layouts

    planning_layouts.ROUNDS = 1
    cli.main(["plan", "planned_here:make", "--parallel", "--devices", "2"])
"""


def test_two_processes_measure_what_lies_between_them(tmp_path):
    pytest.importorskip("torch")
    (tmp_path / "planned_here.py").write_text(FACTORY)
    command = [sys.executable, "-m", "perfkit.cli", "launch", "--nproc", "2", "planned_here.py"]
    about = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | about, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "computing, link and framework, by 2 processes" in " ".join(done.stdout.split())
    for layout in ("data 2", "data 2, sharded", "tensor 2", "pipeline 2 of 8"):
        assert layout in done.stdout
    assert "FutureWarning" not in done.stderr


def test_the_example_of_the_page_runs(capsys):
    pytest.importorskip("torch")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "planning.md").read_text(), re.DOTALL)
    exec(compile(code, "planning.md", "exec"), {})
    assert "the quickest as a recipe: " in capsys.readouterr().out
