"""Attention split by heads, in two and in four processes: numbers, messages and checkpoints are those of the whole."""

from types import SimpleNamespace

import pytest

pytest.importorskip("torch")

import torch
from shared_runs import once, shared_folder
from torch import nn
from torch_workers import together

BLOCKS = {
    "encoder layer": (["self_attn"], ["linear1"], ["linear2"]),
    "encoder": (
        ["layers.0.self_attn", "layers.1.self_attn"],
        ["layers.0.linear1", "layers.1.linear1"],
        ["layers.0.linear2", "layers.1.linear2"],
    ),
    "padded": (["encoder.layers.0.self_attn"], ["encoder.layers.0.linear1"], ["encoder.layers.0.linear2"]),
    "decoder layer": (["self_attn", "multihead_attn"], ["linear1"], ["linear2"]),
}
WEIGHTS = {
    **dict.fromkeys(["itself", "another", "other widths", "causal", "a learned mask", "dropout"], "averaged"),
    **dict.fromkeys(["quietly", "three", "no bias", "a mask for each head", "learned masks"], None),
    **dict.fromkeys(["quiet dropout", "nowhere to look"], None),
    **dict.fromkeys(["time first", "one sequence"], "averaged"),
    "each head's weights": "each",
}
"""By call of one attention: what of its weights it asks for."""

FUSED, SEPARATE = (
    "2 layers in {} parts (qkv by heads; out by rows)",
    "4 layers in {} parts (q, k, v by heads; out by rows)",
)
WRITTEN = {
    **dict.fromkeys(["products", "by a function", "learned positions", "otherwise"], SEPARATE),
    **dict.fromkeys(["masked", "indexed", "picked", "beside"], FUSED),
    "einsum": None,
    "two heads": None,
    "grouped": None,
}
"""How attention that is written out is split; None where its layers' outputs are gathered, with four processes."""

CASES = [*WEIGHTS, *BLOCKS, *WRITTEN]
TOLERANCE = 128 * 2**-52 * 16
"""In float64: gradients add up over less than 4 · 7 · 4 numbers here, through less than 16 layers."""

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


@pytest.fixture(scope="module")
def folder():
    return shared_folder("attention")


@pytest.fixture(scope="module")
def four(folder):
    """What every one of four processes found, by rank."""
    return once("attention by four", lambda: together("attention_worker.py", 4, folder))


@pytest.fixture(scope="module")
def two(four, folder):
    """The same of two, which read what the four wrote."""
    return once("attention by two", lambda: together("attention_worker.py", 2, folder))


