"""Tiny random ViT, CLIP and LLaVA of transformers, converted: every parameter drawn anew, and every one needed."""

import dataclasses
import functools

import pytest
import torch

from llm_atlas.infer.generate import generate
from llm_atlas.models.families import build, from_llama_config
from llm_atlas.models.families_vision import (
    build_vit,
    clip_weights,
    from_clip_config,
    from_clip_vision_config,
    from_llava_config,
    from_vit_config,
    llava_weights,
    vit_weights,
)
from llm_atlas.models.vision import VisionConfig, quick_gelu
from llm_atlas.models.vision_language import CLIP, VisionLanguage

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
IMAGE_SIZES = {"image_size": 12, "patch_size": 4, "num_channels": 3}
IMAGE_ID = 60


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


IMAGES = draw(4, 3, 12, 12)
# Texts end at their first 59; what follows differs.
TEXTS = torch.tensor([[5, 9, 2, 59, 0, 0], [7, 59, 59, 3, 3, 59], [1, 2, 3, 4, 58, 59]])


def llava_ids(tokens):
    """Two rows with two images each: beside each other and apart, and some text around them."""
    i = [IMAGE_ID] * tokens
    return torch.tensor([[3, *i, *i, 5, 6, 7], [*i, 9, 8, *i, 11, 12]])


