"""How devices are shared out among the recipes of a chain."""

from dataclasses import dataclass

import pytest

from perfkit import ChainError, InvalidInputError, ParallelRecipe, Stage
from perfkit._chain import Chain, chain_of
from perfkit.parallel.layout import Layout, layout
from perfkit.parallel.torch_traffic import covered
from perfkit.parallel.world import Alone


@dataclass(frozen=True, kw_only=True)
class Split(ParallelRecipe):
    """Stands for a recipe along the tensor axis."""

    stage = Stage.TENSOR
    axis = "tensor"


def shared(data, tensor, devices):
    recipes = [Split(size=tensor)] if tensor != "none" else []
    return layout(Chain((*recipes, *chain_of(f"data_parallel({data})"))), Alone(devices))


def test_a_recipe_without_a_size_takes_what_is_left():
    assert shared(None, "none", 4) == Layout(("data",), (4,))
    assert shared(2, None, 8) == Layout(("data", "tensor"), (2, 4))
    assert str(shared(None, 2, 8)) == "data 4 × tensor 2"


def test_sizes_make_up_the_devices():
    with pytest.raises(InvalidInputError, match="asks for 2 × 2 devices, and there are 8: start 4 processes"):
        shared(2, 2, 8)
    with pytest.raises(InvalidInputError, match="asks for the rest × 3 devices"):
        shared(3, None, 4)


def test_two_recipes_without_a_size_are_ambiguous():
    with pytest.raises(ChainError, match=r"split and data_parallel have no size.*'split\(2\)\+data_parallel\(2\)'"):
        shared(None, None, 4)


def test_an_axis_that_nobody_asks_for_has_one_device():
    assert shared(None, "none", 4).size("tensor") == 1
    assert shared(None, "none", 1) is None
    assert layout(chain_of("bf16"), Alone(4)) is None


@pytest.mark.parametrize("size", [0, -1, 1.5, "2"])
def test_a_size_is_a_number_of_devices(size):
    with pytest.raises(InvalidInputError, match="expected a number of devices"):
        Split(size=size)


def test_sizes_may_be_written_without_a_name():
    (recipe,) = chain_of("data_parallel(2, shard=True)")
    assert (recipe.size, recipe.shard) == (2, True)
    with pytest.raises(InvalidInputError, match="given size twice"):
        chain_of("data_parallel(2, size=2)")
    with pytest.raises(InvalidInputError, match=r"'data_parallel' was given \(2, True\)"):
        chain_of("data_parallel(2, True)")
    with pytest.raises(InvalidInputError, match="it takes options as keywords, such as mode="):
        chain_of("compile('default')")


def test_covered_time_counts_once():
    assert covered([(0, 10), (5, 12), (20, 21), (3, 4)]) == 13
    assert covered([]) == 0