@pytest.fixture(params=["two", "four"])
def told(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_weights_are_those_of_the_whole(told, case):
    for rank in told:
        found = rank["cases"][case]["inference"]
        assert found["off"] <= TOLERANCE
        assert found["same"], "a subclass of the model's own class at most"


@pytest.mark.parametrize("case", CASES)
def test_training_is_that_of_the_whole(told, case):
    """Gradients, and the losses of three steps, under the same dropout."""
    for rank in told:
        for found in (rank["cases"][case][chain] for chain in ("training", "both") if chain in rank["cases"][case]):
            assert found["gradients"] <= TOLERANCE
            assert found["losses"] <= TOLERANCE
            assert abs(found["fell"] - 1) > 1e-3, "the steps do something"
            assert found["restored"] == 0
            assert found["held"] == found["parameters"], "the optimizer holds the new parameters"
        assert ("both" in rank["cases"][case]) == (case not in WEIGHTS and len(told) == 4)


@pytest.mark.parametrize("case", WEIGHTS)
def test_an_attention_sends_once_forwards_and_once_backwards(told, case):
    """What is asked of its weights is sent besides, forwards alone; and with dropout first rank 0's random state."""
    forward, backward = told[0]["cases"][case]["sent"]
    assert forward.pop("c10d.broadcast_", 0) == ("dropout" in case or case == "nowhere to look")
    weights = WEIGHTS[case]
    assert sum(n for kind, n in forward.items() if "all_reduce" in kind) == 1 + (weights == "averaged")
    assert sum(n for kind, n in forward.items() if "all_gather" in kind) == (weights == "each")
    assert sum(forward.values()) == 1 + (weights is not None)
    assert {kind.rpartition(".")[2]: n for kind, n in backward.items()} == {"all_reduce": 1}
    (line,) = told[0]["cases"][case]["inference"]["parts"]
    sends = {None: "1 all-reduce", "averaged": "2 all-reduces", "each": "1 all-reduce and 1 all-gather"}[weights]
    assert line == f"tensor: 1 layer in {len(told)} parts (attention by heads), {sends} a call"


@pytest.mark.parametrize("case", BLOCKS)
def test_the_report_names_what_is_split_how(told, case):
    heads, columns, rows = (", ".join(names) for names in BLOCKS[case])
    layers, sends = sum(map(len, BLOCKS[case])), len(BLOCKS[case][0]) + len(BLOCKS[case][2])
    ways = f"{heads} by heads; {columns} by columns; {rows} by rows"
    found = told[0]["cases"][case]["inference"]
    assert found["parts"] == [f"tensor: {layers} layers in {len(told)} parts ({ways}), {sends} all-reduces a call"]
    assert found["skipped"] == {}
    held, whole = found["bytes"]
    assert whole / len(told) < held < whole


@pytest.mark.parametrize("case", WRITTEN)
def test_attention_that_is_written_out_is_split_by_heads_where_it_is_found(four, case):
    found, way = four[0]["cases"][case], WRITTEN[case]
    forward, backward = found["sent"]
    if way is None:
        assert found["inference"]["parts"] == [
            "tensor: 4 layers in 4 parts (q, k, v, out by columns, gathered), 4 all-gathers a call"
        ]
        assert sum(n for kind, n in forward.items() if "all_gather" in kind) == 4
    else:
        assert found["inference"]["parts"] == [f"tensor: {way.format(4)}, 1 all-reduce a call"]
        assert {kind: n for kind, n in forward.items() if "broadcast" not in kind} == {"c10d_functional.all_reduce": 1}
        assert backward["c10d_functional.all_reduce"] == (3 if way is SEPARATE else 1)


@pytest.mark.parametrize("case", ["two heads", "grouped"])
def test_two_processes_share_two_heads_and_four_are_told_why_not(two, four, case):
    (said,) = four[0]["cases"][case]["inference"]["notes"][1:]
    assert said == "the attention of k, q, v, out is not split by heads: 2 head(s) cannot be shared by 4 devices evenly"
    (found,) = two[0]["cases"][case]["inference"]["parts"]
    assert found == f"tensor: {SEPARATE.format(2)}, 1 all-reduce a call"


def test_another_way_through_the_model_computes_what_the_whole_would(told):
    assert max(rank["otherwise"] for rank in told) <= TOLERANCE


def test_what_is_left_whole_is_told_with_the_reason(told):
    skipped = told[0]["left whole"]
    assert "a key and a value of their own" in skipped["own keys"]["attention"]
    assert "a key and a value of their own" in skipped["zeros"]["attention"]
    assert skipped["one head"] == {"attention": f"1 head(s) cannot be shared by {len(told)} devices evenly"}
    assert "a weight is computed from others" in skipped["computed"]["attention"]
    assert skipped["tied"] == {
        "1.attention": "shares a weight with 1.fc",
        "1.fc": "shares a weight with 1.attention.out_proj",
    }


def test_the_norm_of_gradients_is_that_of_the_whole(told):
    assert max(rank["clipped"] for rank in told) <= TOLERANCE


def test_compiled_it_computes_the_same(two):
    """In two processes, which hold two heads each: compiling in each of four takes as long again as all else."""
    assert max(max(rank["compiled"].values()) for rank in two) <= TOLERANCE


def test_a_whole_state_is_taken_and_not_handed_out_wrongly(told):
    for rank in told:
        far, said = rank["handed out"]
        assert far == 0
        assert "leave broadcast_from_rank0 out" in said


def test_what_four_wrote_two_read_and_what_two_wrote_one_reads(two, four, folder):
    from perfkit.parallel import torch_checkpoint

    assert four[0]["written"]["placements"] == ["S(1)", "_S(0, 3)"]
    for told in (two[0], four[0]):
        assert told["written"]["moment"] == told["written"]["placements"], "the optimizer's state lies as the weight"
        assert told["written"]["keys"]
    assert max(rank["read"] for rank in two) == 0
    for wrote in ("four", "two"):
        model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).double()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        trainer = SimpleNamespace(
            model=model, optimizer=optimizer, scaler=torch.amp.GradScaler("cpu", enabled=False), rounds=None
        )
        torch_checkpoint.read(folder / wrote, SimpleNamespace(trainer=trainer))
        expected = torch.load(folder / f"{wrote}.pt")
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, expected[name])
            assert torch.equal(optimizer.state[parameter]["exp_avg"], expected[f"{name}.moment"])
