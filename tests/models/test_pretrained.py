"""Checkpoints on disk: tiny models saved by transformers, whole and in shards, and what is wrong with a file."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_atlas.models.pretrained import FAMILIES, from_pretrained


def beside(name: str) -> ModuleType:
    """Another test's module, whose tiny models are taken."""
    spec = importlib.util.spec_from_file_location(f"beside_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


families, decoders = beside("test_families"), beside("test_families_decoders")

IDS = families.IDS
LLAMAS = {"llama, tied, biases": "llama", "qwen3": "qwen3", "smollm3": "smollm3", "mistral": "mistral"}
CASES = [
    *((families, name) for name in (*LLAMAS, "gpt2", "gpt2, tied", "gpt2, bigcode, tied")),
    *((decoders, name) for name in decoders.FAMILIES),
]
EACH = pytest.mark.parametrize(("module", "family"), CASES, ids=[name for _, name in CASES])


def saved(module, family: str, folder, **how) -> torch.Tensor:
    """Write the model of another test; its logits."""
    model, _, logits = module.theirs(family)[:3]
    model.save_pretrained(folder, **how)
    return logits


def load(folder, dtype=torch.float32):
    return from_pretrained(folder, device="cpu", dtype=dtype)


@pytest.fixture
def llama(tmp_path):
    saved(families, "llama", tmp_path)
    return tmp_path


@pytest.fixture
def shards(tmp_path):
    saved(families, "llama", tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@EACH
@pytest.mark.parametrize("size", ["50GB", "8KB"])
def test_what_transformers_saved_gives_its_logits(module, family, size, tmp_path):
    logits = saved(module, family, tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors").is_file() == (size == "50GB")
    model = load(tmp_path)
    assert not model.training
    with torch.no_grad():
        assert (model(IDS) - logits).abs().max() < 1e-5 * logits.abs().max()


def test_every_family_is_tried():
    kinds = {module.theirs(family)[1].model_type for module, family in CASES}
    assert kinds == set(FAMILIES)


def test_dtype_and_the_kind_of_source(llama):
    model = load(str(llama), torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def refused(folder, message, error=ValueError):
    with pytest.raises(error) as caught:
        load(folder)
    assert str(caught.value) == message


def test_an_unknown_family_lists_those_known(llama):
    config = llama / "config.json"
    change(config, model_type="mamba")
    refused(llama, f"{config}: model_type 'mamba' is not one of {', '.join(sorted(FAMILIES))}")
    change(config, model_type=None)
    refused(llama, f"{config}: model_type None is not one of {', '.join(sorted(FAMILIES))}")


def test_what_a_configuration_lacks_or_asks_for_is_named(llama):
    config = llama / "config.json"
    whole = config.read_text()
    config.write_text(json.dumps({k: v for k, v in json.loads(whole).items() if k != "hidden_size"}))
    refused(llama, f"{config}: 'hidden_size' is missing")
    config.write_text(whole)
    change(config, rope_scaling={"rope_type": "llama3", "factor": 8.0})
    refused(llama, f"{config}: rope_type 'llama3' is not supported yet")
    config.write_text(whole)
    change(config, quantization_config={"quant_method": "fp8"})
    refused(llama, f"{config}: quantization_config is not supported yet")
    config.write_text("[]")
    refused(llama, f"{config}: a json object is needed, not list")
    config.write_text("{")
    with pytest.raises(ValueError, match=r"config.json: not a json file \("):
        load(llama)
    config.unlink()
    refused(llama, f"{config}: no such file", FileNotFoundError)


def test_a_missing_misshapen_or_left_over_weight_is_named_with_the_file(llama):
    file = llama / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({n: t for n, t in weights.items() if n != name}, file)
    refused(llama, f"{file}: weight 'blocks.1.feedforward.sublayer.up.weight' is missing")
    save_file(weights | {name: torch.zeros(40, 23)}, file)
    refused(
        llama,
        f"{file}: weight 'blocks.1.feedforward.sublayer.up.weight' has shape (40, 23), the model wants (40, 24)",
    )
    save_file(weights | {"model.extra": torch.zeros(1)}, file)
    refused(llama, f"{file}: 1 weights are not in this family's table, the first is 'model.extra'")
    save_file(weights | {"model.layers.1.mlp.up_proj.bias": torch.zeros(40)}, file)
    refused(llama, f"{file}: the model has no place for weight 'blocks.1.feedforward.sublayer.up.bias'")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors: not a safetensors file: truncated"):
        load(llama)


def test_a_pickle_is_not_opened(llama):
    (llama / "model.safetensors").unlink()
    torch.save({}, llama / "pytorch_model.bin")
    message = (
        f"{llama}: there is no model.safetensors and no model.safetensors.index.json; pickles are not read"
    )
    refused(llama, message, FileNotFoundError)
    (llama / "pytorch_model.bin").rename(llama / "model.safetensors")
    with pytest.raises(ValueError, match="this is a zip or a pickle"):
        load(llama)


def test_shards_and_their_index_must_agree(shards):
    index = shards / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    name, other = where["model.norm.weight"], where["model.embed_tokens.weight"]
    assert name != other
    change(index, weight_map=where | {"model.layers.7.x": name})
    refused(
        shards,
        f"{shards / name}: weight 'model.layers.7.x' is missing, which model.safetensors.index.json lists",
    )
    change(index, weight_map=where | {"model.norm.weight": other})
    refused(
        shards,
        f"{shards / name}: weight 'model.norm.weight' is not listed for it in model.safetensors.index.json",
    )
    for bad in ("../model.safetensors", "pytorch_model.bin", "sub/model.safetensors"):
        change(index, weight_map=where | {"model.norm.weight": bad})
        refused(shards, f"{index}: {bad!r} is not the name of a safetensors file beside it")
    change(index, weight_map={})
    refused(shards, f"{index}: 'weight_map' is missing")
    change(index, weight_map=where)
    (shards / name).unlink()
    refused(shards, f"{shards / name}: no such file", FileNotFoundError)


def test_a_name_goes_to_the_hub_for_json_and_safetensors_alone(llama, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, **how):
        asked.append((name, how))
        return str(llama)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = load("someone/tiny")
    assert asked == [("someone/tiny", {"allow_patterns": ["*.safetensors", "*.json"]})]
    with torch.no_grad():
        assert (model(IDS) - families.theirs("llama")[2]).abs().max() < 1e-5


def test_without_the_library_or_the_connection_one_line_says_what_to_do(monkeypatch):
    import huggingface_hub

    def offline(name, **how):
        raise OSError("cannot be\nreached")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    message = (
        "'someone/tiny' is no folder, and the Hugging Face Hub does not give it (cannot be reached): check the name and"
        " the connection, or fetch it elsewhere and pass its folder"
    )
    refused("someone/tiny", message, FileNotFoundError)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = (
        "'someone/tiny' is no folder; to fetch it from the Hugging Face Hub: pip install huggingface_hub"
    )
    refused("someone/tiny", message, ImportError)
