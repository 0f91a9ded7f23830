"""Other people's names for the weights of models that see: ViT, CLIP and LLaVA, as transformers has them in memory.

As in `models.families`, a family is a table of names (`{}` stands for the number of a layer) and a way to read its
configuration. `load_*` takes both and gives the model, in eval mode.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from llm_atlas.models.decoder import DecoderConfig
from llm_atlas.models.families import LLAMA, Names, build, from_llama_config, rename
from llm_atlas.models.vision import ImageClassifier, VisionConfig, VisionTransformer, quick_gelu
from llm_atlas.models.vision_language import CLIP, CLIPConfig, VisionLanguage, VisionLanguageConfig
from llm_atlas.nn.activations import Activation


def _pairs(names: Names) -> Names:
    return {
        f"{theirs}.{part}": f"{ours}.{part}" for theirs, ours in names.items() for part in ("weight", "bias")
    }


def _under(theirs: str, ours: str, names: Names) -> Names:
    return {theirs + name: ours + mine for name, mine in names.items()}


def _layers(names: Names) -> Names:
    return _under("layers.{}.", "blocks.{}.", _pairs(names))


VIT = {
    "embeddings.cls_token": "class_token",
    "embeddings.position_embeddings": "positions.table.weight",
    **_pairs({"embeddings.patch_embeddings.projection": "patches", "layernorm": "norm"}),
    **_layers(
        {
            "layernorm_before": "mixer.norm",
            "attention.q_proj": "mixer.sublayer.q",
            "attention.k_proj": "mixer.sublayer.k",
            "attention.v_proj": "mixer.sublayer.v",
            "attention.o_proj": "mixer.sublayer.out",
            "layernorm_after": "feedforward.norm",
            "mlp.fc1": "feedforward.sublayer.up",
            "mlp.fc2": "feedforward.sublayer.down",
        }
    ),
}
VIT_CLASSIFIER = _under("vit.", "vision.", VIT) | _pairs({"classifier": "head"})
_CLIP_LAYERS = _under(
    "encoder.",
    "",
    _layers(
        {
            "layer_norm1": "mixer.norm",
            "self_attn.q_proj": "mixer.sublayer.q",
            "self_attn.k_proj": "mixer.sublayer.k",
            "self_attn.v_proj": "mixer.sublayer.v",
            "self_attn.out_proj": "mixer.sublayer.out",
            "layer_norm2": "feedforward.norm",
            "mlp.fc1": "feedforward.sublayer.up",
            "mlp.fc2": "feedforward.sublayer.down",
        }
    ),
)
CLIP_VISION = _CLIP_LAYERS | {
    "embeddings.class_embedding": "class_token",
    "embeddings.patch_embedding.weight": "patches.weight",
    "embeddings.position_embedding.weight": "positions.table.weight",
    **_pairs({"pre_layrnorm": "norm_before", "post_layernorm": "norm"}),  # sic
}
CLIP_BOTH = {
    "logit_scale": "log_scale",
    "visual_projection.weight": "image_projection.weight",
    "text_projection.weight": "text_projection.weight",
    "text_model.embeddings.token_embedding.weight": "text.embed.weight",
    "text_model.embeddings.position_embedding.weight": "text.positions.table.weight",
    **_pairs({"text_model.final_layer_norm": "text.norm"}),
    **_under("text_model.", "text.", _CLIP_LAYERS),
    **_under("vision_model.", "vision.", CLIP_VISION),
}
LLAVA = {
    **_pairs(
        {
            "model.multi_modal_projector.linear_1": "projector.up",
            "model.multi_modal_projector.linear_2": "projector.out",
        }
    ),
    **_under("model.vision_tower.", "vision.", CLIP_VISION),
    **{
        theirs.replace("model.", "model.language_model.", 1): f"decoder.{ours}"
        for theirs, ours in LLAMA.items()
    },
}


def vision_weights(weights: Mapping[str, Tensor], names: Names, layers: int) -> dict[str, Tensor]:
    """Weights under our names and in our shapes: a convolution over patches is a matrix on flattened patches.

    `layers` is the largest number of blocks of a tower. Errors: ValueError for a name outside the table.
    """
    read = rename(weights, names, layers)
    for name, tensor in read.items():
        if name.endswith("patches.weight"):
            read[name] = tensor.flatten(1)
        elif name.endswith("class_token"):
            read[name] = tensor.flatten()
        elif name.endswith("positions.table.weight"):
            read[name] = tensor.reshape(-1, tensor.shape[-1])
    return read


def from_vit_config(config: Mapping[str, Any]) -> VisionConfig:
    """A transformers configuration (as a dict) of the family `vit`. Unsupported options are named."""
    _check_type(config, "vit")
    return VisionConfig(**_vision_sizes(config), qkv_bias=config.get("qkv_bias", True))


def from_clip_vision_config(config: Mapping[str, Any]) -> VisionConfig:
    """A transformers configuration (as a dict) of the family `clip_vision_model`."""
    _check_type(config, "clip_vision_model")
    return VisionConfig(**_vision_sizes(config), patch_bias=False, norm_before=True)


def from_clip_config(config: Mapping[str, Any]) -> CLIPConfig:
    """A transformers configuration (as a dict) of the family `clip`.

    Older files say that the end token is 2, which it is not; as transformers does, a text is then read at its
    largest id.
    """
    _check_type(config, "clip")
    text = config["text_config"]
    end = text["eos_token_id"]
    if not isinstance(end, int):
        raise ValueError(f"eos_token_id {end!r} must be one token")
    return CLIPConfig(
        vision=from_clip_vision_config(config["vision_config"]),
        text=DecoderConfig(
            vocab=text["vocab_size"],
            dim=text["hidden_size"],
            layers=text["num_hidden_layers"],
            heads=text["num_attention_heads"],
            hidden=text["intermediate_size"],
            context=text["max_position_embeddings"],
            activation=_activation(text["hidden_act"]),
            gated=False,
            norm="layer",
            norm_eps=text["layer_norm_eps"],
            positions="learned",
            attention_bias=True,
            out_bias=True,
            feedforward_bias=True,
        ),
        features=config["projection_dim"],
        end_id=None if end == 2 else end,
    )


def from_llava_config(config: Mapping[str, Any]) -> VisionLanguageConfig:
    """A transformers configuration (as a dict) of the family `llava`: a CLIP tower and a text model that
    `from_llama_config` reads. Unsupported options are named."""
    _check_type(config, "llava")
    layer, strategy = (
        config.get("vision_feature_layer", -2),
        config.get("vision_feature_select_strategy", "default"),
    )
    if not isinstance(layer, int):
        raise ValueError(f"vision_feature_layer {layer} of several layers is not supported yet")
    if strategy not in ("default", "full"):
        raise ValueError(f"vision_feature_select_strategy {strategy!r} is not one of default, full")
    tied = config.get("tie_word_embeddings", False)
    return VisionLanguageConfig(
        vision=from_clip_vision_config(config["vision_config"]),
        text=from_llama_config({**config["text_config"], "tie_word_embeddings": tied}),
        image_id=config["image_token_index"] if "image_token_index" in config else config["image_token_id"],
        layer=layer,
        class_token=strategy == "full",
        projector_activation=_activation(config.get("projector_hidden_act", "gelu")),
        projector_bias=config.get("multimodal_projector_bias", True),
    )


def load_vit(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> VisionTransformer | ImageClassifier:
    """A ViT from its configuration and state dict; with a `classifier` among the weights an `ImageClassifier`.

    The pooler of some files, a layer that only pre-training used, has no place here: leave it out.
    """
    ours = from_vit_config(config)
    if "classifier.weight" in weights:
        classes = len(weights["classifier.weight"])
        read = vision_weights(weights, VIT_CLASSIFIER, ours.layers)
        return build(ours, read, lambda config: ImageClassifier(config, classes)).eval()
    return build(ours, vision_weights(weights, VIT, ours.layers), VisionTransformer).eval()


def load_clip(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> CLIP:
    """A CLIP from its configuration and state dict."""
    ours = from_clip_config(config)
    layers = max(ours.vision.layers, ours.text.layers)
    return build(ours, vision_weights(weights, CLIP_BOTH, layers), CLIP).eval()


def load_llava(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> VisionLanguage:
    """A LLaVA from its configuration and state dict; the head's copy of a tied embedding is left out."""
    ours = from_llava_config(config)
    layers = max(ours.vision.layers, ours.text.layers)
    kept = {n: t for n, t in weights.items() if n != "lm_head.weight" or not ours.text.tied}
    return build(ours, vision_weights(kept, LLAVA, layers), VisionLanguage).eval()


def _vision_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    for name in ("image_size", "patch_size"):
        if not isinstance(config[name], int):
            raise ValueError(f"{name} {config[name]} of two sides is not supported yet")
    return {
        "image": config["image_size"],
        "patch": config["patch_size"],
        "channels": config["num_channels"],
        "dim": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "hidden": config["intermediate_size"],
        "norm_eps": config["layer_norm_eps"],
        "activation": _activation(config["hidden_act"]),
    }


def _activation(name: str) -> str | Activation:
    return {"quick_gelu": quick_gelu, "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}.get(
        name, name
    )


def _check_type(config: Mapping[str, Any], wanted: str) -> None:
    if config.get("model_type") != wanted:
        raise ValueError(f"model_type {config.get('model_type')!r} is not {wanted!r}")
