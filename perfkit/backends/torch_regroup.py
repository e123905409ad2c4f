"""A module's forward with the calls that follow a layer handed over as one group, everything else as written.

    x = self.pool(F.relu(self.conv(x)))      becomes      x = group((self.pool, F.relu, self.conv), x)

`group` may run the calls as they stand or together: the value in between is nobody else's. That holds for calls
written inside of each other, and for statements that follow each other where the second one is the last to read the
variable. The rest of the function stays Python, so branches, loops and attributes go on meaning what they mean; which
functions can be read at all, `torch_source.py` says.
"""

from __future__ import annotations

import ast
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from perfkit.backends.torch_source import arguments, remade, source
from perfkit.backends.torch_spellings import BY_NAME, CALLS, METHODS, Spelled, last_of, unpacked

_GROUP = "_perfkit_group"
_MODULE = types.ModuleType


def regrouped(
    owner: nn.Module, function: Any, first: Callable[[Any], bool], later: Callable[[Any], bool], group: Callable
) -> tuple[types.FunctionType, list[Any]] | None:
    """The forward of `owner` with its groups handed to `group(links, x)`; None where it has none.

    Args:
        owner: the module whose submodules the function calls.
        function: its forward.
        first: whether something that the function calls ("self.conv", "self.convs[0]") may begin a group. The variables
            of its for loops always may: what they are shows when it runs.
        later: the same for what may go on with one ("self.pool", "F.relu").
        group: called with the links, outermost first, and the first one's argument. A link is a callable, or a tuple
            (callable, arguments beside the first, keywords).

    Returns:
        The function, and the submodules that its groups begin with, as far as that can be told.

    Raises:
        Unreadable: its source is not there, or is not what runs.
    """
    tree, imports = source(function)

    def find(path: ast.expr) -> Any:
        return _found(path, tree, owner, function.__globals__)

    def leads(path: ast.expr, to: Callable[[Any], bool]) -> bool:
        found = find(path)
        return found is not None and to(found)

    tree = Spelled().visit(tree)
    finder = _Groups(tree, find, lambda path: leads(path, first), lambda path: leads(path, later))
    tree = finder.visit(tree)
    if not finder.found:
        return None
    new = remade(function, tree, imports, {_GROUP: group, **BY_NAME})
    begun = list(map(find, finder.found))
    return new, [each for each in begun if isinstance(each, nn.Module)]


def _found(path: ast.expr, tree: ast.FunctionDef, owner: nn.Module, names: dict[str, Any]) -> Any:
    """The submodule, or the function of an imported module, that a path in the function leads to; None for others."""
    if isinstance(path, ast.Name):
        parameters = [*tree.args.posonlyargs, *tree.args.args]
        return owner if parameters and path.id == parameters[0].arg else names.get(path.id)
    assert isinstance(path, (ast.Attribute, ast.Subscript)), "see _Groups._leads"
    held = _found(path.value, tree, owner, names)
    if isinstance(path, ast.Attribute):
        inside = held._modules if isinstance(held, nn.Module) else vars(held) if isinstance(held, _MODULE) else {}
        return inside.get(path.attr)
    index = path.slice.value if isinstance(path.slice, ast.Constant) else None
    if isinstance(held, (nn.ModuleList, nn.Sequential)) and isinstance(index, int) and index < len(held):
        return held[index]
    return held[index] if isinstance(held, nn.ModuleDict) and index in held else None


