"""Real models, loaded into our own."""

import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm_atlas.core.assets import fetch
from llm_atlas.core.device import default_dtype, pick_device
from llm_atlas.core.weights import load_gguf, load_safetensors
from llm_atlas.models import families_decoders as more
from llm_atlas.models import families_encoders as encoders
from llm_atlas.models import families_vision as seeing
from llm_atlas.models.decoder import Decoder
from llm_atlas.models.encoder import Encoder
from llm_atlas.models.encoder_decoder import EncoderDecoder
from llm_atlas.models.families import (
    build,
    from_gguf_metadata,
    from_gpt2_config,
    from_llama_config,
    gguf_weights,
    gpt2_weights,
    llama_weights,
)
from llm_atlas.models.vision import ImageClassifier, VisionTransformer
from llm_atlas.models.vision_language import CLIP, VisionLanguage
from llm_atlas.text.byte_bpe import ByteBPE

SMOLLM2 = "smollm2-135m-instruct"
_ONE_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DECODER, _ENCODER, _BOTH = (partial(build, model=kind) for kind in (Decoder, Encoder, EncoderDecoder))


@dataclass(frozen=True)
class Family:
    """How a family is read and built.

    read_config:  its config.json into ours
    read_weights: its weights, given ours, under our names
    build:        our configuration and these weights to the model
    heads:        what its config.json leaves to the weights, as keywords of `read_config`: given it and their names
    """

    read_config: Callable[..., Any]
    read_weights: Callable[[Mapping[str, Tensor], Any], dict[str, Tensor]]
    build: Callable[[Any, Mapping[str, Tensor]], nn.Module] = _DECODER
    heads: Callable[[Mapping[str, Any], Collection[str]], dict[str, Any]] = lambda config, names: {}


