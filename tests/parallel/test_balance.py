"""Where a chain of operations is cut, and how long devices wait."""

import itertools
import random

import pytest

from perfkit import InvalidInputError
from perfkit._chain import chain_of
from perfkit.parallel.balance import SLACK, Costs, balanced, bubble, spans


def costs(seconds, sent=None, held=None):
    places = dict.fromkeys(range(1, len(seconds)), 1) if sent is None else sent
    return Costs(seconds, held or [1] * len(seconds), places)


def longest(about, cuts):
    return max(sum(about.seconds[start:end]) for start, end in spans(cuts, len(about.seconds)))


def sent(about, cuts):
    return sum(about.sent_bytes[cut] for cut in cuts)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_the_longest_stage_is_nearly_the_shortest_possible(stages):
    generator = random.Random(stages)
    for _ in range(20):
        about = costs(
            [generator.random() for _ in range(8)], {place: generator.randrange(9) for place in (1, 2, 4, 5, 7)}
        )
        every = list(itertools.combinations(about.sent_bytes, stages - 1))
        best = min(longest(about, cuts) for cuts in every)
        found = balanced(about, stages)
        assert longest(about, found) <= best * SLACK
        near = [cuts for cuts in every if longest(about, cuts) <= best * SLACK]
        assert sent(about, found) == min(sent(about, cuts) for cuts in near)


def test_what_sends_less_is_taken_where_it_costs_little_time():
    about = costs([1.0, 1.0, 0.01, 1.0, 1.0], {1: 5, 2: 100, 3: 5, 4: 5})
    assert balanced(about, 2) == (3,)
    assert about.shares((3,)) == pytest.approx((2.01 / 4.01, 2 / 4.01))


def test_a_stage_must_fit():
    about = costs([1.0, 1.0, 1.0, 1.0], held=[6, 1, 1, 1])
    assert balanced(about, 2) == (2,)
    assert balanced(about, 2, capacity_bytes=6) == (1,)
    assert balanced(about, 2, capacity_bytes=5) is None
    assert about.held((1,)) == (6, 3)


def test_too_few_places_are_none():
    assert balanced(costs([1.0, 1.0], {}), 2) is None
    assert balanced(costs([1.0, 1.0, 1.0], {1: 1}), 3) is None


def test_devices_wait_for_the_first_and_the_last_micro_batch():
    assert bubble(devices=1, micro_batches=4, stages=1) == 0
    assert bubble(devices=4, micro_batches=4, stages=4) == 3 / 7
    assert bubble(devices=4, micro_batches=4, stages=8) == 3 / 11


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ("pipeline_parallel(schedule='2f2b')", "expected one of '1f1b', 'gpipe', 'interleaved'"),
        ("pipeline_parallel(stages=0)", "expected a number above 0"),
        ("pipeline_parallel(micro_batches='all')", "expected a number above 0"),
    ],
)
def test_options_that_are_none_are_refused(recipe, told):
    with pytest.raises(InvalidInputError, match=told):
        chain_of(recipe)
