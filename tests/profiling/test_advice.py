"""The rules of advice on profiles made by hand: what is wrong is found, with its number; where nothing is, nothing."""

from __future__ import annotations

import dataclasses

import pytest
import sample_profiles as samples
from steps_of_ops import MACHINE, found, kinds, op, product, profile

from perfkit._chain import chain_of
from perfkit._quantity import Quantity
from perfkit._recipe_files import names
from perfkit.profiling._profile import Ceilings
from perfkit.profiling._time_data import Module, Span
from perfkit.profiling.advice import LEAST_GAIN, findings, names_in


def test_where_nothing_is_wrong_nothing_is_found():
    assert findings(profile(product(dtype="bfloat16"))) == ()
    assert findings(profile(product(), ceilings=dataclasses.replace(MACHINE, gflops={}))) == ()
    assert findings(samples.failed()) == ()
    assert findings(samples.unavailable()) == ()


@pytest.mark.parametrize("name", ["cnn", "inference", "on_gpu", "in_jax", "faster", "interrupted", "huge", "hostile"])
def test_every_profile_can_be_advised_on(name):
    for finding in findings(getattr(samples, name)()):
        assert 0 <= finding.share <= 1
        assert finding.told
        assert finding.advice
        assert names_in(finding.recipe) <= set(names())
        if finding.recipe:
            assert finding.predicted.value is None or finding.predicted.value >= LEAST_GAIN
            assert len(chain_of(finding.recipe)) == len(names_in(finding.recipe))


def test_gaps_between_kernels_on_a_device():
    kernels = [
        dataclasses.replace(product(1.0, "bfloat16"), kind="kernel", name=f"gemm{number}") for number in range(4)
    ]
    finding = found(*kernels, kind="launch-bound", device="cuda", other_ms=6.0)
    assert finding.recipe == "compile(mode='reduce-overhead')"
    assert "60.0%" in finding.told
    assert finding.share == pytest.approx(0.6)
    assert 1.5 < finding.predicted.value < 2.5  # 1 / (0.4 + 0.6 / 5 + what a compiled call checks)


def test_small_operations_on_a_processor():
    small = [op("aten::add", 0.02, f"layer{number}", moved_bytes=400.0) for number in range(50)]
    finding = found(*small, kind="small operations", other_ms=1.0)
    assert finding.recipe == "compile"
    assert finding.share == pytest.approx(1.0)
    assert "50 small operations" in finding.told


def test_elementwise_operations_through_memory():
    moving = [op("aten::gelu", 5.0, "mlp", moved_bytes=8e7) for _ in range(2)]
    finding = found(product(10.0, "bfloat16"), *moving, kind="unfused operations")
    assert finding.where == ("mlp",)
    assert finding.predicted.value == pytest.approx(1 / (0.5 + 0.5 / 6 + 0.15 / 20), rel=1e-3)


@pytest.mark.parametrize(
    "note", ["profiled: what compile makes of the model", "profiled: what bf16+compile makes of the model"]
)
def test_what_is_compiled_is_not_to_be_compiled(note):
    assert "small operations" not in kinds(op("aten::add", 1.0, moved_bytes=4e2), other_ms=5.0, notes=(note,))


def test_pools_in_training_are_not_to_be_compiled_on_a_processor():
    moving = [op("aten::max_pool2d_with_indices", 5.0, "pool", moved_bytes=8e7)]
    assert "unfused operations" in kinds(*moving)
    assert "unfused operations" not in kinds(*moving, mode="training")


def chain(module: str = "conv1", inputs: int = 1):
    """A convolution, a ReLU and a pool, of the reference CNN at batch 64."""
    conv_shapes = f"float32[64, {inputs}, 28, 28], float32[32, {inputs}, 3, 3], float32[32]"
    image = "float32[64, 32, 26, 26]"
    return (
        op("aten::convolution", 3.0, module, flops=2.5e7, moved_bytes=5.7e6, shapes=conv_shapes),
        op("aten::relu", 2.0, "relu", moved_bytes=1.1e7, shapes=image),
        op("aten::max_pool2d_with_indices", 4.0, "pool", moved_bytes=9.7e6, shapes=image),
    )


