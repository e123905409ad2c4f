"""Quantized JAX models: integers in the compiled program, small parameters, numbers close to the original's."""

import dataclasses
import functools

import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
import numpy as np
from jaxpr_walk import relative_error
from quantize_models import HOW, NAMES, Quantize, bound, case, products, program

import perfkit
from perfkit import InvalidInputError, UnsupportedError
from perfkit._recipe_files import recipe_class
from perfkit._workload import Inputs
from perfkit.backends.jax_backend import BACKEND
from perfkit.backends.jax_precision import autocast
from perfkit.backends.jax_quantized import is_quantized
from perfkit.backends.jax_trees import leaves, leaves_with_names
from perfkit.quantization import jax_quantize

pytestmark = pytest.mark.usefixtures("hasty")

CASES = [(name, how) for name in NAMES for how in HOW if how.startswith("int8") or name not in ("gru", "simple")]
# Rounding to a step of d errs by d / sqrt(12) on average. Weights of deviation 1 spread over ±3 at most in these small
# layers, so a step is 3/127 of the deviation for int8, 3/7 for int4, and 2^-3 of each number for float8 (3 bits).
ROUNDING = {"int8": 3 / 127 / 12**0.5, "int4": 3 / 7 / 12**0.5, "fp8": 2**-3 / 12**0.5}


def limit(how, layers):
    """Each layer rounds weights and activations, and errors of independent roundings add in squares."""
    one = ROUNDING[how.removesuffix("_weight_only").removesuffix("_dynamic")]
    return one * (2 * layers) ** 0.5 * 2  # twice: what a nonlinearity or a recurrence may amplify


def quantized(name, how="int8", **options):
    given, layers = case(name)
    work = bound(**given)
    return work, *HOW[how](work, Quantize(how=how, **options)), layers


@functools.cache
def original(name):
    """The program of an original, and what it returns."""
    return program(bound(**case(name)[0]))


@pytest.mark.parametrize(("name", "how"), CASES)
def test_every_layer_is_touched_the_program_multiplies_in_its_dtype_and_numbers_stay_close(name, how):
    _, low, effect, layers = quantized(name, how)
    (before, exact), (after, close) = original(name), program(low)
    assert 1e-5 < relative_error(close, exact) < limit(how, len(layers))
    assert not effect.simulated
    left = {skipped.name: skipped.reason for skipped in effect.skipped}
    assert set(effect.touched) | set(left) == layers
    only_fp8 = {"there are no float8 convolutions", "it is looked up, not multiplied"} if how == "fp8" else set()
    assert set(left.values()) <= only_fp8
    if how in ("int8", "int8_dynamic"):
        assert not products(before, "s32")
        # A product of activations alone stays; each one of a weight is found again as an integer product.
        assert products(after, "f32") == ["dot"] * (2 if name == "function" else 0)
        assert sorted(products(after, "s32") + products(after, "f32")) == sorted(products(before, "f32"))
    else:
        assert not products(after, "s32")


def test_weight_only_stores_integers_and_says_what_it_saves():
    for how, dtype in (("int8_weight_only", np.int8), ("int4_weight_only", np.uint8)):
        _, low, effect, _ = quantized("function", how)
        assert {leaf.values.dtype for leaf in leaves(low.model.params) if is_quantized(leaf)} == {np.dtype(dtype)}
        assert any("saves memory, not work" in note for note in effect.notes)


@pytest.mark.parametrize(("how", "factor"), [("int8", 3.9), ("int8_weight_only", 3.9), ("int4_weight_only", 6.3)])
def test_a_linear_model_really_shrinks(how, factor):
    """int8: 4 bytes become 1, and a scale a column. int4: half a byte and 4/32 bytes of scale, so 4 / 0.625 = 6.4."""
    weights = {"w": jax.random.normal(jax.random.key(0), (512, 256))}
    work = bound(lambda params, x: x @ params["w"], (jnp.ones((2, 512)),), weights)
    low, _ = HOW[how](work, Quantize(how=how))
    (before, parameters), (after, same) = BACKEND.size(work), BACKEND.size(low)
    assert before / after >= factor
    assert parameters == same == 512 * 256
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(BACKEND.finish(low).params())) == after


