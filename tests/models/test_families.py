"""Tiny random models of transformers, converted: every parameter drawn anew, and every one of them needed."""

import dataclasses
import functools

import pytest
import torch

from llm_atlas.models.decoder import Decoder, DecoderConfig
from llm_atlas.models.families import (
    LLAMA,
    MISTRAL,
    QWEN3,
    SMOLLM3,
    build,
    from_gguf_metadata,
    from_gpt2_config,
    from_llama_config,
    gguf_weights,
    gpt2_weights,
    load_weights,
    rename,
    unpermute,
)

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IDS = torch.randint(3, 61, (2, 17), generator=torch.Generator().manual_seed(1))


@functools.cache
def theirs(family: str):
    """A tiny model of the family, its configuration and logits."""
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        GPTBigCodeConfig,
        GPTBigCodeForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
        SmolLM3Config,
        SmolLM3ForCausalLM,
    )

    config, kind = {
        "llama": lambda: (LlamaConfig(**SHAPE, tie_word_embeddings=False), LlamaForCausalLM),
        "llama, tied, biases": lambda: (
            LlamaConfig(**SHAPE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=10),
            LlamaForCausalLM,
        ),
        "qwen3": lambda: (Qwen3Config(**SHAPE, tie_word_embeddings=False, head_dim=8), Qwen3ForCausalLM),
        "qwen3, tied": lambda: (
            Qwen3Config(**SHAPE, tie_word_embeddings=True, head_dim=6, rope_theta=77.0, rms_norm_eps=1e-3),
            Qwen3ForCausalLM,
        ),
        "smollm3": lambda: (
            SmolLM3Config(**SHAPE, tie_word_embeddings=False, no_rope_layers=[0, 1], rope_theta=50.0),
            SmolLM3ForCausalLM,
        ),
        "smollm3, tied": lambda: (
            SmolLM3Config(**SHAPE, tie_word_embeddings=True, no_rope_layer_interval=2),
            SmolLM3ForCausalLM,
        ),
        "gpt2, tied": lambda: (
            GPT2Config(
                vocab_size=61, n_embd=24, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
            ),
            GPT2LMHeadModel,
        ),
        "gpt2": lambda: (
            GPT2Config(
                vocab_size=61,
                n_embd=24,
                n_layer=2,
                n_head=4,
                n_positions=64,
                n_inner=40,
                bos_token_id=1,
                eos_token_id=2,
                activation_function="relu",
                layer_norm_epsilon=1e-3,
                tie_word_embeddings=False,
            ),
            GPT2LMHeadModel,
        ),
        "mistral": lambda: (
            MistralConfig(**SHAPE, tie_word_embeddings=False, sliding_window=5, head_dim=6),
            MistralForCausalLM,
        ),
        "mistral, tied": lambda: (
            MistralConfig(**SHAPE, tie_word_embeddings=True, sliding_window=None, head_dim=6),
            MistralForCausalLM,
        ),
        "gpt2, bigcode, tied": lambda: (
            GPTBigCodeConfig(
                vocab_size=61, n_embd=24, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
            ),
            GPTBigCodeForCausalLM,
        ),
    }[family]()
    model = kind(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        draw = torch.randn(parameter.shape, generator=generator)
        parameter.data = draw * parameter.shape[1] ** -0.5 if parameter.dim() == 2 else draw
    logits = model(IDS).logits
    assert 0.3 < logits.std() < 3
    return model, config, logits


def converted(family: str) -> tuple[DecoderConfig, dict[str, torch.Tensor]]:
    model, config, _ = theirs(family)
    if family.startswith("gpt2"):
        ours = from_gpt2_config(config.to_dict())
        return ours, gpt2_weights(model.state_dict(), ours)
    table = {"qwen3": QWEN3, "smollm3": SMOLLM3, "llama": LLAMA, "mistral": MISTRAL}[family.split(",")[0]]
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight" or "tied" not in family
    }
    ours = from_llama_config(config.to_dict())
    return ours, rename(state, table, ours.layers)


def error(family: str, weights: dict[str, torch.Tensor]) -> float:
    """Largest difference of logits, relative to the largest logit."""
    ours = build(converted(family)[0], weights, Decoder).eval()
    expected = theirs(family)[2]
    return ((ours(IDS) - expected).abs().max() / expected.abs().max()).item()


