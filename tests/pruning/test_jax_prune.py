"""Pruned JAX models compute what the original computes with the pruned units at zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")
from flax import nnx
from jax_compression_models import MODELS, flat, made, outputs, prune, rows

from perfkit import reference


def with_zero_units(model, places):
    """A copy in which the given indices of the given dimensions are zero: {path: [(dim, indices)]}."""
    copy = nnx.clone(model)
    for path, cuts in places.items():
        node = copy
        for key in path.split("."):
            node = node[int(key)] if key.isdigit() else getattr(node, key)
        value = np.array(node[...])
        for dim, indices in cuts:
            np.moveaxis(value, dim, 0)[indices] = 0
        node[...] = jnp.asarray(value)
    return copy


def close(one, other):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)  # float32 sums in another order


def lowest(scores, count):
    return np.sort(np.argsort(scores)[:count])


@pytest.mark.parametrize("name", MODELS)
def test_shapes_outputs_and_the_original(name):
    model, x = made(name)
    before, shape = flat(model), outputs(model, x).shape
    result = prune(model, x)
    assert type(result.model) is type(model)
    assert outputs(result.model, x).shape == shape
    assert result.parameters[1] < 0.7 * result.parameters[0]
    assert not result.effect.simulated
    for path, array in flat(model).items():
        np.testing.assert_array_equal(array, before[path])


def test_conv_norm_pool_flatten_linear_equal_the_masked_original():
    model, x = made("conv")
    weights = flat(model)
    result = prune(model, x)
    assert result.effect.notes == ("conv: 12 → 6", "fc: 16 → 8")
    gone = lowest((weights["conv.kernel"] ** 2).sum((0, 1, 2)), 6)
    rows = np.add.outer(np.arange(16) * 12, gone).reshape(-1)  # the flattened positions of those channels
    features = lowest((weights["fc.kernel"] ** 2).sum(0), 8)
    masked = with_zero_units(
        model,
        {"conv.kernel": [(3, gone)], "conv.bias": [(0, gone)], "norm.scale": [(0, gone)], "norm.bias": [(0, gone)],
         "fc.kernel": [(0, rows), (1, features)], "fc.bias": [(0, features)], "out.kernel": [(0, features)]},
    )  # fmt: skip
    close(outputs(result.model, x), outputs(masked, x))
    assert not np.allclose(outputs(masked, x), outputs(model, x), atol=1e-2), "the units that went matter"
    assert result.model.conv.out_features == result.model.norm.num_features == 6
    assert result.model.fc.in_features == 6 * 16


@pytest.mark.parametrize("name", ["fused_lstm", "lstm", "gru", "simple"])
def test_hidden_units_equal_the_masked_original(name):
    model, x = made(name)
    weights = flat(model)
    cell = "rnn.cell."
    gates = {"fused_lstm": 4, "lstm": 4, "gru": 3, "simple": 1}[name]
    kernels = [path for path in weights if path.startswith(cell) and path.endswith("kernel")]
    fused = name != "lstm"
    squares = sum((weights[path] ** 2).sum(0).reshape(gates if fused else 1, 10).sum(0) for path in kernels)
    gone = lowest(squares, 5)
    columns = np.add.outer(np.arange(gates if fused else 1) * 10, gone).reshape(-1)
    places = {"fc.kernel": [(0, gone)]}
    for path in weights:
        if path.startswith(cell):
            places[path] = [(weights[path].ndim - 1, columns)]
            if path.endswith("kernel") and weights[path].shape[0] == 10:
                places[path].append((0, gone))
    result = prune(model, x)
    assert result.effect.notes == ("rnn.cell: 10 → 5",)
    assert result.model.rnn.cell.hidden_features == 5
    close(outputs(result.model, x), outputs(with_zero_units(model, places), x))


def test_bidirectional_gru_equals_the_masked_original():
    model, x = made("bidirectional")
    weights = flat(model)
    places, joined = {}, []
    for at, side in enumerate(("forward", "backward")):
        cell = f"both.{side}_rnn.cell."
        squares = sum(
            (weights[cell + k] ** 2).sum(0).reshape(3, 8).sum(0) for k in ("dense_i.kernel", "dense_h.kernel")
        )
        gone = lowest(squares, 4)
        columns = np.add.outer(np.arange(3) * 8, gone).reshape(-1)
        joined.append(gone + 8 * at)
        places |= {
            cell + "dense_i.kernel": [(1, columns)],
            cell + "dense_i.bias": [(0, columns)],
            cell + "dense_h.kernel": [(0, gone), (1, columns)],
        }
    joined = np.concatenate(joined)
    places |= {"norm.scale": [(0, joined)], "norm.bias": [(0, joined)], "rnn.cell.dense_i.kernel": [(0, joined)]}
    result = prune(model, x, exclude=("rnn.cell.*",))
    assert set(result.effect.notes) == {"both.forward_rnn.cell: 8 → 4", "both.backward_rnn.cell: 8 → 4"}
    assert {item.name for item in result.effect.skipped} == {"rnn.cell.dense_i", "rnn.cell.dense_h", "fc"}
    close(outputs(result.model, x), outputs(with_zero_units(model, places), x))


def test_residual_depthwise_and_concatenation():
    model, x = made("residual")
    result = prune(model, x)
    assert set(result.effect.notes) == {
        "first: 12 → 6",
        "left: 4 → 2",
        "right: 6 → 3",
        "depthwise + second + stem: 8 → 4",
    }
    assert result.model.depthwise.feature_group_count == 4
    weights = flat(model)
    channels = sum((weights[f"{k}.kernel"] ** 2).sum((0, 1, 2)) for k in ("stem", "second", "depthwise"))
    shared, inner = lowest(channels, 4), lowest((weights["first.kernel"] ** 2).sum((0, 1, 2)), 6)
    left, right = (lowest((weights[f"{k}.kernel"] ** 2).sum((0, 1, 2)), n) for k, n in (("left", 2), ("right", 3)))
    outer = [(3, shared)]
    masked = with_zero_units(
        model,
        {"stem.kernel": outer, "second.kernel": [(2, inner), *outer], "depthwise.kernel": outer,
         "stem.bias": [(0, shared)], "second.bias": [(0, shared)], "depthwise.bias": [(0, shared)],
         "norm.scale": [(0, shared)], "norm.bias": [(0, shared)],
         "first.kernel": [(2, shared), (3, inner)], "first.bias": [(0, inner)],
         "left.kernel": [(2, shared), (3, left)], "left.bias": [(0, left)],
         "right.kernel": [(2, shared), (3, right)], "right.bias": [(0, right)],
         "fc.kernel": [(0, np.concatenate([left, 4 + right]))]},
    )  # fmt: skip
    close(outputs(result.model, x), outputs(masked, x))


@pytest.mark.parametrize(("name", "notes"), [
    ("cnn", ("conv1: 32 → 16", "fc1: 128 → 64")),
    ("cnn2", ("conv1: 32 → 16", "conv2: 64 → 32", "fc1: 128 → 64")),
    ("lstm", ("lstm.cell: 50 → 24",)),
    ("rnn", ("rnn.cell: 50 → 24",)),
])  # fmt: skip
def test_reference_models(name, notes):
    model, inputs = reference.load(name, framework="jax")
    result = prune(model, inputs, round_to=8)
    assert result.effect.notes == notes
    assert result.effect.skipped[0].reason == "the model's outputs have its size"
    assert result.parameters[0] > 2.3 * result.parameters[1]


def test_text_model_keeps_its_embedding():
    model, inputs = reference.load("text_lstm", framework="jax")
    result = prune(model, inputs, round_to=8)
    assert set(result.effect.notes) == {"lstm1.cell: 128 → 64", "lstm2.cell: 128 → 64"}
    assert result.model.embedding.embedding.shape == model.embedding.embedding.shape


def test_attention_loses_whole_heads():
    """A head's scores are scaled by its size, so heads go whole; what norms and residuals pass through stays."""
    model, x = made("encoder")
    weights = flat(model)
    kernels = {name: weights[f"attention.{name}.kernel"] for name in ("query", "key", "value")}
    heads = lowest(sum((kernel**2).sum((0, 2)) for kernel in kernels.values()), 2)
    features = lowest((weights["up.kernel"] ** 2).sum(0), 6)
    masked = with_zero_units(
        model,
        {**{f"attention.{name}.kernel": [(1, heads)] for name in kernels},
         **{f"attention.{name}.bias": [(0, heads)] for name in kernels},
         "attention.out.kernel": [(0, heads)],
         "up.kernel": [(1, features)], "up.bias": [(0, features)], "down.kernel": [(0, features)]},
    )  # fmt: skip
    result = prune(model, x)
    assert result.effect.notes == ("attention: 4 → 2", "up: 12 → 6")
    close(outputs(result.model, x), outputs(masked, x))
    assert result.model.attention.num_heads == 2
    reasons = {item.name: item.reason for item in result.effect.skipped}
    assert "does not run with fewer units" in reasons["attention.value"]
    assert {"down", "out", "attention.out"} <= set(reasons)


