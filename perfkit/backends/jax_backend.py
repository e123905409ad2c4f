"""JAX: flax nnx modules, flax linen modules with their variables, plain functions over a parameter pytree."""

from __future__ import annotations

import gc
import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from perfkit._errors import InvalidInputError
from perfkit._report import NO_OPTIMIZER, Quantity
from perfkit._workload import Inputs, Training, Workload
from perfkit.backends import Backend, Finished, Rounds, Traffic, check_loss, does_not_run
from perfkit.backends.jax_compile import WITHOUT_YNNPACK, persistent_cache, watching
from perfkit.backends.jax_dress import as_called, changing, dressed, finished, run_by, writer
from perfkit.backends.jax_model import FunctionModel, JaxModel, LinenModel, NnxModel, is_linen
from perfkit.backends.jax_placement import device_bytes
from perfkit.backends.jax_precision import cast
from perfkit.backends.jax_training import Trainer
from perfkit.backends.jax_trees import leaves


class JaxBackend(Backend):
    """Inference runs nnx modules in eval mode, training in train mode; functions and linen modules as they are."""

    name = "jax"

    def bind(self, model, params, example_inputs, *, mode, loss, targets, optimizer, seed) -> Workload:
        held = _model(model, params, mode)
        _check_finite(held.params)
        inputs = None if example_inputs is None else _arrays(as_inputs(held, example_inputs))
        for leaf in self.leaves((inputs.args, dict(inputs.kwargs))) if inputs else ():
            if leaf.size == 0:
                raise InvalidInputError(f"example_inputs hold an empty array of shape {list(leaf.shape)}")
        training = None
        if mode == "training":
            _check_optimizer(optimizer)
            training = Training(loss, jax.tree.map(jnp.asarray, targets), optimizer)
        work = Workload(self, held, inputs, mode, _device(held, inputs), training, seed)
        if inputs is not None:
            self._check_runs(work)
        return work

    def as_inputs(self, work: Workload, example_inputs: Any) -> Inputs:
        return _arrays(as_inputs(work.model, example_inputs))

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

    def seed(self, seed: int) -> None:
        """JAX has no global random state: a model's keys are part of its own state."""

    def float64_outputs(self, work: Workload) -> list[np.ndarray]:
        with jax.enable_x64(True):
            model, inputs = work.model, work.inputs
            state = cast((model.params, model.rest), jnp.float64)
            args, kwargs = cast((inputs.args, dict(inputs.kwargs)), jnp.float64)
            outputs, _ = jax.jit(model.function())(*state, *args, **kwargs)
            leaves = list(self.leaves(outputs))
            fixed = [str(leaf.dtype) for leaf in leaves if leaf.dtype in (jnp.float32, jnp.bfloat16, jnp.float16)]
            if fixed:
                raise TypeError(f"the model fixes its dtype: an output stayed {fixed[0]}")
            return [self.numpy(leaf) for leaf in leaves]

    def numpy(self, leaf: Any) -> np.ndarray:
        return np.asarray(leaf, np.float32) if leaf.dtype in (jnp.bfloat16, jnp.float16) else np.asarray(leaf)

    def size(self, work: Workload) -> tuple[int, int]:
        rest = {id(leaf): leaf for leaf in self.leaves(work.model.rest)}
        parameters = {id(leaf): leaf for leaf in leaves(work.model.params) if hasattr(leaf, "dtype")}
        total = work.model.placement.bytes_of(work.model.params) + sum(map(device_bytes, rest.values()))
        return total, sum(leaf.size for leaf in parameters.values())

    def tensor_peak(self, work: Workload, finished: Finished, anew: bool = False) -> Quantity:
        if finished.program:
            compiled, form = finished.program(), "the program"
        else:
            inputs, state = work.inputs, (work.model.params, work.model.rest)
            with persistent_cache():
                compiled = jax.jit(work.model.function()).lower(*state, *inputs.args, **inputs.kwargs).compile()
            form = "its jitted form (op by op it may need more)"
        analysis = compiled.memory_analysis()
        if analysis is None:
            return Quantity.missing("B", f"XLA gives no memory analysis on {work.device!r}")
        unseen = compiled.as_text().count("kind=kCustom") if work.device == "cpu" else 0
        if unseen and anew and work.trains:
            try:
                compiled = finished.trainer.program.lowered.compile(compiler_options=WITHOUT_YNNPACK)
            except jax.errors.JaxRuntimeError as error:
                return Quantity.missing("B", f"XLA cannot be asked to count what YNNPACK takes ({error})")
            analysis, form, unseen = compiled.memory_analysis(), f"{form}, compiled without YNNPACK", 0
        if unseen:
            return Quantity.missing("B", f"XLA runs {unseen} fusion(s) in YNNPACK, whose memory it does not count")
        peak = analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        return Quantity(peak, "B", method=f"XLA memory analysis of {form}: temporaries and outputs")

    def optimizer_state(self, work: Workload, finished: Finished) -> Quantity:
        if not work.trains:
            return NO_OPTIMIZER
        leaves = [leaf for leaf in jax.tree.leaves(finished.trainer.state[2]) if isinstance(leaf, jax.Array)]
        near = [leaf for leaf in leaves if leaf.sharding.memory_kind in (None, _memory_kind(leaf))]
        return Quantity(float(sum(map(device_bytes, near))), "B", method="arrays of the optax state in device memory")

    def traffic(self, work: Workload, finished: Finished) -> Traffic:
        from perfkit.parallel.jax_collectives import collectives, told

        parts = finished.trainer.program.parts() if finished.trainer else [(finished.program(), 1)]
        sent_bytes, lines = 0.0, []
        for compiled, steps in parts:
            found = collectives(compiled.as_text(), work.world.devices)
            sent_bytes += sum(item.sent_bytes for item in found) / steps
            lines.append(told(found) if steps == 1 else f"every {steps} steps {told(found)}")
        method = f"HLO of the compiled program, as a ring sends it: {'; '.join(lines)}"
        sent = Quantity(sent_bytes, "B", method=method)
        return Traffic(sent, Quantity.missing("ratio", "XLA's program is one call: JAX does not tell its parts' times"))

    def watching_compiles(self):
        return watching()

    def compiled_baseline(self, work: Workload) -> Workload | None:
        if work.trains or hasattr(work.model.original, "lower"):
            return None  # jitted already: the training step by perfkit, the function by its caller
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

    def _check_runs(self, work: Workload) -> None:
        inputs, name = work.inputs, work.model.name
        with self.preserved():
            try:
                outputs, _ = work.model.function()(work.model.params, work.model.rest, *inputs.args, **inputs.kwargs)
            except Exception as error:
                raise does_not_run(name, self.describe(inputs), error) from error
            if not any(True for _ in self.leaves(outputs)):
                raise InvalidInputError(f"{name} returned a {type(outputs).__name__} without any array in it")
            if work.training is not None:
                check_loss(work.training, outputs, lambda loss: getattr(loss, "shape", None))


