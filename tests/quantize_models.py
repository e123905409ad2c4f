"""Models to quantize, recipes to do it with, and looking into what was compiled. Plain helpers, no tests."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from perfkit import LayerRecipe, Stage
from perfkit._workload import Workload
from perfkit.backends.jax_backend import BACKEND
from perfkit.quantization import jax_quantize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantize(LayerRecipe):
    """What the recipes of the library do for JAX: calls one function of jax_quantize."""

    stage = Stage.QUANTIZATION
    provides = "precision"
    tolerance = 5e-2

    how: str = "int8"
    weight_bits: int = 8

    def jax(self, work):
        return HOW[self.how](work, self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FakeQuantize(Quantize):
    retrains = True

    def jax(self, work):
        return jax_quantize.qat(work, self)


HOW: dict[str, Callable] = {
    "int8": jax_quantize.int8,
    "int8_dynamic": jax_quantize.int8_dynamic,
    "int8_weight_only": lambda work, recipe: jax_quantize.weight_only(work, recipe, 8),
    "int4_weight_only": lambda work, recipe: jax_quantize.weight_only(work, recipe, 4),
    "fp8": jax_quantize.in_float8,
}


class Cnn(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 8, (3, 3), padding="SAME", rngs=rngs)
        self.conv2 = nnx.Conv(8, 8, (3, 3), feature_group_count=2, strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.fc = nnx.Linear(8 * 4 * 4, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv2(nnx.relu(self.conv1(x)))))
        return self.fc(x.reshape(x.shape[0], -1))


class Recurrent(nnx.Module):
    """An embedding, a recurrent layer over it, one output."""

    def __init__(self, cell, rngs):
        self.embedding = nnx.Embed(50, 12, rngs=rngs)
        self.rnn = nnx.RNN(cell(12, 16, rngs=rngs), rngs=False)
        self.fc = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, ids):
        x = self.embedding(ids)
        start = self.rnn.cell.initialize_carry((x.shape[0], 12), nnx.Rngs(0))
        return self.fc(self.rnn(x, initial_carry=start)[:, -1])


class Sequence(linen.Module):
    """linen's optimized LSTM lays the weights of its gates side by side before it multiplies."""

    @linen.compact
    def __call__(self, x):
        hidden = linen.RNN(linen.OptimizedLSTMCell(16))(x)
        return linen.Dense(3)(hidden[:, -1])


def attention(params, x, scale):
    """A function of nested parameters; weights as they stand in an einsum, transposed, and on the left."""
    with_heads = jnp.einsum("btd,dhk->bthk", x, params["attention"]["query"])
    scores = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", with_heads, with_heads) * scale)
    mixed = jnp.einsum("bhts,bshk->bthk", scores, with_heads)
    out = jnp.einsum("bthk,hkd->btd", mixed, params["attention"]["out"])
    out = jax.nn.gelu(out @ params["up"]["w"].T) + params["up"]["b"]
    return jnp.einsum("od,btd->bto", params["down"], out)


def stacked(params, x):
    """Layers scanned over, the way large models keep them, each recomputed in the backward pass; then a branch."""

    @jax.checkpoint
    def layer(x, w):
        return jnp.tanh(x @ w), None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    x = jax.lax.cond(x.sum() > -jnp.inf, lambda w, x: x @ w, lambda w, x: x @ w / 2, params["out"], x)
    return jax.lax.fori_loop(0, 2, lambda _, x: jax.jit(lambda w, x: x + jnp.tanh(x @ w))(params["loop"], x), x)


NAMES = "cnn", "lstm", "gru", "simple", "linen", "function", "control"


