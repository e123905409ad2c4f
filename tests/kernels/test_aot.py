"""Every Triton kernel compiles for each GPU that is named, and what must not be in one is found."""

import dataclasses
import json

import pytest

pytest.importorskip("triton")

import triton

pytest.importorskip("torch")

import triton.language as tl

from bench import aot
from perfkit.kernels._triton import Compilation


@triton.jit
def product(a, b, c, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """c = a b, of square matrices, in one program."""
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at), input_precision=PRECISION))


@triton.jit
def normalized(x, y, SIZE: tl.constexpr):
    """All numbers are held in registers until their sum is known."""
    i = tl.arange(0, SIZE)
    numbers = tl.load(x + i)
    tl.store(y + i, numbers / tl.sum(numbers))


@triton.jit
def long_product(x, y, SIZE: tl.constexpr):
    """y = x x^T, (64, 64), of x (64, SIZE), which a tensor core of Hopper reads from shared memory."""
    i, k = tl.arange(0, 64), tl.arange(0, SIZE)
    matrix = tl.load(x + i[:, None] * SIZE + k[None, :])
    tl.store(y + i[:, None] * 64 + i[None, :], tl.dot(matrix, tl.trans(matrix)))


@triton.jit
def doubled(x, y, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y + i, 2 * tl.load(x + i))


def planted(size, precision="tf32", **options):
    """`product`, as a Compilation that promises tensor cores."""
    return Compilation(
        f"product {size} {precision}",
        product,
        {"a": "*fp32", "b": "*fp32", "c": "*fp32"},
        {"SIZE": size, "PRECISION": precision},
        divisible=("a", "b", "c"),
        options={"num_warps": 4, **options},
        tensor_cores=True,
    )


def simple(kernel, size, **options):
    """A kernel of x and y, as a Compilation."""
    options = {"num_warps": 1, **options}
    return Compilation(
        f"{kernel.__name__} {size}", kernel, {"x": "*fp32", "y": "*fp32"}, {"SIZE": size}, options=options
    )


SPILLING = simple(normalized, 8192, maxnreg=64, waves_per_eu=8)
"""Of 8192 numbers a thread of a warp has 256 to hold, on AMD 128: in the 64 registers that the options leave it."""


def wrong(compilation, target):
    return " ".join(aot.faults(compilation, target, aot.compiled(compilation, target)))


def test_every_kernel_is_fit_for_every_target(capfd):
    """The first configuration of each; `python -m bench.aot` compiles all of them."""
    assert aot.main(["--first", "--jobs", "1"]) == 0, capfd.readouterr().out


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_what_is_fit_has_no_faults(target):
    figures = aot.compiled(planted(64), target)
    assert figures.registers > 16
    assert sum(figures.tensor_cores.values()) > 0
    assert figures.rounded > 0
    assert aot.faults(planted(64), target, figures) == []


@pytest.mark.parametrize("target", aot.TARGETS)
def test_a_planted_spill_is_found(target):
    assert "spill" in wrong(SPILLING, target)
    assert "spill" not in wrong(dataclasses.replace(SPILLING, constants={"SIZE": 1024}), target)


def test_too_much_shared_memory_is_found():
    long = simple(long_product, 1024, num_warps=4)
    assert "262144 bytes of shared memory, and a program has 232448 at most" in wrong(long, "sm_90")


def test_a_promise_of_tensor_cores_that_is_not_kept_is_found():
    promised = dataclasses.replace(simple(doubled, 64), tensor_cores=True)
    assert wrong(promised, "sm_90").startswith("no tensor-core instruction")
    assert wrong(dataclasses.replace(promised, tensor_cores=False), "sm_90") == ""


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_rounding_to_tf32_that_was_ruled_out_is_found(target):
    figures = aot.compiled(planted(64, "tf32"), target)
    told = aot.faults(planted(64, "ieee"), target, figures)
    expected = f"{figures.rounded} products round float32 to TF32, and PRECISION is 'ieee'"
    if triton.__version__.startswith("3.6."):  # it has no registers left for this on sm_100, which is another fault
        assert expected in told
    else:
        assert told == [expected]


def test_a_failed_row_fails_the_run_and_keeps_the_file(monkeypatch, capfd, tmp_path):
    bad = Compilation("bad", doubled, {"x": "*fp32"}, {"SIZE": 64, "y": 3})
    monkeypatch.setattr(aot, "kernels", type("Kernels", (), {"OPS": ("planted",)}))
    monkeypatch.setattr(aot, "listed", lambda op: (bad, SPILLING, planted(32)))
    monkeypatch.setattr(aot, "PATH", tmp_path / "aot.json")
    assert aot.main(["--jobs", "1"]) == 1
    told = capfd.readouterr().out
    assert told.count("\nFAILED sm_90") == 2
    assert "FAILED sm_90   bad: does not compile: CompilationError" in told
    assert not aot.PATH.exists()
    monkeypatch.setattr(aot, "listed", lambda op: (planted(32),))
    assert aot.main(["--jobs", "1"]) == 0
    rows = json.loads(aot.PATH.read_text())["rows"]
    assert [row["target"] for row in rows] == list(aot.TARGETS)


def test_nothing_to_compile_is_no_success(capsys):
    assert aot.main(["--match", "no kernel is called this"]) == 2


def recurrent(text):
    from perfkit.kernels.rnn import triton_compilations

    return next(found for found in triton_compilations.compilations() if text in found.name)


def test_a_program_asks_for_all_of_h_before_a_product_waits_for_any():
    """Each way to the second-level cache and back is a part of every step's time: of 512 units there are two blocks."""
    assembly, *_ = aot.assembled(recurrent("forward LSTM H=512 bfloat16 16x16x256"), "sm_90")
    after_the_wait = assembly[assembly.rindex(".acquire.") :]
    # 16 bytes for each of 128 threads: four loads a block
    assert after_the_wait[: after_the_wait.index("wgmma.mma_async")].count("ld.global.cg") == 8


def test_weights_that_are_read_in_each_step_are_asked_for_ahead():
    assembly, *_ = aot.assembled(recurrent("forward LSTM H=256 float32 16x16x32 streamed"), "sm_90")
    assert "cp.async" in assembly
