"""Where a torch model is while it runs: in which module, in which phase of a step.

Hooks are global ones that look only at this model's modules: hooks of a module itself would take some modules off their
fast path. A model that torch.compile works on is seen as a whole.
"""

from __future__ import annotations

import bisect
import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as registry
from torch.profiler import record_function

from perfkit._workload import Workload
from perfkit.backends.adapter import Finished
from perfkit.backends.torch_fused_conv import WATCHES

STEP, PHASE, MODULE = "perfkit/step", "perfkit/phase/", "perfkit/module/"
"""Beginnings of the names of the ranges that mark a step, a phase and a module in a trace."""


class Where:
    """Follows a model through its steps.

    Args:
        model: whose modules count; what other modules do counts as done by the one that called them.
        on_output: called with a module's path and what it returned.
    """

    def __init__(self, model: nn.Module, on_output: Callable[[str, Any], None] | None = None):
        self.model = model
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.calls: Counter[str] = Counter()
        self._on_output = on_output
        self._compiled = any(_is_compiled(module) for module in model.modules())
        self._phase = "other"
        self._open: list[tuple[str, record_function]] = []
        self._made: tuple[list[int], list[str]] = ([], [])

    @property
    def phase(self) -> str:
        return "backward" if torch._C._current_graph_task_id() != -1 else self._phase

    @property
    def module(self) -> str:
        """Path of the innermost module: in the backward pass, of the one whose gradient is computed."""
        node = torch._C._current_autograd_node()
        if self._open or node is None:
            return self._open[-1][0] if self._open else ""
        return self.maker(node._sequence_nr())

    def maker(self, sequence_number: int) -> str:
        """Path of the module that made this node of the autograd graph."""
        numbers, paths = self._made
        if not 0 <= sequence_number < 2**62:  # nodes that gather gradients have none of their own
            return ""
        index = bisect.bisect_right(numbers, sequence_number) - 1
        return paths[index] if index >= 0 else ""

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Within it, everything is of this phase."""
        before, self._phase = self._phase, phase
        try:
            with record_function(PHASE + phase):
                yield
        finally:
            self._phase = before

    @contextmanager
    def following(self, eager: bool = False) -> Iterator[None]:
        """Within it, modules are followed; not in a model that is compiled, unless all runs eagerly.

        A hook makes torch.compile compile once more, and with it another program than the one that is looked at.
        """
        if self._compiled and not eager:
            yield
            return
        with ExitStack() as stack:
            for handle in (
                registry.register_module_forward_pre_hook(self._enter),
                registry.register_module_forward_hook(self._leave, always_call=True),
            ):
                stack.callback(handle.remove)
            stack.callback(self._close)
            yield

    def stepping(self, work: Workload, finished: Finished) -> Callable[[], Any]:
        """One synchronized call or training step that tells its phases."""
        step = self._training(work, finished) if work.trains else self._inference(work, finished)

        def marked() -> Any:
            with record_function(STEP):
                outputs = step()
                work.backend.synchronize(outputs)
            return outputs

        return marked

    def _inference(self, work: Workload, finished: Finished) -> Callable[[], Any]:
        def infer() -> Any:
            with work.backend.without_gradients(), self.within("forward"):
                return finished.call(*work.inputs.args, **work.inputs.kwargs)

        return infer

    def _training(self, work: Workload, finished: Finished) -> Callable[[], Any]:
        trainer, training = copy.copy(finished.trainer), work.training
        trainer.model = self._marked("forward", trainer.model)
        trainer.training = dataclasses.replace(training, loss=self._marked("loss", training.loss))

        def train() -> Any:
            with _around_step(trainer.optimizer, lambda: self.within("optimizer")):
                return trainer.step(work.inputs, training.targets)

        return train

    def _marked(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def marked(*args: Any, **kwargs: Any) -> Any:
            with self.within(phase):
                return function(*args, **kwargs)

        return marked

    def _enter(self, module: nn.Module, _: Any) -> None:
        if torch.compiler.is_compiling() or (path := self.paths.get(id(module))) is None:
            return
        label = record_function(MODULE + path)
        label.__enter__()
        self._open.append((path, label))
        self._mark()
        self.calls[path] += 1

    def _leave(self, module: nn.Module, _: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not self._open or (path := self.paths.get(id(module))) is None:
            return
        _, label = self._open.pop()
        label.__exit__(None, None, None)
        self._mark()
        if self._on_output is not None:
            self._on_output(path, output)

    def _close(self) -> None:
        """End the ranges of modules that something raised through."""
        while self._open:
            self._open.pop()[1].__exit__(None, None, None)

    def _mark(self) -> None:
        """From here on, nodes of the autograd graph are made by the innermost module.

        Each thread numbers its own: where a card's backward pass runs parts of the forward pass again, in a thread of
        autograd's, their nodes stay unknown.
        """
        numbers, paths = self._made
        number = torch.autograd._get_sequence_nr()
        if not numbers or number >= numbers[-1]:
            numbers.append(number)
            paths.append(self._open[-1][0] if self._open else "")


for _hook in (Where._enter, Where._leave):
    setattr(_hook, WATCHES, True)


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")


@contextmanager
def _around_step(optimizer: torch.optim.Optimizer, context: Callable[[], Any]) -> Iterator[None]:
    """Every `optimizer.step()` runs within `context()`."""
    inside = ExitStack()

    def enter(*_: Any) -> None:
        inside.enter_context(context())

    def leave(*_: Any) -> None:
        inside.close()

    with ExitStack() as stack:
        stack.callback(optimizer.register_step_pre_hook(enter).remove)
        stack.callback(optimizer.register_step_post_hook(leave).remove)
        stack.callback(inside.close)
        yield
