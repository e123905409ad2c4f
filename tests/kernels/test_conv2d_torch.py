"""conv2d in torch: every implementation is the framework's layers in float64, and so are its gradients.

Numbers are whole and small, so that every sum is exact (`cases.whole`): results are equal, without a tolerance, and of
the many equal numbers in a window the first one must win.
"""

from functools import partial

import pytest

pytest.importorskip("torch")

import torch
import torch.nn.functional as F

from perfkit import InvalidInputError, UnsupportedError
from perfkit.kernels import _autotune, _native, trace
from perfkit.kernels.conv2d import OP, cases, conv2d, problem, torch_problem

CASES = {case.name: case for case in cases.CASES}
FUSED = cases.CASES[2]
IMPLEMENTATIONS = ("reference", "library", "cpu")
needs_compiler = pytest.mark.skipif(_native.find_compiler() is None, reason="no C++ compiler is installed")
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def implementations(*names):
    return [pytest.param(name, marks=needs_compiler if name == "cpu" else ()) for name in names]


def numbers(case, dtype=torch.float32, layout=torch.contiguous_format, seed=0):
    tensors = [None if each is None else torch.from_numpy(each).to(dtype) for each in cases.whole(case, seed)]
    tensors[0] = tensors[0].to(memory_format=layout)  # not contiguous(): that leaves one channel as it is
    return tensors


def layers(case, x, weight, bias):
    """The framework's own, as the contract says it."""
    options = dict(case.options)
    activation, pool = options.pop("activation", None), options.pop("pool", None)
    if options.get("padding") == "same":  # torch's own has no strides
        given = problem.options(options.get("stride", 1), "same", options.get("dilation", 1), 1, None, None)
        top, bottom, left, right = problem.resolved(given, x.shape[2:], weight.shape[2:])
        x, options["padding"] = F.pad(x, (left, right, top, bottom)), 0
    y = F.conv2d(x, weight, bias, **options)
    y = y.relu() if activation else y
    return F.max_pool2d(y, pool) if pool else y


def with_gradients(function, *tensors, seed=1):
    """y and the gradients of all tensors, for whole numbers coming back."""
    inputs = [None if each is None else each.detach().requires_grad_() for each in tensors]
    y = function(*inputs)
    back = torch.randint(-3, 4, y.shape, generator=torch.Generator().manual_seed(seed)).to(y.dtype)
    return y.detach(), *torch.autograd.grad(y, [each for each in inputs if each is not None], back)


def expected(case, tensors, function=None):
    wide = [None if each is None else each.double() for each in tensors]
    return with_gradients(function or (lambda *inputs: layers(case, *inputs)), *wide)


def assert_equal(found, wanted, dtype=torch.float32):
    for each, other in zip(found, wanted, strict=True):
        assert each.dtype == dtype
        assert torch.equal(each, other.to(dtype))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", implementations(*IMPLEMENTATIONS))
def test_it_is_the_layers(implementation, name):
    case = CASES[name]
    tensors = numbers(case)
    found = with_gradients(lambda *inputs: conv2d(*inputs, **case.options, implementation=implementation), *tensors)
    assert_equal(found, expected(case, tensors))


@needs_compiler
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", list(CASES)[1:6])
def test_dtypes_and_layouts(name, dtype, layout):
    """Half precision rounds once, at the end, and y lies in memory as x does."""
    case = CASES[name]
    tensors = numbers(case, dtype, LAYOUTS[layout])
    found = with_gradients(lambda *inputs: conv2d(*inputs, **case.options, implementation="cpu"), *tensors)
    assert_equal(found, expected(case, tensors), dtype)
    for image in found[:2]:
        assert image.is_contiguous(memory_format=LAYOUTS[layout])
        assert torch_problem.channels_last(image) == (layout == "nhwc")
    with torch.no_grad():
        again = conv2d(*tensors, **case.options, implementation="cpu")
    assert torch.equal(again, found[0])
    assert again.stride() == found[0].stride()


@needs_compiler
def test_numbers_that_lie_anyhow():
    x, weight, bias = numbers(FUSED)
    wide = torch.stack([x, x], -1)[..., 0]  # every other number
    turned = weight.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    strided = torch.stack([bias, bias], -1)[:, 0]
    assert not any(each.is_contiguous() for each in (wide, turned, strided))
    wanted = expected(FUSED, (x, weight, bias))
    for _ in range(2):  # found anew, then remembered
        found = with_gradients(lambda *inputs: conv2d(*inputs, **FUSED.options), wide, turned, strided)
        assert_equal(found, wanted)
        assert torch.equal(conv2d(wide, turned, strided, **FUSED.options), wanted[0].float())
    negative = (
        torch.view_as_complex(torch.stack([x, x], -1)).conj().imag
    )  # numbers that are read with their sign turned
    assert negative.is_neg()
    assert torch.equal(conv2d(negative, weight, bias), F.conv2d(-x, weight, bias))