def test_units_at_zero_go_first():
    """Before those that are merely inactive on these inputs, and come first in the order."""
    model, x = made("conv")
    zero = np.arange(6, 12)
    model = with_zero_units(
        model,
        {"conv.kernel": [(3, zero)], "conv.bias": [(0, zero)], "norm.scale": [(0, zero)], "norm.bias": [(0, zero)],
         "fc.kernel": [(0, np.add.outer(np.arange(16) * 12, zero).reshape(-1))]},
    )  # fmt: skip
    model.norm.bias[...] = model.norm.bias[...].at[:6].set(-100.0)
    result = prune(model, x, include="conv", criterion="activation")
    np.testing.assert_array_equal(result.model.norm.bias[...], [-100.0] * 6)
    close(outputs(result.model, 100 * x), outputs(model, 100 * x))


@pytest.mark.parametrize(
    ("round_to", "amount", "left"), [(1, 0.25, 9), (4, 0.5, 8), (8, 0.5, 6), (5, 0.6, 5), (1, 0.99, 1)]
)
def test_what_stays_is_the_nearest_multiple(round_to, amount, left):
    model, x = made("conv")
    result = prune(model, x, round_to=round_to, amount=amount, include="conv")
    assert result.model.conv.out_features == left


def test_a_function_of_parameters():
    def mlp(params, x):
        hidden = jnp.tanh(x @ params["in"]["w"].T + params["in"]["b"])  # as torch lays weights out
        return hidden @ params["out"]["w"].T

    params = {"in": {"w": rows(8, 6), "b": rows(8)}, "out": {"w": rows(3, 8)}}
    x = rows(4, 6)
    result = prune(mlp, x, params=params)
    gone = lowest((np.asarray(params["in"]["w"]) ** 2).sum(1), 4)
    masked = {"in": {"w": params["in"]["w"].at[gone].set(0), "b": params["in"]["b"].at[gone].set(0)},
              "out": {"w": params["out"]["w"].at[:, gone].set(0)}}  # fmt: skip
    assert result.effect.notes == ("in: 8 → 4",)
    close(mlp(result.after.model.params, x), mlp(masked, x))