def test_outputs_that_are_mapped_anew_cost_their_freeing_too():
    """At 512 images the outputs of convolution and ReLU are 44 MB: what giving them back takes is gone with them."""
    image = "float32[512, 32, 26, 26]"
    size = 4 * 512 * 32 * 26 * 26
    ops = (
        op(
            "aten::convolution",
            40.0,
            "conv1",
            flops=2e8,
            moved_bytes=size + 4 * (512 * 28 * 28 + 32 * 9 + 32),
            shapes="float32[512, 1, 28, 28], float32[32, 1, 3, 3], float32[32]",
        ),
        op("aten::relu", 16.0, "relu", moved_bytes=2 * size, shapes=image),
        op("aten::max_pool2d_with_indices", 27.0, "pool", moved_bytes=size + size / 4, shapes=image),
        product(9.0, "bfloat16"),
    )
    finding = found(*ops, kind="convolution, then pool", other_ms=8.0)
    # 2e8 FLOPs at half of 100 GFLOP/s take 4 ms instead of 83, a call 0.03; the product stays, 8 ms of freeing do not
    assert finding.predicted.value == pytest.approx(100 / (9 + 4.03), rel=0.01)
    small = found(*chain(), product(1.0, "bfloat16"), kind="convolution, then pool", other_ms=1.0)
    assert small.predicted.value == pytest.approx(11 / (2 + 0.53), rel=0.01)  # Python's, which stays


def test_a_convolution_that_a_pool_reads_back():
    finding = found(*chain(), product(1.0, "bfloat16"), kind="convolution, then pool")
    assert finding.recipe == "fused_kernels"
    assert finding.told.startswith("conv1 writes 6.12 MiB that pool and relu read back")
    assert finding.share == pytest.approx(0.9)
    # 2.5e7 FLOPs at half of 100 GFLOP/s take 0.5 ms instead of 9, and a call 0.03 ms
    assert finding.predicted.value == pytest.approx(10 / (1 + 0.53), rel=0.01)


def test_convolutions_of_many_channels_are_the_librarys():
    assert "convolution, then pool" not in kinds(*chain(inputs=64))


def test_a_pool_of_something_else():
    conv, _relu, pool = chain()
    other = dataclasses.replace(pool, shapes="float32[64, 128, 14, 14]")
    assert "convolution, then pool" not in kinds(conv, other)


def test_recurrent_layers_and_bfloat16_where_it_is_faster():
    layer = op("aten::mkldnn_rnn_layer", 7.0, "lstm", flops=5e8, moved_bytes=1e6, shapes="float32[128, 64, 100]")
    rest = product(3.0, "bfloat16")
    assert found(layer, rest, kind="recurrent layers").predicted.value == pytest.approx(1 / (0.3 + 0.7 / 1.5))
    finding = found(layer, rest, kind="recurrent layers in float32")
    assert finding.recipe == "half+fused_kernels"
    assert "70.0%" in finding.told
    slow = Ceilings(MACHINE.gflops | {"bfloat16": Quantity(90.0, "GFLOP/s")}, MACHINE.bandwidth_gb_s)
    assert "recurrent layers in float32" not in kinds(layer, rest, ceilings=slow)


def test_cells_are_recurrent_by_their_class():
    modules = (Module("cell", "LSTMCell", 28, 7, 0, 7, 0, 0, 0, 0),)
    finding = found(product(7.0, module="cell.dense_h"), product(3.0), kind="recurrent layers", modules=modules)
    assert finding.share == pytest.approx(0.7)


def test_a_device_without_measurements_of_the_kernels():
    layer = op("cudnn_rnn", 7.0, "lstm", kind="kernel")
    finding = found(layer, kind="recurrent layers", device="cuda")
    assert "not measured" in finding.predicted.unavailable


def test_products_in_float32():
    finding = found(product(8.0), op("aten::embedding", 2.0), kind="products in float32")
    assert finding.recipe == "bf16"
    # a quarter of 8 ms, and 3 MB to cast at 20 GB/s, 1.5 times
    assert finding.predicted.value == pytest.approx(10 / (2 + 2 + 1.5 * 3e6 / 20e9 * 1e3))
    assert "products in float32" not in kinds(product(8.0, "bfloat16"))
    assert "products in float32" not in kinds(product(8.0), notes=("profiled: what bf16 makes of the model",))


