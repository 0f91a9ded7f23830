"""Budget forcing: how long a model thinks, set from outside while it writes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llm_atlas.infer.sampling import Transform


def force_budget(
    open_ids: Sequence[int],
    close_ids: Sequence[int],
    *,
    least: int = 0,
    most: int | None = None,
    wait_ids: Sequence[int] = (),
    waits: int = 0,
) -> Transform:
    """At least `least` and at most `most` tokens between the tags that open and close a thought.

    A row thinks from `open_ids` to the first `close_ids` behind them; elsewhere it is left alone. At `most` tokens the
    close is written for it, token by token. Before `least` the first token of the close is impossible; its logit goes
    to the first token of `wait_ids`, if there are any, so that "Wait" is written where the model would have closed, and
    the rest of them follow. `waits` does the same by number: the close is withheld until `wait_ids` stand in the
    thought so often. `most` goes before both: it may cut a "Wait" in two.

    Only the ids so far are looked at, each row's own, so padding, caches and the order of rows do not matter. Put it
    last among the transforms that shape the distribution: what it forces has the only finite logit of its row, and
    temperature behind it changes nothing. The first tokens of the close and of `wait_ids` should have no other use in
    a thought: before `least` the one is withheld and behind the other the rest is written, whoever wrote it.
    Cost: linear in the row, a step. Muennighoff et al. 2025, section 3.1 (arXiv 2501.19393).
    Errors: ValueError for empty tags, limits below 0 or crossed, `waits` without `wait_ids`, `wait_ids` that hold a
    token of the close; when called, for ids outside the vocabulary and rows that do not fit.
    """
    opening, close, wait = tuple(open_ids), tuple(close_ids), tuple(wait_ids)
    _check(opening, close, wait, least, most, waits)

    def next_token(row: Sequence[int]) -> tuple[int | None, bool]:
        """(the token to force, whether the close is withheld)."""
        thought = _thought(row, opening, close)
        if thought is None:
            return None, False
        n = len(thought)
        if most is not None and n >= most:
            return close[_begun(thought, close)], False
        if wait and (begun := _begun(thought, wait)) and _withheld(thought[: n - begun]):
            return wait[begun], False
        return None, _withheld(thought)

    def _withheld(thought: Sequence[int]) -> bool:
        return len(thought) < least or (waits > 0 and _count(thought, wait) < waits)

    def transform(logits: Tensor, history: Sequence[Sequence[int]]) -> Tensor:
        if len(history) != logits.shape[0]:
            raise ValueError(f"history has {len(history)} rows, logits have {logits.shape[0]}")
        if (largest := max(*opening, *close, *wait)) >= logits.shape[1]:
            raise ValueError(f"token id {largest} is outside the vocabulary of {logits.shape[1]}")
        told = [next_token(row) for row in history]
        forced = [(i, token) for i, (token, _) in enumerate(told) if token is not None]
        withheld = [i for i, (_, held) in enumerate(told) if held]
        if not forced and not withheld:
            return logits
        logits = logits.clone()
        if withheld:
            rows = torch.tensor(withheld, device=logits.device)
            if wait:
                logits[rows, wait[0]] = torch.maximum(logits[rows, wait[0]], logits[rows, close[0]])
            logits[rows, close[0]] = -torch.inf
        if forced:
            rows, tokens = torch.tensor(forced, device=logits.device).unbind(1)
            logits[rows] = -torch.inf
            logits[rows, tokens] = 0.0
        return logits

    return transform


def thinking_tokens(row: Sequence[int], open_ids: Sequence[int], close_ids: Sequence[int]) -> int | None:
    """How many tokens lie between the first `open_ids` of a row and the close, or its end; None if it never opens."""
    opening, close = tuple(open_ids), tuple(close_ids)
    start = _find(row, opening)
    if start is None:
        return None
    first = start + len(opening)
    end = _find(row, close, first)
    return (len(row) if end is None else end) - first


def _check(opening, close, wait, least, most, waits) -> None:
    for name, ids in (("open_ids", opening), ("close_ids", close)):
        if not ids:
            raise ValueError(f"{name} must hold at least one token id")
    for name, ids in (("open_ids", opening), ("close_ids", close), ("wait_ids", wait)):
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise ValueError(f"{name} {list(ids)} must be token ids, whole numbers from 0")
    if least < 0 or waits < 0:
        raise ValueError(f"least {least} and waits {waits} must not be negative")
    if most is not None and most < max(least, 0):
        raise ValueError(f"most {most} must be at least least, {least}")
    if waits and not wait:
        raise ValueError(f"waits {waits} need wait_ids, the tokens to write instead of the close")
    if set(wait) & set(close):
        raise ValueError(f"wait_ids {list(wait)} must hold no token of close_ids {list(close)}")


def _thought(row: Sequence[int], opening: tuple[int, ...], close: tuple[int, ...]) -> Sequence[int] | None:
    """The tokens since a thought was opened, or None where the row does not think."""
    at = 0
    while (start := _find(row, opening, at)) is not None:
        at = start + len(opening)
        end = _find(row, close, at)
        if end is None:
            return row[at:]
        at = end + len(close)
    return None


def _find(row: Sequence[int], part: tuple[int, ...], start: int = 0) -> int | None:
    """Where `part` first begins in `row`, from `start` on."""
    for i in range(start, len(row) - len(part) + 1):
        if row[i] == part[0] and tuple(row[i : i + len(part)]) == part:
            return i
    return None


def _begun(row: Sequence[int], part: tuple[int, ...]) -> int:
    """How many tokens of `part` the row already ends in, short of the whole."""
    for size in range(min(len(part) - 1, len(row)), 0, -1):
        if tuple(row[-size:]) == part[:size]:
            return size
    return 0


def _count(row: Sequence[int], part: tuple[int, ...]) -> int:
    return sum(tuple(row[i : i + len(part)]) == part for i in range(len(row) - len(part) + 1))