def _bert_heads(config: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {
        "pooler": any(name.removeprefix(f"{config['model_type']}.").startswith("pooler.") for name in names),
        "masked_lm": any(name.startswith(("cls.predictions.", "lm_head.")) for name in names),
    }


def _t5_head(config: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    # transformers 5 writes of both versions that they are tied.
    return {"tied": "lm_head.weight" not in names} if "scale_decoder_outputs" in config else {}


def _bart_bias(config: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {"logits_bias": "final_logits_bias" in names}


_LLAMA, _GPT2 = Family(from_llama_config, llama_weights), Family(from_gpt2_config, gpt2_weights)
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "mixtral": Family(more.from_mixtral_config, more.mixtral_weights),
    "qwen3_moe": Family(more.from_qwen3_moe_config, more.qwen3_moe_weights),
    "deepseek_v3": Family(more.from_deepseek_config, more.deepseek_weights),
    "gptj": Family(more.from_gptj_config, more.gptj_weights),
    "gpt_neox": Family(more.from_gpt_neox_config, more.gpt_neox_weights),
    "falcon": Family(more.from_falcon_config, more.falcon_weights),
    "gemma3_text": Family(more.from_gemma3_config, more.gemma3_weights),
    "bloom": Family(more.from_bloom_config, more.bloom_weights),
    "bert": Family(encoders.from_bert_config, encoders.bert_weights, _ENCODER, _bert_heads),
    "roberta": Family(encoders.from_bert_config, encoders.roberta_weights, _ENCODER, _bert_heads),
    "t5": Family(encoders.from_t5_config, encoders.t5_weights, _BOTH, _t5_head),
    "bart": Family(encoders.from_bart_config, encoders.bart_weights, _BOTH, _bart_bias),
    "vit": Family(seeing.from_vit_config, seeing.vit_weights, seeing.build_vit),
    "clip": Family(seeing.from_clip_config, seeing.clip_weights, partial(build, model=CLIP)),
    "llava": Family(seeing.from_llava_config, seeing.llava_weights, partial(build, model=VisionLanguage)),
}
"""`model_type` of a config.json to how it is read."""


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Decoder | Encoder | EncoderDecoder | VisionTransformer | ImageClassifier | CLIP | VisionLanguage:
    """A checkpoint of one of `FAMILIES` in a model of ours, ready to be run (not training).

    bert and roberta give an `Encoder`, with a pooler and a head for masked tokens where the weights have them; t5 and
    bart an `EncoderDecoder`; vit a `VisionTransformer`, or with a classifier an `ImageClassifier`; clip a `CLIP`; llava
    a `VisionLanguage`; all others a `Decoder`.

    `source` is a folder with a config.json and a model.safetensors, or the files that a model.safetensors.index.json
    lists. What is no folder is taken for a name on the Hugging Face Hub ("EleutherAI/pythia-70m"): huggingface_hub,
    which has to be installed, fetches its json and safetensors files into its own cache, and nothing else. Pickles are
    never opened. `device` and `dtype` are chosen unless given. Memory: the weights once, and what is cut or stacked on
    the way (fused matrices, experts) twice.

    Errors, each with the file: FileNotFoundError for a folder without these files and for a name that is neither a
    folder nor on the Hub; ValueError for damaged files, an unknown `model_type` or an option we do not have, a missing,
    misshapen or left-over weight; ImportError for a name without huggingface_hub.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = _fetched(os.fspath(source))
    config = _read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(f"{folder / 'config.json'}: model_type {kind!r} is not one of {known}")
    if config.get("quantization_config"):
        raise ValueError(f"{folder / 'config.json'}: quantization_config is not supported yet")
    family, (weights, file) = FAMILIES[kind], _read_weights(folder)
    try:
        ours = family.read_config(config, **family.heads(config, weights))
    except KeyError as error:
        raise ValueError(f"{folder / 'config.json'}: {error.args[0]!r} is missing") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    device = pick_device(device)
    dtype = dtype or default_dtype(device)
    weights = {n: t.to(device, dtype if t.is_floating_point() else None) for n, t in weights.items()}
    try:
        model = family.build(ours, family.read_weights(weights, ours))
    except ValueError as error:
        what = ", ".join(config.get("architectures") or ())
        raise ValueError(f"{file}: {error}" + (f" (architectures: {what})" if what else "")) from None
    return model.eval()


def _read_weights(folder: Path) -> tuple[dict[str, Tensor], Path]:
    """All tensors of a checkpoint under its own names, not yet read, and the file that says which there are."""
    if (folder / _ONE_FILE).is_file():
        return load_safetensors(folder / _ONE_FILE), folder / _ONE_FILE
    index = folder / _INDEX
    if not index.is_file():
        raise FileNotFoundError(f"{folder}: there is no {_ONE_FILE} and no {_INDEX}; pickles are not read")
    where = _read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{index}: 'weight_map' is missing")
    weights: dict[str, Tensor] = {}
    for name in where.values():
        # The names come from a file: they must not lead out of the folder.
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: {name!r} is not the name of a safetensors file beside it")
    for name in sorted(set(where.values())):
        shard = load_safetensors(folder / name)
        for weight in shard:
            if where.get(weight) != name:
                raise ValueError(f"{folder / name}: weight {weight!r} is not listed for it in {_INDEX}")
        weights |= shard
    lost = sorted(set(where) - set(weights))
    if lost:
        raise ValueError(f"{folder / where[lost[0]]}: weight {lost[0]!r} is missing, which {_INDEX} lists")
    return weights, index


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a json file ({error})") from None
    if not isinstance(read, dict):
        raise ValueError(f"{path}: a json object is needed, not {type(read).__name__}")
    return read


def _fetched(name: str) -> Path:
    """The folder into which huggingface_hub has put a repository of the Hub."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ImportError(
            f"{name!r} is no folder; to fetch it from the Hugging Face Hub: pip install huggingface_hub"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise FileNotFoundError(
            f"{name!r} is no folder, and the Hugging Face Hub does not give it ({why[:200]}): check the name and the"
            " connection, or fetch it elsewhere and pass its folder"
        ) from None


def load_smollm2(
    device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> tuple[Decoder, ByteBPE]:
    """SmolLM2-135M-Instruct in our Decoder, and its tokenizer. Fetched once (93 MB), then from the cache.

    134,515,008 parameters, 30 layers, 576 features, 9 query heads over 3 key/value heads, context 8192, Apache-2.0.
    The file stores most weights in 4 bits (Q4_1); here they are dequantized to `dtype` (chosen by device unless given).
    Errors: `AssetError` when it is not in the cache and cannot be fetched. Ben Allal et al. 2025 (arXiv 2502.02737).
    """
    device = pick_device(device)
    file = load_gguf(fetch(SMOLLM2), dtype=dtype or default_dtype(device), device=device)
    config = from_gguf_metadata(file.metadata, tied="output.weight" not in file.tensors)
    model = build(config, gguf_weights(file.tensors, config), Decoder)
    return model.eval(), ByteBPE.from_gguf(file.metadata)
