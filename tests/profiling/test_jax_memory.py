"""Where a JAX step's memory goes: categories add up to the peak, and planted problems are found."""

import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
import optax
from profile_jax_models import compiled, loaded, small, work_of

from perfkit.profiling import jax_memory, jax_program_memory
from perfkit.profiling._memory_data import CATEGORIES
from perfkit.profiling.jax_held import argument
from perfkit.profiling.jax_run import marking


def memory_of(work):
    memory = jax_memory.collected(work, work.backend.finish(work))
    assert set(memory.by_category) <= set(CATEGORIES)
    assert sum(memory.by_category.values()) == pytest.approx(memory.peak.value, rel=0.02)
    totals = [sum(point.bytes_by_category.values()) for point in memory.timeline]
    assert max(totals) == pytest.approx(memory.peak.value, rel=0.02)
    assert sum(memory.by_module.values()) == pytest.approx(memory.by_category.get("activations", 0))
    assert [item.bytes for item in memory.largest] == sorted((item.bytes for item in memory.largest), reverse=True)
    return memory


def bytes_of(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_training_holds_new_weights_beside_the_old_unless_it_may_take_them_over():
    model, inputs = small()
    work = work_of(model, inputs, "training", optimizer=optax.sgd(0.1, momentum=0.9))
    weights = bytes_of(work.model.params)
    plain = memory_of(work)
    assert plain.by_category["parameters"] == 2 * weights
    assert plain.by_category["optimizer state"] == 2 * weights
    assert plain.by_category["inputs"] == bytes_of((inputs, work.training.targets))
    assert plain.by_category["activations"] >= 64 * 32 * 4
    assert plain.program["alias"] == 0
    assert any(item.module == "layers.0" and "beside" in item.op for item in plain.largest)
    assert plain.growth.value == 0
    donating = memory_of(compiled(work))
    assert donating.program["alias"] >= 2 * weights
    assert donating.by_category["parameters"] == weights
    assert donating.peak.value < plain.peak.value


def test_what_a_recurrent_layer_keeps_for_the_backward_pass():
    """At the peak; with a loop's stacks, of which the plan shares memory, counted once."""
    model, (x,) = loaded("lstm")
    work = work_of(model, (x,), "training", optimizer=optax.sgd(0.1))
    with marking(work) as run:
        moments, peak, _ = jax_program_memory.moments(run)
    at_peak = next(moment for moment in moments if moment.peak)
    kept = sum(held.bytes for held in at_peak.held if held.category == "activations" and held.module == "lstm")
    state = x.shape[0] * x.shape[1] * 50 * 4
    assert kept >= 8 * state  # four gates, the cell and its tanh, state and output of every step
    for moment in moments:
        assert sum(held.bytes for held in moment.held) == pytest.approx(
            peak.value, rel=0.02
        )  # the arena is there whole
        assert all(held.freed_ms is None or held.freed_ms >= held.born_ms for held in moment.held)


def test_without_a_plan_of_buffers_categories_still_add_up():
    model, inputs = small()
    work = work_of(model, inputs, "training", optimizer=optax.sgd(0.1))
    with marking(work) as run:
        told = run.compiled.memory_analysis()
        sizes = {
            "temp": told.temp_size_in_bytes, "arguments": told.argument_size_in_bytes,
            "output": told.output_size_in_bytes, "alias": told.alias_size_in_bytes,
        }  # fmt: skip
        moment = jax_program_memory._unplanned(run, sizes)
    assert sum(held.bytes for held in moment.held) == sizes["temp"] + sizes["arguments"] + sizes["output"]
    parameters = [held for held in moment.held if held.category == "parameters"]
    assert {held.module for held in parameters} == {"layers.0", "layers.2"}


def test_operation_by_operation_results_last_until_their_last_use():
    def model(x):
        y = jnp.sin(x)
        z = y @ y
        return (z + 1).sum()

    memory = memory_of(work_of(model, (jnp.ones((64, 64)),)))
    one = 64 * 64 * 4
    assert memory.by_category == {"inputs": one, "activations": 2 * one}
    assert memory.program == {}


def test_arrays_that_a_step_leaves_behind_are_found():
    kept = []

    def leaking(x):
        kept.append(x * 2)
        return x + 1

    memory = memory_of(work_of(leaking, (jnp.ones((50, 10)),)))
    assert memory.growth.value == 2000


def test_a_snapshot_is_written(tmp_path):
    work = work_of(lambda x: x + 1, (jnp.ones(8),))
    jax_memory.snapshot(work, work.backend.finish(work), tmp_path / "held.pb.gz")
    assert (tmp_path / "held.pb.gz").read_bytes()[:2] == b"\x1f\x8b"


def test_whose_an_argument_is():
    assert argument("state[0]['fc1']['kernel'].value") == ("parameters", "fc1")
    assert argument("state[2][0].mu['layers'][1]['kernel'].value") == ("optimizer state", "layers.1")
    assert argument("params['params']['Dense_0']['bias']") == ("parameters", "Dense_0")
    assert argument("args[0]['x']") == ("inputs", "")
    assert argument("state[3][0]") == ("other", "")
