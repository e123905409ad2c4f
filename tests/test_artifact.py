"""`Result.save` and `perfkit.load`: one file, which makes the proven model again, or says why it does not."""

import contextlib
import copy
import json

import numpy as np
import pytest
from sample_models import arguments, training

import perfkit
from perfkit import FidelityError, InvalidInputError, _artifact_file, backends

CASES = [
    ("torch", "cnn", "int8", True),
    ("torch", "cnn", "half", False),
    ("torch", "packed_lstm", "fused_kernels", False),
    ("torch", "tied", "bf16", False),
    ("torch", "nested", "half", False),
    ("torch", "resnet", "prune", False),
    ("jax", "nnx_cnn", "int8+compile", True),
    ("jax", "nnx_lstm", "bf16", False),
    ("jax", "linen", "half+compile", False),
    ("jax", "function", "int8_weight_only", False),
]


def given(framework, name, calibrate=False):
    """The arguments of `apply`, and those that `save` takes beside the model."""
    found = arguments(framework, name)
    if calibrate:
        found["calibration"] = [found["example_inputs"]] * 8
    return found, {key: value for key, value in found.items() if key != "model"}


def fresh(framework, name, scale=0.5):
    """The model and its parameters as if just made: of the same form, with other weights."""
    found = arguments(framework, name)
    if framework == "torch":
        torch = pytest.importorskip("torch")
        with torch.no_grad():
            for parameter in found["model"].parameters():
                parameter.mul_(scale)
        return found["model"], None
    jax = pytest.importorskip("jax")
    from flax import nnx

    if not isinstance(found["model"], nnx.Module):
        return found["model"], jax.eval_shape(lambda: found["params"])
    state = nnx.state(found["model"], nnx.Param)
    nnx.update(found["model"], jax.tree.map(lambda array: array * scale, state))
    return found["model"], None


