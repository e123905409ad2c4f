"""The fidelity rule, on outputs of every kind."""

import math
import re

import numpy as np
import pytest

from perfkit._report import Fidelity
from perfkit.measure.fidelity import compare_outputs

GENERATOR = np.random.default_rng(0)
LOGITS = GENERATOR.normal(size=(32, 10))


def compared(result, original, reference=None, tolerance=1e-3, **options):
    """One output each; the reference is the original unless another is given."""
    reference = original if reference is None else reference
    arrays = [[np.asarray(array)] for array in (result, original, reference)]
    return compare_outputs(*arrays, tolerance=tolerance, reference_name="a float64 run", **options)


def agrees(fidelity: Fidelity) -> bool:
    """`ok`, the limit and the reason say the same."""
    return fidelity.ok == (not fidelity.reason) == (fidelity.relative_error <= fidelity.limit)


# The rule


def test_equal_outputs_are_exact():
    found = compared(LOGITS, LOGITS)
    assert found.ok
    assert (found.relative_error, found.original_error, found.max_abs_error) == (0.0, 0.0, 0.0)
    assert found.sqnr_db.unavailable == "exact: no error"
    assert found.top1_agreement.value == 1.0
    assert found.reference == "a float64 run"


def test_errors_are_what_the_docstring_says():
    noise = 0.01 * GENERATOR.normal(size=LOGITS.shape)
    found = compared(LOGITS + noise, LOGITS, tolerance=1.0)
    expected = np.linalg.norm(noise) / np.linalg.norm(LOGITS)
    assert found.relative_error == pytest.approx(expected)
    assert found.max_abs_error == pytest.approx(np.abs(noise).max())
    assert found.sqnr_db.value == pytest.approx(10 * np.log10(np.sum(LOGITS**2) / np.sum(noise**2)))


@pytest.mark.parametrize(("share", "ok"), [(0.99, True), (1.01, False)])
@pytest.mark.parametrize(
    ("original_error", "tolerance", "factor"), [(0.0, 0.01, 2.0), (0.01, 0.0, 2.0), (0.01, 0.02, 3)]
)
def test_the_limit_is_the_originals_own_error_times_the_factor_plus_the_tolerance(
    share, ok, original_error, tolerance, factor
):
    limit = factor * original_error + tolerance
    reference = np.ones(100)
    found = compared(
        reference * (1 + share * limit), reference * (1 - original_error), reference, tolerance=tolerance, factor=factor
    )
    assert found.limit == pytest.approx(limit)
    assert found.ok is ok
    assert agrees(found)


def test_a_failure_says_which_output_and_by_how_much():
    found = compare_outputs(
        [LOGITS, 1.5 * LOGITS], [LOGITS, LOGITS], [LOGITS, LOGITS], tolerance=0.01, reference_name="itself"
    )
    assert found.reason == "the relative error of output 2 of 2 is 0.5, above 2 × 0 (the original's own) + 0.01"


def test_every_output_has_to_pass_its_own_limit():
    """The second output's error is smaller than the first's, but the first's is the original's own."""
    reference = [np.ones(10), np.ones(10)]
    original = [np.full(10, 1.1), np.ones(10)]
    result = [np.full(10, 1.1), np.full(10, 1.05)]
    found = compare_outputs(result, original, reference, tolerance=0.01, reference_name="float64")
    assert not found.ok
    assert "output 2 of 2" in found.reason
    assert found.relative_error == pytest.approx(0.05)
    assert found.max_abs_error == pytest.approx(0.1)
    assert agrees(found)


# Values that are not finite


@pytest.mark.parametrize(("value", "told"), [(math.nan, "1 NaN and 0 Inf"), (-math.inf, "0 NaN and 1 Inf")])
def test_a_new_value_that_is_not_finite_fails_whatever_the_tolerance(value, told):
    broken = LOGITS.copy()
    broken[3, 4] = value
    found = compare_outputs([LOGITS, broken], [LOGITS] * 2, [LOGITS] * 2, tolerance=1e9, reference_name="itself")
    assert not found.ok
    assert found.reason == f"output 2 of 2 has {told}, of 320 values, where the original does not"
    assert found.relative_error == math.inf
    assert found.sqnr_db.value is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_same_value_in_the_same_place_as_the_original_is_fine(value):
    original, result = LOGITS.copy(), LOGITS * (1 + 1e-5)
    original[3, 4] = result[3, 4] = value
    # Whether the reference agrees or could represent it in float64.
    for reference in (original, LOGITS):
        found = compared(result, original, reference)
        assert found.ok, found.reason
        assert found.relative_error == pytest.approx(1e-5, rel=0.01)


def test_another_kind_or_place_is_not():
    original, result = LOGITS.copy(), LOGITS.copy()
    original[0, 0], result[0, 0] = math.inf, -math.inf
    assert "0 NaN and 1 Inf" in compared(result, original).reason
    result[0, 0], result[0, 1] = math.inf, math.inf
    assert "0 NaN and 1 Inf" in compared(result, original).reason


def test_a_mask_that_became_finite_fails_and_a_nan_that_became_finite_does_not():
    original, result = LOGITS.copy(), LOGITS.copy()
    original[:2, 0] = -math.inf
    assert compared(result, original).reason == "the output is finite in 2 of 320 places where the original is infinite"
    original[:2, 0] = math.nan
    assert compared(result, original).ok


def test_an_overflow_of_the_original_that_the_result_avoids_is_fine():
    original = np.array([1.0, math.inf], np.float32)
    reference = np.array([1.0, 1e39])
    assert compared(reference, original, reference).ok


