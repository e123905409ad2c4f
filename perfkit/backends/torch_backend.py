"""PyTorch: `nn.Module`s on any device."""

from __future__ import annotations

import dataclasses
import gc
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch

from perfkit._batch import Samples
from perfkit._errors import InvalidInputError
from perfkit._quantity import Quantity
from perfkit._report import NO_OPTIMIZER
from perfkit._workload import Inputs, Training, Workload
from perfkit.backends.adapter import Backend, CompileLog, Finished, Rounds, Traffic
from perfkit.backends.checks import check_loss, does_not_run
from perfkit.backends.torch_bind import as_inputs, check_optimizer, device_of, optimizer_of
from perfkit.backends.torch_checks import (
    check_inputs,
    check_module,
    check_on_its_own,
    check_outputs,
    check_surroundings,
    content,
    own_inputs,
    warn_of_hidden_modules,
    writes_to_inputs,
)
from perfkit.backends.torch_copies import copied
from perfkit.backends.torch_hooks import copy_gradient_hooks
from perfkit.backends.torch_peak import peak_during
from perfkit.backends.torch_sequences import sequences_seen
from perfkit.backends.torch_state import keeping_state
from perfkit.backends.torch_surgery import ELSEWHERE, in_float64, map_tensors, parts, settle_forward, tensors_in
from perfkit.backends.torch_training import Trainer
from perfkit.kernels.torch_memory import allocator
from perfkit.measure import kept_memory


class TorchBackend(Backend):
    """Inference runs under `torch.no_grad()` and in eval mode, training in train mode."""

    name = "torch"

    def bind(self, model, params, example_inputs, *, mode, loss, targets, optimizer, seed) -> Workload:
        if params is not None:
            raise InvalidInputError("params= is for JAX functions and flax linen modules: a torch module holds its own")
        inputs = None if example_inputs is None else own_inputs(as_inputs(model, example_inputs))
        device = device_of(model, inputs)
        check_surroundings(device)
        check_module(model)
        warn_of_hidden_modules(model)
        if inputs is not None:
            check_inputs(inputs)
        training = None
        if mode == "training":
            training = Training(loss, targets, optimizer_of(model, optimizer))
            check_optimizer(training.optimizer, model)
            if not any(parameter.requires_grad for parameter in model.parameters()):
                raise InvalidInputError(
                    f"mode='training', and no parameter of {type(model).__name__} requires a gradient: nothing is to "
                    "be trained. Call requires_grad_(True) on those that shall learn"
                )
        work = self.copy(Workload(self, model, inputs, mode, device, training, seed))
        settle_forward(work.model)
        check_on_its_own(work.model, model)
        work.model.train(mode == "training")
        return work if inputs is None else work.replace(samples=self._check_runs(work))

    def as_inputs(self, work: Workload, example_inputs: Any) -> Inputs:
        return as_inputs(work.model, example_inputs)

    @contextmanager
    def preserved(self) -> Iterator[None]:
        states = random.getstate(), np.random.get_state()
        settings = [(read(), write) for read, write in _SETTINGS]
        try:
            # What is made under inference_mode could not be trained or loaded into afterwards.
            with torch.random.fork_rng(), torch.inference_mode(False), torch.enable_grad():
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
        copy_gradient_hooks(work.model, model)
        return work.replace(model=model, training=dataclasses.replace(work.training, optimizer=optimizer))

    def finish(self, work: Workload) -> Finished:
        if work.training is None:
            return Finished(work.model, work.model, lambda: keeping_state(work.model))
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

    def seeded(self, work: Workload, finished: Finished, seed: int) -> Inputs:
        self.seed(seed)
        return work.inputs

    def float64_outputs(self, work: Workload) -> list[np.ndarray]:
        self.seed(work.seed)
        model, args, kwargs = in_float64(copied(work.model), work.inputs.args, work.inputs.kwargs)
        with torch.no_grad():
            return [self.numpy(tensor) for tensor in self.leaves(model(*args, **kwargs))]

    def numpy(self, leaf: torch.Tensor) -> np.ndarray:
        leaf = leaf.detach().cpu()
        return leaf.float().numpy() if leaf.dtype in (torch.bfloat16, torch.float16) else leaf.numpy()

    def size(self, work: Workload) -> tuple[int, int]:
        parameters = {id(tensor): tensor for tensor in work.model.parameters()}
        buffers = {id(tensor): tensor for tensor in work.model.buffers()}
        held = [part for tensor in (parameters | buffers).values() for part in parts(tensor)]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
        elsewhere = getattr(work.model, ELSEWHERE, 0)
        return sum(storages.values()), sum(tensor.numel() for tensor in parameters.values()) + elsewhere

    def tensor_peak(self, work: Workload, finished: Finished, anew: bool = False) -> Quantity:
        call = self.caller(work, finished)
        if work.trains:
            call()  # the optimizer makes its state in its first step, and holds it from then on
            work.training.optimizer.zero_grad(set_to_none=True)
        return peak_during(call, work.device)

    def optimizer_state(self, work: Workload, finished: Finished) -> Quantity:
        if not work.trains:
            return NO_OPTIMIZER
        held = [inner for tensor in tensors_in(list(work.training.optimizer.state.values())) for inner in parts(tensor)]
        on_device = {
            tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in held if tensor.device.type == work.device
        }
        return Quantity(float(sum(on_device.values())), "B", method=f"tensors of optimizer.state on {work.device}")

    def memory_advice(self, work: Workload, finished: Finished) -> str:
        if work.device != "cpu" or not work.world.alone or kept_memory.settled():
            return ""
        with finished.keeping_state():
            call = self.caller(work, finished)
            call()  # what was kept may have been given back, to see what a call needs
            taken = kept_memory.touched_anew(call)
        return kept_memory.advice(taken, by_recipe=not allocator.unavailable())

    def traffic(self, work: Workload, finished: Finished) -> Traffic:
        from perfkit.parallel.torch_traffic import traffic

        return traffic(self.caller(work, finished), work.period)

    def watching_compiles(self) -> AbstractContextManager[Callable[[], CompileLog]]:
        from perfkit.backends.torch_compile_log import watching  # which loads Dynamo

        return watching()

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

    def _check_runs(self, work: Workload) -> Samples | None:
        """Of how many samples the inputs are."""
        inputs, name = work.inputs, self.model_name(work)

        def run() -> tuple[Any, bool]:
            """The outputs, and whether the inputs were written to."""
            before = content(inputs)
            with self.finish(work).keeping_state():
                outputs = work.model(*inputs.args, **inputs.kwargs)
            return outputs, content(inputs) != before

        with self.preserved(), torch.no_grad():
            try:
                with sequences_seen(work.model) as sequences:
                    outputs, written = run()
            except Exception as error:
                raise does_not_run(name, self.describe(inputs), error) from error
            check_outputs(name, outputs, inputs)
            if work.training is not None:
                check_loss(work.training, outputs, lambda loss: getattr(loss, "shape", None))
            if written:  # once may be a cache that is filled
                try:
                    _, written = run()
                except Exception as error:
                    raise writes_to_inputs(name, f"and does not run on them again: {error!r}") from error
                if written:
                    raise writes_to_inputs(name, "at each call")
        return self.samples(work, outputs, lambda: sequences)


_SETTINGS: list[tuple[Callable[[], Any], Callable[[Any], None]]] = [
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    (lambda: torch.backends.cudnn.benchmark, lambda value: setattr(torch.backends.cudnn, "benchmark", value)),
]

BACKEND = TorchBackend()
