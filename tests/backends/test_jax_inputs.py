"""What callers pass to JAX models beside arrays: settings, numbers that code reads, and what cannot be used."""

import dataclasses
import functools
import re

import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx

import perfkit
from perfkit import DoesNotRunError, InvalidInputError, UnsupportedError, backends
from perfkit._chain import chain_of
from perfkit._variant import apply
from perfkit.backends.jax_compile import watching
from perfkit.backends.jax_inputs import Setting, as_written, checked_params, with_settings

pytestmark = pytest.mark.usefixtures("hasty")  # numbers and messages are looked at, no speed

W = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
X = jnp.asarray(np.random.default_rng(1).normal(size=(6, 4)), jnp.float32)


class Network(linen.Module):
    """As most linen modules are: a flag switches batch norm and dropout over."""

    @linen.compact
    def __call__(self, x, train: bool = False):
        x = linen.BatchNorm(use_running_average=not train)(linen.Dense(8)(x))
        return linen.Dense(3)(linen.Dropout(0.5, deterministic=not train)(x))


def _optimized(function, recipe, inputs, **given):
    return perfkit.optimize(function, recipe, params={"w": W}, example_inputs=inputs, **given)


def test_settings_are_no_leaves_and_come_back_as_they_were():
    given = (X, {"train": True, "act": "tanh", "kind": float, "by": jnp.tanh, "scale": 2, "none": None})
    marked = with_settings(given)
    assert len(jax.tree.leaves(marked)) == 2, "the array and the number"
    assert as_written(marked)[1] == given[1]
    assert len(jax.tree.leaves(with_settings(given, numbers=True))) == 1
    assert Setting(bool, True) != Setting(int, 1), "a program for one must not run for the other"


@pytest.mark.parametrize("recipe", ["compile", "half", "bf16+compile", "fused_kernels", "int8_dynamic"])
def test_flags_and_names_are_read_by_the_model(recipe):
    def function(params, x, double=False, act="relu"):
        y = getattr(jax.nn, act)(x @ params["w"])
        return y * 2 if double else y

    result = _optimized(function, recipe, {"x": X, "double": True, "act": "tanh"})
    for setting in ({"double": True, "act": "tanh"}, {"double": False, "act": "tanh"}, {"act": "relu"}):
        expected = np.asarray(function({"w": W}, X, **setting))
        np.testing.assert_allclose(result(X, **setting), expected, atol=0.05 * np.abs(expected).max())


def test_numbers_are_traced_unless_the_code_reads_them():
    traces = []

    def scaled(params, x, by):
        traces.append(by)
        return x @ params["w"] * by

    def repeated(params, x, times):
        return sum(x @ params["w"] for _ in range(times))

    result = _optimized(scaled, "compile", (X, 2.0))
    traces.clear()
    np.testing.assert_allclose(result(X, 3.0), X @ W * 3, rtol=1e-5)
    assert not traces, "another number is no reason to compile again"
    result = _optimized(repeated, "compile", (X, 2))
    np.testing.assert_allclose(result(X, 5), X @ W * 5, rtol=1e-5)


