"""Recipes found by file name: in `recipes/`, and in the folders that the environment variable PERFKIT_RECIPES names."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from perfkit._errors import InvalidInputError, UnknownRecipeError, nearest
from perfkit._recipe import PACKAGE, Recipe, Stage, supports


def names() -> tuple[str, ...]:
    """The names of all recipes, from the files in `recipes/` and in the folders that PERFKIT_RECIPES names.

    Nothing is imported but the empty package.

    Raises:
        InvalidInputError: PERFKIT_RECIPES names what is no folder, or a file there is called as another recipe is.
    """
    found: dict[str, Path] = {}
    for folder in map(Path, importlib.import_module(PACKAGE).__path__):
        if not folder.is_dir():
            raise InvalidInputError(f"PERFKIT_RECIPES names {str(folder)!r}, which is no folder")
        for path in folder.glob("*.py"):
            if path.stem.startswith("_"):
                continue
            if path.stem in found:
                raise InvalidInputError(f"{path} is called as {found[path.stem]} is: give your recipe another name")
            found[path.stem] = path
    return tuple(sorted(found))


@cache
def recipe_class(name: str) -> type[Recipe]:
    """The recipe of that name, imported at first use.

    Raises:
        UnknownRecipeError: there is no such file.
        InvalidInputError: the file holds no recipe.
    """
    if name not in names():
        raise UnknownRecipeError(f"no recipe is called {name!r}; {nearest(name, [*names(), 'auto'])}")
    module = importlib.import_module(f"{PACKAGE}.{name}")
    kind = getattr(module, "RECIPE", None)
    if not (isinstance(kind, type) and issubclass(kind, Recipe)):
        raise InvalidInputError(
            f"{module.__file__} sets RECIPE to {kind!r}: expected a class derived from perfkit.Recipe, "
            "as its last line 'RECIPE = YourClass'"
        )
    if "__dataclass_fields__" not in vars(kind) or not isinstance(getattr(kind, "stage", None), Stage):
        raise InvalidInputError(
            f"{kind.__name__} in {module.__file__} is no recipe yet: write @dataclass(frozen=True, kw_only=True) above "
            "it, and in it 'stage = Stage.…', its place in a chain"
        )
    return kind


@dataclass(frozen=True)
class RecipeInfo:
    """What is known of a recipe without a model.

    Args:
        summary: the first line of its documentation, or why its file cannot be imported.
        options: its options and their defaults.
    """

    name: str
    summary: str
    stage: str
    frameworks: tuple[str, ...]
    options: dict[str, Any]


def catalog() -> tuple[RecipeInfo, ...]:
    """Every recipe there is, by name. A file that cannot be imported is listed with the reason and hurts no other."""
    return tuple(map(_info, names()))


def _info(name: str) -> RecipeInfo:
    try:
        kind = recipe_class(name)
    except Exception as error:
        return RecipeInfo(name, f"cannot be imported: {type(error).__name__}: {error}", "", (), {})
    options = {item.name: item.default for item in dataclasses.fields(kind)}
    frameworks = tuple(framework for framework in ("torch", "jax") if supports(kind, framework))
    return RecipeInfo(name, inspect.getdoc(kind).splitlines()[0], kind.stage.name, frameworks, options)
