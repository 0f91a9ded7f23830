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
encoders, seeing = beside("test_families_encoders"), beside("test_families_vision")

IDS = families.IDS
LLAMAS = {"llama, tied, biases": "llama", "qwen3": "qwen3", "smollm3": "smollm3", "mistral": "mistral"}
CASES = [
    *((families, name) for name in (*LLAMAS, "gpt2", "gpt2, tied", "gpt2, bigcode, tied")),
    *((decoders, name) for name in decoders.FAMILIES),
    *((encoders, name) for name in encoders.FAMILIES),
    *((seeing, name) for name in seeing.FAMILIES),
]
EACH = pytest.mark.parametrize(("module", "family"), CASES, ids=[name for _, name in CASES])


def saved(module, family: str, folder, **how) -> torch.Tensor:
    """Write the model of another test; what it gives."""
    model, _, logits = module.theirs(family)[:3]
    model.save_pretrained(folder, **how)
    return logits


def load(folder, dtype=torch.float32):
    return from_pretrained(folder, device="cpu", dtype=dtype).requires_grad_(False)


@torch.no_grad()
def outputs(module, family: str, model) -> torch.Tensor:
    if module is encoders:
        return encoders.outputs(model, family)
    return seeing.logits(family, model) if module is seeing else model(IDS)


