"""Chains of recipes: "bf16+compile" read, put in order, and asked whether it fits a model."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from perfkit._errors import ChainError, InvalidInputError, UnknownRecipeError, UnsupportedError, nearest
from perfkit._recipe import Recipe, refusal
from perfkit._recipe_files import recipe_class

if TYPE_CHECKING:
    from perfkit._workload import Workload

NOTHING = "nothing"
"""How a chain without recipes is written."""


@dataclass(frozen=True)
class Chain:
    """Recipes in the order in which they are applied."""

    recipes: tuple[Recipe, ...]

    def __post_init__(self):
        _check_exclusive(self.recipes)
        object.__setattr__(self, "recipes", tuple(sorted(self.recipes, key=lambda recipe: recipe.stage)))

    def __str__(self) -> str:
        return "+".join(map(str, self.recipes)) or NOTHING

    def __iter__(self):
        return iter(self.recipes)

    def __len__(self) -> int:
        return len(self.recipes)

    def __or__(self, other: Any) -> Chain:
        return chain_of([*self, other])

    def __ror__(self, other: Any) -> Chain:
        return chain_of([other, *self])

    @property
    def tolerance(self) -> float:
        """The relative error that the steps together may add."""
        return sum(recipe.tolerance for recipe in self.recipes)

    @property
    def aim(self) -> str:
        """ "memory" where one of the recipes is for it, else "speed"."""
        return "memory" if any(recipe.aim == "memory" for recipe in self.recipes) else "speed"


def chain_of(spec: str | Recipe | Chain | Iterable) -> Chain:
    """Read what a caller may pass as `recipe=`.

    Args:
        spec: `"channels_last+bf16+compile(mode='max-autotune')"` (`|` works as `+` does), a recipe, a chain, or an
            iterable of those.

    Raises:
        UnknownRecipeError: no such recipe or option; names the nearest.
        ChainError: the recipes exclude each other.
        InvalidInputError: not a recipe at all.
    """
    return Chain(tuple(_flat(spec)))


def check(chain: Chain, work: Workload) -> None:
    """Ask every step before anything runs, and raise all refusals together.

    Raises:
        UnsupportedError: one line a refusal.
    """
    refusals = {str(recipe): reason for recipe in chain if (reason := refusal(recipe, work))}
    if refusals:
        raise UnsupportedError("\n".join(f"recipe {recipe!r} is refused: {why}" for recipe, why in refusals.items()))


def _check_exclusive(recipes: tuple[Recipe, ...]) -> None:
    seen: dict[str, Recipe] = {}
    for recipe in recipes:
        for claim in filter(None, (recipe.name, recipe.provides)):
            other = seen.setdefault(claim, recipe)
            if other is recipe:
                continue
            clash = (
                "stands twice in the chain" if other.name == recipe.name else f"and {other.name!r} both set the {claim}"
            )
            raise ChainError(f"recipe {recipe.name!r} {clash}: keep one of {str(other)!r}, {str(recipe)!r}")


def _flat(spec: Any) -> Iterable[Recipe]:
    if isinstance(spec, Recipe):
        yield spec
    elif isinstance(spec, str):
        yield from _parsed(spec)
    elif isinstance(spec, type) and issubclass(spec, Recipe):
        yield spec()
    elif isinstance(spec, Iterable):
        for item in spec:
            yield from _flat(item)
    else:
        raise InvalidInputError(
            f"recipe={spec!r} is a {type(spec).__name__}: "
            "pass a name such as 'bf16+compile', a recipe, or a list of them"
        )


def _parsed(text: str) -> Iterable[Recipe]:
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise InvalidInputError(_unreadable(text)) from error
    yield from _from_ast(tree, text)


def _from_ast(node: ast.expr, text: str) -> Iterable[Recipe]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.BitOr)):
        yield from _from_ast(node.left, text)
        yield from _from_ast(node.right, text)
    elif isinstance(node, ast.Name):
        if node.id != NOTHING:
            yield _made(node.id)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        try:
            options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
            values = tuple(map(ast.literal_eval, node.args))
        except ValueError as error:
            raise InvalidInputError(_unreadable(text)) from error
        yield _made(node.func.id, options, values)
    else:
        raise InvalidInputError(_unreadable(text))


def _made(name: str, options: Mapping[str, Any] = MappingProxyType({}), values: tuple = ()) -> Recipe:
    if name == "auto":
        raise ChainError("recipe 'auto' stands alone: it finds the chain itself")
    kind = recipe_class(name)
    known = [item.name for item in dataclasses.fields(kind)]
    if len(values) > len(kind.positional):
        wants = f"options as keywords, such as {known[0]}=…" if known else "no options"
        raise InvalidInputError(f"recipe {name!r} was given {values!r}: it takes {wants}")
    unnamed = dict(zip(kind.positional, values, strict=False))
    if twice := unnamed.keys() & options.keys():
        raise InvalidInputError(f"recipe {name!r} was given {', '.join(twice)} twice")
    options = unnamed | dict(options)
    for option in options:
        if option not in known:
            hint = nearest(option, known) if known else "it has no options"
            raise UnknownRecipeError(f"recipe {name!r} has no option {option!r}; {hint}")
    return kind(**options)


def _unreadable(text: str) -> str:
    return (
        f"recipe={text!r} cannot be read: write names joined by '+', with options as keywords, "
        "such as \"channels_last+bf16+compile(mode='max-autotune')\""
    )
