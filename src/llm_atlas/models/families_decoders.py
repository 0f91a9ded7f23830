"""The names and configurations of more decoders: mixtures of experts, parallel blocks, Gemma 3, BLOOM.

As in `families`: a family is a table of names, `{}` for the number of a layer, and a way to read its configuration.
What two families of the Hub store differently (queries, keys and values in one matrix; experts one by one or in one
tensor) is cut or put together first, by functions that they share.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llm_atlas.models.decoder import DecoderConfig, LatentConfig
from llm_atlas.models.families import (
    LLAMA,
    QWEN3,
    Names,
    check_kind,
    from_llama_config,
    our_activation,
    refuse,
    rename,
    rope_base,
    tie,
)
from llm_atlas.nn.moe import ExpertsConfig


def _layers(names: Names, prefix: str) -> Names:
    return {f"{prefix}{{}}.{theirs}": f"blocks.{{}}.{ours}" for theirs, ours in names.items()}


def _both(names: Names) -> Names:
    return {
        f"{theirs}.{part}": f"{ours}.{part}" for theirs, ours in names.items() for part in ("weight", "bias")
    }


_EXPERTS = _layers(
    {
        "mlp.gate.weight": "feedforward.sublayer.router.weight",
        "mlp.gate.e_score_correction_bias": "feedforward.sublayer.router.bias",
        **{f"mlp.experts.{part}": f"feedforward.sublayer.experts.{part}" for part in ("gate", "up", "down")},
        **{
            f"mlp.shared_experts.{part}_proj.weight": f"feedforward.sublayer.shared.{part}.weight"
            for part in ("gate", "up", "down")
        },
    },
    "model.layers.",
)
_LATENT = _layers(
    {
        f"self_attn.{theirs}.{part}": f"mixer.sublayer.{ours}.{part}"
        for theirs, ours in {
            "q_a_proj": "q_down",
            "q_a_layernorm": "q_norm",
            "q_b_proj": "q_up",
            "kv_a_proj.latent": "kv_down",
            "kv_a_proj.rotary": "k_rotary",
            "kv_a_layernorm": "kv_norm",
            "kv_b_proj.k": "k_up",
            "kv_b_proj.v": "v_up",
        }.items()
        for part in ("weight", "bias")
    },
    "model.layers.",
)
MIXTRAL = LLAMA | _EXPERTS
QWEN3_MOE = QWEN3 | _EXPERTS
DEEPSEEK = LLAMA | _EXPERTS | _LATENT
GEMMA3 = QWEN3 | _layers(
    {
        "post_attention_layernorm.weight": "mixer.norm_after.weight",
        "pre_feedforward_layernorm.weight": "feedforward.norm.weight",
        "post_feedforward_layernorm.weight": "feedforward.norm_after.weight",
    },
    "model.layers.",
)
GPTJ = _layers(
    _both(
        {
            "ln_1": "mixer.norm",
            "attn.q_proj": "mixer.sublayer.q",
            "attn.k_proj": "mixer.sublayer.k",
            "attn.v_proj": "mixer.sublayer.v",
            "attn.out_proj": "mixer.sublayer.out",
            "mlp.fc_in": "feedforward.sublayer.up",
            "mlp.fc_out": "feedforward.sublayer.down",
        }
    ),
    "h.",
) | {"wte.weight": "embed.weight", **_both({"ln_f": "norm", "lm_head": "head"})}


def _fused(attention: str) -> Names:
    """The names that Megatron gave the layers of GPT-NeoX, Falcon and BLOOM, its one matrix cut in three."""
    return _both(
        {
            f"{attention}.query_key_value.q": "mixer.sublayer.q",
            f"{attention}.query_key_value.k": "mixer.sublayer.k",
            f"{attention}.query_key_value.v": "mixer.sublayer.v",
            f"{attention}.dense": "mixer.sublayer.out",
            "mlp.dense_h_to_4h": "feedforward.sublayer.up",
            "mlp.dense_4h_to_h": "feedforward.sublayer.down",
            "input_layernorm": "mixer.norm",
            "post_attention_layernorm": "feedforward.norm",
        }
    )


GPT_NEOX = _layers(_fused("attention"), "layers.") | {
    "embed_in.weight": "embed.weight",
    **_both({"final_layer_norm": "norm"}),
    "embed_out.weight": "head.weight",
    "lm_head.weight": "head.weight",  # its name since transformers 5
}
BLOOM = _layers(_fused("self_attention"), "h.") | {
    "word_embeddings.weight": "embed.weight",
    **_both({"word_embeddings_layernorm": "embed_norm", "ln_f": "norm"}),
    "lm_head.weight": "head.weight",
}
FALCON = BLOOM | _layers(_both({"ln_attn": "mixer.norm", "ln_mlp": "feedforward.norm"}), "h.")


# ---------------------------------------------------------------------------------------- experts


def from_mixtral_config(config: Mapping[str, Any]) -> DecoderConfig:
    """A transformers configuration (as a dict) of the family `mixtral`: Mistral with experts in every layer.

    Jiang et al. 2024, section 2 (arXiv 2401.04088).
    """
    check_kind(config, "mixtral")
    experts = ExpertsConfig(
        experts=config["num_local_experts"],
        active=config["num_experts_per_tok"],
        hidden=config["intermediate_size"],
        activation=our_activation(config["hidden_act"]),
    )
    return replace(from_llama_config({**config, "model_type": "mistral"}), experts=experts)


def from_qwen3_moe_config(config: Mapping[str, Any]) -> DecoderConfig:
    """A transformers configuration (as a dict) of the family `qwen3_moe`: Qwen3 with experts.

    Every `decoder_sparse_step`th layer has them unless it is one of `mlp_only_layers`. Qwen team 2025, section 2 (arXiv
    2505.09388).
    """
    check_kind(config, "qwen3_moe")
    experts = ExpertsConfig(
        experts=config["num_experts"] if "num_experts" in config else config["num_local_experts"],
        active=config["num_experts_per_tok"],
        hidden=config["moe_intermediate_size"],
        activation=our_activation(config["hidden_act"]),
        renormalize=config.get("norm_topk_prob", False),
    )
    step, only = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
    dense = tuple(i for i in range(config["num_hidden_layers"]) if i in only or (i + 1) % step)
    return replace(from_llama_config({**config, "model_type": "qwen3"}), experts=experts, dense_layers=dense)


def from_deepseek_config(config: Mapping[str, Any]) -> DecoderConfig:
    """A transformers configuration (as a dict) of the family `deepseek_v3`: latent attention and experts.

    The first `first_k_dense_replace` layers have no experts. The modules that predict further tokens are not read.
    Unsupported options, the published models' YaRN and 8-bit numbers among them, are named.
    DeepSeek-AI 2024, section 2.1 (arXiv 2412.19437).
    """
    check_kind(config, "deepseek_v3")
    if config["rms_norm_eps"] != 1e-6:
        raise ValueError(
            f"rms_norm_eps {config['rms_norm_eps']} is not supported: latents are normed with 1e-6"
        )
    latent = LatentConfig(
        kv_rank=config["kv_lora_rank"],
        rope_dim=config["qk_rope_head_dim"],
        value_dim=config["v_head_dim"],
        q_rank=config["q_lora_rank"],
    )
    experts = ExpertsConfig(
        experts=config["n_routed_experts"],
        active=config["num_experts_per_tok"],
        hidden=config["moe_intermediate_size"],
        shared=config["n_shared_experts"],
        activation=our_activation(config["hidden_act"]),
        score="sigmoid",
        renormalize=config["norm_topk_prob"],
        scale=config["routed_scaling_factor"],
        selection_bias=True,
        groups=config["n_group"],
        active_groups=config["topk_group"],
    )
    return DecoderConfig(
        vocab=config["vocab_size"],
        dim=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        head_dim=config["qk_nope_head_dim"],
        latent=latent,
        hidden=config["intermediate_size"],
        experts=experts,
        dense_layers=tuple(range(min(config["first_k_dense_replace"], config["num_hidden_layers"]))),
        context=config["max_position_embeddings"],
        activation=our_activation(config["hidden_act"]),
        norm_eps=config["rms_norm_eps"],
        rope_base=rope_base(config),
        rotary_layout="interleaved" if config.get("rope_interleave", True) else "half",
        attention_bias=config.get("attention_bias", False),
        tied=config.get("tie_word_embeddings", False),
    )


def mixtral_weights(weights: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """All tensors of a Mixtral checkpoint under our names, its experts stored one by one or in one tensor."""
    return rename(_stack_experts(_bare(weights)), tie(MIXTRAL, config.tied), config.layers)


def qwen3_moe_weights(weights: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """All tensors of a Qwen3 checkpoint with experts under our names; as in `mixtral_weights`."""
    return rename(_stack_experts(_bare(weights)), tie(QWEN3_MOE, config.tied), config.layers)


def deepseek_weights(weights: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """All tensors of a DeepSeek-V3 checkpoint under our names; experts as in `mixtral_weights`.

    Two of its matrices hold two of ours each: latent and rotary key, keys and values of each head. Layers beyond the
    last are the modules that predict further tokens, and are left out.
    """
    latent, read = config.latent, {}
    head_dim = config.head_dim or config.dim // config.heads
    for name, tensor in _stack_experts(_bare(weights)).items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer and int(layer[1]) >= config.layers:
            continue
        module, _, part = name.rpartition(".")
        if module.endswith("kv_a_proj_with_mqa"):
            pieces = _cut(name, tensor, [latent.kv_rank, latent.rope_dim])
            base = module.removesuffix("_with_mqa")
            read |= {
                f"{base}.{which}.{part}": piece
                for which, piece in zip(("latent", "rotary"), pieces, strict=True)
            }
        elif module.endswith("kv_b_proj"):
            sizes = [head_dim, latent.value_dim or head_dim]
            pieces = _cut_by_head(name, tensor, config.heads, sizes)
            read |= {f"{module}.{which}.{part}": piece for which, piece in zip("kv", pieces, strict=True)}
        else:
            read[name] = tensor
    return rename(read, tie(DEEPSEEK, config.tied), config.layers)


_ONE_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(\w+)\.weight")
_PARTS = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


def _stack_experts(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Experts as three tensors a layer, whether the file has a matrix for each or `gate_up_proj` and `down_proj`."""
    read: dict[str, Tensor] = {}
    one_by_one: dict[str, dict[int, tuple[str, Tensor]]] = {}
    for full, tensor in weights.items():
        name = full.replace(".block_sparse_moe.", ".mlp.")  # Mixtral's files
        single = _ONE_EXPERT.fullmatch(name)
        if single and single[3] in _PARTS:
            one_by_one.setdefault(f"{single[1]}.{_PARTS[single[3]]}", {})[int(single[2])] = full, tensor
        elif name.endswith(".mlp.experts.gate_up_proj"):
            whole = name.removesuffix("_up_proj").removesuffix("gate")
            gate, up = _halves(full, tensor)
            read |= {f"{whole}gate": gate, f"{whole}up": up}
        elif name.endswith(".mlp.experts.down_proj"):
            read[name.removesuffix("_proj")] = tensor
        else:
            read[name] = tensor
    for name, experts in one_by_one.items():
        shapes = {tuple(tensor.shape) for _, tensor in experts.values()}
        missing = sorted(set(range(max(experts) + 1)) - set(experts))
        if missing:
            first = next(iter(experts.items()))
            lost = first[1][0].replace(f".experts.{first[0]}.", f".experts.{missing[0]}.")
            raise ValueError(f"weight {lost!r} is missing")
        if len(shapes) > 1:
            raise ValueError(f"the experts of {name!r} have different shapes: {sorted(shapes)}")
        read[name] = torch.stack([experts[i][1] for i in range(len(experts))])
    return read


