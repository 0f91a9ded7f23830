"""Images and text in one model: CLIP compares them, LLaVA reads patches as tokens, Flamingo looks across at them.

The images of a batch come row by row: `images[row]` has shape (images, channels, height, width), and rows may have
different numbers of them, or none. A tensor (batch, images, channels, height, width) is such a sequence too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from llm_atlas.models.decoder import Decoder, DecoderConfig
from llm_atlas.models.inputs import check_ids
from llm_atlas.models.inspect import hooked
from llm_atlas.models.vision import VisionConfig, VisionTransformer
from llm_atlas.nn.activations import Activation, find_activation
from llm_atlas.nn.attention import MultiHeadAttention
from llm_atlas.nn.cache import KVCache, LayerCache
from llm_atlas.nn.feedforward import FeedForward
from llm_atlas.nn.norm import LayerNorm, RMSNorm

Images = (
    Sequence[Float[Tensor, "_images channels height width"]]
    | Float[Tensor, "batch _images channels height width"]
)


# --------------------------------------------------------------------------------------------------------------- CLIP


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """Two towers and the number of features that they share.

    `end_id` is the token at which a text is read; None takes the largest id of each text, as CLIP's own vocabulary,
    where the end has the largest, allows.
    """

    vision: VisionConfig
    text: DecoderConfig
    features: int
    end_id: int | None = None

    def __post_init__(self) -> None:
        if self.features < 1:
            raise ValueError(f"features {self.features} must be at least 1")


class CLIP(nn.Module):
    r"""How well each image fits each text: $s = e^t\, \hat u_i \cdot \hat w_j$, cosines times a learnt scale.

    $u$ is the image's class token, $w$ the causal text decoder's vector at the end of the text (it alone has seen all
    of it), both through a matrix into the same space and then of length 1. Trained so that each image fits its own
    text best among those of a batch (chapter 5); a classifier is then a text a class.
    Radford et al. 2021, sections 2.3 to 2.5 and figure 3 (arXiv 2103.00020).
    """

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionTransformer(config.vision)
        self.text = Decoder(config.text)
        self.image_projection = nn.Linear(config.vision.dim, config.features, bias=False)
        self.text_projection = nn.Linear(config.text.dim, config.features, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_images(
        self, images: Float[Tensor, "images channels height width"]
    ) -> Float[Tensor, "images features"]:
        """One vector of length 1 an image."""
        return functional.normalize(self.image_projection(self.vision(images)[:, 0]), dim=-1)

    def encode_texts(self, ids: Int[Tensor, "texts seq"]) -> Float[Tensor, "texts features"]:
        """One vector of length 1 a text. What follows its end (padding, say) makes no difference.

        Errors: ValueError for a text without `end_id` (seen on the CPU; elsewhere the device would have to wait).
        """
        end = self.config.end_id
        if end is not None and ids.device.type == "cpu":
            without = [row for row, found in enumerate((ids == end).any(1).tolist()) if not found]
            if without:
                raise ValueError(f"text {without[0]} has no end token {end}")
        # argmax finds the first of several.
        where = (ids if end is None else (ids == end).int()).argmax(-1)
        last = self.text.hidden(ids)[torch.arange(len(ids), device=ids.device), where]
        return functional.normalize(self.text_projection(last), dim=-1)

    def forward(
        self, images: Float[Tensor, "images channels height width"], ids: Int[Tensor, "texts seq"]
    ) -> Float[Tensor, "images texts"]:
        """Logits of every image with every text."""
        return self.log_scale.exp() * self.encode_images(images) @ self.encode_texts(ids).T


# ------------------------------------------------------------------------------------------------- patches as tokens


def spread_images(ids: Sequence[int], image_id: int, tokens: int) -> list[int]:
    """`ids` with `tokens` placeholders for each one: [7, 9, 5] with image 9 and 3 tokens -> [7, 9, 9, 9, 5]."""
    if tokens < 1:
        raise ValueError(f"tokens {tokens} must be at least 1")
    return [token for i in ids for token in [i] * (tokens if i == image_id else 1)]


def splice(
    embedded: Float[Tensor, "batch seq dim"],
    patches: Float[Tensor, "patches dim"],
    where: Bool[Tensor, "batch seq"],
) -> Float[Tensor, "batch seq dim"]:
    """`embedded` with a patch in each place where `where` is True, in reading order: row by row, left to right."""
    order = (where.flatten().cumsum(0) - 1).clamp(min=0).view(where.shape)
    return torch.where(where[..., None], patches[order].to(embedded.dtype), embedded)


class Projector(nn.Module):
    """From the features of a vision tower to the embeddings of a language model: two linear layers.

    Liu et al. 2023, section 3 (arXiv 2310.03744); the first LLaVA has one (arXiv 2304.08485, section 4.1).
    """

    def __init__(
        self, vision_dim: int, dim: int, *, activation: str | Activation = "gelu", bias: bool = True
    ) -> None:
        super().__init__()
        self.activation = find_activation(activation)
        self.up = nn.Linear(vision_dim, dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)

    def forward(self, x: Float[Tensor, "*batch vision_dim"]) -> Float[Tensor, "*batch dim"]:
        """Every patch alone."""
        return self.out(self.activation(self.up(x)))


@dataclass(frozen=True, kw_only=True)
class VisionLanguageConfig:
    """A vision tower, a decoder, and how the one's features become the other's tokens.

    image_id:     the placeholder in the ids; it need not be in the decoder's vocabulary
    layer:        which features are taken, as in `VisionTransformer.features`; -2 leaves the last block out
    class_token:  whether the class token is read as well as the patches
    """

    vision: VisionConfig
    text: DecoderConfig
    image_id: int
    layer: int = -2
    class_token: bool = False
    projector_activation: str | Activation = "gelu"
    projector_bias: bool = True

    def __post_init__(self) -> None:
        points = self.vision.layers + 1
        if not -points <= self.layer < points:
            raise ValueError(
                f"layer {self.layer} is not one of the {points} points of {self.vision.layers} blocks"
            )


class VisionLanguage(nn.Module):
    """A decoder that reads images as it reads words: each patch, projected, in the place of one token.

    The decoder is any decoder and knows of nothing. In the ids an image is `image_tokens` placeholders
    (`spread_images`). To write: put all but the last token of the prompt through `hidden` with a cache, then give the
    last and the cache to the generate loop, with `model.decoder`; new tokens are plain text.
    An image costs as much of the context as its patches. Liu et al. 2023, section 4.1 (arXiv 2304.08485).
    """

    def __init__(self, config: VisionLanguageConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionTransformer(config.vision)
        self.projector = Projector(
            config.vision.dim,
            config.text.dim,
            activation=config.projector_activation,
            bias=config.projector_bias,
        )
        self.decoder = Decoder(config.text)

    @property
    def image_tokens(self) -> int:
        """Placeholders that stand for one image."""
        return self.config.vision.patches + self.config.class_token

    def image_features(
        self, images: Float[Tensor, "images channels height width"]
    ) -> Float[Tensor, "images tokens dim"]:
        """What the decoder gets to read of each image."""
        features = self.vision.features(images, layer=self.config.layer)
        return self.projector(features if self.config.class_token else features[:, 1:])

    def embed(
        self, ids: Int[Tensor, "batch seq"], images: Images | None = None
    ) -> Float[Tensor, "batch seq dim"]:
        """Tokens and patches, as they enter the decoder.

        Errors: ValueError where a row's placeholders are not as many as the patches of its images. (To see that, a GPU
        has to wait once; the prefill alone comes here.)
        """
        where = ids == self.config.image_id
        flat, counts = _flatten(images, len(ids))
        _check_counts(where, [n * self.image_tokens for n in counts], "image tokens", "patches")
        text = ids.masked_fill(where, 0)
        check_ids(text, self.decoder.embed)
        embedded = self.decoder.embed(text)
        return splice(embedded, self.image_features(flat).flatten(0, 1), where) if len(flat) else embedded

    def hidden(
        self,
        ids: Int[Tensor, "batch seq"],
        *,
        images: Images | None = None,
        positions: Int[Tensor, "batch seq"] | None = None,
        mask: Bool[Tensor, "batch2 heads2 seq keys"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "batch seq dim"]:
        """The decoder's residual stream after its last norm; `images` as in the head of this module, the rest as there.

        A row's images may come in several calls with a cache, each with its own placeholders.
        """
        return self.decoder.mix(self.embed(ids, images), positions=positions, mask=mask, cache=cache)

    def forward(
        self,
        ids: Int[Tensor, "batch seq"],
        *,
        images: Images | None = None,
        positions: Int[Tensor, "batch seq"] | None = None,
        mask: Bool[Tensor, "batch2 heads2 seq keys"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "batch seq vocab"]:
        """Logits for the token after each token; arguments as in `hidden`."""
        return self.decoder.unembed(
            self.hidden(ids, images=images, positions=positions, mask=mask, cache=cache)
        )

    def make_cache(self, *, capacity: int = 0) -> KVCache:
        """An empty cache that fits the decoder."""
        return self.decoder.make_cache(capacity=capacity)


# ------------------------------------------------------------------------------------------------ looking across


class GatedCrossAttention(nn.Module):
    r"""What is put between the blocks of a language model: $x + \tanh(\alpha)\,\operatorname{cross}(x, \text{image})$.

    Then $x + \tanh(\beta)\,\operatorname{ffn}(x)$, both with a norm before. The gates $\alpha$ and $\beta$ are one
    number each and begin at 0, where the layer is exactly the identity: a trained model starts out as it was.
    Alayrac et al. 2022, section 2.2 and figure 4 (arXiv 2204.14198).
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        norm: partial,
        *,
        heads: int,
        hidden: int,
        activation: str | Activation = "gelu",
    ) -> None:
        super().__init__()
        self.norm = norm()
        self.attention = MultiHeadAttention(dim, heads, context_dim=context_dim, causal=False)
        self.gate = nn.Parameter(torch.zeros(()))
        self.feedforward_norm = norm()
        self.feedforward = FeedForward(dim, hidden, activation=activation, bias=False)
        self.feedforward_gate = nn.Parameter(torch.zeros(()))

    def forward(
        self,
        x: Float[Tensor, "batch seq dim"],
        *,
        context: Float[Tensor, "batch keys context_dim"] | None,
        mask: Bool[Tensor, "batch 1 seq keys"] | None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "batch seq dim"]:
        """Without `context` there is nothing to look at, and a token whose `mask` is all False looks nowhere."""
        if context is not None:
            seen = self.attention(self.norm(x), context=context, mask=mask, cache=cache)
            x = x + self.gate.tanh() * seen
        return x + self.feedforward_gate.tanh() * self.feedforward(self.feedforward_norm(x))


