"""CLIP, patches as tokens, layers that look across. Against transformers: test_families_vision.py."""

import dataclasses
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from llm_atlas.core.seeds import generator
from llm_atlas.infer.generate import generate
from llm_atlas.models.decoder import Decoder, DecoderConfig, LatentConfig, LinearConfig
from llm_atlas.models.vision import VisionConfig
from llm_atlas.models.vision_language import (
    CLIP,
    CLIPConfig,
    CrossVisionLanguage,
    CrossVisionLanguageConfig,
    GatedCrossAttention,
    Projector,
    VisionLanguage,
    VisionLanguageConfig,
    splice,
    spread_images,
)
from llm_atlas.nn.cache import KVCache
from llm_atlas.nn.masks import left_pad
from llm_atlas.nn.norm import LayerNorm

VISION = VisionConfig(image=4, patch=2, channels=1, dim=6, layers=2, heads=2, hidden=8)
TEXT = DecoderConfig(vocab=17, dim=8, layers=3, heads=2, hidden=12, context=40)
IMAGE = 16
SPLICED = VisionLanguageConfig(vision=VISION, text=TEXT, image_id=IMAGE)
CROSSED = CrossVisionLanguageConfig(vision=VISION, text=TEXT, image_id=IMAGE)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed))


def random(model, *, gates=True):
    """The model with every parameter drawn anew; the gates too, unless they are to stay at 0."""
    with torch.no_grad():
        for seed, (name, p) in enumerate(model.named_parameters()):
            if gates or "gate" not in name:
                p.copy_(draw(*p.shape, seed=seed) * (p.shape[1] ** -0.5 if p.dim() == 2 else 1))
    return model.eval()


@pytest.fixture(scope="module")
def spliced():
    return random(VisionLanguage(SPLICED))


@pytest.fixture(scope="module")
def crossed():
    return random(CrossVisionLanguage(CROSSED))


@pytest.fixture(params=["spliced", "crossed"])
def model(request):
    return request.getfixturevalue(request.param)


def images(*counts, seed=5):
    """As many images a row."""
    return [draw(n, 1, 4, 4, seed=seed + row) for row, n in enumerate(counts)]


def prompt(model, *words):
    return (
        spread_images(words, IMAGE, model.image_tokens) if isinstance(model, VisionLanguage) else list(words)
    )


def writer(model):
    return model.decoder if isinstance(model, VisionLanguage) else model


# ------------------------------------------------------------------------------------------ CLIP

CLIP_CONFIG = CLIPConfig(vision=VISION, text=TEXT, features=5, end_id=15)
TEXTS = torch.tensor([[3, 4, 15, 0, 0], [1, 2, 3, 4, 15], [9, 15, 15, 2, 15]])


def test_clip_is_cosines_times_a_scale():
    clip = random(CLIP(CLIP_CONFIG))
    pictures = images(4)[0]
    logits = clip(pictures, TEXTS)
    assert logits.shape == (4, 3)
    for i in range(4):
        u = clip.image_projection.weight @ clip.vision(pictures[i : i + 1])[0, 0]
        for j, end in enumerate((2, 4, 1)):
            w = clip.text_projection.weight @ clip.text.hidden(TEXTS[j : j + 1])[0, end]
            cosine = (u @ w) / (u.norm() * w.norm())
            assert_close(logits[i, j], clip.log_scale.exp() * cosine, atol=1e-5, rtol=1e-4)
    assert_close(clip.encode_images(pictures).norm(dim=-1), torch.ones(4))
    assert_close(clip.encode_texts(TEXTS).norm(dim=-1), torch.ones(3))


def test_clips_temperature_begins_as_in_the_paper():
    assert float(CLIP(CLIP_CONFIG).log_scale.detach().exp()) == pytest.approx(1 / 0.07)


def test_what_follows_a_texts_end_makes_no_difference():
    clip = random(CLIP(CLIP_CONFIG))
    other = TEXTS.clone()
    other[0, 3:] = 7
    other[2, 2:] = 7
    assert_close(clip.encode_texts(other), clip.encode_texts(TEXTS))
    other[0, 1] = 7
    assert (clip.encode_texts(other) - clip.encode_texts(TEXTS)).abs().max() > 0.01


