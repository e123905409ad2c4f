"""A traced torch model cut into stages: where it can be, what its operations cost, and the stages as modules."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from perfkit.backends.torch_copies import copied
from perfkit.backends.torch_surgery import map_tensors, tensors_in, wrapped
from perfkit.parallel.balance import Costs, spans

REPEATS = 3
BESIDES_GRADIENT = 2
"""What an optimizer such as Adam keeps of each weight."""


IN_PLACE = {name for name in vars(operator) if name.startswith("i") and f"__{name}__" in vars(operator)} | {"setitem"}
"""The names of operators such as +=."""


@dataclass(frozen=True)
class Operations:
    """What a model calls, in order.

    Args:
        graph: of one call.
        model: whose call that is.
        inputs: example tensors by the names of the placeholders; of one micro-batch.
        wraps: what `around_forward` put around the model, and what goes around each of its stages.
    """

    graph: fx.Graph
    model: nn.Module
    inputs: Mapping[str, torch.Tensor]
    wraps: tuple[Callable[[Callable], Callable], ...] = ()

    @cached_property
    def nodes(self) -> tuple[fx.Node, ...]:
        """Those that compute something."""
        return tuple(node for node in self.graph.nodes if node.op not in ("placeholder", "get_attr", "output"))

    @cached_property
    def values(self) -> dict[fx.Node, Any]:
        """What each node gives for the inputs, tensors without their numbers."""
        seen: dict[fx.Node, Any] = {}

        class Looking(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                found = super().run_node(n)
                seen[n] = map_tensors(lambda tensor: torch.empty_like(tensor, device="meta"), found)
                return found

        with torch.no_grad():
            replace(self, model=copied(self.model)).run(Looking, self.inputs.values())
        return seen

    def run(self, interpreter: Callable[[fx.GraphModule], fx.Interpreter], inputs: Iterable[torch.Tensor]) -> None:
        """Run all operations by an interpreter of torch's."""
        module = fx.GraphModule(self.model, self.graph)
        wrapped(lambda module, *args: interpreter(module).run(*args), self.wraps)(module, *inputs)

    @cached_property
    def outputs(self) -> tuple[list[Any], pytree.TreeSpec]:
        """The leaves of what the model returns, and how it holds them."""
        (output,) = (node for node in self.graph.nodes if node.op == "output")
        return pytree.tree_flatten(_plain(output.args[0]), is_leaf=lambda leaf: isinstance(leaf, fx.Node))

    @cached_property
    def anywhere(self) -> set[fx.Node]:
        """Nodes that are no floating-point tensors and depend on the inputs alone: each stage computes them itself."""
        found: set[fx.Node] = set()
        for node in self.graph.nodes:
            known = all(each in found for each in node.all_input_nodes)
            if node.op == "placeholder" or (
                node.op in ("call_function", "call_method") and known and not _is_float(self.values[node])
            ):
                found.add(node)
        return found

    def crossing(self, place: int) -> list[fx.Node]:
        """What is computed before a place and needed behind it."""
        before, behind = self.nodes[:place], set(self.nodes[place:])
        needed = {leaf for leaf in self.outputs[0] if isinstance(leaf, fx.Node)}
        return [node for node in before if node not in self.anywhere and (node in needed or behind & node.users.keys())]

    def tensors(self, node: fx.Node) -> Iterator[torch.Tensor]:
        """The parameters and buffers that a node reads."""
        if node.op == "call_module":
            module = self.model.get_submodule(str(node.target))
            yield from module.parameters()
            yield from module.buffers()
        for other in node.all_input_nodes:
            if other.op == "get_attr":
                owner, _, name = str(other.target).rpartition(".")
                yield getattr(self.model.get_submodule(owner), name)

    def in_place(self, node: fx.Node) -> bool:
        """Whether a node may change what it is given."""
        if node.op == "call_module":
            inside = self.model.get_submodule(str(node.target)).modules()
            return any(getattr(m, "inplace", False) or not type(m).__module__.startswith("torch.nn") for m in inside)
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "_")
        return name.endswith("_") or name in IN_PLACE or bool(node.kwargs.get("inplace")) or True in node.args[1:]

    def places(self) -> tuple[dict[int, int], str]:
        """Where it can be cut, with the bytes that are sent there; and why it cannot be elsewhere."""
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for index, node in enumerate(self.nodes):
            for tensor in self.tensors(node):
                if isinstance(tensor, nn.Parameter):
                    first.setdefault(id(tensor), index)
                    last[id(tensor)] = index
        found, reasons = {}, {}
        for place in range(1, len(self.nodes)):
            crossing = self.crossing(place)
            if any(first[each] < place <= last[each] for each in first):
                reasons["a weight is used on both sides"] = None
            elif not crossing or not all(_is_float(self.values[node]) for node in crossing):
                reasons["what would be sent is no floating-point tensor"] = None
            else:
                found[place] = sum(_bytes(self.values[node]) for node in crossing)
        return found, ", or ".join(reasons)

    def costs(self, trains: bool, synchronize: Callable[[Any], None], in_flight: int) -> Costs:
        """Measured times of the operations on the inputs, forwards and in training backwards; and what they keep.

        Args:
            in_flight: of how many micro-batches a stage keeps the outputs.
        """
        took: dict[fx.Node, float] = {}
        data = {id(tensor) for tensor in self.inputs.values()}
        before = [(parameter, parameter.grad) for parameter in self.model.parameters()]
        with torch.set_grad_enabled(trains):
            self.run(lambda module: Timed(module, took, data, trains, synchronize), self.inputs.values())
        for parameter, gradient in before:
            parameter.grad = gradient
        counted: set[int] = set()
        held = []
        for node in self.nodes:
            own = {id(tensor): tensor for tensor in self.tensors(node) if id(tensor) not in counted}
            counted |= own.keys()
            kept = 1 + (1 + BESIDES_GRADIENT) * trains
            held.append(kept * sum(map(_bytes, own.values())) + in_flight * trains * _bytes(self.values[node]))
        return Costs([took[node] for node in self.nodes], held, self.places()[0])


