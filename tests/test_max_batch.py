"""The largest batch that fits: the search by made-up needs, and on models by their tensor peak."""

import pytest
from sample_models import training

import perfkit
from perfkit import InvalidInputError, UnsupportedError
from perfkit import _max_batch as search


def found(needs, limit, **changes):
    asked = []

    def counting(count):
        asked.append(count)
        return needs(count)

    result = search._search(counting, limit, **({"careful": True, "unit": 1, "most": 10_000} | changes))
    return result, asked


@pytest.mark.parametrize("limit", [1000.0, 1009.0, 999.0, 64_100.0, 105.0])
def test_the_largest_that_fits_is_found_without_trying_one_that_does_not(limit):
    result, asked = found(lambda count: 100.0 + 10 * count, limit)
    assert result.batch_size == max((limit - 100) // 10, 0)
    assert [count for count in asked if 100 + 10 * count > limit] in ([], [1]), "the first cannot be foreseen"
    assert len(asked) <= result.batch_size.bit_length() + 1, "once it has doubled, the line tells"


def test_it_is_told_how_near_the_limit_is():
    result, _ = found(lambda count: 265_500.0 * count, 500e6)
    assert str(result).startswith("batch 1883 fits, 499.9 MB of 500 MB; 1884 would need 500.2 MB")


def test_steps_in_what_is_needed_are_found_too():
    result, _ = found(lambda count: 1000.0 * -(-count // 32), 5000.0)
    assert result.batch_size == 160


def test_what_the_line_does_not_tell_is_found_by_trying():
    result, asked = found(lambda count: 10.0 * count if count < 700 else 1e6, 8000.0, careful=False)
    assert result.batch_size == 699
    assert len(asked) < 40


def test_running_out_of_memory_is_an_answer():
    result, _ = found(lambda count: None if count > 37 else float(count), None, careful=False)
    assert result.batch_size == 37
    assert "ran out of memory at 38" in result.stopped


def test_the_most_is_not_passed():
    result, asked = found(lambda count: 1.0, 100.0, most=20, unit=8)
    assert result.batch_size == 160
    assert max(asked) == 20
    assert "no larger one than 160" in result.stopped


def test_nothing_fits():
    result, _ = found(lambda count: 1e9, 1e6)
    assert result.batch_size == 0
    assert "1 needs" in result.stopped


class OutOfMemoryError(RuntimeError):
    """Of the name that torch's has."""


@pytest.mark.parametrize("error", [OutOfMemoryError("CUDA out of memory"), ValueError("RESOURCE_EXHAUSTED: 3 GiB")])
def test_both_frameworks_errors_are_known(error):
    told = UnsupportedError("the result does not run")
    told.__cause__ = error
    assert search._out_of_memory(told)
    assert not search._out_of_memory(UnsupportedError("something else"))


def test_jax_is_asked_by_compiling():
    pytest.importorskip("jax")
    found = perfkit.max_batch_size(**training("jax"), multiple_of=8, limit_bytes=1e12, most=16)
    assert [batch for batch, _ in found.tried] == [8, 16]
    assert found.tried[0][1] < found.tried[1][1]


def test_on_a_model():
    """A limit that a batch of some rows needs: none smaller fits, none larger does."""
    pytest.importorskip("torch")
    given = training("torch") | {"mode": "training", "multiple_of": 8}
    wide = perfkit.max_batch_size(**given, limit_bytes=1e12, most=32)
    assert [batch for batch, _ in wide.tried] == [8, 16, 32]
    assert list(wide.tried) == sorted(wide.tried)
    limit = wide.tried[1][1]
    tight = perfkit.max_batch_size(**given, limit_bytes=limit, most=32)
    assert tight.batch_size == 16
    assert tight.needs_bytes <= limit
    assert "batch 16 fits" in str(tight)


def test_micro_batches_make_room_for_more():
    pytest.importorskip("torch")
    given = training("torch") | {"mode": "training", "multiple_of": 64, "most": 512}
    limit = perfkit.max_batch_size(**given, limit_bytes=1e12).tried[0][1] * 1.5
    plain = perfkit.max_batch_size(**given, limit_bytes=limit)
    cut = perfkit.max_batch_size(**given, limit_bytes=limit, recipe="accumulate(4)")
    assert cut.batch_size > plain.batch_size


def test_micro_batches_are_what_is_counted_in(framework):
    given = training(framework) | {"mode": "training", "most": 16, "limit_bytes": 1e12, "recipe": "accumulate(8)"}
    assert [batch for batch, _ in perfkit.max_batch_size(**given).tried] == [8, 16]


def test_a_dimension_that_is_not_the_batchs_is_refused(framework):
    """Rows of it would be tried, and the targets would stay as many as they are."""
    with pytest.raises(InvalidInputError, match="set batch_dim="):
        perfkit.max_batch_size(**training(framework), batch_dim=1, limit_bytes=1e12)


def test_inference_and_the_free_memory():
    torch = pytest.importorskip("torch")
    found = perfkit.max_batch_size(torch.nn.Linear(4, 4), example_inputs=(torch.ones(3, 4),), mode="inference", most=8)
    assert found.batch_size == 8
    assert found.limit_bytes > 0


def test_what_cannot_be_used_is_refused():
    torch = pytest.importorskip("torch")
    with pytest.raises(InvalidInputError, match="1 <= multiple_of <= most"):
        perfkit.max_batch_size(torch.nn.Linear(4, 4), example_inputs=(torch.ones(3, 4),), mode="inference", most=0)


@pytest.mark.parametrize("recipe", [None, "compile"])
def test_jax_inference_is_counted_also_where_xla_hands_it_to_a_library(recipe):
    jax = pytest.importorskip("jax")
    params, x = {"w": jax.numpy.ones((3, 3, 1, 32))}, jax.numpy.ones((8, 28, 28, 1))

    def convolved(params, x):
        out = jax.lax.conv_general_dilated(x, params["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jax.nn.relu(out).sum((1, 2))

    given = {"params": params, "example_inputs": (x,), "mode": "inference", "recipe": recipe}
    found = perfkit.max_batch_size(convolved, **given, multiple_of=8, limit_bytes=1e12, most=16)
    assert [batch for batch, _ in found.tried] == [8, 16]
    assert found.tried[1][1] > found.tried[0][1] > 8 * 28 * 28 * 32 * 4
