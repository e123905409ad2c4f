"""Two profiles side by side: parts find their counterparts, and their differences add up."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import sample_profile_parts
import sample_profiles

from perfkit._errors import InvalidInputError
from perfkit.profiling._time_data import Op
from perfkit.profiling.diff import diff

PAIRS = {
    "faster": (sample_profiles.cnn, sample_profiles.faster),
    "slower": (sample_profiles.faster, sample_profiles.cnn),
    "another framework": (sample_profiles.cnn, sample_profiles.in_jax),
    "another device": (sample_profiles.inference, sample_profiles.on_gpu),
    "itself": (sample_profiles.cnn, sample_profiles.cnn),
    "hostile": (sample_profiles.hostile, sample_profiles.cnn),
}


def with_ops(*ops: Op):
    """The CNN, as if its step consisted of these operations alone."""
    total = sum(op.self_ms for op in ops)
    step = sample_profile_parts.latency(total)
    made = sample_profile_parts.time(ops=ops, modules=(), spans=(), step=step, phases_ms={"forward": step.median_ms})
    return sample_profiles.cnn(time=made)


def op(name: str, ms: float = 1.0, module: str = "", phase: str = "forward", **rest) -> Op:
    return Op(name, "op", module, phase, 1, ms, **rest)


def found(before, after) -> list[tuple[str, str, str]]:
    return [(change.name, change.was, change.status) for change in diff(before, after).ops]


@pytest.mark.parametrize("name", PAIRS)
def test_differences_add_up_to_that_of_the_step_and_the_peak(name):
    before, after = (make() for make in PAIRS[name])
    result = diff(before, after)
    assert result.saved_ms == before.time.step.median_ms - after.time.step.median_ms
    assert math.isclose(
        math.fsum(change.saved_ms for change in (*result.ops, result.outside)), result.saved_ms, abs_tol=1e-9
    )
    peaks = before.memory.peak.value - after.memory.peak.value
    assert math.isclose(math.fsum(change.saved_bytes for change in result.categories), peaks, abs_tol=1)
    for changes in (result.ops, result.modules):
        effects = [abs(change.saved_ms) for change in changes]
        assert effects == sorted(effects, reverse=True)


@pytest.mark.parametrize("name", PAIRS)
def test_every_operation_is_on_one_line(name):
    before, after = (make() for make in PAIRS[name])
    result = diff(before, after)
    for profile, side, gone in ((before, "before", "added"), (after, "after", "removed")):
        calls = sum(getattr(change, f"{side}_calls") for change in result.ops if change.status != gone)
        kinds = {item.kind for item in profile.time.ops}
        kind = "kernel" if "kernel" in kinds else "op"
        assert calls == pytest.approx(sum(item.calls for item in profile.time.ops if item.kind == kind))


def test_itself_differs_in_nothing():
    result = diff(sample_profiles.cnn(), sample_profiles.cnn())
    assert {change.status for change in (*result.ops, *result.modules, *result.categories)} == {"same"}
    assert result.ratio == 1
    assert result.low < 1 < result.high
    assert result.cautions == ()


def test_added_and_removed():
    ops = found(with_ops(op("aten::relu"), op("aten::mm", 3.0)), with_ops(op("aten::mm", 3.0), op("fused_kernel", 0.2)))
    assert ("aten::relu", "", "removed") in ops
    assert ("fused_kernel", "", "added") in ops
    assert len(ops) == 3


def test_a_new_name_in_the_same_place_is_the_same_operation():
    before = with_ops(op("aten::convolution", module="conv1"), op("aten::relu", module="conv1"))
    after = with_ops(op("aten::mkldnn_convolution", module="conv1"), op("aten::relu", module="conv1"))
    assert ("aten::mkldnn_convolution", "aten::convolution", "same") in found(before, after)
    elsewhere = with_ops(op("aten::mkldnn_convolution", module="conv2"), op("aten::relu", module="conv1"))
    assert ("aten::mkldnn_convolution", "", "added") in found(before, elsewhere)


def test_the_same_arithmetic_in_the_same_place_is_the_same_operation():
    before = with_ops(op("aten::addmm", flops=1e9, module="fc"), op("aten::add", module="fc"))
    after = with_ops(op("fc_kernel", 0.5, flops=1e9, module="fc"), op("aten::add", module="fc"))
    assert ("fc_kernel", "aten::addmm", "changed") in found(before, after)


@pytest.mark.parametrize("wrapped", ["_orig_mod.fc1", "module.fc1", "module._orig_mod.fc1"])
def test_a_wrapper_around_the_model_changes_no_names(wrapped):
    changes = diff(with_ops(op("aten::mm", module="fc1")), with_ops(op("aten::mm", module=wrapped))).ops
    assert [(change.status, change.module) for change in changes] == [("same", wrapped)]


def test_modules_are_aligned_by_path_whatever_their_class():
    before, after = sample_profiles.cnn(), sample_profiles.cnn()
    other = tuple(dataclasses.replace(module, kind=f"Quantized{module.kind}") for module in after.time.modules)
    after = dataclasses.replace(after, time=dataclasses.replace(after.time, modules=other))
    result = diff(before, after)
    assert len(result.modules) == len(before.time.modules)
    assert ("Conv2d", "QuantizedConv2d") in {(change.was, change.name) for change in result.modules}


def test_a_module_whose_operations_were_compiled_into_others_is_not_gone():
    before = sample_profiles.cnn()
    empty = tuple(dataclasses.replace(module, self_ms=0.0) for module in before.time.modules)
    after = dataclasses.replace(before, time=dataclasses.replace(before.time, modules=empty))
    assert {change.status for change in diff(before, after).modules} == {"changed"}


def test_the_profilers_own_cost_cancels():
    """Half as slow a profiler changes what it measures of each operation, but not the operation's share."""
    fast = with_ops(op("aten::mm"), op("aten::relu"))
    twice = tuple(dataclasses.replace(item, self_ms=2 * item.self_ms) for item in fast.time.ops)
    phases = {"forward": 2 * fast.time.step.median_ms}
    slow = dataclasses.replace(fast, time=dataclasses.replace(fast.time, ops=twice, phases_ms=phases))
    assert {change.status for change in diff(fast, slow).ops} == {"same"}


