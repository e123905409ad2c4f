"""What the operating system took away, read from fake files and from the real ones."""

import os
import sys

import pytest

from perfkit.measure import _scheduler
from perfkit.measure._scheduler import Interruptions, waited_s


def write_stat(path, stolen):
    path.write_text(f"cpu  100 0 50 9000 10 0 5 {stolen} 0 0\ncpu0 50 0 25 4500 5 0 2 1 0 0\n")


def test_stolen_time_is_the_eighth_figure_of_the_first_line(tmp_path):
    stat = tmp_path / "stat"
    write_stat(stat, 7)
    with Interruptions(stat) as interruptions:
        assert interruptions.count()[1] == 7
        with stat.open("r+") as file:
            file.write("cpu  100 0 50 9000 10 0 5 8")
        assert interruptions.count()[1] == 8
        assert f"stolen time ({stat})" in interruptions.method


def test_an_old_kernel_without_stolen_time_counts_none(tmp_path):
    (tmp_path / "stat").write_text("cpu  100 0 50 9000\n")
    with Interruptions(tmp_path / "stat") as interruptions:
        assert interruptions.count()[1] == 0


def test_a_platform_that_counts_nothing_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(_scheduler, "resource", None)
    with Interruptions(tmp_path / "none") as interruptions:
        assert interruptions.method == ""
        assert interruptions.count() == (0, 0)


def test_context_switches_are_the_process_own(tmp_path, monkeypatch):
    class Resource:
        RUSAGE_SELF = "self"

        @staticmethod
        def getrusage(who):
            assert who == "self"
            return type("Usage", (), {"ru_nivcsw": 42})

    monkeypatch.setattr(_scheduler, "resource", Resource)
    with Interruptions(tmp_path / "none") as interruptions:
        assert interruptions.count() == (42, 0)
        assert interruptions.method == "involuntary context switches (getrusage)"


def test_waiting_adds_up_over_threads_and_passes_over_one_that_ended(tmp_path):
    for thread, waited_ns in (("11", 1_500_000_000), ("12", 250_000_000)):
        (tmp_path / thread).mkdir()
        (tmp_path / thread / "schedstat").write_text(f"987 {waited_ns} 3\n")
    (tmp_path / "13").mkdir()
    assert waited_s(tmp_path, tmp_path / "none") == pytest.approx(1.75)
    assert waited_s(tmp_path / "none") is None


def test_stolen_time_is_waited_for_too(tmp_path):
    (tmp_path / "11").mkdir()
    (tmp_path / "11" / "schedstat").write_text("987 1500000000 3\n")
    write_stat(tmp_path / "stat", 7)
    assert waited_s(tmp_path, tmp_path / "stat") == pytest.approx(1.5 + 7 / os.sysconf("SC_CLK_TCK"))
    assert waited_s(tmp_path / "none", tmp_path / "stat") is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc, which is Linux's")
def test_the_real_files_can_be_read():
    with Interruptions() as interruptions:
        first, second = interruptions.count(), interruptions.count()
    assert all(later >= earlier for earlier, later in zip(first, second, strict=True))
    assert waited_s() >= 0
