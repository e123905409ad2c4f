"""Which segments are recomputed: the quickest that fit, and never more than the least that can be held."""

import pytest

from perfkit import InvalidInputError
from perfkit._chain import chain_of
from perfkit.memory.segments import Segment, choose


def layers(count, fixed=""):
    """Equal layers: each saves 10 bytes of a second's work, and reads 1."""

    def cut(most):
        size = max(int(most // 10), 1)
        for start in range(0, count, size):
            part = min(size, count - start)
            yield Segment(f"{start}", 10.0 * part, 1.0, float(part), fixed=fixed)

    return cut


def test_half_the_bytes_for_about_half_the_time():
    """Each layer that is run again leaves its input of 1 byte for its 10: 80 / 9 layers."""
    choice = choose(160.0, layers(16), limit_bytes=80.0)
    assert choice.peak_bytes <= 80
    assert choice.seconds <= 9


@pytest.mark.parametrize("limit", [120.0, 80.0, 60.0])
def test_a_tighter_budget_costs_more_time(limit):
    loose, tight = choose(160.0, layers(16), limit), choose(160.0, layers(16), limit - 20)
    assert tight.peak_bytes <= limit - 20
    assert loose.seconds <= tight.seconds


def test_the_last_segment_need_not_be_run_again():
    """It is run backward at once, so running it again would save nothing."""
    choice = choose(160.0, layers(16), limit_bytes=60.0)
    assert not choice.recomputed[-1]


def test_where_no_choice_fits_the_least_is_taken():
    choice = choose(160.0, layers(16), limit_bytes=1.0)
    assert 1.0 < choice.peak_bytes <= 50  # 4 segments of 4 layers: 3 inputs and 40 bytes


def test_what_must_not_be_run_again_is_not():
    assert choose(160.0, layers(16, fixed="it changes its buffers"), limit_bytes=80.0) is None


def test_a_recurrent_layer_is_run_in_pieces():
    def cut(most):
        yield Segment("lstm", 100.0, 5.0, 4.0, chunks=max(int(100 // most), 1))

    choice = choose(100.0, cut, limit_bytes=30.0)
    (segment,) = choice.chosen
    assert segment.chunks == 4
    assert choice.peak_bytes == 5 + 25
    assert choice.seconds == 3.0, "the last of four is not run again"


@pytest.mark.parametrize("budget", ["0", "-0.5", "True", "'half'"])
def test_a_budget_is_a_share_or_bytes(budget):
    with pytest.raises(InvalidInputError, match="a share up to 1, or a number of bytes"):
        chain_of(f"checkpoint(budget={budget})")
