"""A stand-in for NVIDIA's driver, behind the real binding."""

from __future__ import annotations

from pathlib import Path

import pytest

from perfkit.kernels import _native

FAKE = Path(__file__).parent / "fake_nvml.cpp"


@pytest.fixture
def fake_nvml(monkeypatch):
    """Install the stand-in; called with the words that `fake_nvml.cpp` names, and once more for other cards."""
    pynvml = pytest.importorskip("pynvml")

    def installed(words: str = "", *flags: str):
        library = _native.load(FAKE, flags)
        monkeypatch.setenv("FAKE_NVML", words)
        monkeypatch.setattr(pynvml, "nvmlLib", library)
        monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
        return library

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return installed
