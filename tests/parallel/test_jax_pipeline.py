"""pipeline_parallel in JAX on four devices: what one device computes, to rounding; and what it is refused for."""

import itertools

import pytest

pytest.importorskip("jax")
pytest.importorskip("flax")

from jax_workers import result, start
from shared_runs import once

MODELS, CHAINS = ("cnn2", "text_lstm", "transformer"), ("pipeline", "both")
TRAINED = [*itertools.product(MODELS, CHAINS), ("text_lstm", "shard")]
ROUNDING = 2.0**-24
FAN_IN = {"cnn2": 3136, "text_lstm": 24, "transformer": 64}
"""The longest sum of each model."""

PARAMETERS = {"cnn2": 8, "text_lstm": 9, "transformer": 18}


@pytest.fixture(scope="module")
def four() -> dict:
    return once("jax_pipeline_on_four_devices", lambda: result(start("jax_pipeline_on_four_devices.py", 4)))


@pytest.mark.parametrize(("model", "chain"), TRAINED)
def test_training_is_that_of_one_device(four, model, chain):
    found, one = four[model][chain], four[model]["losses"]
    # A loss differs as its parameters do, by less than a thousandth of what a step changes, and by its own rounding.
    change = max(abs(later - earlier) for earlier, later in itertools.pairwise(one))
    assert found["losses"] == pytest.approx(one, rel=8 * ROUNDING, abs=1e-3 * change)
    assert len(set(one)) == 5, "the loss stands still: nothing was trained"
    assert four[model]["moved"] > 1e3, "parameters moved no more than by rounding: nothing was compared"
    assert found["off"] < 1
    assert four[model]["unchanged"]


@pytest.mark.parametrize(("model", "chain"), TRAINED)
def test_the_model_can_be_called_also_in_a_program(four, model, chain):
    # Parameters after five steps are off by rounding, and so are outputs: sums of n numbers by √n, through 8 layers.
    assert four[model][chain]["outputs"] <= 5 * 8 * FAN_IN[model] ** 0.5 * ROUNDING


@pytest.mark.parametrize(("model", "chain"), TRAINED)
def test_each_device_holds_its_stage(four, model, chain):
    found = four[model][chain]
    held, whole = found["bytes"]
    stages = 4 if chain == "pipeline" else 2
    shares = 2 if chain == "shard" else 1
    assert whole / stages / shares <= held < whole / shares
    assert found["owned"] == list(range(PARAMETERS[model])), "each parameter belongs to one stage"
    assert 1 < found["devices"] <= stages


@pytest.mark.parametrize(("model", "chain"), TRAINED)
def test_stages_their_bubble_and_what_is_sent_are_told(four, model, chain):
    parts, balance, bubble = four[model][chain]["spread"]
    stages, micro_batches = (4, 8) if chain == "pipeline" else (2, 4)
    assert parts[0].startswith(f"pipeline: {stages} stages (")
    assert f"gpipe with {micro_batches} micro-batches of 1 row" in parts[0]
    assert sum(balance) == pytest.approx(1)
    assert bubble == pytest.approx((stages - 1) / (stages - 1 + micro_batches))
    assert "collective-permutes" in four[model][chain]["told"]


def test_stacks_of_like_blocks_are_cut_between_blocks(four):
    found = four["blocks"]
    one, staged = found["losses"]
    # Sums of 16, 16 and 32 numbers through 8 blocks, in five steps; Adam carries a gradient's relative error on.
    assert staged == pytest.approx(one, rel=5 * 8 * 64 * ROUNDING)
    assert one[-1] < one[0] / 2
    first = found["parts"][0]
    assert first.startswith("pipeline: 2 stages (blocks[0], blocks[1], blocks[2]; blocks[3], ")
    assert found["params"] == {"blocks": {"b": [8, 16], "w": [8, 16, 16]}, "head": [16, 4]}


def test_a_checkpoint_goes_on_in_any_number_of_stages(four):
    four_stages, two_stages, shares, whole = four["blocks"]["then"]
    assert two_stages == pytest.approx(four_stages, rel=8 * 64 * ROUNDING)
    assert shares == pytest.approx(four_stages, rel=8 * 64 * ROUNDING)
    assert whole == pytest.approx(four_stages, rel=8 * 64 * ROUNDING)
    assert four_stages != four["blocks"]["losses"][1][-1]


