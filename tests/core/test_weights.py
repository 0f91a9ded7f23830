"""GGUF and safetensors: values against gguf's own quantizer, the cache, every way a file can be damaged."""

import os
import random
import time

import gguf
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from llm_atlas.core import weights
from llm_atlas.core.assets import ASSETS, fetch
from llm_atlas.core.weights import load_gguf, load_safetensors, read_gguf, save_safetensors

Q = gguf.GGMLQuantizationType
WORDS = [f"wörd{i}" for i in range(20)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch, request):
    if "real" not in request.node.name:
        monkeypatch.setenv("LLM_ATLAS_CACHE", str(tmp_path / "cache"))


def q4_1(values: np.ndarray) -> np.ndarray:
    """Blocks of 32: float16 scale, float16 minimum, 16 bytes of two 4-bit values, low halves first."""
    blocks = values.reshape(-1, 32)
    low = blocks.min(1, keepdims=True).astype(np.float16)
    scale = ((blocks.max(1, keepdims=True) - low) / 15).astype(np.float16)
    q = np.clip(np.round((blocks - low) / scale), 0, 15).astype(np.uint8)
    packed = q[:, :16] | (q[:, 16:] << 4)
    raw = np.concatenate([scale.view(np.uint8), low.view(np.uint8), packed], axis=1)
    return raw.reshape(values.shape[0], -1)


def write_gguf(path, extra=None):
    values = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(3)
    writer.add_float32("llama.rope.freq_base", 1e5)
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    writer.add_array("tokenizer.ggml.tokens", WORDS)
    writer.add_array("tokenizer.ggml.token_type", list(range(20)))
    writer.add_tensor("plain", values)
    writer.add_tensor("half", values.astype(np.float16))
    writer.add_tensor("eight", gguf.quants.quantize(values, Q.Q8_0), raw_dtype=Q.Q8_0)
    writer.add_tensor("four", q4_1(values), raw_dtype=Q.Q4_1)
    for name, (data, kind) in (extra or {}).items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return torch.from_numpy(values)


@pytest.fixture
def small(tmp_path):
    values = write_gguf(tmp_path / "small.gguf")
    return tmp_path / "small.gguf", values


@pytest.mark.parametrize("load", [read_gguf, load_gguf])
def test_values(small, load):
    path, values = small
    file = load(path)
    assert dict(file.types) == {"plain": "F32", "half": "F16", "eight": "Q8_0", "four": "Q4_1"}
    assert {name: file.tensors[name].shape for name in file.tensors} == dict.fromkeys(
        file.types, values.shape
    )
    assert all(tensor.dtype == torch.float32 for tensor in file.tensors.values())
    assert torch.equal(file.tensors["plain"], values)
    assert torch.equal(file.tensors["half"], values.half().float())
    largest = values.view(6, 2, 32).abs().amax(-1, keepdim=True)
    spread = values.view(6, 2, 32).amax(-1, keepdim=True) - values.view(6, 2, 32).amin(-1, keepdim=True)
    # Half a step: one of 127 up to the largest, one of 15 from smallest to largest; the scales are float16.
    assert ((file.tensors["eight"] - values).view(6, 2, 32).abs() <= largest / 127 * 0.51 + 1e-3).all()
    assert ((file.tensors["four"] - values).view(6, 2, 32).abs() <= spread / 15 * 0.51 + 1e-2).all()
    assert not torch.equal(file.tensors["four"], values)


def test_q4_1_by_hand(tmp_path):
    low, scale = np.float16(-1.5), np.float16(0.25)
    q = np.arange(32) % 16
    values = (low + scale * q).astype(np.float32)[None]
    write_gguf(tmp_path / "hand.gguf", {"hand": (q4_1(values), Q.Q4_1)})
    assert torch.equal(read_gguf(tmp_path / "hand.gguf").tensors["hand"], torch.from_numpy(values))


@pytest.mark.parametrize("load", [read_gguf, load_gguf])
def test_metadata_is_plain_python(small, load):
    metadata = load(small[0]).metadata
    assert metadata["general.architecture"] == "llama"
    assert metadata["llama.block_count"] == 3
    assert metadata["llama.rope.freq_base"] == pytest.approx(1e5)
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert metadata["tokenizer.ggml.tokens"] == WORDS
    assert metadata["tokenizer.ggml.token_type"] == list(range(20))
    assert {type(value) for value in metadata.values()} <= {str, int, float, bool, list}
    assert not any(key.startswith("GGUF.") for key in metadata)


def test_tensors_are_the_readers_own(small):
    file = read_gguf(small[0])
    file.tensors["plain"].zero_()
    assert file.tensors["plain"].any()
    with pytest.raises(KeyError):
        file.tensors["none"]


