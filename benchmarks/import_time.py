"""What an import costs: ours in fresh processes, against `import torch` alone.

python benchmarks/import_time.py
"""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from _common import RESULTS, environment, ratio, take_turns, write

PEER = "import torch"
STATEMENTS = [
    "import llm_atlas",
    "import llm_atlas.nn.attention",
    "from llm_atlas.infer.generate import generate; from llm_atlas.models.pretrained import load_smollm2",
    "import llm_atlas.cli",
]


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    out: Annotated[Path, typer.Option(help="where the JSON goes")] = RESULTS / "bench-import_time.json",
) -> None:
    """Seconds of a fresh Python process that imports, in turns."""

    def process(statement: str):
        return lambda: subprocess.run([sys.executable, "-c", statement], check=True, timeout=120)

    runs = {statement: process(statement) for statement in ["pass", PEER, *STATEMENTS]}
    times = take_turns(runs, rounds=rounds, device=torch.device("cpu"))
    middle = {name: sorted(taken)[len(taken) // 2] for name, taken in times.items()}
    rows = [
        {
            "statement": name,
            "seconds": middle[name] - middle["pass"],
            "more than torch": middle[name] - middle[PEER],
            **ratio(times, PEER, name),
        }
        for name in STATEMENTS
    ]
    write(
        out,
        "seconds to import, a bare interpreter subtracted, against import torch",
        environment("cpu"),
        rows,
        torch_seconds=round(middle[PEER] - middle["pass"], 3),
        rounds=rounds,
        note="ratio: whole process of import torch over whole process of the statement, median of each round's own",
    )


if __name__ == "__main__":
    typer.run(main)
