"""The rules of advice on JAX models, called operation by operation, on profiles made by hand."""

from __future__ import annotations

import dataclasses

import pytest
from steps_of_ops import kinds, op, product, profile

from perfkit.profiling._time_data import Module
from perfkit.profiling.advice import findings
from perfkit.profiling.facts import READS_AT


def test_a_jax_model_that_decides_in_python():
    """What is to be done first is told; no recipe could be applied before."""
    dispatched = [op("dispatch", 8.0, calls=40), product(2.0)]
    whole = kinds(*dispatched, framework="jax")
    notes = (f"{READS_AT}net.py:12 (`if y.sum() > 0:`)",)
    reading = profile(*dispatched, framework="jax", notes=notes)
    (finding,) = [item for item in findings(reading) if item.kind == "a value read back"]
    assert "net.py:12" in finding.told
    assert finding.predicted.value > 3
    assert "small operations" in whole
    assert {item.recipe for item in findings(reading)} == {""}
    assert "a value read back" not in whole


def test_jax_by_operation_is_compiled_with_everything_else():
    cell = product(2.0, module="lstm.cell.dense_h")
    modules = (Module("lstm", "RNN", 1, 8, 0, 8, 0, 0, 0, 0),)
    ops = (cell, op("dispatch", 90.0, "lstm", calls=50), op("add", 1.0, moved_bytes=4e6, shapes="float32[10]"))
    advised = {each.kind: each for each in findings(profile(*ops, framework="jax", modules=modules))}
    assert advised["recurrent layers"].recipe == "fused_kernels+compile"
    assert advised["small operations"].recipe == "compile"
    assert 20 < advised["small operations"].predicted.value < 40  # 93 / (90 / 50 + 2 + 1 / 3)
    assert advised["recurrent layers"].predicted.value > advised["small operations"].predicted.value


def test_what_was_timed_as_one_program_is_not_assumed():
    cell = product(2.0, module="lstm.cell.dense_h")
    modules = (Module("lstm", "RNN", 1, 8, 0, 8, 0, 0, 0, 0),)
    ops = (cell, op("dispatch", 97.0, "lstm", calls=50), op("add", 1.0, moved_bytes=4e6, shapes="float32[10]"))
    base = profile(*ops, framework="jax", modules=modules)
    step = base.time.step.median_ms
    timed = dataclasses.replace(base.time, as_one=dataclasses.replace(base.time.step, median_ms=step / 4))
    advised = {each.kind: each for each in findings(dataclasses.replace(base, time=timed))}
    assert advised["small operations"].predicted.value == pytest.approx(4)
    # two thirds of what is computed get 1.5 times faster by the kernel
    assert advised["recurrent layers"].predicted.value == pytest.approx(4 / (1 / 3 + 2 / 3 / 1.5))
    slower = dataclasses.replace(base.time, as_one=base.time.step)
    assert "small operations" not in {each.kind for each in findings(dataclasses.replace(base, time=slower))}
