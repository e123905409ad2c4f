"""Where a JAX step's time goes: every part has a place, places add up, and planted problems are found."""

import math

import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen
from profile_jax_models import compiled, loaded, work_of

from perfkit._quantity import Latency, Quantity
from perfkit.profiling import flops, jax_memory, jax_ops, jax_time
from perfkit.profiling._basics import Basics
from perfkit.profiling._time_data import PHASES


def time_of(work):
    """A few steps only: nothing here is about how long they take."""
    missing = Quantity.missing("ms", "not measured")
    basics = Basics(Latency((1000.0,), 1000.0, missing, missing, missing), missing, missing, 0)
    return jax_time.collected(work, work.backend.finish(work), basics)


def check(time):
    """What must hold of any step."""
    whole = sum(time.phases_ms.values())
    assert set(time.phases_ms) <= set(PHASES)
    attributed = sum(op.self_ms for op in time.ops)
    assert attributed == pytest.approx(time.attributed.value * whole, rel=1e-6)
    assert attributed <= whole * (1 + 1e-9)
    assert 0 < time.busy.value <= 1
    assert 0 <= time.waiting.value <= 1
    assert sum(op.flops for op in time.ops) == pytest.approx(time.flops.value)
    model = next(module for module in time.modules if not module.path)
    assert model.flops == pytest.approx(time.flops.value)
    assert model.forward_ms == pytest.approx(time.phases_ms["forward"])
    assert math.fsum(module.self_ms for module in time.modules) == pytest.approx(model.forward_ms + model.backward_ms)
    length = max(span.start_ms + span.duration_ms for span in time.spans)
    assert all(-1e-6 <= span.start_ms <= length for span in time.spans)


def by_path(time):
    return {module.path: module for module in time.modules}


def test_training_of_the_reference_cnn():
    model, inputs = loaded("cnn")
    time = time_of(work_of(model, inputs, "training"))
    check(time)
    assert {"forward", "backward", "optimizer"} <= set(time.phases_ms)
    modules = by_path(time)
    assert {"", "conv1", "fc1", "fc2"} == set(modules)
    assert modules[""].kind == "CNN"
    assert modules["fc1"].parameters == 5408 * 128 + 128
    assert modules["fc1"].flops == 3 * flops.linear(4, 5408, 128)
    assert modules["conv1"].flops == 2 * flops.convolution(4, 1, 32, (3, 3), (26, 26))  # images need no gradient
    assert modules["fc1"].forward_ms > 0
    assert modules["fc1"].backward_ms > 0
    assert modules[""].saved_bytes >= 4 * 26 * 26 * 32 * 4  # what the maximum was taken of


def test_layers_within_one_fusion_have_their_own_times():
    model, inputs = loaded("cnn")
    time = time_of(compiled(work_of(model, inputs)))
    check(time)
    modules = by_path(time)
    assert all(modules[path].self_ms > 0 for path in ("conv1", "fc1", "fc2"))


def test_a_recurrent_layer_is_called_once_and_its_cell_at_every_step():
    model, (x,) = loaded("lstm")
    time = time_of(compiled(work_of(model, (x,))))
    check(time)
    modules = by_path(time)
    assert modules["lstm"].calls == 1
    assert modules["lstm.cell.dense_h"].calls == x.shape[0]
    products = [op for op in time.ops if op.module == "lstm.cell.dense_h" and op.flops]
    assert sum(op.calls for op in products) == x.shape[0]
    assert modules["lstm"].forward_ms > modules["lstm.cell"].forward_ms > modules["lstm.cell.dense_h"].forward_ms


def test_operation_by_operation_the_host_is_seen():
    model, inputs = loaded("cnn")
    time = time_of(work_of(model, inputs))
    check(time)
    dispatched = [op for op in time.ops if op.name == "dispatch"]
    assert {op.module for op in dispatched} == {"", "conv1", "fc1", "fc2"}
    (product,) = [op for op in time.ops if op.module == "fc2" and op.name == "dot_general"]
    assert product.flops == flops.linear(4, 128, 10)
    assert product.shapes == "float32[4, 128], float32[128, 10]"
    assert {span.module for span in time.spans if span.kind == "module"} == {"", "conv1", "fc1", "fc2"}


def test_linen_modules_and_scopes_of_a_function():
    class Dense(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.relu(linen.Dense(8)(x))
            return linen.Dense(3)(x)

    x = jnp.ones((4, 6))
    model = Dense()
    time = time_of(work_of(model, (x,), "training", params=model.init(jax.random.key(0), x), optimizer=optax.sgd(0.1)))
    check(time)
    modules = by_path(time)
    assert modules["Dense_0"].kind == "Dense"
    assert modules["Dense_0"].parameters == 6 * 8 + 8
    assert modules["Dense_1"].flops == 3 * flops.linear(4, 8, 3)

    def function(params, x):
        with jax.named_scope("encoder"):
            x = jnp.tanh(x @ params["w"])
        return x @ params["w"].T

    time = time_of(work_of(function, (x,), "training", params={"w": jnp.ones((6, 6))}))
    check(time)
    assert by_path(time)["encoder"].flops == 2 * flops.linear(4, 6, 6)  # x is given: no gradient of it


def test_compiling_at_every_step_is_found():
    def forgetful(x):
        return jax.jit(lambda x: jnp.sin(x) @ x)(x)

    time = time_of(work_of(forgetful, (jnp.ones((8, 8)),)))
    check(time)
    (compiling,) = [op for op in time.ops if op.name == "compile"]
    assert compiling.calls >= 1


def test_a_host_callback_is_found():
    def asking(x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(lambda x: np.asarray(x) * 2, shape, x @ x)

    time = time_of(compiled(work_of(asking, (jnp.ones((8, 8)),))))
    check(time)
    assert any("pure_callback" in op.name for op in time.ops)


def test_float64_is_found():
    with jax.enable_x64(True):
        w = jnp.ones((8, 8), jnp.float64)
        time = time_of(compiled(work_of(lambda x: x @ w, (jnp.ones((8, 8), jnp.float32),))))
    assert any("float64" in op.shapes for op in time.ops)


def test_another_profiler_that_runs_is_a_reason(tmp_path):
    with jax.profiler.trace(tmp_path):
        work = work_of(lambda x: x @ x, (jnp.ones((8, 8)),), "inference")
        time, memory = time_of(work), jax_memory.collected(compiled(work), work.backend.finish(work))
    assert "stop the one that runs" in time.busy.unavailable
    assert memory.peak.value >= 2 * 8 * 8 * 4


def test_products_of_no_known_place_have_what_is_left():
    def key(module):
        return "dot_general", "op", module, "forward", ""

    weights = {key("fc"): 5.0, key(""): 1.0, key("scope"): 3.0, ("add", "op", "", "forward", ""): 0.0}
    found = jax_ops._shared({("fc", "forward"): 8.0, ("conv", "forward"): 100.0}, weights)
    assert list(found.values()) == [8.0, 25.0, 75.0, 0.0]


def test_the_model_stays_as_it_was():
    model, inputs = loaded("lstm")
    kinds = [type(node) for _, node in _nodes(model)]
    weights = [np.asarray(leaf) for leaf in jax.tree.leaves(_state(model))]
    work = work_of(model, inputs, "training")
    time_of(work)
    assert [type(node) for _, node in _nodes(model)] == kinds
    for before, after in zip(weights, jax.tree.leaves(_state(model)), strict=True):
        np.testing.assert_array_equal(before, after)


def _nodes(model):
    from flax import nnx

    return list(nnx.iter_modules(model))


def _state(model):
    from flax import nnx

    return nnx.state(model)
