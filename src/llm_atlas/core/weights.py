"""Reading and writing weight files: GGUF and safetensors."""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llm_atlas.core.assets import cache_dir

GGUF_TYPES = ("F32", "F16", "Q8_0", "Q4_1")
"""The block formats of GGUF that are read here."""

_CACHE_FORMAT = "1"  # raise it when what is written into the cache changes
_MAX_ARRAY = 1 << 21  # the longest real list, a vocabulary's merges, has about half a million entries


class _LazyTensors(Mapping[str, Tensor]):
    """name -> float32 tensor, dequantized anew each time it is asked for."""

    def __init__(self, path: Path, tensors: list[Any]):
        self._path = path
        self._tensors = {tensor.name: tensor for tensor in tensors}

    def __getitem__(self, name: str) -> Tensor:
        import gguf

        tensor = self._tensors[name]
        kind = tensor.tensor_type.name
        if kind not in GGUF_TYPES:
            raise ValueError(
                f"{self._path}: tensor {name!r} has type {kind}; readable are {', '.join(GGUF_TYPES)}"
            )
        with np.errstate(all="ignore"):  # damaged scales overflow; that is said below
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if not np.isfinite(values).all():
            raise ValueError(
                f"{self._path}: tensor {name!r} holds non-finite values; delete it and fetch it again"
            )
        # A copy, because float32 comes back as a view of the read-only file.
        return torch.from_numpy(np.array(values, dtype=np.float32, copy=True))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@dataclass(frozen=True)
class GGUF:
    """A GGUF file in memory.

    metadata: its key-value pairs as plain Python values (`llama.block_count` -> 30, `tokenizer.ggml.tokens`
              -> list).
    tensors:  name -> tensor in PyTorch's order of axes, (out, in) for a matrix; names are the file's own.
    types:    name -> the format the file stores it in, such as "Q4_1".
    """

    metadata: Mapping[str, Any]
    tensors: Mapping  # [str, Tensor]; unsaid, since a type checker at run time would dequantize one to look
    types: Mapping[str, str] = field(default_factory=dict)


def _bounded_reader(path: Path):
    """gguf's reader, made to stop at the end of the file.

    gguf's own slices a memory map, and a slice past the end is silently short: a length field damaged into
    2**50 then loops over nothing until memory runs out.
    """
    import gguf

    class Reader(gguf.GGUFReader):
        def _get(self, offset, dtype, count=1, *args, **kwargs):
            stop = int(offset) + int(count) * np.dtype(dtype).itemsize
            if stop > len(self.data):
                raise ValueError(f"byte {stop} is asked for and the file ends at {len(self.data)}")
            return super()._get(offset, dtype, count, *args, **kwargs)

        def _get_field_parts(self, orig_offs, raw_type):
            if int(raw_type) != gguf.GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            kind = gguf.GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
            length = int(self._get(orig_offs + 4, np.uint64)[0])
            if length > _MAX_ARRAY:
                raise ValueError(f"a list of {length} entries is declared at byte {orig_offs}")
            if kind == gguf.GGUFValueType.ARRAY:
                raise ValueError(f"a list of lists is declared at byte {orig_offs}")
            # A vocabulary is 150,000 entries; gguf's several arrays for each take three seconds.
            data, parts, offset = memoryview(self.data), [], orig_offs + 12
            types = [gguf.GGUFValueType.ARRAY, kind]
            if kind != gguf.GGUFValueType.STRING:
                values = self._get(offset, self.gguf_scalar_to_np[kind], length)
                return 12 + values.nbytes, [values], [0], types
            for _ in range(length):
                start = offset + 8
                offset = start + int.from_bytes(data[offset:start], "little")
                if offset > len(data):
                    raise ValueError(f"byte {offset} is asked for and the file ends at {len(data)}")
                parts.append(np.frombuffer(data[start:offset], np.uint8))
            return offset - orig_offs, parts, list(range(length)), types

    return Reader(path)


