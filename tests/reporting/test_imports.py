"""Reports are read where no framework is installed."""

from __future__ import annotations

import subprocess
import sys

BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "jax", "jaxlib", "flax", "triton", "numpy"}:
            raise AssertionError(f"{name} was imported")

sys.meta_path.insert(0, Blocked())
"""


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCK + code], capture_output=True, text=True, check=False
    )


def test_reporting_imports_no_framework():
    done = run("from perfkit.reporting import html, markdown, plots, schema, terminal; print('imported')")
    assert done.stdout == "imported\n", done.stderr
    done = run("from perfkit.reporting import profile_html, profile_terminal; print('imported')")
    assert done.stdout == "imported\n", done.stderr


def test_the_block_would_be_noticed():
    for name in ("torch", "jax.numpy"):
        assert f"{name.partition('.')[0]} was imported" in run(f"import {name}").stderr
