"""Memory of torch tensors that is kept: which call finds whose, and that all else is as it was."""

import gc
import os
import subprocess
import sys
import threading

import pytest

pytest.importorskip("torch")

import torch

from perfkit import UnsupportedError
from perfkit.backends.torch_profiler import profiled
from perfkit.kernels import _native
from perfkit.kernels.torch_memory import allocator
from perfkit.kernels.torch_memory.allocator import Keeping, User
from perfkit.measure import kept_memory

MIB = 1 << 20

FORKING = """
import os, torch
from perfkit.kernels.torch_memory.allocator import Keeping, User
user = User()
with Keeping():
    place = torch.empty(1 << 24).data_ptr()
    child = os.fork()
    os.write(1, b"found " if torch.empty(1 << 24).data_ptr() == place else b"other ")
    if not child:
        os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""

pytestmark = pytest.mark.skipif(bool(allocator.unavailable()), reason=f"not kept here: {allocator.unavailable()}")


@pytest.fixture
def user():
    gc.collect()
    kept_memory.hand_back()
    yield User()
    gc.collect()


def taken(mib):
    """Where a tensor was put that is freed again."""
    return torch.empty(mib * MIB, dtype=torch.uint8).data_ptr()


def test_what_a_call_frees_waits_for_the_next_one(user):
    with Keeping():
        first = taken(40)
    assert kept_memory.held_bytes() == 40 * MIB
    outside = torch.empty(40 * MIB, dtype=torch.uint8)
    assert outside.data_ptr() != first
    assert kept_memory.held_bytes() == 40 * MIB
    with Keeping():
        assert taken(40) == first
        assert taken(20) == first, "it serves what needs half of it"
        assert taken(19) != first


def test_small_tensors_are_the_c_librarys(user):
    with Keeping():
        taken(0)
        torch.empty(MIB - 1, dtype=torch.uint8)
    assert kept_memory.held_bytes() == 0


def test_calls_may_be_nested_and_in_threads(user):
    found = []

    def in_a_thread():
        found.append(taken(8))
        with Keeping():
            found.append(taken(8))

    with Keeping():
        with Keeping():
            first = taken(8)
        assert taken(8) == first
        thread = threading.Thread(target=in_a_thread)
        thread.start()
        thread.join()
    assert found[0] != first, "another thread is not within"
    assert found[1] == first


def test_outputs_stay_and_are_freed_anywhere(user):
    with Keeping():
        output = torch.arange(4.0 * MIB)
    expected = torch.arange(4.0 * MIB)
    with Keeping():
        torch.zeros(4 * MIB)
    assert torch.equal(output, expected)
    assert kept_memory.held_bytes() == 16 * MIB
    output.resize_(5 * MIB)
    assert torch.equal(output[: 4 * MIB], expected)
    assert kept_memory.held_bytes() == 32 * MIB


def test_no_more_is_held_than_twice_what_was_in_use(user):
    with Keeping():
        for mib in (40, 19, 9, 4):
            taken(mib)
        assert kept_memory.held_bytes() == 72 * MIB
        taken(41)
    assert kept_memory.held_bytes() == (72 - 40 + 41) * MIB, "what was freed longest ago goes first"


def test_it_goes_back_with_the_last_user():
    gc.collect()
    users = [User(), User()]
    with Keeping():
        taken(40)
        output = torch.ones(MIB)
        users.pop()
        assert kept_memory.held_bytes() >= 40 * MIB
        kept_memory.hand_back()
        assert kept_memory.held_bytes() == 0
        taken(40)
    users.pop()
    gc.collect()
    if not kept_memory.held_bytes():  # but for models of other tests
        del output
        assert kept_memory.held_bytes() == 0


def test_a_profiler_sees_every_tensor(user):
    with Keeping():
        taken(40)
        with profiled(profile_memory=True) as profile:
            torch.zeros(40 * MIB, dtype=torch.uint8)
    assert max(event.cpu_memory_usage for event in profile.events()) == 40 * MIB


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_goes_on():
    """In a process without the threads of other tests, which a fork would lose."""
    done = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "found found "), done.stderr


def test_what_is_missing_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(kept_memory, "at_start", lambda: kept_memory.SETTINGS)
    assert allocator.unavailable().startswith("there is nothing to do")
    monkeypatch.setattr(kept_memory, "at_start", dict)
    monkeypatch.setattr(_native, "missing", lambda: "there is no C++ compiler")
    assert allocator.unavailable() == "there is no C++ compiler"
    monkeypatch.setattr(allocator, "TORCH", tmp_path)
    assert "has none" in allocator.unavailable()
    with pytest.raises(UnsupportedError, match=r"allocator\.cpp: .*Allocator\.h"):
        allocator.library.__wrapped__()  # what was built before is kept