def read_gguf(path: str | os.PathLike[str]) -> GGUF:
    """Read a GGUF file: metadata at once, each tensor dequantized to float32 when it is asked for.

    F32 and F16 are plain numbers. Q8_0 keeps 32 int8 values and a float16 scale, $w = d\\,q$, 8.5 bits a
    weight. Q4_1 keeps 32 4-bit values with a float16 scale and minimum, $w = d\\,q + m$, 5 bits a weight.
    Cost: a header with a vocabulary of 50,000 takes half a second, dequantizing 135 million weights some seconds;
    `load_gguf` does both once. GGUF specification, version 3 (ggml/docs/gguf.md).
    Errors: FileNotFoundError; ValueError for a file that is truncated, damaged or no GGUF, and, when that
    tensor is asked for, for a block format not in `GGUF_TYPES`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with np.errstate(all="raise"):
            reader = _bounded_reader(path)
            # gguf adds three entries of its own about the file, GGUF.version and two counts.
            metadata = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
            for tensor in reader.tensors:
                if tensor.n_elements == 0:
                    raise ValueError(f"tensor {tensor.name!r} has shape {tensor.shape[::-1].tolist()}")
    except (ValueError, KeyError, IndexError, TypeError, ArithmeticError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: not a whole GGUF file ({why}); delete it and fetch it again") from None
    if reader.byte_order != "I":
        raise ValueError(f"{path}: written for the other byte order; fetch a little-endian GGUF file")
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    return GGUF(metadata, _LazyTensors(path, reader.tensors), types)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _dequantized_path(path: Path) -> Path:
    # Beside an asset of ours, which lives in the cache already; never beside a file of the user's.
    if path.is_relative_to(cache_dir().resolve()):
        return path.with_name(path.name + ".safetensors")
    key = hashlib.sha256(str(path).encode()).hexdigest()[:12]
    return cache_dir() / "dequantized" / f"{path.stem}-{key}.safetensors"


def _cached_header(cached: Path, path: Path) -> dict[str, Any] | None:
    """The header of `cached` if it was made from the file that lies at `path` now, else None."""
    try:
        with safe_open(cached, "pt") as file:
            notes = file.metadata() or {}
    except (OSError, SafetensorError):
        return None
    if notes.get("format") != _CACHE_FORMAT:
        return None
    stat = path.stat()
    if notes["source_size"] != str(stat.st_size):
        return None
    # The same size and time of change is taken for the same file, as make does; hashing costs more than this.
    if notes["source_mtime_ns"] != str(stat.st_mtime_ns) and notes["source_sha256"] != _sha256(path):
        return None
    return json.loads(notes["gguf"])


def load_gguf(
    path: str | os.PathLike[str], *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> GGUF:
    """Load a GGUF file with all its tensors, dequantized, in `dtype` (float32 if None) on `device`.

    The first call writes the float32 values and the metadata to one safetensors file in the cache (4 bytes a
    weight, 540 MB for SmolLM2-135M); later calls map that file, which takes a fraction of a second. A source
    that changed is read again. Where the cache cannot be written the values are returned all the same, at
    the cost of the first call.
    Errors: as `read_gguf`, at once for all tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    path = path.resolve()
    cached = _dequantized_path(path)
    header = _cached_header(cached, path)
    if header is None:
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{cached}.lock"):
                header = _cached_header(cached, path) or _fill_cache(cached, path)
        except OSError:
            # The cache is read-only or full. If it was the source that failed, it fails again here, by name.
            source = read_gguf(path)
            return GGUF(source.metadata, _moved(dict(source.tensors), dtype, device), source.types)
    return GGUF(header["metadata"], load_safetensors(cached, dtype=dtype, device=device), header["types"])


def _fill_cache(cached: Path, path: Path) -> dict[str, Any]:
    # The lock is held, so these are of processes that were killed.
    for stale in cached.parent.glob(f".{cached.name}.*.part"):
        stale.unlink()
    stat = path.stat()
    source = read_gguf(path)
    header = {"metadata": source.metadata, "types": source.types}
    notes = {
        "format": _CACHE_FORMAT,
        "source_size": str(stat.st_size),
        "source_mtime_ns": str(stat.st_mtime_ns),
        "source_sha256": _sha256(path),
        "gguf": json.dumps(header),
    }
    save_safetensors(source.tensors, cached, notes)
    return header


def _moved(
    tensors: dict[str, Tensor], dtype: torch.dtype | None, device: torch.device | str
) -> dict[str, Tensor]:
    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

    return {name: move(tensor) for name, tensor in tensors.items()}


def load_safetensors(
    path: str | os.PathLike[str], *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Every tensor of a safetensors file; floating-point ones in `dtype` if given, all on `device`.

    On the CPU without a change of dtype the values are mapped from the file and read when first touched.
    Errors: FileNotFoundError; ValueError for a truncated or damaged file and for anything else, such as a
    pickle, which is never opened, since loading a pickle runs the code in it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _moved(tensors, dtype, device)
    except SafetensorError as error:
        with path.open("rb") as file:
            start = file.read(4)
        if start[:2] == b"PK" or start[:1] == b"\x80":
            why = "this is a zip or a pickle, as torch.save writes; convert it with safetensors first"
        elif start == b"GGUF":
            why = "this is a GGUF file; use load_gguf"
        else:
            why = f"truncated or damaged ({error}); delete it and fetch or make it again"
        raise ValueError(f"{path}: not a safetensors file: {why}") from None


def save_safetensors(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write `tensors` and the strings in `metadata` to `path`, whole or not at all.

    The file is written beside `path` under another name, flushed to the disk and renamed, so that neither a
    crash nor a full disk leaves half a file. Errors: ValueError for tensors that share memory (clone one),
    OSError of the disk.
    """
    path = Path(path)
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        part.touch()
        mode = part.stat().st_mode  # by the user's umask; safetensors puts a private file in its place
        try:
            save_file(tensors, part, dict(metadata or {}))
        except RuntimeError as error:
            raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
        except SafetensorError as error:  # the library wraps the disk's errors
            raise OSError(f"{path}: could not be written: {error}") from None
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.chmod(mode)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
