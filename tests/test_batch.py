"""How many samples a call is of, from shapes and from what the model reads step by step."""

import pytest

from perfkit._batch import Mixing, Samples, samples_of

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


@pytest.mark.parametrize(
    ("along_first", "along_second", "expected"),
    [
        (Mixing.APART, Mixing.APART, Samples(TIME, 0)),
        (Mixing.IN_ORDER, Mixing.APART, Samples(ROWS, 1)),
        (Mixing.ANY, Mixing.APART, Samples(ROWS, 1)),
        (Mixing.IN_ORDER, Mixing.ANY, None),
        (Mixing.ANY, Mixing.ANY, Samples(TIME, 0, assumed=True)),  # batch norm
        (None, Mixing.APART, Samples(TIME, 0, assumed=True)),
    ],
)
def test_what_depends_on_what_decides_between_two_dimensions(along_first, along_second, expected):
    def mixing(number, dim):
        assert number == 1
        return (along_first, along_second)[dim]

    found = samples_of([(2,), (TIME, ROWS, 3)], [(TIME, ROWS, 4)], lambda: {(1, ROWS + 1)}, mixing)
    assert found == expected


def test_mixing_is_not_asked_where_shapes_or_loops_tell():
    def never(number, dim):
        raise AssertionError

    assert samples_of([(TIME, 3)], [(TIME, 4)], set, never) == Samples(TIME, 0)
    told = {(TIME, ROWS)}
    assert samples_of([(TIME, ROWS, 3)], [(TIME, ROWS, 4)], lambda: told, never) == Samples(ROWS, 1)
    assert samples_of([(ROWS, TIME, 3)], [(ROWS, TIME, 4)], lambda: told, never) == Samples(ROWS, 0)
