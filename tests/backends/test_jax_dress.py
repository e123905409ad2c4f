"""Optimized JAX models take the place of the caller's: with its state, copied, saved, and whatever it is made of."""

import copy
import functools
import pickle

import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

import perfkit
from perfkit import UnsupportedError
from perfkit.backends import jax_dress

pytestmark = pytest.mark.usefixtures("hasty")  # numbers and messages are looked at, no speed

X = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4)), jnp.float32)


class Raw(nnx.Module):
    """State that is no variable: positions, a counter, a number, some in containers, one named as a method of dict."""

    def __init__(self, rngs):
        self.fc = nnx.Linear(4, 4, rngs=rngs)
        self.positions, self.table = jnp.arange(4.0), np.ones(4, np.float32)
        self.more = nnx.data({"items": jnp.ones(4), "list": [jnp.full(4, 2.0)]})
        self.layers = nnx.List([jnp.full(4, 3.0)])
        self.calls, self.factor = jnp.zeros(()), nnx.data(0.5)

    def __call__(self, x):
        self.calls = self.calls + 1
        self.more["list"][0] = self.more["list"][0] * 2
        y = self.fc(x) + self.positions + self.table + self.more["items"] * self.more["list"][0] + self.layers[0]
        return y * self.calls * self.factor


class Carrying(nnx.Module):
    """A variable that holds a tree."""

    def __init__(self, rngs):
        self.cell = nnx.LSTMCell(4, 5, rngs=rngs)
        self.carry = nnx.Variable((jnp.zeros((3, 5)), jnp.zeros((3, 5))))

    def __call__(self, x):
        carry, y = self.cell(self.carry.get_value(), x)
        self.carry.set_value(carry)
        return y


class Sowing(nnx.Module):
    """A call adds a variable."""

    def __init__(self, rngs):
        self.fc = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        y = self.fc(x)
        self.seen = nnx.Intermediate(y)
        return y * 2


class Growing(nnx.Module):
    """Layers in a list, and a setting."""

    def __init__(self, rngs):
        self.fc, self.factor = nnx.Linear(4, 4, rngs=rngs), 2.0
        self.more = nnx.List([nnx.Linear(4, 4, rngs=rngs)])

    def __call__(self, x):
        for layer in self.more:
            x = layer(x)
        return self.fc(x) * self.factor


@pytest.mark.parametrize("recipe", ["compile", "half"])
@pytest.mark.parametrize("kind", [Raw, Carrying, Sowing])
@pytest.mark.filterwarnings("ignore:Sowing adds state:perfkit.PerfkitWarning")
def test_state_of_every_kind_is_used_and_written(kind, recipe):
    model = kind(nnx.Rngs(0))
    expected = [np.asarray(run(X)) for run in [nnx.clone(model)] * 3]
    before = jax.tree.map(np.asarray, nnx.split(model)[1])
    result = perfkit.optimize(model, recipe, example_inputs=(X,))
    for y in expected:
        np.testing.assert_allclose(result(X), y, atol=0.05 * np.abs(y).max())
    jax.tree.map(np.testing.assert_array_equal, before, nnx.split(model)[1])


def test_state_that_a_call_adds_is_told():
    with pytest.warns(perfkit.PerfkitWarning, match="which the result does not keep: seen"):
        perfkit.optimize(Sowing(nnx.Rngs(0)), "half", example_inputs=(X,))


def test_parameters_that_a_call_writes_are_told():
    class Writing(nnx.Module):
        def __init__(self):
            self.read, self.written = nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.Param(jnp.ones(4))

        def __call__(self, x):
            self.written.set_value(self.written[...] * 0.5)
            self.read.kernel.set_value(self.read.kernel[...] * 1)
            return self.read(x) + self.written

    with pytest.warns(perfkit.PerfkitWarning, match=r"writes to parameters when it is called.*them: written$"):
        perfkit.apply(Writing(), "compile", example_inputs=(X,))


def test_new_values_in_arrays_that_are_no_variables():
    model = perfkit.optimize(Raw(nnx.Rngs(0)), "compile", example_inputs=(X,)).model
    plain = Raw(nnx.Rngs(0))
    for each in (model, plain):
        each.positions = jnp.full(4, 7.0)
        each.more["items"] = jnp.zeros(4)
    np.testing.assert_allclose(model(X), plain(X), rtol=1e-5)


CHANGES = [
    lambda module: setattr(module, "factor", 3.0),
    lambda module: setattr(module.fc, "kernel", nnx.Param(jnp.ones((4, 4)))),
    lambda module: setattr(module, "fc", nnx.Linear(4, 4, rngs=nnx.Rngs(1))),
    lambda module: module.more.append(nnx.Linear(4, 4, rngs=nnx.Rngs(2))),
    lambda module: module.fc.kernel.set_value(module.fc.kernel[...] * 2),
]


