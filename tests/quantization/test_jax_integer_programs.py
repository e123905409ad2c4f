"""Quantized JAX models in kernels for bytes: what becomes one layer, what is handed on, and that numbers stay."""

import dataclasses

import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxpr_walk import equations, relative_error
from quantize_models import Quantize, bound, case

from perfkit import UnsupportedError
from perfkit._recipe_files import recipe_class
from perfkit.backends.jax_backend import BACKEND
from perfkit.backends.jax_fused import INTEGERS
from perfkit.kernels import _int8, _native
from perfkit.kernels._op import _choose
from perfkit.measure.environment import has
from perfkit.quantization import jax_quantize

if _native.find_compiler() is None:
    pytest.skip("no C++ compiler is installed", allow_module_level=True)
if not any(map(has, _int8.VNNI)):
    pytest.skip("a CPU without VNNI, where sums of such grids could overflow", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("hasty")
KEYS = jax.random.split(jax.random.key(0), 8)
IMAGES = jax.random.normal(KEYS[0], (3, 12, 11, 2))
WEIGHTS = {
    "conv1": {"kernel": jax.random.normal(KEYS[1], (3, 3, 2, 6)) / 5, "bias": jax.random.normal(KEYS[2], (6,))},
    "conv2": {"kernel": jax.random.normal(KEYS[3], (2, 2, 6, 7)) / 5, "bias": jax.random.normal(KEYS[4], (7,))},
    "fc1": {"kernel": jax.random.normal(KEYS[5], (84, 9)) / 9, "bias": jax.random.normal(KEYS[6], (9,))},
    "fc2": {"kernel": jax.random.normal(KEYS[7], (9, 3)) / 3},
}
BYTES = ", which hands on bytes, on 'cpu'"


def convolved(x, layer, padding="VALID"):
    return lax.conv_general_dilated(x, layer["kernel"], (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def pooled(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def network(params, x):
    x = pooled(jax.nn.relu(convolved(x, params["conv1"]) + params["conv1"]["bias"]))
    x = jax.nn.relu(convolved(x, params["conv2"]) + params["conv2"]["bias"])
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, 0))).reshape(x.shape[0], -1)
    return jax.nn.relu(x @ params["fc1"]["kernel"] + params["fc1"]["bias"]) @ params["fc2"]["kernel"]


def quantized(model, *inputs, params=WEIGHTS, how=jax_quantize.int8):
    """In kernels, in XLA's operations, and what the effect tells."""
    low, effect = how(bound(model, inputs, params), Quantize())
    plain = dataclasses.replace(low.model, transforms=low.model.transforms[:-1])
    return low, low.replace(model=plain), effect


def run(work, *inputs):
    """Operation by operation, each of which rounds once: XLA's compiler joins products and sums."""
    return work.model.function()(work.model.params, work.model.rest, *(inputs or work.inputs.args))[0]


def told(effect):
    """Layer → what it runs as."""
    found = {}
    for note in effect.notes:
        names, separator, what = note.partition(": ")
        found |= dict.fromkeys(names.split(", "), what.partition(", first")[0]) if separator else {}
    return found


def test_a_network_is_a_chain_of_kernels_with_bytes_between_and_its_numbers_are_xlas():
    low, plain, effect = quantized(network, IMAGES)
    assert {name: told(effect)[name] for name in WEIGHTS} == {
        "conv1": f"conv + bias + ReLU + 2×2 max-pool on integers{BYTES}",
        "conv2": "conv + bias + ReLU on integers on 'cpu'",
        "fc1": f"linear + bias + ReLU on integers{BYTES}",
        "fc2": "linear on integers on 'cpu'",
    }
    expected = run(plain)
    np.testing.assert_array_equal(run(low), expected)
    function, params = low.model.function(), low.model.params
    compiled = jax.jit(lambda params, x: function(params, (), x)[0])
    np.testing.assert_array_equal(compiled(params, IMAGES), expected)
    stack = jnp.stack([IMAGES, 2 * IMAGES])
    mapped = jax.vmap(compiled, (None, 0))(params, stack)
    np.testing.assert_array_equal(mapped, jnp.stack([expected, run(plain, 2 * IMAGES)]))
    with pytest.raises(UnsupportedError, match="rounding has no gradient"):
        jax.grad(lambda x: compiled(params, x).sum())(IMAGES)
    with pytest.raises(UnsupportedError, match="rounding has no gradient"):
        jax.grad(lambda x: run(plain, x).sum())(IMAGES)


def test_rows_with_scales_of_their_own():
    low, plain, effect = quantized(network, IMAGES, how=jax_quantize.int8_dynamic)
    assert told(effect)["fc1"] == told(effect)["fc2"] == "linear on integers with a scale for each row on 'cpu'"
    assert "its images have scales of their own" in told(effect)["conv1"]
    np.testing.assert_array_equal(run(low), run(plain))
    with pytest.raises(UnsupportedError, match="rounding has no gradient"):
        jax.grad(lambda x: run(low, x).sum())(IMAGES)


def twice_read(params, x):
    y = convolved(x, params["conv1"])
    return jax.nn.relu(y) + y


def bias_of_places(params, x):
    return jax.nn.relu(convolved(x, params["conv1"]) + jnp.arange(10.0)[:, None, None])


def taken_away(params, x):
    return pooled(convolved(x, params["conv1"]) - params["conv1"]["bias"])


def scaled_behind(params, x):
    return pooled(jax.nn.relu(convolved(x, params["conv1"]) * -params["conv1"]["bias"]))


def read_by_two(params, x):
    x = jax.nn.relu(convolved(x, params["conv1"]))
    return convolved(x, params["conv2"]).mean() + x.mean()


def moved_between(params, x):
    x = jax.nn.relu(x.reshape(3, -1)[:, :84] @ params["fc1"]["kernel"] + params["fc1"]["bias"])
    return params["fc2"]["kernel"].T @ x.reshape(3, 9).T, x.T.T @ params["fc2"]["kernel"]


def in_groups(params, x):
    return jax.nn.relu(
        lax.conv_general_dilated(
            x[..., :1].repeat(6, -1),
            params["conv1"]["kernel"][:, :, :1],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=6,
        )
    )


def series(params, x):
    y = lax.conv_general_dilated(
        x[:, 0], params["conv1"]["kernel"][0], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return lax.reduce_window(jax.nn.relu(y), -jnp.inf, lax.max, (1, 2, 1), (1, 2, 1), "VALID")


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        (twice_read, {"conv1": "conv on integers on 'cpu'"}),
        (bias_of_places, {"conv1": "conv on integers on 'cpu'"}),
        (taken_away, {"conv1": "conv + bias + 2×2 max-pool on integers on 'cpu'"}),
        (scaled_behind, {"conv1": "conv on integers on 'cpu'"}),
        (read_by_two, {"conv1": "conv + ReLU on integers on 'cpu'", "conv2": "conv on integers on 'cpu'"}),
        (moved_between, {"fc1": "linear + bias + ReLU on integers on 'cpu'"}),
        (in_groups, {"conv1": "XLA's integer products (it takes one group, and this has 6)"}),
        (series, {"conv1": "XLA's integer products (it is over 1 dimension(s), and the kernel over 2)"}),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_what_is_one_layer(model, layers):
    low, plain, effect = quantized(model, IMAGES)
    assert {name: told(effect).get(name) for name in layers} == layers
    for ours, theirs in zip(jax.tree.leaves(run(low)), jax.tree.leaves(run(plain)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def in_a_scan(params, x):
    def step(x, _):
        return jnp.tanh(x @ params["w"]), jnp.abs(x).sum()  # a sum that cancels can be far off, measured by itself

    return lax.scan(step, x, None, length=3)


def in_a_while(params, x):
    return lax.while_loop(
        lambda carry: carry[0] < 3, lambda carry: (carry[0] + 1, jnp.tanh(carry[1] @ params["w"])), (0, x)
    )


def in_branches(params, x):
    return lax.cond(x.sum() > 0, lambda w, x: x @ w, lambda w, x: -x @ w, params["w"], x)


def scanned_over(params, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])[0]


@pytest.mark.parametrize("model", [in_a_scan, in_a_while, in_branches, scanned_over])
def test_loops_and_branches_and_what_they_keep_is_packed_before(model):
    shape = (3, 6, 6) if model is scanned_over else (6, 6)
    params = {"layers" if model is scanned_over else "w": jax.random.normal(KEYS[0], shape)}
    x = jax.random.normal(KEYS[1], (4, 6))
    low, plain, effect = quantized(model, x, params=params)
    assert any("linear on integers on 'cpu'" in note for note in effect.notes)
    for ours, theirs in zip(jax.tree.leaves(run(low)), jax.tree.leaves(run(plain)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)  # XLA compiles loops, sums and products together
    jaxpr = jax.make_jaxpr(low.model.function())(low.model.params, (), x)
    calls = [
        str(eqn)
        for loop in equations(jaxpr, "scan", "while")
        for eqn in equations(loop.params.get("jaxpr") or loop.params["body_jaxpr"], "ffi_call")
    ]
    assert all("perfkit_linear_int8_static_xla" in call for call in calls)
    assert any("perfkit_linear_int8_static_xla_pack" in call for call in calls) == (model is scanned_over)


@pytest.mark.parametrize(("name", "mode"), [("lstm", "LSTM"), ("gru", "GRU"), ("simple", "RNN_TANH")])
def test_recurrent_layers_run_in_the_kernel_for_them(name, mode):
    work = bound(**case(name)[0])
    low, effect = jax_quantize.int8(work, Quantize())
    assert told(effect)["rnn.cell.dense_i"] == told(effect)["rnn.cell.dense_h"] == f"{mode} on integers on 'cpu'"
    plain = low.replace(model=dataclasses.replace(low.model, transforms=low.model.transforms[:-1]))
    ours, theirs, exact = (jax.jit(lambda each=each: run(each))() for each in (low, plain, work))
    # The kernel's powers of 2 are off by up to 1.1e-4 of them; a number that is rounded the other way in one of seven
    # steps is off by 1/127 of the grid, which is what quantization costs.
    assert relative_error(ours, theirs) < relative_error(theirs, exact)


def test_steps_of_recurrent_layers_that_nothing_reads_are_left_out():
    class Reader(nnx.Module):
        def __init__(self):
            self.rnn = nnx.RNN(nnx.GRUCell(6, 8, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))

        def __call__(self, x, ends):
            return self.rnn(x)[jnp.arange(len(ends)), ends - 1]

    ends = jnp.array([2, 7, 1, 7])
    low, plain, effect = quantized(Reader(), jax.random.normal(KEYS[0], (4, 7, 6)), ends, params=None)
    assert told(effect)["rnn.cell.dense_h"] == "GRU on integers, of each row what is read, on 'cpu'"
    np.testing.assert_allclose(run(low), run(plain), atol=2 / 127)


def test_gates_with_weights_of_their_own_run_step_by_step():
    weights = {gate: jax.random.normal(key, (6, 6)) for gate, key in zip("ab", KEYS, strict=False)}

    def model(params, x):
        def step(h, x):
            h = jnp.tanh(x @ params["a"] + h @ params["b"]) * 0.5
            return h, h

        return lax.scan(step, jnp.zeros((4, 6)), x)

    low, plain, effect = quantized(model, jax.random.normal(KEYS[3], (5, 4, 6)), params=weights)
    assert told(effect) | {} == told(effect)
    assert {told(effect)["a"], told(effect)["b"]} == {"linear on integers on 'cpu'"}
    for ours, theirs in zip(jax.tree.leaves(run(low)), jax.tree.leaves(run(plain)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_where_no_kernel_can_be_built_xla_computes_and_the_effect_says_why(monkeypatch):
    low, _, _ = quantized(network, IMAGES)
    expected = run(low)
    monkeypatch.setattr(_native, "find_compiler", lambda: None)
    _choose.cache_clear()
    try:
        low, _, effect = quantized(network, IMAGES)
        assert "XLA's integer products (there is no C++ compiler" in told(effect)["conv1"]
        np.testing.assert_array_equal(run(low), expected)
    finally:
        _choose.cache_clear()


def test_fused_kernels_behind_it_leaves_them_and_says_so():
    low, _, _ = quantized(network, IMAGES)
    after, effect = recipe_class("fused_kernels")().jax(low)
    assert after is low
    assert not effect.touched
    assert effect.notes == (INTEGERS,)


def test_packed_weights_are_kept_from_call_to_call():
    low, plain, _ = quantized(network, IMAGES)
    finished = BACKEND.finish(low.replace(model=low.model.compiled_ahead()))
    np.testing.assert_array_equal(finished.model(finished.params(), IMAGES), run(plain))
    program = finished.program().as_text()
    assert "perfkit_conv2d_int8_xla" in program
    assert "_xla_pack" not in program
