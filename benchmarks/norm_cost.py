"""What RMSNorm saves over LayerNorm: the norm alone, readable and fused, and inside a whole model.

python benchmarks/norm_cost.py --rounds 15
python benchmarks/norm_cost.py --device cuda --out assets/results/norm-cost-cuda.json
"""

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from _common import RESULTS, environment, ratio, take_turns, write
from torch import Tensor, nn
from torch.nn import functional

from llm_atlas.core.device import pick_device
from llm_atlas.core.seeds import generator
from llm_atlas.models.decoder import Decoder, DecoderConfig
from llm_atlas.nn.norm import LayerNorm, RMSNorm, layer_norm, rms_norm
from llm_atlas.recipes import initialize

SHAPES = ((4096, 576), (1, 576), (4096, 4096), (512, 576))
FORMS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "readable": {
        "layer": lambda x, weight, bias: layer_norm(x, weight, bias, 1e-5),
        "rms": lambda x, weight, bias: rms_norm(x, weight, 1e-5),
    },
    "fused": {
        "layer": lambda x, weight, bias: functional.layer_norm(x, weight.shape, weight, bias, 1e-5),
        "rms": lambda x, weight, bias: functional.rms_norm(x, weight.shape, weight, 1e-5),
    },
}
SMOLLM2 = {
    "vocab": 49152, "dim": 576, "layers": 30, "heads": 9, "kv_heads": 3, "hidden": 1536, "context": 2048,
}  # fmt: skip


def main(
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:0 or mps; unset: the best there is")] = "",
    dtype: Annotated[list[str], typer.Option(help="may be given more than once")] = ["float32", "bfloat16"],  # noqa: B006
    tokens: Annotated[int, typer.Option(min=1, help="that the whole model reads")] = 512,
    rounds: Annotated[int, typer.Option(min=1)] = 15,
    model_rounds: Annotated[int, typer.Option(min=1)] = 7,
    threads: Annotated[int, typer.Option(min=0, help="of the CPU; 0 leaves PyTorch's choice")] = 0,
    out: Annotated[Path, typer.Option(help="where the JSON goes")] = RESULTS / "norm-cost.json",
) -> None:
    """RMSNorm's time against LayerNorm's, in turns, and the share that all its norms have of a whole model's time."""
    where = pick_device(device or None)
    if threads:
        torch.set_num_threads(threads)
    rows = []
    for name in dtype:
        kind = getattr(torch, name)
        for shape in SHAPES:
            for form in FORMS:
                for backward in (False, True):
                    rows.append(alone(shape, form, backward, kind, where, rounds=rounds))
        rows.append(whole(tokens, kind, where, rounds=model_rounds))
    write(
        out,
        "How much less time does RMSNorm take than LayerNorm: alone, and in a model of SmolLM2's shape?",
        environment(where),
        rows,
        rounds=rounds,
        model_rounds=model_rounds,
        model=SMOLLM2,
        note=(
            "ratio: LayerNorm's time over RMSNorm's, the median of each round's own, above 1 where RMSNorm is faster;"
            " saved: the percent of LayerNorm's time that RMSNorm saves, from the same median; share: the time of"
            " the model's 61 norms, called one after the other, as a percent of its forward pass, median over rounds"
        ),
    )


def alone(
    shape: tuple[int, int], form: str, backward: bool, dtype: torch.dtype, where: torch.device, *, rounds: int
) -> dict[str, object]:
    """One row: both norms on `shape` (tokens, features)."""
    rng = generator(0)
    x = torch.randn(shape, generator=rng).to(where, dtype).requires_grad_(backward)
    grad = torch.randn(shape, generator=rng).to(where, dtype)
    scale, shift = (torch.ones(shape[1], device=where, dtype=dtype, requires_grad=backward) for _ in range(2))
    # Small work is repeated within a turn: the clock's own cost must not count.
    repeats = max(1, 2_000_000 // (shape[0] * shape[1]))
    if shape[0] == 1:
        repeats = 300

    def run(norm: Callable[..., Tensor], leaves: list[Tensor]) -> None:
        for _ in range(repeats):
            if backward:
                torch.autograd.grad(norm(x, scale, shift), leaves, grad)
            else:
                with torch.no_grad():
                    norm(x, scale, shift)

    leaves = {"layer": [x, scale, shift], "rms": [x, scale]}
    runs = {name: partial(run, norm, leaves[name]) for name, norm in FORMS[form].items()}
    times = take_turns(runs, rounds=rounds, device=where)
    return row(
        times,
        repeats,
        what="norm",
        form=form,
        dtype=dtype,
        tokens=shape[0],
        features=shape[1],
        backward=backward,
    )


def whole(tokens: int, dtype: torch.dtype, where: torch.device, *, rounds: int) -> dict[str, object]:
    """One row: a decoder of SmolLM2's shape with either norm reads `tokens` tokens; and its 61 norms by themselves."""
    ids = torch.randint(SMOLLM2["vocab"], (1, tokens), generator=generator(0)).to(where)
    x = torch.randn(1, tokens, SMOLLM2["dim"], generator=generator(0)).to(where, dtype)

    @torch.inference_mode()
    def read(model: Decoder) -> None:
        model.hidden(ids)

    @torch.inference_mode()
    def norm_all(norms: list[nn.Module]) -> None:
        for norm in norms:
            norm(x)

    runs = {}
    for name in ("layer", "rms"):
        model = make_model(name, dtype, where)
        norms = [module for module in model.modules() if isinstance(module, LayerNorm | RMSNorm)]
        runs |= {name: partial(read, model), f"{name} norms": partial(norm_all, norms)}
    times = take_turns(runs, rounds=rounds, device=where)
    shares = {
        f"{name} share": 100
        * statistics.median(n / all_ for n, all_ in zip(times[f"{name} norms"], times[name], strict=True))
        for name in ("layer", "rms")
    }
    sizes = {"tokens": tokens, "features": SMOLLM2["dim"]}
    return row(times, 1, what="model", form="fused", dtype=dtype, backward=False, **sizes) | shares


def make_model(norm: str, dtype: torch.dtype, where: torch.device) -> Decoder:
    """A decoder of SmolLM2's shape with drawn weights, the same for both norms."""
    model = Decoder(DecoderConfig(**SMOLLM2, norm=norm))
    initialize(model, generator(0))
    return model.to(where, dtype).eval().requires_grad_(False)


def row(times: dict[str, list[float]], repeats: int, **what: object) -> dict[str, object]:
    """What was measured beside its result; milliseconds of one call. All rows have the same columns."""
    each = ratio(times, "layer", "rms")
    middle = {name: 1e3 * statistics.median(taken) / repeats for name, taken in times.items()}
    return {
        **what,
        "dtype": str(what["dtype"]).removeprefix("torch."),
        "layer ms": middle["layer"],
        "rms ms": middle["rms"],
        **each,
        "saved": 100 * (1 - 1 / each["ratio"]),
        "layer share": None,
        "rms share": None,
    }


if __name__ == "__main__":
    typer.run(main)
