"""Tiny random BERT, RoBERTa, T5 and BART of transformers, converted: every parameter drawn anew, every one needed."""

import dataclasses
import functools

import pytest
import torch
from torch import nn

from llm_atlas.models.encoder import Encoder
from llm_atlas.models.encoder_decoder import EncoderDecoder
from llm_atlas.models.families import build
from llm_atlas.models.families_encoders import (
    bart_weights,
    bert_weights,
    from_bart_config,
    from_bert_config,
    from_t5_config,
    roberta_weights,
    t5_weights,
)
from llm_atlas.nn.masks import PAD

GENERATOR = torch.Generator().manual_seed(1)
IDS = torch.randint(3, 61, (2, 17), generator=GENERATOR)
TYPES = torch.randint(2, (2, 17), generator=GENERATOR)
TARGET = torch.randint(3, 61, (2, 9), generator=GENERATOR)
# The last tokens of the second row are padding.
KEEP = torch.arange(17) < torch.tensor([[17], [11]])
POSITIONS = torch.where(KEEP, torch.arange(17), PAD)

BERT_SHAPE = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "pad_token_id": 0,
}
T5_SHAPE = {
    "vocab_size": 61,
    "d_model": 24,
    "d_kv": 5,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
}
BART_SHAPE = {
    "vocab_size": 61,
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 32,
    "pad_token_id": 1,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}


