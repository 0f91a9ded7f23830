"""Patches, the vision transformer and its features. Against transformers: test_families_vision.py."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from torch.testing import assert_close

from llm_atlas.core.seeds import generator
from llm_atlas.models.vision import (
    ImageClassifier,
    VisionConfig,
    VisionTransformer,
    patchify,
    quick_gelu,
)
from llm_atlas.nn.activations import gelu

CONFIG = VisionConfig(image=6, patch=2, channels=3, dim=8, layers=3, heads=2, hidden=12)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed))


def random_model(config=CONFIG, seed=0):
    model = VisionTransformer(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(draw(*p.shape, seed=seed) * (p.shape[1] ** -0.5 if p.dim() == 2 else 1))
            seed += 1
    return model


# ------------------------------------------------------------------------------------------ patches


def test_patches_by_hand():
    image = torch.arange(16.0).view(1, 4, 4)
    assert patchify(image, 2).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    two_channels = torch.stack([image[0], 100 + image[0]])
    assert patchify(two_channels, 2)[1].tolist() == [2, 3, 6, 7, 102, 103, 106, 107]


@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 4),
)
def test_a_convolution_as_wide_as_its_stride_is_linear_on_patches(batch, channels, down, right, patch, dim):
    images = draw(batch, channels, down * patch, right * patch)
    kernel, bias = draw(dim, channels, patch, patch, seed=1), draw(dim, seed=2)
    convolved = functional.conv2d(images, kernel, bias, stride=patch).flatten(2).transpose(1, 2)
    assert_close(
        functional.linear(patchify(images, patch), kernel.flatten(1), bias), convolved, atol=1e-5, rtol=1e-5
    )
    assert torch.equal(
        patchify(images, patch), functional.unfold(images, patch, stride=patch).transpose(1, 2)
    )


def test_patches_of_any_leading_axes():
    images = draw(2, 3, 1, 4, 6)
    assert torch.equal(patchify(images, 2)[1, 2], patchify(images[1, 2], 2))
    assert patchify(images, 2).shape == (2, 3, 6, 4)


@pytest.mark.parametrize(("height", "width", "patch"), [(5, 4, 2), (4, 6, 4), (4, 4, 0)])
def test_patches_that_do_not_fit(height, width, patch):
    message = f"an image of {height} x {width} pixels does not divide into patches of {patch} x {patch}"
    with pytest.raises(ValueError, match=message):
        patchify(draw(1, height, width), patch)


@pytest.mark.untyped
def test_an_image_without_channels():
    with pytest.raises(
        ValueError, match=r"images must have shape \(..., channels, height, width\), got \(4, 4\)"
    ):
        patchify(draw(4, 4), 2)


# --------------------------------------------------------------------------------------- quick_gelu


def test_quick_gelu():
    x = torch.linspace(-8, 8, 1001)
    assert_close(quick_gelu(x), x / (1 + torch.exp(-1.702 * x)))
    off = (quick_gelu(x) - gelu(x)).abs().max()
    assert 0.019 < off < 0.0205
    wide = quick_gelu(x.bfloat16().float())
    assert torch.equal(quick_gelu(x.bfloat16()), wide.bfloat16())  # rounded once


# ------------------------------------------------------------------------------------------- tower


def test_the_class_token_stands_first_and_every_place_has_its_own_vector():
    model = random_model()
    images = draw(2, 3, 6, 6, seed=9)
    x = model.embed(images)
    assert x.shape == (2, 10, 8)
    table = model.positions.table.weight
    assert_close(x[:, 0], (model.class_token + table[0]).expand(2, -1))
    corner = images[1, :, 4:, 4:].flatten()  # the last patch, channel by channel
    assert_close(x[1, 9], model.patches.weight @ corner + model.patches.bias + table[9])


def test_features_are_counted_as_hidden_states_are():
    model = random_model()
    images = draw(2, 3, 6, 6)
    seen = [model.embed(images)]
    handles = [block.register_forward_hook(lambda m, a, out: seen.append(out)) for block in model.blocks]
    out = model(images)
    for handle in handles:
        handle.remove()
    assert len(seen) == 4
    for layer in range(4):
        assert torch.equal(model.features(images, layer=layer), seen[layer])
        assert torch.equal(model.features(images, layer=layer - 4), seen[layer])
    assert torch.equal(out, model.norm(seen[-1]))
    for layer in (4, -5):
        with pytest.raises(ValueError, match=f"layer {layer} is not one of the 4 points of 3 blocks"):
            model.features(images, layer=layer)


def test_blocks_past_the_layer_are_not_run():
    model = random_model()
    model.blocks[2] = None
    model.features(draw(2, 3, 6, 6), layer=-2)
    with pytest.raises(TypeError):
        model.features(draw(2, 3, 6, 6))


def test_only_positions_tell_where_a_patch_is():
    model = random_model()
    images = draw(1, 3, 6, 6)
    # Columns of patches in another order: the patches (1, ..., 9) become (3, 1, 2, 6, 4, 5, 9, 7, 8).
    moved = torch.cat([images[..., 4:], images[..., :4]], dim=-1)
    order = [0, 3, 1, 2, 6, 4, 5, 9, 7, 8]
    assert (model(moved)[:, 0] - model(images)[:, 0]).abs().max() > 0.01
    torch.nn.init.zeros_(model.positions.table.weight)
    assert_close(model(moved), model(images)[:, order], atol=1e-5, rtol=1e-5)


def test_every_patch_sees_every_other_and_no_image_sees_another():
    model = random_model()
    images = draw(2, 3, 6, 6)
    images.requires_grad_()
    for token in (0, 1, 9):
        (grad,) = torch.autograd.grad(model(images)[0, token].square().sum(), images)
        assert (grad[0] != 0).all()
        assert (grad[1] == 0).all()


def test_every_parameter_learns():
    config = dataclasses.replace(CONFIG, norm_before=True)
    model = ImageClassifier(config, 5)
    model.vision.load_state_dict(random_model(config).state_dict())
    model(draw(4, 3, 6, 6)).square().sum().backward()
    for name, p in model.named_parameters():
        # The softmax does not see a key's bias, which is the same for all keys.
        assert (p.grad.abs().max() > 1e-6) == (not name.endswith("sublayer.k.bias")), name


def test_clips_quirks_are_where_they_belong():
    config = dataclasses.replace(
        CONFIG, patch_bias=False, norm_before=True, qkv_bias=False, activation=quick_gelu
    )
    model = random_model(config)
    images = draw(2, 3, 6, 6)
    assert model.patches.bias is None
    assert model.blocks[0].mixer.sublayer.q.bias is None
    assert model.blocks[0].mixer.sublayer.out.bias is not None
    x = model.features(images, layer=0)
    assert_close((x - model.norm_before.bias) / model.norm_before.weight, functional.layer_norm(
        (x - model.norm_before.bias) / model.norm_before.weight, (8,), eps=0.0), atol=1e-3, rtol=1e-3)  # fmt: skip
    plain = random_model(dataclasses.replace(config, activation="gelu"))
    assert 1e-5 < (plain(images) - model(images)).abs().max() < 0.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_is_that_of_the_model(dtype):
    model, images = random_model(), draw(2, 3, 6, 6)
    out = random_model().to(dtype)(images.to(dtype))
    assert out.dtype == dtype
    assert_close(out.float(), model(images), atol=0.2 if dtype == torch.bfloat16 else 1e-5, rtol=0.1)


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": 7}, "image 7 must divide into patches of 2"),
        ({"dim": 9}, "dim 9 must divide into 2 heads"),
        ({"layers": 0}, "layers 0 must be at least 1"),
        ({"norm_eps": 0.0}, "norm_eps 0.0 must be positive and finite"),
    ],
)
def test_sizes_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        dataclasses.replace(CONFIG, **change)


@pytest.mark.parametrize("shape", [(2, 1, 6, 6), (2, 3, 8, 6)])
def test_images_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"this model takes \(batch, 3, 6, 6\)"):
        random_model()(draw(*shape))


def test_a_classifier_without_classes():
    with pytest.raises(ValueError, match="classes 0 must be at least 1"):
        ImageClassifier(CONFIG, 0)
