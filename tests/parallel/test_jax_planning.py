"""The planner for JAX: what the programs of layouts send and hold, and predictions from them, on four devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jax")
pytest.importorskip("flax")

from jax_workers import result, start
from shared_runs import once

from perfkit.measure.kept_memory import KEPT_BYTES
from perfkit.parallel.jax_handing import SIZES

IN, HIDDEN, OUT, ROWS = 8, 16, 4, 32
WHOLE = 4 * (IN * HIDDEN + HIDDEN * OUT)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def four() -> dict:
    return once("jax_planning_on_four_devices", lambda: result(start("jax_planning_on_four_devices.py", 4)))


def sent(program: dict, kind: str) -> float:
    return sum(size * times for name, size, _, times in program["sends"] if name == kind)


LAYOUTS = {
    "data 4",
    "data 4, sharded",
    "tensor 4",
    "data 2 × tensor 2",
    "data 2, sharded × tensor 2",
    "pipeline 2 of 8 × data 2",
    "pipeline 2 of 8 × data 2, sharded",
}


def test_layouts_that_cannot_be_are_told(four):
    found, refused = four["programs"]
    assert set(found) == LAYOUTS
    (reason,) = refused
    assert reason.startswith("pipeline 4 of 16: 4 stages were asked for, and model cannot be cut into so many")


@pytest.mark.parametrize("along", ["programs", "second dimension"])
def test_programs_tell_what_is_sent(four, along):
    found, _ = four[along]
    assert set(found) >= LAYOUTS
    plain = found["data 4"]
    assert sent(plain, "all_reduce") == WHOLE + 4, "the gradients and the loss"
    assert all(ranks == 4 for _, _, ranks, _ in plain["sends"])
    assert sent(found["data 4, sharded"], "all_gather") >= WHOLE, "weights are gathered before they are used"
    assert any(ranks == 2 for _, _, ranks, _ in found["data 2 × tensor 2"]["sends"])


def test_a_pipeline_sends_in_every_turn(four):
    found = four["programs"][0]["pipeline 2 of 8 × data 2"]
    cut = 2 * HIDDEN * 4  # of a micro-batch's two rows
    assert found["handed"] == cut
    assert all(size != cut for kind, size, _, _ in found["sends"] if kind == "send"), "counted once, by turns"
    (first, second), sizes = zip(*found["stages"], strict=True)
    assert first + second == pytest.approx(1)
    assert sizes == (4 * IN * HIDDEN, 4 * HIDDEN * OUT)
    assert found["bytes"] == 4 * IN * HIDDEN, "as much as the larger stage has"


def test_programs_tell_what_a_device_holds_and_computes(four):
    found = four["programs"][0]
    assert found["data 4"]["bytes"] == WHOLE
    assert found["data 4, sharded"]["bytes"] == found["tensor 4"]["bytes"] == WHOLE / 4
    assert found["data 2, sharded × tensor 2"]["bytes"] == WHOLE / 4
    assert found["pipeline 2 of 8 × data 2, sharded"]["bytes"] == 4 * IN * HIDDEN / 2
    assert found["data 4"]["kept"] == 1
    assert found["data 4"]["stages"] == []
    assert found["tensor 4"]["kept"] == pytest.approx(1 / 4), (
        "tanh stands between split layers, and is split as they are"
    )
    for layout in ("data 2 × tensor 2", "data 2, sharded × tensor 2"):
        assert found[layout]["kept"] == pytest.approx(1 / 2), layout
    assert all(program["temporary"] > 0 for program in found.values())


def test_a_loop_is_split_where_its_weights_or_what_it_makes_are(four):
    found = four["loops"]
    assert found["gathered"] == {"dot_general": 1 / 4, "scan": 1, "sum": 1}
    assert found["weights"] == {"dot_general": 1 / 4, "scan": 1 / 4, "sum": 1 / 4}


def test_a_convolution_in_parts_is_timed(four):
    """By what it reads here: the images whole and a fourth of the kernel."""
    images, kernel = 2 * 8 * 8 * 4, 3 * 3 * 4 * 16
    by_outputs, apart = four["convolutions"]
    assert by_outputs == [(images + kernel / 4) / (images + kernel)]
    assert apart == [1 / 4], "parts that do not go together are brought together first"


def test_every_device_makes_the_whole_call_by_itself(four):
    found = four["each"]
    assert found["off"] == 0
    assert found["losses"] == [found["loss"]] * 4
    assert found["waited for"] == [found["loss"], 0, 0, 0], "others wait and compute nothing"
    assert found["met"] == found["loss"]


def test_a_forward_alone_has_the_loss_and_no_gradients(four):
    assert four["each"]["forward"] == [four["each"]["loss"], 0]


def test_what_is_timed(four):
    found = four["costs"]
    assert found["rows"] == [[2, 4, 8, 16, 32]] * 2
    assert found["gradients"] == [4 * IN * HIDDEN, 4 * HIDDEN * OUT]
    assert found["batch"] == [[8, IN], [8, OUT]]
    assert all(seconds >= 0 for seconds in found["seconds"])
    assert found["again"] >= 1
    assert found["adding"] > 0
    assert found["fresh"] >= 0
    assert found["temporary"] > 0
    kept, anew = found["memory"]
    assert 0 < kept <= KEPT_BYTES < anew
    assert found["turns"] == list(SIZES)
    assert 1 <= found["crowding"] <= 4
    assert found["kinds"] == ["all_gather", "all_reduce", "reduce_scatter", "send"]
    assert found["others"] == {"other": 2}


@pytest.mark.parametrize("link", ["given", "measured"])
def test_layouts_are_ranked(four, link):
    found = four[link]
    assert set(found["ways"]) == LAYOUTS
    assert found["steps"] == sorted(found["steps"])
    assert "what programs send was read from their HLO" in " ".join(found["text"].split())


def test_what_cannot_be_is_told_with_the_reason(four):
    found = four["changing"]  # a model whose one weight is not multiplied, and whose state changes
    assert set(found["ways"]) == {layout for layout in LAYOUTS if "tensor" not in layout} | {"pipeline 4 of 16"}
    text = " ".join(found["text"].split())
    for layout in ("tensor 4", "data 2 × tensor 2", "data 2, sharded × tensor 2"):
        assert f"not possible: {layout}: no layer can be split" in text
    assert "JAX sees 4 device(s) in 1 process(es), and programs for 8 are compiled on as many" in four["eight"]


FACTORY = """
import jax.numpy as jnp, optax

def make():
    def model(params, x):
        return jnp.tanh(x @ params["up"]) @ params["down"]

    def loss(outputs, targets):
        return jnp.mean((outputs - targets) ** 2)

    params = {"up": jnp.ones((8, 16)), "down": jnp.ones((16, 4))}
    about = {"example_inputs": (jnp.ones((8, 8)),), "targets": jnp.ones((8, 4)), "loss": loss}
    return about | {"model": model, "params": params, "optimizer": optax.sgd(0.1)}
"""


def test_the_command_line_starts_a_process_with_as_many_devices(tmp_path):
    (tmp_path / "made_here.py").write_text(FACTORY)
    command = [sys.executable, "-m", "perfkit.cli", "plan", "made_here:make", "--parallel", "--framework", "jax"]
    about = {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    done = subprocess.run(
        [*command, "--devices", "2", "--link-gbps", "10"],
        cwd=tmp_path,
        env=os.environ | about,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "2 devices (cpu)" in done.stdout
    for layout in ("data 2", "data 2, sharded", "tensor 2", "pipeline 2 of 8"):
        assert layout in done.stdout