def apart(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours - expected).abs().max() / expected.abs().max())


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
def test_what_transformers_saved_gives_its_outputs(module, family, size, tmp_path):
    expected = saved(module, family, tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors").is_file() == (size == "50GB")
    model = load(tmp_path)
    assert not model.training
    assert apart(outputs(module, family, model), expected) < 1e-5


def test_every_family_is_tried():
    kinds = {module.theirs(family)[0].config.model_type for module, family in CASES}
    assert kinds == set(FAMILIES)


@pytest.mark.parametrize(
    ("module", "family", "kind"),
    [
        (families, "llama", "Decoder"),
        (encoders, "bert", "Encoder"),
        (encoders, "roberta, masked", "Encoder"),
        (encoders, "t5", "EncoderDecoder"),
        (encoders, "bart", "EncoderDecoder"),
        (seeing, "vit", "VisionTransformer"),
        (seeing, "vit classifier", "ImageClassifier"),
        (seeing, "clip", "CLIP"),
        (seeing, "llava", "VisionLanguage"),
    ],
)
def test_the_class_is_the_one_that_the_docstring_names(module, family, kind, tmp_path):
    saved(module, family, tmp_path)
    assert type(load(tmp_path)).__name__ == kind
    assert f"`{kind}`" in from_pretrained.__doc__


@pytest.mark.parametrize(
    ("module", "family"),
    [
        *((encoders, name) for name in ("bert", "bert, masked", "roberta, masked", "t5", "bart")),
        *((seeing, name) for name in ("vit classifier", "clip", "llava, qwen3")),
    ],
)
def test_every_tensor_in_the_file_is_needed(module, family, tmp_path):
    expected = saved(module, family, tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    for name, tensor in weights.items():
        save_file(weights | {name: torch.zeros_like(tensor)}, file)
        off = apart(outputs(module, family, load(tmp_path)), expected)
        # The softmax does not see the bias of keys (of those without rotation); LLaVA stops before the last block.
        unseen = name.endswith(("k_proj.bias", "key.bias"))
        if family.startswith("llava"):
            unseen = "language" not in name and (unseen or "layers.1." in name or "post_layernorm" in name)
        assert off < 1e-5 if unseen else off > 1e-4, name


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
    of = " (architectures: LlamaForCausalLM)"
    refused(llama, f"{file}: weight 'blocks.1.feedforward.sublayer.up.weight' is missing{of}")
    save_file(weights | {name: torch.zeros(40, 23)}, file)
    refused(
        llama,
        f"{file}: weight 'blocks.1.feedforward.sublayer.up.weight' has shape (40, 23), the model wants (40, 24){of}",
    )
    save_file(weights | {"model.extra": torch.zeros(1)}, file)
    refused(llama, f"{file}: 1 weights are not in this family's table, the first is 'model.extra'{of}")
    save_file(weights | {"model.layers.1.mlp.up_proj.bias": torch.zeros(40)}, file)
    refused(llama, f"{file}: the model has no place for weight 'blocks.1.feedforward.sublayer.up.bias'{of}")
    change(llama / "config.json", architectures=None)
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


# ------------------------------------------------------------------------------------- variants among published files


def rewritten(folder, change_names=None, **changes):
    """The checkpoint in `folder` with its weights under other names, and its configuration changed (None: left out)."""
    file, config = folder / "model.safetensors", folder / "config.json"
    if change_names is not None:
        save_file({n: t.contiguous() for n, t in change_names(load_file(file)).items()}, file)
    whole = json.loads(config.read_text()) | changes
    config.write_text(json.dumps({name: value for name, value in whole.items() if value is not None}))


def drawn(model, seed=0):
    """A model of transformers with every parameter drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 10
        parameter.data = torch.randn(parameter.shape, generator=generator) * fan_in**-0.5
    return model.eval().requires_grad_(False)


def bert(kind, **how):
    import transformers

    config = transformers.BertConfig(**encoders.BERT_SHAPE, max_position_embeddings=32)
    return drawn(getattr(transformers, kind)(config, **how))


def test_bert_has_the_heads_that_its_weights_have(tmp_path):
    both = bert("BertForPreTraining")
    both.save_pretrained(tmp_path)
    model, out = load(tmp_path), both(encoders.IDS, token_type_ids=encoders.TYPES)
    assert (model.config.pooler, model.config.masked_lm) == (True, True)
    hidden = model.hidden(encoders.IDS, token_types=encoders.TYPES)
    assert apart(model.unembed(hidden), out.prediction_logits) < 1e-5
    assert (
        apart(model.pool(hidden), both.bert(encoders.IDS, token_type_ids=encoders.TYPES).pooler_output) < 1e-5
    )

    bare = bert("BertModel", add_pooling_layer=False)
    bare.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert (model.config.pooler, model.config.masked_lm) == (False, False)
    assert apart(model.hidden(encoders.IDS), bare(encoders.IDS).last_hidden_state) < 1e-5


def test_the_first_bert_files_are_read(tmp_path):
    expected = saved(encoders, "bert, masked", tmp_path)

    def age(weights):
        old = {
            n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
            for n, t in weights.items()
        }
        old["cls.predictions.decoder.weight"] = old["bert.embeddings.word_embeddings.weight"].clone()
        old["cls.predictions.decoder.bias"] = old.pop("cls.predictions.bias")
        return old | {
            "bert.embeddings.position_ids": torch.arange(17)[None],
            "cls.seq_relationship.weight": torch.ones(2, 24),
        }

    rewritten(tmp_path, age, tie_word_embeddings=None, architectures=None)
    assert apart(outputs(encoders, "bert, masked", load(tmp_path)), expected) < 1e-5


def test_a_copy_that_is_none_is_refused_and_one_of_several_will_do(tmp_path):
    file = tmp_path / "model.safetensors"
    expected = saved(encoders, "t5, tied", tmp_path)
    rewritten(
        tmp_path, lambda w: w | {"lm_head.weight": w["shared.weight"].clone()}, scale_decoder_outputs=None
    )
    assert load(tmp_path).head is None
    assert apart(outputs(encoders, "t5, tied", load(tmp_path)), expected) < 1e-5
    rewritten(tmp_path, lambda w: w | {"lm_head.weight": w["shared.weight"] + 1})
    of = "the model has one for both (architectures: T5ForConditionalGeneration)"
    refused(tmp_path, f"{file}: weights 'lm_head.weight' and 'shared.weight' differ: {of}")

    expected = saved(encoders, "bart", tmp_path)
    rewritten(
        tmp_path, lambda w: {n.replace("model.shared.", "model.decoder.embed_tokens."): w[n] for n in w}
    )
    assert apart(outputs(encoders, "bart", load(tmp_path)), expected) < 1e-5

    saved(families, "llama, tied, biases", tmp_path)
    rewritten(tmp_path, lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"] + 1})
    of = "the model has one for both (architectures: LlamaForCausalLM)"
    refused(tmp_path, f"{file}: weights 'lm_head.weight' and 'model.embed_tokens.weight' differ: {of}")


@pytest.mark.parametrize("family", ["t5", "t5, tied"])
def test_t5_of_before_transformers_5_says_by_its_tie_what_it_is(family, tmp_path):
    expected = saved(encoders, family, tmp_path)
    rewritten(tmp_path, scale_decoder_outputs=None, tie_word_embeddings=False if family == "t5" else None)
    model = load(tmp_path)
    assert (model.head is None, model.config.scale_logits) == (family != "t5", family != "t5")
    assert apart(outputs(encoders, family, model), expected) < 1e-5


def test_bart_without_a_head_is_read_with_the_one_it_shares(tmp_path):
    expected = saved(encoders, "bart", tmp_path)
    bias = load_file(tmp_path / "model.safetensors")["final_logits_bias"]
    encoders.theirs("bart")[0].model.save_pretrained(tmp_path)  # as bart-base is published
    assert "shared.weight" in load_file(tmp_path / "model.safetensors")
    model = load(tmp_path)
    assert model.logits_bias is None
    assert apart(outputs(encoders, "bart", model), expected - bias) < 1e-5


def unknown(number: int, first: str) -> str:
    return f"{number} weights are not in this family's table, the first is {first!r}"


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("BertForSequenceClassification", "Bert", unknown(2, "classifier.bias")),
        ("RobertaForTokenClassification", "Roberta", unknown(2, "classifier.bias")),
        ("T5EncoderModel", "T5", "weight 'decoder.attention_positions.table.weight' is missing"),
        ("BartForSequenceClassification", "Bart", unknown(4, "classification_head.dense.bias")),
        ("ViTForMaskedImageModeling", "ViT", unknown(3, "decoder.0.bias")),
    ],
)
def test_another_head_is_refused_by_name(kind, config, message, tmp_path):
    import transformers

    shape = {
        "Bert": encoders.BERT_SHAPE,
        "Roberta": encoders.BERT_SHAPE,
        "T5": encoders.T5_SHAPE,
        "Bart": encoders.BART_SHAPE | {"eos_token_id": 2},
        "ViT": seeing.SIZES | seeing.IMAGE_SIZES | {"encoder_stride": 4},
    }[config]
    getattr(transformers, kind)(getattr(transformers, f"{config}Config")(**shape)).save_pretrained(tmp_path)
    refused(tmp_path, f"{tmp_path / 'model.safetensors'}: {message} (architectures: {kind})")


def test_a_vit_is_read_without_its_pooler(tmp_path):
    from transformers import ViTConfig, ViTModel

    model = drawn(ViTModel(ViTConfig(**seeing.SIZES, **seeing.IMAGE_SIZES)))
    model.save_pretrained(tmp_path)
    assert "pooler.dense.weight" in load_file(tmp_path / "model.safetensors")
    assert apart(load(tmp_path)(seeing.IMAGES), model(seeing.IMAGES).last_hidden_state) < 1e-5


def test_a_vit_of_the_names_in_memory_is_read(tmp_path):
    expected = saved(seeing, "vit classifier", tmp_path)
    rewritten(tmp_path, lambda _: seeing.theirs("vit classifier")[0].state_dict())
    assert apart(outputs(seeing, "vit classifier", load(tmp_path)), expected) < 1e-5


def test_half_a_classifier_is_refused(tmp_path):
    saved(seeing, "vit classifier", tmp_path)
    rewritten(
        tmp_path, lambda w: {n: t for n, t in w.items() if n != "classifier.weight"}, architectures=None
    )
    refused(tmp_path, f"{tmp_path / 'model.safetensors'}: weight 'head.weight' is missing")


def test_older_clip_files_are_read(tmp_path):
    expected = saved(seeing, "clip, old end", tmp_path)
    places = {f"{half}_model.embeddings.position_ids": torch.arange(9)[None] for half in ("text", "vision")}
    config = json.loads((tmp_path / "config.json").read_text())
    rewritten(
        tmp_path,
        lambda weights: weights | places,
        # What is left out is as in the first CLIP; what the second of two dictionaries leaves out too.
        vision_config={
            n: v for n, v in config["vision_config"].items() if n not in ("num_channels", "layer_norm_eps")
        },
        text_config={"hidden_size": 77, "hidden_act": "relu"},
        text_config_dict=config["text_config"],
    )
    assert apart(outputs(seeing, "clip, old end", load(tmp_path)), expected) < 1e-5


def test_llava_files_of_any_age_are_read(tmp_path):
    expected = saved(seeing, "llava", tmp_path)
    assert "language_model.lm_head.weight" in load_file(tmp_path / "model.safetensors")

    def published(weights):
        old = {n.replace("vision_tower.", "vision_tower.vision_model."): t for n, t in weights.items()}
        old["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(10)[None]
        old["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        return old

    rewritten(tmp_path, published)
    assert apart(outputs(seeing, "llava", load(tmp_path)), expected) < 1e-5
    rewritten(tmp_path, lambda _: seeing.theirs("llava")[0].state_dict())
    assert apart(outputs(seeing, "llava", load(tmp_path)), expected) < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_config": {"model_type": "pixtral"}}, "model_type 'pixtral' is not 'clip_vision_model'"),
        ({"text_config": {"model_type": "qwen2"}}, "model_type 'qwen2' is not one of llama, mistral, qwen3, smollm3"),
        ({"text_config": {"rope_scaling": {"type": "linear"}}}, "rope_type 'linear' is not supported yet"),
        ({"vision_config": None}, "'vision_config' is missing"),
    ],
)  # fmt: skip
def test_another_half_of_llava_is_refused_by_name(changes, message, tmp_path):
    saved(seeing, "llava", tmp_path)
    rewritten(tmp_path, **changes)
    refused(tmp_path, f"{tmp_path / 'config.json'}: {message}")


@pytest.mark.parametrize(
    ("family", "name", "theirs"),
    [
        ("bert, masked", "head.dense", "cls.predictions.transform.dense"),
        ("t5", "head", "lm_head"),
        ("bart", "encoder.blocks.1.feedforward.sublayer.up", "model.encoder.layers.1.fc1"),
        ("vit classifier", "vision.patches", "vit.embeddings.patch_embeddings.projection"),
        ("clip", "image_projection", "visual_projection"),
        ("llava", "projector.up", "multi_modal_projector.linear_1"),
    ],
)
def test_a_missing_and_a_misshapen_weight_of_the_others_are_named(family, name, theirs, tmp_path):
    module = encoders if family in encoders.FAMILIES else seeing
    saved(module, family, tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    whole = weights[f"{theirs}.weight"]
    rewritten(tmp_path, lambda w: w | {f"{theirs}.weight": whole[:-1]}, architectures=None)
    wrong, right = (tuple(t.flatten(1).shape) for t in (whole[:-1], whole))
    refused(tmp_path, f"{file}: weight '{name}.weight' has shape {wrong}, the model wants {right}")
    if family != "t5":  # which is then tied
        rewritten(tmp_path, lambda w: {n: t for n, t in w.items() if n != f"{theirs}.weight"})
        refused(tmp_path, f"{file}: weight '{name}.weight' is missing")
