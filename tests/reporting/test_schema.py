"""The schema accepts every report and refuses what is not one."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys

import pytest
from jsonschema import Draft202012Validator

from perfkit import _report
from perfkit.reporting.schema import schema

VALIDATOR = Draft202012Validator(schema())


def problems(data) -> list[str]:
    return [error.message for error in VALIDATOR.iter_errors(data)]


def test_is_a_schema():
    Draft202012Validator.check_schema(schema())
    assert schema()["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_accepts_every_report(report):
    assert problems(report.to_dict()) == []
    assert problems(json.loads(report.to_json())) == []


BREAKS = {
    "a field too many": lambda data: data.update(extra=1),
    "a field too many, deep": lambda data: data["before"]["tensor_peak_bytes"].update(extra=1),
    "a field missing": lambda data: data.pop("fidelity"),
    "a field missing, deep": lambda data: data["steps"][0]["effect"].pop("skipped"),
    "an unknown verdict": lambda data: data["speedup"].update(verdict="blazing"),
    "a number as text": lambda data: data["speedup"].update(ratio="1.84"),
    "a text as number": lambda data: data.update(model=3),
    "a fraction of a parameter": lambda data: data["after"].update(parameters=1.5),
    "a boolean as text": lambda data: data["fidelity"].update(ok="yes"),
    "no outcome": lambda data: data.update(outcome=None),
    "no time where time is always known": lambda data: data.update(optimizing_s=None),
    "a list as an object": lambda data: data.update(steps={}),
    "a value and a reason": lambda data: data["payback_calls"].update(value=1.0, unavailable="no"),
    "libraries as a list": lambda data: data["environment"].update(libraries=[]),
    "another version": lambda data: data.update(schema_version=_report.SCHEMA_VERSION + 1),
}


@pytest.mark.parametrize("name", BREAKS)
def test_refuses_what_is_not_a_report(reports, name):
    data = reports["fast"].to_dict()
    broken = copy.deepcopy(data)
    BREAKS[name](broken)
    assert problems(data) == []
    assert problems(broken)


def test_not_finite_is_null_and_accepted(reports):
    data = reports["failed_fidelity"].to_dict()
    assert data["fidelity"]["relative_error"] is None
    assert data["losses"]["after"] == [1.0, None, None]
    assert problems(data) == []


def test_covers_every_dataclass_and_field():
    known = schema()
    kinds = [kind for kind in vars(_report).values() if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
    assert len(kinds) > 10
    kinds.remove(_report.Saving)  # read off a report, not part of it
    for kind in kinds:
        found = known if kind is _report.Report else known["$defs"][kind.__name__]
        assert list(found["properties"]) == [field.name for field in dataclasses.fields(kind)]
        assert found["required"] == list(found["properties"])
        assert found["additionalProperties"] is False


def test_carries_the_docstrings():
    comparison = schema()["$defs"]["Comparison"]
    assert comparison["description"] == "Two variants timed interleaved in one run."
    assert comparison["properties"]["ratio"]["description"].startswith("time of `baseline` / time of `variant`")
    assert comparison["properties"]["low"] == comparison["properties"]["high"]


def test_prints_itself():
    run = subprocess.run(
        [sys.executable, "-W", "error", "-m", "perfkit.reporting.schema"], capture_output=True, text=True, check=True
    )
    assert json.loads(run.stdout) == schema()
