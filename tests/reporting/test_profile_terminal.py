"""A profile and a difference in the terminal: one screen, what costs most first, nothing that a terminal would obey."""

from __future__ import annotations

import dataclasses
import io
import re

import pytest
import sample_profile_parts
import sample_profiles
from rich.console import Console

from perfkit._quantity import Quantity
from perfkit.profiling.diff import diff
from perfkit.reporting.terminal import to_text


@pytest.mark.parametrize("name", sample_profiles.FACTORIES)
@pytest.mark.parametrize("width", [40, 100])
def test_shows_every_profile_at_any_width(name, width):
    text = to_text(sample_profiles.FACTORIES[name](), width)
    assert max(map(len, text.splitlines())) <= width
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f]", text)
    assert len(text.splitlines()) < 400


def words(profile) -> str:
    """What is shown, wherever lines break."""
    return " ".join(str(profile).split())


def test_fits_a_screen():
    assert len(str(sample_profiles.cnn()).splitlines()) < 75


def test_says_what_costs_most_first():
    text = words(sample_profiles.cnn())
    order = [
        "11.7 ms per step",
        "median of 200 steps without the profiler, p90",
        "348 MFLOP",
        "peak memory",
        "Convolution layout 38.0% of the step, in conv1",
        'perfkit.optimize(model, recipe="channels_last+compile", mode="training", …) 1.31× faster',
        "fc1 Linear 43.7% ██",
        "aten::mm 28.6%",
        "compute 30%",
        "phases",
        "held at the peak parameters",
        "unavailable: int8 ceiling: torch has no int8 product",
        "A profiled step takes 1.10 times as long",
    ]
    places = [text.find(part) for part in order]
    assert -1 not in places, order[places.index(-1)]
    assert places == sorted(places)


def test_the_command_line_is_named_where_the_model_was():
    profile = dataclasses.replace(sample_profiles.cnn(), command="perfkit optimize cnn --mode training")
    assert "perfkit optimize cnn --mode training --recipe bf16  1.34× smaller peak" in str(profile)
    odd = dataclasses.replace(profile.findings[0], recipe="compile(mode='max-autotune')")
    command = to_text(dataclasses.replace(profile, findings=(odd,)), 200)
    assert """--recipe 'compile(mode='"'"'max-autotune'"'"')'""" in command, "quoted for a shell"


def test_on_a_device_the_kernels_and_its_state_are_shown():
    text = words(sample_profiles.on_gpu())
    for fact in (
        "sm90_addmm_kernel<float",
        "Compiled 2 times more during steps",
        "clock held down: software power cap",
        "also computing: python (pid 4711)",
        "fan not supported: this card has no fan",
        "0.710 J",
    ):
        assert fact in text
    assert "aten::addmm" not in text, "the host's operations run beside the kernels and are not added to them"


def test_what_is_not_there_has_its_reason_and_no_number():
    text = str(sample_profiles.unavailable())
    assert "arithmetic       unavailable  no such counter here (FLOP)" in text
    assert "power no permission to read RAPL" in text
    assert "The profiler's own cost is not known" in text
    failed = str(sample_profiles.failed())
    assert "No time measured" in failed
    assert "! Failed: RuntimeError: mat1 and mat2" in failed


def test_doubtful_shares_are_said_to_be():
    measured = sample_profile_parts.time()
    slow = dataclasses.replace(
        measured,
        overhead=sample_profile_parts.quantity(2.5, "ratio"),
        attributed=sample_profile_parts.quantity(0.4, "ratio"),
    )
    text = str(sample_profiles.cnn(time=slow))
    assert "! The profiler makes a step 2.50 times as long" in text
    assert "! Only 40.0% of the profiled step is accounted for" in text
    assert "!" not in str(sample_profiles.cnn()).partition("Convolution")[0]


def test_markup_in_names_is_text():
    written = io.StringIO()
    Console(file=written, width=100, force_terminal=True, color_system=None).print(sample_profiles.hostile())
    assert "[bold red]" in written.getvalue()


def test_a_difference_says_what_was_saved_where():
    before, after = sample_profiles.cnn(), sample_profiles.faster()
    text = str(diff(before, after))
    for fact in ("per step", "as fast, 99% interval [", "was aten::convolution", "outside of operations", "whole step"):
        assert fact in text, fact
    heads = [line.split()[-1] for line in text.splitlines() if line.startswith(("operation ", "module "))]
    assert heads == ["where", "class"]
    assert "! " not in text
    other = str(diff(before, sample_profiles.in_jax()))
    assert "! different framework: torch before, jax after" in other


def test_a_difference_of_few_steps_has_no_interval():
    before = sample_profiles.cnn()
    step = dataclasses.replace(before.time.step, samples_ms=before.time.step.samples_ms[:3])
    few = dataclasses.replace(before, time=dataclasses.replace(before.time, step=step))
    text = " ".join(str(diff(few, few)).split())
    assert "too few steps were timed for an interval" in text
    assert "inf" not in text


def test_the_peaks_difference_is_in_bytes_as_those_it_consists_of():
    text = str(diff(sample_profiles.cnn(), sample_profiles.faster()))
    peak = next(line for line in text.splitlines() if line.startswith("peak memory"))
    assert peak.rstrip().endswith("iB")


def test_steps_that_were_timed_while_the_machine_was_busy_are_told():
    profile = sample_profiles.cnn()
    time = dataclasses.replace(profile.time, overhead=Quantity(0.5, "ratio"))
    told = str(dataclasses.replace(profile, time=time))
    assert "busy with something else" in " ".join(told.split())
    assert "busy with something else" not in str(profile)


@pytest.mark.parametrize("width", [100, 140])
def test_names_of_modules_are_not_broken_where_bars_can_be_left_out(width):
    profile = sample_profiles.cnn()
    modules = tuple(
        dataclasses.replace(item, path=f"encoder.{item.path}.dense" if item.path else "")
        for item in profile.time.modules
    )
    text = to_text(dataclasses.replace(profile, time=dataclasses.replace(profile.time, modules=modules)), width)
    assert "encoder.conv1.dense  Conv2d" in text
    assert ("█" in text) == (width == 140)