def test_without_an_end_token_the_largest_id_is_the_end():
    clip = random(CLIP(CLIP_CONFIG))
    largest = random(CLIP(dataclasses.replace(CLIP_CONFIG, end_id=None)))
    assert_close(largest.encode_texts(TEXTS), clip.encode_texts(TEXTS))


def test_a_text_without_its_end():
    with pytest.raises(ValueError, match=r"^text 1 has no end token 15$"):
        CLIP(CLIP_CONFIG).encode_texts(torch.tensor([[1, 15], [1, 2]]))
    with pytest.raises(ValueError, match="features 0 must be at least 1"):
        dataclasses.replace(CLIP_CONFIG, features=0)


# ------------------------------------------------------------------------------ patches as tokens


def test_placeholders_are_spread():
    assert spread_images([7, 9, 5, 9], 9, 3) == [7, 9, 9, 9, 5, 9, 9, 9]
    assert spread_images([7, 5], 9, 3) == [7, 5]
    with pytest.raises(ValueError, match="tokens 0 must be at least 1"):
        spread_images([9], 9, 0)


def test_splice_by_hand():
    text = torch.zeros(2, 3, 1)
    patches = torch.tensor([[1.0], [2.0], [3.0]])
    where = torch.tensor([[False, True, True], [True, False, False]])
    assert splice(text, patches, where)[..., 0].tolist() == [[0, 1, 2], [3, 0, 0]]
    assert torch.equal(splice(text, patches, where), text.masked_scatter(where[..., None], patches))


def test_the_gradient_goes_to_each_patch_and_to_no_token_it_replaced():
    text, patches = draw(2, 3, 4).requires_grad_(), draw(3, 4, seed=1).requires_grad_()
    where = torch.tensor([[False, True, True], [True, False, False]])
    weight = draw(2, 3, 4, seed=2)
    (splice(text, patches, where) * weight).sum().backward()
    assert_close(patches.grad, weight[where])
    assert_close(text.grad, weight * ~where[..., None])


def test_a_projector_is_two_layers_on_each_patch():
    layer = random(Projector(6, 8, activation="relu"))
    x = draw(2, 3, 6)
    expected = (x @ layer.up.weight.T + layer.up.bias).relu() @ layer.out.weight.T + layer.out.bias
    assert_close(layer(x), expected)
    assert Projector(6, 8, bias=False).out.bias is None


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("layer", [-2, -1, 0])
def test_each_placeholder_holds_its_patch(layer, class_token):
    model = random(VisionLanguage(dataclasses.replace(SPLICED, layer=layer, class_token=class_token)))
    assert model.image_tokens == (5 if class_token else 4)
    rows = [prompt(model, 3, IMAGE, IMAGE), prompt(model, IMAGE, 4, IMAGE)]
    pictures = images(2, 2)
    x = model.embed(torch.tensor(rows), pictures)
    for row, ids in enumerate(rows):
        features = model.vision.features(pictures[row], layer=layer)
        left = list(model.projector(features if class_token else features[:, 1:]).flatten(0, 1))
        for place, token in enumerate(ids):
            expected = left.pop(0) if token == IMAGE else model.decoder.embed.weight[token]
            assert_close(x[row, place], expected)


def test_a_placeholder_may_lie_outside_the_vocabulary():
    outside = random(VisionLanguage(dataclasses.replace(SPLICED, image_id=-200)))
    inside = random(VisionLanguage(SPLICED))
    ids = torch.tensor([prompt(inside, 3, IMAGE, 5)])
    logits = outside(ids.masked_fill(ids == IMAGE, -200), images=images(1))
    assert torch.equal(logits, inside(ids, images=images(1)))


def test_plain_text_is_the_decoders(spliced):
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    assert torch.equal(spliced(ids), spliced.decoder(ids))
    assert torch.equal(spliced(ids, images=images(0, 0)), spliced.decoder(ids))


# ------------------------------------------------------------------------------------ both of them


