"""What bench.plan records: launches summed up, and pages that show it."""

import json

import pytest


def test_the_pages_show_what_was_recorded():
    from bench import pages, plan_pages

    expected = {plan_pages.PLANNING: (plan_pages.PREDICTIONS, plan_pages.predictions())}
    expected |= {page: (plan_pages.SCALING, plan_pages.scaling(name)) for name, page in plan_pages.SPREAD.items()}
    for page, (marks, lines) in expected.items():
        shown = pages.between(page, marks)
        assert shown.strip() == "\n".join(lines).strip(), "run python -m bench.plan --page"


def launched(predicted_ms, steps_ms, one_ms):
    about = {"framework": "torch", "model": "m", "processes": 2, "layout": "data 2", "recipe": "data_parallel(2)"}
    predicted = {"predicted_ms": predicted_ms, "parts_ms": {"computing": predicted_ms}}
    return about | predicted | {"steps_ms": [steps_ms] * 8, "one_ms": [one_ms] * 8, "all_cores_ms": []}


def test_launches_are_summed_up_by_their_medians():
    from bench import plan, plan_pages

    described = {"sent_bytes": 1e3, "communicating": None, "held_bytes": 2048, "peak_bytes": None}
    (found,) = plan.summed_up(
        [launched(10.0, 10.0, 15.0) | described, launched(12.0, 10.0, 15.0), launched(9.0, 12.0, 18.0)]
    )
    assert (found["predicted_ms"], found["measured_ms"], found["launches"]) == (10.0, 10.0, 3)
    assert (found["ratio"], found["lowest"], found["highest"]) == (1.0, 0.75, 1.2)
    assert found["scaling"]["one"] == pytest.approx({"ratio": 1.5, "low": 1.5, "high": 1.5, "pairs": 24})
    assert found["scaling"]["all_cores"] is None
    assert json.dumps(found)
    cells = [cell.strip() for cell in plan_pages.scaling_line(found).split("|")[1:-1]]
    assert cells[3:7] == ["15.0 → 10.0 ms", "1.50× [1.50, 1.50]", "75%", "–"]
    assert cells[-2:] == ["unavailable", "2.00 KiB, unavailable"]


def test_no_launch_begins_that_would_end_too_late(monkeypatch, capsys):
    from bench import plan

    made, clock = [], iter(range(0, 600, 60))  # each look at the clock is a minute later
    monkeypatch.setattr(plan.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(plan, "launched", lambda *about, **_: made.append(about[1]) or [launched(1.0, 1.0, 1.0)])
    options = plan._parser().parse_args(["--quick", "--minutes", "7", "--repeats", "9", "--processes", "2"])
    plan.record("torch", options)
    assert made == [2, 2]
    assert "7 minutes are nearly over after 2 launches" in capsys.readouterr().out
