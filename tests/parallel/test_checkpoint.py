"""A training that goes on from where it was, in as many processes as there are now."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest

from perfkit import InvalidInputError, reference
from perfkit.parallel import checkpoint
from perfkit.parallel.checkpoint import Checkpoints
from perfkit.recipes.data_parallel import DataParallel

needs_torch = pytest.mark.skipif(not find_spec("torch"), reason="torch is not installed")
needs_jax = pytest.mark.skipif(not find_spec("jax"), reason="jax is not installed")
HOW = {"batch_size": 16}

TRAINED_BY_TWO = """
import json, shutil, sys, warnings
from pathlib import Path
from types import SimpleNamespace
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
import perfkit
from perfkit import reference
from perfkit.parallel import torch_checkpoint, torch_world

warnings.simplefilter("ignore", perfkit.PerfkitWarning)
folder = Path(sys.argv[1])
leads = torch_world.world().leads
calls = []
how = {"recipe": "data_parallel", "batch_size": 16, "budget_s": 0.1}
how["progress"] = lambda step, steps, loss: calls.append((step, steps))

straight = reference.train("rnn", steps=6, checkpoint=folder / "straight", checkpoint_every=3, **how)
if leads:
    shutil.copytree(folder / "straight" / "step-00000003", folder / "resumed" / "step-00000003")
    shutil.copytree(folder / "resumed", folder / "for one")
dist.barrier()
resumed = reference.train("rnn", steps=6, checkpoint=folder / "resumed", resume=True, **how)

torch.manual_seed(5)
model = torch.nn.Linear(5, 4)
fully_shard(model)
optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
for row in torch.randn(3, 2, 5):
    optimizer.zero_grad()
    model(row).square().mean().backward()
    optimizer.step()