def ragged(model):
    """Rows with two images, one and none, padded on the left."""
    rows = [prompt(model, 3, IMAGE, 4, IMAGE, 5, 6), prompt(model, IMAGE, 7, 8), [9, 10, 11, 12]]
    return rows, *left_pad(rows), images(2, 1, 0)


def test_a_row_in_a_batch_is_as_alone(model):
    rows, ids, positions, pictures = ragged(model)
    logits = model(ids, images=pictures, positions=positions)
    for row, alone in enumerate(rows):
        expected = model(torch.tensor([alone]), images=[pictures[row]])
        assert_close(logits[row, -len(alone) :], expected[0], atol=1e-5, rtol=1e-5)


def test_cached_is_uncached(model):
    _, ids, positions, pictures = ragged(model)
    whole = model(ids, images=pictures, positions=positions)
    cache = model.make_cache()
    first = model(ids[:, :-2], images=pictures, positions=positions[:, :-2], cache=cache)
    steps = [model(ids[:, i : i + 1], cache=cache) for i in (-2, ids.shape[1] - 1)]
    real = positions >= 0
    assert_close(torch.cat([first, *steps], dim=1)[real], whole[real], atol=1e-5, rtol=1e-5)


def test_text_may_come_before_the_call_with_the_images(model):
    ids = torch.tensor([prompt(model, 1, 2, IMAGE, 3)])
    whole = model(ids, images=images(1))
    cache = model.make_cache()
    parts = [model(ids[:, :2], cache=cache), model(ids[:, 2:], images=images(1), cache=cache)]
    assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_writing_with_a_cache_is_writing_without(model):
    rows, ids, positions, pictures = ragged(model)
    cache = model.make_cache()
    with torch.inference_mode():
        model.hidden(ids[:, :-1], images=pictures, positions=positions[:, :-1], cache=cache)
    written = generate(writer(model), ids[:, -1:].tolist(), max_new_tokens=6, cache=cache)
    for row, alone in enumerate(rows):
        grown = list(alone)
        for _ in range(6):  # what the model writes is text: no image token, so none is expected
            logits = model(torch.tensor([grown]), images=[pictures[row]])[0, -1]
            logits[IMAGE] = -torch.inf
            grown.append(int(logits.argmax()))
        assert IMAGE not in written[row]
        assert written[row] == grown[len(alone) :]


