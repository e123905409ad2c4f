"""The recurrent Pallas kernels, interpreted, looked at for races, and lowered for the devices that are not here."""

import dataclasses
import functools

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
from jax import export
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh
from rnn_jax_calls import PADDED, arrays, assert_close, both_passes, call

from bench import tpu_aot
from perfkit.kernels._op import Choice, Op
from perfkit.kernels.rnn import jax_problem, pallas_gpu, pallas_kernel, pallas_tpu
from perfkit.kernels.rnn.cases import Case
from perfkit.kernels.rnn.problem import GATES, SAVED


@pytest.fixture
def interpreted(monkeypatch):
    """Calls go to the kernels of a device, interpreted."""
    real = pallas_kernel.Pallas

    def use(device):
        monkeypatch.setattr(jax_problem, "device_of", lambda x: device)
        monkeypatch.setattr(Op, "choose", lambda *_: Choice("rnn", "pallas", "for the test"))
        monkeypatch.setattr(pallas_kernel, "Pallas", lambda device: real(device, True))

    return use


HALF = Case("LSTM", 3, 5, 4, 9, batch_first=True, ragged="lengths")
CHOSEN = [
    *(case for case in PADDED if case.ragged == "lengths" and case.dtype == "float32" and case.hidden != 128),
    *(case for case in PADDED if case.mode == "RNN_RELU"),
    *(dataclasses.replace(HALF, dtype=dtype) for dtype in ("bfloat16", "float16")),
]


@pytest.mark.parametrize("device", ["tpu", "cuda"])
@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_results_and_gradients(case, device, interpreted):
    """Ragged in steps, rows and units, in both directions and several layers; every gradient."""
    if case.dtype not in pallas_kernel.DTYPES[device]:
        assert f"the arrays are {case.dtype}" in pallas_kernel.refusal(case.problem("jax", device))
        return
    assert pallas_kernel.refusal(case.problem("jax", device)) is None
    interpreted(device)
    assert_close(case, both_passes(call(case, "pallas"), *arrays(case)))


@pytest.mark.parametrize("device", ["tpu", "cuda"])
def test_vmap_folds_rows(device, interpreted):
    interpreted(device)
    case = Case("GRU", 4, 3, 5, 7, ragged="lengths")
    (x, weights, h0, c0), _ = arrays(case)
    run = call(case, "pallas")
    several = jnp.stack([x, 2 * x])
    found = jax.vmap(lambda x: run(x, weights, h0, c0)[0])(several)
    for mine, alone in zip(found, several, strict=True):
        np.testing.assert_allclose(mine, run(alone, weights, h0, c0)[0], rtol=0, atol=1e-6)


# ---- Blocks ----------------------------------------------------------------------------------------------------------


def direction(mode, steps, batch, hidden, dtype="float32"):
    """Arguments of both passes of the TPU kernel, of one direction, with lengths; the backward ones out of thin air."""
    random = np.random.default_rng(0)

    def draw(*shape, of=dtype):
        return jnp.asarray(random.uniform(-1, 1, shape), of)

    gates, saved = GATES[mode], SAVED[mode]
    lstm, gru, wide = mode == "LSTM", mode == "GRU", functools.partial(draw, of="float32")
    lengths = jnp.asarray(random.integers(1, steps + 1, (batch, 1)), jnp.int32)
    w = draw(hidden, gates * hidden) / hidden**0.5
    forward = (
        *(mode, draw(steps, batch, gates * hidden), w, wide(1, hidden) if gru else None),
        *(wide(batch, hidden), wide(batch, hidden) if lstm else None, lengths),
    )
    backward = (
        *(mode, w.T, draw(steps, batch, hidden) if gru else None, draw(steps, batch, saved * hidden)),
        *(wide(steps, batch, hidden) if lstm else None, lengths),
    )
    gradients = draw(steps, batch, hidden), wide(batch, hidden), wide(batch, hidden) if lstm else None
    return forward, backward, gradients


WATCHED = {
    "detect_races": True,
    "uninitialized_memory": "nan",
    "out_of_bounds_reads": "raise",
    "num_cores_or_threads": 2,
}


@pytest.mark.parametrize(("mode", "reverse"), [("LSTM", True), ("GRU", False), ("RNN_TANH", True)])
def test_blocks_do_not_race_and_read_nothing_unwritten(mode, reverse):
    """Two cores, three blocks of steps and two of rows, the last ones ragged, are one block's numbers."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    forward, backward, gradients = direction(mode, 5, 11, 128)
    one, several = pallas_tpu.Blocks(16, 8, 1 << 24), pallas_tpu.Blocks(8, 2, 1 << 24)
    watched = pltpu.InterpretParams(**WATCHED)
    whole = pallas_tpu.forward(*forward, reverse, True, one, True)
    back = pallas_tpu.backward(*backward, reverse, *gradients, one, True)
    for found, expected in (
        (pallas_tpu.forward(*forward, reverse, True, several, watched), whole),
        (pallas_tpu.backward(*backward, reverse, *gradients, several, watched), back),
    ):
        jax.block_until_ready(found)
        assert not interpret_pallas_call.races.races_found
        for mine, true in zip(found, expected, strict=True):
            np.testing.assert_allclose(mine, true, rtol=0, atol=1e-6)


def run_planted(**change):
    """Whether there is a race, and whether the numbers are right, with blocks over two cores."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    forward, _, _ = direction("GRU", 5, 11, 128)
    whole = pallas_tpu.forward(*forward, False, True, pallas_tpu.Blocks(16, 8, 1 << 24), True)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in change.items():
            patch.setattr(*{"parallel": (pltpu, "CompilerParams"), "rows": (pallas_tpu._Places, "rows")}[name], value)
        watched = pltpu.InterpretParams(**WATCHED)
        try:
            found = pallas_tpu.forward(*forward, False, True, pallas_tpu.Blocks(8, 2, 1 << 24), watched)
            jax.block_until_ready(found)
        except jax.errors.JaxRuntimeError as error:  # newer versions of JAX raise
            if "RACE DETECTED" not in str(error):
                raise
            return True, False
    return interpret_pallas_call.races.races_found, np.allclose(found[0], whole[0], rtol=0, atol=1e-6)


