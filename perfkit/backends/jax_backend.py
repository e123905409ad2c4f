"""JAX: flax nnx modules, flax linen modules with their variables, plain functions over a parameter pytree."""

from __future__ import annotations

import gc
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from perfkit._errors import InvalidInputError, PerfkitWarning, UnsupportedError
from perfkit._quantity import Quantity
from perfkit._report import NO_OPTIMIZER
from perfkit._workload import Inputs, Training, Workload
from perfkit.backends.adapter import Backend, Finished, Rounds, Traffic
from perfkit.backends.checks import check_loss, does_not_run
from perfkit.backends.jax_autocast_rules import primitives
from perfkit.backends.jax_bind import check_donation, check_outputs, device_of, model_of, with_numbers_read
from perfkit.backends.jax_compile import WITHOUT_YNNPACK, persistent_cache, watching
from perfkit.backends.jax_dress import as_called, dressed, finished, gathering, writer
from perfkit.backends.jax_inputs import (
    NUMBERS,
    as_arrays,
    as_inputs,
    as_written,
    checked,
    checked_params,
    checked_rest,
    tracing,
)
from perfkit.backends.jax_keys import drawing_others, is_key
from perfkit.backends.jax_model import LinenModel, NnxModel
from perfkit.backends.jax_placement import device_bytes
from perfkit.backends.jax_precision import in_float64
from perfkit.backends.jax_sequences import mixing_seen, sequences_seen
from perfkit.backends.jax_training import Trainer, checked_optimizer, warn_of_ascent
from perfkit.backends.jax_trees import leaves
from perfkit.measure import kept_memory


