"""Where the memory of torch models goes, against what is held by arithmetic and against another measurement."""

import pickle

import pytest

pytest.importorskip("torch")

import torch
from profile_torch_models import Leaking, Net, Recurrent, work_of
from torch import nn
from torch.cuda import _memory_viz

from perfkit import InvalidInputError, reference
from perfkit.measure import kept_memory
from perfkit.profiling import torch_memory
from perfkit.profiling._memory_data import CATEGORIES
from perfkit.profiling.torch_memory import STEPS, _card, _growth, _moments
from perfkit.profiling.torch_snapshot import MOST_ENTRIES
from perfkit.profiling.torch_trace import Block, Trace, held, traced

X = torch.randn(16, 64)
PARAMETERS = 4 * (64 * 128 + 128 + 128 * 32 + 32)


def collected(model, inputs=(X,), mode="inference", **training):
    work = work_of(model, inputs, mode, **training)
    return work, torch_memory.collected(work, work.backend.finish(work))


@pytest.fixture(scope="module")
def trained():
    return collected(Net(), mode="training")


@pytest.mark.parametrize(("name", "mode"), [("cnn", "training"), ("cnn", "inference"), ("lstm", "training")])
def test_the_categories_add_up_to_a_peak_that_is_measured_otherwise(name, mode):
    """Another reading of the profiler: it sums up what grew during one step, and knows no block from another."""
    task = reference.task(name, framework="torch", batch_size=4)
    training = {"loss": task.loss, "targets": task.targets, "optimizer": task.optimizer} if mode == "training" else {}
    work = work_of(task.model, task.example_inputs, mode, **training)
    finished = work.backend.finish(work)
    with finished.keeping_state():
        work.backend.caller(work, finished)()
        found = torch_memory.collected(work, finished)
        before = sum(thing.bytes for thing in held(work).values() if thing.category != "gradients")
        measured = before + work.backend.tensor_peak(work, finished).value
    assert sum(found.by_category.values()) == found.peak.value == pytest.approx(measured, rel=0.02)
    assert set(found.by_category) <= set(CATEGORIES)


def test_each_category_holds_what_it_should(trained):
    _, memory = trained
    kept = {**memory.by_category}
    assert kept["parameters"] == kept["gradients"] == PARAMETERS
    assert kept["optimizer state"] == 2 * PARAMETERS + 4 * 4  # Adam: two moments, and a counter each
    assert kept["inputs"] == 4 * (16 * 64 + 1)


def test_activations_are_in_the_module_that_made_them():
    """At the start of the backward pass the hidden layer's output and what a ReLU made of it are there."""

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.relu, self.outer = nn.Linear(8, 4096), nn.ReLU(), nn.Linear(4096, 1)

        def forward(self, x):
            return self.outer(self.relu(self.inner(x)))

    _, memory = collected(Wide(), (torch.randn(256, 8),), "training")
    assert memory.by_module["relu"] == 256 * 4096 * 4
    largest = next(block for block in memory.largest if block.category == "activations")
    assert (largest.module, largest.bytes) == ("relu", 256 * 4096 * 4)
    assert largest.op == "aten::relu"
    assert 0 < largest.born_ms < largest.freed_ms


def test_the_timeline_begins_with_what_is_held_and_contains_the_peak(trained):
    _, memory = trained
    first = memory.timeline[0]
    assert first.at_ms == 0
    assert first.bytes_by_category["parameters"] == PARAMETERS
    assert max(sum(point.bytes_by_category.values()) for point in memory.timeline) == memory.peak.value
    assert [point.at_ms for point in memory.timeline] == sorted(point.at_ms for point in memory.timeline)


class Wide(nn.Module):
    """Takes three times 40 MiB at each call."""

    def forward(self, x):
        return (x.repeat(1, 160) + 1).relu().sum()


@pytest.mark.skipif(kept_memory.settled(), reason="memory is kept here")
def test_what_each_step_takes_anew_is_counted(monkeypatch):
    """A page is counted once where it is touched; all there is may be one huge one."""
    monkeypatch.setattr(kept_memory, "MOST_CALLS", 2)
    large, small = collected(Wide(), (torch.ones(1024, 64),))[1], collected(Net())[1]
    assert small.program["anew"] < kept_memory.KEPT_BYTES
    if not kept_memory.huge_pages():
        assert large.program["anew"] >= 2 * 40 * 2**20
    monkeypatch.setattr(kept_memory, "settled", lambda: True)
    assert collected(Net())[1].program == {}