def test_what_makes_two_profiles_incomparable_is_said():
    before = sample_profiles.cnn()
    after = dataclasses.replace(
        sample_profiles.interrupted(),
        environment=sample_profile_parts.environment(fingerprint="other"),
        mode="inference",
    )
    cautions = " ".join(diff(before, after).cautions)
    for fact in ("different machines", "different mode: training before, inference after", "after is interrupted"):
        assert fact in cautions
    assert diff(before, after).categories == ()


def test_from_files_and_dicts(tmp_path):
    paths = [tmp_path / name for name in ("before.json", "after.json")]
    profiles = [sample_profiles.cnn(), sample_profiles.faster()]
    for path, profile in zip(paths, profiles, strict=True):
        profile.to_json(path)
    result = profiles[0].diff(profiles[1])
    assert (
        diff(*profiles)
        == diff(*paths)
        == diff(*map(str, paths))
        == diff(*(profile.to_dict() for profile in profiles))
        == result
    )
    assert json.loads(result.to_json())["ratio"] == result.ratio


def test_refuses_what_cannot_be_compared():
    with pytest.raises(InvalidInputError, match=r"after has no times to compare: it is failed: RuntimeError"):
        diff(sample_profiles.cnn(), sample_profiles.failed())
    with pytest.raises(InvalidInputError, match="before is a int: expected a Profile"):
        diff(3, sample_profiles.cnn())
    with pytest.raises(InvalidInputError, match=r"cannot read nowhere\.json"):
        diff("nowhere.json", sample_profiles.cnn())
