"""The recurrent operator under all that torch does to one: compilation, export, autocast, torch.func, fake tensors."""

import dataclasses

import pytest

pytest.importorskip("torch")

import torch
from rnn_torch_calls import SOME, STACK, Layers, assert_close, gradients, inputs
from torch.nn.utils.rnn import pack_padded_sequence

import perfkit.kernels.rnn.torch_op  # noqa: F401 - torch.ops.perfkit.rnn is there from here on
from perfkit import UnsupportedError
from perfkit.kernels import _native
from perfkit.kernels.rnn import gru, lstm, torch_stack

if _native.find_compiler() is None:
    pytest.skip("no C++ compiler is installed", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture
def x():
    return torch.randn(7, 3, 10)


def operator_arguments(case, save=True):
    given = inputs(case)
    if case.ragged == "lengths":
        given.x = given.x.detach().nan_to_num().requires_grad_()  # results are compared, and a gradient of NaN is NaN
    flat = [weight for direction in given.weights for weight in direction]
    options = (case.mode, case.bias, case.bidirectional, case.batch_first, save, "")
    return given.x, given.rows, given.h0, given.c0, flat, *options


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch 2.14's check reads it
@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("case", [STACK, *SOME[1:]], ids=str)
def test_the_operator_is_well_registered(case, save):
    torch.library.opcheck(torch.ops.perfkit.rnn.default, operator_arguments(case, save))


def test_the_gradients_operator_is_well_registered():
    x, rows, h0, c0, weights, *options = operator_arguments(STACK)
    with torch.no_grad():
        y, hn, cn, *saved = torch.ops.perfkit.rnn(x, rows, h0, c0, weights, *options)
    arguments = [x, rows, h0, c0, weights, y, *saved, y.sin(), hn.sin(), cn.sin(), *options[:4], "cpu"]
    checks = ("test_schema", "test_faketensor")  # there is no gradient of it to check
    torch.library.opcheck(torch.ops.perfkit.rnn_backward.default, tuple(arguments), test_utils=checks)


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"recompute": True}, {"implementation": "library"}, {"implementation": "reference"}],
    ids=lambda options: ", ".join(map(str, options.values())) or "picked",
)
def test_compiled(x, options):
    model = Layers(**options)
    run = compiled(model)
    with torch.no_grad():
        assert_close(run(x), model(x))
    expected = gradients(model, x)
    model.zero_grad()
    y, hn, cn = run(x)
    (y.square().sum() + hn.sum() + cn.sin().sum()).backward()
    assert_close([parameter.grad for parameter in model.parameters()], expected)


def test_compiled_for_any_size():
    model, seen = Layers(), []
    torch._dynamo.reset()

    def counting(graph, _):
        seen.append([node.target for node in graph.graph.nodes if "perfkit" in str(node.target)])
        return graph.forward

    run = torch.compile(model, fullgraph=True, dynamic=True, backend=counting)
    with torch.no_grad():
        for steps, batch in ((7, 3), (9, 4), (2, 5)):
            x = torch.randn(steps, batch, 10)
            assert_close(run(x), model(x))
    assert seen == [[torch.ops.perfkit.rnn]]  # one graph, one operator in it


def test_compiled_by_inductor(x):
    torch._dynamo.reset()
    model = Layers()
    with torch.no_grad():
        assert_close(torch.compile(model, fullgraph=True)(x), model(x))


@pytest.mark.parametrize("sorted_already", [True, False])
def test_compiled_on_ragged_rows(x, sorted_already):
    weights = torch.nn.LSTM(10, 16).all_weights
    groups = [tuple(weights[0])]
    lengths = torch.tensor([7, 4, 2] if sorted_already else [2, 7, 4])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=sorted_already)

    def run(packed):
        y, hn, cn = lstm(packed, groups)
        return y.data, hn, cn

    def run_padded(x, lengths):
        return lstm(x, groups, lengths=lengths)

    assert_close(compiled(run)(packed), run(packed))
    assert_close(compiled(run_padded)(x, lengths), run_padded(x, lengths))


