"""linear_int8 in torch: exact sums, what compilers and transformations make of it, and what it refuses.

After the exact sum y has four float32 roundings (of the sum, two products, the bias), each of a relative 2^-24: the
bound is 4 of them of |sum s_x s_w| + |bias|, and one rounding of out_dtype.
"""

import os
import subprocess
import sys

import pytest

pytest.importorskip("torch")

import torch

from perfkit import InvalidInputError, UnsupportedError
from perfkit.kernels import trace
from perfkit.kernels.linear_int8 import cpu_kernel, linear_int8, reference
from perfkit.kernels.linear_int8.cases import CASES
from perfkit.kernels.linear_int8.problem import MOST_INPUTS, Problem


def make(case):
    """The keyword arguments of a call."""
    torch.manual_seed(0)
    integers = [torch.randint(-128, 128, shape, dtype=torch.int8) for shape in
                ((case.rows, case.inputs), (case.outputs, case.inputs))]  # fmt: skip
    x, weight = integers
    scale = None
    if case.x == "int8":
        scale = torch.rand(case.rows) if case.scale == "row" else torch.tensor(0.07)
    else:
        x = torch.randn(case.rows, case.inputs).to(getattr(torch, case.x))
    bias = torch.randn(case.outputs) if case.bias else None
    return {"x": x, "weight": weight, "weight_scale": torch.rand(case.outputs), "bias": bias, "x_scale": scale,
            "activation": case.activation}  # fmt: skip


def exact(x, weight, weight_scale, bias, x_scale, activation):
    """y and its bound, in float64, of the integers that the definition makes of a float x."""
    if x_scale is None:
        x, x_scale = reference.quantize(torch, x.float())
    y = (x.double() @ weight.double().t()) * x_scale.double().reshape(-1, 1) * weight_scale.double()
    size = y.abs()
    if bias is not None:
        y, size = y + bias, size + bias.abs()
    return y.relu() if activation else y, 4 * 2.0**-24 * size + 1e-37


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_is_the_exact_product_scaled(case, implementation):
    given = make(case)
    y, (expected, bound) = linear_int8(**given, implementation=implementation), exact(**given)
    assert y.dtype == torch.float32
    assert (y - expected).abs().le(bound).all()


@pytest.mark.parametrize("inputs", [1, 64, 1024, 1025, 9000])
def test_sums_are_exact_up_to_the_largest_numbers(inputs, monkeypatch):
    q = torch.full((3, inputs), -128, dtype=torch.int8)
    q[1] = 127
    weight = torch.full((5, inputs), -128, dtype=torch.int8)
    weight[2:] = torch.randint(-128, 128, (3, inputs), dtype=torch.int8)
    expected = (q.long() @ weight.long().t()).int()
    assert torch.equal(cpu_kernel.sums(q, weight), expected)
    monkeypatch.setattr(cpu_kernel, "int_mm_is_exact", lambda: False)
    assert torch.equal(cpu_kernel.sums(q, weight), expected)


@pytest.mark.parametrize("outputs", [1, 5])
@pytest.mark.parametrize("inputs", [1, 2, 16])
def test_a_dimension_of_size_1_may_have_any_stride(inputs, outputs):
    q = torch.randint(-127, 128, (1, inputs), dtype=torch.int8).as_strided((1, inputs), (0, 1))
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    weight = weight if outputs > 1 else weight.as_strided((1, inputs), (0, 1))
    assert torch.equal(cpu_kernel.sums(q, weight), (q.long() @ weight.long().t()).int())


SATURATING = """
import torch
from perfkit.kernels.linear_int8 import cpu_kernel
q, weight = (torch.full(shape, 127, dtype=torch.int8) for shape in ((4, 64), (8, 64)))
print(cpu_kernel.int_mm_is_exact(), bool((cpu_kernel.sums(q, weight) == 127 * 127 * 64).all()),
      bool((torch._int_mm(q, weight.t()) == 127 * 127 * 64).all()))
"""