def case(name: str) -> tuple[dict[str, Any], set[str]]:
    """Keyword arguments of optimize, and the layers of the model."""
    keys = jax.random.split(jax.random.key(0), 12)
    normal = jax.random.normal
    images, ids = normal(keys[0], (6, 8, 8, 1)), jax.random.randint(keys[1], (4, 7), 0, 50)
    tokens = normal(keys[2], (4, 5, 6))
    sequence = Sequence()
    weights = {
        "attention": {"query": normal(keys[3], (6, 2, 3)), "out": normal(keys[4], (2, 3, 6))},
        "up": {"w": normal(keys[5], (8, 6)), "b": jnp.ones(8)},
        "down": normal(keys[6], (4, 8)),
    }
    deep = {
        "layers": normal(keys[7], (3, 8, 8)) / 3,
        "out": normal(keys[8], (8, 8)) / 3,
        "loop": normal(keys[9], (8, 8)) / 3,
    }
    recurrent = {"embedding", "fc", "rnn.cell.dense_h", "rnn.cell.dense_i"}
    gates = {f"OptimizedLSTMCell_0.{side}{gate}" for side in "ih" for gate in "ifgo"}
    gru = {f"rnn.cell.dense_{part}" for part in ("h", "i")}
    made = {
        "cnn": lambda: ({"model": Cnn(nnx.Rngs(0)), "example_inputs": (images,)}, {"conv1", "conv2", "fc"}),
        "lstm": lambda: ({"model": Recurrent(nnx.OptimizedLSTMCell, nnx.Rngs(1)), "example_inputs": (ids,)}, recurrent),
        "gru": lambda: (
            {"model": Recurrent(nnx.GRUCell, nnx.Rngs(2)), "example_inputs": (ids,)},
            {"embedding", "fc", *gru},
        ),
        "simple": lambda: ({"model": Recurrent(nnx.SimpleCell, nnx.Rngs(3)), "example_inputs": (ids,)}, recurrent),
        "linen": lambda: (
            {"model": sequence, "params": sequence.init(keys[10], tokens), "example_inputs": (tokens,)},
            {"Dense_0", *gates},
        ),
        "function": lambda: (
            {"model": attention, "params": weights, "example_inputs": (tokens, 0.5)},
            {"attention.query", "attention.out", "up", "down"},
        ),
        "control": lambda: (
            {"model": stacked, "params": deep, "example_inputs": (normal(keys[11], (4, 8)),)},
            {"layers", "out", "loop"},
        ),
    }
    return made[name]()


def bound(model: Any, example_inputs: Any = None, params: Any = None, **training: Any) -> Workload:
    """The workload that optimize() would hand to a recipe."""
    training = {"mode": "inference", "loss": None, "targets": None, "optimizer": None, **training}
    return BACKEND.bind(model, params, example_inputs, seed=0, **training)


def program(work: Workload) -> tuple[str, Any]:
    """What XLA makes of a call of the model, as text, and what the call returns."""
    inputs, function = work.inputs, work.model.function()
    arrays = [arg for arg in inputs.args if hasattr(arg, "dtype")]

    def call(params, rest, *arrays):
        left = iter(arrays)
        args = [next(left) if hasattr(arg, "dtype") else arg for arg in inputs.args]
        return function(params, rest, *args, **inputs.kwargs)[0]

    compiled = jax.jit(call).lower(work.model.params, work.model.rest, *arrays).compile()
    return compiled.as_text(), compiled(work.model.params, work.model.rest, *arrays)


def products(program: str, dtype: str) -> list[str]:
    """The dots and convolutions of a compiled program whose sums are of a dtype ("s32", "f32"), kernels' included."""
    found = re.findall(rf"= {dtype}\[[^ ]* (dot|convolution)\(", program)
    if dtype == "s32":
        kernels = re.findall(r'custom_call_target="perfkit_(linear|conv2d|rnn)_int8(?:_static)?_xla"', program)
        of_kernel = {"linear": ["dot"], "conv2d": ["convolution"], "rnn": ["dot", "dot"]}  # of the input, of the state
        found += [product for kernel in kernels for product in of_kernel[kernel]]
    return found
