"""Loops of which single steps are read, in JAX: what is read stays, and what is not is not computed."""

import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
from flax import nnx
from fused_jax import KEYS, TOLERANCE, assert_same, gradients, outputs, swapped, workload

from perfkit.backends import jax_fused_rnn
from perfkit.kernels import _native

if _native.find_compiler() is None:
    pytest.skip("no C++ compiler is installed", allow_module_level=True)

ROWS, STEPS, HIDDEN = 5, 9, 8
X = jax.random.normal(KEYS[0], (ROWS, STEPS, 6))
ENDS = jnp.array([4, 9, 1, 6, 2])
SHORTER = ", of each row what is read,"


def along(hidden, ends):
    return jnp.take_along_axis(hidden, (ends - 1)[:, None, None], axis=1)[:, 0]


READS = {
    "along": along,
    "indexed": lambda hidden, ends: hidden[jnp.arange(len(ends)), ends - 1],
    "behind": lambda hidden, ends: hidden[jnp.arange(len(ends)), ends - 1 - hidden.shape[1], :],
    "steps first": lambda hidden, ends: hidden.swapaxes(0, 1)[ends - 1, jnp.arange(len(ends))],
    "twice": lambda hidden, ends: along(hidden, ends) - along(hidden, ends // 2 + 1),
    "clipped": lambda hidden, ends: jnp.take_along_axis(hidden, (ends + 2)[:, None, None], axis=1, mode="clip")[:, 0],
    "beyond": lambda hidden, ends: jnp.nan_to_num(hidden.at[jnp.arange(len(ends)), ends + 2].get(mode="fill")),
    "mapped": lambda hidden, ends: jax.vmap(lambda row, end: row[end - 1])(hidden, ends),
}
OTHERWISE = {
    "mean": lambda hidden, _: hidden.mean(1),
    "last step": lambda hidden, _: hidden[:, -1],
    "features": lambda hidden, ends: hidden[jnp.arange(len(ends)), ends - 1, ends % HIDDEN],
    "both": lambda hidden, ends: along(hidden, ends) + hidden.max(1),
    "returned": lambda hidden, ends: (along(hidden, ends), hidden),
    "at what it computed": lambda hidden, _: along(hidden, 1 + (hidden[:, 0, 0] > 0).astype(jnp.int32)),
}


class Reader(nnx.Module):
    def __init__(self, read, kind=nnx.OptimizedLSTMCell, **options):
        self.first, self.second = (
            nnx.RNN(kind(size, HIDDEN, rngs=nnx.Rngs(seed)), rngs=nnx.Rngs(1), **options)
            for seed, size in enumerate((6, HIDDEN))
        )
        self.read = read

    def __call__(self, x, ends):
        return self.read(self.second(self.first(x)), ends)


@pytest.mark.parametrize("name", READS)
def test_what_is_read_stays(name):
    work = workload(Reader(READS[name]), X, ENDS)
    result, effect = swapped(work)
    assert [SHORTER in note for note in effect.notes] == [True, True], effect.notes
    assert_same(outputs(result), outputs(work))


@pytest.mark.parametrize("kind", [nnx.GRUCell, nnx.SimpleCell])
def test_other_cells_and_gradients_of_what_is_never_computed(kind):
    work = workload(Reader(along, kind), X, ENDS, mode="training")
    result, effect = swapped(work)
    assert [SHORTER in note for note in effect.notes] == [True, True]
    assert_same(outputs(result), outputs(work))
    assert_same(gradients(result), gradients(work), 4 * TOLERANCE)


@pytest.mark.parametrize(("name", "expected"), [("along", ENDS), ("twice", ENDS), ("clipped", [7, 9, 4, 9, 5])])
def test_kernels_are_told_how_far_each_row_is_read(name, expected, monkeypatch):
    given = []
    own = jax_fused_rnn.lstm
    monkeypatch.setattr(jax_fused_rnn, "lstm", lambda *a, **k: given.append(k["lengths"]) or own(*a, **k))
    model = swapped(workload(Reader(READS[name]), X, ENDS))[0].model
    given.clear()
    model.function()(model.params, model.rest, X, ENDS)
    assert [list(lengths) for lengths in given] == [list(expected)] * 2


def test_indices_made_in_many_steps_are_looked_through_once():
    def doubled(hidden, ends):
        for _ in range(64):  # each reads the last one twice
            ends = ends + ends - jnp.maximum(ends, 0)
        return along(hidden, ends)

    work = workload(Reader(doubled), X, ENDS)
    result, effect = swapped(work)
    assert all(SHORTER in note for note in effect.notes)
    assert_same(outputs(result), outputs(work))


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_is_read_otherwise_is_computed_whole(name):
    work = workload(Reader(OTHERWISE[name]), X, ENDS)
    result, effect = swapped(work)
    assert len(effect.touched) == 2
    assert not any(SHORTER in note for note in effect.notes)
    assert_same(outputs(result), outputs(work))


@pytest.mark.parametrize("options", [{"reverse": True, "keep_order": True}, {"return_carry": True}], ids=str)
def test_ways_back_and_states_that_are_read_need_all_steps(options):
    class One(nnx.Module):
        def __init__(self):
            self.rnn = nnx.RNN(nnx.GRUCell(6, HIDDEN, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1), **options)

        def __call__(self, x, ends):
            found = self.rnn(x)
            if "return_carry" not in options:
                return along(found, ends)
            state, hidden = found
            return along(hidden, ends) + state

    work = workload(One(), X, ENDS)
    result, effect = swapped(work)
    assert not any(SHORTER in note for note in effect.notes)
    assert_same(outputs(result), outputs(work))