def test_unreadable_type_is_named(tmp_path):
    data = gguf.quants.quantize(np.ones((2, 32), np.float32), Q.Q4_0)
    write_gguf(tmp_path / "q4_0.gguf", {"blk.0.other": (data, Q.Q4_0)})
    file = read_gguf(tmp_path / "q4_0.gguf")
    assert file.tensors["plain"].any()
    for call in (lambda: file.tensors["blk.0.other"], lambda: load_gguf(tmp_path / "q4_0.gguf")):
        with pytest.raises(
            ValueError, match=r"'blk.0.other' has type Q4_0; readable are F32, F16, Q8_0, Q4_1"
        ):
            call()
    assert not list((tmp_path / "cache").rglob("*.part"))


def refused(path, data) -> str | None:
    """What is said of a GGUF file of these bytes, or None if it is read; it is one line and names it."""
    path.write_bytes(data)
    said = None
    try:
        file = read_gguf(path)
        assert all(file.tensors[name].numel() for name in file.tensors)
    except ValueError as error:
        said = str(error)
    assert said is None or (str(path) in said and "\n" not in said)
    return said


def test_every_truncation_is_refused(small, tmp_path):
    data = small[0].read_bytes()
    header = data.index(b"four")  # well inside the tensor table
    cuts = {
        *range(0, header, 3),
        *range(header, header + 60),
        *range(header + 60, len(data), 97),
        len(data) - 1,
    }
    for cut in cuts:
        message = refused(tmp_path / "cut.gguf", data[:cut])
        # The last tensor is padded to 32 bytes; a file without the padding is whole.
        if cut < len(data) - 31:
            assert message is not None, cut
            assert "delete it and fetch it again" in message
            assert cut == 0 or f"the file ends at {cut}" in message


def test_a_damaged_header_is_refused_or_read_but_never_worse(small, tmp_path):
    """Its bytes set to values that make lengths huge, zero or odd. A name or a number may just change."""
    data = bytearray(small[0].read_bytes())
    end = data.index(b"four") + 60
    draw = random.Random(0)
    said = 0
    tried = 0
    # Every byte of the tensor table with all values, every third before it with one.
    for at in [*range(0, end - 300, 3), *range(end - 300, end)]:
        values = {0x00, 0x7F, 0xFF, data[at] ^ (1 << draw.randrange(8))} - {data[at]}
        for value in values if at >= end - 300 else {draw.choice(sorted(values))}:
            damaged = bytearray(data)
            damaged[at] = value
            said += refused(tmp_path / "bad.gguf", damaged) is not None
            tried += 1
    assert said > tried / 2


def test_damaged_lengths_do_not_eat_memory(small, tmp_path):
    """gguf alone would append nothing to a list 2**56 times over."""
    data = bytearray(small[0].read_bytes())
    at = data.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 4 + 4
    assert data[at] == 20  # the number of entries
    data[at + 7] = 1
    assert "entries is declared" in refused(tmp_path / "bad.gguf", data)


@pytest.mark.parametrize(
    "junk", [b"", b"GGUF", b"\x80\x04junk" * 40, b"PK\x03\x04" + bytes(100), b"GGUF\0\0\0\3" * 20]
)
def test_other_files_are_refused(tmp_path, junk):
    assert refused(tmp_path / "junk.gguf", junk)


@pytest.mark.parametrize("load", [read_gguf, load_gguf, load_safetensors])
def test_missing_file(tmp_path, load):
    with pytest.raises(FileNotFoundError, match=r"none\.gguf: no such file"):
        load(tmp_path / "none.gguf")
    with pytest.raises(FileNotFoundError):
        load(tmp_path)


def test_the_second_load_does_not_read_the_gguf(small, monkeypatch):
    path, _ = small
    first = load_gguf(path)

    def fail(path):
        raise AssertionError("the cache was passed by")

    monkeypatch.setattr(weights, "read_gguf", fail)
    second = load_gguf(path)
    assert second.metadata == first.metadata
    assert second.types == first.types
    assert_close(second.tensors, first.tensors, rtol=0, atol=0)
    os.utime(path, (1, 1))  # copied or fetched again: the same bytes
    assert load_gguf(path).types == first.types


def test_a_changed_source_is_read_again(small):
    path, _ = small
    before = load_gguf(path).tensors["four"].clone()
    data = bytearray(path.read_bytes())
    data[-20] ^= 1  # inside the last tensor, which 16 bytes of padding follow
    path.write_bytes(data)
    os.utime(path, (2, 2))
    after = load_gguf(path).tensors["four"]
    assert torch.equal(after, read_gguf(path).tensors["four"])
    assert not torch.equal(after, before)
    write_gguf(path, {"more": (np.ones((1, 32), np.float32), Q.F32)})
    os.utime(path, (2, 2))  # at the same time, of another length
    assert "more" in load_gguf(path).tensors


