"""Bad input: a clear error before any work, that says what was given, what was expected and what to do."""

import numpy as np
import pytest
from sample_models import training

import perfkit
from perfkit import InvalidInputError, UnknownRecipeError, UnsupportedError

torch = pytest.importorskip("torch")


def linear(**changes):
    """Arguments that work, with some changed."""
    return {"model": torch.nn.Linear(4, 2), "recipe": "half", "example_inputs": (torch.ones(3, 4),)} | changes


def with_nan():
    model = torch.nn.Linear(4, 2)
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    return model


def with_assigned_forward():
    model = torch.nn.Linear(4, 2)
    original = model.forward
    model.forward = lambda x: original(x)
    return model


def uncopyable():
    import threading

    model = torch.nn.Linear(4, 2)
    model.lock = threading.Lock()
    return model


CASES = {
    "no framework": (lambda: linear(model=object()), "expected a torch.nn.Module"),
    "a number": (lambda: linear(model=3), "expected a torch.nn.Module"),
    "a class": (lambda: linear(model=torch.nn.Linear), "pass an instance"),
    "a torch function": (lambda: linear(model=torch.relu), "torch.nn.Module"),
    "wrong shape": (lambda: linear(example_inputs=(torch.ones(3, 5),)), "does not run on example_inputs"),
    "wrong number": (lambda: linear(example_inputs=(torch.ones(3, 4), 1)), "does not run on example_inputs"),
    "empty batch": (lambda: linear(example_inputs=(torch.ones(0, 4),)), "empty tensor of shape [0, 4]"),
    "NaN weights": (lambda: linear(model=with_nan()), "'weight' holds 1 NaN"),
    "assigned forward": (lambda: linear(model=with_assigned_forward()), "assigned to the instance"),
    "uncopyable": (lambda: linear(model=uncopyable()), "cannot be copied"),
    "scripted": (lambda: linear(model=torch.jit.trace(torch.nn.Linear(4, 2), torch.ones(3, 4))), "TorchScript"),
    "compiled": (lambda: linear(model=torch.compile(torch.nn.Linear(4, 2))), "compiled already"),
    "meta device": (lambda: linear(model=torch.nn.Linear(4, 2, device="meta")), "meta device"),
    "params of torch": (lambda: linear(params={}), "params="),
    "unknown recipe": (lambda: linear(recipe="halve"), "'half'"),
    "unknown option": (lambda: linear(recipe="half(kind='x')"), "no option 'kind'"),
    "two precisions": (lambda: linear(recipe="half+bf16"), "both set the precision"),
    "negative budget": (lambda: linear(budget_s=-1), "budget_s=-1"),
    "no budget": (lambda: linear(budget_s=0), "budget_s=0"),
    "budget in words": (lambda: linear(budget_s="a lot"), "budget_s='a lot'"),
    "negative tolerance": (lambda: linear(tolerance=-0.1), "tolerance=-0.1"),
    "tolerance NaN": (lambda: linear(tolerance=float("nan")), "tolerance=nan"),
    "on_slower": (lambda: linear(on_slower="cry"), "'revert'"),
    "max_drop alone": (lambda: linear(max_drop=0.1), "evaluate="),
    "evaluate": (lambda: linear(evaluate=0.9), "expected a function"),
    "mode": (lambda: linear(mode="predict"), "'inference' or 'training'"),
    "loss in inference": (lambda: linear(loss=torch.nn.MSELoss()), "mode='training'"),
    "training without": (lambda: linear(mode="training"), "needs loss, targets, optimizer"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("case", CASES)
def test_torch(case):
    given, said = CASES[case]
    with pytest.raises(InvalidInputError) as raised:
        perfkit.optimize(**given())
    assert said in str(raised.value)


def test_an_unknown_recipe_is_named_before_the_model_is_looked_at():
    with pytest.raises(UnknownRecipeError):
        perfkit.optimize(object(), "nonsense")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss": lambda outputs, targets: outputs}, "expected a scalar"),
        ({"loss": lambda outputs, targets: 1 / 0}, "ZeroDivisionError"),
        ({"loss": lambda outputs, targets: "low"}, "returned a str"),
        ({"optimizer": "adam"}, "optimizer is a str"),
    ],
)
def test_training(framework, changes, said):
    with pytest.raises(InvalidInputError) as raised:
        perfkit.optimize(**(training(framework) | changes), recipe="half", mode="training")
    assert said in str(raised.value)


def test_nothing_to_train():
    given = training("torch")
    given["model"].requires_grad_(False)
    with pytest.raises(InvalidInputError, match=r"no parameter of .* requires a gradient"):
        perfkit.optimize(**given, recipe="half", mode="training")


def test_a_step_of_the_originals_that_fails_is_told_as_its_own():
    given = training("torch") | {"loss": lambda outputs, targets: outputs.detach().mean()}
    with pytest.raises(UnsupportedError, match="itself does not train: RuntimeError"):
        perfkit.optimize(**given, recipe="half", mode="training")


def test_an_optimizer_of_another_model():
    given = training("torch") | {"optimizer": torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1)}
    with pytest.raises(InvalidInputError, match="not the model's"):
        perfkit.optimize(**given, recipe="half", mode="training")


def test_an_optimizer_that_cannot_be_made():
    """torch's refuse a model without parameters."""
    given = training("torch") | {"model": torch.nn.Identity(), "optimizer": torch.optim.SGD}
    with pytest.raises(InvalidInputError, match=r"optimizer\(model.parameters\(\)\) raised ValueError"):
        perfkit.optimize(**given, recipe="half", mode="training")


def test_jax():
    jnp = pytest.importorskip("jax.numpy")
    import jax
    from flax import linen, nnx

    x = jnp.ones((3, 4))
    dense, nan = linen.Dense(2), nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    nan.bias.set_value(jnp.full(2, jnp.inf))
    for given, said in (
        ({"model": dense, "example_inputs": (x,)}, "params=module.init"),
        ({"model": dense, "params": {"weights": {}}, "example_inputs": (x,)}, "'params'"),
        ({"model": nnx.Linear(4, 2, rngs=nnx.Rngs(0)), "params": {}, "example_inputs": (x,)}, "holds its own"),
        ({"model": nan, "example_inputs": (x,)}, "'bias.value' holds 2 NaN or infinite"),
        ({"model": nnx.Linear(5, 2, rngs=nnx.Rngs(0)), "example_inputs": (x,)}, "does not run on example_inputs"),
        ({"model": jnp.sin, "example_inputs": (jnp.ones((0, 4)),)}, "empty array"),
        ({"model": jax.jit(jnp.sin).lower(x).compile(), "example_inputs": (x,)}, "compiled already"),
        ({"model": lambda x: None, "example_inputs": (np.ones(3),)}, "without any array"),
    ):
        with pytest.raises(InvalidInputError) as raised:
            perfkit.optimize(**given, recipe="half")
        assert said in str(raised.value)