class ImageCache(KVCache):
    """The cache of a `CrossVisionLanguage`: also its images, their keys and values, and which image each token sees.

    `seen` (batch, length) counts the images up to each slot, that slot included.
    """

    def __init__(self, text: KVCache, cross_layers: int) -> None:
        """Around `text`, an empty cache of the decoder alone, whose kinds of layers it takes."""
        super().__init__(len(text), capacity=text.capacity, layer=[text[i].fork for i in range(len(text))])
        self.context: Float[Tensor, "batch keys dim"] | None = None
        self.looks = KVCache(cross_layers)
        self.seen: Int[Tensor, "batch length"] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all slots in use, and of the images' keys and values."""
        return super().nbytes + self.looks.nbytes

    def truncate(self, length: int) -> None:
        """Forget the slots from `length` on. The images stay while any slot does."""
        super().truncate(length)
        if self.seen is not None:
            self.seen = self.seen[:, :length] if length else None
        if not length:
            self.context, self.looks = None, KVCache(len(self.looks))

    def select(self, rows: Int[Tensor, " rows"] | Sequence[int]) -> None:
        """Keep these rows of the batch, in this order, with their images."""
        if not self.rows:
            return
        super().select(rows)
        rows = torch.as_tensor(rows)
        self.seen = self.seen[rows.to(self.seen.device)]
        if self.context is not None:
            self.context = self.context[rows.to(self.context.device)]
            self.looks.select(rows)

    def fork(self) -> "ImageCache":
        """A copy that can go its own way."""
        twin = super().fork()
        twin.looks = self.looks.fork()
        return twin


