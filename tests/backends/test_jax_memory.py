"""Tensor memory in JAX: what XLA counts, and nothing where it does not count everything."""

import pytest

pytest.importorskip("jax")

import jax

import perfkit
from perfkit.measure import kept_memory

pytestmark = pytest.mark.usefixtures("hasty")


def peak(function, *inputs):
    return perfkit.optimize(function, "compile", example_inputs=inputs).report.after.tensor_peak_bytes


def test_outputs_and_temporaries_are_counted():
    x = jax.numpy.ones((1000,))
    counted = peak(lambda x: jax.lax.sort(x + 1) - jax.numpy.cumsum(x), x)
    assert counted.value >= 4000


def test_what_a_library_allocates_for_itself_makes_the_number_unavailable():
    image, kernel = jax.numpy.ones((8, 28, 28, 1)), jax.numpy.ones((3, 3, 1, 32))

    def convolved(image, kernel):
        out = jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jax.nn.relu(out).sum((1, 2))

    program = jax.jit(convolved).lower(image, kernel).compile()
    found = peak(convolved, image, kernel)
    if "kind=kCustom" in program.as_text():
        assert "does not count" in found.unavailable
    else:
        assert found.value >= program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("kept", [False, True])
def test_memory_that_each_call_takes_anew_is_told(monkeypatch, kept):
    monkeypatch.setattr(kept_memory, "unavailable", str)
    monkeypatch.setattr(kept_memory, "at_start", lambda: kept_memory.SETTINGS if kept else {})

    def table(x):
        return jax.numpy.sin(x[:, None] * x) @ x  # a product reads the whole table from memory

    for rows, mib in ((3072, 36), (512, 1)):
        report = perfkit.optimize(table, "compile", example_inputs=(jax.numpy.ones((rows,)),)).report
        large = mib > 32 and not kept
        told = tuple(note for note in report.notes if "anew" in note)
        assert told == ((kept_memory.advice(mib << 20),) if large else ())