# ------------------------------------------------------------------------------------ parallel blocks


def from_gptj_config(config: Mapping[str, Any]) -> DecoderConfig:
    """A transformers configuration (as a dict) of the family `gptj`: parallel blocks with one norm, partial rotary.

    Wang and Komatsuzaki 2021 (github.com/kingoflolz/mesh-transformer-jax).
    """
    check_kind(config, "gptj")
    refuse(config, "tie_word_embeddings")
    return DecoderConfig(
        vocab=config["vocab_size"],
        dim=config["n_embd"],
        layers=config["n_layer"],
        heads=config["n_head"],
        hidden=config.get("n_inner") or 4 * config["n_embd"],
        context=config["n_positions"],
        activation=our_activation(config["activation_function"]),
        gated=False,
        norm="layer",
        norm_eps=config["layer_norm_epsilon"],
        parallel="one norm",
        rotary_layout="interleaved",
        rotary_dim=config["rotary_dim"],
        feedforward_bias=True,
        tied=False,
        head_bias=True,
    )


def from_gpt_neox_config(config: Mapping[str, Any]) -> DecoderConfig:
    """A transformers configuration (as a dict) of the family `gpt_neox`: Pythia and GPT-NeoX-20B.

    Parallel blocks with two norms, or blocks as they always were without `use_parallel_residual`; rotary positions on
    a part of each head. Black et al. 2022, section 2.1 (arXiv 2204.06745); Biderman et al. 2023 (arXiv 2304.01373).
    """
    check_kind(config, "gpt_neox")
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    share = (config.get("rope_parameters") or {}).get("partial_rotary_factor", config.get("rotary_pct", 0.25))
    bias = config.get("attention_bias", True)
    return DecoderConfig(
        vocab=config["vocab_size"],
        dim=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        hidden=config["intermediate_size"],
        context=config["max_position_embeddings"],
        activation=our_activation(config["hidden_act"]),
        gated=False,
        norm="layer",
        norm_eps=config["layer_norm_eps"],
        parallel="two norms" if config.get("use_parallel_residual", True) else None,
        rope_base=rope_base(config, name="rotary_emb_base"),
        rotary_dim=int(head_dim * share),
        attention_bias=bias,
        out_bias=bias,
        feedforward_bias=True,
        tied=config.get("tie_word_embeddings", False),
    )


