"""The rules of advice on what memory holds, on profiles made by hand."""

from __future__ import annotations

import dataclasses

import pytest
from steps_of_ops import found, kinds, op, product, profile

from perfkit._quantity import Quantity
from perfkit.measure import kept_memory
from perfkit.profiling._profile import Finding, Profile
from perfkit.profiling._time_data import Module
from perfkit.profiling.advice import findings
from perfkit.profiling.advice_memory import WEIGHTS_BYTES


def test_a_leak():
    grows = {"growth": Quantity(5e6, "B")}
    finding = found(product(), kind="a leak", memory=grows)
    assert finding.told == "memory grows by 4.77 MiB a step: after 1000 steps, by 4.66 GiB"
    assert "a leak" not in kinds(product(), memory={"growth": Quantity(0.0, "B")})


def held(**categories) -> dict:
    return {"by_category": categories, "peak": Quantity(sum(categories.values()), "B")}


def with_memory(base: Profile, **categories) -> Profile:
    return dataclasses.replace(base, memory=dataclasses.replace(base.memory, **held(**categories)))


def test_activations_are_most_of_the_peak():
    parts = tuple(Module(f"block{n}", "Block", 1, 1, 2, 3, 0, 0, saved_bytes=2e8, output_bytes=1e7) for n in range(4))
    base = profile(product(dtype="bfloat16"), mode="training", modules=parts)
    full = with_memory(base, activations=8e8, parameters=2e8)
    (checkpoint,) = [finding for finding in findings(full) if finding.kind == "activations dominate"]
    assert checkpoint.share == pytest.approx(0.8)
    # of 800 MB of activations the inside of one block and four outputs are left
    assert checkpoint.predicted.value == pytest.approx(1e9 / (2e8 + 2e8 + 4e7))
    assert checkpoint.resource == "memory"
    assert "activations dominate" not in {found.kind for found in findings(with_memory(base, parameters=1e9))}


def test_what_grows_with_the_batch():
    base = profile(product(dtype="bfloat16"), mode="training")
    (finding,) = findings(with_memory(base, activations=6e8, temporaries=2e8, parameters=2e8))
    assert (finding.kind, finding.recipe) == ("the batch dominates", "accumulate")
    assert finding.predicted.value == pytest.approx(1e9 / 6e8)


def test_memory_that_each_step_takes_anew():
    def told(temporary: float, settings: dict[str, str], **changes) -> list[Finding]:
        base = profile(product(dtype="bfloat16"), **{"mode": "training", "framework": "jax"} | changes)
        memory = dataclasses.replace(base.memory, program={"temp": temporary}, peak=Quantity(4 * temporary, "B"))
        about = dataclasses.replace(base.environment, settings=settings)
        changed = findings(dataclasses.replace(base, memory=memory, environment=about))
        return [finding for finding in changed if finding.kind == "fresh memory"]

    (finding,) = told(2**26, {})
    assert finding.told.startswith("each step takes 64.0 MiB from the system anew")
    assert (finding.share, finding.resource, finding.recipe) == (0.25, "memory", "")
    assert kept_memory.TYPED in finding.advice
    assert not told(2**26, kept_memory.SETTINGS)
    assert not told(2**26, {"LD_PRELOAD": "libjemalloc.so.2"})
    assert not told(kept_memory.KEPT_BYTES, {})
    assert not told(2**26, {}, mode="inference")
    assert not told(2**26, {}, device="cuda")


def test_memory_that_each_step_of_a_torch_model_takes_anew():
    def told(anew: float, settings: dict[str, str], **changes) -> list[Finding]:
        base = profile(product(dtype="bfloat16"), framework="torch", **changes)
        memory = dataclasses.replace(base.memory, program={"anew": anew}, peak=Quantity(4 * anew, "B"))
        about = dataclasses.replace(base.environment, settings=settings)
        changed = findings(dataclasses.replace(base, memory=memory, environment=about))
        return [finding for finding in changed if finding.kind == "fresh memory"]

    for mode in ("training", "inference"):
        (finding,) = told(2**26, {}, mode=mode)
        assert finding.told.startswith("each step takes 64.0 MiB from the system anew")
        assert (finding.share, finding.recipe) == (0.25, "keep_memory")
        assert finding.advice == kept_memory.BY_RECIPE
    assert not told(2**26, kept_memory.SETTINGS)
    assert not told(2**26, {}, notes=("profiled: what keep_memory makes of the model",))
    assert not told(kept_memory.KEPT_BYTES, {})
    assert not told(2**26, {}, device="cuda")


def test_micro_batches_of_a_model_with_time_first():
    layer = op("aten::mkldnn_rnn_layer", 9.0, "lstm", shapes="float32[28, 64, 10], float32[200, 10]")

    def recipe(inputs: str) -> str:
        base = with_memory(profile(layer, mode="training", inputs=inputs), activations=8e8)
        (finding,) = [finding for finding in findings(base) if finding.kind == "the batch dominates"]
        return finding.recipe

    assert recipe("float32[28, 64, 10]") == "accumulate(batch_dim=1)"
    assert recipe("float32[64, 28, 10]") == "accumulate"


def test_weights_in_inference():
    base = profile(product(dtype="bfloat16"))
    (finding,) = findings(with_memory(base, parameters=2 * WEIGHTS_BYTES, activations=WEIGHTS_BYTES))
    assert (finding.kind, finding.recipe) == ("weights dominate", "half")
    assert finding.predicted.value == pytest.approx(1.5)
