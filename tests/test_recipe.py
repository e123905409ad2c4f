"""Recipes: found by file name, read from text, ordered and refused."""

import dataclasses
import subprocess
import sys

import pytest

import perfkit
from perfkit import ChainError, InvalidInputError, Recipe, Stage, UnknownRecipeError
from perfkit._recipe import Chain, chain_of, names, recipe_class


def test_recipes_are_the_files_in_the_folder():
    assert {"bf16", "channels_last", "compile", "fp16", "half", "tf32"} <= set(names())
    assert [info.name for info in perfkit.recipes()] == list(names())


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


def test_a_chain_is_ordered_by_stage_however_it_is_written():
    written = chain_of("compile+bf16+channels_last")
    assert str(written) == "channels_last+bf16+compile"
    for same in (
        "channels_last|bf16|compile",
        ["bf16", "compile", "channels_last"],
        recipe_class("bf16")() | "compile" | "channels_last",
        "compile" | recipe_class("bf16")() | recipe_class("channels_last"),
        Chain(tuple(reversed(written.recipes))),
    ):
        assert chain_of(same) == written


def test_options_are_read_and_written_back():
    chain = chain_of("bf16 + compile(mode='max-autotune', freezing=False)")
    assert chain.recipes[1].mode == "max-autotune"
    assert chain_of(str(chain)) == chain


def test_tolerances_add_up():
    assert chain_of("bf16+compile").tolerance == recipe_class("bf16").tolerance + recipe_class("compile").tolerance


@pytest.mark.parametrize(
    ("spec", "error", "said"),
    [
        ("bf17", UnknownRecipeError, "'bf16'"),
        ("complie", UnknownRecipeError, "'compile'"),
        ("compile(mod='x')", UnknownRecipeError, "'mode'"),
        ("bf16(level=2)", UnknownRecipeError, "no options"),
        ("compile(mode='fast')", InvalidInputError, "max-autotune"),
        ("half(dtype='int8')", InvalidInputError, "bfloat16"),
        ("bf16+fp16", ChainError, "both set the precision"),
        ("bf16+bf16", ChainError, "stands twice"),
        ("auto+compile", ChainError, "stands alone"),
        ("bf16 compile", InvalidInputError, "joined by '+'"),
        ("bf16-compile", InvalidInputError, "joined by '+'"),
        ("compile('max-autotune')", InvalidInputError, "keywords"),
        ("compile(mode=mode)", InvalidInputError, "keywords"),
        ("", InvalidInputError, "cannot be read"),
        (3, InvalidInputError, "int"),
        ([None], InvalidInputError, "NoneType"),
    ],
)
def test_what_cannot_be_a_recipe_is_refused_with_a_hint(spec, error, said):
    with pytest.raises(error) as raised:
        chain_of(spec)
    assert said in str(raised.value)


def test_a_recipe_of_ones_own_needs_no_registration():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class SomethingElse(Recipe):
        stage = Stage.KERNELS

    assert str(chain_of(["compile", SomethingElse()])) == "something_else+compile"


def test_a_broken_recipe_file_hurts_no_other(tmp_path):
    """The folder with one broken file more, as a package of its own in a fresh interpreter."""
    code = f"""
import pathlib, sys, perfkit.recipes
broken = pathlib.Path({str(tmp_path)!r}) / "broken.py"
broken.write_text("import a_module_that_does_not_exist")
perfkit.recipes.__path__.append({str(tmp_path)!r})
import perfkit._recipe as recipe
names = recipe.names
recipe.names = lambda: (*names(), "broken")
found = {{info.name: info for info in recipe.catalog()}}
assert "a_module_that_does_not_exist" in found["broken"].summary
assert found["bf16"].frameworks == ("torch", "jax")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
