"""What `python -m bench.fresh_memory` measures, and what of it is in the page."""

import json
import os

import pytest

from bench import fresh_memory, pages
from perfkit.measure import kept_memory
from perfkit.measure.kept_memory import KEPT_BYTES

MACHINE = {"accelerators": [], "cpu": "a processor", "cores": 2}


def test_the_page_holds_what_was_recorded():
    written = pages.between(fresh_memory.PAGE, fresh_memory.MARKS)
    assert written.strip() == "\n".join(fresh_memory.measured()).strip(), "run python -m bench.fresh_memory --page"


def test_the_settings_of_the_page_are_those_that_are_advised():
    assert f"{kept_memory.TYPED} python train.py" in fresh_memory.PAGE.read_text()


@pytest.mark.skipif(bool(kept_memory.unavailable()), reason="not glibc's malloc")
@pytest.mark.parametrize(("framework", "batch_size"), [("jax", 128), ("torch", 512)])
def test_steps_touch_no_page_for_the_first_time_where_memory_is_kept(framework, batch_size, monkeypatch):
    for package in (framework, "sklearn"):
        pytest.importorskip(package)
    monkeypatch.setattr(fresh_memory, "BLOCK_MS", 1.0)
    row = fresh_memory.row(framework, "training", "cnn", batch_size, 2)
    assert row["temporary_bytes"] > KEPT_BYTES
    assert row["anew"]["faults"] > row["temporary_bytes"] / 2 / 2**21, "in pages of 2 MiB at most"
    assert row["kept"]["faults"] < row["anew"]["faults"] / 10
    assert len(row["anew"]["blocks_ms"]) == len(row["kept"]["blocks_ms"]) == row["ratio"]["pairs"] == 2
    assert row["kept"]["peak_bytes"] > row["temporary_bytes"]


def test_a_worker_that_fails_is_told():
    with (
        fresh_memory.worker(("torch", "training", "no such model", 1), dict(os.environ)) as worker,
        pytest.raises(RuntimeError, match="begin"),
    ):
        worker.asked("begin")


def test_what_is_shown(monkeypatch, tmp_path):
    row = {
        "framework": "jax", "mode": "training", "model": "cnn", "batch_size": 128,
        "temporary_bytes": 2**27, "verdict": "faster",
        "ratio": {"ratio": 1.625, "low": 1.5, "high": 2.0, "pairs": 20},
        "anew": {"step_ms": 162.5, "faults": 21800.0, "peak_bytes": 2**29},
        "kept": {"step_ms": 100.0, "faults": 300.0, "peak_bytes": 2**30},
    }  # fmt: skip
    (tmp_path / "fresh-memory-a-processor.json").write_text(json.dumps({"environment": MACHINE, "rows": [row]}))
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    told = "\n".join(fresh_memory.measured())
    assert "a processor, 2 cores, the reference models" in told
    assert (
        "| cnn, 128 | jax, training | 128 MiB | 162.5 ms | 100.0 ms | 1.62× [1.50, 2.00] faster | 21800 → 300 |" in told
    )
    assert "| 512 MiB → 1.00 GiB |" in told
