"""Whether Inductor knows integer kernels; that it makes them is test_torch_quantize's, in every version of torch."""

import importlib.util

import pytest

pytest.importorskip("torch")

import torch
from torch.torch_version import TorchVersion

from perfkit.quantization.torch_integer_kernels import known


def test_it_is_told_that_a_newer_torch_needs_torchao(monkeypatch):
    monkeypatch.setattr("perfkit.quantization.torch_integer_kernels.find_spec", lambda name: None)
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.14.1"))
    (told,) = known()
    assert "pip install 'perfkit[torch]'" in told
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.13.0"))
    assert list(known()) == []


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_with_torchao_there_is_nothing_to_tell():
    assert list(known()) == []