@pytest.mark.parametrize(
    "moved",
    [
        lambda hidden: jnp.stack([hidden, 2 * hidden], 1),
        lambda hidden: jnp.unstack(hidden.reshape(2, 2, -1), axis=1)[0],
        lambda hidden: jnp.tile(hidden, (2, 1)),
        lambda hidden: jnp.tile(hidden[:, None], (1, 3, 1)),
    ],
)
def test_units_that_are_stacked_or_repeated(moved):
    def net(params, x):
        return moved(jnp.tanh(x @ params["in"])) @ params["out"]

    params, x = {"in": rows(6, 8), "out": rows(8, 3)}, rows(4, 6)
    result = prune(net, x, params=params)
    assert result.effect.notes == ("in: 8 → 4",)
    gone = lowest((np.asarray(params["in"]) ** 2).sum(0), 4)
    close(net(result.after.model.params, x), net(params | {"in": params["in"].at[:, gone].set(0)}, x))


def test_units_that_are_repeated_side_by_side():
    def net(params, x):
        return jnp.tile(jnp.tanh(x @ params["in"]), (1, 2)) @ params["out"]

    params, x = {"in": rows(6, 8), "out": rows(16, 3)}, rows(4, 6)
    result = prune(net, x, params=params)
    assert result.effect.notes == ("in: 8 → 4",)
    assert result.after.model.params["out"].shape == (8, 3)
    gone = lowest((np.asarray(params["in"]) ** 2).sum(0), 4)
    close(net(result.after.model.params, x), net(params | {"in": params["in"].at[:, gone].set(0)}, x))


