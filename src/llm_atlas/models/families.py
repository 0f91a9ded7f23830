"""Other people's names for our weights. A family is a table of names and a way to read its configuration.

In a table `{}` stands for the number of a layer.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llm_atlas.models.decoder import DecoderConfig
from llm_atlas.nn.positions import PositionScheme, interleaved_to_half

Names = dict[str, str]
_LLAMA_LAYER = {
    "input_layernorm.weight": "mixer.norm.weight",
    "self_attn.q_proj.weight": "mixer.sublayer.q.weight",
    "self_attn.k_proj.weight": "mixer.sublayer.k.weight",
    "self_attn.v_proj.weight": "mixer.sublayer.v.weight",
    "self_attn.o_proj.weight": "mixer.sublayer.out.weight",
    "post_attention_layernorm.weight": "feedforward.norm.weight",
    "mlp.gate_proj.weight": "feedforward.sublayer.gate.weight",
    "mlp.up_proj.weight": "feedforward.sublayer.up.weight",
    "mlp.down_proj.weight": "feedforward.sublayer.down.weight",
}
# Linear layers have a bias in some models of the family.
_LLAMA_LAYER |= {
    theirs.replace(".weight", ".bias"): ours.replace(".weight", ".bias")
    for theirs, ours in _LLAMA_LAYER.items()
    if "_proj." in theirs
}
_QWEN3_LAYER = _LLAMA_LAYER | {
    "self_attn.q_norm.weight": "mixer.sublayer.q_norm.weight",
    "self_attn.k_norm.weight": "mixer.sublayer.k_norm.weight",
}
_OUTSIDE = {
    "model.embed_tokens.weight": "embed.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
}


def _table(layer: Names, prefix: str, outside: Names) -> Names:
    return outside | {f"{prefix}{{}}.{theirs}": f"blocks.{{}}.{ours}" for theirs, ours in layer.items()}


LLAMA = _table(_LLAMA_LAYER, "model.layers.", _OUTSIDE)
QWEN3 = _table(_QWEN3_LAYER, "model.layers.", _OUTSIDE)
SMOLLM3 = MISTRAL = LLAMA
GPT2 = _table(
    {
        f"{theirs}.{part}": f"{ours}.{part}"
        for theirs, ours in {
            "ln_1": "mixer.norm",
            "attn.c_attn.q": "mixer.sublayer.q",
            "attn.c_attn.k": "mixer.sublayer.k",
            "attn.c_attn.v": "mixer.sublayer.v",
            "attn.c_proj": "mixer.sublayer.out",
            "ln_2": "feedforward.norm",
            "mlp.c_fc": "feedforward.sublayer.up",
            "mlp.c_proj": "feedforward.sublayer.down",
        }.items()
        for part in ("weight", "bias")
    },
    "h.",
    {
        "wte.weight": "embed.weight",
        "wpe.weight": "positions.table.weight",
        "ln_f.weight": "norm.weight",
        "ln_f.bias": "norm.bias",
        "lm_head.weight": "head.weight",
    },
)
"""What `gpt2_weights` reads, when it has cut c_attn in three."""
LLAMA_GGUF = _table(
    {
        "attn_norm.weight": "mixer.norm.weight",
        "attn_q.weight": "mixer.sublayer.q.weight",
        "attn_k.weight": "mixer.sublayer.k.weight",
        "attn_v.weight": "mixer.sublayer.v.weight",
        "attn_output.weight": "mixer.sublayer.out.weight",
        "ffn_norm.weight": "feedforward.norm.weight",
        "ffn_gate.weight": "feedforward.sublayer.gate.weight",
        "ffn_up.weight": "feedforward.sublayer.up.weight",
        "ffn_down.weight": "feedforward.sublayer.down.weight",
    },
    "blk.",
    {
        "token_embd.weight": "embed.weight",
        "output_norm.weight": "norm.weight",
        "output.weight": "head.weight",
    },
)


def rename(weights: Mapping[str, Tensor], names: Names, layers: int) -> dict[str, Tensor]:
    """Their state dict under our names. Raises ValueError for a tensor that the table does not know.

    A table may have several of their names for one of ours: a file has one of them, or the same numbers under each, and
    ValueError names two that differ. (Numbers are compared where there are any: not on the meta device.)
    """
    ours: dict[str, str] = {}
    for theirs, mine in names.items():
        for layer in range(layers) if "{}" in theirs else (0,):
            ours[theirs.format(layer)] = mine.format(layer)
    unknown = sorted(set(weights) - set(ours))
    if unknown:
        raise ValueError(
            f"{len(unknown)} weights are not in this family's table, the first is {unknown[0]!r}"
        )
    read: dict[str, Tensor] = {}
    first: dict[str, str] = {}
    for name, tensor in weights.items():
        same = first.setdefault(ours[name], name)
        kept = read.setdefault(ours[name], tensor)
        if kept is not tensor and not tensor.is_meta and not torch.equal(kept, tensor):
            raise ValueError(f"weights {same!r} and {name!r} differ: the model has one for both")
    return read


def tie(names: Names, tied: bool) -> Names:
    """`names` for a model whose head is its embedding, if it is `tied`: a file's own copy of it must then be equal."""
    if not tied:
        return names
    at = "head.weight"
    return {
        theirs: ours.removesuffix(at) + "embed.weight" if ours in (at, f"decoder.{at}") else ours
        for theirs, ours in names.items()
    }