def test_a_leak_is_told_and_nothing_else_is(trained):
    def growth(model, inputs, mode="inference"):
        work = work_of(model, inputs, mode)
        return _growth(traced(work, work.backend.finish(work), STEPS)).value

    assert growth(Leaking(), (X,)) == 16 * 32 * 4
    assert growth(Recurrent(), (torch.randn(5, 4, 6),), "training") == 0
    assert trained[1].growth.value == 0


def test_what_is_not_there_has_a_reason(trained):
    _, memory = trained
    for quantity in (memory.reserved, memory.device_used, memory.fragmentation):
        assert quantity.value is None
        assert "caching allocator" in quantity.unavailable


def test_the_state_is_as_before():
    work = work_of(Net(), (X,), "training")
    state = {name: value.clone() for name, value in work.model.state_dict().items()}
    torch_memory.collected(work, work.backend.finish(work))
    assert all(torch.equal(value, state[name]) for name, value in work.model.state_dict().items())
    assert all(parameter.grad is None for parameter in work.model.parameters())
    assert not work.training.optimizer.state


def test_memory_viz_reads_the_snapshot(tmp_path):
    work = work_of(Net(), (X,), "training")
    path = tmp_path / "step.pickle"
    torch_memory.snapshot(work, work.backend.finish(work), path)
    data = pickle.loads(path.read_bytes())
    (entries,) = data["device_traces"]
    assert {entry["action"] for entry in entries} == {"alloc", "free_requested", "free_completed"}
    assert sum(entry["size"] for entry in entries if "held before" in entry["frames"][0]["name"]) > PARAMETERS
    assert "alloc" in _memory_viz.trace(data) or "MEM[" in _memory_viz.trace(data)
    assert "<html" in _memory_viz.trace_plot(data).lower() or "<script" in _memory_viz.trace_plot(data)


def test_a_snapshot_that_cannot_be_written_is_refused(tmp_path):
    work = work_of(Net(), (X,))
    with pytest.raises(InvalidInputError, match="cannot be written"):
        torch_memory.snapshot(work, work.backend.finish(work), tmp_path / "missing" / "step.pickle")


@pytest.fixture
def card(monkeypatch):
    """What torch would tell of a card: 600 B of 800 B used at the peak, and what was asked of it."""
    asked = []
    told = {
        "synchronize": None,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "max_memory_allocated": 600,
        "max_memory_reserved": 800,
        "mem_get_info": (1000, 10_000),
    }
    for name, answer in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: asked.append(options))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", asked.append)
    return asked


def test_what_the_caching_allocator_of_a_card_tells(card):
    calls = []
    found = _card(lambda: calls.append("step"), "cuda")
    assert calls == ["step"]
    assert (found["allocated"].value, found["reserved"].value, found["device_used"].value) == (600, 800, 9000)
    assert found["fragmentation"].value == pytest.approx(0.25)


def test_recording_on_a_card_ends_also_when_the_step_raises(card, tmp_path):
    work = work_of(Net(), (X,)).replace(device="cuda")
    path = tmp_path / "step.pickle"
    torch_memory.snapshot(work, work.backend.finish(work), path)
    assert card == [{"max_entries": MOST_ENTRIES}, str(path), {"enabled": None}]
    card.clear()
    work.model.first = torch.nn.Linear(3, 3)
    with pytest.raises(RuntimeError):
        torch_memory.snapshot(work, work.backend.finish(work), path)
    assert card in ([], [{"max_entries": MOST_ENTRIES}, {"enabled": None}])


def test_a_device_that_tells_no_allocations():
    work = work_of(Net(), (X,)).replace(device="mps")
    found = torch_memory.collected(work, work.backend.finish(work))
    assert found.peak.unavailable == "no allocations are told of device 'mps'"


def test_blocks_move_the_timeline_when_they_are_born_and_freed():
    """An address may be used again: the same one twice here, and once by a block from before the step."""
    blocks = [
        Block(1, 100, born_ns=-1, category="parameters"),
        Block(2, 50, born_ns=5, freed_ns=20, category="activations"),
        Block(2, 70, born_ns=20, freed_ns=40, category="temporaries"),
        Block(3, 8, born_ns=12, category="other"),
    ]
    moments = [(at, now.total()) for at, now in _moments(Trace([(10, 30)], blocks), 10, 30)]
    assert moments == [(10, 150), (12, 158), (20, 108), (20, 178)]
