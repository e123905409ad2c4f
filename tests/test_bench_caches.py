"""What `python -m bench.caches` measures, and what of it is in the page."""

from __future__ import annotations

import argparse
import json

import pytest

from bench import caches, caches_page, caches_worker, pages

OPTIONS = argparse.Namespace(framework="torch", steps=2, rounds=1, batch_size=2)
MACHINE = {"accelerators": [], "cpu": "a processor", "cores": 2}


def test_the_page_holds_what_was_recorded():
    written = pages.between(caches_page.PAGE, caches_page.MARKS)
    assert written.strip() == "\n".join(caches_page.measured()).strip(), "run python -m bench.caches --page"


def test_trimming_gives_back_what_the_next_step_must_fetch_again():
    """In a process of its own, as all cases are."""
    pytest.importorskip("torch")
    row = caches._run("small blocks", "torch", OPTIONS)
    blocks = caches_worker.SMALL_BLOCKS * caches_worker.SMALL_BYTES
    assert row["held_bytes"] >= blocks
    assert row["trimmed_bytes"] < row["freed_bytes"] - blocks / 2
    assert row["again_faults"][1] > row["again_faults"][0] + blocks / 2 / 4096
    assert caches_page.ABOUT["small blocks"](row).startswith("200000 tensors of 1.00 KiB take")


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_a_step_under_a_setting_is_counted(framework):
    pytest.importorskip(framework)
    row = caches._run("steps", framework, OPTIONS, caches.SETTINGS["mapped above 64 KiB"])
    assert row["step_ms"] > 0
    assert row["resident_bytes"] > 2**20


def test_a_worker_that_fails_says_why():
    with pytest.raises(RuntimeError, match="batch_size"):
        caches._run("steps", "torch", argparse.Namespace(steps=1, batch_size=-1))


def test_what_is_shown(monkeypatch, tmp_path):
    trim = {"without": {"step_ms": 10, "faults": 1}, "with": {"step_ms": 12, "faults": 300}, "trim_ms": 2.0}
    rows = [
        {
            "case": "settings", "framework": "torch", "setting": "mapped above 64 KiB", "step_ms": 12.3, "faults": 45.0,
            "variables": {"MALLOC_MMAP_THRESHOLD_": "65536"}, "resident_bytes": 2**20,
        },
        {"case": "trim", "framework": "torch", "given_back_bytes": 2**20, "resident_bytes": 2**22} | trim,
        {
            "case": "empty_cache", "framework": "torch", "never": {"step_ms": 5.0, "device_allocations": 0},
            "each step": {"step_ms": 9.0, "device_allocations": 80}, "reserved_bytes": [2**30, 2**29],
            "allocated_bytes": 2**20,
        },
        {
            "case": "clear_caches", "framework": "jax", "step_ms": 100, "next_ms": 2500, "programs": 1,
            "given_back_bytes": 0,
        },
    ]  # fmt: skip
    path = tmp_path / "caches-a-processor.json"
    path.write_text(json.dumps({"environment": MACHINE, "batch_size": 64, "rows": rows}))
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    told = "\n".join(caches_page.measured())
    assert "| mapped above 64 KiB `MALLOC_MMAP_THRESHOLD_=65536` | torch | 12 ms | 45 | 1.00 MiB |" in told
    assert "12 ms with 300 page faults, in place of 10 ms with 1" in told
    assert "9.0 ms with 80 allocations by the driver, in place of 5.0 ms with 0" in told
    assert "compiles 1 program(s) again and takes 2.5 s in place of 0.10 s" in told