def outputs(result, example_inputs, model, params=None):
    backend = backends.of(model, example_inputs)
    settled = dict.fromkeys(("loss", "targets", "optimizer")) | {"mode": "inference", "seed": 0}
    return backend.outputs(backend.bind(model, params, example_inputs, **settled), result.finished)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A torch result, what it was made of, and its file."""
    pytest.importorskip("torch")
    found, more = given("torch", "cnn")
    result = perfkit.apply(**found, recipe="half")
    path = result.save(tmp_path_factory.mktemp("saved") / "cnn.perfkit", found["model"], **more)
    return result, found, path


@pytest.mark.parametrize(("framework", "name", "recipe", "calibrate"), CASES)
def test_a_loaded_model_computes_what_the_saved_one_did(framework, name, recipe, calibrate, tmp_path):
    pytest.importorskip(framework)
    found, more = given(framework, name, calibrate)
    result = perfkit.apply(**found, recipe=recipe)
    path = result.save(tmp_path / "model.perfkit", found["model"], **more)
    assert [each.name for each in tmp_path.iterdir()] == ["model.perfkit"]
    model, params = fresh(framework, name)
    loaded = perfkit.load(path, model, params=params)
    pair = (outputs(each, found["example_inputs"], found["model"], found.get("params")) for each in (result, loaded))
    for before, after in zip(*pair, strict=True):
        np.testing.assert_array_equal(before, after)
    assert loaded.recipe == result.recipe
    assert loaded.report.fidelity.relative_error == 0
    assert loaded.report.speedup is None


def test_the_proof_travels_along(hasty, tmp_path):
    pytest.importorskip("torch")
    found, more = given("torch", "cnn")
    result = perfkit.optimize(**found, recipe="half", budget_s=0.1, tolerance=1.0)
    path = result.save(tmp_path / "model.perfkit", found["model"], **more)
    (told,) = [note for note in perfkit.load(path, fresh("torch", "cnn")[0]).report.notes if "saved by" in note]
    assert result.report.created in told
    assert result.report.explanation in told
    assert result.report.environment.cpu in told


def test_another_machine_and_other_libraries_are_told(saved, monkeypatch):
    header = _artifact_file.header

    def elsewhere(path):
        about = header(path)
        there = about["report"]["environment"]
        there["cpu"], there["libraries"]["torch"] = "an old one", "1.0"
        return about

    monkeypatch.setattr(_artifact_file, "header", elsewhere)
    told = perfkit.load(saved[2], fresh("torch", "cnn")[0]).report.notes[-1]
    assert "on an old one" in told
    assert "torch 1.0 then" in told


def test_the_model_that_is_filled_stays_as_it_was(saved):
    model, _ = fresh("torch", "cnn")
    before = copy.deepcopy(model.state_dict())
    perfkit.load(saved[2], model)
    for name, tensor in model.state_dict().items():
        assert tensor.equal(before[name])
    assert model.training


def test_tied_weights_are_written_once(tmp_path):
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    found, more = given("torch", "tied")
    result = perfkit.apply(**found, recipe="half")
    names = safetensors.load_file(result.save(tmp_path / "model.perfkit", found["model"], **more))
    assert ("weight.embed.weight" in names) != ("weight.out.weight" in names)
    loaded = perfkit.load(tmp_path / "model.perfkit", fresh("torch", "tied")[0]).model
    assert loaded.embed.weight is loaded.out.weight
    assert loaded.embed.weight.dtype == torch.bfloat16


def test_keys_and_settings_among_the_inputs(tmp_path):
    jax = pytest.importorskip("jax")
    from flax import linen

    class Noisy(linen.Module):
        @linen.compact
        def __call__(self, x, train=False):
            return linen.Dropout(0.5, deterministic=not train)(linen.Dense(4)(x))

    x = jax.numpy.ones((4, 3))
    params = Noisy().init(jax.random.key(0), x)
    inputs = {"x": x, "train": True, "rngs": {"dropout": jax.random.key(1)}}
    result = perfkit.apply(Noisy(), "bf16", params=params, example_inputs=inputs)
    path = result.save(tmp_path / "model.perfkit", Noisy(), params=params, example_inputs=inputs)
    loaded = perfkit.load(path, Noisy(), params=jax.eval_shape(Noisy().init, jax.random.key(0), x))
    assert (loaded(**inputs) == result(**inputs)).all()
    assert 0 < (loaded(**inputs) == 0).sum() < loaded(**inputs).size


def test_a_forward_that_computes_something_else_is_refused(saved):
    model, _ = fresh("torch", "cnn")
    model.relu = pytest.importorskip("torch").nn.Tanh()  # has no weights either
    with pytest.raises(FidelityError, match="something else than where it was saved") as caught:
        perfkit.load(saved[2], model)
    assert not caught.value.report.fidelity.ok


def test_a_model_that_was_trained_since_is_not_written(saved, tmp_path):
    result, found, _ = saved
    path = tmp_path / "model.perfkit"
    path.write_text("what was there")
    other, _ = fresh("torch", "cnn", scale=-3.0)
    with pytest.raises(InvalidInputError, match="nothing was written: what half makes of this model now"):
        result.save(path, other, example_inputs=found["example_inputs"])
    assert path.read_text() == "what was there"
    assert list(tmp_path.iterdir()) == [path]


def rewritten(change):
    """A function that writes another header into a copy of a file."""

    def write(path, to):
        safetensors = pytest.importorskip("safetensors.torch")
        about = _artifact_file.header(path)
        header = change(about)
        safetensors.save_file(safetensors.load_file(path), to, header)

    return write


WRONG = {
    "not there": (lambda path, to: None, "there is no file"),
    "text": (lambda path, to: to.write_text("hello"), "is no file that result.save wrote"),
    "cut short": (lambda path, to: to.write_bytes(path.read_bytes()[:-100]), "or not whole"),
    "only weights": (rewritten(lambda about: None), "but none that result.save wrote"),
    "another's header": (rewritten(lambda about: {"perfkit": "[]"}), "its header is another's"),
    "newer": (
        rewritten(lambda about: {"perfkit": json.dumps(about | {"schema_version": 99})}),
        r"in a form that this one \(.*\) does not know: upgrade",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_files_that_are_none(wrong, saved, tmp_path):
    write, message = WRONG[wrong]
    write(saved[2], tmp_path / "it")
    with pytest.raises(InvalidInputError, match=message):
        perfkit.load(tmp_path / "it", saved[1]["model"])


def test_models_of_another_form(saved):
    torch = pytest.importorskip("torch")
    with pytest.raises(InvalidInputError, match=r"conv.weight is float32\[8, 1, 3, 3\] in the file and not there"):
        perfkit.load(saved[2], torch.nn.Linear(2, 2))
    with pytest.raises(InvalidInputError, match=r"float32\[8, 1, 3, 3\] in the file and float64"):
        perfkit.load(saved[2], fresh("torch", "cnn")[0].double())
    with pytest.raises(InvalidInputError, match=r"has no shape yet \(a lazy module\): call the model once"):
        perfkit.load(saved[2], torch.nn.LazyLinear(2))


def test_the_other_framework_and_missing_parameters(saved, tmp_path):
    pytest.importorskip("jax")
    found, more = given("jax", "linen")
    with pytest.raises(InvalidInputError, match=r"expected the original, a torch model, and got a Dense$"):
        perfkit.load(saved[2], found["model"])
    with pytest.raises(InvalidInputError, match="a torch model, and got a function: pass what it returns"):
        perfkit.load(saved[2], lambda: fresh("torch", "cnn")[0])
    path = perfkit.apply(**found, recipe="bf16").save(tmp_path / "model.perfkit", found["model"], **more)
    with pytest.raises(InvalidInputError, match="has none without params="):
        perfkit.load(path, found["model"])


def test_what_no_file_can_hold(saved, tmp_path):
    torch = pytest.importorskip("torch")
    result, found, _ = saved
    for name in ("a" * 250, "a" * 300):  # as where the folder is not to be written to
        with pytest.raises(InvalidInputError, match="cannot be written: "):
            result.save(tmp_path / name, found["model"], example_inputs=found["example_inputs"])
    with pytest.raises(InvalidInputError, match="expected a file's name in a folder that is there"):
        result.save(tmp_path / "missing" / "model", found["model"], example_inputs=found["example_inputs"])
    with pytest.raises(InvalidInputError, match="example_inputs=None"):
        result.save(tmp_path / "model", found["model"], example_inputs=None)

    class Extra(torch.nn.Linear):
        def get_extra_state(self):
            return {"not": "a tensor"}

        def set_extra_state(self, state):
            """There is none."""

    class Odd(set):
        """Not what JSON knows."""

    class Takes(torch.nn.Linear):
        def forward(self, x, options=None):
            return super().forward(x)

    x = torch.ones(3, 2)
    sparse = Takes(2, 2)
    sparse.register_buffer("graph", torch.eye(2).to_sparse())
    for model, inputs, message in (
        (Extra(2, 2), (x,), "_extra_state of Extra's state_dict"),
        (sparse, (x,), r"graph of Takes's state_dict\(\) is a Tensor \(torch.sparse_coo"),
        (Takes(2, 2), (x, torch.eye(2).to_sparse()), r"the inputs hold a Tensor \(torch.sparse_coo, torch.float32\)"),
        (Takes(2, 2), (x, Odd()), r"the inputs hold a .*Odd, which a file cannot"),
    ):
        made = perfkit.apply(model, "half", example_inputs=inputs)
        with pytest.raises(InvalidInputError, match=message):
            made.save(tmp_path / "model", model, example_inputs=inputs)
    assert not list(tmp_path.iterdir())


def test_a_recipe_that_is_no_file(tmp_path):
    torch = pytest.importorskip("torch")

    class Mine(perfkit.Recipe):
        stage = perfkit.Stage.STRUCTURE

        def torch(self, work):
            return work, perfkit.Effect(touched=("all",))

    result = perfkit.apply(torch.nn.Linear(2, 2), Mine(), example_inputs=(torch.ones(3, 2),))
    with pytest.raises(InvalidInputError, match=r"'mine'.* a file in a folder that the environment variable PERFKIT"):
        result.save(tmp_path / "model", torch.nn.Linear(2, 2), example_inputs=(torch.ones(3, 2),))
    assert not list(tmp_path.iterdir())


def test_calibration_data_that_it_was_not_made_with(tmp_path):
    torch = pytest.importorskip("torch")
    model, x = torch.nn.Linear(2, 2), torch.ones(16, 2)
    calibrated = perfkit.apply(model, "int8", example_inputs=(x,), calibration=[(9 * x,), (x,)])
    for calibration in (None, [(x,)]):
        with pytest.raises(InvalidInputError, match="was made with 2 batch"):
            calibrated.save(tmp_path / "model", model, example_inputs=(x,), calibration=calibration)
    needless = perfkit.apply(model, "half", example_inputs=(x,), calibration=[(x,)])
    assert needless.save(tmp_path / "model", model, example_inputs=(x,)).exists()


def test_numbers_that_are_read_as_their_conjugates(tmp_path):
    torch = pytest.importorskip("torch")

    class Parts(torch.nn.Linear):
        def forward(self, z, conjugate, negative):
            return super().forward(z.real + conjugate.imag - negative)

    z = torch.randn(3, 2, dtype=torch.complex64)
    inputs = (z, z.conj(), z.conj().imag)
    model = Parts(2, 2)
    path = perfkit.apply(model, "bf16", example_inputs=inputs).save(tmp_path / "it", model, example_inputs=inputs)
    assert perfkit.load(path, model).report.fidelity.relative_error == 0


def test_what_stands_among_parameters_in_jax(tmp_path):
    jax = pytest.importorskip("jax")

    def function(params, x):
        here, there = jax.random.split(params["key"])
        noise = jax.random.normal(here, (2,))
        return (x @ params["a.b"] + x @ params["a"]["b"]) * jax.numpy.float32(params["scale"]) + noise, there

    x, first, second = jax.random.normal(jax.random.key(0), (3, 2, 2))
    params = {"a.b": first, "a": {"b": second}, "scale": 2.0, "key": jax.random.key(3, impl="rbg")}
    result = perfkit.apply(function, "half", params=params, example_inputs=(x,))
    path = result.save(tmp_path / "model", function, params=params, example_inputs=(x,))
    loaded = perfkit.load(path, function, params=jax.eval_shape(lambda: params))
    (y, key), (same, other) = (each.model(each.params, x) for each in (result, loaded))
    np.testing.assert_array_equal(y, same)
    assert (jax.random.key_data(key) == jax.random.key_data(other)).all()
    params["scale"] = jax.numpy.ones((), jax.numpy.float8_e5m2)
    result = perfkit.apply(function, "half", params=params, example_inputs=(x,))
    with pytest.raises(InvalidInputError, match=r"weight.scale is float8_e5m2, which safetensors does not read"):
        result.save(path, function, params=params, example_inputs=(x,))


def test_numbers_in_the_state_of_an_nnx_module(tmp_path):
    jax = pytest.importorskip("jax")
    from flax import nnx

    class Counting(nnx.Module):
        def __init__(self):
            self.calls, self.factor = nnx.Variable(jax.numpy.array(0)), nnx.data(2.5)

        def __call__(self, x):
            self.calls[...] += 1
            return x * self.factor * self.calls

    x = jax.numpy.ones((3, 2))
    path = perfkit.apply(Counting(), "compile", example_inputs=(x,)).save(
        tmp_path / "it", Counting(), example_inputs=(x,)
    )
    loaded = perfkit.load(path, Counting()).model
    assert (loaded(x) == 2.5).all()
    assert (loaded(x) == 5).all()


def test_a_training_is_told_the_way(tmp_path):
    pytest.importorskip("torch")
    found = training("torch")
    result = perfkit.apply(**found, recipe="bf16", mode="training")
    with pytest.raises(InvalidInputError, match="put what it learnt into the original"):
        result.save(tmp_path / "model", found["model"], example_inputs=found["example_inputs"])


def test_others_may_read_it(saved):
    """As any file that is written here: not the temporary file's mode, which is its owner's alone."""
    plain = saved[2].with_name("plain")
    with contextlib.closing(plain.open("w")):
        assert saved[2].stat().st_mode == plain.stat().st_mode
