"""What reports on torch models tell of memory that each call takes from the system anew."""

from dataclasses import replace

import pytest

pytest.importorskip("torch")

import torch
from torch import nn

from perfkit import _proof
from perfkit._chain import chain_of
from perfkit._variant import ready
from perfkit._workload import Inputs, Workload
from perfkit.backends.torch_backend import BACKEND
from perfkit.measure import kept_memory

pytestmark = pytest.mark.skipif(bool(kept_memory.unavailable()), reason="not glibc's malloc")


class Large(nn.Module):
    """Takes 2 x `mib` in each call."""

    def __init__(self, mib):
        super().__init__()
        self.size = mib << 18

    def forward(self, x):
        return (torch.ones(self.size) + x).sum()


@pytest.fixture
def variant(monkeypatch):
    """A model that takes so many MiB, in a process that was started so."""

    def make(mib, variables):
        monkeypatch.setattr(kept_memory, "at_start", lambda: variables)
        return ready(Workload(BACKEND, Large(mib).eval(), Inputs((torch.ones(1),)), "inference", "cpu"), "original")

    return make


def told(variant):
    return BACKEND.memory_advice(variant.work, variant.finished)


def test_what_is_given_back_and_taken_again_is_counted(variant):
    large = variant(72, {})
    much = kept_memory.touched_anew(large.call) > kept_memory.KEPT_BYTES  # where pages are huge, each counts as one
    assert ("MiB from the system anew" in told(large)) == much
    assert told(variant(72, kept_memory.SETTINGS)) == ""
    assert told(variant(1, {})) == ""


def test_where_only_the_original_takes_it_the_gain_may_be_that(variant, monkeypatch):
    small, large = variant(1, {}), variant(2, {})
    large = replace(large, work=large.work.replace(seed=1))
    monkeypatch.setattr(BACKEND.__class__, "memory_advice", lambda _, work, finished: "it takes much" * work.seed)
    told, chain = _proof._about_memory, chain_of("compile")
    assert told(large, small, chain) == "part of the gain may be memory: of the original it takes much"
    assert told(small, large, chain) == "it takes much"
    assert told(large, large, chain) == "it takes much"
    assert told(small, small, chain) == ""
    assert told(large, small, chain | "keep_memory") == "", "the recipe tells it itself, and is its gain"
