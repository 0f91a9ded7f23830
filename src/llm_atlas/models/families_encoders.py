"""The names and configurations of BERT, RoBERTa, T5 and BART, read into our Encoder and EncoderDecoder.

As in `families`: a family is a table of names, `{}` for the number of a layer, and a way to read its configuration.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from llm_atlas.models.encoder import EncoderConfig
from llm_atlas.models.encoder_decoder import EncoderDecoderConfig
from llm_atlas.models.families import Names, check_kind, our_activation, refuse, rename, tie


def _with_bias(names: Names) -> Names:
    return {
        f"{theirs}.{part}": f"{ours}.{part}" for theirs, ours in names.items() for part in ("weight", "bias")
    }


def _layers(names: Names, theirs: str, ours: str) -> Names:
    return {f"{theirs}{{}}.{their}": f"{ours}{{}}.{our}" for their, our in names.items()}


_BERT_BODY = {
    "embeddings.word_embeddings.weight": "embed.weight",
    "embeddings.position_embeddings.weight": "positions.table.weight",
    "embeddings.token_type_embeddings.weight": "token_types.weight",
    **_with_bias({"embeddings.LayerNorm": "embed_norm", "pooler.dense": "pooler"}),
    **_layers(
        _with_bias(
            {
                "attention.self.query": "mixer.sublayer.q",
                "attention.self.key": "mixer.sublayer.k",
                "attention.self.value": "mixer.sublayer.v",
                "attention.output.dense": "mixer.sublayer.out",
                "attention.output.LayerNorm": "mixer.norm",
                "intermediate.dense": "feedforward.sublayer.up",
                "output.dense": "feedforward.sublayer.down",
                "output.LayerNorm": "feedforward.norm",
            }
        ),
        "encoder.layer.",
        "blocks.",
    ),
}
BERT = (
    _BERT_BODY
    | {"cls.predictions.bias": "head.bias", "cls.predictions.decoder.bias": "head.bias"}
    | {"cls.predictions.decoder.weight": "embed.weight"}
    | _with_bias(
        {
            "cls.predictions.transform.dense": "head.dense",
            "cls.predictions.transform.LayerNorm": "head.norm",
        }
    )
)
ROBERTA = (
    _BERT_BODY
    | {"lm_head.bias": "head.bias", "lm_head.decoder.bias": "head.bias"}
    | {"lm_head.decoder.weight": "embed.weight"}
    | _with_bias({"lm_head.dense": "head.dense", "lm_head.layer_norm": "head.norm"})
)


def _t5_half(half: str, feedforward: int) -> Names:
    attention = {"q": "q", "k": "k", "v": "v", "o": "out"}
    # v1.0 has wi; where the feed-forward network is gated, wi_0 is the gate.
    network = {"wi": "up", "wi_0": "gate", "wi_1": "up", "wo": "down"}
    parts = [
        (0, "SelfAttention", "mixer", attention),
        (feedforward, "DenseReluDense", "feedforward", network),
    ]
    if half == "decoder":
        parts.append((1, "EncDecAttention", "cross", attention))
    names = {
        f"layer.{at}.{theirs}.{their}.weight": f"{ours}.sublayer.{our}.weight"
        for at, theirs, ours, matrices in parts
        for their, our in matrices.items()
    }
    names |= {f"layer.{at}.layer_norm.weight": f"{ours}.norm.weight" for at, _, ours, _ in parts}
    table = f"{half}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return _layers(names, f"{half}.block.", f"{half}.blocks.") | {
        table: f"{half}.attention_positions.table.weight",
        f"{half}.final_layer_norm.weight": f"{half}.norm.weight",
    }


_SHARED = {
    f"{where}.weight": "embed.weight" for where in ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
}
T5 = {
    **_SHARED,
    "lm_head.weight": "head.weight",
    **_t5_half("encoder", 1),
    **_t5_half("decoder", 2),
}


def _bart_half(half: str) -> Names:
    attention = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "out"}
    parts = {"self_attn": "mixer"} | ({"encoder_attn": "cross"} if half == "decoder" else {})
    names = {
        f"{theirs}.{their}": f"{ours}.sublayer.{our}"
        for theirs, ours in parts.items()
        for their, our in attention.items()
    }
    names |= {f"{theirs}_layer_norm": f"{ours}.norm" for theirs, ours in parts.items()}
    names |= {"fc1": "feedforward.sublayer.up", "fc2": "feedforward.sublayer.down"}
    names |= {"final_layer_norm": "feedforward.norm"}
    return {
        f"{half}.embed_positions.weight": f"{half}.positions.table.weight",
        **_with_bias({f"{half}.layernorm_embedding": f"{half}.embed_norm"}),
        **_layers(_with_bias(names), f"{half}.layers.", f"{half}.blocks."),
    }


BART = {
    **_SHARED,
    "lm_head.weight": "head.weight",
    "final_logits_bias": "logits_bias",
    **_bart_half("encoder"),
    **_bart_half("decoder"),
}


def from_bert_config(
    config: Mapping[str, Any], *, pooler: bool = False, masked_lm: bool = False
) -> EncoderConfig:
    """A transformers configuration (as a dict) of the families `bert` and `roberta`, with the heads asked for.

    RoBERTa's positions begin behind the id of its padding: the rows up to there belong to no token, and
    `roberta_weights` leaves them out. Raises ValueError for options that are not supported, by name.
    """
    kind = check_kind(config, "bert", "roberta")
    refuse(config, "is_decoder", "add_cross_attention")
    embedding = config.get("position_embedding_type", "absolute")
    if embedding != "absolute":
        raise ValueError(f"position_embedding_type {embedding!r} is not supported yet")
    if masked_lm and not config.get("tie_word_embeddings", True):
        raise ValueError("tie_word_embeddings=False is not supported yet")
    if masked_lm and kind == "roberta" and config["hidden_act"] != "gelu":
        raise ValueError(
            f"hidden_act {config['hidden_act']!r} is not that of RoBERTa's head, which is always 'gelu'"
        )
    unused = config["pad_token_id"] + 1 if kind == "roberta" else 0
    return EncoderConfig(
        vocab=config["vocab_size"],
        dim=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        hidden=config["intermediate_size"],
        context=config["max_position_embeddings"] - unused,
        activation=our_activation(config["hidden_act"]),
        norm_eps=config["layer_norm_eps"],
        token_types=config["type_vocab_size"],
        pooler=pooler,
        masked_lm=masked_lm,
    )


def bert_weights(weights: Mapping[str, Tensor], config: EncoderConfig) -> dict[str, Tensor]:
    """All tensors of a BERT checkpoint under our names.

    Names may begin with `bert.`, and norms may have a gamma and beta (the first files have). Left out: the constant
    lists of positions and types, and the head for the next sentence. The head's copies of the tied embedding and of its
    bias must be copies.
    """
    return rename(_bert_read(weights, "bert."), BERT, config.layers)


def roberta_weights(weights: Mapping[str, Tensor], config: EncoderConfig) -> dict[str, Tensor]:
    """All tensors of a RoBERTa checkpoint under our names, without the rows of positions that no token has.

    As `bert_weights`; names may begin with `roberta.`.
    """
    named = rename(_bert_read(weights, "roberta."), ROBERTA, config.layers)
    return _cut_positions(named, config.context)


def from_t5_config(
    config: Mapping[str, Any], *, tied: bool | None = None, context: int = 512
) -> EncoderDecoderConfig:
    """A transformers configuration (as a dict) of the family `t5`, version 1.0 or 1.1.

    1.0 ties the logits to the embedding and scales them; 1.1 does neither. Newer files write `tie_word_embeddings` for
    both and say so in `scale_decoder_outputs`, so `tied` may be given: whether the weights lack `lm_head.weight`.
    T5 has no longest position: `context` is what it was trained with, and may be more.
    Raises ValueError for options that are not supported, by name.
    """
    check_kind(config, "t5")
    scaled = config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True))
    gate, _, name = config.get("feed_forward_proj", "relu").rpartition("-")
    if gate not in ("", "gated"):
        raise ValueError(f"feed_forward_proj {config['feed_forward_proj']!r} is not supported yet")
    decoder_layers = config.get("num_decoder_layers")
    return EncoderDecoderConfig(
        vocab=config["vocab_size"],
        dim=config["d_model"],
        layers=config["num_layers"],
        decoder_layers=decoder_layers,
        heads=config["num_heads"],
        head_dim=config["d_kv"],
        hidden=config["d_ff"],
        context=context,
        # "gated-gelu" has always meant the tanh form.
        activation="gelu_tanh" if gate and name == "gelu" else our_activation(name),
        gated=bool(gate),
        norm_eps=config["layer_norm_epsilon"],
        relative_buckets=config["relative_attention_num_buckets"],
        relative_distance=config.get("relative_attention_max_distance", 128),
        attention_scale=1.0,
        tied=scaled if tied is None else tied,
        scale_logits=scaled,
    )


def t5_weights(weights: Mapping[str, Tensor], config: EncoderDecoderConfig) -> dict[str, Tensor]:
    """All tensors of a T5 checkpoint under our names; copies of the shared embedding must be copies."""
    # Old files have a table in the decoder's cross-attention, which no release of the model reads.
    unread = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    read = {name: tensor for name, tensor in weights.items() if name != unread}
    return rename(read, tie(T5, config.tied), _most_layers(config))


def from_bart_config(config: Mapping[str, Any], *, logits_bias: bool = True) -> EncoderDecoderConfig:
    """A transformers configuration (as a dict) of the family `bart`.

    `logits_bias`: whether the weights have `final_logits_bias`, as those of the bare BartModel have not (bart-base).
    Raises ValueError for halves of different width and for options that are not supported, by name.
    """
    check_kind(config, "bart")
    for name in ("attention_heads", "ffn_dim"):
        encoder, decoder = config[f"encoder_{name}"], config[f"decoder_{name}"]
        if encoder != decoder:
            raise ValueError(f"encoder_{name} {encoder} and decoder_{name} {decoder} must be equal")
    refuse(config, "normalize_before", "static_position_embeddings")
    return EncoderDecoderConfig(
        vocab=config["vocab_size"],
        dim=config["d_model"],
        layers=config["encoder_layers"],
        decoder_layers=config["decoder_layers"],
        heads=config["encoder_attention_heads"],
        hidden=config["encoder_ffn_dim"],
        context=config["max_position_embeddings"],
        activation=our_activation(config["activation_function"]),
        bias=True,
        norm="layer",
        norm_eps=1e-5,
        placement="post",
        positions="learned",
        embed_norm=True,
        embed_scale=config["d_model"] ** 0.5 if config.get("scale_embedding") else 1.0,
        tied=config.get("tie_word_embeddings", True),
        logits_bias=logits_bias,
    )


def bart_weights(weights: Mapping[str, Tensor], config: EncoderDecoderConfig) -> dict[str, Tensor]:
    """All tensors of a BART checkpoint under our names.

    Names may begin with `model.`; copies of the shared embedding must be copies. Left out are the first two rows of
    both tables of positions: BART begins to count at 2, as if padding's id were still in the way.
    """
    unread = ("encoder.version", "decoder.version")  # of the oldest files
    read = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    read = {name: tensor for name, tensor in read.items() if name not in unread}
    if "final_logits_bias" in read:
        read["final_logits_bias"] = read["final_logits_bias"].flatten()  # (1, vocab)
    return _cut_positions(rename(read, tie(BART, config.tied), _most_layers(config)), config.context)


def _bert_read(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    unread = ("cls.seq_relationship.", "embeddings.position_ids", "embeddings.token_type_ids")
    read = {}
    for name, tensor in weights.items():
        name = name.removeprefix(prefix)
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if not name.startswith(unread):
            read[name] = tensor
    return read


def _cut_positions(weights: dict[str, Tensor], context: int) -> dict[str, Tensor]:
    """The last `context` rows of every table of positions."""
    return {
        name: tensor[-context:].contiguous() if name.endswith("positions.table.weight") else tensor
        for name, tensor in weights.items()
    }


def _most_layers(config: EncoderDecoderConfig) -> int:
    return max(config.layers, config.decoder_layers or 0)
