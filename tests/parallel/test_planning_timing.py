"""What the planner times, and how."""

from perfkit.parallel.planning_timing import MOST, in_turn, needed_passes, within
from perfkit.parallel.world import Alone


class Counting(Alone):
    """A world that counts how often its processes meet; another process takes a second longer."""

    met = 0

    def barrier(self):
        self.met += 1

    def gather(self, value):
        return [value, value + 1.0]


def test_calls_are_timed_in_turn():
    made: list[str] = []
    calls = {name: lambda name=name: made.append(name) for name in "ab"}
    world = Counting()
    times = in_turn(calls, range(2), world)
    assert {name: len(found) for name, found in times.items()} == {"a": 2, "b": 2}
    assert world.met == 2 * (1 + 2)
    assert made == list("ab" * 4), "the slowest process' call is long enough by itself"
    made.clear()
    in_turn(calls, range(1))
    assert made == [*"abab", *"a" * MOST, *"b" * MOST], "a short one is made several times in a row"
    assert len(list(within(0.0))) == 3


def test_batch_sizes_that_layouts_lead_to():
    assert needed_passes(64, 4) == {4: 16, 8: 8, 16: 1, 32: 1, 64: 1}
    assert needed_passes(12, 3) == {1: 12, 4: 1, 12: 1}
    assert needed_passes(64, 8)[8] == 1, "the data axis needs it too"
