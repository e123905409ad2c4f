"""A report's JSON is canonical, and its files are written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest


def test_equal_reports_are_equal_bytes(report):
    turned = dict(reversed(report.environment.libraries.items()))
    same = dataclasses.replace(report, environment=dataclasses.replace(report.environment, libraries=turned))
    assert same.to_json() == report.to_json()


def test_is_canonical(report):
    text = report.to_json()
    assert text == json.dumps(json.loads(text), sort_keys=True, indent=2) + "\n"
    assert not any(word in text for word in ("NaN", "Infinity"))


def test_a_change_shows(reports):
    changed = dataclasses.replace(reports["fast"], optimizing_s=9.5)
    assert changed.to_json() != reports["fast"].to_json()


@pytest.mark.parametrize("method", ["to_json", "to_markdown", "to_html"])
def test_writes_what_it_returns(report, method, tmp_path):
    path = tmp_path / "report.txt"
    text = getattr(report, method)(path)
    assert path.read_text(encoding="utf-8") == text
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("method", ["to_json", "to_markdown", "to_html"])
@pytest.mark.parametrize("broken", ["write_text", "replace"])
def test_a_failed_write_leaves_the_old_file(reports, method, broken, tmp_path, monkeypatch):
    path = tmp_path / "report.txt"
    path.write_text("old", encoding="utf-8")
    write_text = Path.write_text

    def fail(self, *_arguments, **_options):
        if broken == "write_text":
            write_text(self, "half", encoding="utf-8")
        raise OSError("disk full")

    monkeypatch.setattr(Path, broken, fail)
    with pytest.raises(OSError, match="disk full"):
        getattr(reports["fast"], method)(path)
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]