def make(family: str):
    from transformers import (
        BartConfig,
        BartForConditionalGeneration,
        BertConfig,
        BertForMaskedLM,
        BertModel,
        RobertaConfig,
        RobertaForMaskedLM,
        RobertaModel,
        T5Config,
        T5ForConditionalGeneration,
    )

    if family == "bert":
        return BertModel(BertConfig(**BERT_SHAPE, max_position_embeddings=32))
    if family == "bert, masked":
        odd = {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3, "max_position_embeddings": 17}
        return BertForMaskedLM(BertConfig(**BERT_SHAPE | odd))
    if family == "roberta":
        return RobertaModel(
            RobertaConfig(
                **BERT_SHAPE | {"max_position_embeddings": 32, "pad_token_id": 2, "hidden_act": "relu"}
            )
        )
    if family == "roberta, masked":  # 17 tokens fill the table: rows 0 and 1 are padding's
        odd = {"max_position_embeddings": 19, "pad_token_id": 1}
        return RobertaForMaskedLM(RobertaConfig(**BERT_SHAPE | odd))
    if family == "t5, tied":
        return T5ForConditionalGeneration(T5Config(**T5_SHAPE, num_decoder_layers=3))
    if family == "t5":  # version 1.1
        config = T5Config(**T5_SHAPE, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
        model = T5ForConditionalGeneration(config)
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
        return model
    if family == "bart, scaled":
        odd = {"scale_embedding": True, "decoder_layers": 1, "activation_function": "relu"}
        return BartForConditionalGeneration(BartConfig(**BART_SHAPE | odd))
    return BartForConditionalGeneration(BartConfig(**BART_SHAPE | {"max_position_embeddings": 17}))


@functools.cache
def theirs(family: str):
    """A tiny model of the family, its configuration and what it gives."""
    model = make(family).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    embeddings = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    for name, parameter in model.named_parameters():
        draw = torch.randn(parameter.shape, generator=generator)
        # Nothing scales T5's attention logits; and large biases would make a post-norm encoder's tokens all alike.
        scale = 0.5 if family.startswith("t5") else 0.3 if name.endswith("bias") else 1.0
        if parameter.dim() == 2:
            scale = 0.3 if id(parameter) in embeddings else parameter.shape[1] ** -0.5
        if name == "shared.weight" and family == "t5, tied":  # its logits are scaled down
            scale = 3.0
        parameter.data = draw * scale
    if family.startswith("bart"):
        model.final_logits_bias.normal_(generator=generator)
    out = reference(model, family)
    assert 0.3 < out.std() < 3
    return model, model.config, out


def reference(model, family: str, *, keep: torch.Tensor | None = None) -> torch.Tensor:
    keep = None if keep is None else keep.long()
    if family.startswith(("t5", "bart")):
        return model(input_ids=IDS, attention_mask=keep, decoder_input_ids=TARGET).logits
    out = model(IDS, attention_mask=keep, token_type_ids=TYPES)
    if "masked" in family:
        return out.logits
    return torch.cat([out.last_hidden_state, out.pooler_output[:, None]], dim=1)


def outputs(model: nn.Module, family: str, **how) -> torch.Tensor:
    """What `reference` gives, of our model."""
    if family.startswith(("t5", "bart")):
        return model(IDS, TARGET, source_positions=how.get("positions"))
    if "masked" in family:
        return model(IDS, token_types=TYPES, **how)
    hidden = model.hidden(IDS, token_types=TYPES, **how)
    return torch.cat([hidden, model.pool(hidden)[:, None]], dim=1)


def converted(family: str):
    model, config, _ = theirs(family)
    config, state = config.to_dict(), model.state_dict()
    if family.startswith(("bert", "roberta")):
        ours = from_bert_config(config, pooler="masked" not in family, masked_lm="masked" in family)
        return ours, (bert_weights if family.startswith("bert") else roberta_weights)(state, ours)
    if family.startswith("t5"):
        ours = from_t5_config(config, tied="tied" in family)
        return ours, t5_weights(state, ours)
    ours = from_bart_config(config)
    return ours, bart_weights(state, ours)


def built(family: str, weights: dict[str, torch.Tensor] | None = None) -> nn.Module:
    config, own = converted(family)
    kind = EncoderDecoder if family.startswith(("t5", "bart")) else Encoder
    return build(config, own if weights is None else weights, kind).eval().requires_grad_(False)


def apart(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return ((ours - expected).abs().max() / expected.abs().max()).item()


def error(family: str, weights: dict[str, torch.Tensor] | None = None) -> float:
    """Largest difference of outputs, relative to the largest output."""
    return apart(outputs(built(family, weights), family), theirs(family)[2])


FAMILIES = ["bert", "bert, masked", "roberta", "roberta, masked", "t5, tied", "t5", "bart", "bart, scaled"]
ATTENTION = ["q", "k", "v", "out"]


def both(names: list[str]) -> list[str]:
    return [f"{name}.{part}" for name in names for part in ("weight", "bias")]


def block(where: str, *, cross: bool = False, gated: bool = False, biases: bool = True) -> list[str]:
    parts = ["mixer", "cross"] if cross else ["mixer"]
    names = [f"{part}.sublayer.{name}" for part in parts for name in ATTENTION]
    names += [f"feedforward.sublayer.{name}" for name in (["gate"] if gated else []) + ["up", "down"]]
    names += [f"{part}.norm" for part in [*parts, "feedforward"]]
    names = both(names) if biases else [f"{name}.weight" for name in names]
    return [f"{where}.{name}" for name in names]


def tensors(family: str) -> list[str]:
    """Our names of all tensors of the model, written down without the tables under test."""
    if family.startswith(("bert", "roberta")):
        names = ["embed.weight", "positions.table.weight", "token_types.weight", *both(["embed_norm"])]
        names += [*both(["head.dense", "head.norm"]), "head.bias"] if "masked" in family else both(["pooler"])
        return names + block("blocks.0") + block("blocks.1")
    names = ["embed.weight"]
    halves = [("encoder", 2), ("decoder", {"t5, tied": 3, "bart, scaled": 1}.get(family, 2))]
    if family.startswith("t5"):
        names += [] if "tied" in family else ["head.weight"]
        names += [
            f"{half}.{name}.weight" for half, _ in halves for name in ("attention_positions.table", "norm")
        ]
        how = {"gated": "tied" not in family, "biases": False}
    else:
        names += ["logits_bias"]
        for half, _ in halves:
            names += [f"{half}.positions.table.weight", *both([f"{half}.embed_norm"])]
        how = {}
    for half, layers in halves:
        for layer in range(layers):
            names += block(f"{half}.blocks.{layer}", cross=half == "decoder", **how)
    return names


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_those_of_transformers(family):
    assert sorted(converted(family)[1]) == sorted(tensors(family))
    assert error(family) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_behind_padding_are_those_of_transformers(family):
    model = theirs(family)[0]
    if family.startswith("roberta"):  # there ids alone say what is padding, and where the others stand
        pad = model.config.pad_token_id
        kept = torch.where(KEEP, IDS, pad)
        assert not (pad == IDS).any()
        out = model(kept, attention_mask=KEEP.long(), token_type_ids=TYPES)
        expected = out.logits if "masked" in family else out.last_hidden_state
    else:
        expected = reference(model, family, keep=KEEP)
    ours = outputs(built(family), family, positions=POSITIONS)
    if not family.startswith(("t5", "bart")):
        ours, expected = ours[:, :17][KEEP], expected[:, :17][KEEP]
    assert apart(ours, expected) < 1e-5
    assert apart(outputs(built(family), family), theirs(family)[2]) < 1e-5


@pytest.mark.parametrize(("family", "name"), [(f, n) for f in FAMILIES for n in tensors(f)])
def test_every_tensor_is_needed(family, name):
    weights = converted(family)[1]
    weights[name] = torch.zeros_like(weights[name])
    if name.endswith("sublayer.k.bias"):
        # q . b is the same for all keys, and the softmax does not see it.
        assert error(family, weights) < 1e-5
    else:
        assert error(family, weights) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parameters_are_all_theirs(family):
    # But for the rows of positions that no token has; BART's bias of the logits is a buffer of theirs.
    model, config, _ = theirs(family)
    expected = sum(p.numel() for p in model.parameters())
    if family.startswith("roberta"):
        expected -= (config.pad_token_id + 1) * 24
    if family.startswith("bart"):
        expected += 61 - 2 * 2 * 24
    assert sum(p.numel() for p in built(family).parameters()) == expected


@pytest.mark.parametrize("family", ["t5, tied", "t5", "bart", "bart, scaled"])
def test_cached_is_uncached(family):
    reading = built(family).read(IDS)
    cache = reading.make_cache()
    parts = [reading(part, cache=cache) for part in TARGET.split([4, 1, 1, 3], dim=1)]
    assert apart(torch.cat(parts, dim=1), theirs(family)[2]) < 1e-5


def test_bert_files_of_any_age_are_read():
    config, weights = converted("bert, masked")
    state = theirs("bert, masked")[0].state_dict()
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in state.items()
        if ".decoder." not in name
    }
    old |= {"bert.embeddings.position_ids": torch.arange(17)[None]}
    old |= {"cls.seq_relationship.weight": torch.ones(2, 24), "cls.seq_relationship.bias": torch.ones(2)}
    assert len(set(old) & set(state)) < len(state) - 5
    read = bert_weights(old, config)
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], weights[name]) for name in read)


