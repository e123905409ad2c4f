"""How many samples a call is of, from shapes and from what the model reads step by step."""

import pytest

from perfkit._batch import Samples, samples_of

TIME, ROWS = 7, 5


@pytest.mark.parametrize(
    ("inputs", "outputs", "sequences", "expected"),
    [
        ([(6, 3)], [(6, 4)], set(), Samples(6, 0)),
        ([(2,), (6, 3)], [(6,)], set(), Samples(6, 0)),  # behind a random key
        ([(6, 3)], [()], set(), None),  # a loss
        ([(3,)], [(4,)], set(), None),
        ([()], [(4,)], set(), None),
        ([(ROWS, TIME, 3)], [(ROWS, TIME, 4)], {(TIME, ROWS)}, Samples(ROWS, 0)),  # turned within the model
        ([(TIME, ROWS, 3)], [(TIME, ROWS, 4)], {(TIME, ROWS)}, Samples(ROWS, 1)),
        ([(TIME, ROWS)], [(TIME, ROWS, 4)], {(TIME, ROWS)}, Samples(ROWS, 1)),  # of tokens
        ([(TIME, ROWS, 3)], [(ROWS, 4)], {(TIME - 1, ROWS)}, Samples(ROWS, 1)),  # all but the last step
        ([(TIME, ROWS, 3)], [(ROWS, 4)], {(1, ROWS)}, Samples(ROWS, 1)),  # by a cell
        ([(TIME, ROWS, 3)], [(ROWS, 4)], set(), None),
        ([(TIME, 3)], [(TIME, 4)], {(TIME, 0)}, None),  # one sequence
        ([(6, ROWS)], [(6, ROWS)], {(1, ROWS)}, Samples(6, 0)),
        ([(ROWS, ROWS, 3)], [(ROWS, ROWS, 4)], {(ROWS, ROWS)}, Samples(ROWS, 0)),
    ],
)
def test_samples(inputs, outputs, sequences, expected):
    assert samples_of(inputs, outputs, lambda: sequences) == expected
