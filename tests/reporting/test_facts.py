"""What is said: the same for every renderer."""

from __future__ import annotations

import dataclasses

import pytest

from perfkit._quantity import Quantity, Verdict
from perfkit._report import Candidate, Parallel
from perfkit.reporting import _environment_facts, _facts, _parallel_facts, _search_facts, _table_facts


def test_headline_of_a_result(reports):
    head = _facts.headline(reports["fast"])
    assert head.text == "1.84× [1.80, 1.88] faster"
    assert head.tone == "good"
    assert head.evidence == ("99% interval from 200 interleaved pairs; the original against itself varies by ±1.1%")


@pytest.mark.parametrize(
    ("verdict", "tone"), [("slower", "bad"), ("no significant change", "neutral"), ("too noisy", "neutral")]
)
def test_headline_says_every_verdict(make, verdict, tone):
    head = _facts.headline(make.report(speedup=make.comparison(0.99, verdict=Verdict(verdict))))
    assert (head.verdict, head.tone) == (verdict, tone)


def test_headline_of_a_returned_original_never_leads_with_a_ratio(reports):
    head = _facts.headline(reports["original_returned"])
    assert head.text == "Original returned"
    assert head.evidence.startswith("measured 0.71× [0.70, 0.72] slower; 99% interval")
    assert head.explanation.startswith("bf16 is slower on this processor")


def test_headline_without_a_measurement_says_why(reports):
    head = _facts.headline(reports["not_measured"])
    assert (head.text, head.evidence) == ("Not measured", "no example_inputs were given")


def test_alarms(reports, make):
    assert _facts.alarms(reports["fast"]) == ()
    told = "\n".join(_facts.alarms(reports["failed_fidelity"]))
    assert "Fidelity failed: output 0 holds inf where the original is finite" in told
    assert "The metric dropped too far: 0.98 → not finite (a drop of 0.01 is allowed)" in told
    assert "kernels: int4_weight_only" in told
    idle = make.report(steps=(make.step("prune", 1.0, touched=0),))
    assert _facts.alarms(idle) == ("NO_EFFECT: no step changed anything in this model",)


def test_rows_hold_both_sides_and_the_change(reports):
    rows = {row.label: row for row in _table_facts.rows(reports["fast"])}
    assert rows["tensor peak"] == _table_facts.Row("tensor peak", "31.2 MiB", "16.1 MiB", "−48.4%")
    assert rows["compile"] == _table_facts.Row("compile", "0 s", "8.00 s", "")
    assert rows["parameters"] == _table_facts.Row("parameters", "300,298", "300,298", "same")
    assert "p99 latency" not in rows
    assert _table_facts.missing(reports["fast"]) == ("p99 latency: needs 662 samples, 200 were taken",)


def test_reasons_are_told_once_and_sides_where_they_differ(reports, make):
    everything = _table_facts.missing(reports["not_measured"])
    assert len(everything) == 1
    assert everything[0].endswith("tensor peak, process high-water: no example_inputs were given")
    after = make.measurement("result", process_high_water_bytes=Quantity.missing("B", "no /proc"))
    assert "process high-water (after): no /proc" in _table_facts.missing(make.report(after=after))


def test_a_percentile_that_one_side_has_is_shown(make):
    short = make.measurement("result", latency=make.latency(6.0, count=70))
    rows = {row.label: row for row in _table_facts.rows(make.report(after=short))}
    assert rows["p95 latency"].after == "unavailable"
    assert rows["p95 latency"].before.endswith("ms")


def test_methods_are_grouped(reports):
    assert "tensor peak: allocations traced during one call" in _table_facts.methods(reports["fast"])


def test_step_counts_reasons(reports):
    first, _, third, _ = (_facts.step_facts(step) for step in reports["fast"].steps)
    assert (first.touched, first.skipped, first.reasons) == (2, 2, ("2 × no convolution",))
    assert (third.status, third.touched) == ("NO_EFFECT", 0)
    assert _facts.step_facts(reports["not_measured"].steps[0]).speedup == "not measured"
    assert _facts.step_facts(reports["failed_fidelity"].steps[1]).status == "applied, simulated"


def test_fidelity_line_tells_error_limit_and_reference(reports):
    told = "relative error 3.1e-3, at most 0.01 allowed, compared with the original in float64"
    assert _facts.fidelity(reports["fast"].fidelity) == told
    assert _facts.fidelity(None) == "not measured"
    rows = dict(_facts.fidelity_rows(reports["failed_fidelity"].fidelity))
    assert rows["relative error"] == "not finite"
    assert rows["top-1 agreement"] == "unavailable: outputs are not logits"
    assert rows["reason"] == "output 0 holds inf where the original is finite"