def test_what_is_put_into_a_module_later_is_used():
    model = perfkit.optimize(Growing(nnx.Rngs(0)), "compile", example_inputs=(X,)).model
    plain = Growing(nnx.Rngs(0))
    for change in CHANGES:
        for each in (model, plain):
            change(each)
        np.testing.assert_allclose(model(X), plain(X), rtol=1e-5, atol=1e-5)


def test_a_module_that_nothing_was_put_into_is_not_looked_through_again(monkeypatch):
    model = perfkit.optimize(Growing(nnx.Rngs(0)), "compile", example_inputs=(X,)).model
    expected, other = np.asarray(model(X)), copy.deepcopy(model)
    monkeypatch.delattr(jax_dress, "Gathered")
    np.testing.assert_array_equal(model(X), expected)
    with pytest.raises(NameError):
        other(X)


def test_copies_go_their_own_way_and_pickling_is_refused_with_what_to_do():
    given = Raw(nnx.Rngs(0))
    model = perfkit.optimize(given, "compile", example_inputs=(X,)).model
    other = copy.deepcopy(model)
    first = np.asarray(model(X))
    np.testing.assert_allclose(other(X), first, rtol=1e-5)
    assert float(other.calls) == float(model.calls) == 1
    with pytest.raises(UnsupportedError, match=r"cannot be pickled: .* save nnx\.state"):
        pickle.dumps(model)


def _function(params, x):
    return x @ params


def test_a_function_is_copied_and_not_pickled():
    result = perfkit.optimize(_function, "compile", params=jnp.eye(4), example_inputs=(X,))
    np.testing.assert_allclose(copy.deepcopy(result.model)(jnp.eye(4), X), X, rtol=1e-5)
    with pytest.raises(UnsupportedError, match=r"cannot be pickled: .* save result\.params"):
        pickle.dumps(result.model)


def test_parameters_by_name_and_parameters_of_another_kind():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(4, 64)), jnp.float32)
    result = perfkit.optimize(_function, "int8_weight_only", params=w, example_inputs=(X,))
    first = np.asarray(result(X))
    np.testing.assert_array_equal(result.model(params=result.params, x=X), first)
    with pytest.raises(perfkit.InvalidInputError, match=r"given others: pass result\.params"):
        result.model(w, X)
    with pytest.raises(perfkit.InvalidInputError, match=r"takes its parameters first"):
        result.model(x=X)


@pytest.mark.parametrize("variables", [{}, {"params": {}}, {"scales": {"fixed": jnp.full((4,), 3.0)}}], ids=sorted)
def test_linen_variables_keep_their_form_also_without_parameters(variables):
    class Fixed(linen.Module):
        @linen.compact
        def __call__(self, x):
            return x * self.get_variable("scales", "fixed", 2.0)

    result = perfkit.apply(Fixed(), "compile", params=variables, example_inputs=(X,))
    assert jax.tree.structure(result.params) == jax.tree.structure(variables)
    np.testing.assert_array_equal(result.model(result.params, X), (3 if "scales" in variables else 2) * X)


class _Named:
    """A callable whose other methods are called as those of linen modules and jitted functions."""

    def __call__(self, params, x):
        return x @ params

    def apply(self, name):
        raise AssertionError(name)

    def lower(self):
        return "named"


def test_a_callable_is_called_whatever_its_other_methods_are():
    result = perfkit.optimize(_Named(), "half", params=jnp.eye(4), example_inputs=(X,))
    np.testing.assert_allclose(result(X), X, atol=0.05)
    assert result.report.against_compiled is not None


@pytest.mark.parametrize("kind", ["module", "function"])
def test_a_transfer_guard_stops_what_the_caller_left_on_the_host_and_no_constants_of_the_model(kind):
    if kind == "module":
        model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), lambda x: jnp.maximum(x, 0.5))
        model = perfkit.apply(model, "bf16", example_inputs=(X,)).model
    else:
        given = {"params": {"w": jnp.eye(4)}, "example_inputs": (X,)}
        result = perfkit.apply(lambda params, x: jnp.maximum(x @ params["w"], 0.5), "bf16", **given)
        model = functools.partial(result.model, result.params)
    with jax.transfer_guard("disallow"):
        y = model(X)
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"host-to-device transfer.*\[3,4\]"):
            model(np.asarray(X))
    assert np.array_equal(y, model(X))