FAMILIES = [
    "llama",
    "llama, tied, biases",
    "qwen3",
    "qwen3, tied",
    "smollm3",
    "smollm3, tied",
    "gpt2",
    "gpt2, tied",
    "gpt2, bigcode, tied",
    "mistral",
    "mistral, tied",
]
LINEAR = ["mixer.sublayer.q", "mixer.sublayer.k", "mixer.sublayer.v", "mixer.sublayer.out"]
LINEAR += ["feedforward.sublayer.gate", "feedforward.sublayer.up", "feedforward.sublayer.down"]
NORMS = ["mixer.norm", "feedforward.norm"]
QK_NORMS = ["mixer.sublayer.q_norm.weight", "mixer.sublayer.k_norm.weight"]


def tensors(family: str) -> list[str]:
    """Our names of all tensors of the model, written down without the tables under test."""
    if family.startswith("gpt2"):
        linear = [name for name in LINEAR if not name.endswith("gate")]
        layer = [f"{name}.{part}" for name in [*linear, *NORMS] for part in ("weight", "bias")]
        names = ["embed.weight", "positions.table.weight", "norm.weight", "norm.bias"]
        names += [] if "tied" in family else ["head.weight"]
        return names + [f"blocks.{i}.{name}" for i in range(2) for name in layer]
    layer = [f"{name}.weight" for name in [*LINEAR, *NORMS]]
    layer += [f"{name}.bias" for name in LINEAR] if "biases" in family else []
    layer += QK_NORMS if "qwen3" in family else []
    names = ["embed.weight", "norm.weight"] + ([] if "tied" in family else ["head.weight"])
    return names + [f"blocks.{i}.{name}" for i in range(2) for name in layer]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family):
    config, weights = converted(family)
    assert sorted(weights) == sorted(tensors(family))
    assert config.tied == ("tied" in family)
    assert error(family, weights) < 1e-5


@pytest.mark.parametrize(("family", "name"), [(f, n) for f in FAMILIES for n in tensors(f)])
def test_every_tensor_is_needed(family, name):
    weights = converted(family)[1]
    weights[name] = torch.zeros_like(weights[name])
    if family.startswith("gpt2") and name.endswith("mixer.sublayer.k.bias"):
        # q . b is the same for all keys, and the softmax does not see it; only a rotation makes it matter.
        assert error(family, weights) < 1e-5
    else:
        assert error(family, weights) > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parameters_are_all_theirs(family):
    ours = build(*converted(family), Decoder)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs(family)[0].parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_is_uncached(family):
    ours = build(*converted(family), Decoder).eval()
    cache = ours.make_cache()
    parts = [ours(part, cache=cache) for part in IDS.split([6, 1, 1, 9], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), theirs(family)[2], atol=2e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------ errors

CONFIG = DecoderConfig(vocab=11, dim=8, layers=2, heads=2, hidden=12, context=16)


def state() -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in Decoder(CONFIG).named_parameters()}


def test_a_missing_weight_is_named():
    weights = state()
    del weights["blocks.1.mixer.sublayer.k.weight"]
    with pytest.raises(ValueError, match=r"^weight 'blocks.1.mixer.sublayer.k.weight' is missing$"):
        load_weights(Decoder(CONFIG), weights)


def test_a_left_over_weight_is_named():
    with pytest.raises(ValueError, match=r"^the model has no place for weight 'head.weight'$"):
        load_weights(Decoder(CONFIG), state() | {"head.weight": torch.zeros(11, 8)})


def test_a_misshapen_weight_is_named_with_both_shapes():
    message = r"^weight 'embed.weight' has shape \(8, 11\), the model wants \(11, 8\)$"
    with pytest.raises(ValueError, match=message):
        load_weights(Decoder(CONFIG), state() | {"embed.weight": torch.zeros(8, 11)})


def test_a_refused_state_changes_nothing():
    model = Decoder(CONFIG)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="missing"):
        load_weights(model, {"embed.weight": torch.zeros(11, 8)})
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_name_outside_the_table_is_named():
    with pytest.raises(
        ValueError, match=r"^1 weights are not in this family's table, the first is 'model.extra'$"
    ):
        rename({"model.extra": torch.zeros(1)}, LLAMA, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not one of llama, mistral, qwen3, smollm3"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}},
            "rope_type 'yarn' is not supported yet",
        ),
        ({"use_sliding_window": True}, "use_sliding_window is not supported yet"),
    ],
)
def test_an_unsupported_configuration_is_refused(change, message):
    config = theirs("qwen3")[1].to_dict() | change
    with pytest.raises(ValueError, match=f"^{message}$"):
        from_llama_config(config)


