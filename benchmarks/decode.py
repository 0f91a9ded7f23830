"""Decoding SmolLM2: tokens a second of our generate against transformers generate, and what memory allows.

    python benchmarks/decode.py --rounds 7

Every new token reads all weights once, so bytes of weights over read bandwidth bounds a batch's steps per second.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from _common import RESULTS, environment, ratio, seconds, take_turns, write
from _smollm2 import agreeing, load_both, prompts

from llm_atlas.core.device import pick_device
from llm_atlas.infer.generate import generate


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second that a sum over 512 MB reads, the best of some tries."""
    numbers = torch.ones(1 << 27, device=device)
    return max(numbers.nbytes / seconds(numbers.sum, device) for _ in range(8))


def gap_where_they_part(model: torch.nn.Module, ids: list[int], ours: list[int], theirs: list[int]) -> float:
    """Our logit of our token less that of theirs, where the two first differ; 0 if they never do."""
    first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
    if first is None:
        return 0.0
    with torch.inference_mode():
        read = torch.tensor([ids + ours[:first]], device=model.embed.weight.device)
        logits = model(read)[0, -1].float()
    return (logits[ours[first]] - logits[theirs[first]]).item()


def main(
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:0 or mps; unset: the best there is")] = "",
    dtype: Annotated[list[str], typer.Option(help="may be given more than once")] = ["float32", "bfloat16"],  # noqa: B006
    batch: Annotated[list[int], typer.Option(help="may be given more than once")] = [1, 8],  # noqa: B006
    new_tokens: Annotated[int, typer.Option(min=2)] = 64,
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    out: Annotated[Path, typer.Option(help="where the JSON goes")] = RESULTS / "bench-decode.json",
) -> None:
    """Tokens a second of greedy decoding, ours and transformers', in turns."""
    where = pick_device(device or None)
    bandwidth = read_bandwidth(where)
    rows = []
    for name in dtype:
        ours, theirs, tokenizer = load_both(where, getattr(torch, name))
        weights = sum(p.nbytes for p in ours.parameters())
        for size in batch:
            rows.append(
                compare(
                    ours, theirs, prompts(tokenizer, size, 16), where, new_tokens=new_tokens, rounds=rounds
                )
                | {"limit tok/s": size * bandwidth / weights}
            )
            rows[-1] = {"dtype": name, "batch": size} | rows[-1]
    write(
        out,
        f"greedy decoding of SmolLM2-135M, {new_tokens} tokens behind a prompt of 16, against transformers generate",
        environment(where, ["torch", "transformers"]),
        rows,
        read_bandwidth_gb_per_s=round(bandwidth / 1e9, 1),
        rounds=rounds,
        note="ratio: the median of each round's own. same: leading tokens that are equal, of all. gap: where rows part,"
        " our logit of our token less that of theirs, the largest of all rows (logits here are about 16, where"
        " neighbouring bfloat16 numbers there are 0.125 apart: a gap of that size is a tie broken by rounding)",
    )


def compare(ours, theirs, ids, where, *, new_tokens: int, rounds: int) -> dict[str, object]:
    """One row of the table."""
    tensor = torch.tensor(ids, device=where)
    ones = torch.ones_like(tensor)
    written = {}

    def run_ours():
        written["ours"] = generate(ours, ids, max_new_tokens=new_tokens)

    def run_theirs():
        out = theirs.generate(
            tensor, attention_mask=ones, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False,
            pad_token_id=2, eos_token_id=None,
        )  # fmt: skip
        written["theirs"] = out[:, tensor.shape[1] :].tolist()

    times = take_turns({"ours": run_ours, "theirs": run_theirs}, rounds=rounds, device=where)
    tokens = len(ids) * new_tokens
    middle = {name: sorted(taken)[len(taken) // 2] for name, taken in times.items()}
    return {
        "ours tok/s": tokens / middle["ours"],
        "theirs tok/s": tokens / middle["theirs"],
        **ratio(times, "theirs", "ours"),
        "same": f"{agreeing(written['ours'], written['theirs'])}/{tokens}",
        "gap": max(
            gap_where_they_part(ours, *row)
            for row in zip(ids, written["ours"], written["theirs"], strict=True)
        ),
    }


if __name__ == "__main__":
    typer.run(main)
