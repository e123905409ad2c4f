"""PyTorch: `nn.Module`s on any device."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from perfkit._errors import InvalidInputError
from perfkit._report import NO_OPTIMIZER, Quantity
from perfkit._workload import Inputs, Training, Workload
from perfkit.backends import Backend, CompileLog, Finished, Rounds, Traffic, check_loss, does_not_run
from perfkit.backends.torch_stderr import without_lines
from perfkit.backends.torch_surgery import (
    COMPILED_WITH,
    ELSEWHERE,
    cast,
    copied,
    local,
    map_tensors,
    parts,
    settle_forward,
    tensors_in,
)
from perfkit.backends.torch_training import Trainer


class TorchBackend(Backend):
    """Inference runs under `torch.no_grad()` and in eval mode, training in train mode."""

    name = "torch"

    def bind(self, model, params, example_inputs, *, mode, loss, targets, optimizer, seed) -> Workload:
        if params is not None:
            raise InvalidInputError("params= is for JAX functions and flax linen modules: a torch module holds its own")
        _check_module(model)
        inputs = None if example_inputs is None else as_inputs(model, example_inputs)
        for tensor in self.leaves((inputs.args, inputs.kwargs)) if inputs else ():
            if tensor.numel() == 0:
                raise InvalidInputError(f"example_inputs hold an empty tensor of shape {list(tensor.shape)}")
        training = None
        if mode == "training":
            training = Training(loss, targets, _optimizer(model, optimizer))
        work = Workload(self, model, inputs, mode, _device(model, inputs), training, seed)
        _check_finite(model)
        work = self.copy(work)
        settle_forward(work.model)
        work.model.train(mode == "training")
        if inputs is not None:
            self._check_runs(work)
        return work

    def as_inputs(self, work: Workload, example_inputs: Any) -> Inputs:
        return as_inputs(work.model, example_inputs)

    @contextmanager
    def preserved(self) -> Iterator[None]:
        states = random.getstate(), np.random.get_state()
        settings = [(read(), write) for read, write in _SETTINGS]
        try:
            with torch.random.fork_rng():
                yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            for value, write in settings:
                write(value)

    def copy(self, work: Workload) -> Workload:
        if work.training is None:
            return work.replace(model=copied(work.model))
        model, optimizer = copied(work.model, work.training.optimizer)
        return work.replace(model=model, training=dataclasses.replace(work.training, optimizer=optimizer))

    def finish(self, work: Workload) -> Finished:
        if work.training is None:
            return Finished(work.model, work.model, lambda: _keeping_buffers(work.model))
        trainer = Trainer(work)

        def train_step(batch):
            """Train on `batch = (inputs, targets)` and return the loss."""
            inputs, targets = batch
            return trainer.step(self.as_inputs(work, inputs), targets)

        rounds = trainer.rounds and Rounds(trainer.rounds.settle, trainer.rounds.skip_warm_up)
        return Finished(work.model, work.model, trainer.keeping_state, train_step, trainer=trainer, rounds=rounds)

    def synchronize(self, outputs: Any) -> None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def without_gradients(self):
        return torch.no_grad()

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def float64_outputs(self, work: Workload) -> list[np.ndarray]:
        self.seed(work.seed)
        model = copied(work.model).double()
        args, kwargs = cast((work.inputs.args, work.inputs.kwargs), torch.float64)
        with torch.no_grad():
            return [self.numpy(tensor) for tensor in self.leaves(model(*args, **kwargs))]

    def numpy(self, leaf: torch.Tensor) -> np.ndarray:
        leaf = leaf.detach().cpu()
        return leaf.float().numpy() if leaf.dtype in (torch.bfloat16, torch.float16) else leaf.numpy()

    def size(self, work: Workload) -> tuple[int, int]:
        parameters = {id(tensor): tensor for tensor in work.model.parameters()}
        buffers = {id(tensor): tensor for tensor in work.model.buffers()}
        held = map(local, (parameters | buffers).values())
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
        elsewhere = getattr(work.model, ELSEWHERE, 0)
        return sum(storages.values()), sum(tensor.numel() for tensor in parameters.values()) + elsewhere

    def tensor_peak(self, work: Workload, finished: Finished, anew: bool = False) -> Quantity:
        call = self.caller(work, finished)
        if work.trains:
            call()  # the optimizer makes its state in its first step, and holds it from then on
            work.training.optimizer.zero_grad(set_to_none=True)
        return _cuda_peak(call) if work.device == "cuda" else _profiled_peak(call, work.device)

    def optimizer_state(self, work: Workload, finished: Finished) -> Quantity:
        if not work.trains:
            return NO_OPTIMIZER
        held = [inner for tensor in tensors_in(list(work.training.optimizer.state.values())) for inner in parts(tensor)]
        on_device = {
            tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in held if tensor.device.type == work.device
        }
        return Quantity(float(sum(on_device.values())), "B", method=f"tensors of optimizer.state on {work.device}")

    def traffic(self, work: Workload, finished: Finished) -> Traffic:
        from perfkit.parallel.torch_traffic import traffic

        return traffic(self.caller(work, finished), work.period)

    @contextmanager
    def watching_compiles(self) -> Iterator[Callable[[], CompileLog]]:
        from torch._dynamo.utils import counters

        before = {group: Counter(counters[group]) for group in _COUNTERS}
        yield lambda: _compile_log({group: Counter(counters[group]) - before[group] for group in _COUNTERS})

    def compiled_baseline(self, work: Workload) -> Workload | None:
        return None  # torch.compile costs seconds to minutes: recipe="auto" tries it as a candidate instead

    def form(self, work: Workload) -> dict[str, str]:
        held = dict(work.model.named_parameters()) | dict(work.model.named_buffers())
        if work.inputs is not None:
            given = enumerate(tensors_in((work.inputs.args, work.inputs.kwargs)))
            held |= {f"input {number}": tensor for number, tensor in given}
        return {
            name: f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}" for name, tensor in held.items()
        }

    def model_name(self, work: Workload) -> str:
        return type(work.model).__name__

    def leaves(self, tree: Any) -> Iterator[torch.Tensor]:
        return tensors_in(tree)

    def mapped(self, function: Callable[[Any], Any], tree: Any) -> Any:
        return map_tensors(function, tree)

    def rows(self, leaf: torch.Tensor, indices: list[int], dim: int) -> torch.Tensor:
        return leaf.index_select(dim, torch.tensor(indices, device=leaf.device))

    def forget(self) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _check_runs(self, work: Workload) -> None:
        inputs, name = work.inputs, self.model_name(work)
        with self.preserved(), self.finish(work).keeping_state(), torch.no_grad():
            try:
                outputs = work.model(*inputs.args, **inputs.kwargs)
            except Exception as error:
                raise does_not_run(name, self.describe(inputs), error) from error
            if not any(True for _ in self.leaves(outputs)):
                raise InvalidInputError(f"{name} returned a {type(outputs).__name__} without any tensor in it")
            if work.training is not None:
                check_loss(work.training, outputs, lambda loss: getattr(loss, "shape", None))


@contextmanager
def _keeping_buffers(model: nn.Module) -> Iterator[None]:
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, old in before:
                buffer.copy_(old)


def as_inputs(model: nn.Module, example_inputs: Any) -> Inputs:
    """A tuple as positional arguments, a dict as keywords if its keys are forward's parameters, else one argument."""
    if isinstance(example_inputs, Inputs):
        return example_inputs
    if isinstance(example_inputs, tuple) and not hasattr(example_inputs, "_fields"):
        return Inputs(example_inputs)
    if isinstance(example_inputs, Mapping):
        parameters = inspect.signature(model.forward).parameters.values()
        names = {parameter.name for parameter in parameters}
        if set(example_inputs) <= names or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return Inputs((), dict(example_inputs))
    return Inputs((example_inputs,))


