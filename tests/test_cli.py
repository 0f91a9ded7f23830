"""The command line, run as a reader runs it; and the import that everything waits for."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import llm_atlas
from llm_atlas.book.concepts import STATES
from llm_atlas.cli import State, app
from llm_atlas.core import assets

SOURCE = os.path.dirname(os.path.dirname(llm_atlas.__file__))


def run(*arguments: str):
    result = CliRunner().invoke(app, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def start(*arguments: str, **more) -> subprocess.Popen:
    """A process of its own, for signals and for what is written to which stream."""
    return subprocess.Popen(
        [sys.executable, "-m", "llm_atlas.cli", *arguments],
        env=os.environ | {"PYTHONPATH": SOURCE, "PYTHONUTF8": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **more,
    )


def fails(*arguments: str, status: int = 1) -> str:
    result = run(*arguments)
    assert result.exit_code == status
    assert result.stdout == ""
    if status == 1:
        assert result.stderr.startswith("llm-atlas: ")
        assert result.stderr.count("\n") == 1
    return result.stderr


def test_generate_writes_real_text():
    first = run("generate", "What is the capital of France?", "--max-new-tokens", "10", "--dtype", "float32")
    assert first.exit_code == 0
    assert "Paris" in first.stdout
    assert "<|" not in first.stdout
    assert first.stderr == ""


def test_generate_writes_on_from_the_prompt():
    arguments = (
        "generate",
        "One, two, three, four,",
        "--no-chat",
        "--max-new-tokens",
        "4",
        "--dtype",
        "float32",
    )
    assert run(*arguments).stdout.strip() == "five, six,"


def test_the_seed_decides():
    def text(seed: int) -> str:
        options = ["--temperature", "1.5", "--seed", str(seed), "--max-new-tokens", "5", "--no-chat"]
        return run("generate", "A story:", *options).stdout

    first = text(1)
    assert text(1) == first
    assert text(2) != first


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((" \n",), "the prompt is empty"),
        (("x", "--device", "tpu"), "'tpu' is not a device"),
        (("x", "--max-new-tokens", "9000"), "do not fit the context of 8192"),
        (("word " * 9000,), "do not fit the context of 8192"),
        (("a\ud800",), "lone surrogate"),
    ],
)
def test_generate_refuses(arguments, told):
    assert told in fails("generate", *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate",),
        ("generate", "x", "--dtype", "int8"),
        ("generate", "x", "--max-new-tokens", "0"),
        ("generate", "x", "--temperature", "-1"),
        ("concepts", "--state", "finished"),
        ("concepts", "--chapter", "one"),
        ("course", "one"),
        ("write",),
    ],
)
def test_usage(arguments):
    assert "Usage: " in fails(*arguments, status=2)


def test_assets(monkeypatch):
    for arguments in (["assets"], ["assets", "--verify"]):
        result = run(*arguments)
        assert result.exit_code == 0
        for asset in assets.ASSETS.values():
            assert f"{asset.name}  {asset.bytes / 1e6:.1f} MB, {asset.licence}" in result.stdout
            assert str(asset.path) in result.stdout
        assert ("sha256 right" in result.stdout) == (len(arguments) == 2)


def test_one_asset_that_fails_does_not_stop_the_others(monkeypatch):
    fetch = assets.fetch

    def broken(name):
        if name == "smollm2-135m-instruct":
            raise assets.AssetError(name, "the network\nis down", "try later")
        return fetch(name)

    monkeypatch.setattr(assets, "fetch", broken)
    result = run("assets")
    assert result.exit_code == 1
    assert result.stderr == "llm-atlas: smollm2-135m-instruct: the network is down; try later\n"
    assert "king-james" in result.stdout


def test_concepts():
    every = run("concepts").stdout.splitlines()
    assert len(every) == 148
    assert every[-1] == "147 of 147 concepts"
    first = run("concepts", "--chapter", "1").stdout.splitlines()
    assert first[0].split()[:2] == ["1", "self-attention"]
    assert first[-1] == "9 of 147 concepts"
    counts = [int(run("concepts", "--state", state).stdout.splitlines()[-1].split()[0]) for state in STATES]
    assert sum(counts) == 147
    assert "chapter 23 must be 1 to 22" in fails("concepts", "--chapter", "23")


def test_course(monkeypatch, tmp_path):
    from llm_atlas.book import course

    asked = []
    rows = (course.Exercise(concept="rope", title="Turn"),)
    monkeypatch.setattr(
        course, "write_course", lambda *given, **named: asked.append((given, named)) or {2: rows, 3: rows * 2}
    )
    result = run("course", "2", "3", "--output", str(tmp_path / "c"))
    assert result.exit_code == 0
    assert asked == [((tmp_path / "c", [2, 3]), {"folder": Path("chapters")})]
    assert result.stdout.splitlines()[:3] == [
        "chapter 2: 1 exercises, 3 points",
        "chapter 3: 2 exercises, 6 points",
        "chapter 2 builds on chapter 1, which this course leaves out",
    ]
    assert "release/ is for students" in result.stdout


def test_course_refuses(tmp_path):
    assert "chapter 23 must be 1 to 22" in fails("course", "23", "--output", str(tmp_path / "c"))
    assert "holds no chapter" in fails("course", "--folder", str(tmp_path))


def test_states_are_the_books():
    assert tuple(State) == STATES


def test_version_and_help():
    assert run("--version").stdout.strip() == llm_atlas.__version__
    assert {"generate", "assets", "concepts"} <= set(run("--help").stdout.split())


@pytest.mark.skipif(os.name == "nt", reason="signals of this kind are POSIX's")
def test_ctrl_c_is_quiet():
    process = start("generate", "Count to a thousand.", "--max-new-tokens", "4000", start_new_session=True)
    assert process.stdout.read(1)  # it has begun to write
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == b""


@pytest.mark.skipif(os.name == "nt", reason="pipes of this kind are POSIX's")
def test_a_reader_that_has_seen_enough():
    process = start("concepts")
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(30) == 1


def seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": SOURCE}, check=True)
    return time.perf_counter() - start


def test_import_is_light():
    """No torch, and less than 0.3 s above an empty interpreter; the best of three, on a busy machine."""
    code = "import sys, llm_atlas; sys.exit('torch' in sys.modules)"
    light = min(seconds(code) - seconds("pass") for _ in range(3))
    assert light < 0.3


@pytest.mark.parametrize("command", ["--help", "assets", "concepts"])
def test_commands_that_compute_nothing_do_without_torch(command):
    code = f"""
import sys
from llm_atlas.cli import app
try:
    app([{command!r}])
except SystemExit as end:
    assert end.code == 0, end.code
sys.exit("torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": SOURCE}, check=True)


def test_subpackages_come_when_touched():
    code = (
        "import llm_atlas; print(llm_atlas.text.byte_bpe if 0 else llm_atlas.text.__name__, dir(llm_atlas))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": SOURCE},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("llm_atlas.text ")
    assert {"core", "nn", "text", "models", "infer", "book"} <= set(dir(llm_atlas))
    with pytest.raises(AttributeError, match="no attribute 'poetry'"):
        _ = llm_atlas.poetry