class _Groups(ast.NodeTransformer):
    """Finds the groups of one function and replaces them."""

    def __init__(
        self,
        tree: ast.FunctionDef,
        find: Callable[[ast.expr], Any],
        first: Callable[[ast.expr], bool],
        later: Callable[[ast.expr], bool],
    ):
        self.find, self.first, self.later = find, first, later
        self.found: list[ast.expr] = []
        nodes = list(ast.walk(tree))
        names = [node for node in nodes if isinstance(node, ast.Name)]
        added = {id(node.target) for node in nodes if isinstance(node, ast.AugAssign)}  # read, and written
        self.loads = [node for node in names if isinstance(node.ctx, ast.Load) or id(node) in added]
        self.stored = {node.id for node in names if isinstance(node.ctx, ast.Store)}
        self.in_loops = 0
        self.looped = {
            name.id for node in nodes if isinstance(node, (ast.For, ast.comprehension))
            for name in ast.walk(node.target) if isinstance(name, ast.Name)
        }  # fmt: skip
        # Where more than one way leads on from a statement, or a function sees the variables, statements stay apart.
        apart = (ast.Try, ast.With, ast.FunctionDef, ast.Lambda, ast.GeneratorExp, ast.Delete, ast.Global, ast.Nonlocal)
        calls = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
        self.joins = not any(isinstance(node, apart) for node in nodes if node is not tree)
        self.joins &= not calls & {"locals", "vars", "eval", "exec", "dir"}
        self.local = {*self.stored, *(argument.arg for argument in arguments(tree)[1:])}

    def generic_visit(self, node: ast.AST) -> ast.AST:
        looping = isinstance(node, (ast.For, ast.While))
        self.in_loops += looping
        for field in ("body", "orelse"):
            if self.joins and isinstance(statements := getattr(node, field, None), list):
                setattr(node, field, self._joined(statements))
        node = super().generic_visit(node)
        self.in_loops -= looping
        return node

    def _joined(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        """The statements, where one only goes on with what the one before began, as one."""
        kept: list[ast.stmt] = []
        for statement in statements:
            if kept and (joined := self._join(kept[-1], statement)):
                kept[-1] = joined
            else:
                kept.append(statement)
        return kept

    def _join(self, one: ast.stmt, other: ast.stmt) -> ast.stmt | None:
        if not (isinstance(one, ast.Assign) and isinstance(other, (ast.Assign, ast.Return)) and other.value):
            return None
        if len(one.targets) != 1 or not self._begun(one.value):
            return None
        names = unpacked(one.targets[0])
        held, links = other.value, 0
        while (inner := self._inside(held)) is not None:
            last, held, links = held, inner, links + 1
        read = held
        while isinstance(read, ast.Subscript):
            read = read.value
        if not isinstance(read, ast.Name) or read.id not in names:
            return None
        whole = read is held and not names[read.id]
        goes_on = one.value if whole else last_of(one.value, names[read.id], read, held)
        if goes_on is None or (whole and not links):
            return None
        if sum(isinstance(node, ast.Name) and node.id in names for node in ast.walk(other.value)) != 1:
            return None
        if not all(self._gone(name, other) for name in names):
            return None
        if not links:
            other.value = goes_on
        elif isinstance(last.func, ast.Attribute) and last.func.value is held:
            last.func.value = goes_on
        else:
            last.args[0] = goes_on
        return other

    def _gone(self, name: str, statement: ast.Assign | ast.Return) -> bool:
        """Whether a statement is the last one to read what a variable is before it."""
        again = isinstance(statement, ast.Assign) and ast.dump(statement.targets[0]) == ast.dump(_stored(name))
        return again or isinstance(statement, ast.Return) or self._dead(name, statement)

    def _dead(self, name: str, statement: ast.stmt) -> bool:
        """Whether nothing that may run after a statement reads a variable. Of loops that is not known."""
        ends = statement.end_lineno, statement.end_col_offset
        others = [load for load in self.loads if load.id == name and (load.lineno, load.col_offset) > ends]
        return not others and not self.in_loops

    def _begun(self, node: ast.expr) -> bool:
        """Whether this is a group, or the call that begins one."""
        while not self._starts(node):
            node = self._inside(node)
            if node is None:
                return False
        return True

    def _starts(self, node: ast.expr | None) -> bool:
        if not (isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords):
            return False
        return not isinstance(node.args[0], ast.Starred) and self._leads(node.func, self.first)

    def _inside(self, node: ast.expr) -> ast.expr | None:
        """What a call that may go on with a group is called on; None where it is no such call."""
        if not isinstance(node, ast.Call):
            return None
        if not all(map(_plain, (*node.args[1:], *(keyword.value for keyword in node.keywords)))):
            return None
        if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS and not node.args and not node.keywords:
            return node.func.value
        if isinstance(node.func, ast.Name) and node.func.id in CALLS:
            return node.args[0]
        if not node.args or isinstance(node.args[0], ast.Starred) or not self._leads(node.func, self.later):
            return None
        return node.args[0] if all(keyword.arg for keyword in node.keywords) else None

    def _leads(self, node: ast.expr, to: Callable[[ast.expr], bool]) -> bool:
        root = node
        while isinstance(root, (ast.Attribute, ast.Subscript)):
            root = root.value
        if not isinstance(root, ast.Name):
            return False
        if root is node and root.id in self.looped:
            return True  # what it is shows when it runs
        return root.id not in self.local and to(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        calls, held = [], node
        while held is not None:
            calls.append(held)
            held = self._inside(held)
        starts = [at for at, call in enumerate(calls) if at and self._starts(call)]
        if not starts:
            return self.generic_visit(node)
        first = calls[starts[-1]]
        self.found.append(first.func)
        links = [*map(self._link, calls[: starts[-1]]), self._path(first.func)]
        called = ast.Call(_name(_GROUP), [ast.Tuple(links, ast.Load()), self.visit(first.args[0])], [])
        return ast.copy_location(called, first)

    def _link(self, node: ast.Call) -> ast.expr:
        if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS and not node.args:
            return _name(f"_perfkit_{node.func.attr}")
        if len(node.args) == 1 and not node.keywords:
            return self._path(node.func)
        keywords = ast.Dict([ast.Constant(item.arg) for item in node.keywords], [item.value for item in node.keywords])
        return ast.Tuple([self._path(node.func), ast.Tuple(node.args[1:], ast.Load()), keywords], ast.Load())

    def _path(self, node: ast.expr) -> ast.expr:
        """The same submodule from where its module has it: nn.Module.__getattr__ looks there for half a microsecond.

        `self._modules.get("conv") or self.conv`: what was taken out since is what the module says it is.
        """
        if not isinstance(node, ast.Attribute):
            return node
        held, attribute = self.find(node.value), node.attr
        if not isinstance(held, nn.Module) or getattr(held, attribute, held) is not held._modules.get(attribute):
            return node
        owner = self._path(node.value)
        get = ast.Attribute(ast.Attribute(owner, "_modules", ast.Load()), "get", ast.Load())
        return ast.BoolOp(
            ast.Or(), [ast.Call(get, [ast.Constant(attribute)], []), ast.Attribute(owner, attribute, ast.Load())]
        )


def _name(name: str) -> ast.Name:
    return ast.Name(name, ast.Load())


def _stored(name: str) -> ast.Name:
    return ast.Name(name, ast.Store())


def _plain(node: ast.expr) -> bool:
    """An expression that gives the same whenever it is evaluated: numbers, names, attributes, and tuples of them."""
    if isinstance(node, (ast.Tuple, ast.List)):
        return all(map(_plain, node.elts))
    if isinstance(node, ast.UnaryOp):
        return _plain(node.operand)
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, (ast.Constant, ast.Name))
