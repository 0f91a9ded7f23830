"""Tiny random models of transformers, converted: every parameter drawn anew, and every one of them needed."""

import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch

from llm_atlas.models.decoder import Decoder, DecoderConfig
from llm_atlas.models.families import build, load_weights
from llm_atlas.models.families_decoders import (
    bloom_weights,
    deepseek_weights,
    falcon_weights,
    from_bloom_config,
    from_deepseek_config,
    from_falcon_config,
    from_gemma3_config,
    from_gpt_neox_config,
    from_gptj_config,
    from_mixtral_config,
    from_qwen3_moe_config,
    gemma3_weights,
    gpt_neox_weights,
    gptj_weights,
    mixtral_weights,
    qwen3_moe_weights,
)
from llm_atlas.nn.masks import left_pad
from llm_atlas.nn.moe import recorded_routing

IDS = torch.randint(3, 61, (2, 17), generator=torch.Generator().manual_seed(1))
SHAPE = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SHAPE | {"num_key_value_heads": 2}
FALCON = {name: size for name, size in SHAPE.items() if name != "intermediate_size"}
OLD = {"vocab_size": 61, "n_layer": 3, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LATENT = SHAPE | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 6,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 5,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 12,
    "n_group": 4,
    "topk_group": 2,
}
GEMMA = GROUPED | {"head_dim": 6, "query_pre_attn_scalar": 11, "sliding_window": 5}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES: dict[str, tuple[str, dict]] = {
    "mixtral": ("Mixtral", GROUPED | {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral, tied, window": (
        "Mixtral",
        GROUPED | {"num_local_experts": 3, "tie_word_embeddings": True, "sliding_window": 5},
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        GROUPED
        | {
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "head_dim": 8,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3_moe, tied": (
        "Qwen3Moe",
        GROUPED
        | {
            "num_experts": 4,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 12,
            "norm_topk_prob": False,
            "decoder_sparse_step": 2,
            "tie_word_embeddings": True,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        LATENT | {"q_lora_rank": 5, "first_k_dense_replace": 1, "n_shared_experts": 2},
    ),
    "deepseek_v3, tied": (
        "DeepseekV3",
        LATENT
        | {
            "q_lora_rank": None,
            "first_k_dense_replace": 0,
            "n_group": 1,
            "topk_group": 1,
            "tie_word_embeddings": True,
            "norm_topk_prob": False,
            "attention_bias": True,
        },
    ),
    "deepseek_v3, half, bias": (
        "DeepseekV3",
        LATENT
        | {"q_lora_rank": 5, "first_k_dense_replace": 3, "rope_interleave": False, "attention_bias": True},
    ),
    "gptj": ("GPTJ", OLD | {"n_embd": 24, "n_positions": 64, "rotary_dim": 4}),
    "gpt_neox": ("GPTNeoX", SHAPE | {"rotary_pct": 0.7}),
    "gpt_neox, sequential, tied": (
        "GPTNeoX",
        SHAPE
        | {
            "use_parallel_residual": False,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "rotary_pct": 0.34,
        },
    ),
    "falcon, tied": ("Falcon", FALCON),
    "falcon, bias": (
        "Falcon",
        FALCON | {"bias": True, "multi_query": False, "tie_word_embeddings": False, "parallel_attn": False},
    ),
    "falcon, new, tied": ("Falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, new, one norm, tied": (
        "Falcon",
        FALCON
        | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "bias": True},
    ),
    "gemma3_text, tied": ("Gemma3", GEMMA | {"layer_types": MIXED}),
    "gemma3_text": (
        "Gemma3",
        GEMMA | {"sliding_window_pattern": 3, "tie_word_embeddings": False, "attention_bias": True},
    ),
    "bloom, tied": ("Bloom", OLD | {"hidden_size": 24}),
    "bloom": ("Bloom", OLD | {"hidden_size": 24, "n_head": 3, "tie_word_embeddings": False}),
}
READERS: dict[str, tuple[Callable, Callable]] = {
    "mixtral": (from_mixtral_config, mixtral_weights),
    "qwen3_moe": (from_qwen3_moe_config, qwen3_moe_weights),
    "deepseek_v3": (from_deepseek_config, deepseek_weights),
    "gptj": (from_gptj_config, gptj_weights),
    "gpt_neox": (from_gpt_neox_config, gpt_neox_weights),
    "falcon": (from_falcon_config, falcon_weights),
    "gemma3_text": (from_gemma3_config, gemma3_weights),
    "bloom": (from_bloom_config, bloom_weights),
}
EACH = pytest.mark.parametrize("family", FAMILIES)


def read_with(family: str) -> tuple[Callable, Callable]:
    return READERS[family.split(",")[0]]


@functools.cache
def theirs(family: str):
    """A tiny model of the family, all of it random, and its logits."""
    import transformers

    kind, options = FAMILIES[family]
    text = "Text" if kind == "Gemma3" else ""
    config = getattr(transformers, f"{kind}{text}Config")(**options)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    drawn = dict(model.named_parameters())
    drawn |= {name: b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")}
    for tensor in drawn.values():
        draw = torch.randn(tensor.shape, generator=generator)
        tensor.data = draw * tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else draw
    for name, tensor in drawn.items():
        if kind == "Gemma3" and "norm" in name:
            tensor.data *= 0.5  # 1 is added to it
        if kind == "DeepseekV3" and name.endswith("bias"):
            tensor.data *= 0.1  # else all tokens are alike, and few experts ever chosen
    logits = model(IDS).logits
    assert 0.1 < logits.std() < 10
    return model, config, logits, sum(tensor.numel() for tensor in drawn.values())


@functools.cache
def converted(family: str) -> tuple[DecoderConfig, dict[str, torch.Tensor]]:
    model, config, *_ = theirs(family)
    read_config, read_weights = read_with(family)
    ours = read_config(config.to_dict())
    return ours, read_weights(model.state_dict(), ours)


def error(config: DecoderConfig, weights: dict[str, torch.Tensor], expected: torch.Tensor) -> float:
    """Largest difference of logits, relative to the largest logit."""
    ours = build(config, weights, Decoder).eval().requires_grad_(False)
    return ((ours(IDS) - expected).abs().max() / expected.abs().max()).item()


@EACH
def test_logits_are_those_of_transformers(family):
    config, weights = converted(family)
    assert config.tied == ("tied" in family)
    assert error(config, weights, theirs(family)[2]) < 1e-5


@EACH
def test_the_parameters_are_all_theirs(family):
    ours = build(*converted(family), Decoder)
    assert sum(p.numel() for p in ours.parameters()) == theirs(family)[3]


@EACH
def test_every_tensor_is_needed(family):
    """Also every expert that any token chose: each slice is zeroed alone."""
    (config, weights), expected = converted(family), theirs(family)[2]
    rotary = config.positions == "rotary" and config.rotary_dim is None
    chosen: dict[str, list[int]] = {}
    if any(map(config.has_experts, range(config.layers))):
        model = build(config, weights, Decoder)
        with recorded_routing(model) as routings:
            model(IDS)
        for router, routing in routings.items():
            chosen[router.removesuffix(".router")] = routing.chosen.unique().tolist()
        assert all(len(some) >= config.experts.experts / 2 for some in chosen.values()), chosen
    for name, tensor in weights.items():
        slices = chosen[name.partition(".experts.")[0]] if ".experts." in name else [slice(None)]
        for index in slices:
            changed = tensor.clone()
            changed[index] = 0
            found = error(config, weights | {name: changed}, expected)
            if name.endswith("mixer.sublayer.k.bias") and not rotary:
                # q . b is the same for all keys that no rotation tells apart, and the softmax does not see it.
                assert found > 1e-4 or config.positions == "alibi", name
            else:
                assert found > 1e-4, (name, index)


@EACH
def test_cached_and_padded_are_the_whole(family):
    ours, expected = build(*converted(family), Decoder).eval().requires_grad_(False), theirs(family)[2]
    cache = ours.make_cache()
    parts = [ours(part, cache=cache) for part in IDS.split([6, 1, 1, 9], dim=1)]
    scale = expected.abs().max()
    torch.testing.assert_close(torch.cat(parts, dim=1) / scale, expected / scale, atol=1e-5, rtol=0)
    ids, positions = left_pad([IDS[0].tolist(), IDS[1, :9].tolist()])
    alone = ours(ids, positions=positions)[1, -9:]
    torch.testing.assert_close(alone / scale, expected[1, :9] / scale, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------ what is special


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f.startswith(("mixtral", "qwen3_moe", "deepseek"))]
)
def test_experts_stored_one_by_one_are_the_same(family):
    """As the files of the Hub have them."""
    model, (config, weights) = theirs(family)[0], converted(family)
    names = ("w1", "w3", "w2") if "mixtral" in family else ("gate_proj", "up_proj", "down_proj")
    file = {}
    for name, tensor in model.state_dict().items():
        base = name.rpartition(".")[0]
        if name.endswith("gate_up_proj"):
            for j, (gate, up) in enumerate(t.chunk(2) for t in tensor):
                file |= {f"{base}.{j}.{names[0]}.weight": gate, f"{base}.{j}.{names[1]}.weight": up}
        elif name.endswith("experts.down_proj"):
            file |= {f"{base}.{j}.{names[2]}.weight": down for j, down in enumerate(tensor)}
        else:
            file[name] = tensor
    if "mixtral" in family:
        file = {name.replace(".mlp.", ".block_sparse_moe."): tensor for name, tensor in file.items()}
    read_weights = read_with(family)[1]
    read = read_weights(dict(reversed(file.items())), config)
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], weights[name]) for name in read)
    experts = [name for name in file if f".experts.1.{names[2]}" in name]
    for lost in experts[:1]:
        with pytest.raises(ValueError, match=f"^weight '{lost}' is missing$"):
            read_weights({name: t for name, t in file.items() if name != lost}, config)
        with pytest.raises(ValueError, match=r"^the experts of .*down' have different shapes"):
            read_weights(file | {lost: torch.zeros(24, 3)}, config)


