"""What the pages name exists: functions, recipes and commands, and the options that each is given. Nothing runs."""

import ast
import builtins
import importlib
import inspect
import re
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
from doc_pages import PAGES, ROOT, blocks

from perfkit import cli
from perfkit._chain import chain_of
from perfkit._errors import PerfkitError
from perfkit._recipe_files import names, recipe_class

MISSING = object()


def wrong(page: str) -> list[str]:
    """What a page names that does not exist, in its Python and in the code within its prose."""
    code = [found for block in blocks("python", page) for found in wrong_in_code(block)]
    prose = re.sub(r"^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE)
    return code + [found for span in re.findall(r"`([^`\n]+)`", prose) for found in wrong_in_span(span)]


def wrong_in_code(code: str) -> Iterator[str]:
    tree = ast.parse(code)
    known = dict(imported(tree))
    defined = known.keys() | {name for node in ast.walk(tree) for name in bound_by(node)} | vars(builtins).keys()
    yield from (f"there is no {name} to import" for name, what in known.items() if what is MISSING)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id not in defined:
            yield f"{node.id} is not defined on the page"
        if isinstance(node, ast.Attribute) and resolved(node, known) is MISSING:
            yield f"there is no {ast.unparse(node)}"
        if isinstance(node, ast.Call) and callable(function := resolved(node.func, known)):
            yield from wrong_in_call(node, function)


def imported(tree: ast.AST) -> Iterator[tuple[str, Any]]:
    """Names and what they stand for: perfkit's own modules and members, None for others'."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for item in node.names:
                yield item.asname or item.name, member(node.module, item.name) if ours(node.module) else None
        if isinstance(node, ast.Import):
            for item in node.names:
                top = item.name if item.asname else item.name.partition(".")[0]
                yield item.asname or top, importlib.import_module(top) if ours(top) else None


def ours(module: str) -> bool:
    return module.partition(".")[0] == "perfkit"


def member(owner: str, name: str) -> Any:
    held = importlib.import_module(owner)
    if hasattr(held, name):
        return getattr(held, name)
    return importlib.import_module(f"{owner}.{name}") if find_spec(f"{owner}.{name}") else MISSING


def bound_by(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
        yield node.id
    if isinstance(node, ast.arg):
        yield node.arg
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name


def resolved(node: ast.AST, known: dict[str, Any]) -> Any:
    """What of perfkit's an expression names; None where it is not perfkit's."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = resolved(node.value, known)
        if inspect.ismodule(owner):
            return member(owner.__name__, node.attr)
        return owner and getattr(owner, node.attr, MISSING)
    return None


def wrong_in_call(node: ast.Call, function: Any) -> Iterator[str]:
    parameters = inspect.signature(function).parameters
    if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()):
        for keyword in node.keywords:
            if keyword.arg and keyword.arg not in parameters:
                yield f"{function.__name__} takes no {keyword.arg}="
    given = dict(zip(parameters, node.args, strict=False)) | {keyword.arg: keyword.value for keyword in node.keywords}
    recipe = given.get("recipe")
    if isinstance(recipe, ast.Constant) and recipe.value != "auto":
        yield from wrong_in_chain(recipe.value)


def wrong_in_chain(text: str) -> Iterator[str]:
    try:
        chain_of(text)
    except PerfkitError as error:
        yield str(error)


def wrong_in_span(span: str) -> Iterator[str]:
    if re.fullmatch(r"perfkit [a-z-]+( .*)?", span):
        yield from wrong_in_command(*span.split()[1:])
    elif found := re.match(r"python -m ([\w.]+)", span):
        if find_spec(found[1]) is None:
            yield f"there is no module {found[1]}"
    elif found := re.fullmatch(r"(perfkit(?:\.\w+)+)(?:\((.*)\))?", span):
        function = resolved(ast.parse(found[1], mode="eval").body, {"perfkit": importlib.import_module("perfkit")})
        if function is MISSING:
            yield f"there is no {found[1]}"
        for keyword in re.findall(r"(\w+)=", found[2] or ""):
            if keyword not in inspect.signature(function).parameters:
                yield f"{found[1]} takes no {keyword}="
    elif recipes := called(span):
        for name, options in recipes.items():
            if name not in names():
                yield f"there is no recipe {name}"
            elif unknown := set(options) - {*recipe_class(name).__dataclass_fields__}:
                yield f"recipe {name} has no option {', '.join(unknown)}"


def wrong_in_command(name: str, *arguments: str) -> Iterator[str]:
    if name not in cli.main.commands:
        yield f"there is no command perfkit {name}"
        return
    options = {option for parameter in cli.main.commands[name].params for option in parameter.opts}
    for argument in arguments:
        if argument.startswith("--") and argument not in options:
            yield f"perfkit {name} has no option {argument}"


def called(span: str) -> dict[str, list[str]]:
    """Of what reads as a chain, the recipes with the options they are given; nothing where no recipe is in it."""
    try:
        tree = ast.parse(span, mode="eval").body
    except SyntaxError:
        return {}
    found, parts = {}, [tree]
    while parts:
        part = parts.pop()
        if isinstance(part, ast.BinOp) and isinstance(part.op, ast.Add):
            parts += [part.left, part.right]
        elif isinstance(part, ast.Call) and isinstance(part.func, ast.Name):
            found[part.func.id] = [keyword.arg for keyword in part.keywords]
        elif isinstance(part, ast.Name):
            found[part.id] = []
        else:
            return {}
    return found if found.keys() & {*names()} else {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page):
    assert wrong(page.read_text()) == []


@pytest.mark.parametrize(
    ("page", "told"),
    [
        ("```python\nimport perfkit\nperfkit.optimise(1)\n```\n", "there is no perfkit.optimise"),
        ("```python\nimport perfkit\nperfkit.optimize(None, budget=1)\n```\n", "optimize takes no budget="),
        ("```python\nimport perfkit\nperfkit.optimize(None, 'bf61')\n```\n", "no recipe is called 'bf61'"),
        ("```python\nimport perfkit\nperfkit.plan(model)\n```\n", "model is not defined on the page"),
        ("```python\nfrom perfkit.profiling import stops\nstops()\n```\n", "there is no stops to import"),
        ("Take `prune(amonut=0.5)+compile`.", "recipe prune has no option amonut"),
        ("Take `bf16+complie`.", "there is no recipe complie"),
        ("Call `perfkit.plan(model, recipes=…)`.", "perfkit.plan takes no recipes="),
        ("Call `perfkit.profile_all`.", "there is no perfkit.profile_all"),
        ("Start `perfkit tarin lstm`.", "there is no command perfkit tarin"),
        ("Start `perfkit plan lstm --device 2`.", "perfkit plan has no option --device"),
        ("Start `python -m bench.nothing`.", "there is no module bench.nothing"),
    ],
)
def test_what_does_not_exist_is_found(page, told):
    assert [told in found for found in wrong(page)] == [True]