def test_exported(x):
    model = Layers().eval()
    steps = torch.export.Dim("steps", min=2, max=100)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: steps},))
        assert sum(node.target == torch.ops.perfkit.rnn.default for node in program.graph.nodes) == 1
        longer = torch.randn(11, 3, 10)
        assert_close(program.module()(longer), model(longer))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced_by_jit(x):
    model = Layers().eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, (x,), check_trace=False)
        assert_close(traced(2 * x), model(2 * x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(x, dtype):
    model = Layers(implementation="cpu")
    lower = [parameter.detach().to(dtype) for parameter in model.parameters()]
    expected = lstm(x.to(dtype), [lower[i : i + 4] for i in range(0, 16, 4)], bidirectional=True)
    with torch.autocast("cpu", dtype=dtype):
        y, hn, cn = model(x)
        in_operator = torch.ops.perfkit.rnn(*operator_arguments(STACK))
        in_graph = compiled(model)(x)
    assert {each.dtype for each in (y, hn, cn, *in_operator[:3], *in_graph)} == {dtype}
    assert_close([y / 2, hn, cn], expected, dataclasses.replace(STACK, dtype=str(dtype).split(".")[1]))
    assert [grad.dtype for grad in gradients(model, x)] == [torch.float32] * 16
    assert_close(in_graph, (y, hn, cn))


@pytest.mark.parametrize("recompute", [False, True])
def test_a_backward_pass_under_autocast_is_as_precise(x, recompute):
    model = Layers(implementation="cpu", recompute=recompute)
    expected = gradients(model, x)
    y, hn, cn = model(x)
    loss = y.square().sum() + hn.sum() + cn.sin().sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = torch.autograd.grad(loss, list(model.parameters()))
    assert_close(actual, expected)


def parameters_and_loss(model):
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters, x):
        y, hn, cn = torch.func.functional_call(model, parameters, (x,))
        return y.square().sum() + hn.sum() + cn.sin().sum()

    return parameters, loss


@pytest.mark.parametrize("implementation", ["cpu", "library"])
def test_func_grad(x, implementation):
    model = Layers(implementation=implementation)
    parameters, loss = parameters_and_loss(model)
    assert_close(torch.func.grad(loss)(parameters, x).values(), gradients(model, x))


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_of_each_row(x, recompute):
    model = Layers(recompute=recompute)
    parameters, loss = parameters_and_loss(model)
    each = torch.vmap(torch.func.grad(lambda parameters, row: loss(parameters, row[:, None])), (None, 1))(parameters, x)
    for row in range(3):
        expected = gradients(model, x[:, row : row + 1])
        assert_close([gradient[row] for gradient in each.values()], expected)


@pytest.mark.parametrize("whom", ["function", "operator"])
def test_vmap_over_inputs_lengths_and_states(whom):
    weights = [tuple(weight.detach() for weight in torch.nn.GRU(4, 6).parameters())]
    x, h0 = torch.randn(5, 3, 2, 4), torch.randn(1, 2, 5, 6)  # calls first; last but one
    lengths = torch.tensor([[3, 1], [2, 3], [1, 1], [3, 3], [2, 2]])

    def run(x, h0, lengths):
        if whom == "function":
            return gru(x, weights, h0, lengths=lengths)
        return torch.ops.perfkit.rnn(x, lengths, h0, None, weights[0], "GRU", True, False, False, True, "")[:2]

    actual = torch.vmap(run, (0, 2, 0))(x, h0, lengths)
    expected = [gru(x[i], weights, h0[:, :, i], lengths=lengths[i]) for i in range(5)]
    assert_close(actual, [torch.stack(each) for each in zip(*expected, strict=True)])
    shared = torch.vmap(lambda h0: run(x[0], h0, lengths[0]), 2)(h0)
    expected = [gru(x[0], weights, h0[:, :, i], lengths=lengths[0]) for i in range(5)]
    assert_close(shared, [torch.stack(each) for each in zip(*expected, strict=True)])


def test_vmap_over_models(x):
    models = [Layers() for _ in range(3)]
    for i, model in enumerate(models):
        with torch.no_grad():
            model.weights[0] += i
    parameters, _ = torch.func.stack_module_state(models)
    actual = torch.vmap(lambda parameters: torch.func.functional_call(models[0], parameters, (x,)))(parameters)
    expected = [torch.stack(each) for each in zip(*(model(x) for model in models), strict=True)]
    assert_close(actual, expected)


def test_other_derivatives_are_refused_by_name(x):
    model = Layers()
    inner = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(model(inner)[0].square().sum(), inner, create_graph=True)
    with pytest.raises(UnsupportedError, match="implementation='reference'"):
        first.sum().backward()
    with pytest.raises(UnsupportedError, match="implementation='reference'"):
        torch.func.jvp(lambda x: model(x)[0], (x,), (x,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(UnsupportedError, match="implementation='reference'"):
        model(torch.autograd.forward_ad.make_dual(x, x))
    x, rows, h0, *rest = operator_arguments(STACK)
    with pytest.raises(UnsupportedError, match="call those"):
        torch.func.grad(lambda h0: torch.ops.perfkit.rnn(x, rows, h0, *rest)[0].sum())(h0)


def test_checkpointed(x):
    model = Layers(implementation="cpu")
    assert_close(gradients(Checkpointed(model), x), gradients(model, x))


class Checkpointed(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.model, x, use_reentrant=False)


def test_nothing_about_it_is_of_the_default_device(x):
    model = Layers(implementation="cpu")
    expected = gradients(model, x)
    with torch.device("meta"):
        assert_close(gradients(model, x), expected)


def test_numbers_that_are_negative_by_a_bit(x):
    model = Layers(implementation="cpu")
    negated = torch.complex(x, x).conj().imag
    assert negated.is_neg()
    with torch.no_grad():
        assert_close(model(negated), model(-x))


def test_fake_tensors_stay_fake(x):
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y, hn, cn = Layers()(mode.from_tensor(x))
    assert [type(each).__name__ for each in (y, hn, cn)] == ["FakeTensor"] * 3
    assert [tuple(each.shape) for each in (y, hn, cn)] == [(7, 3, 32), (4, 3, 16), (4, 3, 16)]


def test_what_the_kernel_keeps_is_what_the_operator_says():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        case = dataclasses.replace(STACK, dtype=str(dtype).split(".")[1])
        *_, gates, cells, inner = torch.ops.perfkit.rnn(*operator_arguments(case))
        expected = torch_stack.empty_saved(case.problem("torch", needs_grad=True), torch.empty(0, dtype=dtype))
        for kept, room in zip((gates, cells, inner), expected, strict=True):
            assert (kept.shape, kept.dtype) == (room.shape, room.dtype)