def test_an_expert_too_few_is_found_by_its_shape():
    config, weights = converted("mixtral")
    name = "blocks.1.feedforward.sublayer.experts.up"
    with pytest.raises(
        ValueError, match=rf"^weight '{name}' has shape \(4, 40, 24\), the model wants \(5, 40, 24\)$"
    ):
        load_weights(Decoder(config), weights | {name: weights[name][:4]})


def test_layers_with_experts_are_those_of_the_configuration():
    def layers(family):
        config = converted(family)[0]
        return [config.has_experts(layer) for layer in range(3)]

    assert layers("mixtral") == [True, True, True]
    assert layers("qwen3_moe") == [True, False, True]
    assert layers("qwen3_moe, tied") == [False, True, False]
    assert layers("deepseek_v3") == [False, True, True]
    assert layers("deepseek_v3, half, bias") == [False, False, False]


def test_deepseeks_further_tokens_are_left_out():
    model, (config, weights) = theirs("deepseek_v3")[0], converted("deepseek_v3")
    more = {
        "model.layers.3.eh_proj.weight": torch.zeros(24, 48),
        "model.layers.3.mlp.gate.weight": torch.zeros(8, 24),
    }
    assert deepseek_weights(model.state_dict() | more, config).keys() == weights.keys()
    with pytest.raises(ValueError, match=r"the first is 'model.layers.2.eh_proj.weight'$"):
        deepseek_weights(model.state_dict() | {"model.layers.2.eh_proj.weight": torch.zeros(24, 48)}, config)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("deepseek_v3", {"rotary_layout": "half"}),
        ("gptj", {"rotary_layout": "half"}),
        ("gptj", {"rotary_dim": None}),
        ("gpt_neox", {"rotary_dim": None}),
        ("gemma3_text, tied", {"window_rope_base": None}),
        ("gemma3_text, tied", {"rope_base": 10000.0}),
        ("gemma3_text, tied", {"full_layers": ()}),
        ("gemma3_text, tied", {"window": 4}),
        ("gemma3_text, tied", {"attention_scale": None}),
        ("gemma3_text, tied", {"embed_scale": 1.0}),
        ("bloom", {"positions": "none"}),
        ("bloom", {"activation": "relu"}),
    ],
)
def test_options_are_needed(family, change):
    config, weights = converted(family)
    assert error(dataclasses.replace(config, **change), weights, theirs(family)[2]) > 1e-4