@needs_compiler
def test_what_is_not_wanted_is_not_computed():
    x, weight, bias = numbers(FUSED)
    y = conv2d(x, weight.requires_grad_(), bias, **FUSED.options)
    y.sum().backward()
    assert x.grad is None
    assert bias.grad is None
    assert torch.equal(weight.grad, torch.autograd.grad(layers(FUSED, x, weight, bias).sum(), weight)[0])


@needs_compiler
@pytest.mark.parametrize("implementation", implementations(None, "library"))
def test_autocast(implementation):
    x, weight, bias = numbers(FUSED)
    run = partial(conv2d, **FUSED.options, implementation=implementation)
    for _ in range(2):
        assert run(x, weight, bias).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            y = run(x, weight, bias)
            op = torch.ops.perfkit.conv2d(x, weight, bias, [1, 1], [1] * 4, [1, 1], 1, "relu", 2, False, "cpu")[0]
        wanted = layers(FUSED, *(each.double() for each in (x, weight, bias)))
        assert torch.equal(y, wanted.bfloat16())
        assert torch.equal(op, y)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(run, x, weight, bias)
    assert [each.dtype for each in found] == [torch.bfloat16, *[torch.float32] * 3]


@needs_compiler
def test_transformations():
    """torch.func's gradients, of each example and of weights of their own."""
    case = FUSED
    x, weight, bias = numbers(case)
    run = partial(conv2d, **case.options)

    by_layers = partial(layers, case)
    reversed_ = (weight.flip(0), weight), (bias.flip(0), bias), (x.flip(0), x)
    weights, biases, images = (torch.stack(pair) for pair in reversed_)
    for arguments, dims in (
        ((weight, bias, images), (None, None, 0)),
        ((weights, biases, x), (0, 0, None)),
        ((weights, bias, images), (0, None, 0)),
        ((weight, bias, images.movedim(0, 2)), (None, None, 2)),
    ):
        found = torch.vmap(torch.func.grad(lambda w, b, i: run(i, w, b).square().sum(), (0, 1, 2)), dims)(*arguments)
        wanted = torch.vmap(torch.func.grad(lambda w, b, i: by_layers(i, w, b).square().sum(), (0, 1, 2)), dims)(
            *arguments
        )
        for each, other in zip(found, wanted, strict=True):
            assert torch.equal(each, other)
    both = torch.vmap(run, (0, 0, 0))(images, weights, biases)
    assert torch.equal(both, torch.stack([run(images[i], weights[i], biases[i]) for i in range(2)]))
    assert torch.equal(
        torch.vmap(run, (0, None, None))(images, weight, bias), torch.stack([run(i, weight, bias) for i in images])
    )


@needs_compiler
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch 2.14's check reads it
def test_opcheck():
    x, weight, bias = (each.requires_grad_() for each in numbers(FUSED))
    halves = [each.requires_grad_() for each in numbers(FUSED, torch.bfloat16, torch.channels_last)]
    rest = [1, 1], [1] * 4, [1, 1], 1, "relu", 2
    torch.library.opcheck(torch.ops.perfkit.conv2d.default, (x, weight, bias, *rest, True, "cpu"))
    torch.library.opcheck(torch.ops.perfkit.conv2d.default, (*halves[:2], None, *rest, False, "cpu"))
    y, argmax = torch.ops.perfkit.conv2d(x.detach(), weight, bias, *rest, True, "cpu")
    arguments = (x, weight, bias, argmax, torch.ones_like(y), *rest, [True, False, True], "cpu")
    arguments = [each.detach() if isinstance(each, torch.Tensor) else each for each in arguments]
    torch.library.opcheck(torch.ops.perfkit.conv2d_backward.default, tuple(arguments))
    for saved in (argmax, argmax.new_empty(0)):  # what was not saved is found again
        found = torch.ops.perfkit.conv2d_backward(*arguments[:3], saved, *arguments[4:])
        wanted = expected(FUSED, [each.detach() for each in (x, weight, bias)], None)
        assert found[0].shape == wanted[1].shape
        assert found[1].numel() == 0
        assert found[2].shape == wanted[3].shape