def _check_module(model: nn.Module) -> None:
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise InvalidInputError(
            f"{name} is a TorchScript module, which cannot be rewritten: pass the module it was made of"
        )
    if hasattr(model, "_orig_mod") or (model._compiled_call_impl and not hasattr(type(model), COMPILED_WITH)):
        raise InvalidInputError(f"{name} is compiled already: pass the module as it was before torch.compile")


def _check_finite(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        bad = int((~torch.isfinite(parameter)).sum()) if parameter.is_floating_point() else 0
        if bad:
            raise InvalidInputError(
                f"parameter {name!r} holds {bad} NaN or infinite of {parameter.numel()} values: repair them first"
            )


def _optimizer(model: nn.Module, optimizer: Any) -> torch.optim.Optimizer:
    if not isinstance(optimizer, torch.optim.Optimizer):
        if not callable(optimizer):
            raise InvalidInputError(
                f"optimizer is a {type(optimizer).__name__}: pass a torch optimizer over the model's parameters, "
                "or a function of the parameters such as functools.partial(torch.optim.Adam, lr=1e-3)"
            )
        optimizer = optimizer(model.parameters())
    own = {id(parameter) for parameter in model.parameters()}
    foreign = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in own]
    if foreign:
        raise InvalidInputError(
            f"optimizer holds {len(foreign)} parameter(s) that are not the model's: build it on this model"
        )
    return optimizer


def _device(model: nn.Module, inputs: Inputs | None) -> str:
    held = [*model.parameters(), *model.buffers(), *(tensors_in((inputs.args, inputs.kwargs)) if inputs else ())]
    kinds = {tensor.device.type for tensor in held} or {"cpu"}
    if "meta" in kinds:
        raise InvalidInputError("the model is on the meta device and has no values: materialize it first")
    return next(iter(kinds - {"cpu"}), "cpu")


def _cuda_peak(call: Callable[[], Any]) -> Quantity:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    call()
    peak = torch.cuda.max_memory_allocated() - held
    return Quantity(peak, "B", method="CUDA allocator: peak during one call above what was held before it")


def _profiled_peak(call: Callable[[], Any], device: str) -> Quantity:
    if device != "cpu":
        return Quantity.missing("B", f"no tensor memory accounting for device {device!r}")
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with without_lines("USDT:"), torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        kept = call()  # noqa: F841 - the outputs count until the profile ends
    try:
        events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
        changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    except AttributeError as error:
        return Quantity.missing("B", f"this torch's profiler does not tell allocations ({error})")
    if not changes:
        return Quantity.missing("B", "torch's profiler recorded no allocation")
    return Quantity(
        float(np.cumsum(changes).max(initial=0)),
        "B",
        method="torch.profiler allocations: peak during one call above what was held before it",
    )


_COUNTERS = ("stats", "graph_break", "unimplemented", "inductor", "aot_autograd")


def _compile_log(counts: dict[str, Counter]) -> CompileLog:
    reasons = [*counts["graph_break"], *counts["unimplemented"]]
    return CompileLog(
        graphs=counts["stats"]["unique_graphs"],
        breaks=tuple(dict.fromkeys(reason.strip().splitlines()[0] for reason in reasons)),
        cached=counts["inductor"]["fxgraph_cache_hit"],
        integer_kernels=sum(counts["inductor"][f"{op}_weight_prepack_matcher_count"] for op in ("qlinear", "qconv")),
    )


_SETTINGS: list[tuple[Callable[[], Any], Callable[[Any], None]]] = [
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    (lambda: torch.backends.cudnn.benchmark, lambda value: setattr(torch.backends.cudnn, "benchmark", value)),
]

BACKEND = TorchBackend()