def our_activation(name: str) -> str:
    """Our name of an activation that transformers calls `name`."""
    return {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "swish": "silu"}.get(name, name)


def check_kind(config: Mapping[str, Any], *kinds: str) -> str:
    """The `model_type` of a configuration; ValueError unless it is one of `kinds`."""
    kind = config.get("model_type")
    if kind not in kinds:
        rule = repr(kinds[0]) if len(kinds) == 1 else f"one of {', '.join(kinds)}"
        raise ValueError(f"model_type {kind!r} is not {rule}")
    return kind


def refuse(config: Mapping[str, Any], *options: str) -> None:
    """Raise ValueError for the first of these options that a configuration sets to anything but a false value."""
    for option in options:
        if config.get(option):
            raise ValueError(f"{option}={config[option]} is not supported yet")


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put `weights` (our names) into `model`, every one of them. A missing, left-over or misshapen one is named.

    The tensors themselves become the model's parameters: nothing is copied, and what is changed here changes there.
    """
    wanted = dict(model.named_parameters())
    for name, parameter in wanted.items():
        if name not in weights:
            raise ValueError(f"weight {name!r} is missing")
        if weights[name].shape != parameter.shape:
            raise ValueError(
                f"weight {name!r} has shape {tuple(weights[name].shape)}, the model wants {tuple(parameter.shape)}"
            )
    left_over = sorted(set(weights) - set(wanted))
    if left_over:
        raise ValueError(f"the model has no place for weight {left_over[0]!r}")
    # A module that layers share has a name in each of them, and `wanted` only the first.
    names = {id(parameter): name for name, parameter in wanted.items()}
    every = model.named_parameters(remove_duplicate=False)
    model.load_state_dict({name: weights[names[id(p)]] for name, p in every}, assign=True)


def from_llama_config(config: Mapping[str, Any]) -> DecoderConfig:
    """A transformers configuration (as a dict) of the families `llama`, `mistral`, `qwen3` and `smollm3`.

    Mistral's `sliding_window` (None in its later models) becomes the window of every layer. Unsupported options are
    named. SmolLM3 leaves positions out in some layers, every fourth one unless `no_rope_layers` (1 where a layer has
    rotary positions, 0 where it has none) says otherwise.
    """
    kind = check_kind(config, "llama", "mistral", "qwen3", "smollm3")
    if config.get("use_sliding_window"):
        raise ValueError("use_sliding_window is not supported yet")
    return DecoderConfig(
        vocab=config["vocab_size"],
        dim=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config.get("num_key_value_heads"),
        head_dim=config.get("head_dim"),
        window=config.get("sliding_window") if kind == "mistral" else None,
        hidden=config["intermediate_size"],
        context=config["max_position_embeddings"],
        activation=our_activation(config["hidden_act"]),
        norm_eps=config["rms_norm_eps"],
        rope_base=rope_base(config, default=2000000.0 if kind == "smollm3" else 10000.0),
        nope_layers=_nope_layers(config) if kind == "smollm3" else (),
        attention_bias=config.get("attention_bias", False),
        out_bias=config.get("attention_bias", False),
        feedforward_bias=config.get("mlp_bias", False),
        qk_norm=kind == "qwen3",
        tied=config.get("tie_word_embeddings", kind == "smollm3"),
    )


def rope_base(config: Mapping[str, Any], *, name: str = "rope_theta", default: float = 10000.0) -> float:
    """The rotary base of a transformers configuration, from `rope_parameters` or, in older files, under `name`.

    Raises ValueError for positions that are scaled in any way (`rope_scaling` in older files).
    """
    rope = config.get("rope_parameters") or {}
    for how in (rope, config.get("rope_scaling") or {}):
        kind = how.get("rope_type", how.get("type", "default"))
        if kind != "default":
            raise ValueError(f"rope_type {kind!r} is not supported yet")
    return float(rope.get("rope_theta", config.get(name, default)))


def _nope_layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    layers, rotary = config["num_hidden_layers"], config.get("no_rope_layers")
    if rotary is None:
        interval = config.get("no_rope_layer_interval", 4)
        rotary = [int((layer + 1) % interval != 0) for layer in range(layers)]
    if len(rotary) < layers:
        raise ValueError(f"no_rope_layers has {len(rotary)} entries for {layers} layers")
    return tuple(layer for layer in range(layers) if not rotary[layer])


def llama_weights(weights: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """All tensors of a checkpoint of the families of `from_llama_config` under our names.

    Left out are the rotary constants of old files and the head's copy of tied embeddings.
    """
    read = {name: tensor for name, tensor in weights.items() if not name.endswith(".rotary_emb.inv_freq")}
    return rename(read, tie(QWEN3, config.tied), config.layers)


def from_gpt2_config(config: Mapping[str, Any]) -> DecoderConfig:
    """A transformers configuration (as a dict) of the families `gpt2` and `gpt_bigcode`. Unsupported options are named.

    GPT-BigCode (SantaCoder, StarCoder) is GPT-2 with one key/value head for all.
    """
    kind = check_kind(config, "gpt2", "gpt_bigcode")
    if not config.get("scale_attn_weights", True):
        raise ValueError("scale_attn_weights=False is not supported yet")
    if kind == "gpt_bigcode" and not config.get("multi_query", True):
        raise ValueError("multi_query=False is not supported yet")
    for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if config.get(name):
            raise ValueError(f"{name} is not supported yet")
    return DecoderConfig(
        vocab=config["vocab_size"],
        dim=config["n_embd"],
        layers=config["n_layer"],
        heads=config["n_head"],
        kv_heads=1 if kind == "gpt_bigcode" else None,
        hidden=config.get("n_inner") or 4 * config["n_embd"],
        context=config["n_positions"],
        activation=our_activation(config.get("activation_function", "gelu_new")),
        gated=False,
        norm="layer",
        norm_eps=config["layer_norm_epsilon"],
        positions="learned",
        attention_bias=True,
        out_bias=True,
        feedforward_bias=True,
        tied=config.get("tie_word_embeddings", True),
    )


def gpt2_weights(weights: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """All tensors of a GPT-2 or GPT-BigCode checkpoint under our names.

    Query, key and value stand side by side in one matrix, which is cut in three. GPT-2 multiplies from the other side
    (`x @ weight`), so its matrices are transposed; GPT-BigCode's, with fewer key heads, are not. Names may begin with
    `transformer.`; the constant causal masks of old files and the head's copy of the tied embedding are left out.
    """
    read: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        name = name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        if config.kv_heads is None and ".c_" in name and name.endswith(".weight"):
            tensor = tensor.T.contiguous()
        if ".c_attn." in name:
            whole, part = name.rsplit(".", 1)
            keys = config.dim // config.heads * (config.kv_heads or config.heads)
            pieces = zip("qkv", tensor.split([config.dim, keys, keys]), strict=True)
            read |= {f"{whole}.{letter}.{part}": piece.contiguous() for letter, piece in pieces}
        else:
            read[name] = tensor
    return rename(read, tie(GPT2, config.tied), config.layers)


def from_gguf_metadata(metadata: Mapping[str, Any], *, tied: bool) -> DecoderConfig:
    """The configuration in a GGUF file of architecture `llama`."""
    if metadata.get("general.architecture") != "llama":
        raise ValueError(f"architecture {metadata.get('general.architecture')!r} is not 'llama'")
    return DecoderConfig(
        vocab=len(metadata["tokenizer.ggml.tokens"]),
        dim=metadata["llama.embedding_length"],
        layers=metadata["llama.block_count"],
        heads=metadata["llama.attention.head_count"],
        kv_heads=metadata["llama.attention.head_count_kv"],
        hidden=metadata["llama.feed_forward_length"],
        context=metadata["llama.context_length"],
        norm_eps=metadata["llama.attention.layer_norm_rms_epsilon"],
        rope_base=metadata["llama.rope.freq_base"],
        tied=tied,
    )


def unpermute(weight: Tensor, heads: int) -> Tensor:
    """Rows of a GGUF query or key matrix, from interleaved rotary pairs back to half-split ones.

    GGUF files of the llama architecture keep feature i and i + d/2 of each head side by side.
    """
    if weight.shape[0] % (2 * heads):
        raise ValueError(f"{weight.shape[0]} rows do not divide into {heads} heads of feature pairs")
    return interleaved_to_half(weight, heads=heads, dim=0)


def gguf_weights(
    read: Callable[[str], Tensor] | Mapping[str, Tensor], config: DecoderConfig
) -> dict[str, Tensor]:
    """All tensors of a GGUF file under our names, query and key rows un-permuted."""
    weights = rename(read, LLAMA_GGUF, config.layers)
    for name in weights:
        if name.endswith((".q.weight", ".k.weight")):
            heads = config.heads if name.endswith(".q.weight") else (config.kv_heads or config.heads)
            weights[name] = unpermute(weights[name], heads).contiguous()
    return weights


def build(config: Any, weights: Mapping[str, Tensor], model: Callable[[Any], nn.Module]) -> nn.Module:
    """`model(config)` with these weights, without first filling it with random ones; any kind of configuration."""
    with torch.device("meta"):
        made = model(config)
    load_weights(made, weights)
    device = next(made.parameters()).device
    for part in made.modules():
        if isinstance(part, PositionScheme):
            part.rebuild(device)
    return made
