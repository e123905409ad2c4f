"""The examples in the docstrings run and give what they say."""

import doctest
import importlib

import pytest

from perfkit import reference

MODULES = ("_load", "_train", "_evaluate", "_convert", "data._adding", "data._digits", "data._corpus")


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module):
    public = {name: getattr(reference, name) for name in reference.__all__}
    result = doctest.testmod(importlib.import_module(f"perfkit.reference.{module}"), extraglobs=public)
    assert result.attempted > 0
    assert result.failed == 0
