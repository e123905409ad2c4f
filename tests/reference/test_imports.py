"""Importing the package is cheap, and asking for one framework does not load the other."""

import subprocess
import sys

import pytest

HEAVY = ("flax", "jax", "rich", "sklearn", "torch")


@pytest.mark.parametrize(
    ("statement", "loaded"),
    [
        ("import perfkit.reference", set()),
        ("from perfkit.reference import *", set()),
        ("import perfkit.reference as r; r.load('lstm')", {"torch"}),
        ("import perfkit.reference as r; r.load('lstm', framework='jax')", {"jax", "flax"}),
        ("import perfkit.reference as r; r.data.digits()", {"sklearn"}),
    ],
)
def test_only_what_is_asked_for_is_imported(statement, loaded):
    script = f"import sys; {statement}\nprint(*({{*{HEAVY!r}}} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    # flax and torch may bring rich with them: only what a bare import brings is perfkit's own doing
    assert set(shown.split()) - ({"rich"} if loaded else set()) == loaded
