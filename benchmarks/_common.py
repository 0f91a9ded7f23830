"""What every benchmark shares: what it ran on, fair turns, a table, a JSON file."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from llm_atlas.core.device import synchronize

RESULTS = Path(__file__).resolve().parent.parent / "assets" / "results"


def processor(device: torch.device) -> str:
    """The name of what computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def environment(device: torch.device | str = "cpu", libraries: Sequence[str] = ("torch",)) -> dict[str, Any]:
    """Hardware, threads and versions, to stand beside every number."""
    return {
        "device": processor(torch.device(device)),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: version(name) for name in libraries},
    }


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def take_turns(
    runs: dict[str, Callable[[], object]], *, rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every run in every round, A B A B, after one round that does not count.

    In turns, so that what the machine does meanwhile slows all of them alike.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            taken = seconds(run, device)
            if turn:
                times[name].append(taken)
    return times


def ratio(times: dict[str, list[float]], peer: str, ours: str) -> dict[str, float]:
    """How many times as fast as the peer: the median over rounds of each round's own ratio, and its range."""
    each = [p / o for p, o in zip(times[peer], times[ours], strict=True)]
    return {"ratio": statistics.median(each), "ratio_min": min(each), "ratio_max": max(each)}


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as a table; all have the same keys."""
    text = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in text) for i in range(len(text[0]))]
    for line in text:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write(
    out: Path, question: str, where: dict[str, Any], rows: Sequence[dict[str, Any]], **more: Any
) -> None:
    """Table on the screen, JSON in the file; no dates, so that equal results are equal files."""
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    show(rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    rounded = [{k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    out.write_text(
        json.dumps({"question": question, "environment": where, **more, "rows": rounded}, indent=1) + "\n"
    )
    print(f"written to {os.path.relpath(out)}")
