"""Models that tests share, and the options every test runs under."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from importlib.util import find_spec

import haste
import pytest

# Each of pytest's workers has its share of the cores: threads of several that spin for the same core hold up all. Read
# when a framework is first imported, so it must stand here. Not in the process that starts the workers: they inherit.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // int(workers), 1)))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # and those of tests that want several sleep while they wait

# What is tested is what programs compute, and not how fast: XLA's compiler need not try hard. Read when JAX first
# compiles; processes that tests start inherit it.
QUICKLY_COMPILED = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",  # and code in one piece less than in several, where cores are shared
)

FRAMEWORKS = tuple(name for name in ("torch", "jax") if find_spec(name))
if "jax" in FRAMEWORKS and tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 12):
    # The older emitter needs a third of the time for the same fusions. jaxlib 0.12 has it no more: it knows no such
    # flag, and ends the process over it.
    QUICKLY_COMPILED = (*QUICKLY_COMPILED, "--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(QUICKLY_COMPILED))
SLOWER = "ignore:.* makes .* slower here:perfkit.PerfkitWarning"


@pytest.fixture(autouse=True, scope="session")
def caches(tmp_path_factory):
    """What tests build and compile goes to a folder of the run's own, once for all of pytest's workers."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    for variable in ("PERFKIT_CACHE", "TORCHINDUCTOR_CACHE_DIR"):
        (folder / variable.lower()).mkdir(exist_ok=True)
        os.environ[variable] = str(folder / variable.lower())
    settings = {
        "jax_compilation_cache_dir": str(folder / "jax_compilation_cache"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,  # an op that is called by itself is a program, too
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    os.environ.update({name.upper(): str(value) for name, value in settings.items()})  # for processes that tests start
    if "jax" in FRAMEWORKS:
        import jax
        from jax.experimental.compilation_cache import compilation_cache

        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # jax looks at the setting once, and some test files call it when collected


_settled: list[tuple[object, int]] = [("", 0)]


@pytest.fixture(autouse=True)
def settled_heap(request):
    """At each file, and before each test since which more was imported: much is at its first use."""
    held = (request.node.path, len(sys.modules))
    if _settled[0] != held:
        haste.settle_heap()
        _settled[0] = held


@pytest.fixture
def hasty(monkeypatch):
    """Little measuring. A result may be called slower then, by chance: `pytest_collection_modifyitems` allows it."""
    for place, value in haste.SETTINGS.items():
        monkeypatch.setattr(place, value)


def pytest_collection_modifyitems(items):
    for item in items:
        if "hasty" in item.fixturenames:
            item.add_marker(pytest.mark.filterwarnings(SLOWER))


@pytest.fixture(params=FRAMEWORKS)
def framework(request) -> str:
    """Every installed framework in turn."""
    return request.param
