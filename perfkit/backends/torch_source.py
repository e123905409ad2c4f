"""A forward's source as a tree, and a changed tree as a function in its place.

A function is read only where compiling its source as it is gives the code that runs.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Iterator
from typing import Any

FUTURE = 0x1FF0000
"""The bits of a code object's flags that `from __future__ import` sets."""

_OUTER = "_perfkit_outer"


class Unreadable(Exception):
    """Why a function cannot be rewritten."""


def source(function: Any) -> tuple[ast.FunctionDef, list[ast.stmt]]:
    """The function's source as a tree, with the line numbers of its file, and the imports of that file.

    Python compiles a call of what is imported in the same file in another way than one of what is not.

    Raises:
        Unreadable: it is no plain function, or its source is not there or is not what runs.
    """
    if not isinstance(function, types.FunctionType):
        raise Unreadable("its forward is no plain function")
    try:
        lines, start = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines))).body[0]
        file = ast.parse("".join(inspect.findsource(function)[0]))
    except (OSError, TypeError, SyntaxError, IndexError) as error:
        raise Unreadable(f"the source of its forward cannot be read ({type(error).__name__})") from error
    if not isinstance(tree, ast.FunctionDef) or tree.decorator_list:
        raise Unreadable("its forward is decorated, asynchronous or no plain function")
    ast.increment_lineno(tree, start - 1)
    if any(isinstance(node, (ast.NamedExpr, ast.Yield, ast.YieldFrom, ast.Await)) for node in ast.walk(tree)):
        raise Unreadable("its forward assigns inside of expressions, or is a generator")
    for argument in arguments(tree):
        argument.annotation = None
    tree.returns = None
    tree.args.defaults = [ast.Constant(None) for _ in tree.args.defaults]  # the function's own are put back
    tree.args.kw_defaults = [default and ast.Constant(None) for default in tree.args.kw_defaults]
    imports = list(_imports(file.body))
    if not _same(_compiled(tree, imports, function), function.__code__):
        raise Unreadable("the source of its forward is not the code that runs")
    return tree, imports


def _imports(statements: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The imports outside of classes and functions."""
    for statement in statements:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            if getattr(statement, "module", None) != "__future__":
                yield statement
        elif not isinstance(statement, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            for field in ("body", "orelse", "finalbody", "handlers"):
                yield from _imports(getattr(statement, field, []))


def arguments(tree: ast.FunctionDef) -> list[ast.arg]:
    """All parameters, the first one first."""
    given = tree.args
    return [*filter(None, (*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg))]


def remade(
    function: types.FunctionType, tree: ast.FunctionDef, imports: list[ast.stmt], free: dict[str, Any]
) -> types.FunctionType:
    """The function that a changed tree of its source makes, with its own variables and defaults, and `free` beside."""
    code = _compiled(tree, imports, function, tuple(free))
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    cells |= {name: types.CellType(value) for name, value in free.items()}
    closure = tuple(cells[name] for name in code.co_freevars)
    new = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    new.__kwdefaults__ = function.__kwdefaults__
    return new


def _compiled(
    tree: ast.FunctionDef, imports: list[ast.stmt], function: types.FunctionType, names: tuple[str, ...] = ()
) -> types.CodeType:
    """The code of the function, with its own free variables and those in `names`."""
    free = [ast.arg(name) for name in (*function.__code__.co_freevars, *names)]
    empty: dict[str, Any] = {"posonlyargs": [], "kwonlyargs": [], "kw_defaults": [], "defaults": []}
    outer = ast.FunctionDef(_OUTER, ast.arguments(args=free, **empty), [tree], [])
    if "type_params" in ast.FunctionDef._fields:
        outer.type_params = []
    module = ast.fix_missing_locations(ast.Module([*imports, ast.copy_location(outer, tree)], []))
    flags = function.__code__.co_flags & FUTURE
    code = compile(module, function.__code__.co_filename, "exec", flags=flags, dont_inherit=True)
    return _inner(_inner(code, _OUTER), tree.name)


def _inner(code: types.CodeType, name: str) -> types.CodeType:
    return next(part for part in code.co_consts if isinstance(part, types.CodeType) and part.co_name == name)


def _same(one: Any, other: Any) -> bool:
    """Whether two code objects compute the same; of other constants whether they are equal."""
    if not isinstance(one, types.CodeType):
        return type(one) is type(other) and repr(one) == repr(other)
    if not isinstance(other, types.CodeType):
        return False
    return all(
        getattr(one, field) == getattr(other, field)
        for field in ("co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_argcount")
    ) and all(map(_same, one.co_consts, other.co_consts)) and len(one.co_consts) == len(other.co_consts)  # fmt: skip
