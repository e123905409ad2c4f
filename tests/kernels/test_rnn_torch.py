"""Recurrent layers in torch: every implementation on every case; and all that torch does to an operator."""

import dataclasses

import pytest

pytest.importorskip("torch")

import torch
from rnn_torch_calls import call, errors, inputs, results
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import perfkit.kernels.rnn.torch_op  # noqa: F401 - torch.ops.perfkit.rnn is there from here on
from perfkit import UnsupportedError
from perfkit.kernels import _autotune, _native, trace
from perfkit.kernels.rnn import OP, Problem, gru, lstm, rnn, torch_stack
from perfkit.kernels.rnn.cases import CASES, Case, tolerance
from perfkit.kernels.rnn.problem import cudnn_is_fast

if _native.find_compiler() is None:
    pytest.skip("no C++ compiler is installed", allow_module_level=True)

STACK = Case("LSTM", 7, 3, 10, 16, layers=2, bidirectional=True)
SOME = (
    STACK,
    Case("GRU", 5, 4, 3, 17, batch_first=True, ragged="lengths"),
    Case("RNN_TANH", 5, 4, 3, 8, ragged="packed"),
)


class Layers(torch.nn.Module):
    """A two-layer bidirectional LSTM of 10 inputs and 16 units."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.weights = torch.nn.ParameterList(torch.nn.LSTM(10, 16, 2, bidirectional=True).parameters())
        self.options = options

    def forward(self, x, lengths=None):
        groups = [tuple(self.weights[i + j] for j in range(4)) for i in range(0, len(self.weights), 4)]
        y, hn, cn = lstm(x, groups, lengths=lengths, bidirectional=True, **self.options)
        return 2 * y, hn, cn


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def x():
    return torch.randn(7, 3, 10)


def gradients(model, *arguments):
    """Of every parameter."""
    model.zero_grad()
    y, hn, cn = model(*arguments)
    (y.square().sum() + hn.sum() + cn.sin().sum()).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def assert_close(actual, expected, case=STACK):
    """Equal but for the roundings of two different orders of summation."""
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).abs().max() <= tolerance(case, gradient=True) * other.abs().max()


# ---- Numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("implementation", ["cpu", "library", "reference"])
def test_forward_and_every_gradient(implementation, case):
    given = inputs(case)
    assert errors(case, results(case, given, call(case, given, implementation=implementation))) == {}


@pytest.mark.parametrize("case", SOME, ids=str)
def test_without_a_gradient_the_numbers_are_the_same(case):
    given = inputs(case)
    with torch.no_grad():
        plain = call(case, given, implementation="cpu")
    for one, other in zip(plain, call(case, given, implementation="cpu"), strict=True):
        assert not one.requires_grad
        # without a gradient the kernel brings fractions to one denominator
        assert (one - other).abs().max() <= tolerance(case) * other.abs().max()


@pytest.mark.parametrize("case", SOME, ids=str)
def test_recomputing_gives_the_same_gradients(case):
    given = inputs(case)
    outputs = call(case, given, implementation="cpu", recompute=True)
    saved = outputs[0].grad_fn.saved_tensors if case.ragged != "packed" else ()
    sizes = {tensor.shape for tensor in saved if tensor is not None}
    assert outputs[0].shape not in sizes  # neither y nor gates: what went in
    actual = results(case, given, outputs)
    expected = results(case, given, call(case, given, implementation="cpu"))
    for name, value in expected.items():
        assert (abs(actual[name] - value) <= tolerance(case) * abs(value).max()).all(), name


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_threads(threads, count):
    threads(count)
    for case in (STACK, Case("GRU", 5, 4, 3, 17, ragged="lengths"), Case("LSTM", 7, 1, 10, 50)):
        given = inputs(case)
        assert errors(case, results(case, given, call(case, given, implementation="cpu"))) == {}


@pytest.mark.parametrize("implementation", ["cpu", "library"])
def test_memory_of_any_layout(implementation):
    def strided(tensor):
        """The same numbers, every second one in memory, dimensions the other way around."""
        room = torch.zeros(*reversed(tensor.shape), 2).select(-1, 1).permute(*reversed(range(tensor.dim())))
        room.copy_(tensor.detach())
        assert room.numel() == 1 or not room.is_contiguous()
        return room.requires_grad_()

    for case in (STACK, dataclasses.replace(STACK, batch_first=True, ragged="lengths")):
        given = inputs(case)
        for name in ("x", "h0", "c0"):
            setattr(given, name, strided(getattr(given, name)))
        given.weights = [tuple(map(strided, direction)) for direction in given.weights]
        for name in ("d_y", "d_hn", "d_cn"):
            setattr(given, name, strided(getattr(given, name)).detach())
        assert errors(case, results(case, given, call(case, given, implementation=implementation))) == {}


def test_gradients_without_memory_of_their_own(x):
    """The gradient of a sum is one number, seen through strides of zero."""
    model = Layers(implementation="cpu")
    actual = torch.autograd.grad(model(x)[0].sum(), list(model.parameters()))
    model.options = {"implementation": "reference"}
    assert_close(actual, torch.autograd.grad(model(x)[0].sum(), list(model.parameters())))


def test_a_second_backward_pass_finds_what_was_saved(x):
    model = Layers(implementation="cpu")
    loss = model(x)[0].square().sum()
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(loss, list(model.parameters())), strict=True):
        assert torch.equal(one, other)


def test_outputs_that_are_not_used(x):
    model, reference = Layers(implementation="cpu"), Layers(implementation="reference")
    for pick in (0, 1, 2):
        found = [torch.autograd.grad(each(x)[pick].square().sum(), list(each.parameters()), allow_unused=True)
                 for each in (model, reference)]  # fmt: skip
        there = [(one, other) for one, other in zip(*found, strict=True) if other is not None]
        assert_close(*zip(*there, strict=True))


@pytest.mark.parametrize("given_states", [False, True])
@pytest.mark.parametrize("function", [lstm, gru])
def test_packed_in_any_order_is_padded_with_lengths(function, given_states):
    module = (torch.nn.LSTM if function is lstm else torch.nn.GRU)(4, 6, 2)
    x, lengths, count = torch.randn(5, 4, 4), torch.tensor([2, 5, 1, 3]), 2 if function is lstm else 1
    states = [torch.randn(2, 4, 6) for _ in range(count)] if given_states else []
    packed, *of_packed = function(pack_padded_sequence(x, lengths, enforce_sorted=False), module.all_weights, *states)
    y, *of_padded = function(x, module.all_weights, *states, lengths=lengths)
    assert_close([pad_packed_sequence(packed)[0], *of_packed], [y, *of_padded])
    expected, _ = module(pack_padded_sequence(x, lengths, enforce_sorted=False),
                         (tuple(states) if count == 2 else states[0]) if states else None)  # fmt: skip
    assert_close([packed.data], [expected.data])
    assert torch.equal(packed.batch_sizes, expected.batch_sizes)


def test_lengths_of_any_kind():
    x, module = torch.randn(5, 3, 4), torch.nn.GRU(4, 6)
    expected = gru(x, module.all_weights, lengths=torch.tensor([5, 1, 2]))[0]
    for lengths in ([5, 1, 2], (5, 1, 2), torch.tensor([5, 1, 2], dtype=torch.int32)):
        assert torch.equal(gru(x, module.all_weights, lengths=lengths)[0], expected)


def test_dropout_between_layers():
    module = torch.nn.LSTM(4, 6, 3)
    x, weights = torch.randn(5, 2, 4), module.all_weights
    torch.manual_seed(3)
    y, hn, cn = lstm(x, weights, dropout=0.5, training=True)
    torch.manual_seed(3)
    out, states = x, []
    for i in range(3):
        out = torch.nn.functional.dropout(out, 0.5) if i else out
        out, *state = lstm(out, weights[i : i + 1])
        states.append(state)
    assert torch.equal(y, out)
    assert torch.equal(hn, torch.cat([h for h, _ in states]))
    assert torch.equal(cn, torch.cat([c for _, c in states]))
    assert not torch.allclose(y, lstm(x, weights)[0])
    assert torch.equal(lstm(x, weights, dropout=0.5)[0], lstm(x, weights)[0])


# ---- Who computes ----------------------------------------------------------------------------------------------------


def test_the_kernel_is_first_on_a_cpu(x):
    with trace() as calls, torch.no_grad():
        Layers()(x)
        Layers()(x)  # what was found before is told again
    assert [choice.implementation for choice in calls] == ["cpu", "cpu"]
    assert dict(calls[0].refused)["triton"] == "it runs on cuda, and this call is on cpu"


def test_float64_is_the_librarys():
    with trace() as calls:
        rnn(torch.randn(3, 2, 4, dtype=torch.float64), torch.nn.RNN(4, 5, dtype=torch.float64).all_weights)
    assert calls[0].implementation == "library"
    assert "float64" in dict(calls[0].refused)["cpu"]


def test_without_a_compiler_the_library_runs_and_the_trace_says_so(monkeypatch):
    monkeypatch.setattr(_native, "find_compiler", lambda: None)
    module = torch.nn.GRU(3, 11)  # a problem that nobody has asked for
    with trace() as calls:
        gru(torch.randn(13, 2, 3), module.all_weights)
    assert calls[0].implementation == "library"
    assert "no C++ compiler" in dict(calls[0].refused)["cpu"]


def test_what_is_measured_is_believed_at_once(monkeypatch, tmp_path, x):
    monkeypatch.setenv("PERFKIT_CACHE", str(tmp_path))
    model = Layers()
    problem = Problem("torch", "cpu", "float32", "LSTM", 7, 3, 10, 16, 2, 2)
    with trace() as calls, torch.no_grad():
        model(x)
        _autotune.record("rnn", problem, {("library", ()): 1.0, ("cpu", ()): 2.0})
        model(x)
    assert [choice.implementation for choice in calls] == ["cpu", "library"]


def test_where_cudnn_is_fast():
    def problem(hidden, dtype="float16", **changes):
        return Problem("torch", "cuda", dtype, "LSTM", 10, 16, 256, hidden, **changes)

    assert cudnn_is_fast(problem(192, "bfloat16", layers=3, directions=2))
    assert not cudnn_is_fast(problem(192, "bfloat16", needs_grad=True))
    assert cudnn_is_fast(problem(128, "bfloat16", needs_grad=True))
    assert not cudnn_is_fast(problem(128, ragged="packed"))
    assert cudnn_is_fast(problem(1024))
    for outside in (problem(1152), problem(500), problem(512, "bfloat16"), problem(512, layers=2)):
        assert not cudnn_is_fast(outside)
    assert not cudnn_is_fast(dataclasses.replace(problem(512), batch=12))
    assert not cudnn_is_fast(dataclasses.replace(problem(512), inputs=100))


def test_the_public_order():
    names = [known.name for known in OP.implementations if known.framework == "torch"]
    assert names == ["triton", "cpu", "library", "reference"]


# ---- What torch does to an operator ----------------------------------------------------------------------------------


def operator_arguments(case, save=True):
    given = inputs(case)
    if case.ragged == "lengths":
        given.x = given.x.detach().nan_to_num().requires_grad_()  # results are compared, and a gradient of NaN is NaN
    flat = [weight for direction in given.weights for weight in direction]
    options = (case.mode, case.bias, case.bidirectional, case.batch_first, save, "")
    return given.x, given.rows, given.h0, given.c0, flat, *options


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