def test_images_matter_and_so_does_their_order(model):
    ids = torch.tensor([prompt(model, IMAGE, IMAGE, 3)])
    (pictures,) = images(2)
    logits = [model(ids, images=[p])[0, -1] for p in (pictures, pictures.flip(0), pictures * 0)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (logits[a] - logits[b]).abs().max() > 0.01


def test_a_tensor_of_images_is_a_sequence_of_rows(model):
    ids = torch.tensor([prompt(model, IMAGE, 3, IMAGE, 4)] * 2)
    pictures = images(2, 2)
    assert torch.equal(model(ids, images=torch.stack(pictures)), model(ids, images=pictures))


def test_every_parameter_learns(model):
    model.zero_grad()
    _, ids, positions, pictures = ragged(model)
    model(ids, images=pictures, positions=positions).square().mean().backward()
    for name, p in model.named_parameters():
        found = p.grad is not None and p.grad.abs().max() > 1e-6
        blind = name.startswith("vision.") and name.endswith("k.bias")  # the softmax does not see it
        skipped = isinstance(model, VisionLanguage) and name.startswith(("vision.blocks.1", "vision.norm"))
        assert found == (not (blind or skipped)), name
    model.zero_grad()


@pytest.mark.parametrize("kind", [partial(VisionLanguage, SPLICED), partial(CrossVisionLanguage, CROSSED)])
def test_half_precision(kind):
    model, half = random(kind()), random(kind()).bfloat16()
    ids = torch.tensor([prompt(model, 3, IMAGE, 4)])
    out = half(ids, images=[images(1)[0].bfloat16()])
    assert out.dtype == torch.bfloat16
    assert_close(out.float(), model(ids, images=images(1)), atol=0.3, rtol=0.1)


@pytest.mark.parametrize(("given", "found"), [([1], 2), ([3], 2), ([0], 2), ([1], 0)])
def test_as_many_image_tokens_as_images(model, given, found):
    ids = torch.tensor([prompt(model, *[IMAGE] * found, 3)])
    each, things = (4, "patches") if isinstance(model, VisionLanguage) else (1, "images")
    message = (
        f"^row 0 has {found * each} image tokens and {given[0] * each} {things}: they must be equally many$"
    )
    with pytest.raises(ValueError, match=message):
        model(ids, images=images(*given))


def test_one_placeholder_too_many_is_named_with_its_row(spliced):
    rows = [[3, *[IMAGE] * 4], [IMAGE] * 5]
    with pytest.raises(ValueError, match=r"^row 1 has 5 image tokens and 4 patches"):
        spliced(torch.tensor(rows), images=images(1, 1))
    # Not even where the batch has as many in all.
    rows = [[3, 3, *[IMAGE] * 3], [IMAGE] * 5]
    with pytest.raises(ValueError, match=r"^row 0 has 3 image tokens and 4 patches"):
        spliced(torch.tensor(rows), images=images(1, 1))


def test_a_prompt_whose_images_are_forgotten(model):
    ids = torch.tensor([prompt(model, IMAGE, 3)])
    for cache in (None, model.make_cache()):
        with pytest.raises(ValueError, match=r"^row 0 has [14] image tokens and 0 "):
            model(ids, cache=cache)


@pytest.mark.untyped
def test_images_of_another_number_of_rows(model):
    ids = torch.tensor([prompt(model, IMAGE, 3)])
    with pytest.raises(ValueError, match="there are images for 2 rows, the ids have 1"):
        model(ids, images=images(1, 1))
    with pytest.raises(
        ValueError, match=r"must have shape \(images, channels, height, width\), got \(1, 4, 4\)"
    ):
        model(ids, images=images(1)[0])


def test_a_token_outside_the_vocabulary(model):
    with pytest.raises(ValueError, match="token id 17 is outside the vocabulary of 17"):
        model(torch.tensor([[17]]))


def test_a_layer_that_is_not_there():
    with pytest.raises(ValueError, match="layer -4 is not one of the 3 points of 2 blocks"):
        dataclasses.replace(SPLICED, layer=-4)


# ------------------------------------------------------------------------------------ looking across

DECODERS = {
    "rotary": TEXT,
    "learned, layer norm": dataclasses.replace(
        TEXT, positions="learned", norm="layer", gated=False, activation="gelu", tied=False
    ),
    "alibi, grouped": dataclasses.replace(TEXT, positions="alibi", heads=4, kv_heads=2),
    "some layers without positions": dataclasses.replace(TEXT, nope_layers=(1,)),
    "post": dataclasses.replace(TEXT, placement="post"),
    "window": dataclasses.replace(TEXT, window=2, full_layers=(1,)),
    "linear": dataclasses.replace(TEXT, linear=LinearConfig(), full_layers=(1,)),
    "latent": dataclasses.replace(TEXT, latent=LatentConfig(kv_rank=5, rope_dim=2)),
}


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("name", DECODERS)
def test_at_first_the_language_model_is_exactly_what_it_was(name, every):
    text = DECODERS[name]
    lm = random(Decoder(text))
    model = random(CrossVisionLanguage(dataclasses.replace(CROSSED, text=text, every=every)), gates=False)
    missing = model.load_state_dict(lm.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert all(name.startswith(("vision.", "cross.")) for name in missing.missing_keys)
    assert len(model.cross) == -(-3 // every)
    ids, positions = left_pad([[3, IMAGE, 4, 5], [IMAGE, 6]])
    pictures = images(1, 1)
    expected = lm(ids, positions=positions)
    assert torch.equal(model(ids, positions=positions, images=pictures), expected)
    cache, theirs = model.make_cache(), lm.make_cache()
    for part, given in ((slice(0, 3), pictures), (slice(3, 4), None)):
        ours = model(ids[:, part], positions=positions[:, part], images=given, cache=cache)
        assert torch.equal(ours, lm(ids[:, part], positions=positions[:, part], cache=theirs))
    # And one gate a little open changes it.
    torch.nn.init.constant_(model.cross[0].gate, 0.1)
    assert not torch.equal(model(ids, positions=positions, images=pictures), expected)


def test_at_first_only_the_gates_learn():
    model = random(CrossVisionLanguage(CROSSED), gates=False)
    model(torch.tensor([[IMAGE, 3]]), images=images(1)).square().sum().backward()
    for name, p in model.named_parameters():
        if "gate" in name and name.startswith("cross"):
            assert p.grad.abs() > 1e-4
        elif name.startswith(("cross.", "vision.")):
            assert p.grad is None or (p.grad == 0).all(), name


def test_a_gated_layer_by_hand():
    layer = random(GatedCrossAttention(8, 6, partial(LayerNorm, 8), heads=2, hidden=12))
    x, context, mask = draw(2, 3, 8), draw(2, 5, 6, seed=1), draw(2, 1, 3, 5, seed=2) > 0
    y = x + torch.tanh(layer.gate) * layer.attention(layer.norm(x), context=context, mask=mask)
    y = y + torch.tanh(layer.feedforward_gate) * layer.feedforward(layer.feedforward_norm(y))
    assert_close(layer(x, context=context, mask=mask), y)
    # A row that may look nowhere is one without anything to look at.
    nowhere = layer(x, context=context, mask=torch.zeros_like(mask))
    assert_close(nowhere, layer(x, context=None, mask=None))
    assert (nowhere - y).abs().max() > 0.01


def test_a_token_looks_at_the_last_image_before_it_alone(crossed):
    """Seen in a model whose own attention and later layers are out: what is left is the first look across."""
    model = random(CrossVisionLanguage(CROSSED))
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.sublayer.out.weight.zero_()
    ids = torch.tensor([[3, IMAGE, 4, IMAGE, 5, 6]])
    (pictures,) = images(2)
    base = model.hidden(ids, images=[pictures])
    for image, sees in ((0, [1, 2]), (1, [3, 4, 5])):
        changed = pictures.clone()
        changed[image] += draw(1, 4, 4, seed=50)
        moved = (model.hidden(ids, images=[changed]) - base).abs().amax(-1)[0]
        assert [i for i in range(6) if moved[i] > 1e-4] == sees
        assert all(moved[i] == 0 for i in range(6) if i not in sees)
    # With attention to the text the first image reaches the tokens behind the second, and never those before it.
    changed = pictures.clone()
    changed[0] += draw(1, 4, 4, seed=50)
    moved = (crossed.hidden(ids, images=[changed]) - crossed.hidden(ids, images=[pictures])).abs().amax(-1)[0]
    assert [bool(m > 1e-4) for m in moved] == [False, True, True, True, True, True]
    assert moved[0] == 0


def test_there_are_all_patches_to_look_at_and_not_the_class_token(crossed):
    (pictures,) = images(3)
    features = crossed.image_features(pictures)
    assert features.shape == (3, 4, 6)
    assert torch.equal(features, crossed.vision(pictures)[:, 1:])


def test_the_caches_rows_go_with_their_images(crossed):
    ids = torch.tensor([[3, IMAGE, 4], [IMAGE, IMAGE, 5]])
    pictures = images(1, 2)
    cache = crossed.make_cache()
    crossed(ids, images=pictures, cache=cache)
    twin = cache.fork()
    twin.select([1, 1, 0])
    new = torch.tensor([[6], [7], [6]])
    ours = crossed(new, cache=twin)
    for row, source in enumerate((1, 1, 0)):
        whole = torch.cat([ids[source], new[row]])[None]
        assert_close(ours[row, 0], crossed(whole, images=[pictures[source]])[0, -1], atol=1e-5, rtol=1e-5)
    # The fork went its own way.
    assert (cache.length, twin.length, cache.rows, twin.rows) == (3, 4, 2, 3)
    again = crossed(new[:2], cache=cache)
    assert_close(again[0, 0], ours[2, 0], atol=1e-5, rtol=1e-5)
    assert_close(cache.seen, torch.tensor([[0, 1, 1, 1], [1, 2, 2, 2]]))


def test_a_cut_cache_knows_which_image_was_seen(crossed):
    ids = torch.tensor([[IMAGE, 4, IMAGE, 5]])
    pictures = images(2)
    cache = crossed.make_cache()
    whole = crossed(ids, images=pictures, cache=cache)
    cache.truncate(2)
    assert_close(crossed(ids[:, 2:], cache=cache), whole[:, 2:], atol=1e-5, rtol=1e-5)
    cache.truncate(0)
    assert cache.context is None
    others = images(2, seed=77)
    assert_close(crossed(ids, images=others, cache=cache), crossed(ids, images=others), atol=1e-5, rtol=1e-5)


def test_a_call_that_is_refused_leaves_the_cache_as_it_was(crossed):
    cache = crossed.make_cache()
    ids, pictures = torch.tensor([[IMAGE, *[3] * 40]]), images(1)
    with pytest.raises(ValueError, match="do not fit the context"):
        crossed(ids, images=pictures, cache=cache)
    assert (cache.length, cache.seen, cache.context) == (0, None, None)
    assert_close(crossed(ids[:, :9], images=pictures, cache=cache), crossed(ids[:, :9], images=pictures))


def test_the_bytes_of_a_cache_count_its_images(crossed):
    cache = crossed.make_cache()
    crossed(torch.tensor([[IMAGE, 3, 4]]), images=images(1), cache=cache)
    a_layer = 2 * TEXT.dim * 4  # keys and values in float32
    assert cache.nbytes == TEXT.layers * a_layer * 3 + len(crossed.cross) * a_layer * VISION.patches


def test_the_images_are_read_once(crossed):
    calls = []
    handles = [
        crossed.vision.register_forward_hook(lambda *_: calls.append("tower")),
        crossed.cross[0].attention.k.register_forward_hook(lambda *_: calls.append("keys")),
    ]
    cache = crossed.make_cache()
    crossed(torch.tensor([[IMAGE, 3]]), images=images(1), cache=cache)
    for _ in range(3):
        crossed(torch.tensor([[4]]), cache=cache)
    for handle in handles:
        handle.remove()
    assert calls == ["tower", "keys"]


def test_no_hook_is_left_behind(crossed):
    crossed(torch.tensor([[IMAGE, 3]]), images=images(1))
    with pytest.raises(ValueError, match="do not fit the context"):
        crossed(torch.full((1, 41), 3))
    assert not any(block._forward_pre_hooks for block in crossed.blocks)


def test_an_image_token_that_the_model_writes_has_no_image(crossed):
    cache = crossed.make_cache()
    crossed(torch.tensor([[3, 4]]), cache=cache)
    assert crossed(torch.tensor([[IMAGE]]), cache=cache).isfinite().all()


def test_what_a_cross_cache_refuses(crossed):
    with pytest.raises(TypeError, match="cache must come from this model's make_cache"):
        crossed(torch.tensor([[3]]), cache=KVCache(3))
    cache = crossed.make_cache()
    crossed(torch.tensor([[IMAGE]]), images=images(1), cache=cache)
    with pytest.raises(ValueError, match="the cache has images already"):
        crossed(torch.tensor([[IMAGE]]), images=images(1), cache=cache)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"every": 0}, "every 0 must be at least 1 and at most the 3 blocks"),
        ({"every": 4}, "every 4 must be at least 1 and at most the 3 blocks"),
        ({"image_id": 17}, "image_id 17 is outside the vocabulary of 17"),
    ],
)
def test_cross_sizes_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        dataclasses.replace(CROSSED, **change)


def test_the_cross_layers_may_have_sizes_of_their_own():
    model = random(CrossVisionLanguage(dataclasses.replace(CROSSED, cross_heads=4, cross_hidden=5)))
    assert model.cross[0].attention.heads == 4
    assert model.cross[0].feedforward.up.out_features == 5
    assert model(torch.tensor([[IMAGE, 3]]), images=images(1)).shape == (1, 2, 17)
