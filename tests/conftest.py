"""Models that tests share, and the options every test runs under."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

# Each of pytest's workers has its share of the cores: threads of several that spin for the same core hold up all. Read
# when a framework is first imported, so it must stand here. Not in the process that starts the workers: they inherit.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // int(workers), 1)))

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
