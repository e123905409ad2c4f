"""The data sets that need no network, and what all data sets promise."""

import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

from perfkit.reference import data
from perfkit.reference.data import _corpus
from perfkit.reference.data._digits import enlarge, stratified_fifth


def test_rows_are_copies_and_the_arrays_themselves_are_read_only():
    split = data.adding(count=10).train
    (sequences,), targets = split.rows(np.array([1, 1]))
    sequences[:] = 5
    targets[:] = 5
    assert not np.any(split.inputs[0] == 5)
    with pytest.raises(ValueError, match="read-only"):
        split.inputs[0][0] = 5


@pytest.mark.parametrize("rows", [(3, 4), (0, 0)])
def test_a_split_needs_one_target_for_each_row_and_one_row_at_least(rows):
    with pytest.raises(ValueError, match=rf"arrays of \[{rows[0]}, {rows[1]}\] rows: expected the same number"):
        data.Split((np.zeros((rows[0], 2)),), np.zeros(rows[1]))


def test_digits_are_standardized_and_split_by_class():
    digits = data.digits()
    train, test = digits.train, digits.test
    assert (len(train), len(test)) == (1442, 355)
    assert train.inputs[0].shape == (1442, 28, 28)
    assert train.inputs[0].dtype == np.float32
    assert train.targets.dtype == np.int64
    # float32 rounding of a million pixels near 1
    assert train.inputs[0].mean(dtype=np.float64) == pytest.approx(0, abs=1e-6)
    assert train.inputs[0].std(dtype=np.float64) == pytest.approx(1, abs=1e-6)
    shares = np.bincount(test.targets) / (np.bincount(test.targets) + np.bincount(train.targets))
    assert np.all((shares > 0.19) & (shares <= 0.2))
    np.testing.assert_array_equal(data.digits().test.inputs[0], test.inputs[0])


def test_no_digit_is_in_both_splits():
    digits = data.digits()
    train, test = ({image.tobytes() for image in split.inputs[0]} for split in (digits.train, digits.test))
    assert len(train) > 1400
    assert not train & test


def test_enlarging_is_torchs_bilinear_interpolation():
    images = np.random.default_rng(0).random((3, 8, 8), dtype=np.float32)
    expected = torch.nn.functional.interpolate(torch.from_numpy(images)[:, None], size=28, mode="bilinear")[:, 0]
    # torch rounds the place of a pixel, up to 8, to float32; pixels are in 0..1 and there are two axes
    np.testing.assert_allclose(enlarge(images, size=28), expected, rtol=0, atol=2 * 8 * np.finfo(np.float32).eps)


def test_a_fifth_of_every_class_is_marked():
    labels = np.repeat([4, 7], [50, 10])
    assert np.bincount(labels, weights=stratified_fifth(labels)).tolist() == [0, 0, 0, 0, 10, 0, 0, 2]


def test_adding_marks_one_value_in_each_half_and_sums_them():
    problem = data.adding(count=500, length=9, features=4, seed=3)
    for split, count in ((problem.train, 400), (problem.test, 100)):
        (sequences,) = split.inputs
        values, markers = sequences[:, :, 0], sequences[:, :, 1]
        assert sequences.shape == (count, 9, 4)
        assert set(np.unique(markers)) == {0.0, 1.0}
        assert np.all(markers[:, :4].sum(axis=1) == 1)
        assert np.all(markers[:, 4:].sum(axis=1) == 1)
        np.testing.assert_allclose(split.targets[:, 0], (values * markers).sum(axis=1), rtol=1e-6)
        assert 0 <= np.delete(sequences, 1, axis=2).min() < np.delete(sequences, 1, axis=2).max() < 1


def test_adding_has_the_variance_of_two_uniform_numbers():
    targets = data.adding(count=20_000).train.targets
    # The variance of n samples has a standard error of sqrt((kurtosis - 1) / n) of itself; the kurtosis here is 2.4.
    assert targets.var() == pytest.approx(1 / 6, rel=4 * np.sqrt(1.4 / len(targets)))


def test_adding_repeats_for_a_seed_only():
    first, again, other = (data.adding(count=10, seed=seed).train.inputs[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("sizes", [{"count": 4}, {"length": 1}, {"features": 1}])
def test_adding_refuses_sizes_without_a_problem(sizes):
    with pytest.raises(ValueError, match="expected a whole number"):
        data.adding(**sizes)


def test_corpus_is_of_passages_and_their_reversals():
    corpus = data.corpus()
    assert len(corpus.train) > 2000
    assert len(corpus.vocabulary) <= 25_000
    for split in (corpus.train, corpus.test):
        (ids, lengths), labels = split.inputs, split.targets
        assert ids.shape == (len(split), 128)
        assert ids.dtype == lengths.dtype == np.int64
        assert 0 <= ids.min() < ids.max() < len(corpus.vocabulary)
        assert 16 <= lengths.min() < lengths.max() == 128
        assert not ids[np.arange(128) >= lengths[:, None]].any()
        assert labels[:, 0].tolist() == [1.0, 0.0] * (len(split) // 2)
        for row in range(0, len(split), 2):
            length = lengths[row]
            assert lengths[row + 1] == length
            assert ids[row, :length].tolist() == ids[row + 1, :length][::-1].tolist()


def test_corpus_holds_out_passages_that_are_not_in_training():
    corpus = data.corpus()
    train, test = (
        {ids.tobytes() for ids in split.inputs[0][split.targets[:, 0] == 1]} for split in (corpus.train, corpus.test)
    )
    assert not train & test
    assert len(test) / (len(train) + len(test)) == pytest.approx(0.2, abs=0.05)


def test_corpus_repeats_for_a_seed_only():
    _corpus.corpus.cache_clear()
    first = data.corpus().train.inputs[0]
    _corpus.corpus.cache_clear()
    _corpus._prose.cache_clear()
    np.testing.assert_array_equal(first, data.corpus().train.inputs[0])
    assert first.shape != data.corpus(seed=1).train.inputs[0].shape


def test_corpus_reads_prose_and_not_code():
    paragraphs = _corpus._paragraphs(
        "Return the number of items, which is zero when\nthe queue is empty and nobody has\nput anything.\n\n"
        ">>> queue.put(1); queue.get_nowait(); x = [a + b for a, b in pairs if a in seen_before_now]\n\n"
        "Too short to be prose."
    )
    assert [" ".join(words) for words in paragraphs] == [
        "return the number of items which is zero when the queue is empty and nobody has put anything"
    ]


def test_corpus_says_when_python_came_without_its_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda _name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"source files \(found 0 paragraphs"):
        data.corpus(seed=12345)


def test_corpus_leaves_out_what_not_every_installation_has(tmp_path):
    for name in ("a.py", "test/b.py", "email/c.py", "email/tests/d.py", "site-packages/e.py", "f.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert sorted(_corpus._python_files(Path(tmp_path))) == ["a.py", "email/c.py"]
