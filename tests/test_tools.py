"""The small tools that the Makefile stands on; those of chapters and site are tested beside their rules."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path

import limit
import pytest

ROOT = Path(__file__).resolve().parent.parent
POSIX = pytest.mark.skipif(os.name != "posix", reason="process groups are POSIX")


@POSIX
@pytest.mark.parametrize("status", [0, 3])
def test_limit_passes_the_status_on(status: int):
    assert limit.run([sys.executable, "-c", f"raise SystemExit({status})"], 60) == status


@POSIX
def test_limit_ends_the_command_and_its_children(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    mark = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(2); pathlib.Path({str(mark)!r}).touch()"
    parent = (
        f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    )
    begin = time.monotonic()
    assert limit.run([sys.executable, "-c", parent], 0.5) == limit.TIMED_OUT
    assert time.monotonic() - begin < 10
    assert "ran past 0.5 s" in capfd.readouterr().err
    time.sleep(2)
    assert not mark.exists(), "a grandchild lived on"


@POSIX
def test_limit_ends_what_ignores_the_polite_signal():
    ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    stubborn = f"import signal, time; {ignore}; time.sleep(60)"
    begin = time.monotonic()
    assert limit.run([sys.executable, "-c", stubborn], 1.5, grace=0.5) == limit.TIMED_OUT
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("arguments", [[], ["10"], ["soon", "true"]])
def test_limit_says_how_it_is_used(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    assert limit.main(arguments) == 2
    assert capsys.readouterr().err.startswith("usage:")


def test_limit_must_be_positive():
    with pytest.raises(ValueError, match="must be positive, got 0 seconds"):
        limit.run(["true"], 0)


PINNED = ("requirements.txt", "requirements-course.txt", "requirements-test.txt", "requirements-triton.txt")


def pins(name: str) -> list[str]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return [line for line in lines if line and not line.startswith("-r ")]


def test_requirements_are_pinned_and_torch_is_the_first():
    assert pins("requirements.txt")[0].startswith("torch==")
    loose = [pin for name in PINNED for pin in pins(name) if "==" not in pin]
    assert loose == []


def test_pins_satisfy_what_the_package_asks_for():
    """pyproject's ranges and the pins are two lists; every direct dependency is in both."""
    import tomllib

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    pinned = {}
    for name in PINNED:
        for pin in pins(name):
            package, version = pin.partition(";")[0].strip().split("==")
            pinned[canonicalize_name(package)] = version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    asked = [
        Requirement(text) for text in [*project["dependencies"], *(r for extra in extras for r in extra)]
    ]
    for requirement in asked:
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement
    assert {canonicalize_name(requirement.name) for requirement in asked} == set(pinned)


def test_help_names_every_target_with_a_line_of_its_own():
    lines = (ROOT / "Makefile").read_text().splitlines()
    phony = {name for line in lines if line.startswith(".PHONY:") for name in line.split()[1:]}
    told = {match[1] for line in lines if (match := re.match(r"([a-z-]+):.*## ", line))}
    public = {
        "help",
        "book",
        "serve",
        "course",
        "test",
        "chapters",
        "fmt",
        "lint",
        "bench",
        "assets",
        "clean",
    }
    assert told == public
    assert public <= phony