def test_a_number_that_the_code_reads_at_a_later_call_alone():
    class Repeated(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(W)

        def __call__(self, x, times=1):
            return sum(x @ self.w for _ in range(times))

    for kind in (Repeated(), lambda params, x, times=1: sum(x @ params["w"] for _ in range(times))):
        result = perfkit.apply(
            kind, "compile", example_inputs=(X,), params=None if isinstance(kind, nnx.Module) else {"w": W}
        )
        np.testing.assert_allclose(result(X, 5), X @ W * 5, rtol=1e-5)
        with pytest.raises(UnsupportedError, match=r"reads the value of an array.*jax\.lax\.cond"):
            result(X, jnp.int32(5))


def test_a_flag_in_training_reaches_batch_norm_and_dropout():
    variables = Network().init(jax.random.key(0), X)
    inputs = {"x": X, "train": True, "rngs": {"dropout": jax.random.key(1)}}
    targets = jnp.ones((6, 3))
    optimizer = optax.sgd(0.1)
    result = perfkit.optimize(
        Network(),
        "compile",
        params=variables,
        mode="training",
        example_inputs=inputs,
        targets=targets,
        loss=lambda outputs, targets: jnp.mean((outputs - targets) ** 2),
        optimizer=optimizer,
    )

    def loss(params, rest, key):
        outputs, new = Network().apply(
            {"params": params, **rest}, X, train=True, rngs={"dropout": key}, mutable=["batch_stats"]
        )
        return jnp.mean((outputs - targets) ** 2), new

    params, rest = variables["params"], {"batch_stats": variables["batch_stats"]}
    state = optimizer.init(params)
    for seed in range(3):
        key = jax.random.key(seed)
        (expected, rest), gradients = jax.value_and_grad(loss, has_aux=True)(params, rest, key)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        got = result.train_step((inputs | {"rngs": {"dropout": key}}, targets))
        assert float(got) == pytest.approx(float(expected), rel=1e-4)
    statistics = jax.tree.leaves(result.params["batch_stats"])
    for ours, expected in zip(statistics, jax.tree.leaves(rest["batch_stats"]), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-5)


def test_a_function_of_any_keywords():
    def function(params, **inputs):
        return sum(x @ params["w"] for x in inputs.values())

    result = _optimized(function, "compile", {"left": X, "right": X})
    np.testing.assert_allclose(result(left=X, right=X), 2 * X @ W, rtol=1e-5)


def test_numbers_and_numpy_among_parameters():
    params = {"w": np.asarray(W), "scale": 2, "offset": np.float32(1)}

    def function(params, x):
        return x @ params["w"] * params["scale"] + params["offset"]

    for recipe in ("half", "compile"):
        result = perfkit.optimize(function, recipe, params=params, example_inputs=(X,))
        np.testing.assert_allclose(result(X), X @ W * 2 + 1, atol=0.2)
    assert type(params["scale"]) is int
    assert type(params["w"]) is np.ndarray


def _reading(params, x):
    return x @ params["w"] if x.sum() > -1e9 else x


@pytest.mark.parametrize("recipe", ["compile", "bf16", "prune"])
def test_code_that_reads_an_array_is_told_what_to_do(recipe):
    with pytest.raises(UnsupportedError, match=r"reads the value of an array.*jax\.lax\.cond"):
        _optimized(_reading, recipe, (X,))


def test_what_needs_no_trace_works_on_code_that_reads_an_array():
    result = _optimized(_reading, "half", (X,))
    np.testing.assert_allclose(result(X), X @ W, atol=0.1)
    assert result.report.against_compiled is None
    assert "no plain compiled original" in " ".join(result.report.notes)
    assert result.report.before.tensor_peak_bytes.value is None


def test_what_does_not_compute_on_parameters_is_no_effect_and_changes_nothing():
    result = perfkit.optimize(lambda x: x @ W, "half", example_inputs=(X,))
    assert result.report.steps[0].effect.status == "NO_EFFECT"
    assert "no floating-point parameters" in result.report.steps[0].effect.notes[0]
    np.testing.assert_array_equal(result(X), X @ W)


def test_half_gives_outputs_back_in_the_dtypes_they_had():
    def function(params, x):
        y = x @ params["w"]
        return y, y.astype(jnp.float16), y.astype(jnp.bfloat16), y.argmax(-1)

    result = _optimized(function, "half", (X,))
    assert [leaf.dtype for leaf in result(X)] == [leaf.dtype for leaf in function({"w": W}, X)]
    with jax.enable_x64(True):
        x = np.asarray(X, np.float64)
        result = perfkit.optimize(lambda w, x: x @ w, "half", params=W.astype("float64"), example_inputs=(x,))
        assert result(x).dtype == jnp.float64


def test_half_tells_what_to_take_where_an_operation_has_no_16_bits():
    def spectrum(params, x):
        return jnp.abs(jnp.fft.rfft(x @ params["w"])) @ params["w"][:2]

    with pytest.raises(UnsupportedError, match=r"RFFT .* got bfloat16\. Choose 'bf16' or 'fp16'"):
        _optimized(spectrum, "half", (X,))
    for recipe in ("bf16", "fp16"):
        assert _optimized(spectrum, recipe, (X,)).report.fidelity.ok


@pytest.mark.parametrize("recipe", ["bf16", "fp16"])
def test_a_model_without_a_product_to_lower_stays_as_it_is(recipe):
    def exact(params, x):
        return jnp.matmul(x, params["w"], precision="highest")

    given = {"mode": "inference", "loss": None, "targets": None, "optimizer": None, "seed": 0}
    work = backends.of(exact, (X,)).bind(exact, {"w": W}, (X,), **given)
    applied = apply(chain_of(recipe), work)
    assert applied.works[0].model is work.model
    assert "HIGHEST was asked for" in applied.steps[0].effect.skipped[0].reason


def test_half_names_parameters_as_other_recipes_do():
    plan = perfkit.plan(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), "half", example_inputs=(X,))
    assert plan.steps[0].effect.touched == ("bias", "kernel")


