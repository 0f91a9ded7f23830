"""Vision transformers: an image is cut into patches, and a patch is a token."""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llm_atlas.nn.activations import Activation
from llm_atlas.nn.attention import MultiHeadAttention
from llm_atlas.nn.block import Block
from llm_atlas.nn.feedforward import FeedForward
from llm_atlas.nn.norm import LayerNorm
from llm_atlas.nn.positions import LearnedPositions


def quick_gelu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    r"""$x\,\sigma(1.702\,x)$: the approximation of GELU that CLIP was trained with, up to 0.02 away from it.

    Computed in float32 at least, returned in the dtype of `x`.
    Hendrycks and Gimpel 2016, section 2 (arXiv 1606.08415).
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.sigmoid(1.702 * wide)).to(x.dtype)


def patchify(
    images: Float[Tensor, "*batch channels height width"], patch: int
) -> Float[Tensor, "*batch patches features"]:
    """Cut images into squares of `patch` pixels a side, row by row, and lay each out as one vector.

    A vector holds channels x patch x patch numbers, channel by channel, in it row by row: the order of a convolution's
    weights. So a linear layer on these vectors is a convolution whose kernel is as wide as its stride, and the other
    way round. Moves numbers, computes none. Errors: ValueError where `patch` does not divide height and width.
    Dosovitskiy et al. 2020, section 3.1 (arXiv 2010.11929).
    """
    if images.dim() < 3:
        raise ValueError(f"images must have shape (..., channels, height, width), got {tuple(images.shape)}")
    height, width = images.shape[-2:]
    if patch < 1 or height % patch or width % patch:
        raise ValueError(
            f"an image of {height} x {width} pixels does not divide into patches of {patch} x {patch}"
        )
    rows_and_columns = images.unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch))
    # (channels, row of patches, row in it, column of patches, column in it): the grid of patches comes to the front.
    return rows_and_columns.movedim((-4, -2), (-5, -4)).flatten(-3).flatten(-3, -2)


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The shape of a vision transformer. `image` and `patch` are pixels a side, `hidden` is the feed-forward width.

    The last four are what CLIP's towers do otherwise than the first ViT: CLIP has no `patch_bias`, a norm before the
    first block (`norm_before`), and `quick_gelu` for `activation`. Errors: ValueError for sizes that do not fit.
    """

    image: int
    patch: int
    channels: int = 3
    dim: int
    layers: int
    heads: int
    hidden: int
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    patch_bias: bool = True
    norm_before: bool = False
    activation: str | Activation = "gelu"

    def __post_init__(self) -> None:
        for name in ("image", "patch", "channels", "dim", "layers", "heads", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if not 0 < self.norm_eps < float("inf"):
            raise ValueError(f"norm_eps {self.norm_eps} must be positive and finite")
        if self.image % self.patch:
            raise ValueError(f"image {self.image} must divide into patches of {self.patch}")
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} must divide into {self.heads} heads")

    @property
    def patches(self) -> int:
        """Patches of one image."""
        return (self.image // self.patch) ** 2


class VisionTransformer(nn.Module):
    r"""Images to one vector a patch, and one for the whole image: an encoder of the same blocks as a text model's.

    $z_0 = [x_\text{class};\, x_1 E; \dots; x_N E] + E_\text{pos}$, then blocks that see all tokens, then a norm.
    A learnt class token stands before the patches; what the last block makes of it stands for the image. Nothing says
    which patches are neighbours but the learnt positions. Time grows with the square of the number of patches.
    Dosovitskiy et al. 2020, section 3.1, equations 1 to 4 (arXiv 2010.11929).
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        norm = partial(LayerNorm, config.dim, eps=config.norm_eps)
        self.patches = nn.Linear(config.channels * config.patch**2, config.dim, bias=config.patch_bias)
        self.class_token = nn.Parameter(torch.zeros(config.dim))
        self.positions = LearnedPositions(config.patches + 1, config.dim)
        self.norm_before = norm() if config.norm_before else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(
                MultiHeadAttention(
                    config.dim, config.heads, causal=False, bias=config.qkv_bias, out_bias=True
                ),
                FeedForward(config.dim, config.hidden, activation=config.activation),
                norm,
            )
            for _ in range(config.layers)
        )
        self.norm = norm()

    def embed(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """The class token and the patches with their positions, as they enter the first block."""
        c = self.config
        if images.dim() != 4 or images.shape[1:] != (c.channels, c.image, c.image):
            raise ValueError(
                f"images have shape {tuple(images.shape)}, this model takes"
                f" (batch, {c.channels}, {c.image}, {c.image})"
            )
        x = self.patches(patchify(images, c.patch))
        x = torch.cat([self.class_token.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        places = torch.arange(x.shape[1], device=x.device)[None]
        return self.norm_before(self.positions.embed(x, places))

    def features(
        self, images: Float[Tensor, "batch channels height width"], *, layer: int = -1
    ) -> Float[Tensor, "batch tokens dim"]:
        """The residual stream behind a block, before the last norm; token 0 is the class token.

        `layer` counts as the `hidden_states` of transformers do: 0 is what enters the first block, n what leaves the
        n-th, -1 what leaves the last and -2 what enters it. Later blocks are not run.
        Errors: ValueError for a layer that is not there.
        """
        points = self.config.layers + 1
        if not -points <= layer < points:
            raise ValueError(
                f"layer {layer} is not one of the {points} points of {self.config.layers} blocks"
            )
        x = self.embed(images)
        for block in self.blocks[: layer % points]:
            x = block(x)
        return x

    def forward(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """`features` of the last block, normalised. `[:, 0]` stands for the image, `[:, 1:]` are its patches."""
        return self.norm(self.features(images))


class ImageClassifier(nn.Module):
    """A linear layer on the class token: logits, one a class.

    Dosovitskiy et al. 2020, section 3.1 (arXiv 2010.11929).
    """

    def __init__(self, config: VisionConfig, classes: int) -> None:
        super().__init__()
        if classes < 1:
            raise ValueError(f"classes {classes} must be at least 1")
        self.vision = VisionTransformer(config)
        self.head = nn.Linear(config.dim, classes)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Images to logits."""
        return self.head(self.vision(images)[:, 0])
