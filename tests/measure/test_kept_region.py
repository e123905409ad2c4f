"""Memory that calls keep: page faults of calls with it and without, in turns; and where it cannot be."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from perfkit.measure import kept_memory, kept_region

WORKER = Path(__file__).with_name("kept_region_worker.py")
ALL, NONE = pytest.approx(110, abs=2), pytest.approx(0, abs=2)
"""MiB that a call takes anew: both of its pieces, or neither."""

SPARE = kept_region.SPARE >> 20

pytestmark = pytest.mark.skipif(bool(kept_memory.unavailable()), reason="not glibc's malloc")


def run(*command, **variables):
    without = {name: value for name, value in os.environ.items() if name not in kept_memory.SETTINGS}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, env=without | variables, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def seen():
    """In a process as it is."""
    return json.loads(run(WORKER))


@pytest.fixture(scope="module")
def seen_in_one_arena():
    """In a process whose threads share one arena."""
    return json.loads(run(WORKER, MALLOC_ARENA_MAX="1"))


def test_each_side_of_a_comparison_finds_memory_as_it_was(seen):
    assert seen["unavailable"] == ""
    assert (seen["plain"], seen["no room"], seen["grown"], seen["held"]) == (ALL, ALL, True, 111 + SPARE)
    assert seen["in turns"] == [[NONE, ALL]] * 3


def test_nested_calls_and_those_that_raise_leave_it_as_it_was(seen):
    assert (seen["nested"], seen["after nested"]) == (NONE, ALL)
    assert seen["after raising"] == [NONE, ALL, 111 + SPARE]


def test_what_a_call_returns_is_nobody_elses(seen):
    assert seen["outlives"]
    assert seen["after what outlived"] == [NONE, ALL]


def test_threads_of_other_arenas_do_without(seen, seen_in_one_arena):
    assert (seen["main reached"], seen["thread reached"]) == (True, False)
    assert (seen["in a thread"], seen["after a thread"]) == (ALL, [NONE, ALL, 111 + SPARE])
    assert seen_in_one_arena["thread reached"]
    assert (seen_in_one_arena["in a thread"], seen_in_one_arena["after a thread"]) == (NONE, [NONE, ALL, 111 + SPARE])


def test_calls_in_several_threads_at_once(seen_in_one_arena):
    assert seen_in_one_arena["beside"] == []


def test_a_forked_process_goes_on_with_it(seen):
    assert seen["status of a fork"] == 0


def test_it_counts_as_memory_that_a_call_needs(seen):
    kept, plain = seen["high water"]
    if -1 not in (kept, plain):  # a kernel without a peak of resident memory
        assert (kept, plain) == (ALL, ALL)


def test_it_goes_back_with_the_last_who_keeps_it(seen):
    with_one_left, freed, *calls = seen["leaving"]
    assert (with_one_left, calls) == (NONE, [ALL, NONE])
    assert freed >= 100


def test_room_is_made_for_calls_that_do_not_find_any(seen):
    assert seen["short"] == [NONE, ALL]


def told(**variables):
    return run("-c", "from perfkit.measure import kept_region; print(kept_region.unavailable())", **variables)


def test_where_it_cannot_be():
    assert told().strip() == ""
    assert "there is nothing to do: this process was started with MALLOC_ARENA_MAX=1" in told(**kept_memory.SETTINGS)
    code = "from perfkit.measure import kept_region; print(kept_region.enlarge(64 << 20))"
    assert run("-c", code, MALLOC_MMAP_THRESHOLD_="4096").strip() == "False", "small pieces are mapped, too"
    assert run("-c", code).strip() == "True"


def test_another_malloc_is_found_whatever_its_name(monkeypatch):
    monkeypatch.setattr(kept_memory, "at_start", dict)
    kept_region._not_there.cache_clear()
    monkeypatch.setattr(kept_region, "_address", id)
    assert "another malloc has taken the place" in kept_region.unavailable()
    kept_region._not_there.cache_clear()
    monkeypatch.setattr(kept_region, "_LIBC", None)
    assert "another malloc has taken the place" in kept_region.unavailable()
    kept_region._not_there.cache_clear()
    monkeypatch.setattr(kept_memory, "unavailable", lambda: "this is another C library")
    assert kept_region.unavailable().endswith("glibc's malloc: this is another C library")


def test_a_heap_that_cannot_grow_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(kept_region, "MOST_TRIED", -(1 << 30))  # at once, whatever was allocated by then
    before = kept_region.size()
    assert not kept_region.enlarge(64 << 20)
    assert kept_region.size() == before