def test_half_does_nothing_to_what_is_in_16_bits():
    params = {"low": W.astype("bfloat16"), "wide": W}
    plan = perfkit.plan(lambda p, x: x @ p["low"] + x @ p["wide"], "half", params=params, example_inputs=(X,))
    assert plan.steps[0].effect.touched == ("wide",)
    assert "already" in plan.steps[0].effect.skipped[0].reason
    plan = perfkit.plan(lambda p, x: x @ p["low"], "half", params={"low": params["low"]}, example_inputs=(X,))
    assert plan.steps[0].effect.status == "NO_EFFECT"


class _Module:
    """Stands for `equinox.Module`, which need not be installed: known by its name and its package."""

    __module__ = "equinox._module"


_Module.__name__ = "Module"


class _Mlp(_Module):
    def __call__(self, x):
        return x


class _Pair:
    """As haiku's `Transformed`: it holds functions, and is none."""

    def apply(self, params, x):
        return x


def test_auto_leaves_out_what_cannot_be_traced_and_says_why():
    result = perfkit.optimize(_reading, params={"w": W}, example_inputs=(X,), budget_s=1)
    reasons = {item.recipe: item.reason for item in result.report.candidates}
    assert "reads the value of an array" in reasons["bf16"]
    assert "reads the value of an array" in reasons["compile"]
    assert "reads the value of an array" in str(perfkit.plan(_reading, params={"w": W}, example_inputs=(X,)))


def _donated(params, x):
    return x + 1, params["w"] + 1


@dataclasses.dataclass
class _Batch:
    x: jax.Array