def test_published_configurations_of_t5_say_by_their_tie_what_they_are():
    published = T5_SHAPE | {"model_type": "t5", "layer_norm_epsilon": 1e-6}
    first = from_t5_config(published)
    assert (first.tied, first.scale_logits, first.gated, first.activation) == (True, True, False, "relu")
    second = from_t5_config(published | {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"})
    assert (second.tied, second.scale_logits, second.gated, second.activation) == (
        False,
        False,
        True,
        "gelu_tanh",
    )
    assert from_t5_config(published, context=4096).context == 4096
    newer = theirs("t5")[1].to_dict()
    assert newer["tie_word_embeddings"]  # transformers 5 writes it for both
    for tied in (True, False):
        read = from_t5_config(newer, tied=tied)
        assert (read.tied, read.scale_logits) == (tied, False)


def test_the_scale_of_t5s_logits_and_of_its_attention_are_needed():
    config, weights = converted("t5, tied")
    for change in ({"scale_logits": False}, {"attention_scale": None}, {"relative_distance": 30}):
        other = build(dataclasses.replace(config, **change), weights, EncoderDecoder)
        assert apart(other(IDS, TARGET), theirs("t5, tied")[2]) > 1e-3


def test_the_scale_of_barts_embeddings_is_needed():
    config, weights = converted("bart, scaled")
    other = build(dataclasses.replace(config, embed_scale=1.0), weights, EncoderDecoder)
    assert apart(other(IDS, TARGET), theirs("bart, scaled")[2]) > 1e-2


@pytest.mark.parametrize("family", ["bert", "roberta", "t5", "bart"])
def test_a_missing_weight_is_named(family):
    config, weights = converted(family)
    name = tensors(family)[-1]
    del weights[name]
    with pytest.raises(ValueError, match=rf"^weight '{name}' is missing$"):
        build(config, weights, EncoderDecoder if family in ("t5", "bart") else Encoder)


def test_a_stranger_among_the_weights_is_named():
    config = converted("bert")[0]
    with pytest.raises(ValueError, match=r"the first is 'bert.extra'$"):
        bert_weights({"bert.bert.extra": torch.zeros(1)}, config)


@pytest.mark.parametrize(
    ("read", "family", "change", "message"),
    [
        (from_bert_config, "bert", {"model_type": "t5"}, "model_type 't5' is not one of bert, roberta"),
        (from_bert_config, "bert", {"is_decoder": True}, "is_decoder=True is not supported yet"),
        (
            from_bert_config,
            "bert",
            {"position_embedding_type": "relative_key"},
            "position_embedding_type 'relative_key' is not supported yet",
        ),
        (from_t5_config, "t5", {"model_type": "bert"}, "model_type 'bert' is not 't5'"),
        (
            from_t5_config,
            "t5",
            {"feed_forward_proj": "doubly-gelu"},
            "feed_forward_proj 'doubly-gelu' is not supported yet",
        ),
        (from_bart_config, "bart", {"model_type": "mbart"}, "model_type 'mbart' is not 'bart'"),
        (
            from_bart_config,
            "bart",
            {"decoder_ffn_dim": 41},
            "encoder_ffn_dim 40 and decoder_ffn_dim 41 must be equal",
        ),
    ],
)
def test_an_unsupported_configuration_is_refused(read, family, change, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        read(theirs(family)[1].to_dict() | change)


def test_an_untied_masked_head_is_refused():
    config = theirs("bert, masked")[1].to_dict() | {"tie_word_embeddings": False}
    with pytest.raises(ValueError, match=r"^tie_word_embeddings=False is not supported yet$"):
        from_bert_config(config, masked_lm=True)


def test_a_roberta_head_of_another_activation_than_its_blocks_is_refused():
    config = theirs("roberta")[1].to_dict()
    assert from_bert_config(config).activation == "relu"
    with pytest.raises(ValueError, match=r"^hidden_act 'relu' is not that of RoBERTa's head"):
        from_bert_config(config, masked_lm=True)