class Timed(fx.Interpreter):
    """Runs operations one by one and takes their times, each the best of a few.

    Args:
        took: where the times go, s.
        data: identities of the model's inputs, which need no gradients.
        trains: whether backwards are part of it.
        synchronize: waits until the device has done what it was told.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        took: dict[fx.Node, float],
        data: set[int],
        trains: bool,
        synchronize: Callable[[Any], None],
    ):
        super().__init__(module)
        self.took, self.data, self.trains, self.synchronize = took, data, trains, synchronize

    def run_node(self, n: fx.Node) -> Any:
        if n.op in ("placeholder", "get_attr", "output"):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        times = []
        for _ in range(1 + REPEATS):
            given = map_tensors(self._fresh, (list(args), kwargs))
            began = time.perf_counter()
            found = getattr(self, n.op)(n.target, tuple(given[0]), given[1])
            ends = [each for each in tensors_in(found) if each.requires_grad and each.grad_fn is not None]
            if ends:
                torch.autograd.backward(ends, [torch.ones_like(each) for each in ends])
            self.synchronize(found)
            times.append(time.perf_counter() - began)
        self.took[n] = min(times[1:])
        return map_tensors(torch.Tensor.detach, found)

    def _fresh(self, tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, nn.Parameter):
            return tensor
        learns = self.trains and tensor.is_floating_point() and id(tensor) not in self.data
        return tensor.detach().requires_grad_(learns).clone()  # no leaf: those cannot be changed in place


def stage_graphs(operations: Operations, cuts: Sequence[int]) -> tuple[fx.Graph, ...]:
    """The stages' graphs: each takes what the one before sends, and all inputs of the model by their names."""
    return tuple(_stage(operations, start, end) for start, end in spans(cuts, len(operations.nodes)))


def _stage(operations: Operations, start: int, end: int) -> fx.Graph:
    graph, env = fx.Graph(), {}
    nodes = operations.nodes[start:end]
    for index, node in enumerate(operations.crossing(start) if start else []):
        env[node] = graph.placeholder(f"received_{index}")
    for name in operations.inputs:
        (node,) = (node for node in operations.graph.nodes if node.op == "placeholder" and node.target == name)
        env[node] = graph.placeholder(name)
    if any(
        map(operations.in_place, nodes)
    ):  # what is received is a leaf of this stage, which autograd lets nobody change
        for node in operations.crossing(start) if start else []:
            env[node] = graph.call_method("clone", (env[node],))

    def take(node: fx.Node) -> fx.Node:
        if node not in env:
            assert node.op == "get_attr" or node in operations.anywhere, node
            env[node] = graph.node_copy(node, take)
        return env[node]

    for node in nodes:
        env[node] = graph.node_copy(node, take)
    if end == len(operations.nodes):
        graph.output(tuple(take(leaf) for leaf in operations.outputs[0] if isinstance(leaf, fx.Node)))
    else:
        sent = [graph.call_method("contiguous", (take(node),)) for node in operations.crossing(end)]
        # As it is: tensor_parallel, which follows functions that it knows, sees by this one that the whole is needed.
        graph.output(tuple(graph.call_method("view_as", (each, each)) for each in sent))
    return graph


def _plain(tree: Any) -> Any:
    """torch.fx's lists and dicts, which cannot be changed, as Python's own."""
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return list(map(_plain, tree))
    return tuple(map(_plain, tree)) if type(tree) is tuple else tree


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _bytes(value: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(value))
