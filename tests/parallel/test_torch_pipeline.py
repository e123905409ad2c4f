"""pipeline_parallel in torch, in four processes: numbers as the whole model's; and models taken apart in one."""

import itertools

import pytest

pytest.importorskip("torch")

import torch
from sample_models import training
from shared_runs import once
from torch import fx, nn
from torch.torch_version import TorchVersion
from torch_workers import together

from perfkit import UnsupportedError
from perfkit._chain import chain_of
from perfkit._recipe import ParallelRecipe
from perfkit._workload import Inputs
from perfkit.backends import backend
from perfkit.backends.torch_compile import compiled, uncompiled
from perfkit.parallel.torch_pipe import StageModule
from perfkit.parallel.torch_stages import Operations, stage_graphs
from perfkit.parallel.torch_trace import label, named, tensors_of, traced

MODELS, CHAINS = ("cnn2", "text_lstm", "transformer", "skips"), ("1f1b", "gpipe", "data", "interleaved")
MESHES = [
    *(("cnn2", "shard"), ("text_lstm", "shard"), ("skips", "shard"), ("text_lstm", "interleaved shard")),
    *(("cnn2", "tensor"), ("transformer", "tensor"), ("attention", "tensor"), ("text_lstm", "accumulate")),
]
TOLERANCE = 3136 * 2**-52 * 8
"""In float64: the longest sum of a model here has 3136 terms, and rounding goes through less than 8 layers."""

needs_processes = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