def test_a_parameter_that_is_repeated_over_the_batch():
    """As position embeddings are: JAX repeats what has size 1 without saying so."""

    def net(params, x):
        return jnp.tanh(x @ params["in"] + params["position"]) @ params["out"] + params["single"]

    params = {"in": rows(6, 8), "position": rows(1, 8) / 9, "out": rows(8, 3), "single": rows(1, 1)}
    result = prune(net, rows(4, 6), params=params)
    assert result.effect.notes == ("in: 8 → 4",)
    assert result.after.model.params["position"].shape == (1, 4)


def test_units_that_are_taken_apart_stay():
    def net(params, x):
        return jnp.stack(jnp.unstack(jnp.tanh(x @ params["in"]), axis=1)[:8], 1) @ params["out"]

    result = prune(net, rows(4, 6), params={"in": rows(6, 8), "out": rows(8, 3)})
    assert result.effect.status == "NO_EFFECT"
    assert "looked up" in result.effect.skipped[0].reason


def test_parameters_that_are_no_weights():
    """A random key, and what a later version will hold."""

    def mlp(params, x):
        return jnp.tanh(x @ params["in"]) @ params["out"] + 0 * jax.random.normal(params["key"])

    params = {"in": rows(6, 8), "out": rows(8, 3), "key": jax.random.key(0), "more": jnp.zeros((0, 3))}
    assert prune(mlp, rows(4, 6), params=params).effect.notes == ("in: 8 → 4",)


def test_complex_units_are_ranked_by_their_size():
    """By their real parts alone others would go: those are largest where the whole is smallest."""

    def net(params, x):
        return jnp.tanh(abs(x @ params["in"])) @ params["out"]

    imaginary = rows(6, 8) * jnp.arange(1, 9)
    params = {"in": jnp.arange(8, 0, -1) * 0.01 + 1j * imaginary, "out": rows(8, 3)}
    x = rows(4, 6)
    result = prune(net, x, params=params)
    gone = lowest((np.abs(np.asarray(params["in"])) ** 2).sum(0), 4)
    masked = {"in": params["in"].at[:, gone].set(0), "out": params["out"]}
    assert result.effect.notes == ("in: 8 → 4",)
    close(net(result.after.model.params, x), net(masked, x))


def test_activation_criterion():
    """The units that are least active, in calibration, go; those of a recurrent layer too."""
    model, x = made("conv")
    batches = [x + shift for shift in (0.0, 0.3, 0.6, 0.9)]
    result = prune(model, x, criterion="activation", include="conv", calibration=batches)
    seen = [nnx.max_pool(nnx.relu(model.norm(model.conv(batch))), (2, 2), (2, 2)) for batch in batches]
    gone = lowest(np.mean([np.abs(activation).mean((0, 1, 2)) for activation in seen], 0), 6)
    stays = np.setdiff1d(np.arange(12), gone)
    np.testing.assert_array_equal(result.model.conv.bias[...], np.asarray(model.conv.bias[...])[stays])


def test_activation_criterion_of_hidden_units():
    model, x = made("fused_lstm")
    result = prune(model, x, criterion="activation")
    hidden = np.abs(model.rnn(x))  # read by the cell one step later, and by fc at the last step
    fed_back = np.concatenate([np.zeros_like(hidden[:, :1]), hidden[:, :-1]], 1).mean((0, 1))
    gone = lowest((fed_back + hidden[:, -1].mean(0)) / 2, 5)
    stays = np.setdiff1d(np.arange(10), gone)
    np.testing.assert_array_equal(result.model.fc.kernel[...], np.asarray(model.fc.kernel[...])[stays])
