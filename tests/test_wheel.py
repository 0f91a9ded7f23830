"""The wheel is whole: installed alone into an empty folder, it carries its data and works far from the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.wheel
ROOT = Path(__file__).resolve().parents[1]

# Runs in an empty working directory, with the folder of the installed wheel on the path and the checkout not.
INSTALLED = """
import math, sys
from pathlib import Path

folder, checkout = map(Path, sys.argv[1:])
# An editable install of the checkout puts it on every path of this environment.
sys.path[:] = [entry for entry in sys.path if not Path(entry).resolve().is_relative_to(checkout / "src")]

import llm_atlas
assert Path(llm_atlas.__file__).is_relative_to(folder), llm_atlas.__file__

from llm_atlas.core.assets import bundled
assert bundled("concepts.yml").is_relative_to(folder), bundled("concepts.yml")

from llm_atlas.book.concepts import load_concepts
assert len(load_concepts()) == 147

from llm_atlas.book.claims import load_claims
from llm_atlas.book import check, claim
assert len(load_claims()) > 10
assert claim("ffn-4x", 4.0).outcome == "held"
assert claim("ffn-4x", 9.0).outcome == "not here"

from llm_atlas.book.course import mark
missing = {"nbgrader", "nbformat", "myst_parser", "markdown_it", "docutils", "pybtex"} & set(sys.modules)
assert not missing, f"a student's notebook would need {missing}"

right = lambda q, k, v: (q @ k.T / math.sqrt(q.shape[-1])).softmax(-1) @ v
assert check("self-attention", right).state == "right", check("self-attention", right)
mark("self-attention", right)
assert check("self-attention", lambda q, k, v: (q @ k.T).softmax(-1) @ v).state == "wrong"

assert not [name for name, module in sys.modules.items()
            if name.startswith("llm_atlas") and not Path(module.__file__).is_relative_to(folder)]
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    [path] = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("installed") / "packages"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--target",
        str(folder),
        str(wheel),
    ]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_module_and_asset_is_in_it(wheel):
    def files(folder: Path, inside: str) -> set[str]:
        found = (p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
        return {f"{inside}/{p.relative_to(folder).as_posix()}" for p in found}

    wanted = files(ROOT / "src/llm_atlas", "llm_atlas") | files(ROOT / "assets", "llm_atlas/_assets")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        info = {Path(name).name for name in archive.namelist() if ".dist-info/" in name}
    assert held == wanted
    assert {"METADATA", "entry_points.txt", "LICENSE"} <= info


def test_it_works_far_from_the_checkout(installed, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", INSTALLED, str(installed), str(ROOT)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr


def test_its_command_runs(installed, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "llm_atlas.cli", "concepts", "--chapter", "1"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("9 of 147 concepts\n")