class Block(torch.nn.Module):
    def __init__(self, implementation=None):
        super().__init__()
        self.conv, self.implementation = torch.nn.Conv2d(3, 7, 3), implementation

    def forward(self, x):
        options = {"padding": "same", "activation": "relu", "pool": 2, "implementation": self.implementation}
        return conv2d(x * 2, self.conv.weight, self.conv.bias, **options).flatten(1) + 1


@pytest.mark.filterwarnings("ignore:`isinstance.treespec:FutureWarning")  # torch's own, while it decomposes
@pytest.mark.parametrize("implementation", implementations("cpu", "library"))
def test_compiled_and_exported(implementation):
    block, x = Block(implementation), torch.randn(4, 3, 12, 9)
    wanted = with_gradients(lambda x, *_: block(x), x)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (4, 3):
        found = with_gradients(lambda x, *_: compiled(x), x[:batch])
        for each, other in zip(found, with_gradients(lambda x, *_: block(x), x[:batch]), strict=True):
            torch.testing.assert_close(each, other)
    exported = torch.export.export(block, (x,), dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}})
    torch.testing.assert_close(exported.module()(x[:2]), wanted[0][:2])
    graph = exported.run_decompositions().graph
    ours = [node for node in graph.nodes if "perfkit" in str(node.target)]
    assert len(ours) == (implementation == "cpu")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("implementation", implementations("cpu", "library"))
def test_traced_by_jit(implementation):
    block, x = Block(implementation).eval(), torch.randn(4, 3, 12, 9)
    with torch.no_grad():
        traced = torch.jit.trace(block, (x,), check_trace=False)
        torch.testing.assert_close(traced(2 * x), block(2 * x))


@needs_compiler
def test_inductor():
    """What it assumes of strides holds, forward and backward. It has nothing to compile here but our operator."""
    tensors = numbers(FUSED, layout=torch.channels_last)
    run = partial(conv2d, **FUSED.options, implementation="cpu")
    compiled = torch.compile(run, fullgraph=True)
    assert_equal(with_gradients(compiled, *tensors), with_gradients(run, *tensors))
    with torch.no_grad():
        y = compiled(*tensors)
    assert torch.equal(y, run(*tensors))
    assert torch_problem.channels_last(y)


def test_who_computes(monkeypatch, tmp_path):
    monkeypatch.setenv("PERFKIT_CACHE", str(tmp_path))  # nothing is known of calls under other tables
    x, weight, bias = numbers(FUSED)
    monkeypatch.setattr(_native, "find_compiler", lambda: None)
    with trace() as calls:
        conv2d(x, weight, bias, pool=2)
    assert calls[0].implementation == "library"
    assert "no C++ compiler" in dict(calls[0].refused)["cpu"]
    monkeypatch.undo()
    if _native.find_compiler() is None:
        return
    monkeypatch.setenv("PERFKIT_CACHE", str(tmp_path / "tables"))
    names = []
    for _ in range(3):
        with trace() as calls:
            conv2d(x, weight, bias, pool=3)
        names += [call.implementation for call in calls]
    assert names == ["cpu"] * 3
    made = torch_problem.problem_of(x, weight, bias, problem.options(1, 0, 1, 1, None, 3), False)
    _autotune.record(OP.name, made, {("library", ()): 1.0, ("cpu", ()): 2.0})
    with trace() as calls:
        conv2d(x, weight, bias, pool=3)
    assert calls[0].implementation == "library"


@needs_compiler
def test_nothing_about_it_is_of_the_default_device():
    tensors = [each.requires_grad_() for each in numbers(FUSED)]

    def run():
        y = conv2d(*tensors, activation="relu", pool=2, implementation="cpu")
        return y, *torch.autograd.grad(y.sum(), tensors)

    wanted = run()
    with torch.device("meta"):
        assert_equal(run(), wanted)
    for device in ("cpu", "meta"):  # what is remembered of the first call asks for memory too
        with torch.no_grad(), torch.device(device):
            assert torch.equal(conv2d(*tensors, activation="relu", pool=2, implementation="cpu"), wanted[0])


