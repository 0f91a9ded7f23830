"""The package's arrows point down: who may import whom, read from the sources themselves."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parent.parent / "src"
PACKAGE = "llm_atlas"

LAYERS = {
    "core": 0,
    "nn": 1,
    "text": 1,
    "models": 2,
    "train": 2,
    "infer": 2,
    "adapt": 3,
    "align": 3,
    "compress": 3,
    "parallel": 3,
    "merge": 3,
    "scaling": 3,
    "prompt": 4,
    "retrieve": 4,
    "agents": 4,
    "evaluate": 4,
    "recipes": 5,
    "book": 6,
    "cli": 7,
    "__main__": 8,
}
# Within a layer nothing imports its neighbour, but for these: what trains or runs a model may know models.
SIDEWAYS = {("train", "models"), ("infer", "models")}


def owner(module: str) -> str:
    """The package of ours that a dotted name lies in: llm_atlas.nn.masks -> nn; llm_atlas itself -> ''."""
    return module.split(".")[1] if "." in module else ""


def imported(source: str, module: str, *, is_package: bool) -> set[tuple[int, str]]:
    """Line and dotted name of everything of ours that `module` imports anywhere in its text.

    Also inside functions and under TYPE_CHECKING, relative ones, and importlib.import_module of a literal.
    """
    found: set[tuple[int, str]] = set()
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".") if is_package else module.split(".")[:-1]
                anchor = parents[: len(parents) - (node.level - 1)]
                base = ".".join([*anchor, base] if base else anchor)
            # `from llm_atlas import nn` imports llm_atlas.nn; names further down lie in one package anyway.
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                names = [node.args[0].value]
        found |= {(node.lineno, name) for name in names if name == PACKAGE or name.startswith(f"{PACKAGE}.")}
    return found


def violations(src: Path) -> list[str]:
    """One line for each import of ours that does not point down."""
    wrong = []
    for file in sorted((src / PACKAGE).rglob("*.py")):
        parts = file.relative_to(src).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        here = owner(module)
        if here and here not in LAYERS:
            wrong.append(f"{module}: {here} has no layer; give it one in tests/test_layers.py")
            continue
        for line, name in sorted(imported(file.read_text(encoding="utf-8"), module, is_package=is_package)):
            there = owner(name)
            if there in (here, "__version__"):
                continue
            if not there:
                if here:  # `import llm_atlas` makes every package reachable by attribute, unseen by this test
                    wrong.append(f"{module}:{line} imports {name}; import the package it needs")
            elif there not in LAYERS:
                wrong.append(f"{module}:{line} imports {name}, which has no layer")
            elif not here:
                wrong.append(f"{module}:{line} imports {name}; llm_atlas itself stays light")
            elif LAYERS[there] >= LAYERS[here] and (here, there) not in SIDEWAYS:
                wrong.append(f"{module}:{line} imports {name}: {here} may not import {there}")
    return wrong


def test_the_arrows_point_down():
    assert violations(SRC) == []


def test_the_package_is_read_at_all():
    assert len(list((SRC / PACKAGE).rglob("*.py"))) > 5


# Each fault is one that a hurried change would make. `path` is the module that gets `text`.
@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("nn/block.py", "from llm_atlas.models import decoder", "nn may not import models"),
        ("nn/block.py", "import llm_atlas.infer.generate", "nn may not import infer"),
        ("nn/block.py", "from ..text import byte_bpe", "nn may not import text"),
        ("nn/__init__.py", "from .. import text", "nn may not import text"),
        ("nn/block.py", "def f():\n    from llm_atlas.book import style", "nn may not import book"),
        ("core/x.py", "import importlib\nimportlib.import_module('llm_atlas.nn')", "core may not import nn"),
        ("train/loop.py", "from llm_atlas import infer", "train may not import infer"),
        ("models/decoder.py", "from llm_atlas.train.loop import fit", "models may not import train"),
        ("merge/ties.py", "from llm_atlas.adapt.lora import LoRA", "merge may not import adapt"),
        ("recipes/x.py", "from llm_atlas.book import claims", "recipes may not import book"),
        ("book/x.py", "from llm_atlas.cli import app", "book may not import cli"),
        ("nn/block.py", "import llm_atlas", "import the package it needs"),
        ("utils/x.py", "", "utils has no layer"),
        ("nn/block.py", "from llm_atlas.utils import x", "which has no layer"),
        ("__init__.py", "from llm_atlas import nn", "stays light"),
    ],
)
def test_a_planted_import_is_found(tmp_path: Path, path: str, text: str, expected: str):
    file = tmp_path / PACKAGE / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    found = violations(tmp_path)
    assert len(found) == 1
    assert expected in found[0]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("nn/block.py", "from llm_atlas.core.device import pick_device\nfrom .masks import causal_mask"),
        ("nn/__init__.py", "from .attention import attend"),
        ("infer/generate.py", "from llm_atlas.models.decoder import Decoder\nfrom ..nn import cache"),
        ("book/x.py", "from llm_atlas import nn, recipes\nimport torch.nn"),
        ("cli.py", "from llm_atlas import __version__\nfrom llm_atlas.book import concepts"),
        ("__init__.py", "import importlib\n__version__ = '1'"),
    ],
)
def test_a_downward_import_is_allowed(tmp_path: Path, path: str, text: str):
    file = tmp_path / PACKAGE / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    assert violations(tmp_path) == []
