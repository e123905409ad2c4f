"""tensor_parallel in JAX on four devices: what one device computes, to rounding; and what is split how."""

import itertools

import pytest

pytest.importorskip("jax")
pytest.importorskip("flax")

from jax_workers import result, start
from shared_runs import once

MODELS, CHAINS = ("cnn2", "text_lstm", "transformer"), ("tensor", "both")
ROUNDING = 2.0**-24
FAN_IN = {"cnn2": 3136, "text_lstm": 24, "transformer": 64}
"""The longest sum of each model."""


@pytest.fixture(scope="module")
def four() -> dict:
    return once("jax_tensor_on_four_devices", lambda: result(start("jax_tensor_on_four_devices.py", 4)))


@pytest.mark.parametrize("model", MODELS)
def test_outputs_are_whole_and_those_of_one_device(four, model):
    found = four[model]["inference"]
    # Sums of n numbers in another order are off by √n roundings; they go through less than 8 layers.
    assert found["off"] <= 8 * FAN_IN[model] ** 0.5 * ROUNDING
    assert found["whole"], "every device has all of the outputs"
    assert found["committed"], "inputs that lie on one device are taken too"


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("model", MODELS)
def test_training_is_that_of_one_device(four, model, chain):
    found, one = four[model][chain], four[model]["losses"]
    change = max(abs(later - earlier) for earlier, later in itertools.pairwise(one))
    assert found["losses"] == pytest.approx(one, rel=8 * ROUNDING, abs=1e-3 * change)
    assert len(set(one)) == 5, "the loss stands still: nothing was trained"
    assert found["off"] < 1
    assert four[model]["unchanged"]


def test_what_is_split_how(four):
    parts = {model: four[model]["tensor"]["parts"] for model in MODELS}
    assert parts["cnn2"] == ["tensor: 4 layers in 4 parts (conv1 by channels; conv2, fc2 by rows; fc1 by columns)"]
    assert parts["text_lstm"] == ["tensor: 1 layer in 4 parts (embedding by features)"]
    assert parts["transformer"] == [
        "tensor: 6 layers in 4 parts (attention.query, attention.key, attention.value, up by columns; "
        "attention.out, down by rows)"
    ]
    for model in MODELS:
        first, second = four[model]["both"]["parts"]
        assert " in 2 parts" in first
        assert second == "data: the batch in 2 parts, gradients averaged"


def test_what_xla_sends_is_told(four):
    assert any("a forward call sends 2 all-reduces" in note for note in four["cnn2"]["inference"]["notes"])
    assert "all-reduce" in four["transformer"]["tensor"]["told"]


def test_what_is_left_whole_is_told_with_the_reason(four):
    skipped = {model: four[model]["inference"]["skipped"] for model in MODELS}
    assert skipped["cnn2"] == {}
    assert skipped["transformer"] == {"head.kernel": "10 output(s) cannot be shared by 4 devices evenly"}
    assert "gathered 6 times a call, once a round" in skipped["text_lstm"]["lstm1.cell.dense_h.kernel"]
    assert "attention.key.bias" in four["transformer"]["inference"]["touched"]


def test_weights_of_a_function_are_cut_by_how_they_are_multiplied(four):
    found = four["shards"]
    assert found["shapes"] == {"a": [8, 4], "b": [4, 4], "tied": [8, 4], "odd": [4, 6], "used": [4, 8]}
    assert found["parts"] == ["tensor: 2 layers in 4 parts (a by columns; b by rows)"]
    assert found["skipped"] == {
        "odd": "6 output(s) cannot be shared by 4 devices evenly",
        "used": "excluded",
        "tied": "no input is multiplied by it alone",
    }


@pytest.mark.parametrize("model", MODELS)
def test_a_device_holds_a_part(four, model):
    held, whole = four[model]["inference"]["bytes"]
    assert whole / 4 <= held < whole


LENGTH, ROWS, WIDTH = 6, 4, 16
OUTPUT = ROWS * LENGTH * WIDTH * 4
"""Bytes of an attention's output, in float32."""


@pytest.fixture(scope="module")
def attention() -> dict:
    return once("jax_attention_on_four_devices", lambda: result(start("jax_attention_on_four_devices.py", 4)))


@pytest.mark.parametrize("model", ["nnx", "linen", "blocks", "beside", "own", "LSTMCell", "OptimizedLSTMCell"])
def test_attention_and_loops_in_parts_compute_what_one_device_does(attention, model):
    found = attention[model]
    # Sums of 16 numbers, and of 4 · 6 rows in gradients, in another order, through less than 8 layers and 6 steps.
    assert found["off"] <= 8 * LENGTH * WIDTH**0.5 * ROUNDING
    assert found["gradients"] <= 8 * LENGTH * (ROWS * LENGTH) ** 0.5 * ROUNDING


@pytest.mark.parametrize("model", ["nnx", "linen", "beside", "own"])
def test_attention_by_heads_adds_up_its_outputs_once(attention, model):
    """Nothing else is sent, forwards or in a step whose inputs need no gradient."""
    found = attention[model]
    forward, step = found["sent"]
    assert forward == [["all-reduce", 1, False, OUTPUT]]
    assert step == forward
    (told,) = found["parts"]
    assert told.endswith("by rows)")
    assert found["skipped"] == {}


def test_three_blocks_in_one_weight_are_moved_to_their_heads(attention):
    """XLA makes parts of heads of parts of blocks; how a weight is cut changes what is sent alone."""
    forward, _ = attention["blocks"]["sent"]
    assert {kind for kind, *_ in forward} == {"collective-permute", "all-reduce"}
    assert [item for item in forward if item[0] == "all-reduce"] == [["all-reduce", 1, False, OUTPUT]]


@pytest.mark.parametrize("cell", ["LSTMCell", "OptimizedLSTMCell"])
def test_what_a_loop_reads_is_split_where_it_is_asked_for(attention, cell):
    found = attention[cell]
    assert found["skipped"] == {}
    assert "by columns in a loop" in found["parts"][0]
    (why,) = found["whole"]
    assert why.startswith(f"a loop reads it: split, its products would be gathered {LENGTH} times a call")
    forward, step = found["sent"]
    in_loops = [item for item in forward if item[2]]
    assert ["all-gather", LENGTH, True, ROWS * WIDTH * 4] in in_loops, "the hidden state, in each step"
    assert [item for item in in_loops if item[0] == "all-gather"] == [["all-gather", LENGTH, True, ROWS * WIDTH * 4]]
    assert any(kind == "collective-permute" for kind, *_ in in_loops) == (cell == "OptimizedLSTMCell"), (
        "four gates in one weight are moved to their units"
    )
    assert sum(runs for kind, runs, looped, _ in step if looped and kind == "all-reduce") == LENGTH
