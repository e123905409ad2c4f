"""What tests of layers that follow each other share."""

import pytest


@pytest.fixture
def made(monkeypatch):
    """How many layers each sequence has that is made; the kernels take whatever they can, on any CPU."""
    pytest.importorskip("torch")
    from perfkit.backends import torch_fused_sequence as sequences
    from perfkit.kernels import _op
    from perfkit.kernels.linear import cpu_shape, torch_call

    monkeypatch.setattr(cpu_shape, "slower", lambda _problem: None)
    monkeypatch.setattr(torch_call, "_known", {})
    _op._choose.cache_clear()
    found, caller = [], sequences.caller

    def counted(layers, x, size):
        found.append(len(layers))
        return caller(layers, x, size)

    monkeypatch.setattr(sequences, "caller", counted)
    return found


@pytest.fixture(params=[True, False], ids=["guarded", "asked"])
def guarded(request, monkeypatch):
    """torch.compile's guards tell whether tensors and modes are as they were; or, where torch has none, we ask."""
    pytest.importorskip("torch")
    from perfkit.backends import torch_fused_sequence as sequences

    if not request.param:
        monkeypatch.setattr(sequences, "GUARDS", None)
    else:
        assert sequences.GUARDS is not None