@pytest.mark.parametrize("name", ["cnn", "lstm", "linen", "function"])
def test_the_result_is_used_as_the_original_was(name):
    given = case(name)[0]
    _, low, _, _ = quantized(name, "int8_dynamic")
    finished = BACKEND.finish(low.replace(model=low.model.compiled_ahead()))
    leading = () if finished.params is None else (finished.params(),)
    # The same program, so only the order of float32 sums may differ.
    assert relative_error(finished.model(*leading, *given["example_inputs"]), program(low)[1]) < 1e-6
    assert isinstance(finished.model, type(given["model"])) or finished.params is not None


def test_an_optimized_module_holds_small_parameters_and_works_op_by_op():
    given, layers = case("cnn")
    result = perfkit.optimize(**given, recipe=Quantize())
    assert set(result.report.steps[0].effect.touched) == layers
    assert result.report.before.model_bytes > 2 * result.report.after.model_bytes
    kernel = result.model.fc.kernel.get_raw_value()
    assert kernel.values.dtype == jnp.int8
    error = relative_error(kernel.dequantized(), given["model"].fc.kernel.get_value())
    assert 1e-4 < error < ROUNDING["int8"]
    again = result.model(*given["example_inputs"])
    assert relative_error(again, original("cnn")[1]) == pytest.approx(result.report.fidelity.relative_error, rel=0.1)


def test_weights_whose_names_are_written_alike_stay_apart():
    x, first, second = jax.random.normal(jax.random.key(0), (3, 5, 8))
    params = {"a.b": first, "a": {"b": 3 * second}}
    low, effect = jax_quantize.weight_only(
        bound(lambda params, x: x @ params["a.b"].T - x @ params["a"]["b"].T, (x,), params), Quantize(), 8
    )
    assert len(set(effect.touched)) == 2
    for weight, kept in zip(jax.tree.leaves(params), leaves(low.model.params), strict=True):
        assert relative_error(kept.dequantized(), weight) < ROUNDING["int8"]


def test_include_and_exclude():
    _, low, effect, _ = quantized("cnn", include="conv*", exclude="conv2")
    assert effect.touched == ("conv1",)
    assert {(skipped.name, skipped.reason) for skipped in effect.skipped} == {
        ("conv2", "left alone by include or exclude"),
        ("fc", "left alone by include or exclude"),
    }
    assert [name for name, leaf in leaves_with_names(low.model.params)[0] if is_quantized(leaf)] == ["conv1.kernel"]
    with pytest.raises(InvalidInputError, match="convolution1"):
        quantized("cnn", exclude="convolution1")


def test_weights_of_fewer_bits_use_fewer_numbers():
    _, low, _, _ = quantized("cnn", weight_bits=4)
    values = [leaf.values for leaf in leaves(low.model.params) if is_quantized(leaf)]
    assert {leaf.dtype for leaf in values} == {np.dtype(np.int8)}
    assert max(int(jnp.abs(leaf).max()) for leaf in values) == 7


