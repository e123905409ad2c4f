"""The terminal shows the facts at every width, and nothing that a model's name says to the terminal."""

from __future__ import annotations

import io
import re

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from perfkit.reporting import terminal

CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]")


def words(text: str) -> str:
    """The text without its line breaks and columns."""
    return " ".join(text.split())


def printed(renderable, width: int, **options) -> str:
    console = Console(file=io.StringIO(), width=width, force_jupyter=False, legacy_windows=False, **options)
    console.print(renderable)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_fits_every_width(report, width):
    lines = terminal.to_text(report, width).splitlines()
    assert len(lines) > 10
    assert max(map(cell_len, lines)) <= width


@pytest.mark.parametrize("width", [80, 100, 140])
def test_tells_the_proof(reports, width):
    told = words(terminal.to_text(reports["fast"], width))
    for fact in (
        "MnistCNN · torch · inference · cpu",
        "1.84× [1.80, 1.88] faster",
        "99% interval from 200 interleaved pairs",
        "Use result.model in place of the original",
        "throughput 5,203 items/s 9,581 items/s +84.1%",
        "first call 45.1 ms 8.21 s ×182",
        "tensor peak 31.2 MiB 16.1 MiB −48.4%",
        "process high-water 49.9 MiB 25.8 MiB",
        "model size 1.15 MiB 587 KiB −50.0%",
        "parameters 300,298 300,298 same",
        "unavailable: p99 latency: needs 662 samples, 200 were taken",
        "bf16 4 1 1.49× [1.46, 1.52] faster",
        "prune(amount=0.3) NO_EFFECT 0 1",
        "channels_last skipped 2 × no convolution",
        "ok: relative error 3.1e-3, at most 0.01 allowed",
        "1.21× [1.19, 1.23] faster, compared with torch.compile",
        "after 1,674 calls; optimizing took 9.40 s",
        "note: Timed with 2 threads.",
        "fingerprint a1b2c3d4e5f6",
    ):
        assert fact in told


def test_unavailable_is_never_zero(reports):
    told = str(reports["unavailable"])
    assert re.search(r"tensor peak +unavailable +unavailable", told)
    assert "unavailable: tensor peak (after): no tensor_peak_bytes on after" in told
    assert not re.search(r"\b0 (B|s|ms|items/s)\b", told)


def test_outcomes_other_than_success_lead(reports):
    told = str(reports["original_returned"])
    assert told.index("Original returned") < told.index("measured 0.71× [0.70, 0.72] slower") < told.index("before")
    assert "Not measured: no example_inputs were given" in str(reports["not_measured"])


def test_failures_and_simulations_stand_above_the_numbers(reports):
    told = str(reports["failed_fidelity"])
    top = told[: told.index("before  ")]
    assert "! Fidelity failed: output 0 holds inf where the original is finite" in top
    assert "! Simulated" in top
    assert "FAILED: relative error not finite" in told
    assert "int4_weight_only  applied, simulated" in told


def test_search_shows_every_candidate_with_its_fate(reports):
    told = words(terminal.to_text(reports["auto"], 140))
    for fact in (
        "channels_last + bf16 + prune + compile won 1.84× [1.80, 1.88] ok, 3.1e-3",
        "int8 lost 2.20× [2.16, 2.24] failed, 3.1e-3 relative error 0.2, at most 0.01 allowed",
        "fp8 refused needs a GPU",
        "fused_kernels failed not measured not measured RuntimeError: no kernel for stride 3",
        "qat not tried the budget of 60 s was spent",
    ):
        assert fact in told


def test_long_lists_are_cut_and_say_so(reports):
    told = str(reports["huge_names"])
    assert "297 more reasons" in told
    assert "60 more candidates in the HTML and JSON reports" in told


def test_bars_grow_with_the_ratio(reports):
    told = str(reports["twelve_steps"])
    lengths = [line.count("█") for line in told.splitlines() if "×" in line and "█" in line]
    assert len(lengths) == 13
    assert lengths[-1] == terminal.BAR_CELLS == max(lengths)
    assert lengths[0] == 1


def test_training_shows_losses_and_metric(reports):
    told = words(str(reports["training"]))
    assert "loss last of 400 steps: 0.01075 → 0.01068" in told
    assert "metric ok: 0.981 → 0.979" in told


def test_names_are_neither_markup_nor_control_sequences(reports):
    shown = printed(terminal.render(reports["hostile"]), 100, force_terminal=True, color_system="truecolor")
    assert "\x1b[" in shown, "colour is on, so the next lines would find what slips through"
    text = Text.from_ansi(shown).plain
    assert not CONTROL.search(text)
    assert "[bold red]" in text
    assert "\ufffd[31m" in text
    wide = terminal.to_text(reports["hostile"], 1000)
    assert wide.count("<script>alert") == wide.count("[bold red]") > 10
    assert not CONTROL.search(wide)
    assert not CONTROL.search(str(reports["unicode_names"]))


def test_plain_is_the_same_whatever_the_terminal(reports, monkeypatch):
    expected = str(reports["auto"])
    for name, value in {"FORCE_COLOR": "1", "COLUMNS": "40", "TERM": "dumb"}.items():
        monkeypatch.setenv(name, value)
    assert str(reports["auto"]) == expected
    assert "\x1b" not in expected


def test_rich_prints_a_report_by_itself(reports):
    assert "1.84× [1.80, 1.88] faster" in printed(reports["fast"], 100)


@pytest.mark.parametrize("width", [60, 100, 120, 260])
def test_summary_tells_the_same_at_every_width(reports, width):
    rows = [(f"run {index}", report) for index, report in enumerate(reports.values())]
    told = printed(terminal.summary_table(rows), width)
    assert max(map(cell_len, told.splitlines())) <= width
    for fact in ("1.84×", "[1.80, 1.88]", "Original returned", "Not measured", "1.21×", "[1.19, 1.23]", "int8_dynamic"):
        assert fact in told
    assert sum(f"run {index}" in words(told) for index in range(len(rows))) == len(rows)


def test_summary_is_one_line_each_where_it_fits(reports):
    rows = [(name, reports[name]) for name in ("fast", "auto", "original_returned")]
    lines = printed(terminal.summary_table(rows), 200).splitlines()
    assert len(lines) == 2 + len(rows)
    assert "1.84× [1.80, 1.88]" in lines[3]
    assert "31.2 MiB → 16.1 MiB" in lines[3]


def test_summary_does_not_hide_a_failed_fidelity(reports):
    for width in (60, 120, 250):
        assert "FAILED" in printed(terminal.summary_table([("x", reports["failed_fidelity"])]), width)
