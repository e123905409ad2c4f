"""local_sgd in torch: two processes do what its formulas say, and send as little as it says."""

import pytest
from shared_runs import once
from torch_workers import together

from perfkit._chain import chain_of

EXACT = ("every step", "every third", "warm-up", "weights", "state")
OUTER = ("diloco", "diloco after warm-up")
ROUNDING = 2.0**-24
STEPS = 7


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    pytest.importorskip("torch")
    run = ("torch_local_worker.py", 2, tmp_path_factory.mktemp("local"))
    return once("torch_local_worker", lambda: together(*run))


@pytest.mark.parametrize("case", [*EXACT, *OUTER])
def test_two_processes_do_what_the_formulas_say(found, case):
    result = found[case]
    # The outer step is written in another order than torch's: some roundings in each.
    allowed = 8 * STEPS * ROUNDING
    assert result["off"] <= allowed
    for rank in (0, 1):
        assert result["losses"][rank] == pytest.approx([step[rank] for step in result["expected"]], rel=allowed)
    assert len(set(result["losses"][0])) == STEPS, "the loss stands still: nothing was trained"


@pytest.mark.parametrize("case", [*EXACT, *OUTER])
def test_models_differ_within_a_round_and_are_one_once_settled(found, case):
    # Of seven steps, or four after a warm-up of three, none is left over where the round is one or two steps long.
    over = {"every step": 0, "warm-up": 0, "diloco after warm-up": 1}.get(case, 1)
    assert (found[case]["differed"] > 1e-4) == bool(over)
    assert found[case]["settled"]


def test_an_average_at_every_step_is_plain_data_parallel_training(found):
    """For SGD without momentum: sums over 8 rows in another order, in seven steps."""
    assert 0 <= found["as plain"] < 8 * STEPS * ROUNDING


def test_one_kth_of_the_parameters_is_sent_in_a_step(found):
    told, parameters = found["reported"]["parallel"], found["reported"]["parameters"]
    running = 2 * 8  # of the batch norm
    assert told["sent_bytes"]["value"] == (parameters + running) * 4 / 2
    assert "1 × all_reduce in 2 steps" in told["sent_bytes"]["method"]
    assert told["parts"] == ["data: the batch in 2 parts, parameters averaged every 2 steps"]


def test_the_report_tells_how_far_the_averaged_model_came(found):
    before, after = found["reported"]["losses"]
    assert after[0] == pytest.approx(before[0], rel=16 * ROUNDING), "the mean over both parts"
    lag = (after[4] - before[4]) / (before[0] - before[4])  # of steps 0, 2 and 4 the last half
    assert found["reported"]["lag"] == pytest.approx(max(0.0, lag), rel=1e-6)
    assert "optimizer state is each device's own" in found["reported"]["text"]


def test_parameters_that_no_loss_uses_are_named_and_left_alone(found):
    assert found["unused"] == {"skipped": ["spare.weight", "spare.bias"], "grown": [False, False]}


def test_a_checkpoint_ends_the_round_and_is_one_of_any_training(found):
    told, (straight, again) = found["resumed"]
    for rank in (0, 1):
        assert told[rank]["again"] == told[rank]["straight"][6:], "bit for bit: the same processes do the same"
        assert told[rank]["plain"] == told[0]["plain"], "data_parallel tells the loss over the whole batch"
        assert len(told[rank]["back"]) == 2
    assert straight == again
    mean = sum(told[rank]["straight"][6] for rank in (0, 1)) / 2
    assert told[0]["plain"][0] == pytest.approx(mean, rel=32 * ROUNDING), "it starts from the averaged model"


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ("local_sgd(sync_every=0)", "sync_every=0.*1 or more"),
        ("local_sgd(warmup_steps=-1)", "warmup_steps=-1.*0 or more"),
        ("local_sgd(outer_momentum=1.0)", "from 0 to below 1"),
        ("local_sgd(weights=(1, 0))", "numbers above 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(recipe, told):
    with pytest.raises(ValueError, match=told):
        chain_of(recipe)


@pytest.mark.parametrize(
    ("axes", "recipe", "told"),
    [
        ({"data": 2}, "local_sgd(weights=(1, 2, 3))", "3 entries for 2 devices"),
        ({"pipeline": 2, "data": 2}, "local_sgd", None),
        ({"data": 3}, "local_sgd", "cannot be shared by 3 devices evenly"),
        ({"data": 2, "tensor": 2}, "local_sgd", None),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(axes, recipe, told):
    torch = pytest.importorskip("torch")
    from perfkit.backends import backend
    from perfkit.parallel.layout import Layout

    settings = {"mode": "training", "loss": torch.nn.functional.mse_loss, "optimizer": torch.optim.SGD, "seed": 0}
    work = backend("torch").bind(torch.nn.Linear(4, 2), None, (torch.ones(4, 4),), targets=torch.ones(4, 2), **settings)
    work = work.replace(layout=Layout(tuple(axes), tuple(axes.values())))
    reason = next(iter(chain_of(recipe))).refusal(work)
    assert reason is None if told is None else told in reason


def test_the_page_shows_the_loss_curves_that_were_recorded():
    from bench import local_sgd, pages

    shown = pages.between(local_sgd.PAGE, local_sgd.MARKS)
    assert shown.strip() == "\n".join(local_sgd.measured()).strip(), "run python -m bench.local_sgd --page"


def test_the_steps_that_begin_with_averaged_models():
    recipe = next(iter(chain_of("local_sgd(sync_every=4, warmup_steps=2)")))
    assert recipe.judged_at(12) == [0, 1, 2, 6, 10, 11]
    assert recipe.judged_at(2) == [0, 1]
