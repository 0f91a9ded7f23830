"""The one generate loop."""

from collections.abc import Iterator, Sequence

import torch

from llm_atlas.infer.sampling import Transform, greedy, sample
from llm_atlas.infer.sampling import temperature as make_temperature
from llm_atlas.models.decoder import Decoder
from llm_atlas.models.encoder_decoder import Reading
from llm_atlas.nn.cache import KVCache
from llm_atlas.nn.masks import left_pad


def stream(
    model: Decoder | Reading,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    transforms: Sequence[Transform] = (),
    stop_ids: Sequence[int] = (),
    generator: torch.Generator | None = None,
    cache: KVCache | None = None,
) -> Iterator[list[int | None]]:
    """Write on from each prompt, one token of every row a step; None for a row that has stopped.

    Greedy at temperature 0, else sampled with `generator`. A row stops after a token of `stop_ids` (which it yields)
    or at `max_new_tokens`. Prompts may differ in length: they are padded on the left and never see the padding.
    `cache` may hold what comes before the prompts, which must then be of equal length.
    Raises ValueError for an empty prompt, and before any work when prompt and new tokens do not fit the context.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens} must be at least 1")
    if not 0 <= temperature < float("inf"):  # NaN fails this too
        raise ValueError(f"temperature {temperature} must be finite and not negative")
    device = model.embed.weight.device
    ids, positions = left_pad(prompts, device=device)
    past = 0 if cache is None else cache.length
    # The last token is never fed back, so it needs no slot.
    total = past + ids.shape[1] + max_new_tokens - 1
    if total > model.config.context:
        raise ValueError(
            f"a past of {past}, a prompt of {ids.shape[1]} and {max_new_tokens} new tokens do not fit"
            f" the context of {model.config.context}"
        )
    padded = len({len(row) for row in prompts}) > 1
    if past and padded:
        raise ValueError("prompts behind a cache must be of equal length")
    if temperature > 0:
        transforms = [*transforms, make_temperature(temperature)]
    return _steps(
        model,
        ids,
        positions if padded else None,
        [list(row) for row in prompts],
        max_new_tokens=max_new_tokens,
        greedily=temperature == 0,
        transforms=transforms,
        stop_ids=frozenset(stop_ids),
        generator=generator,
        cache=model.make_cache(capacity=total) if cache is None else cache,
    )


def _steps(
    model, ids, positions, history, *, max_new_tokens, greedily, transforms, stop_ids, generator, cache
) -> Iterator[list[int | None]]:
    running = [True] * len(history)
    for _ in range(max_new_tokens):
        # Entered at every step, not around the loop: the caller's code runs between steps and keeps its own mode.
        with torch.inference_mode():
            logits = model.unembed(model.hidden(ids, positions=positions, cache=cache)[:, -1])
            for transform in transforms:
                logits = transform(logits, history)
            chosen = greedy(logits) if greedily else sample(logits, generator)
        step: list[int | None] = []
        for row, token in enumerate(chosen.tolist()):
            step.append(token if running[row] else None)
            if running[row]:
                history[row].append(token)
                running[row] = token not in stop_ids
        yield step
        if not any(running):
            return
        ids, positions = chosen[:, None], None


def generate(
    model: Decoder | Reading,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    transforms: Sequence[Transform] = (),
    stop_ids: Sequence[int] = (),
    generator: torch.Generator | None = None,
    cache: KVCache | None = None,
) -> list[list[int]]:
    """The new tokens of every row, all at once; arguments as in `stream`."""
    rows: list[list[int]] = [[] for _ in prompts]
    for step in stream(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        transforms=transforms,
        stop_ids=stop_ids,
        generator=generator,
        cache=cache,
    ):
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    return rows