def test_blocks_side_by_side_are_not_blocks_after_one_another():
    config, weights = converted("gpt_neox")
    assert config.parallel == "two norms"
    assert error(dataclasses.replace(config, parallel=None), weights, theirs("gpt_neox")[2]) > 1e-2
    assert [converted(f)[0].parallel for f in FAMILIES if "falcon" in f] == [
        "one norm",
        None,
        "two norms",
        "one norm",
    ]


def test_old_files_are_read():
    for family, prefix, names in (
        ("gptj", "transformer.h.1.attn.", ("bias", "masked_bias")),
        ("gpt_neox", "gpt_neox.layers.1.attention.", ("bias", "masked_bias", "rotary_emb.inv_freq")),
    ):
        model, (config, weights) = theirs(family)[0], converted(family)
        old = model.state_dict() | {prefix + name: torch.ones(1) for name in names}
        if family == "gpt_neox":
            old["embed_out.weight"] = old.pop("lm_head.weight")
        assert read_with(family)[1](old, config).keys() == weights.keys()
    model, (config, weights) = theirs("bloom, tied")[0], converted("bloom, tied")
    bare = {n.removeprefix("transformer."): t for n, t in model.state_dict().items() if n != "lm_head.weight"}
    assert bloom_weights(bare, config).keys() == weights.keys()