class TestCalibration:
    def test_without_batches_the_example_inputs_serve_and_the_effect_says_so(self):
        _, _, effect, _ = quantized("lstm")
        assert any("calibrated on the example inputs alone" in note for note in effect.notes)

    def test_ranges_are_the_maxima_over_all_batches_and_steps_of_a_loop(self):
        given, _ = case("control")
        work = bound(**given)
        batches = [jax.random.normal(key, (4, 8)) * 2 for key in jax.random.split(jax.random.key(5), 3)]
        work = work.replace(calibration=tuple(Inputs((batch,)) for batch in batches))
        low, _ = jax_quantize.int8(work, Quantize())
        largest = 0.0
        for x in batches:
            for w in given["params"]["layers"]:
                largest, x = max(largest, float(jnp.abs(x).max())), jnp.tanh(x @ w)
        assert float(low.model.params["layers"].input_scale) == pytest.approx(largest / 127, rel=1e-5)

    def test_what_lies_beyond_the_ranges_is_told(self):
        weights, x = {"first": jnp.eye(8), "second": jnp.eye(8)}, jnp.arange(1.0, 9).reshape(1, 8)
        work = bound(lambda params, x: x @ params["first"] @ params["second"], (x,), weights)
        work = work.replace(calibration=(Inputs((x / 2,)),) * 16)
        low, effect = jax_quantize.int8(work, Quantize())
        assert any("50.00% saturate" in note and "16 batch" in note for note in effect.notes)  # 5, 6, 7, 8 of 8
        assert float(program(low)[1].max()) == pytest.approx(4, rel=1e-2)
        calm = work.replace(calibration=(Inputs((x,)),))
        assert any("no activation" in note for note in jax_quantize.int8(calm, Quantize())[1].notes)

    def test_a_layer_that_only_saw_zeros_is_left_alone(self):
        weights = {"dead": jnp.eye(4), "live": jnp.eye(4)}
        work = bound(lambda params, x: (0 * x) @ params["dead"] + x @ params["live"], (jnp.ones((2, 4)),), weights)
        _, effect = jax_quantize.int8(work, Quantize())
        assert effect.touched == ("live",)
        assert [(skipped.name, "zero" in skipped.reason) for skipped in effect.skipped] == [("dead", True)]
        assert "dead observers: dead" in effect.notes

    def test_a_branch_that_was_never_taken_is_left_alone(self):
        def branches(params, x):
            return jax.lax.cond(x.sum() > 0, lambda x: x @ params["often"], lambda x: x @ params["never"], x)

        work = bound(branches, (jnp.ones((2, 4)),), {"often": jnp.eye(4), "never": jnp.eye(4)})
        _, effect = jax_quantize.int8(work, Quantize())
        assert effect.touched == ("often",)
        assert effect.skipped[0].reason == "it was never reached in calibration"

    def test_activations_that_are_not_finite_are_refused(self):
        work = bound(lambda params, x: jnp.log(x) @ params["w"], (jnp.ones((2, 4)).at[0].set(-1),), {"w": jnp.eye(4)})
        with pytest.raises(InvalidInputError, match="enter w are not finite"):
            jax_quantize.int8(work, Quantize())

    def test_without_anything_to_calibrate_on_it_is_refused(self):
        work = bound(lambda params, x: x @ params["w"], None, {"w": jnp.eye(4)})
        with pytest.raises(InvalidInputError, match="example_inputs"):
            jax_quantize.int8(work, Quantize())
        calibrated = work.replace(calibration=(Inputs((jnp.ones((16, 4)),)),))
        assert jax_quantize.int8(calibrated, Quantize())[1].touched == ("w",)


class TestRefusals:
    def test_integers_are_not_trained(self):
        work = dataclasses.replace(bound(**case("cnn")[0]), mode="training")
        for how in HOW.values():
            with pytest.raises(UnsupportedError, match="qat"):
                how(work, Quantize())

    def test_a_quantized_model_is_not_quantized_again(self):
        _, low, _, _ = quantized("function")
        with pytest.raises(UnsupportedError, match="quantized already"):
            jax_quantize.int8_dynamic(low, Quantize())

    def test_float8_needs_hardware(self, monkeypatch):
        work = bound(**case("function")[0])
        assert "CPU" in recipe_class("fp8")().unavailable("jax", "cpu")
        with pytest.raises(UnsupportedError, match="float8"):
            jax_quantize.fp8(work, Quantize())

        def device(**facts):
            kind = type("Device", (), {"platform": "gpu", "device_kind": "a GPU", **facts})
            monkeypatch.setattr(jax, "devices", lambda _: [kind()])
            return jax_quantize.fp8_unavailable(facts.get("platform", "gpu"))

        assert device(compute_capability="8.9") is None
        assert device(compute_capability="9.0") is None
        assert "8.0" in device(compute_capability="8.0")
        assert "does not tell" in device(compute_capability=None)
        assert "TPU v5 lite" in device(platform="tpu", device_kind="TPU v5 lite")
        assert device(platform="tpu", device_kind="TPU7x") is None

    def test_other_numbers_of_bits(self):
        with pytest.raises(InvalidInputError, match="bits=3"):
            jax_quantize.weight_only(bound(**case("cnn")[0]), Quantize(), 3)


