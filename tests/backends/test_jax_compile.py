"""Programs compiled ahead of time in JAX: kept for the next process, and the caller's own settings used as they are."""

import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache

from perfkit.backends.jax_compile import Program, watching

FOLDER = "jax_compilation_cache_dir"


@pytest.fixture
def callers_cache(monkeypatch, tmp_path):
    """A function that sets the cache that JAX itself is told to use; perfkit's would be in `tmp_path`."""
    monkeypatch.setenv("PERFKIT_CACHE", str(tmp_path))
    before = getattr(jax.config, FOLDER)

    def use(folder):
        jax.config.update(FOLDER, folder)
        compilation_cache.reset_cache()

    yield use
    use(before)


def compiled(x):
    """What a new program returns, and what was compiled for it."""
    with watching() as log:
        return Program(lambda x: jnp.tanh(x) * 3)(x), log()


def kept(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_program_is_compiled_once_for_all_processes(callers_cache, tmp_path):
    callers_cache(None)
    x = jnp.arange(5.0)
    (first, compiling), (second, reading) = compiled(x), compiled(x)
    assert (compiling.cached, reading.cached) == (0, 1)
    assert jnp.array_equal(first, second)
    assert kept(tmp_path / "jax")
    assert getattr(jax.config, FOLDER) is None, "the setting is the caller's again"


def test_a_cache_of_the_callers_is_used_as_it_is(callers_cache, tmp_path):
    callers_cache(str(tmp_path / "callers"))
    compiled(jnp.arange(5.0))
    assert kept(tmp_path / "callers")
    assert not (tmp_path / "jax").exists() or not kept(tmp_path / "jax")
    assert getattr(jax.config, FOLDER) == str(tmp_path / "callers")
