"""pipeline_parallel in JAX on four devices: what one device computes, to rounding; and what it is refused for."""

import itertools

import pytest

pytest.importorskip("jax")
pytest.importorskip("flax")

from jax_workers import result, start

MODELS, CHAINS = ("cnn2", "text_lstm", "transformer"), ("pipeline", "both")
ROUNDING = 2.0**-24
FAN_IN = {"cnn2": 3136, "text_lstm": 24, "transformer": 64}
"""The longest sum of each model."""

PARAMETERS = {"cnn2": 8, "text_lstm": 9, "transformer": 18}


@pytest.fixture(scope="module")
def four() -> dict:
    return result(start("jax_pipeline_on_four_devices.py", 4))


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("model", MODELS)
def test_training_is_that_of_one_device(four, model, chain):
    found, one = four[model][chain], four[model]["losses"]
    # A loss differs as its parameters do, by less than a thousandth of what a step changes, and by its own rounding.
    change = max(abs(later - earlier) for earlier, later in itertools.pairwise(one))
    assert found["losses"] == pytest.approx(one, rel=8 * ROUNDING, abs=1e-3 * change)
    assert len(set(one)) == 5, "the loss stands still: nothing was trained"
    assert four[model]["moved"] > 1e3, "parameters moved no more than by rounding: nothing was compared"
    assert found["off"] < 1
    assert four[model]["unchanged"]


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("model", MODELS)
def test_the_model_can_be_called_also_in_a_program(four, model, chain):
    # Parameters after five steps are off by rounding, and so are outputs: sums of n numbers by √n, through 8 layers.
    assert four[model][chain]["outputs"] <= 5 * 8 * FAN_IN[model] ** 0.5 * ROUNDING


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("model", MODELS)
def test_each_device_holds_its_stage(four, model, chain):
    found = four[model][chain]
    held, whole = found["bytes"]
    stages = 4 if chain == "pipeline" else 2
    assert whole / stages <= held < whole
    assert found["owned"] == list(range(PARAMETERS[model])), "each parameter belongs to one stage"
    assert 1 < found["devices"] <= stages


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("model", MODELS)
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
    four_stages, two_stages, whole = four["blocks"]["then"]
    assert two_stages == pytest.approx(four_stages, rel=8 * 64 * ROUNDING)
    assert whole == pytest.approx(four_stages, rel=8 * 64 * ROUNDING)
    assert four_stages != four["blocks"]["losses"][1][-1]


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("few", "cannot be cut into so many: it has 1 place(s)"),
        ("split", "split_at='c': no layer is called so; known: 'a', 'b'"),
        ("optimizer", "the optimizer looks at whole parameters"),
        ("state", "the model changes state as it runs"),
        ("rows", "an output of shape [] has no dimension for the rows"),
        ("schedule", "schedule='1f1b' is torch's"),
        ("stages", "in JAX each device has one stage"),
        ("tensor", "stages are not split once more"),
        ("shard", "held whole: leave shard out"),
        ("inference", "in JAX it is for training"),
        ("odd", "a batch of 6 rows (dimension 0) cannot be shared by 8 micro-batches evenly"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(four, case, told):
    assert told in four["refusals"][case]