class JaxBackend(Backend):
    """Inference runs nnx modules in eval mode, training in train mode; functions and linen modules as they are."""

    name = "jax"

    def bind(self, model, params, example_inputs, *, mode, loss, targets, optimizer, seed) -> Workload:
        held = model_of(model, params, mode)
        held = held.with_state(checked_params(held.params), checked_rest(held.rest))
        inputs = None if example_inputs is None else checked(as_inputs(held, example_inputs))
        training = None
        if mode == "training":
            optimizer = checked_optimizer(optimizer, held.params)
            warn_of_ascent(optimizer, held.params)
            training = Training(loss, jax.tree.map(jnp.asarray, targets), optimizer)
        work = Workload(self, held, inputs, mode, device_of(held, inputs), training, seed)
        if inputs is None:
            return work
        check_donation(work)
        outputs = self._check_runs(work)
        work = with_numbers_read(work)
        return work.replace(
            samples=self.samples(work, outputs, lambda: sequences_seen(work), mixing_seen(work, outputs))
        )

    def as_inputs(self, work: Workload, example_inputs: Any) -> Inputs:
        return checked(as_inputs(work.model, example_inputs))

    @contextmanager
    def preserved(self) -> Iterator[None]:
        states = random.getstate(), np.random.get_state()
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])

    def copy(self, work: Workload) -> Workload:
        return work  # arrays are immutable, and finishing makes modules of its own

    def finish(self, work: Workload) -> Finished:
        if work.training is not None:
            return _finished_training(work)
        if work.model.placement.scattered:
            from perfkit.parallel.jax_forward import in_stages

            return in_stages(work.model)
        return finished(work.model)

    def synchronize(self, outputs: Any) -> None:
        jax.block_until_ready(outputs)

    def without_gradients(self):
        return nullcontext()

    def caller(self, work: Workload, finished: Finished) -> Callable[[], Any]:
        return super().caller(work if work.trains else _as_called(work), finished)

    def outputs(self, work: Workload, finished: Finished) -> list[np.ndarray]:
        inputs = _as_called(work).inputs
        with finished.keeping_state():
            outputs = finished.call(*inputs.args, **inputs.kwargs)
            # A number that Python code returns is an array where it is compiled.
            return [self.numpy(leaf) for leaf in self.leaves(as_arrays(outputs, NUMBERS))]

    def seed(self, seed: int) -> None:
        """JAX has no global random state: a model's keys are part of its own state."""

    def seeded(self, work: Workload, finished: Finished, seed: int) -> Inputs:
        return drawing_others(finished.trainer, work.inputs, seed - work.seed)

    def float64_outputs(self, work: Workload) -> list[np.ndarray]:
        with jax.enable_x64(True):
            model, inputs = work.model, work.inputs
            state = in_float64((model.params, model.rest))
            args, kwargs = in_float64((inputs.args, dict(inputs.kwargs)))
            traced = jax.jit(model.function()).trace(*state, *args, **kwargs)
            if "random_bits" in primitives(traced.jaxpr):
                raise TypeError("it draws random numbers, and would draw others in float64")
            outputs, _ = traced.lower().compile()(*state, *args, **kwargs)
            leaves = list(self.leaves(outputs))
            low = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64)
            fixed = [str(leaf.dtype) for leaf in leaves if leaf.dtype in low]
            if fixed:
                raise TypeError(f"the model fixes its dtype: an output stayed {fixed[0]}")
            return [self.numpy(leaf) for leaf in leaves]

    def numpy(self, leaf: Any) -> np.ndarray:
        leaf = jax.random.key_data(leaf) if is_key(leaf) else leaf
        return np.asarray(leaf, np.float32) if leaf.dtype in (jnp.bfloat16, jnp.float16) else np.asarray(leaf)

    def size(self, work: Workload) -> tuple[int, int]:
        rest = {id(leaf): leaf for leaf in self.leaves(work.model.rest)}
        parameters = {id(leaf): leaf for leaf in leaves(work.model.params) if hasattr(leaf, "dtype")}
        total = work.model.placement.bytes_of(work.model.params) + sum(map(device_bytes, rest.values()))
        return total, sum(leaf.size for leaf in parameters.values())

    def tensor_peak(self, work: Workload, finished: Finished, anew: bool = False) -> Quantity:
        if finished.program:
            compiled, form = finished.program(), "the program"
            lowered = finished.lowered() if finished.lowered else None
        else:
            inputs, state = work.inputs, (work.model.params, work.model.rest)
            try:
                with persistent_cache(), tracing():
                    lowered = jax.jit(work.model.function()).lower(*state, *inputs.args, **inputs.kwargs)
                    compiled = lowered.compile()
            except UnsupportedError as error:
                return Quantity.missing("B", f"it is read off a compiled program, and {error}")
            form = "its jitted form (op by op it may need more)"
        analysis = compiled.memory_analysis()
        if analysis is None:
            return Quantity.missing("B", f"XLA gives no memory analysis on {work.device!r}")
        unseen = compiled.as_text().count("kind=kCustom") if work.device == "cpu" else 0
        if unseen and anew and lowered is not None:
            try:
                compiled = lowered.compile(compiler_options=WITHOUT_YNNPACK)
            except jax.errors.JaxRuntimeError as error:
                return Quantity.missing("B", f"XLA cannot be asked to count what YNNPACK takes ({error})")
            analysis, form, unseen = compiled.memory_analysis(), f"{form}, compiled without YNNPACK", 0
        if unseen:
            return Quantity.missing("B", f"XLA runs {unseen} fusion(s) in YNNPACK, whose memory it does not count")
        peak = analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        kept = finished.kept_bytes() if finished.kept_bytes else 0
        parts = "temporaries and outputs" + (", and what it keeps of parameters" if kept else "")
        return Quantity(peak + kept, "B", method=f"XLA memory analysis of {form}: {parts}")

    def optimizer_state(self, work: Workload, finished: Finished) -> Quantity:
        if not work.trains:
            return NO_OPTIMIZER
        leaves = [leaf for leaf in jax.tree.leaves(finished.trainer.state[2]) if isinstance(leaf, jax.Array)]
        near = [leaf for leaf in leaves if leaf.sharding.memory_kind in (None, _memory_kind(leaf))]
        return Quantity(float(sum(map(device_bytes, near))), "B", method="arrays of the optax state in device memory")

    def memory_advice(self, work: Workload, finished: Finished) -> str:
        if work.device != "cpu" or finished.program is None:
            return ""
        told = [program.memory_analysis() for program, _ in _programs(finished) if program]
        return kept_memory.advice(max((each.temp_size_in_bytes for each in told if each), default=0))

    def traffic(self, work: Workload, finished: Finished) -> Traffic:
        from perfkit.parallel.jax_collectives import collectives, told

        sent_bytes, lines = 0.0, []
        for compiled, steps in _programs(finished):
            found = collectives(compiled.as_text(), work.world.devices)
            sent_bytes += sum(item.sent_bytes for item in found) / steps
            lines.append(told(found) if steps == 1 else f"every {steps} steps {told(found)}")
        method = f"HLO of the compiled program, as a ring sends it: {'; '.join(lines)}"
        sent = Quantity(sent_bytes, "B", method=method)
        return Traffic(sent, Quantity.missing("ratio", "XLA's program is one call: JAX does not tell its parts' times"))

    def watching_compiles(self):
        return watching()

    def compiled_baseline(self, work: Workload) -> Workload | None:
        if work.trains or work.model.ahead or isinstance(work.model.original, jax.stages.Wrapped):
            return None  # compiled already: the training step by perfkit, the function by its caller
        return work.replace(model=work.model.compiled_ahead())

    def form(self, work: Workload) -> dict[str, str]:
        inputs = () if work.inputs is None else (work.inputs.args, dict(work.inputs.kwargs))
        held = {"model": (work.model.params, work.model.rest), "input": inputs}
        return {
            jax.tree_util.keystr(path, simple=True, separator="."): f"{leaf.dtype}{list(leaf.shape)}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(held)
            if hasattr(leaf, "dtype")
        }

    def model_name(self, work: Workload) -> str:
        return work.model.name

    def leaves(self, tree: Any) -> Iterator[jax.Array]:
        return (leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, (jax.Array, np.ndarray)))

    def mapped(self, function: Callable[[Any], Any], tree: Any) -> Any:
        return jax.tree.map(lambda leaf: function(leaf) if isinstance(leaf, (jax.Array, np.ndarray)) else leaf, tree)

    def rows(self, leaf: Any, indices: list[int], dim: int) -> jax.Array:
        return jnp.take(leaf, np.array(indices), axis=dim)

    def forget(self) -> None:
        gc.collect()

    def _check_runs(self, work: Workload) -> Any:
        """The outputs."""
        model, inputs = work.model, work.inputs
        with self.preserved():
            try:
                outputs, told = model.called_once(*inputs.args, **inputs.kwargs)
            except Exception as error:
                raise does_not_run(model.name, self.describe(inputs), error, model.advice(error)) from error
            for each in told:
                warnings.warn(f"{model.name} {each}", PerfkitWarning, stacklevel=5)
            check_outputs(model.name, list(self.leaves(outputs)), outputs)
            if work.training is not None:
                check_loss(work.training, outputs, lambda loss: getattr(loss, "shape", None))
        return outputs