@dataclass(frozen=True, kw_only=True)
class CrossVisionLanguageConfig:
    """A vision tower, a decoder, and a `GatedCrossAttention` before every `every`-th of its blocks, from the first on.

    `image_id` is a token of the decoder's vocabulary, one an image. `cross_heads` and `cross_hidden` are the decoder's
    own `heads` and `hidden` unless given.
    """

    vision: VisionConfig
    text: DecoderConfig
    image_id: int
    every: int = 1
    cross_heads: int | None = None
    cross_hidden: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.every <= self.text.layers:
            raise ValueError(
                f"every {self.every} must be at least 1 and at most the {self.text.layers} blocks"
            )
        if not 0 <= self.image_id < self.text.vocab:
            raise ValueError(f"image_id {self.image_id} is outside the vocabulary of {self.text.vocab}")


class CrossVisionLanguage(Decoder):
    """A decoder with layers between its blocks that look across at images; in the text an image is one token.

    A token looks at the patches of one image alone, the last one before it: what came earlier it knows through its own
    attention to the text. So images are told apart by where they stand, and a token before the first sees none.
    All that takes a `Decoder` takes this: the weights of a trained one fit under their own names, and with the gates
    at 0 its logits are the same. To write: put all but the last token of the prompt through `hidden` with `images` and
    a cache, then give the last and the cache to the generate loop.

    An image costs one token of the context. Flamingo's resampler, which makes 64 vectors of any number of patches, is
    left out: the layers read the patches themselves. Alayrac et al. 2022, sections 2.2 and 2.3 (arXiv 2204.14198).
    """

    def __init__(self, config: CrossVisionLanguageConfig) -> None:
        text = config.text
        super().__init__(text)
        self.cross_config = config
        self.vision = VisionTransformer(config.vision)
        norm = partial({"layer": LayerNorm, "rms": RMSNorm}[text.norm], text.dim, eps=text.norm_eps)
        self.cross = nn.ModuleList(
            GatedCrossAttention(
                text.dim,
                config.vision.dim,
                norm,
                heads=text.heads if config.cross_heads is None else config.cross_heads,
                hidden=text.hidden if config.cross_hidden is None else config.cross_hidden,
            )
            for _ in range(0, text.layers, config.every)
        )

    def image_features(
        self, images: Float[Tensor, "images channels height width"]
    ) -> Float[Tensor, "images patches dim"]:
        """What there is to look at: the patches of each image after the tower's last norm."""
        return self.vision(images)[:, 1:]

    def hidden(
        self,
        ids: Int[Tensor, "batch seq"],
        *,
        images: Images | None = None,
        positions: Int[Tensor, "batch seq"] | None = None,
        mask: Bool[Tensor, "batch2 heads2 seq keys"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "batch seq dim"]:
        """As `Decoder.hidden`; `images` as in the head of this module, each with its token in `ids`.

        A cache takes images once. Errors: ValueError where a row's image tokens are not as many as its images, for a
        cache that has images already, TypeError for a cache that `make_cache` did not make.
        """
        check_ids(ids, self.embed)
        if cache is not None and not isinstance(cache, ImageCache):
            raise TypeError("cache must come from this model's make_cache: it has to keep the images")
        context, seen = self._look(ids, images, cache)
        sees = None
        if context is not None:
            number = torch.arange(context.shape[1], device=ids.device) // self.cross_config.vision.patches + 1
            sees = (seen[:, :, None] == number)[:, None]

        def before(index: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            x, *others = args
            kept = None if cache is None else cache.looks[index]
            return (self.cross[index](x, context=context, mask=sees, cache=kept), *others), kwargs

        # As hooks, so that the loop over the blocks, their caches and masks stay the Decoder's own.
        places = [
            (self.blocks[i * self.cross_config.every], partial(before, i)) for i in range(len(self.cross))
        ]
        with hooked(places, before=True):
            x = super().hidden(ids, positions=positions, mask=mask, cache=cache)
        if cache is not None:  # not before, so that a call that was refused leaves nothing behind
            cache.context = context
            cache.seen = seen if cache.seen is None else torch.cat([cache.seen, seen], dim=1)
        return x

    def forward(
        self,
        ids: Int[Tensor, "batch seq"],
        *,
        images: Images | None = None,
        positions: Int[Tensor, "batch seq"] | None = None,
        mask: Bool[Tensor, "batch2 heads2 seq keys"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "batch seq vocab"]:
        """Logits for the token after each token; arguments as in `hidden`."""
        return self.unembed(self.hidden(ids, images=images, positions=positions, mask=mask, cache=cache))

    def make_cache(self, *, capacity: int = 0) -> ImageCache:
        """An empty cache that fits this model."""
        return ImageCache(super().make_cache(capacity=capacity), len(self.cross))

    def _look(
        self, ids: Tensor, images: Images | None, cache: ImageCache | None
    ) -> tuple[Tensor | None, Tensor]:
        """The patches that each row may look at, and for each token the number of the image it sees (0: none)."""
        where = ids == self.cross_config.image_id
        seen = where.long().cumsum(1)
        if cache is not None and cache.seen is not None:
            seen = seen + cache.seen[:, -1:]
        context = None if cache is None else cache.context
        if images is not None and context is not None:
            raise ValueError("the cache has images already: put all images of a prompt through in one call")
        # Behind a cache without images of its own stands what the model wrote: an image token there has no image.
        if images is not None or cache is None or cache.seen is None:
            flat, counts = _flatten(images, len(ids))
            _check_counts(where, counts, "image tokens", "images")
            if len(flat):
                rows = self.image_features(flat).split(counts)
                context = pad_sequence([row.flatten(0, 1) for row in rows], batch_first=True)
        return context, seen


# ------------------------------------------------------------------------------------------------------------ images


def _flatten(images: Images | None, rows: int) -> tuple[Tensor | tuple[()], list[int]]:
    """All images behind one another (nothing where there are none), and how many each row has."""
    if images is None:
        return (), [0] * rows
    if len(images) != rows:
        raise ValueError(f"there are images for {len(images)} rows, the ids have {rows}")
    for row in images:
        if len(row) and row.dim() != 4:
            raise ValueError(
                f"the images of a row must have shape (images, channels, height, width), got {tuple(row.shape)}"
            )
    full = [row for row in images if len(row)]
    return torch.cat(full) if full else (), [len(row) for row in images]


def _check_counts(where: Tensor, wanted: list[int], tokens: str, things: str) -> None:
    if where.device.type == "meta":  # no numbers to count
        return
    for row, (found, want) in enumerate(zip(where.sum(1).tolist(), wanted, strict=True)):
        if found != want:
            raise ValueError(f"row {row} has {found} {tokens} and {want} {things}: they must be equally many")
