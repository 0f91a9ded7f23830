"""Reading a prompt: seconds until the first token behind 512, ours against transformers.

python benchmarks/prefill.py --rounds 7
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from _common import RESULTS, environment, ratio, take_turns, write
from _smollm2 import agreeing, load_both, prompts

from llm_atlas.core.device import pick_device
from llm_atlas.infer.generate import generate


def main(
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:0 or mps; unset: the best there is")] = "",
    dtype: Annotated[list[str], typer.Option(help="may be given more than once")] = ["float32", "bfloat16"],  # noqa: B006
    batch: Annotated[list[int], typer.Option(help="may be given more than once")] = [1],  # noqa: B006
    tokens: Annotated[int, typer.Option(min=1)] = 512,
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    out: Annotated[Path, typer.Option(help="where the JSON goes")] = RESULTS / "bench-prefill.json",
) -> None:
    """Tokens a second read before the first one is written, ours and transformers', in turns."""
    where = pick_device(device or None)
    rows = []
    for name in dtype:
        ours, theirs, tokenizer = load_both(where, getattr(torch, name))
        for size in batch:
            row = compare(ours, theirs, prompts(tokenizer, size, tokens), where, rounds=rounds)
            rows.append({"dtype": name, "batch": size} | row)
    write(
        out,
        f"SmolLM2-135M reads {tokens} tokens and writes one, against transformers generate",
        environment(where, ["torch", "transformers"]),
        rows,
        rounds=rounds,
        note="ratio: median of each round's own; same: rows whose first token is the same",
    )


def compare(ours, theirs, ids, where, *, rounds: int) -> dict[str, object]:
    """One row of the table."""
    tensor = torch.tensor(ids, device=where)
    ones = torch.ones_like(tensor)
    written = {}

    def run_ours():
        written["ours"] = generate(ours, ids, max_new_tokens=1)

    def run_theirs():
        out = theirs.generate(
            tensor, attention_mask=ones, max_new_tokens=1, min_new_tokens=1, do_sample=False, pad_token_id=2,
            eos_token_id=None,
        )  # fmt: skip
        written["theirs"] = out[:, tensor.shape[1] :].tolist()

    times = take_turns({"ours": run_ours, "theirs": run_theirs}, rounds=rounds, device=where)
    middle = {name: sorted(taken)[len(taken) // 2] for name, taken in times.items()}
    return {
        "ours tok/s": tensor.numel() / middle["ours"],
        "theirs tok/s": tensor.numel() / middle["theirs"],
        **ratio(times, "theirs", "ours"),
        "same": f"{agreeing(written['ours'], written['theirs'])}/{len(ids)}",
    }


if __name__ == "__main__":
    typer.run(main)