def from_falcon_config(config: Mapping[str, Any]) -> DecoderConfig:
    """A transformers configuration (as a dict) of the family `falcon`: 7B, 40B, 180B and Falcon 2.

    The first have one key/value head for all and one norm a block, the later ones (`new_decoder_architecture`) groups
    of heads and two norms, unless `num_ln_in_parallel_attn` says one. Almazrouei et al. 2023 (arXiv 2311.16867).
    """
    check_kind(config, "falcon")
    refuse(config, "alibi")
    heads = config["num_attention_heads"]
    new, bias = config.get("new_decoder_architecture", False), config.get("bias", False)
    if new:
        kv_heads = config.get("num_kv_heads") or heads
        parallel = "one norm" if config.get("num_ln_in_parallel_attn") == 1 else "two norms"
    else:
        kv_heads = 1 if config.get("multi_query", True) else heads
        parallel = "one norm" if config.get("parallel_attn", True) else None
        if config.get("num_ln_in_parallel_attn") == 2 and parallel:
            raise ValueError("num_ln_in_parallel_attn 2 is not supported without new_decoder_architecture")
    return DecoderConfig(
        vocab=config["vocab_size"],
        dim=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=kv_heads,
        hidden=config.get("ffn_hidden_size") or 4 * config["hidden_size"],
        context=config.get("max_position_embeddings", 2048),
        activation=our_activation(config.get("activation", "gelu")),
        gated=False,
        norm="layer",
        norm_eps=config["layer_norm_epsilon"],
        parallel=parallel,
        rope_base=rope_base(config),
        attention_bias=bias,
        out_bias=bias,
        feedforward_bias=bias,
        tied=config.get("tie_word_embeddings", True),
    )


