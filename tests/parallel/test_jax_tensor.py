"""tensor_parallel in JAX on four devices: what one device computes, to rounding; and what is split how."""

import itertools

import pytest

pytest.importorskip("jax")
pytest.importorskip("flax")

from jax_workers import result, start

MODELS, CHAINS = ("cnn2", "text_lstm", "transformer"), ("tensor", "both")
ROUNDING = 2.0**-24
FAN_IN = {"cnn2": 3136, "text_lstm": 24, "transformer": 64}
"""The longest sum of each model."""


@pytest.fixture(scope="module")
def four() -> dict:
    return result(start("jax_tensor_on_four_devices.py", 4))


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
    assert "a loop reads it" in skipped["text_lstm"]["lstm1.cell.dense_h.kernel"]
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
