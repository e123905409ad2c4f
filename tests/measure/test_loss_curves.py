"""The fidelity rules on loss curves."""

import math

import pytest

from perfkit.measure.loss_curves import compare_ends, compare_losses, compare_progress

LOSSES = (2.3, 1.9, 1.6, 1.4, 1.3)


def test_loss_curves_differ_by_their_mean_distance_over_the_range():
    after = [loss + 0.05 for loss in LOSSES]
    found = compare_losses(LOSSES, after, tolerance=0.06)
    assert found.relative_error == pytest.approx(0.05)
    assert found.max_abs_error == pytest.approx(0.05)
    assert found.ok
    worse = compare_losses(LOSSES, after, tolerance=0.04)
    assert worse.reason == (
        "the loss curves lie 0.05 of the original's range apart, above 2 × 0 (two seeds of the original) + 0.04"
    )
    assert found.relative_error <= found.limit
    assert worse.relative_error > worse.limit


def test_the_noise_between_seeds_widens_the_limit():
    after = [loss + 0.05 for loss in LOSSES]
    found = compare_losses(LOSSES, after, tolerance=0.01, seed_noise=0.03)
    assert (found.ok, found.original_error, found.limit) == (True, 0.03, pytest.approx(0.07))
    assert not compare_losses(LOSSES, after, tolerance=0.01, seed_noise=0.01).ok


def test_a_flat_curve_is_measured_against_its_size():
    flat = [2.0] * 5
    found = compare_losses(flat, [2.001] * 5, tolerance=0.01)
    assert found.relative_error == pytest.approx(0.001 / 0.2)
    assert found.ok
    assert compare_losses(flat, [2.1] * 5, tolerance=0.01).relative_error == pytest.approx(0.5)
    assert compare_losses([0.0] * 3, [0.25] * 3, tolerance=0.1).relative_error == 0.25
    assert compare_losses(flat, flat, tolerance=0.0).ok


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_diverge_fail_and_name_the_step(value):
    found = compare_losses(LOSSES, (2.3, 1.9, value, 1.4, value), tolerance=1e9)
    assert found.reason == "2 of 5 losses are not finite where the original's are, from step 2 on"
    assert found.relative_error == math.inf


def test_steps_at_which_the_original_diverges_are_left_out():
    before = (2.0, math.nan, 1.0)
    assert compare_losses(before, (2.0, math.nan, 1.0), tolerance=0.0).ok
    assert compare_losses(before, (2.0, 7.0, 1.0), tolerance=0.0).ok
    assert not compare_losses(before, (2.0, 7.0, 1.5), tolerance=0.1).ok


def test_an_original_that_diverges_throughout_proves_nothing():
    close = compare_losses([math.nan, math.inf], [math.nan, math.inf], tolerance=1.0)
    assert not close.ok
    assert "nothing to compare with" in close.reason


def test_an_original_that_diverges_with_another_seed_proves_nothing():
    found = compare_losses(LOSSES, LOSSES, tolerance=0.1, seed_noise=math.inf)
    assert not found.ok
    assert "diverges with another seed" in found.reason


def test_what_was_taken_away_is_learned_again_where_the_end_lies_in_the_lower_half_of_the_originals_curve():
    before, after = (2.3, 1.9, 1.6, 1.3, 1.3, 1.3, 1.3, 1.3), (9.3, 5.0, 3.0, 2.2, 2.2, 2.2, 2.2, 2.2)
    found = compare_ends(before, after, tolerance=0.06)
    assert found.relative_error == pytest.approx((2.2 - 1.8) / (9.3 - 1.3))
    assert found.max_abs_error == pytest.approx(2.2 - 1.8)
    assert found.ok
    worse = compare_ends(before, after, tolerance=0.04)
    assert worse.reason.startswith("after 8 steps the loss is still 0.05 of the curves' range above the middle of")
    assert compare_ends(before, (*after[:3], *[1.7] * 5), tolerance=0.0).ok, "below the middle it is back"


def test_a_model_that_stays_where_the_original_began_learns_nothing():
    before = tuple(2.3 * 0.9**step for step in range(50))
    found = compare_ends(before, (2.3,) * 50, tolerance=0.05)
    assert not found.ok
    assert "above the middle of the original's" in found.reason


def test_an_end_that_is_not_finite_was_not_learned():
    found = compare_ends((2.0, 1.0, 1.0), (9.0, math.nan, math.inf), tolerance=1e9)
    assert found.reason == "2 of 3 losses are not finite, from step 1 on"
    assert found.relative_error == math.inf


def test_progress_is_judged_at_the_steps_that_can_be_compared():
    before, after = (5.0, 4.0, 3.0, 2.0, 1.0), (5.0, 99.0, 3.0, 99.0, 2.0)
    found = compare_progress(before, after, (0, 2, 4), tolerance=0.3)
    assert found.ok
    assert found.relative_error == pytest.approx((2 - 1) / (5 - 1)), "the last of three; the half of them is one"
    assert not compare_progress(before, after, (0, 2, 4), tolerance=0.2).ok
    assert compare_progress(before, (*before[:4], 0.5), (0, 4), tolerance=0.0).ok, "further is no error"


def test_a_training_that_stands_still_has_made_no_progress():
    found = compare_progress((5.0, 3.0, 1.0), (5.0, 5.0, 5.0), (0, 1, 2), tolerance=0.5)
    assert found.relative_error == pytest.approx(1.0)
    assert "of what the original has learned is missing" in found.reason
    assert not compare_progress((5.0, 1.0), (5.0, math.nan), (0, 1), tolerance=9.0).ok


@pytest.mark.parametrize(("before", "after"), [((), ()), ((1.0, 2.0), (1.0,))])
def test_loss_curves_of_another_length_are_a_mistake_of_the_caller(before, after):
    with pytest.raises(ValueError, match="as many steps"):
        compare_losses(before, after, tolerance=0.1)