def launched(processes, *arguments):
    """What every process found, by rank."""
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    if torch.__version__ < (2, 13):
        pytest.skip("pipelines train with torch 2.13 or newer")
    return together("pipeline_worker.py", processes, *arguments)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """One launch for all tests of this file but one."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return once("pipeline_worker", lambda: launched(4, folder))


@pytest.mark.parametrize("model", MODELS)
def test_outputs_are_whole_on_every_process_and_those_of_the_model(told, model):
    for rank in told:
        found = rank[model]["inference"]
        assert found["off"] <= TOLERANCE
        assert found["same"], "a subclass of the model's own class"
        assert found["parameters"][0] == found["parameters"][1], "those of other processes count too"


@pytest.mark.parametrize(("model", "chain"), [*itertools.product(MODELS, CHAINS), *MESHES])
def test_training_is_that_of_the_whole_model(told, model, chain):
    for rank in told:
        found = rank[model][chain]
        assert found["losses"] <= TOLERANCE
        assert found["parameters"] <= TOLERANCE
        assert found["outputs"] <= TOLERANCE
        assert abs(found["fell"] - 1) > 1e-2, "the steps do something"
        assert found["restored"] == 0
        assert found["optimized"] == len(found["held"])
    held = [rank[model][chain]["held"] for rank in told]
    if chain not in ("1f1b", "gpipe"):
        assert held[0] == held[1]
        assert held[2] == held[3]
        held = held[::2]
    all_held = [name for names in held for name in names]
    assert len(all_held) == len(set(all_held)) == PARAMETERS[model], "each parameter is held by one stage"


PARAMETERS = {"cnn2": 8, "text_lstm": 11, "transformer": 12, "skips": 11, "attention": 20}


def test_all_axes_at_once():
    for found in launched(8, "all axes"):
        assert found["losses"] <= TOLERANCE
        assert found["parameters"] <= TOLERANCE
        assert found["outputs"] <= TOLERANCE
        assert abs(found["fell"] - 1) > 1e-2
        assert found["numbers"][0] < found["numbers"][1], "a share of its stage"


@pytest.mark.parametrize("how", ["clipped whole", "clipped shard"])
def test_the_norm_of_the_whole_gradient_is_clipped(told, how):
    for rank in told:
        assert rank[how]["losses"] <= TOLERANCE
        assert rank[how]["parameters"] <= TOLERANCE
        assert any("clip_grad_norm_ sees the norm over all stages" in note for note in rank[how]["notes"])


def test_a_process_holds_its_share_of_its_stage(told):
    for rank in told:
        for model, chain, parts in (("cnn2", "data", 1), ("cnn2", "shard", 2), ("text_lstm", "shard", 2)):
            mine, whole = rank[model][chain]["numbers"]
            # Of what has an odd number of rows one process has one row more, and text_lstm's are of 16 numbers at most.
            assert abs(mine - whole / parts) <= (parts - 1) * 16, (model, chain)
    parts = told[0]["cnn2"]["shard"]["spread"][0]
    assert parts[1] == "data: the batch in 2 parts, parameters, gradients and optimizer state in parts"


def test_layers_of_each_stage_are_split_and_told_for_all_stages(told):
    for rank in told:
        found = rank["parts"]
        assert found["worst"] == 0, "dropout is the same on processes that hold parts of the same layers"
        assert found["losses"] == told[0]["parts"]["losses"]
        layers = {"0.q", "0.k", "0.v", "0.out", "2", "4"}
        assert set(found["touched"]) == layers, "the last layer's three outputs cannot be shared"
        (part,) = found["parts"][1:]
        assert part.startswith("tensor: 6 layers in 2 parts (0.q, 0.k, 0.v by heads; 0.out, 4 by rows; 2 by columns)")
        assert part.endswith("on device 1 of 2 along the pipeline")


def test_attention_is_split_by_heads_within_stages(told):
    written = [part for part in told[0]["attention"]["tensor"]["spread"][0] if part.startswith("tensor")]
    assert any("by heads" in part for part in written)


def test_parts_of_accumulate_are_further_micro_batches(told):
    parts, _, bubble = told[0]["text_lstm"]["accumulate"]["spread"]
    assert "1f1b with 4 micro-batches of 1 row" in parts[0]
    assert bubble == pytest.approx(1 / 5)
    assert any("further micro-batches of the schedule" in note for note in told[0]["text_lstm"]["accumulate"]["notes"])


def test_stages_are_compiled_one_by_one(told):
    for rank in told:
        without, compiled = rank["compiled"]["without"], rank["compiled"]["with"]
        assert compiled["losses"] == pytest.approx(without["losses"], rel=TOLERANCE)
        assert (without["graphs"], compiled["graphs"] > 0) == (0, True)
        assert rank["compiled"]["inference"] <= TOLERANCE
        assert any("each stage is compiled by itself" in note for note in rank["compiled"]["notes"])


def test_pipelines_are_averaged_every_few_steps(told):
    for rank in told:
        losses, expected = rank["averaged"]["losses"]
        assert losses == pytest.approx(expected, rel=TOLERANCE)
        assert rank["averaged"]["parameters"] <= TOLERANCE
    assert told[0]["averaged"]["losses"][1] != told[1]["averaged"]["losses"][1]


def test_a_checkpoint_goes_on_in_other_meshes(told):
    for rank in told:
        same, other, split = (rank["checkpoints"][start : start + 2] for start in (0, 2, 4))
        assert other == pytest.approx(same, rel=TOLERANCE)
        assert split == pytest.approx(same, rel=TOLERANCE)
        assert same[0] != same[1]


def test_processes_without_weights_write_and_read_checkpoints(told):
    for rank in told:
        writer, reader = rank["without weights"]
        assert writer == reader


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("model", MODELS)
def test_stages_and_their_bubble_are_told(told, model, chain):
    parts, balance, bubble = told[0][model][chain]["spread"]
    stages = 2 if chain == "data" else 4
    assert parts[0].startswith(f"pipeline: {stages} stages (")
    assert len(balance) == stages
    assert sum(balance) == pytest.approx(1)
    assert min(balance) > 0
    # Filling and draining: 3 of 3 + 4 turns; 3 of 3 + 2; 1 of 1 + 2; 1 of 1 + 2 · 2, as each device has two stages.
    assert bubble == pytest.approx({"1f1b": 3 / 7, "gpipe": 3 / 5, "data": 1 / 3, "interleaved": 1 / 5}[chain])


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("patterns", "leave include and exclude out"),
        ("precision", "use 'bf16' in place of precision="),
        ("offload", "has not been tried on several GPUs"),
        ("gpipe", "accumulate would save nothing"),
        ("parts", "2 rows of a process in each part of accumulate cannot be divided"),
        ("graphs", "before its backward: use mode='default'"),
        ("odd", "8 rows of a process cannot be divided into 3 micro-batches evenly"),
        ("few", "2 micro-batches are too few"),
        ("stages", "6 stages by 'interleaved' on 4 devices"),
        ("many", "it has 1 place(s) for a cut"),
        ("tied", "a weight is used on both sides"),
        ("split", "split_at='9': no layer is called so; known: '0', '1', '2', '3'"),
        ("loss", "the loss is no mean over the batch, and no sum"),
        ("looks", "Looks.forward cannot be followed"),
        ("scaled", "use 'bf16', whose gradients need no scaling"),
    ],
)
def test_what_cannot_work_is_refused_on_every_process(told, case, message):
    for rank in told:
        assert message in rank["refusals"][case]


def test_a_loss_that_is_a_sum_is_added_up(told):
    one, whole = told[0]["further"]["sums"]
    assert one == pytest.approx(whole, rel=2**-24 * 16)
    assert any("the loss is a sum" in note for note in told[0]["further"]["notes"])
    assert any("draws random numbers of its own" in note for note in told[0]["further"]["notes"])


def test_layers_to_cut_at_are_taken_by_name(told):
    assert told[0]["further"]["parts"][0].startswith("pipeline: 4 stages (0; 1; 2; 4)")


def test_precision_goes_around_each_stage_and_other_batch_sizes_pass(told):
    for rank in told:
        same, low = rank["further"]["precise"]
        assert same == 0
        assert low > 2**-10, "bfloat16 was lost"


def test_optimize_reports_what_four_processes_gave(told):
    for rank in told:
        found = rank["reported"]
        assert found["same"] < 1e-5, "the result has the original's parameters, and gives whole outputs"
        assert found["isinstance"]
        assert found["fidelity"] < 1e-5
    report = told[0]["reported"]["parallel"]
    assert (report["layout"], report["devices"], report["processes"]) == ("pipeline 2 × data 2", 4, 4)
    assert report["rank_model_bytes"] == [(6 * 32 + 32) * 4] * 2 + [(32 * 3 + 3) * 4] * 2
    # Two micro-batches of 2 × 32 activations, the stage's gradients, and the loss twice: to its pipeline, and averaged.
    assert report["sent_bytes"]["value"] == (2 * 2 * 32 + 6 * 32 + 32 + 1 + 1) * 4
    assert "2 × send" in report["sent_bytes"]["method"]
    assert "bubble" in told[0]["reported"]["text"]


def apart(model, *args, cuts=None, **kwargs):
    """The outputs of a model, and those of its stages one after another; and what its operations are called."""
    torch.manual_seed(0)
    expected = model(*args, **kwargs)
    inputs = Inputs(args, kwargs)
    operations = Operations(traced(model, inputs), model, tensors_of(named(type(model), inputs)))
    places, _ = operations.places()
    torch.manual_seed(0)
    received = ()
    for graph in stage_graphs(operations, sorted(places) if cuts is None else cuts):
        received = StageModule(fx.GraphModule(model, graph), ()).compute(received, operations.inputs)
    return expected, received, [label(node) for node in operations.nodes]


RECURRENT = {
    "LSTM": nn.LSTM(4, 6, num_layers=3, batch_first=True),
    "both ways": nn.GRU(4, 6, num_layers=2, bidirectional=True),
    "dropout": nn.RNN(4, 6, num_layers=2, dropout=0.5),
    "ReLU, no bias": nn.RNN(4, 6, num_layers=2, nonlinearity="relu", bias=False),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_are_taken_apart(name):
    model = RECURRENT[name]
    (y, states), found, labels = apart(model, torch.randn(5, 7, 4))
    expected = [y, *(states if isinstance(states, tuple) else [states])]
    for mine, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, wanted)
    assert {f"[{layer}]" for layer in range(model.num_layers)} <= set(labels)
    assert not any("_perfkit" in key for key in model.state_dict())


class Recurrent(nn.Module):
    def __init__(self, rnn, begins=False):
        super().__init__()
        self.rnn, self.begins = rnn, begins

    def forward(self, x):
        start = (x.new_zeros(2, 5, 6), x.new_zeros(2, 5, 6)) if self.begins else None
        return self.rnn(x, start)[0].mean(1) if self.begins else self.rnn(x)[0].mean(1)


def test_a_recurrent_module_that_is_given_a_state_stays_whole():
    rnn = nn.LSTM(4, 6, num_layers=2, batch_first=True)
    for begins, whole in ((True, True), (False, False)):
        expected, (found,), labels = apart(Recurrent(rnn, begins), torch.randn(5, 7, 4))
        torch.testing.assert_close(found, expected)
        assert ("rnn" in labels) == whole
        assert ("rnn[1]" in labels) != whole


@pytest.mark.parametrize("first", [True, False])
def test_transformers_are_taken_apart_and_keep_their_mode(first):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True, norm_first=first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    for mode in (True, False):
        # What is sent is laid out anew, and torch draws in the order of the layout: with dropout in one piece.
        expected, (found,), labels = apart(model.train(mode), torch.randn(3, 5, 8), cuts=[] if mode else None)
        torch.testing.assert_close(found, expected)
        assert {"layers.0.self_attn", "layers.1.linear2"} <= set(labels)


def test_defaults_keywords_and_sizes_are_followed():
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, mask, *, scale=2.0):
            rows, width = x.shape
            hidden = self.first(x).masked_fill(mask, 0.0).view(rows, width)
            return {"out": self.second(hidden) * scale, "rows": [hidden]}

    x, mask = torch.randn(3, 4), torch.rand(3, 4) > 0.5
    expected, found, _ = apart(Sized(), x, mask=mask)
    torch.testing.assert_close(list(found), [expected["out"], *expected["rows"]])


@pytest.mark.parametrize("trains", [True, False])
def test_what_compile_put_around_a_model_comes_off(trains):
    model = nn.Sequential(nn.Linear(4, 4))
    example = {"loss": nn.functional.mse_loss, "targets": torch.ones(2, 4), "optimizer": torch.optim.SGD}
    given = example if trains else dict.fromkeys(example)
    work = backend("torch").bind(
        model, None, (torch.ones(2, 4),), mode="training" if trains else "inference", seed=0, **given
    )
    assert uncompiled(work.model) is None
    work, _ = compiled(work, "default", freezing=True, dynamic=None, fullgraph=True)
    assert uncompiled(work.model) == {"options": {}, "dynamic": None, "fullgraph": True}
    assert type(work.model) is nn.Sequential
    assert work.model._compiled_call_impl is None
    assert not [name for name in vars(work.model) if name.startswith("_perfkit")]


def test_any_number_of_inputs_is_refused():
    class Several(nn.Module):
        def forward(self, *xs):
            return sum(xs)

    with pytest.raises(UnsupportedError, match="any number of arguments"):
        apart(Several(), torch.ones(2), torch.ones(2))


def test_training_is_refused_with_a_torch_whose_stages_would_wait_for_ever(monkeypatch):
    import perfkit

    monkeypatch.setattr(torch, "__version__", TorchVersion("2.12.1"))
    monkeypatch.setattr(ParallelRecipe, "refusal", lambda self, work: None)
    plan = perfkit.plan(**training("torch"), recipe="pipeline_parallel", mode="training")
    assert plan.steps[0].refusal.startswith("training in stages needs torch 2.13 or newer, and this is 2.12.1: pip")


def test_one_process_is_told_how_to_start_several():
    import perfkit

    plan = perfkit.plan(**training("torch"), recipe="pipeline_parallel", mode="training")
    assert "perfkit launch --nproc 2" in plan.steps[0].refusal
    assert chain_of("pipeline_parallel(2, split_at='fc1')").recipes[0].split_at == ("fc1",)
