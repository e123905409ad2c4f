"""Data parallelism in JAX on four devices, and on two processes: what one device computes, to rounding."""

import itertools
import socket

import pytest

pytest.importorskip("jax")
pytest.importorskip("flax")

from jax_workers import result, start
from shared_runs import once

from perfkit._chain import chain_of
from perfkit._errors import InvalidInputError

MODELS, ENGINES = ("cnn2", "text_lstm", "transformer"), ("jit", "shard", "pmap")
ROUNDING = 2.0**-24


@pytest.fixture(scope="module")
def four() -> dict:
    return once("jax_on_four_devices", lambda: result(start("jax_on_four_devices.py", 4)))


@pytest.fixture(scope="module")
def two() -> list[dict]:
    return once("jax_on_two_processes", two_processes)


def two_processes() -> list[dict]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1] - 1  # jax's coordinator listens at the next one
    launcher = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [start("jax_on_two_processes.py", 2, RANK=str(rank), **launcher) for rank in range(2)]
    try:
        return [result(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()
            process.stderr.close()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("model", MODELS)
def test_losses_and_parameters_are_those_of_one_device(four, model, engine):
    found, one = four[model][engine], four[model]["one"]["losses"]
    # A loss differs as its parameters do, by less than a thousandth of what a step changes, and by its own rounding.
    change = max(abs(later - earlier) for earlier, later in itertools.pairwise(one))
    assert found["losses"] == pytest.approx(one, rel=8 * ROUNDING, abs=1e-3 * change)
    assert len(set(one)) == 5, "the loss stands still: nothing was trained"
    assert four[model]["moved"] > 1e3, "parameters moved no more than by rounding: nothing was compared"
    assert found["off"] < 1


@pytest.mark.parametrize("model", MODELS)
def test_the_original_is_untouched_and_stays_on_one_device(four, model):
    assert four[model]["one"]["devices"] == ["cpu:0"]
    assert four[model]["unchanged"]


@pytest.mark.parametrize("model", MODELS)
def test_what_is_sent_is_counted(four, model):
    found = four[model]
    whole, parameters = found["jit"]["bytes"]
    # Gradients of every parameter and the loss, by a ring of four: once in pmap's program.
    gradients = 2 * 3 / 4 * 4 * (parameters + 1)
    assert found["pmap"]["sent"] == gradients
    assert "1 all-reduce of" in found["pmap"]["told"]
    assert gradients <= found["jit"]["sent"] < 1.5 * gradients
    assert "all-gather" in found["shard"]["told"], "sharded weights are used without having been gathered"
    assert whole == found["pmap"]["bytes"][0] == 4 * parameters
    assert "in loops" not in found["jit"]["told"]


@pytest.mark.parametrize("rows", [8, 16])
@pytest.mark.parametrize("loop", ["recurrent", "rounded", "read_on_the_way"])
def test_sums_of_loops_are_the_same_apart(four, loop, rows):
    found = four["loops"][f"{loop} {rows}"]
    unit = 2.0**-8 if loop == "rounded" else 2.0**-23
    assert 0 < found["off"] < unit * found["terms"] ** 0.5
    assert found["in_loops"] == (loop == "read_on_the_way")


def test_loops_over_weights_in_parts_send_nothing(four):
    as_they_are, apart = four["shared_cell"]
    assert as_they_are > 0
    assert apart == 0


@pytest.mark.parametrize("model", MODELS)
def test_a_device_holds_a_quarter_of_what_can_be_shared_out(four, model):
    found = four[model]["shard"]
    (name, reason), held = *found["skipped"], found["bytes"][0]
    whole = {"cnn2": ("fc2.bias", 10), "text_lstm": ("fc.bias", 1), "transformer": ("head.bias", 10)}[model]
    assert name == whole[0]
    assert reason == f"no dimension of [{whole[1]}] can be divided by 4: every device holds it whole"
    assert held == (found["bytes"][1] - whole[1]) * 4 / 4 + whole[1] * 4


def test_the_optimizer_state_is_shared_out_as_the_parameters_are(four):
    expected = {"wide": [[16, 64], [[16, 16]] * 4], "long": [[64, 10], [[16, 10]] * 4], "bias": [[10], [[10]] * 4]}
    shards = four["shards"]
    for where in ("0.{}", "2.0.mu.{}", "2.0.nu.{}"):
        for name, shapes in expected.items():
            assert shards["before"][where.format(name)] == shapes
    assert shards["after"] == shards["before"] == shards["kept"]


def test_what_lies_along_another_axis_stays_there(four):
    found = four["two_axes"]
    assert found["parts"] == {"w": [[4, 6], [[2, 3]] * 4]}
    one, spread = found["losses"]
    assert spread == pytest.approx(one, rel=2 * (4 + 48 + 8) * ROUNDING)  # sums of so many numbers, in two steps
    assert one[0] != one[1]
    assert "these are data 2 × tensor 2: use engine='jit'" in found["refused"]


def test_devices_draw_random_numbers_of_their_own_and_average_statistics(four):
    # Of 1000 weights behind a dropout of a half, four masks leave 2⁻⁴ still, and one mask 2⁻¹.
    assert four["noise"]["still"] < 1 / 4
    assert any("running statistics" in note for note in four["noise"]["notes"])


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("data_parallel(compress=True)", "compress is torch's"),
        ("data_parallel(shard=True, offload=True)", "offload is torch's"),
        ("data_parallel(shard=True, engine='pmap')", "use engine='jit' with shard"),
        ("data_parallel(batch_dim=1)", "a batch of 6 rows (dimension 1) cannot be shared by 4 devices evenly"),
        ("data_parallel(batch_dim=2)", "no input has a dimension 2 to share out"),
        ("a batch of 6 by jit", "a batch of 6 rows (dimension 0) cannot be shared by 4 devices evenly"),
        ("a batch of 6 by pmap", "a batch of 6 rows (dimension 0) cannot be shared by 4 devices evenly"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(four, asked, told):
    assert told in four["refusals"][asked]


def test_an_engine_that_is_not_there_is_named():
    with pytest.raises(InvalidInputError, match=r"expected 'jit' or 'pmap'"):
        chain_of("data_parallel(engine='xmap')")


def test_pmap_is_refused_for_torch():
    torch = pytest.importorskip("torch")
    from perfkit.backends import backend
    from perfkit.parallel.layout import Layout

    settings = {"mode": "training", "loss": torch.nn.functional.mse_loss, "optimizer": torch.optim.SGD, "seed": 0}
    work = backend("torch").bind(torch.nn.Linear(4, 2), None, (torch.ones(4, 4),), targets=torch.ones(4, 2), **settings)
    (recipe,) = chain_of("data_parallel(engine='pmap')")
    assert "engine='pmap' is JAX's" in recipe.refusal(work.replace(layout=Layout(("data",), (2,))))


def test_optimize_reports_what_four_devices_gave(four):
    found = four["end_to_end"]
    parallel = found["parallel"]
    assert found["ok"]
    assert (parallel["layout"], parallel["devices"], parallel["processes"]) == ("data 4", 4, 1)
    assert parallel["parts"] == ["data: the batch in 4 parts, gradients averaged"]
    assert parallel["sent_bytes"]["value"] == 2 * 3 / 4 * 4 * (4 * 2 + 1)
    assert parallel["efficiency"]["value"] > 0
    assert parallel["communicating"]["unavailable"]
    assert parallel["rank_model_bytes"] == [4 * 2 * 4]
    for loss, expected in found["steps"]:  # sums of 4, then of 48 numbers
        assert loss == pytest.approx(expected, rel=64 * ROUNDING)


@pytest.mark.parametrize("engine", ["jit", "pmap"])
def test_two_processes_train_as_one(two, engine):
    for found in two:
        assert found["devices"] == [2, 4]
        assert found[engine]["ok"]
        # Sums of 8, of 24 and of 12 numbers in each of three steps.
        assert found[engine]["losses"] == pytest.approx(found["expected"], rel=3 * 44 * ROUNDING)
        parallel = found[engine]["parallel"]
        assert (parallel["devices"], parallel["processes"]) == (4, 2)
    assert two[0][engine]["losses"] == two[1][engine]["losses"]
    assert two[0][engine]["parallel"] == two[1][engine]["parallel"]


def test_a_pipeline_goes_through_two_processes(two):
    for found in two:
        result = found["stages"]
        # Sums of 8 and of 24 numbers in each of three steps; Adam carries a gradient's relative error on.
        assert result["losses"] == pytest.approx(result["one"], rel=3 * 44 * ROUNDING)
        assert result["losses"][0] > result["losses"][-1]
        assert result["loss of params"] == pytest.approx(result["next"], rel=44 * ROUNDING)
        assert (result["parallel"]["layout"], result["parallel"]["processes"]) == ("pipeline 2 × data 2", 2)
        assert result["parallel"]["rank_model_bytes"] == [8 * 5 * 4] * 2, "as much as the larger stage has"
    assert two[0]["stages"]["losses"] == two[1]["stages"]["losses"]


def test_a_pipeline_through_two_processes_gives_whole_outputs_on_each(two):
    for process in two:
        # Four layers of a product, whose sums have 8 numbers, and a tanh.
        assert max(process["called"]) <= 4 * 2 * 8**0.5 * 2.0**-24


def test_two_processes_that_average_at_every_step_train_as_one(two):
    """Each tells the loss of its own part of the batch, on parameters that are those of one process."""
    mean = [sum(losses) / 2 for losses in zip(*(found["local"]["losses"] for found in two), strict=True)]
    assert mean == pytest.approx(two[0]["expected"], rel=3 * 44 * ROUNDING)
    assert two[0]["local"]["losses"] != two[1]["local"]["losses"]
    assert two[0]["local"]["parallel"] == two[1]["local"]["parallel"]


def test_two_processes_hold_their_parts_alone(two):
    for found in two:
        assert found["jit"]["parts"] == [[2, 2], [2, 2]]
        assert found["pmap"]["parts"] == [[8, 2]]
        assert found["jit"]["parallel"]["rank_model_bytes"] == [2 * 2 * 4] * 2
