"""Torch models that keep memory from call to call: what their calls take from the system, and what is refused."""

import copy
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

from torch import nn

import perfkit
from perfkit.kernels.torch_memory.allocator import User
from perfkit.measure import kept_memory
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
    assert seen["in a thread"] == [NOTHING, TAKES]
    taken, held = seen["notes"]
    assert taken == "each call takes 160 MiB from the system anew, and 0 MiB where it finds what the last one took"
    assert held == "between calls the process holds 80 MiB for it"
    assert not [note for note in seen["report"] if "anew" in note]


def test_copies_and_models_around_it_keep_it_too(seen):
    assert (seen["twin"], seen["part of another"], seen["compiled around"]) == (NOTHING, NOTHING, [NOTHING, TAKES])
    assert seen["exported"] == TAKES, "the program without it"
    assert seen["is"] == [True, True]


def test_what_raises_leaves_it_as_it_was(seen):
    assert seen["after raising"] == [NOTHING, TAKES]


def test_several_models_share_what_is_held(seen):
    assert (seen["another"], seen["shared"]) == (NOTHING, True)


def test_training_steps_as_a_whole(seen):
    assert seen["training"] == [NOTHING, TRAINING] * 2
    assert seen["after training"] == [NOTHING, TAKES]


def test_where_there_is_nothing_to_keep_it_says_so(seen):
    assert "there is nothing to keep" in seen["nothing to keep"][0]


def test_memory_goes_back_with_the_models(seen):
    assert (seen["held"], seen["then"]) == (0, TAKES)


def test_what_cannot_be_is_refused_with_what_to_do(monkeypatch):
    keep = KeepMemory()
    assert "this is 'cuda'" in keep.unavailable("torch", "cuda")
    monkeypatch.setattr(kept_memory, "at_start", dict)
    assert keep.unavailable("jax", "cpu").endswith(f"start Python with {kept_memory.TYPED}")
    monkeypatch.setattr(kept_memory, "at_start", lambda: kept_memory.SETTINGS)
    assert keep.unavailable("torch", "cpu").startswith("there is nothing to do")
    assert keep.unavailable("jax", "cpu").startswith("there is nothing to do")


def test_without_inputs_it_keeps_what_there_will_be():
    result = perfkit.apply(nn.Linear(4, 2), "keep_memory")
    assert result.report.steps[0].effect.notes == ("what a call takes is kept for the next one",)


def test_who_keeps_memory_is_gone_with_the_model_where_its_class_stays():
    """torch 2.11 on Python 3.12 holds on to the classes of what it compiled."""

    def users():
        gc.collect()
        return sum(isinstance(each, User) for each in gc.get_objects())

    before = users()
    model = perfkit.apply(nn.Linear(4, 2), "keep_memory").model
    twin, kind = copy.deepcopy(model), type(model)
    assert users() == before + 2
    del model, twin
    assert (users(), kind.__name__) == (before, "Linear")