@pytest.mark.parametrize("chain", CHAINS)
def test_state_goes_from_micro_batch_to_micro_batch(four, chain):
    """Dropout and batch norm: the training is that of the same micro-batches, one after the other on one device."""
    found = four["stateful"][chain]
    staged, one = found["losses"]
    change = max(abs(later - earlier) for earlier, later in itertools.pairwise(one))
    assert staged == pytest.approx(one, rel=8 * ROUNDING, abs=1e-3 * change)
    assert found["moved"] > 1e3
    assert found["off"] < 1
    # Running statistics of five steps, keys and counters; and outputs in inference: sums of 16 numbers, 8 operations.
    assert max(found["state"]) <= 5 * 8 * 16**0.5 * ROUNDING
    assert found["outputs"] <= 5 * 8 * 16**0.5 * ROUNDING


def test_what_state_does_to_the_numbers_is_told_and_kept_in_checkpoints(four):
    notes = four["stateful"]["pipeline"]["notes"]
    assert "norms.0, norms.1: statistics of each micro-batch, so losses differ from those of the whole batch" in notes
    assert "each micro-batch draws random numbers of its own, as if they came one after the other" in notes
    four_stages, two_pipelines, read = four["stateful"]["then"]
    change = abs(four_stages - four["stateful"]["pipeline"]["losses"][0][-1])
    assert [two_pipelines, read] == pytest.approx([four_stages] * 2, rel=8 * ROUNDING, abs=1e-3 * change)
    assert change > 1e-3


def test_a_key_among_the_inputs_draws_alike_in_each_micro_batch_and_that_is_told(four):
    assert four["keyed"]["off"] <= 8 * 4**0.5 * ROUNDING
    assert any("the same in each micro-batch" in note for note in four["keyed"]["notes"])


def test_a_raw_key_before_the_data_is_not_taken_for_the_batch(four):
    one, *staged = four["keyed"]["first"]
    change = max(abs(later - earlier) for earlier, later in itertools.pairwise(one))
    for losses in staged:
        assert losses == pytest.approx(one, rel=8 * ROUNDING, abs=1e-3 * change)
    assert change > 1e-3


def test_parts_of_accumulate_go_through_the_stages(four):
    staged, one = four["accumulated"]["losses"]
    change = max(abs(later - earlier) for earlier, later in itertools.pairwise(one))
    assert staged == pytest.approx(one, rel=8 * ROUNDING, abs=1e-3 * change)
    assert "gpipe with 2 micro-batches of 1 row" in four["accumulated"]["parts"][0]


@pytest.mark.parametrize("model", MODELS)
def test_inference_is_that_of_one_device_by_weights_as_they_are(four, model):
    found, rounding = four["inference"][model], 8 * FAN_IN[model] ** 0.5 * ROUNDING
    assert found["off"] <= rounding
    assert found["in a program"] <= rounding
    assert found["changed"] <= rounding, "other weights were written into the module"
    assert found["same"]
    assert found["devices"] == found["stages"], "the weights of each stage that has some lie on its device"
    assert "collective-permutes" in found["sent"]
    assert "each device holds the weights of its stage" in found["notes"]


def test_a_function_in_stages_takes_its_own_parameters_and_others(four):
    found = four["function"]
    for how in ("own", "given", "others", "own after others", "own again", "in a program", "fidelity", "by inputs"):
        passes = 2 if how == "by inputs" else 1  # there, and back
        # eight blocks of some operations, sums of 16 numbers
        assert found[how] <= passes * 8 * 8 * 16**0.5 * ROUNDING, how
    assert found["params after others"] == 0
    whole = (8 * 16 * 16 + 16 * 4) * 4
    assert whole / 4 <= found["bytes"][0] < whole, "each device holds its stage"


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("few", "cannot be cut into so many: it has 1 place(s)"),
        ("tied", "both sides (a is used from operation 1 to "),
        ("tied", "data_parallel(shard=True) divides weights and optimizer state too"),
        ("split", "split_at='c': no layer is called so; known: 'a', 'b'"),
        ("optimizer", "the optimizer looks at whole parameters"),
        ("state", "seen changes with the batch and is no floating-point array of its own"),
        ("rows", "an output of shape [] has no dimension for the rows"),
        ("schedule", "schedule='1f1b' is torch's"),
        ("stages", "in JAX each device has one stage"),
        ("rounds", "use data_parallel with pipeline_parallel"),
        ("tensor", "lie packed in one array"),
        ("accumulate", "2 rows of a process in each part of accumulate cannot be divided"),
        ("dims", "give both the same batch_dim="),
        ("odd", "a batch of 6 rows (dimension 0) cannot be shared by 8 micro-batches evenly"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(four, case, told):
    assert told in four["refusals"][case]
