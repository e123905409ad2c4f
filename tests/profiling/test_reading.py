"""What `to_json` wrote is read back as it was, and everything else is refused with the place where it is wrong."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import sample_profile_parts
import sample_profiles
from jsonschema import Draft202012Validator

from perfkit._errors import InvalidInputError
from perfkit._quantity import Quantity
from perfkit.profiling import _memory_data, _profile, _time_data
from perfkit.profiling._profile import Profile
from perfkit.reporting.schema import schema

VALIDATOR = Draft202012Validator(schema(Profile))


@pytest.mark.parametrize("name", [name for name in sample_profiles.FACTORIES if name != "huge"])
def test_read_back_as_it_was(name, tmp_path):
    profile = sample_profiles.FACTORIES[name]()
    path = tmp_path / "profile.json"
    text = profile.to_json(path)
    assert Profile.from_json(path) == Profile.from_json(text) == profile
    assert [error.message for error in VALIDATOR.iter_errors(json.loads(text))] == []


def test_not_finite_is_read_back_as_not_a_number():
    odd = dataclasses.replace(sample_profile_parts.time().ops[0], self_ms=math.inf)
    unknown = Quantity(math.nan, "ratio")
    profile = sample_profiles.cnn(time=sample_profile_parts.time(ops=(odd,), busy=unknown))
    found = Profile.from_json(profile.to_json())
    assert math.isnan(found.time.ops[0].self_ms)
    assert math.isnan(found.time.busy.value)
    assert found.time.busy.unavailable is None


def test_a_profile_of_before_a_field_is_read():
    data = sample_profiles.cnn().to_dict()
    del data["time"]["as_one"]
    assert Profile.from_json(json.dumps(data)) == sample_profiles.cnn()


BREAKS = {
    "a newer version": (lambda data: data.update(schema_version=_profile.SCHEMA_VERSION + 1), "update perfkit"),
    "an older version": (lambda data: data.update(schema_version=0), "profile again"),
    "another file": (lambda data: data.pop("findings"), "holds no profile"),
    "a field too many": (lambda data: data["time"].update(extra=1), r"\.time has an unknown extra"),
    "a field missing": (lambda data: data["time"]["ops"][3].pop("name"), r"\.time\.ops\[3\] lacks name"),
    "a text as number": (lambda data: data["time"]["ops"][0].update(flops="1"), r"ops\[0\]\.flops: expected a number"),
    "a number as text": (lambda data: data.update(model=3), r"\.model: expected a text, found '3'"),
    "a list as an object": (lambda data: data.update(memory=[]), r"\.memory: expected an object"),
    "an object as a list": (lambda data: data["time"].update(spans={}), r"\.time\.spans: expected a list"),
    "a fraction of a parameter": (lambda data: data["time"]["modules"][0].update(parameters=1.5), "whole number"),
    "a value and a reason": (lambda data: data["memory"]["peak"].update(unavailable="no"), "a value and a reason"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_refuses_what_is_not_a_profile(name):
    change, told = BREAKS[name]
    data = sample_profiles.cnn().to_dict()
    assert list(VALIDATOR.iter_errors(data)) == []
    change(data)
    with pytest.raises(InvalidInputError, match=told):
        Profile.from_json(json.dumps(data))
    assert list(VALIDATOR.iter_errors(data)), "the schema refuses it as well"


def test_refuses_what_is_no_json(tmp_path):
    with pytest.raises(InvalidInputError, match="is not JSON"):
        Profile.from_json("{")
    (tmp_path / "picture.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidInputError, match="cannot read"):
        Profile.from_json(tmp_path / "picture.json")


def test_the_schema_covers_every_field():
    known = schema(Profile)
    assert known["title"] == "perfkit profile"
    assert known["properties"]["schema_version"]["const"] == _profile.SCHEMA_VERSION
    there = {**vars(_profile), **vars(_memory_data), **vars(_time_data)}.values()
    kinds = [kind for kind in there if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
    assert len(kinds) > 10
    for kind in kinds:
        found = known if kind is Profile else known["$defs"][kind.__name__]
        assert list(found["properties"]) == [field.name for field in dataclasses.fields(kind)]
