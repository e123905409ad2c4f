"""What every recipe is; one of one's own."""

import dataclasses

import pytest

from perfkit import Recipe, Stage
from perfkit._chain import chain_of
from perfkit._recipe_files import names, recipe_class


@pytest.mark.parametrize("name", names())
def test_every_recipe_is_documented_and_frozen(name):
    kind = recipe_class(name)
    assert issubclass(kind, Recipe)
    assert kind.__dataclass_params__.frozen
    assert kind().name == name
    assert "Source:" in kind.__doc__
    for option in dataclasses.fields(kind):
        assert f"{option.name}:" in kind.__doc__, f"option {option.name} is not documented"
    assert hasattr(kind, "torch") or hasattr(kind, "jax")


def test_a_recipe_of_ones_own_needs_no_registration():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class SomethingElse(Recipe):
        stage = Stage.KERNELS

    assert str(chain_of(["compile", SomethingElse()])) == "something_else+compile"
