"""Seconds to execute each notebook from its first cell to its last, kernel start included.

    python benchmarks/chapters.py

The peer is the budget of a chapter, 60 seconds on two cores. Nothing is written into the notebooks.
"""

import time
from pathlib import Path
from typing import Annotated

import nbformat
import torch
import typer
from _common import RESULTS, environment, write
from nbclient import NotebookClient

CHAPTERS = Path(__file__).resolve().parent.parent / "chapters"
BUDGET = 60.0


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 1,
    limit: Annotated[int, typer.Option(help="seconds that one cell may take", min=1)] = 180,
    out: Annotated[Path, typer.Option(help="where the JSON goes")] = RESULTS / "bench-chapters.json",
) -> None:
    """Seconds of every notebook in chapters/, the best of some rounds."""
    rows = []
    for path in sorted(CHAPTERS.glob("*.ipynb")):
        taken = min(execute(path, limit) for _ in range(rounds))
        rows.append({"chapter": path.stem, "seconds": taken, "share of the budget": taken / BUDGET})
    if not rows:
        raise SystemExit(f"there is no notebook in {CHAPTERS.name}/ yet")
    write(
        out, "seconds to execute each chapter", environment(torch.device("cpu")), rows,
        budget_seconds=BUDGET, rounds=rounds,
    )  # fmt: skip


def execute(path: Path, limit: int) -> float:
    """Seconds of one run in a fresh kernel."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=limit, resources={"metadata": {"path": str(path.parent)}})
    start = time.perf_counter()
    client.execute()
    return time.perf_counter() - start


if __name__ == "__main__":
    typer.run(main)