@needs_compiler
def test_where_the_library_is_faster():
    """Many products for an output, or no pool: the kernel is passed over, says why, and can be forced."""
    few, many = (torch.zeros(1, inputs, 8, 8) for inputs in (3, 40))

    def choice(x, **options):
        with trace() as calls:
            conv2d(x, torch.zeros(2, x.size(1), 3, 3), **options)
        return calls[0]

    assert choice(few, pool=2).implementation == "cpu"
    refused = choice(few)
    assert refused.implementation == "library"
    assert "saves no pass" in dict(refused.refused)["cpu"]
    refused = choice(many, pool=2)
    assert refused.implementation == "library"
    assert "360 products for each output" in dict(refused.refused)["cpu"]
    assert choice(many, pool=2, implementation="cpu").implementation == "cpu"


X, W = torch.zeros(2, 4, 6, 6), torch.zeros(8, 4, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X[0], W), {}, r"3 dimensions and weight 4: expected \(N, C, H, W\).* batch of one"),
        ((X, W[0]), {}, "4 dimensions and weight 3"),
        ((X, W[:, :3]), {}, "x has 4 channels, and weight takes 3 to 8 in groups=1"),
        ((X, W[:, :2]), {"groups": 3}, "expected 2 x 3 = 6 channels"),
        ((X, W[:7, :2]), {"groups": 2}, "outputs a multiple of groups"),
        ((X, W, torch.zeros(7)), {}, r"bias has shape \[7\]: expected \[8\]"),
        ((X[:0], W), {}, "no empty dimension"),
        ((X, torch.zeros(8, 4, 7, 7)), {}, "leaves nothing of a 7x7 kernel"),
        ((X, W), {"pool": 5}, "leaves nothing .* the convolution makes 4x4"),
        ((X, W), {"activation": "gelu"}, "activation is 'gelu': expected None or 'relu'"),
        ((X, W), {"pool": 0}, "pool is 0"),
        ((X, W), {"pool": 2.0}, "pool is 2.0"),
        ((X, W), {"groups": True}, "groups is True"),
        ((X, W), {"stride": 0}, "stride is 0: expected an integer or a pair"),
        ((X, W), {"dilation": (1, 2, 3)}, r"dilation is \(1, 2, 3\)"),
        ((X, W), {"padding": -1}, "padding is -1"),
        ((X, W), {"padding": "full"}, "padding is 'full': expected 'same', 'valid' or numbers"),
        ((X.long(), W.long()), {}, "dtypes are x int64, weight int64: expected one of float32"),
        ((X, W.double()), {}, "x float32, weight float64"),
        ((X, W.numpy()), {}, "weight is a ndarray: expected a torch tensor"),
        ((X, W.to("meta")), {}, "several devices"),
        ((X.numpy(), W), {}, "x is numpy.ndarray: expected a torch tensor or JAX array"),
        ((X, W), {"implementation": "cudnn"}, "no implementation 'cudnn'"),
    ],
)
def test_what_cannot_be_used_is_told(arguments, options, message):
    with pytest.raises(InvalidInputError, match=message):
        conv2d(*arguments, **options)


@needs_compiler
def test_what_is_not_supported_is_told():
    with pytest.raises(UnsupportedError, match="float64"):
        conv2d(X.double(), W.double(), implementation="cpu")
    with pytest.raises(UnsupportedError, match="runs on cuda"):
        conv2d(X, W, implementation="triton")
    with pytest.raises(UnsupportedError, match="at most 15"):
        conv2d(torch.zeros(1, 4, 20, 20), W, pool=16, implementation="cpu")
    with pytest.raises(InvalidInputError, match="no kernel 'library'"):
        torch.ops.perfkit.conv2d(X, W, None, [1, 1], [0] * 4, [1, 1], 1, None, 1, False, "library")
    x, weight, bias = (each.requires_grad_() for each in numbers(FUSED))
    (gradient,) = torch.autograd.grad(
        conv2d(x, weight, bias, implementation="cpu").square().sum(), x, create_graph=True
    )
    with pytest.raises(UnsupportedError, match="no second derivative: pass implementation='library'"):
        gradient.sum().backward()
    with pytest.raises(UnsupportedError, match="call that"):
        torch.func.grad(
            lambda x: torch.ops.perfkit.conv2d(x, W, None, [1, 1], [0] * 4, [1, 1], 1, None, 1, False, "cpu")
        )(X[None].requires_grad_())
    with torch.autograd.forward_ad.dual_level(), pytest.raises(UnsupportedError, match="forward-mode"):
        conv2d(torch.autograd.forward_ad.make_dual(X, X), W, implementation="cpu")
    y = conv2d(X.double(), W.double(), implementation="library")
    assert y.dtype == torch.float64
