"""Chains: read from text, put in order, refused."""

import pytest

from perfkit import ChainError, InvalidInputError, UnknownRecipeError
from perfkit._chain import Chain, chain_of
from perfkit._recipe_files import recipe_class


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