def test_where_products_saturate_they_are_not_used():
    """oneDNN told to do without VNNI, as on a CPU that has none."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run(
        [sys.executable, "-c", SATURATING], env=environment, capture_output=True, text=True, check=True
    )
    trusted, exact_sums, int_mm = done.stdout.split()
    assert exact_sums == "True"
    assert trusted == int_mm  # "False" on x86, whose AVX2 saturates


def test_a_float_input_is_rounded_to_nearest_row_by_row():
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5], [-254.0, 3.0, 1.0, 5.0]])
    q, scale = reference.quantize(torch, x)
    assert q.tolist() == [[127, 0, 2, -2], [-127, 2, 0, 2]]
    assert scale.tolist() == [[1.0], [2.0]]


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_what_is_not_finite_shows_in_its_row_alone(implementation, activation):
    x = torch.randn(5, 8)
    x[1, 3], x[2, 0], x[3] = float("nan"), float("-inf"), 0
    weight, scale = torch.randint(-127, 128, (4, 8), dtype=torch.int8), torch.rand(4)
    y = linear_int8(x, weight, scale, torch.ones(4), activation=activation, implementation=implementation)
    assert y[1:3].isnan().all()
    assert y[3].eq(1).all()
    assert y[[0, 4]].isfinite().all()


@pytest.mark.parametrize("shape", [(2, 3, 16), (16,), (0, 16), (2, 0, 16)])
def test_any_leading_dimensions(shape):
    x, weight, scale = torch.randn(shape), torch.randint(-127, 128, (5, 16), dtype=torch.int8), torch.rand(5)
    y = linear_int8(x, weight, scale)
    assert y.shape == (*shape[:-1], 5)
    torch.testing.assert_close(y.reshape(-1, 5), linear_int8(x.reshape(-1, 16), weight, scale), rtol=0, atol=0)


def test_scales_come_in_several_forms_and_memory_in_any_order():
    x = torch.randint(-127, 128, (16, 6), dtype=torch.int8).t()
    weight, scale = torch.randint(-127, 128, (16, 5), dtype=torch.int8).t(), torch.rand(10)[::2]
    expected = linear_int8(x.contiguous(), weight.contiguous(), scale.contiguous(), x_scale=0.5)
    for x_scale in (0.5, torch.tensor(0.5), torch.full((1,), 0.5), torch.full((6,), 0.5), torch.full((6, 1), 0.5)):
        assert torch.equal(linear_int8(x, weight, scale, x_scale=x_scale), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_out_dtype_is_rounded_to_at_the_end(dtype):
    given = make(CASES[2])
    assert torch.equal(linear_int8(**given, out_dtype=dtype), linear_int8(**given).to(dtype))


def layer(x, weight, scale, bias):
    return 2 * linear_int8(x, weight, scale, bias, activation="relu")


def arguments():
    given = make(CASES[2])
    return given["x"], given["weight"], given["weight_scale"], given["bias"]


def test_compile_keeps_it_whole_for_any_batch():
    x, *rest = arguments()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (x, torch.cat([x, x])):
        assert torch.equal(compiled(batch, *rest), layer(batch, *rest))


def test_export_keeps_it():
    class Layer(torch.nn.Module):
        def forward(self, x, weight, scale, bias):
            return layer(x, weight, scale, bias)

    given = arguments()
    rows = ({0: torch.export.Dim("rows")}, None, None, None)
    program = torch.export.export(Layer(), given, dynamic_shapes=rows)
    assert "perfkit.linear_int8" in str(program.graph)
    assert torch.equal(
        program.module()(torch.cat([given[0]] * 3), *given[1:]), layer(torch.cat([given[0]] * 3), *given[1:])
    )


@pytest.mark.parametrize("case", [CASES[2], CASES[3]], ids=lambda case: case.name)
def test_opcheck(case):
    given = make(case)
    activation = given.pop("activation")
    torch.library.opcheck(torch.ops.perfkit.linear_int8.default, (*given.values(), activation, torch.float32, ""))


def test_vmap_over_rows_scales_and_weights():
    x = torch.randint(-127, 128, (3, 4, 16), dtype=torch.int8)
    weight, scale = torch.randint(-127, 128, (3, 5, 16), dtype=torch.int8), torch.rand(3, 5)

    def one(x, weight, scale, x_scale):
        return linear_int8(x, weight, scale, x_scale=x_scale)

    for x_scale, of_scale in ((torch.rand(3, 4), 0), (torch.rand(4), None), (torch.rand(3), 0), (torch.rand(()), None)):
        for of_weight in (0, None):
            w, s = (weight, scale) if of_weight == 0 else (weight[0], scale[0])
            y = torch.vmap(one, (0, of_weight, of_weight, of_scale))(x, w, s, x_scale)
            for i in range(3):
                parts = (w[i], s[i]) if of_weight == 0 else (w, s)
                expected = one(x[i], *parts, x_scale[i] if of_scale == 0 else x_scale)
                torch.testing.assert_close(y[i], expected, rtol=0, atol=0)


def test_autocast_leaves_it_alone():
    given = make(CASES[2])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_int8(**given), linear_int8(**given))
        assert linear_int8(**given).dtype == torch.float32


def test_a_gradient_is_refused():
    x, *rest = arguments()
    with pytest.raises(UnsupportedError, match="inference"):
        layer(x.requires_grad_(), *rest).sum().backward()


def test_it_tells_who_computes():
    with trace() as calls:
        linear_int8(*arguments())
    assert [call.implementation for call in calls] == ["cpu"]
    with pytest.raises(UnsupportedError, match="runs on cuda"):
        linear_int8(*arguments(), implementation="library")
    with pytest.raises(InvalidInputError, match="did you mean 'triton'"):
        linear_int8(*arguments(), implementation="trition")


BAD = {
    "(..., K) and (N, K)": {"x": torch.zeros(2, 9)},
    "expected int8 or float32": {"x": torch.zeros(2, 8).double()},
    "and int8": {"weight": torch.zeros(4, 8)},
    "one per output": {"weight_scale": torch.ones(3)},
    "weight_scale is float64: expected float32": {"weight_scale": torch.ones(4).double()},
    "bias has shape [5]": {"bias": torch.ones(5)},
    "bias is int64": {"bias": torch.ones(4).long()},
    "takes no x_scale": {"x_scale": 0.5},
    "needs x_scale": {"x": torch.zeros(2, 8, dtype=torch.int8)},
    "expected one number or [2]": {"x": torch.zeros(2, 8, dtype=torch.int8), "x_scale": torch.ones(3)},
    "expected None or 'relu'": {"activation": "tanh"},
    "expected a torch dtype": {"out_dtype": "float32"},
    "out_dtype is int32": {"out_dtype": torch.int32},
    "weight is a list": {"weight": [[1]]},
    "expected one": {"bias": torch.ones(4, device="meta")},
    "expected a torch tensor or a JAX array": {"x": [1.0]},
    "could overflow int32": {
        "x": torch.zeros(1, MOST_INPUTS + 1),
        "weight": torch.zeros(4, 1, dtype=torch.int8).expand(4, MOST_INPUTS + 1),
    },
}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_fit_is_an_error(message):
    good = {"x": torch.zeros(2, 8), "weight": torch.zeros(4, 8, dtype=torch.int8), "weight_scale": torch.ones(4)}
    linear_int8(**good)
    with pytest.raises(InvalidInputError) as raised:
        linear_int8(**(good | BAD[message]))
    assert message in str(raised.value)


def test_the_library_on_a_gpu_takes_what_int_mm_takes():
    from perfkit.kernels.linear_int8 import OP

    library = OP.named(Problem("torch", "cuda", "int8", 64, 64, 64), "library")
    assert library.why_not(Problem("torch", "cuda", "int8", 64, 64, 64)) is None
    for rows, inputs, outputs in ((16, 64, 64), (64, 60, 64), (64, 64, 60)):
        assert "more than 16 rows" in library.why_not(Problem("torch", "cuda", "int8", rows, inputs, outputs))
