"""data_parallel in torch: two processes train as one does."""

import re

import pytest

pytest.importorskip("torch")

from shared_runs import once
from torch_workers import together

TRAINED = {
    "cnn2": "data_parallel",
    "text_lstm": "data_parallel(shard=True)",
    "block": "data_parallel(2)",
    "block sharded": "data_parallel(shard=True)",
    "shared": "data_parallel(shard=True)",
    "block in parts": "accumulate(2)+data_parallel",
    "block sharded in parts": "accumulate(2)+data_parallel(shard=True)",
}
ROUNDINGS = 2**-24 * 100
"""Sums over a batch in another order, of some hundred terms, over five steps of an optimizer: about sqrt(n) roundings
each; Adam divides by the size of a gradient, and so carries its relative error into the parameters."""


@pytest.fixture(scope="module")
def found():
    return once("torch_data_worker", lambda: together("torch_data_worker.py", 2, torchrun=True))


@pytest.mark.parametrize("name", TRAINED)
def test_losses_and_parameters_are_those_of_one_process(found, name):
    result = found[name]
    assert result["losses"] == pytest.approx(result["alone"], rel=ROUNDINGS)
    assert result["losses"][-1] < result["losses"][0]
    assert result["parameters_off"] < ROUNDINGS
    assert result["same_on_both"]
    assert result["isinstance"]


def test_gradients_in_bfloat16_are_rounded(found):
    """2^-9 of each gradient, which Adam carries into each of five steps."""
    result = found["lstm"]
    assert result["losses"] == pytest.approx(result["alone"], rel=5 * 2**-9)
    assert ROUNDINGS < result["parameters_off"] < 5 * 2**-9
    assert result["same_on_both"]


def test_bfloat16_weights_round_what_is_computed_and_halve_what_is_gathered(found):
    """2^-9 of each product, over a dozen layers forwards and backwards, carried on by five steps of SGD."""
    result, plain = found["block bf16"], found["block sharded"]
    assert result["losses"] == pytest.approx(plain["losses"], rel=12 * 2**-9)
    assert ROUNDINGS < result["parameters_off"] < 12 * 2**-9
    assert result["dtypes"] == ["torch.float32"], "parameters are kept, and outputs returned, as they were"
    assert any("weights and activations in bfloat16" in note for note in result["notes"])
    # Weights are gathered forwards and backwards in half the bytes; gradients are sent as before.
    sent = [side["report"]["sent_bytes"]["value"] for side in (result, plain)]
    assert 0.5 < sent[0] / sent[1] < 1


def test_gradients_are_sent_with_the_last_micro_batch_alone(found):
    whole, parts = (found[name]["report"]["sent_bytes"]["value"] for name in ("block", "block in parts"))
    assert whole == parts
    whole, parts = (
        found[name]["report"]["sent_bytes"]["method"] for name in ("block sharded", "block sharded in parts")
    )
    # gloo builds a reduce-scatter of an all-reduce; the loss is one more.
    once, again = (int(re.search(r"(\d+) × all_reduce", told)[1]) for told in (whole, parts))
    assert once == again > 1
    assert any("the last of 2 micro-batches" in note for note in found["block in parts"]["notes"])


def test_what_is_exchanged_is_counted(found):
    def sent(name):
        return found[name]["report"]["sent_bytes"]

    loss = 4
    assert sent("cnn2")["value"] == 421_642 * 4 + loss
    assert "all_reduce" in sent("cnn2")["method"]
    assert sent("lstm")["value"] == 12_451 * 2 + loss
    assert "all_gather" in sent("text_lstm")["method"]
    assert all(0 < found[name]["report"]["communicating"]["value"] <= 1 for name in TRAINED)


def test_shards_hold_half_of_the_weights(found):
    whole, halves = (sum(found[name]["report"]["rank_model_bytes"]) for name in ("block", "block sharded"))
    assert halves == whole / 2
    assert found["shared"]["notes"] == ["FSDP2 in 1 units: FSDPShared"]


def test_parameters_that_no_loss_uses_are_named(found):
    for name in ("block", "block sharded"):
        assert set(found[name]["skipped"]) == {"spare.weight", "spare.bias"}
        assert "used by no loss (spare.weight, spare.bias)" in found[name]["notes"][0]


def test_the_report_is_of_both(found):
    result = found["cnn2"]
    report = result["report"]
    assert (report["layout"], report["devices"], report["processes"]) == ("data 2", 2, 2)
    assert len(report["rank_peak_bytes"]) == 2
    assert result["throughput"] == pytest.approx(8 / result["latency_ms"] * 1e3)
    for told in ("data: the batch in 2 parts", "efficiency", "exchanged", "peak by process"):
        assert told in result["text"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("three", "InvalidInputError: data_parallel(size=3) asks for 3 devices, and there are 2"),
        ("odd", "a batch of 7 rows (dimension 0) cannot be shared by 2 devices evenly"),
        ("other model", "the processes differ: 0.weight is float32[8, 8] on rank 0, and float32[9, 8] on rank 1"),
        ("other seed", "the processes differ: seed is 0 on rank 0, and 1 on rank 1"),
        ("threads to choose", "in training give the number, 'threads(1)'"),
    ],
)
def test_what_cannot_work_is_refused_on_every_process(found, case, message):
    assert message in found[case]


def test_a_number_of_threads_holds_in_the_steps_of_every_process(found):
    assert found["threads"] == [2, 1]


def test_one_process_is_told_how_to_start_several():
    import torch

    import perfkit

    model = torch.nn.Linear(2, 2)
    given = {"example_inputs": (torch.ones(4, 2),), "targets": torch.ones(4, 2), "loss": torch.nn.MSELoss()}
    with pytest.raises(perfkit.UnsupportedError, match="perfkit launch --nproc 2"):
        perfkit.optimize(model, "data_parallel", mode="training", optimizer=torch.optim.SGD, **given)
    plan = perfkit.plan(model, "data_parallel", mode="training", optimizer=torch.optim.SGD, **given)
    assert "perfkit launch" in plan.steps[0].refusal


def test_parameters_with_hooks_are_not_cut_into_parts():
    import torch

    import perfkit
    from perfkit.backends import backend
    from perfkit.parallel.torch_data import data_parallel
    from perfkit.recipes.data_parallel import DataParallel

    model = torch.nn.Linear(2, 2)
    model.weight.register_hook(lambda gradient: gradient * 0)
    given = {"loss": torch.nn.MSELoss(), "targets": torch.ones(4, 2), "optimizer": torch.optim.SGD, "seed": 0}
    work = backend("torch").bind(model, None, (torch.ones(4, 2),), mode="training", **given)
    with pytest.raises(perfkit.UnsupportedError, match="hooks of weight take gradients of whole ones"):
        data_parallel(work, DataParallel(shard=True))


def test_inference_is_refused():
    import torch

    import perfkit

    with pytest.raises(perfkit.UnsupportedError, match="for inference start one process for each device"):
        perfkit.optimize(torch.nn.Linear(2, 2), "data_parallel", example_inputs=(torch.ones(4, 2),))
