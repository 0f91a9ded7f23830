"""Other people's names for the weights of models that see: ViT, CLIP and LLaVA.

As in `models.families`, a family is a table of names (`{}` stands for the number of a layer) and a way to read its
configuration. Where transformers has other names in memory than in its files, both are read. The configurations inside
those of CLIP and LLaVA leave out what is as in the first CLIP, or the first model of the text's family: `_DEFAULTS`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from llm_atlas.models.decoder import DecoderConfig
from llm_atlas.models.families import (
    QWEN3,
    Names,
    build,
    check_kind,
    from_llama_config,
    our_activation,
    rename,
    tie,
)
from llm_atlas.models.vision import ImageClassifier, VisionConfig, VisionTransformer, quick_gelu
from llm_atlas.models.vision_language import CLIPConfig, VisionLanguageConfig
from llm_atlas.nn.activations import Activation


def _pairs(names: Names) -> Names:
    return {
        f"{theirs}.{part}": f"{ours}.{part}" for theirs, ours in names.items() for part in ("weight", "bias")
    }


def _under(theirs: str, ours: str, names: Names) -> Names:
    return {theirs + name: ours + mine for name, mine in names.items()}


def _layers(names: Names, theirs: str = "layers.") -> Names:
    return _under(f"{theirs}{{}}.", "blocks.{}.", _pairs(names))


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
    **_layers(  # in files
        {
            "layernorm_before": "mixer.norm",
            "attention.attention.query": "mixer.sublayer.q",
            "attention.attention.key": "mixer.sublayer.k",
            "attention.attention.value": "mixer.sublayer.v",
            "attention.output.dense": "mixer.sublayer.out",
            "layernorm_after": "feedforward.norm",
            "intermediate.dense": "feedforward.sublayer.up",
            "output.dense": "feedforward.sublayer.down",
        },
        "encoder.layer.",
    ),
}
VIT_CLASSIFIER = _under("", "vision.", VIT) | _pairs({"classifier": "head"})
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
            "multi_modal_projector.linear_1": "projector.up",
            "multi_modal_projector.linear_2": "projector.out",
        }
    ),
    **_under("vision_tower.", "vision.", CLIP_VISION),
    **{theirs.replace("model.", "language_model.", 1): f"decoder.{ours}" for theirs, ours in QWEN3.items()},
}
"""What `llava_weights` reads, when it has shortened names."""

_CLIP_SHAPE = {"num_hidden_layers": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_LLAMA_SHAPE = {
    "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
}  # fmt: skip
_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip_vision_model": _CLIP_SHAPE
    | {
        "image_size": 224, "patch_size": 32, "num_channels": 3,
        "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072,
    },
    "clip_text_model": _CLIP_SHAPE
    | {
        "vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407,
        "hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048,
    },
    "llama": _LLAMA_SHAPE | {"intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": _LLAMA_SHAPE
    | {
        "intermediate_size": 14336, "max_position_embeddings": 131072, "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen3": _LLAMA_SHAPE
    | {
        "vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768, "num_key_value_heads": 32,
        "head_dim": 128,
    },
    "smollm3": _LLAMA_SHAPE
    | {
        "vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 4, "intermediate_size": 11008, "max_position_embeddings": 32768,
    },
}  # fmt: skip
"""What a configuration inside another may leave out, by its `model_type`: as transformers 5 reads it."""


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
    check_kind(config, "vit")
    return VisionConfig(**_vision_sizes(config), qkv_bias=config.get("qkv_bias", True))


def from_clip_vision_config(config: Mapping[str, Any]) -> VisionConfig:
    """A transformers configuration (as a dict) of the family `clip_vision_model`."""
    check_kind(config, "clip_vision_model")
    return VisionConfig(**_vision_sizes(config), patch_bias=False, norm_before=True)


def from_clip_config(config: Mapping[str, Any]) -> CLIPConfig:
    """A transformers configuration (as a dict) of the family `clip`.

    Older files say that the end token is 2, which it is not; as transformers does, a text is then read at its
    largest id. Where a file has a `text_config_dict` or `vision_config_dict` too, that is the one that counts.
    """
    check_kind(config, "clip")
    text = _inside(config, "text_config", "clip_text_model")
    end = text["eos_token_id"]
    if not isinstance(end, int):
        raise ValueError(f"eos_token_id {end!r} must be one token")
    return CLIPConfig(
        vision=from_clip_vision_config(_inside(config, "vision_config", "clip_vision_model")),
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
        features=config.get("projection_dim", 512),
        end_id=None if end == 2 else end,
    )


def from_llava_config(config: Mapping[str, Any]) -> VisionLanguageConfig:
    """A transformers configuration (as a dict) of the family `llava`: a CLIP tower and a text model.

    The text's own `model_type` says how it is read, by `from_llama_config`: llama (unless there is one), mistral, qwen3
    or smollm3. Unsupported options are named.
    """
    check_kind(config, "llava")
    layer, strategy = (
        config.get("vision_feature_layer", -2),
        config.get("vision_feature_select_strategy", "default"),
    )
    if not isinstance(layer, int):
        raise ValueError(f"vision_feature_layer {layer} of several layers is not supported yet")
    if strategy not in ("default", "full"):
        raise ValueError(f"vision_feature_select_strategy {strategy!r} is not one of default, full")
    text = from_llama_config(_inside(config, "text_config", "llama"))
    return VisionLanguageConfig(
        vision=from_clip_vision_config(_inside(config, "vision_config", "clip_vision_model")),
        text=replace(text, tied=text.tied or config.get("tie_word_embeddings", False)),
        image_id=config["image_token_index"] if "image_token_index" in config else config["image_token_id"],
        layer=layer,
        class_token=strategy == "full",
        projector_activation=_activation(config.get("projector_hidden_act", "gelu")),
        projector_bias=config.get("multimodal_projector_bias", True),
    )


def vit_weights(weights: Mapping[str, Tensor], config: VisionConfig) -> dict[str, Tensor]:
    """All tensors of a ViT checkpoint under our names, those of an `ImageClassifier` where it has a `classifier`.

    Names may begin with `vit.`. Left out is the pooler of some files, a layer that pre-training alone used.
    """
    read = {name.removeprefix("vit."): tensor for name, tensor in weights.items()}
    read = {name: tensor for name, tensor in read.items() if not name.startswith("pooler.")}
    classifies = any(name.startswith("classifier.") for name in read)
    return vision_weights(read, VIT_CLASSIFIER if classifies else VIT, config.layers)


def build_vit(config: VisionConfig, weights: Mapping[str, Tensor]) -> VisionTransformer | ImageClassifier:
    """`build` with what `vit_weights` gives: an `ImageClassifier` where there is a head, with as many classes."""
    classes = max((len(tensor) for name, tensor in weights.items() if name.startswith("head.")), default=0)
    if not classes:
        return build(config, weights, VisionTransformer)
    return build(config, weights, lambda config: ImageClassifier(config, classes))


def clip_weights(weights: Mapping[str, Tensor], config: CLIPConfig) -> dict[str, Tensor]:
    """All tensors of a CLIP checkpoint under our names, without the constant lists of positions of older files."""
    read = {name: tensor for name, tensor in weights.items() if not name.endswith(".position_ids")}
    return vision_weights(read, CLIP_BOTH, max(config.vision.layers, config.text.layers))


def llava_weights(weights: Mapping[str, Tensor], config: VisionLanguageConfig) -> dict[str, Tensor]:
    """All tensors of a LLaVA checkpoint under our names, be they those in files or in memory, of any age.

    Left out are constants of older files; the head's copy of a tied embedding must be a copy.
    """
    shorter = {
        "language_model.model.": "language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.vision_model.": "vision_tower.",
    }
    read = {}
    for name, tensor in weights.items():
        if name.endswith((".position_ids", ".rotary_emb.inv_freq")):
            continue
        name = name.removeprefix("model.")
        for long, short in shorter.items():
            name = short + name.removeprefix(long) if name.startswith(long) else name
        read[name] = tensor
    return vision_weights(read, tie(LLAVA, config.text.tied), max(config.vision.layers, config.text.layers))


def _inside(config: Mapping[str, Any], name: str, kind: str) -> dict[str, Any]:
    """The configuration under `name`, of `kind` unless it says otherwise, with what it leaves out."""
    given = config[name] or {}
    kind = given.get("model_type", kind)
    newer = config.get(f"{name}_dict")
    if newer is not None:
        return {**given, **_DEFAULTS.get(kind, {}), **newer, "model_type": kind}
    return {**_DEFAULTS.get(kind, {}), **given, "model_type": kind}


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
    return quick_gelu if name == "quick_gelu" else our_activation(name)