# Structure


@pytest.mark.parametrize(
    ("result", "told"),
    [
        ([LOGITS], "the number of outputs differs: 1 from the result, 2 from the original"),
        ([LOGITS, LOGITS.T], r"output 2 of 2 has shape \(10, 32\), but the original's has \(32, 10\)"),
        ([LOGITS, LOGITS[:1]], r"output 2 of 2 has shape \(1, 10\)"),
    ],
)
def test_outputs_of_another_structure_fail(result, told):
    found = compare_outputs(result, [LOGITS] * 2, [LOGITS] * 2, tolerance=1e9, reference_name="itself")
    assert not found.ok
    assert found.relative_error == math.inf
    assert re.match(told, found.reason)


def test_a_reference_of_another_shape_is_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="the reference has outputs of shape"):
        compared(LOGITS, LOGITS, LOGITS[:3])


def test_no_outputs_and_empty_and_scalar_ones():
    assert compare_outputs([], [], [], tolerance=0.0, reference_name="itself").ok
    assert compared(np.zeros((0, 10)), np.zeros((0, 10))).ok
    assert compared(np.zeros(0, int), np.zeros(0, int)).ok
    assert compared(np.float32(2.0), np.float32(2.0)).ok
    assert compared(2.0, 1.0).relative_error == 1.0
    assert "1 NaN" in compared(math.nan, 1.0).reason


# Numbers of every kind


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.uint64, bool])
def test_integers_and_booleans_count_what_differs(dtype):
    original = np.ones(100, dtype)
    result = original.copy()
    result[:3] = 0
    found = compared(result, original, tolerance=0.02)
    assert found.relative_error == pytest.approx(0.03)
    assert found.max_abs_error == 1.0
    assert not found.ok
    assert compared(result, original, tolerance=0.03).ok
    assert found.sqnr_db.unavailable == "no output is a floating-point number other than zero"


def test_large_integers_differ_by_one():
    assert compared(np.array([2**62 + 1]), np.array([2**62])).relative_error == 1.0


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_of_every_width(dtype):
    found = compared(LOGITS.astype(dtype), LOGITS.astype(np.float32), LOGITS, tolerance=0.0)
    expected = np.linalg.norm(LOGITS.astype(dtype) - LOGITS) / np.linalg.norm(LOGITS)
    assert found.relative_error == pytest.approx(expected)
    assert agrees(found)


def test_bfloat16_as_jax_returns_it():
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed: it comes with jax")
    found = compared(LOGITS.astype(ml_dtypes.bfloat16), LOGITS.astype(np.float32), LOGITS, tolerance=0.01)
    assert found.ok
    assert 1e-4 < found.relative_error < 2**-8
    assert found.top1_agreement.value > 0.9


def test_complex_numbers_count_both_parts():
    original = np.array([1 + 1j, 2 - 1j])
    assert compared(original, original).ok
    found = compared(original + 0.1j, original, tolerance=1.0)
    assert found.relative_error == pytest.approx(np.linalg.norm([0.1, 0.1]) / np.linalg.norm(original))
    assert "1 NaN" in compared([complex(1, math.nan), 2 - 1j], original).reason


@pytest.mark.parametrize("scale", [5e-324, 1e-310, 1e-200, 1e200, 1.7e308])
def test_neither_huge_nor_subnormal_values_overflow_or_vanish(scale):
    reference = np.full(50, scale)
    assert compared(reference, reference).relative_error == 0.0
    found = compared(0.5 * reference if scale > 1e-300 else 0 * reference, reference, tolerance=2.0)
    assert found.relative_error == pytest.approx(0.5 if scale > 1e-300 else 1.0)
    assert compared(-reference, reference, tolerance=3.0).relative_error == pytest.approx(2.0)


def test_an_error_far_beyond_the_reference_is_infinite_and_no_warning():
    found = compared(np.array([1e300]), np.array([1e-300]), tolerance=1.0)
    assert found.relative_error == math.inf
    assert not found.ok


def test_a_reference_of_zeros_takes_the_root_mean_square():
    found = compared(np.array([3e-4, 4e-4, 0, 0]), np.zeros(4))
    assert found.relative_error == pytest.approx(2.5e-4)
    assert found.ok
    assert not compared(np.full(4, 0.1), np.zeros(4)).ok
    assert compared(np.zeros(4), np.zeros(4)).relative_error == 0.0


# Top-1


def test_top1_counts_rows_whose_largest_entry_is_the_originals():
    swapped = LOGITS.copy()
    swapped[:8] = np.roll(swapped[:8], 1, axis=1)
    found = compared(swapped, LOGITS, tolerance=10.0)
    assert found.top1_agreement.value == 0.75
    assert found.top1_agreement.method == "32 rows of 10 against the original"


@pytest.mark.parametrize("shape", [(32,), (32, 1), (4, 8, 10), (0, 10), ()])
def test_top1_needs_rows_of_two_classes_or_more(shape):
    assert "two classes or more" in compared(np.ones(shape), np.ones(shape)).top1_agreement.unavailable


def test_top1_passes_over_integers_to_the_first_output_that_can_be_logits():
    tokens = np.ones((4, 7), int)
    found = compare_outputs(
        [tokens, LOGITS], [tokens, LOGITS], [tokens, LOGITS], tolerance=0.0, reference_name="itself"
    )
    assert found.top1_agreement.method == "32 rows of 10 against the original"