CASES = {
    "unregistered input": (lambda: {"example_inputs": (_Batch(X),)}, "hold a _Batch (argument 0)"),
    "unregistered output": (lambda: {"model": lambda params, x: _Batch(x)}, "register the class as a pytree"),
    "abstract input": (lambda: {"example_inputs": (jax.ShapeDtypeStruct((6, 4), jnp.float32),)}, "without numbers"),
    "abstract parameters": (lambda: {"params": jax.eval_shape(lambda: {"w": W})}, "'w' is a shape without numbers"),
    "text among parameters": (lambda: {"params": {"w": W, "act": "relu"}}, "'act' is a str"),
    "equinox": (lambda: {"model": _Mlp(), "params": None}, "equinox.partition"),
    "haiku": (lambda: {"model": _Pair()}, "such as its .apply"),
    "bound": (lambda: {"model": linen.Dense(3).bind({"params": {"kernel": W}}), "params": None}, "model.unbind()"),
    "inner collection": (lambda: {"model": linen.Dense(3)}, "params={'params': ...}"),
    "donated parameters": (lambda: {"model": jax.jit(_donated, donate_argnums=0)}, "_donated donates its parameters"),
    "donated input": (lambda: {"model": jax.jit(_donated, donate_argnums=1)}, "_donated donates argument 0 "),
    "NaN inputs": (lambda: {"example_inputs": (X * jnp.nan,)}, "nothing but NaN"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_used_is_said(case):
    changes, said = CASES[case]
    given = {"model": lambda params, x: x @ params["w"], "params": {"w": W}, "example_inputs": (X,)}
    with pytest.raises(InvalidInputError) as raised:
        perfkit.optimize(**(given | changes()), recipe="half")
    assert said in str(raised.value)
    assert not X.is_deleted()
    assert not W.is_deleted()


@jax.tree_util.register_pytree_node_class
class Layer:
    """A pytree that is called."""

    def __init__(self, w):
        self.w = w

    def __call__(self, x):
        return x @ self.w

    def tree_flatten(self):
        return (self.w,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_a_pytree_that_is_called_is_told_how_to_pass_its_arrays():
    layer, x, how = Layer(jnp.ones((4, 3))), jnp.ones((2, 4)), "with params=model"
    with pytest.warns(perfkit.PerfkitWarning, match=rf"Layer is a pytree, whose 1 array.*{how}"):
        perfkit.plan(layer, "half", example_inputs=(x,))
    training = {"mode": "training", "targets": jnp.ones((2, 3)), "loss": lambda out, y: (out - y).mean()}
    with pytest.raises(InvalidInputError, match=rf"Layer is a pytree: .*{how}"):
        perfkit.plan(layer, "donate", example_inputs=(x,), optimizer=optax.sgd(0.1), **training)
    passed = perfkit.plan(lambda model, *inputs: model(*inputs), "half", params=layer, example_inputs=(x,))
    assert passed.steps[0].effect.touched


def test_linen_modules_that_need_more_are_told_how():
    attention = linen.MultiHeadDotProductAttention(num_heads=2, qkv_features=4, decode=True)
    x = jnp.ones((2, 3, 4))
    variables = attention.init(jax.random.key(0), x)
    with pytest.raises(DoesNotRunError, match=r"mutable=\['cache'\]"):
        perfkit.optimize(attention, "half", params=variables, example_inputs=(x[:, :1],))

    def told(variables, x):
        return attention.apply(variables, x, mutable=["cache"])

    result = perfkit.optimize(told, "compile", params=variables, example_inputs=(x[:, :1],))
    outputs, new = result(x[:, :1])
    expected, cache = told(variables, x[:, :1])
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-6)
    assert int(new["cache"]["cache_index"]) == int(cache["cache"]["cache_index"]) == 1
    variables = Network().init(jax.random.key(0), X)
    with pytest.raises(DoesNotRunError, match=r"leave train=True out.*mutable=\['batch_stats'\]"):
        perfkit.optimize(Network(), "half", params=variables, example_inputs={"x": X, "train": True})
    for name in ("dropout", "noise"):
        dropout = linen.Dropout(0.5, deterministic=False, rng_collection=name)
        with pytest.raises(DoesNotRunError, match=re.escape(f"'rngs': {{'{name}': key}}")):
            perfkit.optimize(dropout, "half", params={"params": {}}, example_inputs=(X,))


def test_random_draws_are_not_held_against_others():
    """The draws of a float64 run are others: against them, any result would be as good as the original."""

    def noisy(params, x, key):
        return x @ params["w"] + jax.random.normal(key, (6, 3))

    for recipe, wrong in (("compile", False), ("half", True)):
        result = perfkit.optimize(
            functools.partial(noisy), recipe, params={"w": W}, example_inputs=(X, jax.random.key(0))
        )
        close = result.report.fidelity
        assert "draws random numbers" in close.reference
        assert close.original_error == 0
        assert (close.relative_error > 16 * 2**-24) == wrong  # sums of four products in another order are float32's


def test_complex_numbers_are_compared_with_wider_ones():
    """A run of complex64 numbers is no float64 run: against itself everything is exact."""
    params = {"w": W + 1j * W[::-1]}
    for told, function in (
        ("a float64 run of the original", lambda params, x: x @ params["w"]),
        ("the model fixes its dtype: an output stayed complex64", lambda params, x: (x @ params["w"]).astype("F")),
    ):
        found = perfkit.optimize(function, "compile", params=params, example_inputs=(X + 1j,)).report.fidelity
        assert told in found.reference
        assert (found.original_error > 0) == (told == found.reference)


def test_a_number_among_outputs():
    def function(params, x):
        return {"y": x @ params["w"], "rows": x.shape[0]}

    result = _optimized(function, "compile", (X,))
    assert int(result(X)["rows"]) == 6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_looking_for_what_is_not_finite_compiles_nothing(dtype):
    params = {"a": jnp.ones((3, 7), dtype).at[1].set(jnp.nan), "b": np.ones(11, np.float32)}
    with watching() as log:
        with pytest.raises(InvalidInputError, match=r"'a' holds 7 NaN or infinite of 21 values"):
            checked_params(params)
        assert log().graphs == 0
