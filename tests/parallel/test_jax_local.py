"""local_sgd in JAX: four devices do what its formulas say, and send as little as it says."""

import pytest

pytest.importorskip("jax")
pytest.importorskip("flax")

from jax_workers import result, start
from shared_runs import once

STEPS, ROUNDING = 7, 2.0**-24
CASES = ("every step", "every third", "warm-up", "weights", "state", "diloco", "diloco after warm-up")
OVER = {"every step": 0, "warm-up": 0}
"""Steps that are left over when rounds of one or two steps have gone into seven, or into four after a warm-up."""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    run = ("jax_local_on_four_devices.py", 4, tmp_path_factory.mktemp("local"))
    return once("jax_local_on_four_devices", lambda: result(start(*run)))


@pytest.mark.parametrize("case", CASES)
def test_four_devices_do_what_the_formulas_say(found, case):
    told = found[case]
    allowed = 16 * STEPS * ROUNDING  # sums over four devices and the outer step in another order
    assert told["off"] <= allowed
    assert told["first"] <= allowed, "the model is the first device's"
    assert told["losses"] == pytest.approx(told["expected"], rel=allowed)
    assert len(set(told["losses"])) == STEPS, "the loss stands still: nothing was trained"


@pytest.mark.parametrize("case", CASES)
def test_models_differ_within_a_round_and_are_one_once_settled(found, case):
    assert (found[case]["differed"] > 1e-4) == bool(OVER.get(case, 1))
    assert found[case]["settled"]


@pytest.mark.parametrize(
    ("case", "every", "values"),
    [("every step", 1, 64), ("every third", 3, 64), ("diloco", 3, 64), ("state", 3, 3 * 64)],
)
def test_steps_send_nothing_and_averages_the_parameters(found, case, every, values):
    sent, told = found[case]["sent"]
    assert sent == pytest.approx(2 * 3 / 4 * values * 4 / every)
    assert "no collective operation;" in told
    assert f"1 all-reduce of {values * 4} B" in told


def test_devices_draw_random_numbers_of_their_own(found):
    # Of 1000 weights behind a dropout of a half, four masks leave 2⁻⁴ still, and one mask 2⁻¹.
    assert 0 < found["noise"] < 1 / 4


def test_a_checkpoint_ends_the_round_and_is_one_of_any_training(found):
    told = found["resumed"]
    assert told["again"] == told["straight"], "bit for bit: the same devices do the same"
    assert told["plain"][0] == pytest.approx(told["straight"][0], rel=16 * ROUNDING), (
        "it starts from the averaged model"
    )
    assert told["average alone"][:4] == told["straight"][:4]
    assert told["average alone"][4] != told["straight"][4], "there is no outer step"
    assert told["back"][0] == pytest.approx(told["back"][1], rel=16 * ROUNDING)


def test_optimize_reports_a_share_of_the_bytes(found):
    told = found["reported"]
    assert told["ok"]
    assert told["parallel"]["sent_bytes"]["value"] == pytest.approx(2 * 3 / 4 * 64 * 4 / 5), "past the warm-up"
    assert told["parallel"]["parts"] == [
        "data: the batch in 4 parts, parameters averaged every 5 steps, gradients averaged in the first 2"
    ]


def test_a_tensor_axis_is_refused(found):
    assert "use data_parallel with tensor_parallel" in found["refused"]