scaler = torch.amp.GradScaler("cpu")
sharded = SimpleNamespace(trainer=SimpleNamespace(model=model, optimizer=optimizer, scaler=scaler, rounds=None))
torch_checkpoint.write(folder / "sharded", sharded)
whole = model.weight.full_tensor().tolist()
moments = optimizer.state[model.weight]["exp_avg"].full_tensor().tolist()
told = {
    "straight": straight.losses, "resumed": resumed.losses, "resumed_at": resumed.resumed_at, "value": straight.value,
    "speedup": straight.report.recipe, "calls": len(calls), "weight": whole, "moments": moments,
}
(folder / f"{dist.get_rank()}.json").write_text(json.dumps(told))
"""


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """What two processes trained, their checkpoints, and what each told."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("by two")
    (folder / "script.py").write_text(TRAINED_BY_TWO)
    command = [sys.executable, "-m", "perfkit.cli", "launch", "--nproc", "2", str(folder / "script.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def by_one():
    """The same training in one process, without a recipe."""
    pytest.importorskip("torch")
    return reference.train("rnn", steps=6, **HOW)


def test_two_train_as_one_does_on_the_same_batches(by_two, by_one):
    _, (first, second) = by_two
    np.testing.assert_allclose(first["straight"], by_one.losses, rtol=DataParallel.tolerance)
    assert first["straight"] == second["straight"], "each tells the loss over the whole batch"
    assert first["value"] == pytest.approx(by_one.value, rel=DataParallel.tolerance)
    assert first["speedup"] == "data_parallel(batch_dim=1)", "sequences lie in time first"


def test_the_first_alone_tells_its_progress(by_two):
    _, (first, second) = by_two
    assert (first["calls"], second["calls"]) == (9, 0)


def test_a_resumed_training_goes_on_as_if_nothing_had_been(by_two):
    _, told = by_two
    for each in told:
        assert each["resumed_at"] == 3
        assert each["resumed"] == each["straight"][3:], "bit for bit: the same processes do the same"


def test_one_process_goes_on_from_what_two_wrote(by_two, by_one, tmp_path):
    folder, _ = by_two
    shutil.copytree(folder / "for one", tmp_path / "c")
    resumed = reference.train("rnn", steps=6, checkpoint=tmp_path / "c", resume=True, **HOW)
    np.testing.assert_allclose(resumed.losses, by_one.losses[3:], rtol=DataParallel.tolerance)


def test_one_process_reads_what_two_wrote_in_shards(by_two):
    import torch

    from perfkit.parallel import torch_checkpoint

    folder, (told, _) = by_two
    model = torch.nn.Linear(5, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.2)
    trainer = SimpleNamespace(model=model, optimizer=optimizer, scaler=torch.amp.GradScaler("cpu"), rounds=None)
    torch_checkpoint.read(folder / "sharded", SimpleNamespace(trainer=trainer))
    assert model.weight.tolist() == told["weight"]
    assert optimizer.state[model.weight]["exp_avg"].tolist() == told["moments"]
    assert optimizer.state[model.weight]["step"] == 3
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.fixture(params=[pytest.param("torch", marks=needs_torch), pytest.param("jax", marks=needs_jax)])
def framework(request):
    return request.param


def test_in_one_process_six_steps_are_three_and_three(framework, tmp_path):
    how = HOW | {"framework": framework, "checkpoint": tmp_path / "c"}
    straight = reference.train("cnn", steps=6, framework=framework, **HOW)
    first = reference.train("cnn", steps=3, **how)
    then = reference.train("cnn", steps=6, resume=True, **how)
    # Without checkpoints the step is the reference's own, which rounds elsewhere: a few float32 roundings per step.
    np.testing.assert_allclose(first.losses + then.losses, straight.losses, rtol=1e-5)
    assert then.value == pytest.approx(straight.value, rel=1e-4)
    again = reference.train("cnn", steps=6, resume=True, **how)
    assert (again.losses, again.resumed_at) == ((), 6)
    assert again.value == then.value, "read, and not trained any further"


@pytest.fixture
def one(monkeypatch):
    """A training whose state is a text; writes `one.state`, and fails half-way where `one.fails`."""
    held = SimpleNamespace(state="", fails=False)

    def write(folder, finished):
        folder.mkdir()
        (folder / "first half").write_text(held.state)
        if held.fails:
            raise OSError("no space left")
        (folder / "second half").write_text(held.state)

    def read(folder, finished):
        assert (folder / "first half").read_text() == (folder / "second half").read_text()
        held.state = (folder / "second half").read_text()

    monkeypatch.setattr(Checkpoints, "_side", lambda self: SimpleNamespace(write=write, read=read))
    monkeypatch.setattr(checkpoint.world, "of", lambda framework: checkpoint.world.ALONE)
    return held


def test_the_last_two_are_kept(one, tmp_path):
    those = Checkpoints(tmp_path / "c", "torch", {"model": "m"})
    for step in (1, 2, 3):
        one.state = f"after {step}"
        those.save(None, step)
    assert [step for step, _ in those.there()] == [2, 3]
    one.state = "something else"
    assert those.restore(None) == 3
    assert one.state == "after 3"


def test_what_was_half_written_is_ignored_and_removed(one, tmp_path):
    those = Checkpoints(tmp_path / "c", "torch", {"model": "m"})
    one.state = "whole"
    those.save(None, 1)
    one.state, one.fails = "half", True
    with pytest.raises(OSError, match="no space"):
        those.save(None, 2)
    assert [step for step, _ in those.there()] == [1]
    assert len(list(those.folder.iterdir())) == 2, "the half is still there, under another name"
    assert those.restore(None) == 1
    assert one.state == "whole"
    assert [path.name for path in those.folder.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize(
    ("changes", "said"), [({"model": "other"}, "model 'm'"), ({"seed": 1}, "seed None"), ({}, None)]
)
def test_another_trainings_checkpoint_is_refused(one, tmp_path, changes, said):
    Checkpoints(tmp_path, "torch", {"model": "m"}).save(None, 1)
    those = Checkpoints(tmp_path, "torch", {"model": "m"} | changes)
    if said is None:
        assert those.restore(None) == 1
    else:
        with pytest.raises(InvalidInputError, match=said):
            those.restore(None)


def test_beginning_anew_overwrites_nothing(one, tmp_path):
    those = Checkpoints(tmp_path / "c", "torch", {})
    those.refuse_others()
    with pytest.raises(InvalidInputError, match="no checkpoint"):
        those.restore(None)
    those.save(None, 4)
    with pytest.raises(InvalidInputError, match=r"step 4 already.*--resume"):
        those.refuse_others()