def as_inputs(model: JaxModel, example_inputs: Any) -> Inputs:
    """A tuple as positional arguments, a dict as keywords if its keys are the model's parameters, else one argument."""
    if isinstance(example_inputs, Inputs):
        return example_inputs
    if isinstance(example_inputs, tuple) and not hasattr(example_inputs, "_fields"):
        return Inputs(example_inputs)
    if isinstance(example_inputs, Mapping):
        function, leading = model.signature_of
        names = list(inspect.signature(function).parameters)[leading:]
        if set(example_inputs) <= set(names):
            return Inputs((), dict(example_inputs))
    return Inputs((example_inputs,))


def _arrays(inputs: Inputs) -> Inputs:
    args, kwargs = jax.tree.map(
        lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, (inputs.args, dict(inputs.kwargs))
    )
    return Inputs(args, kwargs)


def _model(model: Any, params: Any, mode: str) -> JaxModel:
    if isinstance(model, nnx.Module):
        if params is not None:
            raise InvalidInputError("params= is for functions and flax linen modules: an nnx module holds its own")
        module = nnx.clone(model)
        module.train() if mode == "training" else module.eval()
        return NnxModel.of(module)
    if is_linen(model):
        if params is None:
            raise InvalidInputError(
                f"{type(model).__name__} is a flax linen module, which does not hold its variables: "
                "pass them as params=module.init(key, *inputs)"
            )
        rest = dict(params)
        if "params" not in rest:
            raise InvalidInputError(f"params has the collections {sorted(rest)}, and linen's variables have 'params'")
        return LinenModel(original=model, params=rest.pop("params"), rest=rest, trains=mode == "training")
    if mode == "training" and params is None:
        raise InvalidInputError("mode='training' needs what to train: pass params= and a function of (params, *inputs)")
    return FunctionModel(original=model, params=params)


def _check_finite(params: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if jnp.issubdtype(getattr(leaf, "dtype", None), jnp.floating):
            bad = int(jnp.sum(~jnp.isfinite(leaf)))
            if bad:
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                raise InvalidInputError(
                    f"parameter {name!r} holds {bad} NaN or infinite of {leaf.size} values: repair them first"
                )


def _check_optimizer(optimizer: Any) -> None:
    if not isinstance(optimizer, optax.GradientTransformation):
        raise InvalidInputError(
            f"optimizer is a {type(optimizer).__name__}: expected an optax transformation such as optax.adam(1e-3)"
        )


def _device(model: JaxModel, inputs: Inputs | None) -> str:
    arrays = jax.tree.leaves((model.params, inputs and (inputs.args, dict(inputs.kwargs))))
    platforms = {device.platform for leaf in arrays if isinstance(leaf, jax.Array) for device in leaf.devices()}
    return next(iter(platforms - {"cpu"}), "cpu") if platforms else jax.default_backend()


def _finished_training(work: Workload) -> Finished:
    trainer, held = Trainer(work), work.model
    if isinstance(held, NnxModel):
        module, _ = dressed(held)
        into = writer(module)

        def write() -> None:
            into(*trainer.pieces)

        if held.placement.scattered:
            _gathering(module, trainer, held)
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

    rounds = Rounds(settle, trainer.program.skip_warm_up) if trainer.program.rounds else None
    return Finished(model, call, keeping_state, train_step, params, program, trainer, restore, rounds)


def _memory_kind(leaf: jax.Array) -> str:
    return next(iter(leaf.devices())).default_memory().kind


def _gathering(module: nnx.Module, trainer: Trainer, model: NnxModel) -> None:
    """Let a call of a module gather its parameters from all devices first."""
    programs: dict[Any, Callable] = {}

    def run(function, key, _, rest, args, kwargs):
        if key not in programs:
            programs[key] = jax.jit(changing(function))
        return programs[key](trainer.held[0], rest, args, kwargs)

    run_by(module, model, run)


def _nowhere() -> None:
    """A function holds no state to write to."""


BACKEND = JaxBackend()