def test_old_configurations_are_read():
    new = theirs("gemma3_text")[1].to_dict()
    old = {name: value for name, value in new.items() if name not in ("rope_parameters", "layer_types")}
    old |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None, "sliding_window_pattern": 3}
    assert from_gemma3_config(old) == from_gemma3_config(new) == converted("gemma3_text")[0]
    new = theirs("gpt_neox")[1].to_dict()
    old = {name: value for name, value in new.items() if name != "rope_parameters"}
    assert (
        from_gpt_neox_config(old | {"rotary_pct": 0.7, "rotary_emb_base": 10000}) == converted("gpt_neox")[0]
    )


def test_old_configurations_that_leave_a_default_out():
    """A quarter of a head turns in GPT-NeoX, every sixth layer of Gemma 3 is full: transformers' own defaults."""
    old = theirs("gpt_neox")[1].to_dict()
    old = {name: value for name, value in old.items() if name not in ("rope_parameters", "rotary_pct")}
    ours = from_gpt_neox_config(old)
    assert ours.rotary_dim == ours.dim // ours.heads // 4
    old = theirs("gemma3_text")[1].to_dict()
    for name in ("rope_parameters", "layer_types", "sliding_window_pattern"):
        old.pop(name, None)
    old |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None, "num_hidden_layers": 13}
    assert from_gemma3_config(old).full_layers == (5, 11)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("mixtral", {"model_type": "llama"}, "model_type 'llama' is not 'mixtral'"),
        ("deepseek_v3", {"model_type": "deepseek_v2"}, "model_type 'deepseek_v2' is not 'deepseek_v3'"),
        ("deepseek_v3", {"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-05 is not supported"),
        ("deepseek_v3", {"rope_scaling": {"type": "yarn"}}, "rope_type 'yarn' is not supported yet"),
        ("gptj", {"tie_word_embeddings": True}, "tie_word_embeddings=True is not supported yet"),
        ("falcon, tied", {"alibi": True}, "alibi=True is not supported yet"),
        (
            "falcon, tied",
            {"num_ln_in_parallel_attn": 2},
            "num_ln_in_parallel_attn 2 is not supported without",
        ),
        (
            "gemma3_text",
            {"final_logit_softcapping": 30.0},
            "final_logit_softcapping=30.0 is not supported yet",
        ),
        (
            "gemma3_text",
            {"rope_parameters": None, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
            "rope_type 'linear' is not supported yet",
        ),
        (
            "bloom",
            {"apply_residual_connection_post_layernorm": True},
            "apply_residual_connection_post_layernorm=True is not supported yet",
        ),
    ],
)
def test_an_unsupported_configuration_is_refused(family, change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        read_with(family)[0](theirs(family)[1].to_dict() | change)


@pytest.mark.parametrize(
    ("family", "name", "rows"),
    [
        ("bloom", "h.1.self_attention.query_key_value.weight", 72),
        ("deepseek_v3", "model.layers.0.self_attn.kv_a_proj_with_mqa.weight", 10),
        ("deepseek_v3", "model.layers.2.self_attn.kv_b_proj.weight", 52),
    ],
)
def test_a_matrix_that_cannot_be_cut_is_named(family, name, rows):
    model, config = theirs(family)[0], converted(family)[0]
    with pytest.raises(ValueError, match=f"^weight '{name}' has 7 rows, the model wants {rows}$"):
        read_with(family)[1](model.state_dict() | {name: torch.zeros(7, 24)}, config)
