"""Recipes: documented steps whose fields are their options, found by file name and composed into chains.

A recipe is one file in `recipes/`; its file name is its name. The file holds one frozen dataclass, `RECIPE`, that may
define

    torch(work) -> (Workload, Effect)    what it does to a PyTorch model; without it, PyTorch is not supported
    jax(work) -> (Workload, Effect)      the same for JAX
    refusal(work) -> str | None          why it cannot work on this model; None where it can
    unavailable(framework, device)       why it cannot run on this machine; None where it can
    unprofitable(framework, device)      why it can hardly pay on this machine; None where it may
    observed(effect, log)                the Effect, completed from what was compiled on the first call
    unsought(work) -> str | None         why recipe="auto" leaves it out; None where it may be tried
    judged_at(steps) -> Sequence[int]    of so many training steps those whose losses can be compared with the
                                         original's, where it trains another way by design: it is judged by how far it
                                         comes
    variants(work) -> tuple[Recipe]      the option settings that recipe="auto" should try

and nothing about other recipes: `stage` orders a chain, and two recipes that `provide` the same thing exclude each
other. A recipe may change the model it is given: the pipeline hands it a copy.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import importlib
import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from perfkit._errors import ChainError, InvalidInputError, UnknownRecipeError, UnsupportedError, nearest
from perfkit._selection import patterns, selected

if TYPE_CHECKING:
    from perfkit._workload import Workload

PACKAGE = "perfkit.recipes"

NOTHING = "nothing"
"""How a chain without recipes is written."""


class Stage(enum.IntEnum):
    """The order of a chain."""

    STRUCTURE = 1
    PRECISION = 2
    QUANTIZATION = 3
    KERNELS = 4
    MEMORY = 5
    COMPILE = 6
    PIPELINE = 7
    TENSOR = 8
    DATA = 9


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Base of every recipe; its fields are its options.

    Class attributes:
        stage: where in a chain it stands.
        provides: what at most one recipe of a chain may provide, e.g. "precision"; None for no such claim.
        tolerance: relative error of the outputs that it may add, unitless.
        positional: the options that may be given without their names: "data_parallel(2)".
        retrains: its training starts from another loss than the original's, and is judged by where it ends.
        aim: what it is for, "speed" or "memory". Where it is memory, more time is its price and no failure.
    """

    stage: ClassVar[Stage]
    provides: ClassVar[str | None] = None
    tolerance: ClassVar[float] = 0.0
    positional: ClassVar[tuple[str, ...]] = ()
    retrains: ClassVar[bool] = False
    aim: ClassVar[str] = "speed"

    @property
    def name(self) -> str:
        """The file's name for a recipe in `recipes/`; elsewhere the class's name in snake case."""
        package, _, module = type(self).__module__.rpartition(".")
        if package == PACKAGE:
            return module
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()

    def __str__(self) -> str:
        options = [
            f"{item.name}={getattr(self, item.name)!r}"
            for item in dataclasses.fields(self)
            if getattr(self, item.name) != item.default
        ]
        return f"{self.name}({', '.join(options)})" if options else self.name

    def __or__(self, other: Any) -> Chain:
        return chain_of([self, other])

    def __ror__(self, other: Any) -> Chain:
        return chain_of([other, self])


@dataclass(frozen=True, kw_only=True)
class LayerRecipe(Recipe):
    """Base of the recipes that work on a model layer by layer, and can leave layers alone.

    Class attributes:
        gives_back: where the result's numbers are too far off, the pipeline adds the most sensitive layers to `exclude`
            until they hold. The names in the effect's `touched` are those that `exclude` understands.

    Args:
        include: names or shell patterns of the layers to work on ("encoder.*"); all where empty.
        exclude: names or shell patterns of the layers to leave alone.
    """

    gives_back: ClassVar[bool] = False

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self):
        for option in ("include", "exclude"):
            object.__setattr__(self, option, patterns(getattr(self, option), f"{self.name}({option}"))

    def selected(self, names: Iterable[str]) -> set[str]:
        """Those of the model's layers that this recipe shall work on.

        Raises:
            InvalidInputError: a pattern matches none of them.
        """
        return selected(names, self.include, self.exclude, self.name)


@dataclass(frozen=True, kw_only=True)
class ParallelRecipe(Recipe):
    """Base of the recipes that spread a model over several processes or devices; see `perfkit.parallel`.

    Every process calls `optimize` with the same arguments. What it returns on each is that one's part.

    Class attributes:
        axis: the axis of the mesh that it takes: "pipeline", "data" or "tensor".

    Args:
        size: how many devices along the axis; None for all that the chain's other recipes leave.
    """

    positional = ("size",)
    axis: ClassVar[str]

    size: int | None = None

    def __post_init__(self):
        if self.size is not None and not (isinstance(self.size, int) and self.size >= 1):
            raise InvalidInputError(f"{self.name}(size={self.size!r}): expected a number of devices, or None")

    def refusal(self, work: Workload) -> str | None:
        if work.layout is None:
            more = "" if work.framework == "torch" else ", or with several devices (XLA_FLAGS=…device_count=2 on CPU)"
            return (
                f"there is one process with one device here: start several, 'perfkit launch --nproc 2 script.py'{more}"
            )
        return None

    def unsought(self, work: Workload) -> str:
        return "it takes several processes: choose it by name, and start them with 'perfkit launch'"


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


def supports(recipe: Recipe | type[Recipe], framework: str) -> bool:
    return hasattr(recipe, framework)


def ask(recipe: Recipe, question: str, *args: Any) -> Any:
    """The answer of one of a recipe's optional methods; None where it has no such method."""
    method = getattr(recipe, question, None)
    return method(*args) if method else None


def refusal(recipe: Recipe, work: Workload) -> str | None:
    """Why `recipe` cannot be applied to `work`; None where it can."""
    if not supports(recipe, work.framework):
        return f"it is not there for {work.framework}"
    return ask(recipe, "unavailable", work.framework, work.device) or ask(recipe, "refusal", work)


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
