"""Models that tests share, and the options every test runs under."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

FRAMEWORKS = tuple(name for name in ("torch", "jax") if find_spec(name))


@pytest.fixture(autouse=True, scope="session")
def caches(tmp_path_factory):
    """Compiled programs of tests go to a folder of their own."""
    os.environ["PERFKIT_CACHE"] = str(tmp_path_factory.mktemp("perfkit-cache"))
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("inductor-cache"))


@pytest.fixture(params=FRAMEWORKS)
def framework(request) -> str:
    """Every installed framework in turn."""
    return request.param
