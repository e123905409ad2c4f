"""MNIST's files, read from small ones in the published layout and fetched from a server of our own."""

import gzip
import hashlib
import http.server
import threading
from functools import partial

import numpy as np
import pytest

from perfkit.reference import data
from perfkit.reference.data import _mnist

COUNTS = {"train": 12, "t10k": 5}


def idx(array):
    header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


def contents():
    """The four files as published, by their names: what a folder or a server holds."""
    generator = np.random.default_rng(0)
    files = {}
    for split, count in COUNTS.items():
        images = generator.integers(0, 256, (count, 28, 28))
        files[f"{split}-images-idx3-ubyte.gz"] = gzip.compress(idx(images), mtime=0)
        files[f"{split}-labels-idx1-ubyte.gz"] = gzip.compress(idx(np.arange(count) % 10), mtime=0)
    return files


@pytest.fixture
def folder(tmp_path):
    """A folder of the four compressed files."""
    path = tmp_path / "mnist"
    path.mkdir()
    for name, content in contents().items():
        (path / name).write_bytes(content)
    return path


@pytest.fixture
def server(folder):
    """The address of a server of that folder."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as served:
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}/"
        served.shutdown()
        thread.join()


@pytest.fixture
def our_checksums(monkeypatch):
    monkeypatch.setattr(_mnist, "MD5", {name: hashlib.md5(content).hexdigest() for name, content in contents().items()})


def test_the_published_layout_is_read_compressed_or_not(folder):
    compressed = data.mnist(folder)
    for path in list(folder.iterdir()):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    raw = data.mnist(str(folder))
    for mnist in (compressed, raw):
        assert mnist.kind == "images"
        assert mnist.train.inputs[0].shape == (12, 28, 28)
        assert mnist.train.inputs[0].dtype == np.float32
        assert mnist.train.targets.tolist() == [*range(10), 0, 1]
        assert mnist.test.targets.tolist() == [*range(5)]
    np.testing.assert_array_equal(compressed.test.inputs[0], raw.test.inputs[0])


def test_pixels_keep_their_places_and_are_standardized_by_the_training_images(folder):
    pixels = np.frombuffer(gzip.decompress((folder / "train-images-idx3-ubyte.gz").read_bytes())[16:], np.uint8)
    expected = (pixels.reshape(12, 28, 28) - pixels.mean()) / pixels.std()
    np.testing.assert_allclose(data.mnist(folder).train.inputs[0], expected, rtol=1e-6)


def test_a_model_trains_on_it(folder):
    from perfkit import reference

    trained = reference.train("cnn", steps=2, batch_size=4, data=data.mnist(folder))
    assert trained.baseline == 0.2  # five held-out images of five classes


def test_missing_files_are_named(folder):
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"does not hold t10k-labels-idx1-ubyte.gz; .*download=True"):
        data.mnist(folder)


def test_without_a_folder_it_looks_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "perfkit" / "mnist")):
        data.mnist()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images-idx3-ubyte.gz", b"<html>not found</html>", "expected a whole gzip file"),
        ("train-images-idx3-ubyte.gz", contents()["train-images-idx3-ubyte.gz"][:-20], "expected a whole gzip file"),
        ("train-images-idx3-ubyte", b"", "its header is empty, expected 00000803"),
        ("train-images-idx3-ubyte", idx(np.zeros((12, 8, 8))), r"expected 00000803, a count, and \(28, 28\)"),
        ("train-images-idx3-ubyte", idx(np.zeros((12, 28, 28)))[:-1], "9407 bytes of values, expected 9408"),
        (
            "train-labels-idx1-ubyte",
            idx(np.zeros(11)),
            "11 labels up to 0, expected one label in 0..9 for each of the 12",
        ),
        ("train-labels-idx1-ubyte", idx(np.full(12, 10)), "12 labels up to 10"),
    ],
)
def test_damaged_files_are_named_with_what_is_wrong(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is damaged: .*{message}.*; remove it and call mnist"):
        data.mnist(folder)


def test_missing_files_are_fetched_and_found_the_next_time(folder, server, our_checksums, tmp_path):
    target = tmp_path / "new" / "folder"
    fetched = data.mnist(target, download=True, source=server)
    np.testing.assert_array_equal(fetched.train.inputs[0], data.mnist(folder).train.inputs[0])
    assert sorted(path.name for path in target.iterdir()) == sorted(contents())  # and nothing half-done beside them
    data.mnist(target, download=True, source="http://127.0.0.1:1/")  # nothing is missing: nothing is fetched


def test_a_folder_can_be_the_source(folder, our_checksums, tmp_path):
    assert len(data.mnist(tmp_path / "copy", download=True, source=f"{folder.as_uri()}/").test) == 5


def test_a_wrong_checksum_leaves_nothing_behind(server, tmp_path):
    target = tmp_path / "copy"
    with pytest.raises(
        ValueError, match=r"md5 [0-9a-f]{32}, expected f68b3c2dcbeaaa9fbdd348bbdeb94873; nothing was kept"
    ):
        data.mnist(target, download=True, source=server)
    assert list(target.iterdir()) == []


def test_an_unreachable_source_leaves_nothing_behind(server, tmp_path):
    target = tmp_path / "copy"
    with pytest.raises(ConnectionError, match=r"could not download .*404.*name a mirror with source="):
        data.mnist(target, download=True, source=f"{server}elsewhere/")
    assert list(target.iterdir()) == []


def test_a_progress_bar_is_drawn_on_standard_error_when_asked(server, our_checksums, tmp_path, capsys):
    data.mnist(tmp_path / "quiet", download=True, source=server)
    assert capsys.readouterr() == ("", "")
    data.mnist(tmp_path / "shown", download=True, source=server, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "train-images-idx3-ubyte.gz" in err