def gptj_weights(weights: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """All tensors of a GPT-J checkpoint under our names."""
    return rename(_bare(weights, "transformer."), tie(GPTJ, config.tied), config.layers)


def gpt_neox_weights(weights: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """All tensors of a GPT-NeoX checkpoint under our names; its query, key and value lie head by head in one matrix."""
    read = _cut_fused(_bare(weights, "gpt_neox."), config)
    return rename(read, tie(GPT_NEOX, config.tied), config.layers)


def falcon_weights(weights: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """All tensors of a Falcon checkpoint under our names; query, key and value lie group by group in one matrix."""
    return rename(_cut_fused(_bare(weights, "transformer."), config), tie(FALCON, config.tied), config.layers)


def _cut_fused(weights: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """`query_key_value` in three: for each key head the rows of its queries, then its key, then its value."""
    kv_heads, head_dim = config.kv_heads or config.heads, config.dim // config.heads
    read: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        module, _, part = name.rpartition(".")
        if module.endswith(".query_key_value"):
            group = [config.heads // kv_heads * head_dim, head_dim, head_dim]
            pieces = _cut_by_head(name, tensor, kv_heads, group)
            read |= {f"{module}.{which}.{part}": piece for which, piece in zip("qkv", pieces, strict=True)}
        else:
            read[name] = tensor
    return read


# ---------------------------------------------------------------------------------- Gemma 3 and BLOOM


def from_gemma3_config(config: Mapping[str, Any]) -> DecoderConfig:
    """A transformers configuration (as a dict) of the family `gemma3_text`.

    Most layers look back a window, with rotary positions of a smaller base; norms on both sides of every sublayer and
    on queries and keys. Gemma team 2025, section 2 (arXiv 2503.19786). Unsupported options are named, the rotary
    scaling of the models from 4B on among them.
    """
    check_kind(config, "gemma3_text")
    refuse(config, "final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention")
    layers, bias = config["num_hidden_layers"], config.get("attention_bias", False)
    kinds = config.get("layer_types")
    if kinds is None:
        every = config.get("sliding_window_pattern", 6)
        kinds = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(layers)]
    ropes = config.get("rope_parameters") or {
        "full_attention": {"rope_theta": config.get("rope_theta", 1e6)},
        "sliding_attention": {"rope_theta": config.get("rope_local_base_freq", 10000.0)},
    }
    far, near = (
        rope_base({"rope_parameters": ropes[kind], "rope_scaling": config.get("rope_scaling")})
        for kind in ("full_attention", "sliding_attention")
    )
    return DecoderConfig(
        vocab=config["vocab_size"],
        dim=config["hidden_size"],
        layers=layers,
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        window=config["sliding_window"],
        full_layers=tuple(i for i, kind in enumerate(kinds) if kind == "full_attention"),
        hidden=config["intermediate_size"],
        context=config["max_position_embeddings"],
        activation=our_activation(config["hidden_activation"]),
        norm_eps=config["rms_norm_eps"],
        placement="sandwich",
        rope_base=far,
        window_rope_base=near,
        attention_bias=bias,
        out_bias=bias,
        qk_norm=True,
        attention_scale=config["query_pre_attn_scalar"] ** -0.5,
        embed_scale=config["hidden_size"] ** 0.5,
        tied=config.get("tie_word_embeddings", True),
    )


def gemma3_weights(weights: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """All tensors of a Gemma 3 text checkpoint under our names.

    Its norms multiply with 1 + weight, ours with the weight: 1 is added here, in float32 and then rounded to the dtype
    of the file, which costs a bfloat16 weight the digits that it had below 1/256.
    """
    read = rename(_bare(weights), tie(GEMMA3, config.tied), config.layers)
    return {
        name: (tensor.float() + 1).to(tensor.dtype) if re.search(r"norm(_after)?\.weight$", name) else tensor
        for name, tensor in read.items()
    }


def from_bloom_config(config: Mapping[str, Any]) -> DecoderConfig:
    """A transformers configuration (as a dict) of the family `bloom`: ALiBi, and a norm on the embeddings.

    ALiBi has no longest position; `context` is the length of the training texts, 2048 unless `seq_length` says
    otherwise. BigScience 2022, section 3.2 (arXiv 2211.05100).
    """
    check_kind(config, "bloom")
    refuse(config, "apply_residual_connection_post_layernorm")
    dim = config["hidden_size"] if "hidden_size" in config else config["n_embed"]
    return DecoderConfig(
        vocab=config["vocab_size"],
        dim=dim,
        layers=config["n_layer"],
        heads=config["n_head"],
        hidden=4 * dim,
        context=config.get("seq_length", 2048),
        activation="gelu_tanh",
        gated=False,
        norm="layer",
        norm_eps=config["layer_norm_epsilon"],
        positions="alibi",
        attention_bias=True,
        out_bias=True,
        feedforward_bias=True,
        embed_norm=True,
        tied=config.get("tie_word_embeddings", True),
    )


def bloom_weights(weights: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """All tensors of a BLOOM checkpoint under our names; query, key and value lie head by head in one matrix."""
    return rename(_cut_fused(_bare(weights, "transformer."), config), tie(BLOOM, config.tied), config.layers)


# ---------------------------------------------------------------------------------------------- shared


def _bare(weights: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Names without `prefix`, and without the constants of old files."""
    constants = (".attn.bias", ".attention.bias", ".masked_bias", ".rotary_emb.inv_freq")
    return {
        name.removeprefix(prefix): tensor for name, tensor in weights.items() if not name.endswith(constants)
    }


def _cut(name: str, tensor: Tensor, sizes: list[int]) -> Iterable[Tensor]:
    if len(tensor) != sum(sizes):
        raise ValueError(f"weight {name!r} has {len(tensor)} rows, the model wants {sum(sizes)}")
    return [piece.contiguous() for piece in tensor.split(sizes)]


def _cut_by_head(name: str, tensor: Tensor, heads: int, sizes: list[int]) -> Iterable[Tensor]:
    """For each head the rows of `sizes`, one after the other: each of them for all heads together."""
    if len(tensor) != heads * sum(sizes):
        raise ValueError(f"weight {name!r} has {len(tensor)} rows, the model wants {heads * sum(sizes)}")
    return [piece.flatten(0, 1) for piece in tensor.unflatten(0, (heads, -1)).split(sizes, dim=1)]


def _halves(name: str, tensor: Tensor) -> Iterable[Tensor]:
    if tensor.dim() != 3 or tensor.shape[1] % 2:
        raise ValueError(
            f"weight {name!r} has shape {tuple(tensor.shape)}: gate and up are halves of its second axis"
        )
    return [half.contiguous() for half in tensor.chunk(2, dim=1)]
