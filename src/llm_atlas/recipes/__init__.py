"""How the house models and the committed results were made, and how to make them again.

Each module is a script (`python -m llm_atlas.recipes.depth`, run where the checkout's assets/ lies) and a
function for one point of it: a chapter runs a small slice again, and a test holds the committed rows to it.
"""

import contextlib
import json
import math
import os
import platform
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from llm_atlas.core.assets import bundled
from llm_atlas.nn.linear_attention import LinearAttention
from llm_atlas.nn.moe import Experts, Router

FIELDS = ("recipe", "command", "hardware", "versions", "seeds", "settings", "rows")
"""What every file of results holds, in this order."""


def load_results(name: str) -> dict[str, Any]:
    """A committed run by name, such as "depth": the fields of `FIELDS`; `rows` is a list of flat dicts.

    A number that was not finite is None. Errors: ValueError for a name that leads out of the package's
    assets, FileNotFoundError for one that is not there.
    """
    return json.loads(bundled(f"results/{name}.json").read_text(encoding="utf-8"))


def sweep(
    path: Path,
    *,
    recipe: str,
    settings: Mapping[str, Any],
    points: Sequence[Mapping[str, Any]],
    run: Callable[..., Mapping[str, Any]],
    progress: bool | None = None,
) -> dict[str, Any]:
    """Run every point that `path` does not hold yet, write each row as it comes, return the whole document.

    A point is what `run` is called with (`seed` and what varies), a row that and what `run` returns.
    Stopped and started again, a sweep goes on where it was: the file is whole after every row.
    Errors: ValueError where `path` was made with other settings, or is no file of results.
    """
    document = _header(path, recipe, settings, points)
    done = {_key(row, points[0]): row for row in document["rows"]}
    for point in tqdm(points, desc=recipe, unit="run", disable=None if progress is None else not progress):
        if _key(point, points[0]) in done:
            continue
        row = {**point, **{name: _plain(value) for name, value in run(**point).items()}}
        done[_key(point, points[0])] = row
        document["rows"] = [done[key] for p in points if (key := _key(p, points[0])) in done]
        write_json(path, document)
    return document


def _header(
    path: Path, recipe: str, settings: Mapping[str, Any], points: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    document = {
        "recipe": recipe,
        **environment(recipe),
        "seeds": sorted({point["seed"] for point in points}),
        "settings": dict(settings),
        "rows": [],
    }
    if not path.exists():
        return document
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        rows = kept["rows"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise ValueError(f"{path}: not a file of results; delete it to start anew") from None
    # Through JSON, so that a tuple and the list it was written as are the same.
    if kept.get("recipe") != recipe or kept.get("settings") != json.loads(json.dumps(document["settings"])):
        raise ValueError(f"{path}: made by another recipe or with other settings; delete it to start anew")
    return {**document, "rows": rows}


def _key(row: Mapping[str, Any], like: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in like)


def _plain(value: Any) -> Any:
    """Numbers to six digits, None for what is not finite (JSON has no word for it); the rest as it is."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def environment(recipe: str) -> dict[str, Any]:
    """The command that makes a recipe's file, and on what it was run: hardware in words, versions."""
    machine = {"x86_64": "x86-64", "AMD64": "x86-64"}.get(platform.machine(), platform.machine())
    return {
        "command": f"python -m llm_atlas.recipes.{recipe.replace('-', '_')}",
        "hardware": f"{os.cpu_count()}-core {machine} CPU, one thread",
        "versions": {"python": platform.python_version(), "torch": metadata.version("torch")},
    }


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write `document` to `path`, whole or not at all; one line a row, so that a diff shows which changed."""
    head = {name: value for name, value in document.items() if name != "rows"}
    text = json.dumps(head, indent=1, allow_nan=False)
    if "rows" in document:
        rows = ",\n".join("  " + json.dumps(row, allow_nan=False) for row in document["rows"])
        text = text[:-2] + f',\n "rows": [\n{rows}\n ]\n}}'
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        part.write_text(text + "\n", encoding="utf-8")
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Within it, or within a function it decorates, PyTorch computes on one thread of the CPU.

    Models this small gain nothing from more, and sums come out in one order whatever the number of cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def initialize(model: nn.Module, generator: torch.Generator, *, embedding_std: float | None = None) -> None:
    r"""Draw every matrix anew with `generator`, in the order of the modules; norms keep their ones and zeros.

    Linear, experts and their router: $\mathcal N(0, 1/\text{in features})$, which keeps the size of what comes in
    (LeCun et al. 1998, section 4.6), biases 0. Embedding: standard deviation `embedding_std`, $1/\sqrt{\text{dim}}$
    unless given. Gates of linear attention begin as `LinearAttention.draw_gates` says.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(std=module.in_features**-0.5, generator=generator)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            std = module.embedding_dim**-0.5 if embedding_std is None else embedding_std
            module.weight.normal_(std=std, generator=generator)
        elif isinstance(module, (Router, Experts)):
            module.reset_parameters(generator)
    for module in model.modules():
        if isinstance(module, LinearAttention):
            module.draw_gates(generator)


def warmup_then_cosine(
    optimizer: torch.optim.Optimizer, *, steps: int, warmup: int
) -> torch.optim.lr_scheduler.LambdaLR:
    r"""The learning rate of `optimizer` times $(t + 1)/\text{warmup}$, then half a cosine from 1 to 0 at `steps`.

    Call its `step` after every update. Errors: ValueError for a warm-up below 1 or longer than `steps`.
    Loshchilov and Hutter 2016, equation 5 (arXiv 1608.03983), without restarts.
    """
    if not 1 <= warmup <= steps:
        raise ValueError(f"warmup {warmup} must be at least 1 and at most the {steps} steps")

    def share(step: int) -> float:
        done = (step - warmup) / max(1, steps - warmup)
        return (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * done))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, share)
