"""Recipes found by file name, in the folder and in folders of one's own; files that are none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import perfkit
from perfkit import InvalidInputError
from perfkit._recipe_files import names

ROOT = Path(__file__).parents[1]


def test_recipes_are_the_files_in_the_folder():
    assert {"bf16", "channels_last", "compile", "fp16", "half", "tf32"} <= set(names())
    assert [info.name for info in perfkit.recipes()] == list(names())


def test_a_broken_recipe_file_hurts_no_other(tmp_path):
    """The folder with one broken file more, as a package of its own in a fresh interpreter."""
    code = f"""
import pathlib, sys, perfkit.recipes
broken = pathlib.Path({str(tmp_path)!r}) / "broken.py"
broken.write_text("import a_module_that_does_not_exist")
perfkit.recipes.__path__.append({str(tmp_path)!r})
from perfkit._recipe_files import catalog
found = {{info.name: info for info in catalog()}}
assert "a_module_that_does_not_exist" in found["broken"].summary
assert found["bf16"].frameworks == ("torch", "jax")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


OWN = """
from dataclasses import dataclass
from perfkit import Effect, Recipe, Stage

@dataclass(frozen=True, kw_only=True)
class Mine(Recipe):
    \"\"\"Do as I say.\"\"\"

    stage = Stage.STRUCTURE

    def torch(self, work):
        return work, Effect(notes=("said",))

RECIPE = Mine
"""


def with_folder(folder, code):
    """What a fresh interpreter prints whose PERFKIT_RECIPES names a folder."""
    environment = os.environ | {"PERFKIT_RECIPES": str(folder)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, env=environment, cwd=ROOT, capture_output=True, text=True).stdout


def test_a_file_in_a_folder_of_ones_own_is_found_everywhere(tmp_path):
    pytest.importorskip("torch")
    (tmp_path / "mine.py").write_text(OWN)
    code = """
import runpy, sys
import torch, perfkit
from perfkit import cli
from click.testing import CliRunner
assert "Do as I say." in CliRunner().invoke(cli.main, ["recipes"]).output
plan = perfkit.plan(torch.nn.Linear(4, 4), "compile+mine", example_inputs=(torch.ones(2, 4),))
assert [step.recipe for step in plan.steps] == ["mine", "compile"]
assert plan.steps[0].effect.notes == ("said",)
auto = perfkit.plan(torch.nn.Linear(4, 4), example_inputs=(torch.ones(2, 4),))
assert [item.reason for item in auto.candidates if item.recipe == "mine"] == ["said"]
sys.path.append("tests")
assert ("mine", "torch", "cnn") in runpy.run_path("tests/recipes/test_contract.py")["CASES"]
assert "mine" in runpy.run_path("bench/test_recipes.py")["RECIPES"]
"""
    with_folder(tmp_path, code)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("broken", "import a_module_that_does_not_exist", "a_module_that_does_not_exist"),
        ("forgot", "from perfkit import Recipe", "RECIPE = YourClass"),
        ("plain", OWN.replace("@dataclass(frozen=True, kw_only=True)", ""), "write @dataclass"),
        ("nowhere", OWN.replace("stage = Stage.STRUCTURE", ""), "its place in a chain"),
    ],
)
def test_a_file_that_is_no_recipe_is_told_and_hurts_no_other(tmp_path, name, text, said):
    pytest.importorskip("torch")
    (tmp_path / f"{name}.py").write_text(text)
    code = f"""
import torch, perfkit
print([info.summary for info in perfkit.recipes() if info.name == {name!r}])
plan = perfkit.plan(torch.nn.Linear(4, 4), example_inputs=(torch.ones(2, 4),))
print([item.reason for item in plan.candidates if item.recipe == {name!r}])
assert "bf16" in str(plan)
"""
    listed, planned = with_folder(tmp_path, code).splitlines()
    assert said in listed
    assert said in planned


@pytest.mark.parametrize(("folder", "said"), [("nowhere", "no folder"), ("twice", "another name")])
def test_folders_that_cannot_be_used_are_refused(tmp_path, monkeypatch, folder, said):
    (tmp_path / "twice").mkdir()
    (tmp_path / "twice" / "bf16.py").write_text(OWN)
    monkeypatch.setattr(perfkit.recipes, "__path__", [*perfkit.recipes.__path__, str(tmp_path / folder)])
    with pytest.raises(InvalidInputError, match=said):
        names()