def test_planted_faults_are_seen():
    """What the test above is for: all rows' states in one place are a race; blocks of steps at once, wrong numbers."""

    def one_place(places, width):
        return pallas_tpu.pl.BlockSpec((places.given.rows, width), lambda b, t: (0, 0))

    real = pltpu.CompilerParams
    at_once = functools.partial(real, dimension_semantics=("parallel", "parallel"))
    assert run_planted() == (False, True)
    assert run_planted(rows=one_place)[0]
    assert not run_planted(parallel=lambda dimension_semantics, **options: at_once(**options))[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN_RELU"])
@pytest.mark.parametrize("hidden", [128, 512, 1024])
@pytest.mark.parametrize("batch", [1, 17, 1000])
def test_blocks_fit_where_they_are_given(batch, hidden, mode, dtype):
    vmem = 64 << 20
    found = pallas_tpu.blocks(mode, dtype, batch, 100, hidden, vmem)
    assert found.rows % pallas_tpu.sublanes(dtype) == 0
    assert 1 <= found.steps <= 100
    assert pallas_tpu.needed(mode, dtype, found.rows, found.steps, hidden) <= found.vmem_bytes < vmem
    # and as many rows as there are, where they fit
    assert found.rows >= min(batch, 256) or hidden > 128


def test_weights_that_do_not_fit_are_refused():
    case = Case("LSTM", 10, 8, 16, 4096, dtype="bfloat16")
    assert "of 4096 hidden units" in (reason := pallas_kernel.refusal(case.problem("jax", "tpu")))
    assert "MiB of VMEM" in reason
    assert "at most 128 hidden units, and there are 129" in pallas_kernel.refusal(
        Case("GRU", 10, 8, 16, 129).problem("jax", "cuda")
    )
    assert "this call is on rocm" in pallas_kernel.refusal(Case("GRU", 10, 8, 16, 16).problem("jax", "rocm"))


# ---- Lowered for devices that are not here ---------------------------------------------------------------------------


def both(mode, device):
    """Forward and backward pass of a layer, as a function of arrays."""
    kernel = pallas_kernel.Pallas(device)

    def run(x, weights, h0, c0, lengths):
        y, h, c, saved = kernel.forward(mode, x, weights, h0, c0, lengths, False, True)
        return kernel.backward(mode, weights, lengths, False, y, y, saved, y, h, c)

    return run


def shapes(mode, steps, batch, inputs, hidden, dtype):
    channels = GATES[mode] * hidden
    of = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    weights = of((channels, inputs)), of((channels, hidden)), of((channels,)), of((channels,))
    states = of((batch, hidden)), of((batch, hidden))
    return of((steps, batch, inputs)), weights, *states, jax.ShapeDtypeStruct((batch,), "int32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", GATES)
def test_it_lowers_for_tpu(mode, dtype):
    program = export.export(jax.jit(both(mode, "tpu")), platforms=["tpu"])(*shapes(mode, 9, 19, 10, 50, dtype))
    text = program.mlir_module()
    assert text.count("tpu_custom_call(") == 2  # forward and backward
    assert str(pallas_kernel.SMALLEST_VMEM * 7 // 8) in text  # what it may use, where no TPU is there to ask
    assert program.platforms == ("tpu",)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("mode", GATES)
def test_it_lowers_for_cuda(mode, dtype):
    """To Triton's language, with the compiler named: which one is the default has changed with JAX's versions."""
    triton = export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    arguments = shapes(mode, 9, 19, 10, 50, dtype)
    h100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")  # JAX 0.12 asks for one
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=h100)):
        program = export.export(jax.jit(both(mode, "cuda")), platforms=["cuda"], disabled_checks=[triton])(*arguments)
    assert program.mlir_module().count("__gpu$xla.gpu.triton") == 2


def test_tiles_are_what_a_tensor_core_takes():
    assert pallas_gpu.ROWS >= 16
    assert pallas_kernel.Pallas("cuda")._size(1) == 16
    assert [pallas_kernel.Pallas("cuda")._size(hidden) for hidden in (16, 17, 50, 128)] == [16, 32, 64, 128]
    assert [pallas_kernel.Pallas("tpu")._size(hidden) for hidden in (1, 128, 129)] == [128, 128, 256]


# ---- Compiled for TPUs, an optional job ------------------------------------------------------------------------------


def test_without_libtpu_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(tpu_aot, "find_spec", lambda name: None if name == "libtpu" else name)
    assert tpu_aot.main([]) == 2
    assert "libtpu must be installed: pip install libtpu" in capsys.readouterr().err


def test_what_is_compiled_goes_to_the_limit():
    """The last of a mode's and dtype's programs is the one that `refusal` lets through and the next one is not."""
    for target, (_, vmem) in tpu_aot.TARGETS.items():
        last = {job[:2]: job for job in tpu_aot._jobs(target)}
        assert len(last) == 2 * len(tpu_aot.MODES)
        for mode, dtype, _, steps, batch, hidden in last.values():
            fits = [
                pallas_tpu.blocks(mode, dtype, batch, steps, size, vmem * pallas_tpu.MIB)
                for size in (hidden, hidden + pallas_tpu.LANES)
            ]
            assert fits[0] is not None
            assert fits[1] is None
