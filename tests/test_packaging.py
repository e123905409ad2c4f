"""What is installed is what is in the tree."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel, built from a copy of the tree so that no build folder is left in it."""
    import shutil

    tree, dist = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for folder in ("perfkit", "kernels", "recipes"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tree / file)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(dist), str(tree)]
    subprocess.run(build, check=True, capture_output=True)
    return zipfile.ZipFile(next(dist.glob("*.whl")))


def test_the_wheel_has_one_top_level_name(wheel):
    names = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"perfkit"}


def test_every_source_file_is_in_the_wheel(wheel):
    packed = set(wheel.namelist())
    for folder, package in {"perfkit": "perfkit", "kernels": "perfkit/kernels", "recipes": "perfkit/recipes"}.items():
        for path in (ROOT / folder).rglob("*"):
            if (
                path.suffix in (".py", ".html", ".js", ".typed", ".json", ".cpp", ".hpp")
                and "__pycache__" not in path.parts
            ):
                assert f"{package}/{path.relative_to(ROOT / folder)}" in packed


def test_the_wheel_brings_the_command_and_the_license(wheel):
    info = {name.split(".dist-info/")[1]: name for name in wheel.namelist() if ".dist-info/" in name}
    assert "perfkit = perfkit.cli:main" in wheel.read(info["entry_points.txt"]).decode()
    assert "licenses/LICENSE" in info
    requirements = [
        line for line in wheel.read(info["METADATA"]).decode().splitlines() if line.startswith("Requires-Dist")
    ]
    base = {re.match(r"Requires-Dist: ([\w-]+)", line)[1] for line in requirements if "extra ==" not in line}
    assert base == {"numpy", "rich", "click", "jinja2", "safetensors"}