def test_baseline_and_payback(reports):
    assert _facts.compiled(reports["fast"]) == "1.21× [1.19, 1.23] faster, compared with torch.compile"
    assert _facts.compiled(reports["original_returned"]) == "not measured"
    assert _facts.payback(reports["fast"]) == "after 1,674 calls; optimizing took 9.40 s"
    assert _facts.payback(reports["original_returned"]).startswith("unavailable: the result is not faster;")


def test_candidates_start_with_the_winner_and_then_the_fastest(reports):
    facts = _search_facts.candidate_facts(reports["auto"])
    assert [item.outcome for item in facts[:2]] == ["won", "lost"]
    assert [item.recipe for item in facts[1:4]] == ["int8", "compile", "int8_dynamic"]
    assert facts[1].fidelity == "failed, 3.1e-3"
    assert [item.outcome for item in facts[6:]] == ["failed"]


def test_what_was_not_tried_stands_by_its_reason(make):
    short, refused = "the budget of 60 s was spent", "it needs a GPU"
    chains = (
        Candidate("tf32", "refused", refused),
        *(Candidate(name, "not tried", short) for name in ("bf16+qat", "qat")),
    )
    made = make.report(
        candidates=(*chains, Candidate("int8", "lost", "it is not faster"), Candidate("fp8", "refused", refused))
    )
    first, second = _search_facts.left_out(made)
    assert (first.recipes, first.outcome, first.reason) == (("bf16 + qat", "qat"), "not tried", short)
    assert (second.recipes, second.outcome, second.reason) == (("tf32", "fp8"), "refused", refused)


def test_a_noisy_candidate_is_called_noisy(make):
    noisy = Candidate("bf16", "lost", "too noisy", make.comparison(1.1, verdict=Verdict.NOISY))
    (facts,) = _search_facts.candidate_facts(make.report(candidates=(noisy,)))
    assert facts.speedup == "1.10× [1.08, 1.12] too noisy"


def test_summary_of_a_search_names_what_was_found_and_what_lost(reports):
    facts = _search_facts.summary("CNN", reports["auto"])
    assert facts.recipe == "channels_last + bf16 + prune + compile"
    assert facts.speedup == ("1.84×", "[1.80, 1.88]")
    assert facts.compiled == ("1.21×", "[1.19, 1.23]")
    assert facts.peak == ("31.2 MiB", "16.1 MiB")
    assert facts.error == "3.1e-3"
    assert facts.lost == "6: int8, int8_dynamic and 4 more"


@pytest.mark.parametrize(
    ("kind", "speedup", "recipe"),
    [
        ("original_returned", "Original returned", "none (original)"),
        ("not_measured", "Not measured", "channels_last + bf16 + prune + compile"),
        ("single_step", "1.004× no change", "compile"),
    ],
)
def test_summary_without_a_gain_says_so(reports, kind, speedup, recipe):
    facts = _search_facts.summary("x", reports[kind])
    assert (facts.speedup[0], facts.recipe) == (speedup, recipe)


def test_losses_and_metric(reports):
    assert _facts.losses(reports["failed_fidelity"]) == "last of 3 steps: 0.25 → not finite"
    assert _facts.losses(reports["fast"]) == ""
    assert _facts.metric(reports["training"]) == "0.981 → 0.979 (a drop of 0.01 is allowed)"
    assert _facts.metric(reports["fast"]) == ""


@pytest.mark.parametrize(("mode", "one"), [("training", "step"), ("inference", "call")])
def test_several_devices(make, mode, one):
    sent, unknown = Quantity(76.0, "B", method="counted"), Quantity.missing("ratio", "one program")
    found = Parallel("data 4", 4, 1, ("data: the batch in 4 parts",), unknown, sent, unknown, (), ())
    rows = dict(_parallel_facts.parallel_rows(make.report(parallel=found, mode=mode)))
    assert rows["layout"] == "data 4; 4 devices in 1 process"
    assert rows["exchanged"] == f"76 B (counted) a {one} by each device"
    assert rows["communicating"] == "unavailable: one program"


def test_environment(reports):
    environment = reports["fast"].environment
    line = _environment_facts.environment_line(environment)
    assert line.startswith("AMD EPYC 9B14 (2 cores) · no accelerator · Linux 6.1 · Python 3.11.7 · numpy 2.4.0")
    assert line.endswith("fingerprint a1b2c3d4e5f6")
    gpu = dataclasses.replace(environment, accelerators=("H100",), memory_bytes=Quantity.missing("B", "not permitted"))
    assert "H100" in _environment_facts.environment_line(gpu)
    assert ("memory", "unavailable: not permitted") in _environment_facts.environment_rows(gpu)
    none = dataclasses.replace(environment, settings={"NVML": "NVML finds no GPU", "governor": "performance"})
    rows = dict(_environment_facts.environment_rows(none))
    assert (rows["accelerators"], rows["settings"]) == ("none: NVML finds no GPU", "governor performance")
