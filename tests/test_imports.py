"""Importing perfkit loads no framework, optimizing in one loads not the other; and these tests can fail."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

import perfkit

TORCH = """
import torch, perfkit
model = torch.nn.Linear(4, 4)
perfkit.optimize(model, "bf16", example_inputs=(torch.ones(2, 4),), budget_s=0.1, on_slower="revert")
"""
JAX = """
import jax.numpy as jnp, perfkit
perfkit.optimize(lambda x: x @ x, "compile", example_inputs=(jnp.ones((4, 4)),), budget_s=0.1, on_slower="revert")
"""


def loaded(code: str, *modules: str) -> list[str]:
    """Which of `modules` are loaded after `code` ran in a fresh interpreter."""
    quiet = "import sys, warnings; warnings.simplefilter('ignore')"
    told = f"print([name for name in {modules!r} if name in sys.modules])"
    script = "\n".join((quiet, code, told))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return eval(done.stdout.strip().splitlines()[-1])


def test_importing_loads_no_framework():
    assert loaded("import perfkit", "torch", "jax", "flax", "numpy", "rich", "sklearn") == []


def test_listing_recipes_loads_no_framework():
    assert loaded("import perfkit; perfkit.recipes()", "torch", "jax", "flax") == []


def test_that_the_tests_above_can_fail():
    assert loaded("import perfkit, numpy", "numpy") == ["numpy"]


@pytest.mark.skipif(not find_spec("torch"), reason="torch is not installed")
def test_a_torch_model_loads_no_jax():
    assert loaded(TORCH, "torch", "jax", "flax") == ["torch"]


@pytest.mark.skipif(not find_spec("jax"), reason="jax is not installed")
def test_a_jax_function_loads_no_torch():
    assert loaded(JAX, "torch", "jax") == ["jax"]


def test_every_public_name_is_there():
    for name in perfkit.__all__:
        assert getattr(perfkit, name) is not None
    assert set(perfkit.__all__) <= set(dir(perfkit))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        perfkit.optimise  # noqa: B018 - looking it up is the test


@pytest.mark.parametrize("folder", ["recipes", "kernels"])
def test_the_bare_folder_name_cannot_be_imported(folder):
    """With the repository root on sys.path, `import kernels` would hide the package of that name on PyPI."""
    root = perfkit.recipes.__path__[0].rsplit("/", 1)[0]
    done = subprocess.run([sys.executable, "-c", f"import {folder}"], cwd=root, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"import perfkit.{folder}" in done.stderr
