"""The process' memory high-water mark: the real one, a fake /proc, and what is said where there is none."""

import mmap
import sys

import pytest

from perfkit.measure import memory
from perfkit.measure.memory import process_high_water

MEBIBYTE = 2**20


def touch(mebibytes):
    """Make that much memory resident, and give it back."""

    def call():
        with mmap.mmap(-1, mebibytes * MEBIBYTE) as pages:
            pages.write(b"\1" * len(pages))

    return call


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc/self/clear_refs, which is Linux's")
def test_the_rise_is_what_one_call_touches():
    small, large = (process_high_water(touch(size)) for size in (16, 64))
    if small.value is None:
        pytest.skip(f"/proc/self/clear_refs cannot be written here: {small.unavailable}")
    # The bytes that are written are resident too, beside the pages they are written to.
    assert small.value == pytest.approx(2 * 16 * MEBIBYTE, abs=3 * MEBIBYTE)
    assert large.value == pytest.approx(2 * 64 * MEBIBYTE, abs=3 * MEBIBYTE)
    assert (large.unit, "median of 3" in large.method) == ("B", True)


@pytest.fixture
def proc(tmp_path):
    """A fake /proc/self in which each call of `grow` raises the peak, and writing to clear_refs resets it."""
    (tmp_path / "clear_refs").write_text("")
    write_status(tmp_path, resident_kb=1000, peak_kb=9000)
    return tmp_path


def write_status(proc, resident_kb, peak_kb):
    (proc / "status").write_text(f"Name:\tpython\nVmHWM:\t{peak_kb} kB\nVmRSS:\t{resident_kb} kB\n")


def test_median_of_the_repeats(proc):
    rises = iter([700, 100, 300])

    def call():
        assert (proc / "clear_refs").read_text() == "5"
        write_status(proc, resident_kb=1000, peak_kb=1000 + next(rises))

    assert process_high_water(call, proc=proc).value == 300 * 1024


def test_a_peak_below_what_was_resident_is_no_rise(proc):
    assert process_high_water(lambda: write_status(proc, 900, 950), repeats=1, proc=proc).value == 0.0


def test_a_c_library_without_malloc_trim_is_said(proc, monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: object())
    assert "without malloc_trim" in process_high_water(lambda: None, proc=proc).method


def test_another_platform_gets_a_reason_and_no_call(tmp_path):
    calls = []
    quantity = process_high_water(lambda: calls.append(1), proc=tmp_path / "none")
    assert quantity.value is None
    assert "needs Linux" in quantity.unavailable
    assert calls == []


def test_a_kernel_without_a_peak_gets_a_reason(proc):
    (proc / "status").write_text("VmRSS:\t1000 kB\n")
    assert "no line VmHWM" in process_high_water(lambda: None, proc=proc).unavailable


def test_what_the_call_raises_is_not_taken_for_a_missing_platform(proc):
    def call():
        raise OSError("the model's own")

    with pytest.raises(OSError, match="the model's own"):
        process_high_water(call, proc=proc)


def test_the_native_heap_tells_what_malloc_gave():
    before = memory.native_heap()
    if before.value is None:
        pytest.skip(before.unavailable)
    size = 64 * 2**20
    given = memory.ctypes.create_string_buffer(size)
    assert memory.native_heap().value - before.value >= size
    assert memory.native_heap(without_bytes=size).value < memory.native_heap().value
    del given


def test_a_c_library_without_mallinfo_is_a_reason(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: object())
    assert "mallinfo2" in memory.native_heap().unavailable
