"""What perfkit asks of a framework: the verbs in which they differ, and the data that their adapters answer with."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from perfkit._batch import Mixing, Samples, samples_of
from perfkit._errors import PerfkitError, UnsupportedError

if TYPE_CHECKING:
    import numpy as np

    from perfkit._quantity import Quantity
    from perfkit._workload import Inputs, Workload


@dataclass(frozen=True)
class CompileLog:
    """What a framework's compiler did during one first call.

    Args:
        graphs: number of graphs (torch) or programs (JAX) compiled.
        breaks: why the compiler gave up on a part, one line each.
        gave_up: that the compiler stopped compiling for having compiled too often, so that parts run eagerly (torch).
        seconds: time spent compiling; None where the framework does not tell.
        cached: compilations answered from a persistent cache.
        integer_kernels: matrix products and convolutions that became integer kernels of the compiler's (torch).
        integer_layers, integer_calls: integer layers that are perfkit's kernels in the program, and in how many calls.
    """

    graphs: int = 0
    breaks: tuple[str, ...] = ()
    seconds: float | None = None
    cached: int = 0
    integer_kernels: int = 0
    integer_layers: int = 0
    integer_calls: int = 0
    gave_up: str = ""


@dataclass(frozen=True)
class Traffic:
    """What one device exchanges with others.

    Args:
        sent_bytes: what it exchanges in one call or training step; `method` tells how it is counted.
        share: of the time in which such were under way, hidden behind computations or not.
    """

    sent_bytes: Quantity
    share: Quantity


@dataclass(frozen=True)
class Rounds:
    """What concerns a training in which the processes' models differ for some steps.

    Args:
        settle: brings them together now; every process calls it.
        skip_warm_up: goes on as after any steps that are taken together at first.
    """

    settle: Callable[[], None]
    skip_warm_up: Callable[[], None]


@dataclass(frozen=True)
class Finished:
    """A workload in the form the caller uses it.

    Args:
        model: a true `nn.Module`, flax module or function: takes the place of the original.
        call: `call(*inputs)`: the model on its own parameters.
        keeping_state: a context within which the model may be called and trained; after it, its state is as before.
        train_step: `train_step((inputs, targets)) -> loss`; None for inference.
        params: tells the parameters that `model` takes as first argument; None where it holds its own.
        program: tells the compiled program behind it once it was called (JAX); None where there is none.
        lowered: tells what that program was compiled from; None where there is none.
        trainer: holds all that training changes, for `perfkit.parallel.checkpoint`; None for inference.
        restore: JAX: `restore(state, remembered)` takes over what a checkpoint held of `trainer.settled`.
        rounds: where the processes' models differ for some steps; None elsewhere.
        kept_bytes: tells what memory that program takes between calls, beside parameters; None where there is none.
    """

    model: Any
    call: Callable[..., Any]
    keeping_state: Callable[[], AbstractContextManager[None]]
    train_step: Callable[[Any], Any] | None = None
    params: Callable[[], Any] | None = None
    program: Callable[[], Any] | None = None
    lowered: Callable[[], Any] | None = None
    trainer: Any = None
    restore: Callable[[Any, Any], None] | None = None
    rounds: Rounds | None = None
    kept_bytes: Callable[[], int] | None = None


class Backend(ABC):
    """What perfkit needs of a framework."""

    name: ClassVar[str]

    @abstractmethod
    def bind(self, model: Any, params: Any, example_inputs: Any, **settings: Any) -> Workload:
        """Validate what the caller passed and make the workload of it; raises InvalidInputError."""

    @abstractmethod
    def as_inputs(self, work: Workload, example_inputs: Any) -> Inputs:
        """What a caller passes as one batch, as the arguments of one call."""

    @abstractmethod
    def preserved(self) -> AbstractContextManager[None]:
        """Within it anything may happen to random state and global settings; after it they are as before."""

    @abstractmethod
    def copy(self, work: Workload) -> Workload:
        """The same workload on a model (and optimizer) of its own."""

    @abstractmethod
    def finish(self, work: Workload) -> Finished:
        """The workload's model in the form the caller uses it."""

    @abstractmethod
    def synchronize(self, outputs: Any) -> None:
        """Wait until `outputs` are there."""

    @abstractmethod
    def without_gradients(self) -> AbstractContextManager[None]:
        """The context in which inference is timed, the original's and the result's alike."""

    @abstractmethod
    def seed(self, seed: int) -> None:
        """Seed the framework's global random state, where it has one."""

    @abstractmethod
    def seeded(self, work: Workload, finished: Finished, seed: int) -> Inputs:
        """Seed what a training draws random numbers from; returns the inputs to train with."""

    @abstractmethod
    def float64_outputs(self, work: Workload) -> list[np.ndarray]:
        """The outputs of a copy of the model, and of the inputs, in float64; raises whatever stands in the way."""

    @abstractmethod
    def numpy(self, leaf: Any) -> np.ndarray:
        """A tensor or array as a numpy array, low precision as float32."""

    @abstractmethod
    def size(self, work: Workload) -> tuple[int, int]:
        """Bytes of parameters and buffers, and number of parameters; tied ones once."""

    @abstractmethod
    def tensor_peak(self, work: Workload, finished: Finished, anew: bool = False) -> Quantity:
        """High-water mark of tensor memory during one call, above what was held before it: the optimizer's state too.

        Args:
            anew: compile once more, where that is what it takes.
        """

    @abstractmethod
    def optimizer_state(self, work: Workload, finished: Finished) -> Quantity:
        """Bytes that the optimizer holds on the device, after a step was taken."""

    @abstractmethod
    def memory_advice(self, work: Workload, finished: Finished) -> str:
        """What settings of the process may make of the memory that each call takes; empty where there is nothing to."""

    @abstractmethod
    def traffic(self, work: Workload, finished: Finished) -> Traffic:
        """What this process' device sends during one call or step of a model that is spread over several."""

    @abstractmethod
    def watching_compiles(self) -> AbstractContextManager[Callable[[], CompileLog]]:
        """Within it, what the compiler does is recorded; the function tells it so far."""

    @abstractmethod
    def compiled_baseline(self, work: Workload) -> Workload | None:
        """The workload under the framework's plain compiler, where that costs next to nothing; None elsewhere."""

    @abstractmethod
    def form(self, work: Workload) -> dict[str, str]:
        """What must be the same on every process: parameters and inputs by name, with their shapes and dtypes."""

    @abstractmethod
    def model_name(self, work: Workload) -> str:
        """What the caller calls the model."""

    @abstractmethod
    def leaves(self, tree: Any) -> Iterator[Any]:
        """The tensors or arrays in nested inputs or outputs."""

    @abstractmethod
    def mapped(self, function: Callable[[Any], Any], tree: Any) -> Any:
        """Nested inputs or targets with `function` applied to each tensor or array."""

    @abstractmethod
    def rows(self, leaf: Any, indices: list[int], dim: int) -> Any:
        """A tensor or array of these rows of another, along one dimension."""

    @abstractmethod
    def forget(self) -> None:
        """Hand the device memory back that is held for nothing."""

    def caller(self, work: Workload, finished: Finished) -> Callable[[], Any]:
        """One synchronized call on the example inputs, as the caller would make it: forward, or a training step.

        Where steps are alike only together, as many as that, after any warm-up of theirs. Of a whole model in a world
        of several processes one makes it, and the others do nothing.
        """
        if not work.takes_part:
            return _nothing
        synchronize, call, args, kwargs = self.synchronize, finished.call, work.inputs.args, work.inputs.kwargs

        def infer():
            with self.without_gradients():
                outputs = call(*args, **kwargs)
                synchronize(outputs)
            return outputs

        def train():
            if finished.rounds is not None:
                finished.rounds.skip_warm_up()
            for _ in range(work.period):
                loss = finished.train_step((work.inputs, work.training.targets))
                synchronize(loss)
            return loss

        return train if work.trains else infer

    def outputs(self, work: Workload, finished: Finished) -> list[np.ndarray]:
        """The outputs on the example inputs, flattened."""
        self.seed(work.seed)
        with finished.keeping_state(), self.without_gradients():
            outputs = finished.call(*work.inputs.args, **work.inputs.kwargs)
            return [self.numpy(leaf) for leaf in self.leaves(outputs)]

    def losses(self, work: Workload, finished: Finished, steps: int, seed: int) -> tuple[float, ...]:
        """The losses of `steps` on the example batch, from the state as it is and back to it.

        Where the processes' models differ for some steps, they are brought together before the last one.
        """
        with finished.keeping_state():
            batch = self.seeded(work, finished, seed), work.training.targets
            try:
                losses = [float(finished.train_step(batch)) for _ in range(steps - 1)]
            except PerfkitError:
                raise
            except Exception as error:
                raise UnsupportedError(
                    f"{self.model_name(work)} took one training step, and then one raised {type(error).__name__}: "
                    f"{str(error)[:300]}. Something that the step before left behind is in the way, such as a hidden "
                    "state that was not detached"
                ) from error
            if finished.rounds is not None:
                finished.rounds.settle()
            return (*losses, float(finished.train_step(batch)))

    def batch_size(self, work: Workload, inputs: Inputs) -> int | None:
        """Length of the first input along the dimension that is the batch; None where there is none."""
        dim = work.samples.dim if work.samples else 0
        shapes = [leaf.shape for leaf in self.leaves((inputs.args, inputs.kwargs))]
        return next((int(shape[dim]) for shape in shapes if len(shape) > dim), None)

    def samples(
        self,
        work: Workload,
        outputs: Any,
        sequences: Callable[[], set[tuple[int, int]]],
        mixing: Callable[[int, int], Mixing | None] | None = None,
    ) -> Samples | None:
        """Of how many samples a call is that gave these outputs; see `samples_of`."""
        targets = None if work.training is None else work.training.targets
        inputs = (work.inputs.args, dict(work.inputs.kwargs))
        given, made = ([tuple(leaf.shape) for leaf in self.leaves(tree)] for tree in (inputs, (outputs, targets)))
        return samples_of(given, made, functools.cache(sequences), mixing)

    def describe(self, inputs: Inputs | None) -> str:
        """Shapes and dtypes: "float32[64, 1, 28, 28]"."""
        if inputs is None:
            return "none given"
        leaves = self.leaves((inputs.args, inputs.kwargs))
        return ", ".join(f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}" for leaf in leaves)


def _nothing() -> None:
    """What a process does while another one runs a whole model."""