def _as_called(work: Workload) -> Workload:
    """The workload with its inputs as the caller of a model writes them."""
    args, kwargs = as_written((work.inputs.args, dict(work.inputs.kwargs)))
    return work.replace(inputs=Inputs(args, kwargs))


def _finished_training(work: Workload) -> Finished:
    trainer, held = Trainer(work), work.model
    if isinstance(held, NnxModel):
        module, _ = dressed(held)
        into = writer(module)

        def write() -> None:
            into(*trainer.pieces)

        if held.placement.scattered:
            gathering(module, trainer, held)
        call, model, params = module, module, None
    else:
        write = _nowhere
        model = as_called(held)

        def params():
            trained, rest = trainer.held
            return {"params": trained, **rest} if isinstance(held, LinenModel) else trained

        def call(*args, **kwargs):
            return model(params(), *args, **kwargs)

    def train_step(batch):
        """Train on `batch = (inputs, targets)` and return the loss."""
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            raise InvalidInputError(f"train_step was given a {type(batch).__name__}: expected (inputs, targets)")
        inputs, targets = batch
        loss = trainer.step(as_inputs(held, inputs), targets)
        write()
        return loss

    @contextmanager
    def keeping_state():
        with trainer.keeping_state():
            yield
        write()

    def restore(state, remembered):
        trainer.restore(state, remembered)
        write()

    def settle():
        trainer.settle()
        write()

    def program():
        return trainer.program.compiled

    def lowered():
        return trainer.program.lowered

    rounds = Rounds(settle, trainer.program.skip_warm_up) if trainer.program.rounds else None
    return Finished(model, call, keeping_state, train_step, params, program, lowered, trainer, restore, rounds)


def _programs(finished: Finished) -> list[tuple[jax.stages.Compiled, int]]:
    """The compiled programs behind it, each with in how many calls it runs once."""
    return finished.trainer.program.parts() if finished.trainer else [(finished.program(), 1)]


def _memory_kind(leaf: jax.Array) -> str:
    return next(iter(leaf.devices())).default_memory().kind


def _nowhere() -> None:
    """A function holds no state to write to."""


BACKEND = JaxBackend()