def test_smollm3_layers_without_positions_come_from_either_option():
    config = theirs("smollm3")[1].to_dict()
    assert from_llama_config(config).nope_layers == (0,)
    assert converted("smollm3, tied")[0].nope_layers == (1,)
    del config["no_rope_layers"]
    config["num_hidden_layers"] = 9
    assert from_llama_config(config).nope_layers == (3, 7)  # every fourth, as in SmolLM3 itself
    config["no_rope_layers"] = [1] * 8
    with pytest.raises(ValueError, match=r"^no_rope_layers has 8 entries for 9 layers$"):
        from_llama_config(config)


def test_layers_without_positions_are_needed_where_they_are():
    config, weights = converted("smollm3")
    expected = theirs("smollm3")[2]
    for layers in ((), (1,), (0, 1)):
        logits = build(dataclasses.replace(config, nope_layers=layers), weights, Decoder)(IDS)
        assert (logits - expected).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt_neo"}, "model_type 'gpt_neo' is not one of gpt2, gpt_bigcode"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False is not supported yet"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is not supported yet"),
        ({"add_cross_attention": True}, "add_cross_attention is not supported yet"),
    ],
)
def test_an_unsupported_gpt2_is_refused(change, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        from_gpt2_config(theirs("gpt2")[1].to_dict() | change)


def test_gpt2_files_of_any_age_are_read():
    config, weights = converted("gpt2, tied")
    state = theirs("gpt2, tied")[0].state_dict()
    bare = {n.removeprefix("transformer."): t for n, t in state.items() if n != "lm_head.weight"}
    old = bare | {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    for file in (bare, old):
        read = gpt2_weights(file, config)
        assert read.keys() == weights.keys()
        assert all(torch.equal(read[name], weights[name]) for name in read)


def test_another_gguf_architecture_is_refused():
    with pytest.raises(ValueError, match=r"^architecture 'gemma' is not 'llama'$"):
        from_gguf_metadata({"general.architecture": "gemma"}, tied=True)


# -------------------------------------------------------------------------------------------- GGUF


def test_unpermute_brings_pairs_back_to_halves():
    # llama.cpp writes rows 0, d/2, 1, d/2 + 1, ... of each head.
    rows = torch.arange(12.0)[:, None].expand(12, 3)
    written = rows.view(2, 2, 3, 3).transpose(1, 2).reshape(12, 3)
    assert written[:6, 0].tolist() == [0, 3, 1, 4, 2, 5]
    assert torch.equal(unpermute(written, 2), rows)


def test_gguf_names_and_permuted_rows_give_the_same_model():
    config, weights = converted("llama")
    names = {
        "mixer.norm": "attn_norm", "mixer.sublayer.q": "attn_q", "mixer.sublayer.k": "attn_k",
        "mixer.sublayer.v": "attn_v", "mixer.sublayer.out": "attn_output", "feedforward.norm": "ffn_norm",
        "feedforward.sublayer.gate": "ffn_gate", "feedforward.sublayer.up": "ffn_up",
        "feedforward.sublayer.down": "ffn_down",
    }  # fmt: skip
    file = {
        "token_embd.weight": "embed.weight",
        "output_norm.weight": "norm.weight",
        "output.weight": "head.weight",
    }
    file |= {f"blk.{i}.{g}.weight": f"blocks.{i}.{o}.weight" for i in range(2) for o, g in names.items()}
    stored = {theirs: weights[ours] for theirs, ours in file.items()}
    for name, tensor in stored.items():
        if "attn_q" in name or "attn_k" in name:
            heads = 4 if "attn_q" in name else 2
            stored[name] = tensor.view(heads, 2, -1, 24).transpose(1, 2).reshape(tensor.shape)
    assert error("llama", gguf_weights(stored, config)) < 1e-5


def test_gguf_metadata_become_the_configuration():
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.tokens": ["a"] * 61,
        "llama.embedding_length": 24,
        "llama.block_count": 2,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.feed_forward_length": 40,
        "llama.context_length": 64,
        "llama.attention.layer_norm_rms_epsilon": 1e-6,
        "llama.rope.freq_base": 10000.0,
    }
    config = from_gguf_metadata(metadata, tied=False)
    wanted = from_llama_config(theirs("llama")[1].to_dict())
    assert (wanted.head_dim, config.head_dim) == (6, None)  # 24 / 4 either way
    assert {**vars(config), "head_dim": 6} == vars(wanted)
