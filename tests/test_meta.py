"""No literal devices: everything public runs on the `meta` device and makes its tensors nowhere else.

`meta` tensors have a shape and no numbers, so a GPU is not needed to see that code follows the device of its input.
What reads numbers back (`.tolist()`, `int(tensor)`) cannot run there and is listed with its reason.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import llm_atlas.infer
import llm_atlas.models
import llm_atlas.nn
from llm_atlas.infer import budget, generate, sampling
from llm_atlas.models import (
    decoder,
    encoder,
    encoder_decoder,
    families,
    families_decoders,
    families_encoders,
    families_vision,
    grouping,
    inputs,
    minilm,
    vision,
    vision_language,
)
from llm_atlas.models import inspect as look
from llm_atlas.nn import (
    activations,
    attention,
    block,
    cache,
    dropout,
    feedforward,
    flash,
    latent_attention,
    linear_attention,
    local_attention,
    masks,
    moe,
    norm,
    positions,
)
from llm_atlas.text.wordpiece import WordPiece


class OnlyMeta(TorchDispatchMode):
    """Every tensor that is made inside must be on `meta`."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                raise AssertionError(f"{function} made a tensor on {tensor.device}")
        return out


def x(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def at(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta", dtype=torch.long)


def on_meta(make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """Made on the CPU and moved, as `model.to("cuda")` does: buffers must move too."""
    with _disable_current_modes():
        return make().to("meta")


CONFIG = decoder.DecoderConfig(
    vocab=11, dim=8, layers=2, heads=4, kv_heads=2, hidden=12, context=16, qk_norm=True
)
CONFIGS = [
    CONFIG,
    decoder.DecoderConfig(
        vocab=11, dim=8, layers=2, heads=2, hidden=12, context=16, norm="layer", gated=False, activation="gelu",
        positions="learned", attention_bias=True, tied=False, placement="sandwich",
    ),
    decoder.DecoderConfig(
        vocab=11, dim=8, layers=2, heads=2, hidden=12, context=16, positions="sinusoidal", placement="post"
    ),
    decoder.DecoderConfig(vocab=11, dim=8, layers=2, heads=2, hidden=12, context=16, positions="none"),
    decoder.DecoderConfig(
        vocab=11, dim=8, layers=2, heads=2, hidden=12, context=16, rotary_layout="interleaved", rotary_dim=2,
        nope_layers=(1,),
    ),
    decoder.DecoderConfig(vocab=11, dim=8, layers=2, heads=2, hidden=12, context=16, positions="alibi"),
    decoder.DecoderConfig(vocab=11, dim=8, layers=2, heads=2, hidden=12, context=16, positions="t5"),
    decoder.DecoderConfig(
        vocab=11, dim=8, layers=2, heads=4, kv_heads=2, hidden=12, context=16, positions="shaw"
    ),
]  # fmt: skip
MIXED = [
    decoder.DecoderConfig(vocab=11, dim=8, layers=2, heads=2, hidden=12, context=16, **mixer)
    for mixer in (
        {"window": 3, "full_layers": (1,)},
        {"latent": decoder.LatentConfig(kv_rank=5, rope_dim=4, q_rank=3)},
        {"linear": decoder.LinearConfig(kind="gated-delta", conv=2), "full_layers": (0,)},
    )
]

TINY = {"dim": 8, "layers": 2, "heads": 2, "hidden": 12, "context": 16}
BERT = encoder.EncoderConfig(vocab=11, **TINY, token_types=2, pooler=True, masked_lm=True)
ENCODERS = [
    BERT,
    encoder.EncoderConfig(vocab=11, **TINY, positions="sinusoidal", placement="sandwich", dropout=0.5),
    encoder.EncoderConfig(
        vocab=11, **TINY, positions="t5", placement="pre", norm="rms", gated=True, bias=False
    ),
    encoder.EncoderConfig(vocab=11, **TINY, positions="none", embed_norm=False),
]
T5 = encoder_decoder.EncoderDecoderConfig(vocab=11, **TINY, gated=True, scale_logits=True)
BART = encoder_decoder.EncoderDecoderConfig(
    vocab=11, **TINY, norm="layer", placement="post", positions="learned", bias=True, embed_norm=True,
    logits_bias=True,
)  # fmt: skip
ENCODER_DECODERS = [
    T5,
    BART,
    encoder_decoder.EncoderDecoderConfig(
        vocab=11, **TINY, decoder_layers=1, positions="sinusoidal", tied=False, dropout=0.5
    ),
]
EXPERTS = [
    moe.ExpertsConfig(
        experts=4, active=2, hidden=6, shared=1, score="sigmoid", selection_bias=True, groups=2, active_groups=1,
        capacity_factor=1.0, priority=priority,
    )
    for priority in ("order", "score")
]  # fmt: skip
VISION = vision.VisionConfig(
    image=6, patch=3, dim=8, layers=2, heads=2, hidden=12, patch_bias=False, norm_before=True,
    activation=vision.quick_gelu,
)  # fmt: skip


def model(config: decoder.DecoderConfig = CONFIG) -> decoder.Decoder:
    return on_meta(lambda: decoder.Decoder(config))


def every_decoder() -> None:
    for config in CONFIGS:
        made = model(config)
        made(at(2, 5))
        made(at(2, 5), positions=at(2, 5))
        made(at(2, 5), mask=torch.ones(1, 1, 5, 5, dtype=torch.bool, device="meta"))
        for plain in (True, False):
            kept = made.make_cache()
            made(at(2, 5), cache=kept, positions=None if plain else at(2, 5))
            for new in (1, 3):
                made(at(2, new), cache=kept)
            kept.truncate(4)
            kept.fork().select(at(3))
        made(at(2, 5)).sum().backward()


def every_mixer() -> None:
    for config in MIXED:
        made = model(config)
        made(at(2, 5)).sum().backward()
        made(at(2, 5), positions=at(2, 5))
        kept = made.make_cache()
        for new in (5, 1, 3):
            made(at(2, new), cache=kept)
        kept.fork().select(at(3))


def grouped() -> None:
    grouping.group_kv_heads(model(), 1)(at(2, 5))
    grouping.pool_heads(x(8, 3), 4, 2)


def tiles() -> None:
    flash.online_softmax(x(2, 9), block=4)
    for attend in (flash.flash_attention, flash.flash_attention_2):
        q, k, v = (x(2, heads, 9, 8).requires_grad_() for heads in (4, 2, 2))
        attend(q, k, v, is_causal=True, window=3, block_q=4, block_k=4).sum().backward()


def latents() -> None:
    for q_rank, absorb, scheme in (
        (None, None, lambda: positions.RotaryPositions(4)),
        (6, True, lambda: positions.RotaryPositions(4, layout="interleaved")),
        (6, False, lambda: positions.AlibiPositions(2)),
    ):

        def make(q_rank=q_rank, absorb=absorb, scheme=scheme):
            how = {"q_rank": q_rank, "absorb": absorb, "positions": scheme()}
            return latent_attention.LatentAttention(8, 2, kv_rank=5, rope_dim=4, head_dim=3, **how)

        mixer, kept = on_meta(make), cache.KVCache(1)
        mixer(x(2, 5, 8)).sum().backward()
        for new in (5, 1, 3):
            mixer(x(2, new, 8), cache=kept[0])
        mask = torch.ones(2, 1, 3, 3, dtype=torch.bool, device="meta")
        mixer(x(2, 3, 8), positions=at(2, 3), mask=mask)


def windows() -> None:
    q, k, v = (x(2, heads, 9, 8).requires_grad_() for heads in (4, 2, 2))
    for how in ({}, {"positions": at(2, 9)}, {"is_causal": False}):
        local_attention.local_attention(q, k, v, window=3, block=2, **how).sum().backward()
    made = cache.KVCache(1, layer=lambda owner: cache.RollingLayerCache(owner, window=3, sinks=1))
    mixer = on_meta(lambda: attention.MultiHeadAttention(8, 4, window=3))
    for new in (5, 1, 2):
        mixer(x(2, new, 8), positions=made.place(new, device="meta"), cache=made[0])
    made.fork().select(at(3))


def recurrences() -> None:
    la = linear_attention
    q, k, v, h = x(2, 4, 9, 8), x(2, 2, 9, 8), x(2, 2, 9, 6), x(2, 2, 9, 1)
    real = masks.padding_mask(at(2, 9))
    la.bidirectional_linear_attention(q, k, v)
    for decay in (h, k):
        la.linear_attention(q, k, v, is_causal=True, log_decay=decay)
        la.linear_attention_recurrent(q, k, v, mask=real, log_decay=decay)
        la.linear_attention_chunked(q, k, v, mask=real, log_decay=decay)
    la.delta_rule_recurrent(q, k, v, h, mask=real, log_decay=h)
    la.delta_rule_chunked(q, k, v, h, mask=real, log_decay=h)
    la.elu_features(q), la.taylor_features(q), la.unit_length(q)
    on_meta(lambda: la.RandomFeatures(8, 5))(q)
    la.find_feature_map("elu")(q)
    la.feature_size("taylor", 8)
    la.retention_log_decay(4, device="meta")
    la.short_convolution(x(2, 9, 8), x(8, 3), real=at(2, 9) > 0, past=None)
    for kind in ("linear", "gated", "delta", "gated-delta"):
        mixer = on_meta(lambda kind=kind: la.LinearAttention(8, 4, kv_heads=2, kind=kind, conv=3))
        mixer(x(2, 9, 8), positions=at(2, 9), cache=cache.KVCache(1)[0])
        mixer.draw_gates(None)


def gates() -> None:
    activations.relu_derivative(x(3))
    activations.silu_derivative(x(3))
    activations.swiglu(x(3), x(3))
    activations.swiglu_backward(x(3), x(3), x(3))
    for form in ("none", "tanh"):
        activations.gelu_derivative(x(3), approximate=form)
        activations.geglu(x(3), x(3), approximate=form)
        activations.geglu_backward(x(3), x(3), x(3), approximate=form)


def attentions() -> None:
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool, device="meta")
    for attend in (attention.scaled_dot_product_attention, attention.fused_attention):
        for how in ({}, {"mask": mask}, {"bias": x(5, 5)}, {"mask": mask, "bias": x(5, 5)}):
            for causal in (False, True):
                attend(x(2, 4, 5, 8), x(2, 2, 5, 8), x(2, 2, 5, 8), is_causal=causal, **how)
        attend(x(2, 4, 1, 8), x(2, 2, 5, 8), x(2, 2, 5, 8))


def mixers() -> None:
    for make in (
        lambda: attention.MultiHeadAttention(
            8, 4, kv_heads=2, qk_norm=True, positions=positions.RotaryPositions(2)
        ),
        lambda: attention.MultiHeadAttention(8, 4, causal=False, bias=True),
    ):
        mixer, kept = on_meta(make), cache.KVCache(1)
        mixer(x(2, 5, 8))
        mixer(x(2, 5, 8), cache=kept[0])
        mixer(x(2, 3, 8), cache=kept[0])
        mixer(x(2, 3, 8), context=x(2, 6, 8))


def caches() -> None:
    kept = cache.KVCache(1, capacity=2)
    for new in (1, 4):
        kept.place(new, at(2, new))
        kept[0].append(x(2, 3, new, 4), x(2, 3, new, 4))
    kept.select(at(3))
    kept.fork().truncate(2)


def blocks() -> None:
    def make():
        return block.Block(
            attention.MultiHeadAttention(8, 2),
            feedforward.FeedForward(8),
            lambda: norm.LayerNorm(8),
            cross=attention.MultiHeadAttention(8, 2, context_dim=6),
        )

    on_meta(make)(
        x(2, 5, 8), context=x(2, 3, 6), context_mask=torch.ones(2, 1, 1, 3, dtype=torch.bool, device="meta")
    )


def dropping() -> None:
    config = decoder.DecoderConfig(vocab=11, dim=8, layers=1, heads=2, hidden=12, context=16, dropout=0.5)
    made = model(config)
    dropout.seed_dropout(made, None)
    made(at(2, 5)).sum().backward()
    dropout.dropout(x(3, 5), 0.5)


def watched() -> None:
    made = model()
    with (
        look.hooked([(made.norm, lambda *_: None)]),
        look.ablate_heads(made, [(0, 1)]),
        look.ablate(look.mixer(made, 1)),
    ):
        look.logit_lens(made, look.residual_stream(made, at(2, 5)))
    for score in (look.first_token_score, look.previous_token_score, look.self_score):
        score(x(2, 5, 5))
    look.parameter_ledger(made)
    for config in CONFIGS[:2]:  # gated and not
        made = model(config)
        look.feed_forward(made, 1)
        look.pre_activations(made, at(2, 5), rows=1)
        found = look.unit_statistics(made, at(2, 5), threshold=0.1)
        assert found.dead.shape == found.active_share.shape == (2,)


def schemes() -> None:
    for scheme in (
        positions.PositionScheme(),
        positions.SinusoidalPositions(8),
        on_meta(lambda: positions.LearnedPositions(9, 8)),
        on_meta(lambda: positions.RotaryPositions(8, length=9)),
        on_meta(lambda: positions.RotaryPositions(8, length=9, layout="interleaved", rotary_dim=4)),
        positions.AlibiPositions(3),
        on_meta(lambda: positions.RelativePositionBias(3, bidirectional=True)),
        on_meta(lambda: positions.RelativePositionBias(3, bidirectional=False)),
        on_meta(lambda: positions.ShawPositions(8)),
    ):
        scheme.embed(x(2, 5, 8), at(1, 5))
        scheme.rotate(x(2, 3, 5, 8), at(1, 5))
        scheme.bias(x(2, 3, 5, 8), at(1, 5), at(1, 6))
        scheme.rebuild("meta")


def encoders() -> None:
    for config in ENCODERS:
        made, keep = on_meta(lambda config=config: encoder.Encoder(config)), at(2, 5) >= 0
        encoder.mean_pool(made.hidden(at(2, 5)), keep).sum().backward()
        x5 = made.mix(x(2, 5, 8), positions=at(2, 5))
        made.hidden(at(2, 5), mask=torch.ones(2, 1, 5, 5, dtype=torch.bool, device="meta"))
        for pool in (encoder.mean_pool, encoder.cls_pool):
            encoder.unit_length(pool(x5)), pool(x5, keep)
        if config.masked_lm:
            made(at(2, 5), token_types=at(2, 5), positions=at(2, 5)).sum().backward()
            made.pool(x5, keep)


def encoder_decoders() -> None:
    for config in ENCODER_DECODERS:
        made = on_meta(lambda config=config: encoder_decoder.EncoderDecoder(config))
        made(at(2, 6), at(2, 5)).sum().backward()
        made(at(2, 6), at(2, 5), source_positions=at(2, 6), positions=at(2, 5)).sum().backward()
        for plain in (True, False):
            reading = made.read(at(2, 6), positions=None if plain else at(2, 6))
            kept = reading.make_cache()
            reading(at(2, 5), cache=kept, positions=None if plain else at(2, 5))
            for new in (1, 3):
                reading(at(2, new), cache=kept)
            kept.select(at(3))
            reading.select(at(3))(at(3, 1), cache=kept)


def experts() -> None:
    for config in EXPERTS:
        layer = on_meta(lambda config=config: moe.MixtureOfExperts(8, config, compute=moe.dense_experts))
        with moe.recorded_routing(layer) as routings:
            out = layer(x(2, 5, 8))
        (routing,) = routings.values()
        mask = at(2, 5) > 0
        losses = moe.balancing_loss(routing) + moe.balancing_loss(routing, mask=mask)
        losses = losses + moe.z_loss(routing, mask=mask) + moe.sequence_balancing_loss(routing)
        (out.sum() + losses).backward()
        moe.routing_statistics(routing)
        moe.routing_statistics(routing, mask=mask)
        layer.router.rebalance(moe.expert_load(routing))
        layer.router.reset_parameters()
        layer.experts.reset_parameters()
        moe.keep_top_k(routing.logits, 2)


def images() -> None:
    vision.patchify(x(2, 3, 6, 6), 3)
    on_meta(lambda: vision.ImageClassifier(VISION, 5))(x(2, 3, 6, 6)).sum().backward()
    for end in (None, 4):
        config = vision_language.CLIPConfig(vision=VISION, text=CONFIGS[1], features=4, end_id=end)
        on_meta(lambda config=config: vision_language.CLIP(config))(x(2, 3, 6, 6), at(3, 5)).sum().backward()
    rows = [x(2, 3, 6, 6), x(1, 3, 6, 6)]
    for both in (False, True):
        config = vision_language.VisionLanguageConfig(
            vision=VISION, text=CONFIG, image_id=12, class_token=both
        )
        made = on_meta(lambda config=config: vision_language.VisionLanguage(config))
        made(at(2, 9), images=rows).sum().backward()
        kept = made.make_cache()
        made(at(2, 9), images=x(2, 1, 3, 6, 6), positions=at(2, 9), cache=kept)
        made(at(2, 1), cache=kept)
    for every in (1, 2):
        config = vision_language.CrossVisionLanguageConfig(
            vision=VISION, text=CONFIG, image_id=9, every=every
        )
        made = on_meta(lambda config=config: vision_language.CrossVisionLanguage(config))
        made(at(2, 5), images=rows).sum().backward()
        kept = made.make_cache()
        made(at(2, 5), images=rows, positions=at(2, 5), cache=kept)
        made(at(2, 1), cache=kept)
        kept.truncate(4)
        kept.select(at(3))
        made(at(3, 1), cache=kept.fork())


def under_their_names(
    made: torch.nn.Module, names: families.Names, layers: int = 2
) -> dict[str, torch.Tensor]:
    """A state dict as the other family has it. One of two of their names for the same weight."""
    theirs = {
        ours.format(layer): their.format(layer) for their, ours in names.items() for layer in range(layers)
    }
    return {theirs[name]: weight.detach() for name, weight in made.named_parameters()}


def read_families() -> None:
    fe, fv = families_encoders, families_vision
    for config, kind, read, names in (
        (BERT, encoder.Encoder, fe.bert_weights, fe.BERT),
        (BERT, encoder.Encoder, fe.roberta_weights, fe.ROBERTA),
        (T5, encoder_decoder.EncoderDecoder, fe.t5_weights, fe.T5),
        (BART, encoder_decoder.EncoderDecoder, fe.bart_weights, fe.BART),
    ):
        made = on_meta(lambda config=config, kind=kind: kind(config))
        families.build(config, read(under_their_names(made, names), config), kind)

    sizes = {
        "image_size": 6, "patch_size": 3, "num_channels": 3, "hidden_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 12, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu",
    }  # fmt: skip
    words = {
        "vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 12, "max_position_embeddings": 16,
    }  # fmt: skip
    vit = {"model_type": "vit", **sizes}
    tower = {"model_type": "clip_vision_model", **sizes}
    clip = {
        "model_type": "clip", "vision_config": tower, "projection_dim": 4,
        "text_config": {**words, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "eos_token_id": 2},
    }  # fmt: skip
    llava = {
        "model_type": "llava", "vision_config": tower, "image_token_id": 12,
        "text_config": {"model_type": "llama", **words, "hidden_act": "silu", "rms_norm_eps": 1e-5},
    }  # fmt: skip
    for config, kind, read, names in (
        (fv.from_vit_config(vit), vision.VisionTransformer, fv.vit_weights, fv.VIT),
        (
            fv.from_vit_config(vit),
            partial(vision.ImageClassifier, classes=5),
            fv.vit_weights,
            fv.VIT_CLASSIFIER,
        ),
        (fv.from_clip_config(clip), vision_language.CLIP, fv.clip_weights, fv.CLIP_BOTH),
        (fv.from_llava_config(llava), vision_language.VisionLanguage, fv.llava_weights, fv.LLAVA),
    ):
        weights = read(under_their_names(on_meta(partial(kind, config)), names), config)
        families.build(config, weights, kind)
        if read is fv.vit_weights:
            fv.build_vit(config, weights)


def loaded() -> None:
    weights = {name: torch.empty_like(p) for name, p in model().named_parameters()}
    made = families.build(CONFIG, weights, decoder.Decoder)
    assert {p.device.type for p in made.parameters()} == {"meta"}
    families.load_weights(made, weights)
    made(at(1, 5))
    families.rename({"model.norm.weight": x(8)}, families.LLAMA, 1)
    families.gguf_weights({"blk.0.attn_q.weight": x(8, 8)}, CONFIG)


# What runs each public symbol. Modules before functions only where one run covers both.
def decoder_families() -> None:
    latent = decoder.LatentConfig(kv_rank=4, rope_dim=2)
    plain = decoder.DecoderConfig(vocab=11, dim=8, layers=2, heads=2, hidden=12, context=16)
    with_latents = decoder.DecoderConfig(
        vocab=11, dim=8, layers=2, heads=2, hidden=12, context=16, latent=latent
    )
    fused = {"transformer.h.0.self_attention.query_key_value.weight": x(24, 8)}
    stacked = {"model.layers.1.mlp.experts.gate_up_proj": x(4, 12, 8)}
    apart = {f"model.layers.1.mlp.experts.{j}.up_proj.weight": x(6, 8) for j in range(4)}
    families_decoders.mixtral_weights(stacked, plain)
    families_decoders.qwen3_moe_weights(apart, plain)
    down = {"model.layers.1.self_attn.kv_a_proj_with_mqa.weight": x(6, 8)}
    families_decoders.deepseek_weights(down, with_latents)
    families_decoders.gptj_weights({"transformer.h.0.attn.q_proj.weight": x(8, 8)}, plain)
    neox = {"gpt_neox.layers.0.attention.query_key_value.weight": x(24, 8)}
    families_decoders.gpt_neox_weights(neox, plain)
    families_decoders.falcon_weights(fused, plain)
    families_decoders.bloom_weights(fused, plain)
    families_decoders.gemma3_weights({"model.norm.weight": x(8)}, plain)
    families.llama_weights({"model.norm.weight": x(8)}, plain)


RUNS: dict[object, Callable[[], object]] = {
    families.llama_weights: decoder_families,
    **{
        thing: decoder_families
        for name, thing in vars(families_decoders).items()
        if name.endswith("_weights") and thing.__module__ == families_decoders.__name__
    },
    activations.relu: lambda: activations.relu(x(3)),
    activations.gelu: lambda: (activations.gelu(x(3)), activations.gelu(x(3), approximate="tanh")),
    activations.silu: lambda: activations.silu(x(3)),
    activations.relu_derivative: gates,
    activations.gelu_derivative: gates,
    activations.silu_derivative: gates,
    activations.swiglu: gates,
    activations.swiglu_backward: gates,
    activations.geglu: gates,
    activations.geglu_backward: gates,
    activations.find_activation: lambda: [
        activations.find_activation(n)(x(3)) for n in activations.ACTIVATIONS
    ],
    attention.attention_weights: lambda: attention.attention_weights(x(2, 5, 8), x(2, 5, 8), is_causal=True),
    attention.scaled_dot_product_attention: attentions,
    attention.fused_attention: attentions,
    attention.Attend: mixers,
    attention.MultiHeadAttention: mixers,
    attention.check_attention: attentions,
    attention.share_heads: attentions,
    attention.split_heads: lambda: attention.split_heads(x(2, 5, 8), 2),
    attention.merge_heads: lambda: attention.merge_heads(x(2, 2, 5, 4)),
    block.Residual: blocks,
    block.Block: blocks,
    cache.LayerCache: caches,
    cache.KVCache: caches,
    cache.RollingLayerCache: windows,
    decoder.Decoder: every_decoder,
    grouping.group_kv_heads: grouped,
    grouping.pool_heads: grouped,
    flash.online_softmax: tiles,
    flash.flash_attention: tiles,
    flash.flash_attention_2: tiles,
    latent_attention.LatentAttention: latents,
    latent_attention.rebuilt_attention: latents,
    latent_attention.absorbed_attention: latents,
    local_attention.local_attention: windows,
    **{
        getattr(linear_attention, name): recurrences
        for name in (
            "LinearAttention",
            "RandomFeatures",
            "bidirectional_linear_attention",
            "delta_rule_chunked",
            "delta_rule_recurrent",
            "elu_features",
            "feature_size",
            "find_feature_map",
            "linear_attention",
            "linear_attention_chunked",
            "linear_attention_recurrent",
            "retention_log_decay",
            "short_convolution",
            "taylor_features",
            "unit_length",
        )
    },
    **{
        getattr(encoder, name): encoders
        for name in (
            "Encoder",
            "MaskedLMHead",
            "attention_positions",
            "check_keep",
            "cls_pool",
            "embedded_positions",
            "make_block",
            "mean_pool",
            "norm_maker",
            "unit_length",
        )
    },
    inputs.check_ids: encoders,
    inputs.check_positions: encoders,
    inputs.place: encoder_decoders,
    encoder_decoder.CrossDecoder: encoder_decoders,
    encoder_decoder.EncoderDecoder: encoder_decoders,
    encoder_decoder.Reading: encoder_decoders,
    **{
        getattr(moe, name): experts
        for name in (
            "Experts",
            "MixtureOfExperts",
            "Router",
            "Routing",
            "RoutingStatistics",
            "balanced_bias",
            "balancing_loss",
            "choose_experts",
            "dense_experts",
            "expert_load",
            "keep_top_k",
            "mixing_weights",
            "recorded_routing",
            "router_scores",
            "routing_statistics",
            "sequence_balancing_loss",
            "within_capacity",
            "z_loss",
        )
    },
    vision.ImageClassifier: images,
    vision.VisionTransformer: images,
    vision.patchify: images,
    vision.quick_gelu: images,
    **{
        getattr(vision_language, name): images
        for name in (
            "CLIP",
            "CrossVisionLanguage",
            "GatedCrossAttention",
            "ImageCache",
            "Projector",
            "VisionLanguage",
            "splice",
        )
    },
    families_encoders.bart_weights: read_families,
    families_encoders.bert_weights: read_families,
    families_encoders.roberta_weights: read_families,
    families_encoders.t5_weights: read_families,
    families_vision.build_vit: read_families,
    families_vision.clip_weights: read_families,
    families_vision.llava_weights: read_families,
    families_vision.vit_weights: read_families,
    families_vision.vision_weights: read_families,
    families.rename: loaded,
    families.load_weights: loaded,
    dropout.dropout: dropping,
    dropout.Dropout: dropping,
    dropout.seed_dropout: dropping,
    families.build: loaded,
    families.gguf_weights: loaded,
    families.gpt2_weights: lambda: families.gpt2_weights({"h.0.attn.c_attn.weight": x(8, 24)}, CONFIGS[1]),
    families.unpermute: lambda: families.unpermute(x(8, 3), 2),
    feedforward.FeedForward: lambda: on_meta(lambda: feedforward.FeedForward(8))(x(2, 5, 8)),
    feedforward.GatedFeedForward: lambda: on_meta(lambda: feedforward.GatedFeedForward(8))(x(2, 5, 8)),
    look.hooked: watched,
    look.mixer: watched,
    look.residual_stream: watched,
    look.logit_lens: watched,
    look.ablate_heads: watched,
    look.ablate: watched,
    look.first_token_score: watched,
    look.previous_token_score: watched,
    look.self_score: watched,
    look.parameter_ledger: watched,
    look.feed_forward: watched,
    look.pre_activations: watched,
    look.unit_statistics: watched,
    look.UnitStatistics: watched,
    masks.causal_mask: lambda: masks.causal_mask(3, 5, device="meta"),
    masks.visible: lambda: masks.visible(at(2, 3), at(2, 5), window=2),
    masks.sliding_window_mask: lambda: masks.sliding_window_mask(3, 5, window=2, device="meta"),
    masks.padding_mask: lambda: masks.padding_mask(at(2, 5)),
    norm.layer_norm: lambda: norm.layer_norm(x(3, 8), x(8), x(8)),
    norm.rms_norm: lambda: norm.rms_norm(x(3, 8), x(8)),
    norm.layer_norm_backward: lambda: norm.layer_norm_backward(x(3, 8), x(3, 8), x(8)),
    norm.rms_norm_backward: lambda: norm.rms_norm_backward(x(3, 8), x(3, 8), x(8)),
    norm.LayerNorm: lambda: on_meta(lambda: norm.LayerNorm(8))(x(3, 8)),
    norm.RMSNorm: lambda: on_meta(lambda: norm.RMSNorm(8))(x(3, 8)),
    positions.PositionScheme: schemes,
    positions.sinusoidal_positions: lambda: positions.sinusoidal_positions(at(2, 5), 8),
    positions.SinusoidalPositions: schemes,
    positions.LearnedPositions: schemes,
    positions.RotaryPositions: schemes,
    decoder.embedded_positions: every_decoder,
    positions.apply_rotary: lambda: [
        positions.apply_rotary(x(2, 5, 8), at(5), layout=layout) for layout in ("half", "interleaved")
    ],
    positions.interleaved_to_half: lambda: positions.interleaved_to_half(x(8, 3), heads=2, dim=0),
    positions.half_to_interleaved: lambda: positions.half_to_interleaved(x(3, 8), heads=2),
    positions.alibi_slopes: lambda: positions.alibi_slopes(6, device="meta"),
    positions.alibi_bias: lambda: positions.alibi_bias(x(3), at(2, 4), at(1, 5)),
    positions.AlibiPositions: schemes,
    positions.relative_position_bucket: lambda: [
        positions.relative_position_bucket(at(3, 5), bidirectional=both) for both in (False, True)
    ],
    positions.RelativePositionBias: schemes,
    positions.relative_attention: lambda: positions.relative_attention(
        x(2, 3, 8),
        x(2, 5, 8),
        x(2, 5, 6),
        x(7, 8),
        x(7, 6),
        mask=torch.ones(3, 5, dtype=torch.bool, device="meta"),
    ),
    positions.ShawPositions: schemes,
    decoder.attention_positions: every_mixer,
    sampling.temperature: lambda: sampling.temperature(0.5)(x(2, 11), []),
    sampling.greedy: lambda: sampling.greedy(x(2, 11)),
    sampling.sample: lambda: sampling.sample(x(2, 11)),
    budget.force_budget: lambda: [
        budget.force_budget([0], [1], most=1)(x(2, 11), [[0], [0, 4, 4]]),
        budget.force_budget([0], [1], least=3, wait_ids=[2, 3])(x(2, 11), [[0], [0, 4, 4]]),
    ],
}

NO_TENSORS = {
    "attention.AttendFunction", "decoder.DecoderConfig", "families.from_llama_config", "families.from_gguf_metadata",
    "feedforward.feed_forward_parameters", "feedforward.feed_forward_flops", "feedforward.gated_hidden",
    "families.from_gpt2_config", "inspect.PositionProbe", "decoder.LatentConfig", "decoder.LinearConfig",
    "families_decoders.from_bloom_config", "families_decoders.from_deepseek_config",
    "families_decoders.from_falcon_config", "families_decoders.from_gemma3_config",
    "families_decoders.from_gpt_neox_config", "families_decoders.from_gptj_config",
    "families.check_kind", "families.our_activation", "families.refuse", "families.tie",
    "families_decoders.from_mixtral_config", "families_decoders.from_qwen3_moe_config", "families.rope_base",
    "ledger.Ledger", "ledger.parameters", "ledger.flops_per_token", "pretrained.Family",
    "ledger.cached_numbers", "ledger.cached_bytes", "latent_attention.latent_cache_numbers",
    "latent_attention.latent_attention_flops", "latent_attention.absorbed_is_cheaper",
    "linear_attention.linear_state_size", "linear_attention.linear_attention_flops",
    "linear_attention.delta_rule_flops", "local_attention.WindowCost", "local_attention.local_attention_cost",
    "masks.check_rising", "masks.check_window", "kernels.flash.tilings",
    "encoder.EncoderConfig", "encoder.check_sizes", "encoder_decoder.EncoderDecoderConfig",
    "families_encoders.from_bart_config", "families_encoders.from_bert_config", "families_encoders.from_t5_config",
    "families_vision.from_clip_config", "families_vision.from_clip_vision_config",
    "families_vision.from_llava_config", "families_vision.from_vit_config",
    "moe.ExpertParameters", "moe.ExpertsConfig", "moe.ExpertsFunction", "moe.expert_capacity", "moe.expert_flops",
    "moe.expert_parameters", "vision.VisionConfig", "vision_language.CLIPConfig",
    "vision_language.CrossVisionLanguageConfig", "vision_language.VisionLanguageConfig",
    "vision_language.spread_images", "budget.thinking_tokens", "chat.majority_vote",
    *(
        f"roofline.{name}"
        for name in (
            "attainable", "attention_flops", "flash_bytes", "minimal_bytes", "ridge", "softmax_flops",
            "standard_bytes", "tile_sizes", "visible_pairs",
        )
    ),
}  # fmt: skip
READS_NUMBERS = {
    "generate.stream": "tokens are handed out as ints",
    "generate.generate": "tokens are handed out as ints",
    "inspect.attention_maps": "its maps are collected on the CPU, as its docstring says; see the test below",
    "masks.left_pad": "its numbers come as lists, and torch.tensor reads a list on the CPU; see the test below",
    "inspect.position_probe": "what it measures is a number; see the test below",
    "moe.grouped_experts": "the lengths of segments are read as numbers; see the test below",
    "minilm.embed_sentences": "its ids are made of strings, on the CPU; see the test below",
    "minilm.load_minilm": "reads a file",
    "pretrained.load_smollm2": "reads a file",
    "pretrained.from_pretrained": "reads files",
    "kernels.rms_norm.rms_norm": "a Triton kernel reads memory",
    "kernels.flash.flash_attention": "a Triton kernel reads memory",
    "kernels.swiglu.swiglu": "a Triton kernel reads memory",
}


def public() -> dict[str, object]:
    """Every public function and class that a module of nn, models or infer defines."""
    found = {}
    for package in (llm_atlas.nn, llm_atlas.models, llm_atlas.infer):
        for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if info.name.rpartition(".")[2].startswith("_"):
                continue
            module = importlib.import_module(info.name)
            for name, thing in vars(module).items():
                if name.startswith("_") or getattr(thing, "__module__", None) != info.name:
                    continue
                if name == getattr(thing, "__name__", None) and (
                    inspect.isfunction(thing) or inspect.isclass(thing)
                ):
                    found[f"{info.name.removeprefix(package.__name__ + '.')}.{name}"] = thing
    return found


def test_every_public_symbol_has_its_run():
    # A new symbol gets a line in RUNS, or a reason above.
    named = {thing: name for name, thing in public().items()}
    covered = {named[thing] for thing in RUNS}
    assert covered | NO_TENSORS | set(READS_NUMBERS) == set(public())
    assert not covered & (NO_TENSORS | set(READS_NUMBERS))


@pytest.mark.parametrize(
    "run", {id(run): run for run in RUNS.values()}.values(), ids=lambda run: run.__name__
)
def test_runs_on_meta(run):
    with OnlyMeta():
        run()


def test_left_pad_puts_its_tensors_where_it_is_told():
    assert {t.device.type for t in masks.left_pad([[1, 2], [3]], device="meta")} == {"meta"}


def test_generate_follows_the_model_as_far_as_the_first_token():
    steps = generate.stream(model(), [[1, 2], [3]], max_new_tokens=2, temperature=1.0)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"meta tensor|Meta"):
        next(steps)


def test_attention_maps_run_there_up_to_the_copy_to_the_cpu():
    with pytest.raises((RuntimeError, NotImplementedError), match="meta tensor"):
        look.attention_maps(model(), at(2, 5))


def test_the_position_probe_runs_there_up_to_its_numbers():
    with pytest.raises((RuntimeError, NotImplementedError), match=r"meta tensor|Meta"), OnlyMeta():
        look.position_probe(x(8, 5, 3), at(5))


def test_grouped_experts_run_there_up_to_the_lengths_of_their_segments():
    layer = on_meta(lambda: moe.MixtureOfExperts(8, EXPERTS[0]))
    with pytest.raises((RuntimeError, NotImplementedError), match=r"meta tensor|Meta"), OnlyMeta():
        layer(x(2, 5, 8))


def test_embed_sentences_puts_its_vectors_where_the_model_is():
    tokenizer = WordPiece(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b"])
    vectors = minilm.embed_sentences(on_meta(lambda: encoder.Encoder(BERT)), tokenizer, ["a", "a b"], limit=8)
    assert vectors.device.type == "meta"
    assert vectors.shape == (2, 8)


# -------------------------------------------------------------------------- faults that must be caught


@pytest.mark.parametrize(
    "fault",
    [
        lambda q: q + torch.zeros(8, device="cpu"),
        lambda q: q[torch.arange(3)],  # torch itself lets an index on the CPU pass
        lambda q: q @ torch.eye(8),
        lambda q: q.masked_fill(torch.ones(5, 8, dtype=torch.bool), 0.0),
        lambda q: torch.arange(5, device="cpu"),
    ],
)
def test_a_literal_device_is_caught(fault):
    with pytest.raises((AssertionError, RuntimeError)), OnlyMeta():
        fault(x(5, 8))


def test_a_literal_device_deep_inside_the_decoder_is_caught(monkeypatch):
    def careless(queries, keys=None, *, device=None):
        return masks.causal_mask(queries, keys, device="cpu")

    monkeypatch.setattr(attention, "causal_mask", careless)
    with pytest.raises((AssertionError, RuntimeError)), OnlyMeta():
        every_decoder()


def test_a_table_that_does_not_move_with_its_module_is_caught():
    def forgetful():
        scheme = positions.RotaryPositions(8, length=9)
        table = scheme.table
        scheme.to("meta")
        del scheme._buffers["table"]
        scheme.__dict__["table"] = table
        return scheme

    scheme = forgetful()
    with pytest.raises((AssertionError, RuntimeError)), OnlyMeta():
        scheme.rotate(x(2, 3, 5, 8), at(1, 5))