def test_float64():
    finding = found(product(1.0, "float64", "second"), product(9.0, "bfloat16"), kind="float64")
    assert finding.where == ("second",)
    assert finding.recipe == ""
    assert finding.predicted.value == pytest.approx(1 / (0.9 + 0.1 / 2))


def test_a_copy_is_told_with_its_module():
    copied = op("aten::clone", 1.0, "block.2", moved_bytes=8e6, shapes="float32[1000, 1000]")
    finding = found(copied, product(9.0, "bfloat16"), kind="a copy")
    assert finding.where == ("block.2",)
    assert "3.81 MiB" in finding.told
    assert finding.predicted.value == pytest.approx(1 / 0.9, rel=1e-3)


def test_the_copy_that_a_recurrent_layer_makes_is_its_own():
    copied = op("aten::clone", 1.0, "lstm", moved_bytes=8e6)
    layer = op("aten::mkldnn_rnn_layer", 7.0, "lstm")
    modules = (Module("lstm", "LSTM", 1, 8, 0, 8, 0, 0, 0, 0),)
    assert "a copy" not in kinds(copied, layer, modules=modules)


def test_layouts():
    kernels = [
        dataclasses.replace(product(8.0), kind="kernel"),
        op("cudnn::nchwToNhwcKernel<float>", 2.0, kind="kernel"),
    ]
    assert found(*kernels, kind="layouts", device="cuda").recipe == "channels_last"


def test_a_value_read_back():
    reading = op("aten::_local_scalar_dense", 0.01, "clip", calls=2)
    assert found(reading, product(), kind="a value read back").where == ("clip",)
    assert "a value read back" not in kinds(dataclasses.replace(reading, phase="optimizer"), product())


def test_a_value_that_an_if_reads_is_read_once():
    """`if tensor:` is two operators, one within the other."""
    reading = [op("aten::is_nonzero", 0.01), op("aten::_local_scalar_dense", 0.01)]
    assert "a value off the device 1 time in" in found(*reading, product(), kind="a value read back").told


def test_a_wait_in_the_middle_of_a_step_but_not_at_its_end():
    spans = (
        Span("cudaStreamSynchronize", "host", "wait", 1.0, 2.0),
        Span("aten::addmm", "host", "op", 4.0, 1.0),
        Span("cudaDeviceSynchronize", "host", "wait", 5.0, 5.0),
    )
    finding = found(product(10.0), kind="a value read back", spans=spans, device="cuda")
    assert finding.share == pytest.approx(0.2)
    assert "a value read back" not in kinds(product(10.0), spans=spans[1:], device="cuda")


def test_compilations_while_steps_run():
    slow = dataclasses.replace(samples.latency(10.0), samples_ms=(10.0,) * 8 + (110.0,) * 2, median_ms=10.0)
    base = profile(product(10.0, "bfloat16"), recompiles=2)
    (finding,) = findings(dataclasses.replace(base, time=dataclasses.replace(base.time, step=slow)))
    assert (finding.kind, finding.told) == ("recompiling", "2 compilations in 10 steps that should need none")
    assert finding.predicted.value == pytest.approx(3.0, rel=0.01)  # mean 30, median 10


def test_an_optimizer_in_pieces():
    pieces = [op("aten::mul_", 0.1, phase="optimizer", calls=4) for _ in range(10)]
    finding = found(product(9.0, "bfloat16"), *pieces, kind="an optimizer in pieces", mode="training")
    assert "40 small operations: 10.0%" in finding.told
    fused = [*pieces, op("aten::_fused_adam_", 1.0, phase="optimizer")]
    assert "an optimizer in pieces" not in kinds(product(9.0, "bfloat16"), *fused, mode="training")


def test_the_costliest_is_first():
    advised = findings(profile(product(2.0), *chain(), op("aten::clone", 1.0, "x", moved_bytes=1e7)))
    gains = [finding.predicted.value for finding in advised]
    assert gains == sorted(gains, reverse=True)
    assert len(gains) >= 3


def test_a_disturbed_run_is_told():
    base = profile(*chain())
    noisy = dataclasses.replace(base, time=dataclasses.replace(base.time, overhead=Quantity(7.0, "ratio")))
    assert "uncertain: the profiled steps took 7.0 times longer" in findings(noisy)[0].predicted.method


def test_names_in_a_chain():
    assert names_in("compile(mode='a+b')+half") == {"compile", "half"}
    assert names_in("") == set()