@functools.cache
def theirs(family):
    """A tiny model of the family with all parameters random, its configuration, what it is given, what it gives."""
    from transformers import (
        CLIPConfig,
        CLIPModel,
        LlavaConfig,
        LlavaForConditionalGeneration,
        ViTConfig,
        ViTForImageClassification,
        ViTModel,
    )

    ends = {"pad_token_id": 0, "bos_token_id": 1}
    clip_text = SIZES | {"vocab_size": 61, "hidden_size": 32, "max_position_embeddings": 8, **ends}
    text = clip_text | {"model_type": "llama", "num_key_value_heads": 2, "max_position_embeddings": 64}
    text |= {"eos_token_id": 2}
    tower = SIZES | IMAGE_SIZES | {"model_type": "clip_vision_model"}
    config, kind = {
        "vit": lambda: (
            ViTConfig(**SIZES, **IMAGE_SIZES, layer_norm_eps=1e-3),
            lambda config: ViTModel(config, add_pooling_layer=False),
        ),
        "vit, no biases, relu": lambda: (
            ViTConfig(**SIZES, **IMAGE_SIZES, qkv_bias=False, hidden_act="relu"),
            lambda config: ViTModel(config, add_pooling_layer=False),
        ),
        "vit classifier": lambda: (
            ViTConfig(**SIZES, **IMAGE_SIZES, num_labels=5),
            ViTForImageClassification,
        ),
        "clip": lambda: (
            CLIPConfig(
                text_config=clip_text | {"eos_token_id": 59, "num_hidden_layers": 3},
                vision_config=SIZES | IMAGE_SIZES,
                projection_dim=10,
            ),
            CLIPModel,
        ),
        "clip, old end": lambda: (
            CLIPConfig(
                text_config=clip_text | {"eos_token_id": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-3},
                vision_config=SIZES | IMAGE_SIZES | {"hidden_act": "gelu"},
                projection_dim=10,
            ),
            CLIPModel,
        ),
        "llava": lambda: (
            LlavaConfig(vision_config=tower, text_config=text, image_token_index=IMAGE_ID),
            LlavaForConditionalGeneration,
        ),
        "llava, mistral": lambda: (
            LlavaConfig(
                vision_config=tower,
                text_config=text | {"model_type": "mistral", "sliding_window": 5},
                image_token_index=IMAGE_ID,
            ),
            LlavaForConditionalGeneration,
        ),
        "llava, qwen3": lambda: (
            LlavaConfig(
                vision_config=tower,
                text_config=text | {"model_type": "qwen3", "head_dim": 12},
                image_token_index=IMAGE_ID,
            ),
            LlavaForConditionalGeneration,
        ),
        "llava, full, last layer, tied": lambda: (
            LlavaConfig(
                vision_config=tower,
                text_config=text | {"attention_bias": True, "tie_word_embeddings": True},
                image_token_index=IMAGE_ID,
                vision_feature_layer=-1,
                vision_feature_select_strategy="full",
                multimodal_projector_bias=False,
                projector_hidden_act="relu",
            ),
            LlavaForConditionalGeneration,
        ),
    }[family]()
    config._attn_implementation = "eager"
    model = kind(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.dim() in (2, 4) else 1
        parameter.data = torch.randn(parameter.shape, generator=generator) * fan_in**-0.5
    out = model(**inputs(family))
    expected = (
        out.last_hidden_state
        if family.startswith("vit") and "classifier" not in family
        else out.logits_per_image
        if family.startswith("clip")
        else out.logits
    )
    assert 0.03 < expected.std() < 10
    return model, config.to_dict(), expected


def inputs(family):
    if family.startswith("vit"):
        return {"pixel_values": IMAGES}
    if family.startswith("clip"):
        return {"pixel_values": IMAGES, "input_ids": TEXTS}
    return {"pixel_values": IMAGES, "input_ids": llava_ids(10 if "full" in family else 9)}


FAMILIES = ["vit", "vit, no biases, relu", "vit classifier", "clip", "clip, old end", "llava"]
FAMILIES += ["llava, mistral", "llava, qwen3", "llava, full, last layer, tied"]


def converted(family, state=None):
    model, config, _ = theirs(family)
    state = model.state_dict() if state is None else state
    if family.startswith("vit"):
        ours = from_vit_config(config)
        return build_vit(ours, vit_weights(state, ours)).eval()
    if family.startswith("clip"):
        ours = from_clip_config(config)
        return build(ours, clip_weights(state, ours), CLIP).eval()
    ours = from_llava_config(config)
    return build(ours, llava_weights(state, ours), VisionLanguage).eval()


def logits(family, model):
    given = inputs(family)
    with torch.inference_mode():
        if family.startswith("vit"):
            return model(IMAGES)
        if family.startswith("clip"):
            return model(IMAGES, TEXTS)
        return model(given["input_ids"], images=IMAGES.unflatten(0, (2, 2)))


def error(family, state=None):
    """Largest difference, relative to the largest number."""
    expected = theirs(family)[2]
    return float((logits(family, converted(family, state)) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_comes_out_is_what_transformers_gives(family):
    assert error(family) < 1e-5
    assert sum(p.numel() for p in converted(family).parameters()) == sum(
        p.numel() for p in theirs(family)[0].parameters()
    )


def unseen(family, name):
    """Tensors that change nothing: the softmax does not see a key's bias without rotation, LLaVA stops early."""
    if name.endswith("k_proj.bias") and "language_model" not in name:
        return True
    if family.startswith("llava") and "last layer" not in family:
        return "vision_tower.encoder.layers.1." in name or "vision_tower.post_layernorm" in name
    return family.startswith("llava") and "vision_tower.post_layernorm" in name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_needed(family):
    state = dict(theirs(family)[0].state_dict())
    if "tied" in family:
        del state["lm_head.weight"]
    unneeded = []
    for name, tensor in state.items():
        off = error(family, state | {name: torch.zeros_like(tensor)})
        if off < 1e-5:
            unneeded.append(name)
        else:
            assert off > 1e-4, name
    assert unneeded == [name for name in state if unseen(family, name)]


def test_a_tied_head_is_left_out_and_another_is_not():
    state = theirs("llava")[0].state_dict()
    assert torch.equal(converted("llava").decoder.head.weight, state["lm_head.weight"])
    assert converted("llava, full, last layer, tied").decoder.head is None


def test_llava_writes_what_transformers_writes():
    model, _, _ = theirs("llava")
    ids = llava_ids(9)
    written = model.generate(
        input_ids=ids,
        pixel_values=IMAGES,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
    )
    ours = converted("llava")
    cache = ours.make_cache()
    ours.hidden(ids[:, :-1], images=IMAGES.unflatten(0, (2, 2)), cache=cache)
    assert (
        generate(ours.decoder, ids[:, -1:].tolist(), max_new_tokens=8, cache=cache)
        == written[:, ids.shape[1] :].tolist()
    )


def test_configurations_are_read():
    assert from_vit_config(theirs("vit")[1]) == VisionConfig(
        image=12, patch=4, channels=3, dim=24, layers=2, heads=4, hidden=40, norm_eps=1e-3
    )
    clip = from_clip_config(theirs("clip")[1])
    assert (clip.features, clip.end_id, clip.text.layers, clip.vision.layers) == (10, 59, 3, 2)
    assert clip.text.activation is quick_gelu
    assert (clip.vision.patch_bias, clip.vision.norm_before) == (False, True)
    assert from_clip_config(theirs("clip, old end")[1]).end_id is None
    llava = from_llava_config(theirs("llava")[1])
    assert (llava.image_id, llava.layer, llava.class_token, llava.text.tied) == (IMAGE_ID, -2, False, False)
    other = from_llava_config(theirs("llava, full, last layer, tied")[1])
    assert (other.layer, other.class_token, other.projector_bias, other.text.tied) == (-1, True, False, True)


@pytest.mark.parametrize(
    ("read", "family", "change", "message"),
    [
        (from_vit_config, "vit", {"model_type": "deit"}, "model_type 'deit' is not 'vit'"),
        (
            from_vit_config,
            "vit",
            {"image_size": [8, 16]},
            r"image_size \[8, 16\] of two sides is not supported yet",
        ),
        (from_clip_config, "clip", {"model_type": "siglip"}, "model_type 'siglip' is not 'clip'"),
        (from_clip_vision_config, "vit", {}, "model_type 'vit' is not 'clip_vision_model'"),
        (from_llava_config, "llava", {"model_type": "idefics"}, "model_type 'idefics' is not 'llava'"),
        (
            from_llava_config,
            "llava",
            {"vision_feature_layer": [-2, -1]},
            r"vision_feature_layer \[-2, -1\] of several layers is not supported yet",
        ),
        (
            from_llava_config,
            "llava",
            {"vision_feature_select_strategy": "cls"},
            "vision_feature_select_strategy 'cls' is not one of default, full",
        ),
        (
            from_llava_config,
            "llava",
            {"text_config": {"model_type": "mpt"}},
            "model_type 'mpt' is not one of .*",
        ),
    ],
)
def test_an_unsupported_configuration_is_refused(read, family, change, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        read(theirs(family)[1] | change)


def test_what_an_inner_configuration_leaves_out_is_as_transformers_has_it():
    import transformers

    llava = {"model_type": "llava", "vision_config": {}, "image_token_index": 0}
    for kind in ("Llama", "Mistral", "Qwen3", "SmolLM3"):
        whole = getattr(transformers, f"{kind}Config")().to_dict()
        read = from_llava_config(llava | {"text_config": {"model_type": whole["model_type"]}})
        expected = from_llama_config(whole)
        for left in ("head_dim", "kv_heads"):  # None for what follows from the rest
            ours, right = getattr(read.text, left), getattr(expected, left)
            follows = {"head_dim": expected.dim // expected.heads, "kv_heads": expected.heads}[left]
            assert (ours or follows) == (right or follows)
            expected = dataclasses.replace(expected, **{left: ours})
        assert read.text == expected
    clip = from_clip_config(transformers.CLIPConfig().to_dict())
    assert from_clip_config({"model_type": "clip", "text_config": {}, "vision_config": None}) == clip
    assert read.vision == clip.vision


def test_the_text_of_llava_is_tied_where_either_configuration_says_so():
    config = theirs("llava")[1]
    inner = {"text_config": config["text_config"] | {"tie_word_embeddings": True}}
    assert not from_llava_config(config).text.tied
    assert from_llava_config(config | inner).text.tied
    assert from_llava_config(config | {"tie_word_embeddings": True}).text.tied


def test_a_list_of_end_tokens_is_refused():
    config = theirs("clip")[1]
    with pytest.raises(ValueError, match=r"^eos_token_id \[58, 59\] must be one token$"):
        from_clip_config(config | {"text_config": config["text_config"] | {"eos_token_id": [58, 59]}})


def test_a_pooler_is_left_out():
    state = dict(theirs("vit")[0].state_dict()) | {"pooler.dense.weight": torch.zeros(24, 24)}
    assert error("vit", state) < 1e-5
