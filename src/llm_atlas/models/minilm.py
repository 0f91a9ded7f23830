"""all-MiniLM-L6-v2 in our own Encoder: sentences to vectors that lie close where the meanings do."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from llm_atlas.core.assets import fetch
from llm_atlas.core.device import pick_device
from llm_atlas.core.weights import load_safetensors
from llm_atlas.models.encoder import Encoder, EncoderConfig, mean_pool, unit_length
from llm_atlas.models.families import build
from llm_atlas.models.families_encoders import bert_weights
from llm_atlas.nn.masks import PAD, left_pad
from llm_atlas.text.wordpiece import WordPiece

MINILM = "all-minilm-l6-v2"
MINILM_CONFIG = EncoderConfig(
    vocab=30522, dim=384, layers=6, heads=12, hidden=1536, context=512, token_types=2, pooler=True
)


def load_minilm(
    device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> tuple[Encoder, WordPiece]:
    """all-MiniLM-L6-v2 in our Encoder, and its tokenizer. Fetched once (84 MB), then from the cache.

    22,713,216 parameters, 6 layers, 384 features, 12 heads, context 512, Apache-2.0; float32 unless `dtype` says
    otherwise. Made from the MiniLM of Wang et al. 2020 (arXiv 2002.10957), trained further on a billion pairs of
    sentences by the method of Reimers and Gurevych 2019 (arXiv 1908.10084).
    Errors: `AssetError` when it is not in the cache and cannot be fetched.
    """
    weights = load_safetensors(fetch(MINILM), dtype=dtype or torch.float32, device=pick_device(device))
    tokenizer = WordPiece.from_file(fetch(f"{MINILM}-vocab"))
    return build(MINILM_CONFIG, bert_weights(weights, MINILM_CONFIG), Encoder).eval(), tokenizer


@torch.no_grad()
def embed_sentences(
    model: Encoder, tokenizer: WordPiece, sentences: Sequence[str], *, limit: int = 256
) -> Float[Tensor, "sentences dim"]:
    """One vector of length 1 a sentence, the mean of its tokens' vectors: their dot products are cosines.

    All in one batch. A sentence of more than `limit` tokens is cut, [CLS] and [SEP] counted; 256 is what MiniLM was
    tuned for. Raises ValueError for no sentences and for a `limit` below 3 or above the model's context.
    Reimers and Gurevych 2019, section 3 (arXiv 1908.10084).
    """
    if isinstance(sentences, str):
        raise TypeError("sentences must be a list of strings, not one string")
    if not 3 <= limit <= model.config.context:
        raise ValueError(f"limit {limit} must lie between 3 and the context of {model.config.context}")
    rows = [tokenizer.frame(tokenizer.encode(sentence)[: limit - 2])[0] for sentence in sentences]
    device = next(model.parameters()).device
    ids, positions = left_pad(rows, tokenizer.pad_id, device=device)
    return unit_length(mean_pool(model.hidden(ids, positions=positions), positions > PAD))