def test_a_damaged_cache_is_made_anew(small, tmp_path):
    path, values = small
    load_gguf(path)
    [cached] = (tmp_path / "cache").rglob("*.safetensors")
    for damage in (
        cached.read_bytes()[:-1],
        b"",
        cached.read_bytes().replace(b'"format":"1"', b'"format":"0"'),
    ):
        cached.unlink()
        cached.write_bytes(damage)
        assert torch.equal(load_gguf(path).tensors["plain"], values)


def test_a_killed_run_leaves_nothing_for_long(small, tmp_path):
    path, _ = small
    load_gguf(path)
    [cached] = (tmp_path / "cache").rglob("*.safetensors")
    cached.unlink()
    left = cached.with_name(f".{cached.name}.0123.part")
    left.write_bytes(b"half")
    load_gguf(path)
    assert cached.exists()
    assert not left.exists()


def test_without_a_cache_to_write_to(small, tmp_path):
    path, values = small
    (tmp_path / "cache").write_text("a file, where a folder should be")
    assert torch.equal(load_gguf(path).tensors["plain"], values)
    assert load_gguf(path, dtype=torch.bfloat16).tensors["plain"].dtype == torch.bfloat16


def test_dtype_and_device(small):
    path, values = small
    assert torch.equal(load_gguf(path, dtype=torch.bfloat16).tensors["plain"], values.bfloat16())
    assert load_gguf(path, device="meta").tensors["plain"].device.type == "meta"


def test_safetensors_round_trip(tmp_path):
    tensors = {
        "a": torch.randn(3, 4),
        "t": torch.randn(4, 5).T,
        "i": torch.arange(3),
        "b": torch.ones(2).bfloat16(),
    }
    save_safetensors(tensors, tmp_path / "x.safetensors", {"made": "here"})
    assert_close(load_safetensors(tmp_path / "x.safetensors"), tensors, rtol=0, atol=0)
    half = load_safetensors(tmp_path / "x.safetensors", dtype=torch.float16)
    assert half["a"].dtype == half["b"].dtype == torch.float16
    assert half["i"].dtype == torch.int64
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_shared_memory_is_refused_and_nothing_is_left(tmp_path):
    a = torch.randn(4)
    with pytest.raises(ValueError, match="share memory"):
        save_safetensors({"a": a, "b": a}, tmp_path / "x.safetensors")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "x.safetensors"
    save_safetensors({"a": torch.zeros(2)}, path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        save_safetensors({"a": torch.ones(2)}, path)
    assert not load_safetensors(path)["a"].any()
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(OSError, match="none"):
        save_safetensors({"a": torch.ones(2)}, tmp_path / "none" / "x.safetensors")


def test_what_is_no_safetensors_file(tmp_path):
    path = tmp_path / "x.safetensors"

    def said() -> str:
        with pytest.raises(ValueError, match="not a safetensors file") as error:
            load_safetensors(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
        return str(error.value)

    torch.save({"a": torch.ones(2)}, path)
    assert "zip or a pickle" in said()
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert "zip or a pickle" in said()
    write_gguf(path)
    assert "use load_gguf" in said()
    path.write_bytes(b"")
    assert "truncated or damaged" in said()
    save_safetensors({"a": torch.ones(100), "b": torch.ones(3)}, path)
    data = path.read_bytes()
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        assert "truncated or damaged" in said()


def test_the_real_model_loads_fast_and_true():
    path = fetch("smollm2-135m-instruct")
    load_gguf(path)
    start = time.perf_counter()
    file = load_gguf(path)
    assert time.perf_counter() - start < 1  # 0.04 s measured; the file is mapped, not read
    assert len(file.tensors) == 272
    assert sum(tensor.numel() for tensor in file.tensors.values()) == 134_515_008
    assert file.metadata["llama.block_count"] == 30
    assert file.tensors["blk.0.ffn_down.weight"].shape == (576, 1536)
    source = read_gguf(path)
    assert source.metadata == file.metadata
    for name in ("token_embd.weight", "blk.0.attn_q.weight", "blk.29.ffn_norm.weight"):
        assert torch.equal(source.tensors[name], file.tensors[name])


def test_the_real_model_truncated(tmp_path):
    path = fetch("smollm2-135m-instruct")
    size = ASSETS["smollm2-135m-instruct"].bytes
    for keep in (1_000_000, size - 1):
        with path.open("rb") as file:
            (tmp_path / "cut.gguf").write_bytes(file.read(keep))
        with pytest.raises(ValueError, match="not a whole GGUF file"):
            read_gguf(tmp_path / "cut.gguf")
