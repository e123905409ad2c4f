"""A stand-in for NVIDIA's driver, behind the real binding; and the names of layers in compiled programs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from perfkit.kernels import _native

FAKE = Path(__file__).parent / "fake_nvml.cpp"
NAMES_TELL_PROGRAMS_APART = "jax_compilation_cache_include_metadata_in_key"


@pytest.fixture(autouse=True)
def names_kept():
    """No program comes from the tests' cache that was compiled of the same operations under other names."""
    if jax := sys.modules.get("jax"):
        before = getattr(jax.config, NAMES_TELL_PROGRAMS_APART)
        jax.config.update(NAMES_TELL_PROGRAMS_APART, True)
    yield
    if jax:
        jax.config.update(NAMES_TELL_PROGRAMS_APART, before)


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
