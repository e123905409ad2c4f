"""What forwards write between their layers that is no call of a function or module, as callables that a group can hold.

x.relu()    x.view(x.size(0), -1)    y, _ = self.rnn(x); y[-1]
"""

from __future__ import annotations

import ast
from typing import Any


class Method:
    """A call of a method, as a callable of the object: `Method("relu")(x)` is `x.relu()`."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(x, self.name)(*args, **kwargs)


class Rows:
    """Images as rows: `Rows("view")(x)` is `x.view(x.size(0), -1)`, `Rows("flatten")(x)` is `x.flatten(1)`."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, x: Any) -> Any:
        return x.flatten(1) if self.name == "flatten" else getattr(x, self.name)(x.size(0), -1)


class Last:
    """The last step of what a recurrent layer returns: `Last("output", 0, -1)(found)` is `found[0][-1]`.

    Args:
        reads: "output" with time first, "batch-first output", or the last layer's "state" or "LSTM state".
        path: the indices, one after the other.
    """

    def __init__(self, reads: str, *path: Any):
        self.reads, self.path = reads, path

    def __call__(self, found: Any) -> Any:
        for at in self.path:
            found = found[at]
        return found


METHODS = {name: Method(name) for name in ("relu", "relu_")}
ROWS = {f"_perfkit_rows_{name}": Rows(name) for name in ("view", "reshape", "flatten")}
_LASTS = {
    "[0][-1]": Last("output", 0, -1),
    "[0][:, -1]": Last("batch-first output", 0, (slice(None), -1)),
    "[0][:, -1, :]": Last("batch-first output", 0, (slice(None), -1, slice(None))),
    "[1][-1]": Last("state", 1, -1),
    "[1][0][-1]": Last("LSTM state", 1, 0, -1),
}
_NAMES = {written: f"_perfkit_last_{number}" for number, written in enumerate(_LASTS)}

CALLS = ROWS | {_NAMES[written]: last for written, last in _LASTS.items()}
"""By the names of the functions that `Spelled` and `last_of` write calls of."""
BY_NAME = CALLS | {f"_perfkit_{name}": method for name, method in METHODS.items()}


class Spelled(ast.NodeTransformer):
    """Turns what makes rows of a variable's images, and what is read of a call's last step, into calls of `CALLS`."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if not (isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name)) or node.keywords:
            return node
        x, name, given = node.func.value, node.func.attr, [ast.unparse(argument) for argument in node.args]
        sizes = [[f"{x.id}.{size}", "-1"] for size in ("size(0)", "shape[0]")]
        if given not in ({"view": sizes, "reshape": sizes, "flatten": [["1"]]}.get(name, ())):
            return node
        return _called(f"_perfkit_rows_{name}", x, node)

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        self.generic_visit(node)
        held: ast.expr = node
        while isinstance(held, ast.Subscript):
            held = held.value
        reads = isinstance(held, ast.Call) and isinstance(node.ctx, ast.Load)
        return (last_of(held, "", held, node) or node) if reads else node


def unpacked(target: ast.expr, part: str = "") -> dict[str, str]:
    """The variables that are assigned to at once, and the part of the value that each is, as it is written.

    Empty where something else is assigned to.
    """
    if isinstance(target, ast.Name):
        return {target.id: part}
    if not isinstance(target, ast.Tuple):
        return {}
    found = [unpacked(each, f"{part}[{number}]") for number, each in enumerate(target.elts)]
    return {name: where for names in found for name, where in names.items()} if all(found) else {}


def last_of(call: ast.expr, part: str, held: ast.expr, node: ast.expr) -> ast.Call | None:
    """The last step of a call's value: `node` indexes `held`, which is that part of it; None for other indices."""
    written = part + ast.unparse(node).removeprefix(ast.unparse(held))
    return _called(_NAMES[written], call, node) if written in _NAMES else None


def _called(name: str, argument: ast.expr, node: ast.expr) -> ast.Call:
    return ast.copy_location(ast.Call(ast.Name(name, ast.Load()), [argument], []), node)