def test_float8_operands_stand_in_the_program():
    _, low, _, _ = quantized("function", "fp8")
    text = jax.jit(low.model.function()).lower(low.model.params, (), *low.inputs.args).as_text()
    lines = [line for line in text.splitlines() if "dot_general" in line and "f8E4M3FN" in line]
    assert len(lines) == 4
    assert all("xf32>" in line.rpartition("->")[2] for line in lines)


def test_models_without_weights_are_left_as_they_are_and_told_why():
    x = jnp.ones((2, 2))
    work = bound(lambda a, b: a @ b, (x, x))
    low, effect = jax_quantize.int8(work, Quantize())
    assert low is work
    assert not effect.touched
    assert "no parameters" in effect.notes[0]


def test_weights_without_numbers_are_passed_by():
    x, params = jnp.ones((2, 4)), {"some": jnp.eye(4), "none": jnp.zeros((4, 0))}
    work = bound(lambda params, x: jnp.concatenate([x @ params["some"], x @ params["none"]], -1), (x,), params)
    low, effect = jax_quantize.int8(work, Quantize())
    assert effect.touched == ("some",)
    assert program(low)[1].shape == x.shape


def test_weights_that_reach_no_product_are_skipped_with_the_reason():
    weights = {"used": jnp.eye(4), "elementwise": jnp.eye(4), "idle": jnp.eye(4), "exact": jnp.eye(4)}

    def model(params, x):
        y = x @ params["used"] * params["elementwise"]
        return y + jnp.matmul(x, params["exact"], precision="highest")

    effect = jax_quantize.int8_dynamic(bound(model, (jnp.ones((4, 4)),), weights), Quantize())[1]
    assert effect.touched == ("used",)
    assert {skipped.name: skipped.reason for skipped in effect.skipped} == {
        "elementwise": "it enters mul, not a product",
        "idle": "it is not used when the model is called with these inputs",
        "exact": "precision=HIGHEST was asked for",
    }


def test_a_model_in_bfloat16_is_quantized_below_its_casts():
    given, layers = case("lstm")
    work = bound(**given)
    both, effect = jax_quantize.int8(autocast(work, "bfloat16")[0], Quantize())
    assert set(effect.touched) == layers
    text, result = program(both)
    assert not products(text, "bf16")
    assert len(products(text, "s32")) == 3
    assert result.dtype == jnp.float32


def test_bytes_and_parameters_count_what_is_stored_and_what_is_meant():
    work, low, _, _ = quantized("lstm", "int4_weight_only")
    assert BACKEND.size(low)[1] == BACKEND.size(work)[1]
    assert BACKEND.size(low)[0] == sum(leaf.nbytes for leaf in jax.tree.leaves(low.model.params))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_stays_so_where_its_range_is_read_at_each_call(bad):
    def model(params, x):
        return jax.nn.relu(x @ params["first"]) @ params["second"]

    rng = np.random.default_rng(0)
    params = {"first": rng.normal(size=(16, 16)), "second": rng.normal(size=(16, 4))}
    params = {name: weight.astype(np.float32) for name, weight in params.items()}
    x = rng.normal(size=(4, 16)).astype(np.float32)
    result = perfkit.apply(model, "int8_dynamic", params=params, example_inputs=(x,))
    whole = result.model(result.params, x)
    x[1, 3] = bad
    y = result.model(result.params, x)
    assert not jnp.isfinite(y[1]).any()
    assert jnp.array_equal(jnp.delete(y, 1, 0), jnp.delete(whole, 1, 0))
