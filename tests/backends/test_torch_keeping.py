"""Torch models that keep memory from call to call: what their calls take from the system, and what is refused."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("torch")

from torch import nn

import perfkit
from perfkit import UnsupportedError
from perfkit._chain import chain_of
from perfkit.measure import kept_memory, kept_region
from perfkit.recipes.keep_memory import KeepMemory

WORKER = Path(__file__).with_name("torch_keeping_worker.py")
TAKES, TRAINING, NOTHING = pytest.approx(160, abs=3), pytest.approx(280, abs=6), pytest.approx(0, abs=3)
"""MiB that a call takes anew: what a model computes with in inference, and in training; or nothing."""

pytestmark = pytest.mark.skipif(bool(kept_memory.unavailable()), reason="not glibc's malloc")


@pytest.fixture(scope="module")
def seen():
    """In a process of its own: what another test leaves in the heap would count."""
    variables = {name: value for name, value in os.environ.items() if name not in kept_memory.SETTINGS}
    variables["PYTHONPATH"] = os.pathsep.join(map(str, (WORKER.parents[1], *filter(None, sys.path))))
    done = subprocess.run([sys.executable, WORKER], env=variables, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_the_original_takes_what_it_took_and_the_result_nothing(seen):
    assert seen["before"] == TAKES
    assert seen["in turns"] == [[NOTHING, TAKES]] * 3
    taken, held = seen["notes"]
    assert taken.startswith("each call took 160 MiB from the system anew, and takes ")
    assert held.startswith("between calls the process holds ")


def test_copies_and_models_around_it_keep_it_too(seen):
    assert (seen["twin"], seen["part of another"], seen["compiled around"]) == (NOTHING, NOTHING, [NOTHING, TAKES])
    assert seen["exported"] == TAKES, "the program without it"
    assert seen["is"] == [True, True]


def test_what_raises_leaves_it_as_it_was(seen):
    assert seen["after raising"] == [NOTHING, TAKES]


def test_several_models_share_the_room(seen):
    assert (seen["another"], seen["room for both"]) == (NOTHING, True)


def test_training_steps_as_a_whole(seen):
    kept, plain = seen["training"]
    assert (plain, kept) == (TRAINING, NOTHING)
    assert seen["after training"] == [NOTHING, TAKES]


def test_where_there_is_nothing_to_keep_it_says_so(seen):
    assert "there is nothing to keep" in seen["nothing to keep"][0]


def test_memory_goes_back_with_the_models(seen):
    assert seen["freed"] > 100
    assert seen["then"] == TAKES


def test_what_cannot_be_is_refused_with_what_to_do(monkeypatch):
    model, keep = nn.Linear(4, 2), KeepMemory()
    with pytest.raises(UnsupportedError, match="pass example_inputs, or give the number"):
        perfkit.apply(model, "keep_memory")
    assert "this is 'cuda'" in keep.unavailable("torch", "cuda")
    assert keep.unavailable("jax", "cpu").endswith(f"start Python with {kept_memory.TYPED}")
    for wrong in (0, -1, 1.5, True, "2"):
        with pytest.raises(perfkit.InvalidInputError, match="expected a number of MiB"):
            KeepMemory(mib=wrong)
    refused = []

    def in_another_thread():
        with pytest.raises(UnsupportedError) as error:
            perfkit.apply(model, "keep_memory(100)")
        refused.append(str(error.value))

    monkeypatch.setattr(kept_region, "_word", lambda piece: kept_region.ELSEWHERE)
    thread = threading.Thread(target=in_another_thread)
    thread.start()
    thread.join()
    assert "optimize and call the model in the main thread" in refused[0]
    monkeypatch.setattr(kept_memory, "at_start", lambda: kept_memory.SETTINGS)
    assert keep.unavailable("torch", "cpu").startswith("there is nothing to do")
    assert keep.unavailable("jax", "cpu").startswith("there is nothing to do")


def test_where_the_heap_cannot_grow_the_model_is_as_it_was(monkeypatch):
    monkeypatch.setattr(kept_region, "MOST_TRIED", -(1 << 40))
    size = (kept_region.size() >> 20) + 100
    plan = perfkit.plan(nn.Linear(4, 2), f"keep_memory({size})")
    assert plan.steps[0].effect.status == "NO_EFFECT"
    assert plan.steps[0].effect.notes == ("the heap cannot grow by 100 MiB in one piece, so nothing is kept",)


def test_it_is_written_as_it_is_read():
    assert str(chain_of("threads+keep_memory(300)+compile")) == "compile+threads+keep_memory(mib=300)"
