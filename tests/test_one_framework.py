"""With one framework installed everything of it works, and the other is refused with what to install."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

BLOCK = """
import importlib.abc, importlib.util, sys
absent = {absent!r}
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.partition(".")[0] in absent else found(name, package)
import perfkit
"""
TORCH = """
import torch
model, x = torch.nn.Linear(4, 4), torch.ones(2, 4)
print(perfkit.optimize(model, "half", example_inputs=(x,), budget_s=0.1, on_slower="revert").report.fidelity.ok)
"""
JAX = """
import jax.numpy as jnp
x = jnp.ones(4)
print(perfkit.optimize(jnp.sin, "compile", example_inputs=(x,), budget_s=0.1, on_slower="revert").report.fidelity.ok)
"""
REFUSED = """
try:
    perfkit.reference.load("cnn", framework={framework!r})
except ImportError as error:
    print(error)
diagnosis = perfkit.doctor()
print(diagnosis.devices[{framework!r}])
assert not any(item.ready for item in diagnosis.recipes if item.framework == {framework!r})
assert any(item.ready for item in diagnosis.recipes if item.framework != {framework!r})
"""


@pytest.mark.parametrize(
    ("works", "absent", "code"),
    [("torch", ("jax", "jaxlib", "flax", "optax"), TORCH), ("jax", ("torch", "torchao", "triton"), JAX)],
)
def test_one_without_the_other(works, absent, code):
    if find_spec(works) is None:
        pytest.skip(f"{works} is not installed")
    other = {"torch": "jax", "jax": "torch"}[works]
    script = BLOCK.format(absent=absent) + code + REFUSED.format(framework=other)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert lines[0] == "True"
    for line in lines[1:]:
        assert "not installed: pip install" in line
        assert f"perfkit[{other}]" in line
