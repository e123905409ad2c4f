"""What is told of the errors of others."""

import pytest

from perfkit._errors import first_line


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("out of memory\nat 0x1", "out of memory"),
        (
            "backend='inductor' raised:\n\nNotImplementedError: no such layout\n\nSet X=1",
            "backend='inductor' raised: NotImplementedError: no such layout",
        ),
        ("In: In: In: the end", "In: the end"),
        ("nothing more follows:", "nothing more follows:"),
        ("", "ValueError"),
    ],
)
def test_the_first_line_says_something(message, line):
    assert first_line(ValueError(message)) == line
