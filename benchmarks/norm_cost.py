"""What RMSNorm saves over LayerNorm: the norm alone, written out and from torch, and inside a whole model.

python benchmarks/norm_cost.py --rounds 15
python benchmarks/norm_cost.py --device cuda --out assets/results/norm-cost-cuda.json
"""

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from _common import RESULTS, environment, ratio, take_turns, write
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from llm_atlas.core.device import pick_device, synchronize
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
    "library": {
        "layer": lambda x, weight, bias: functional.layer_norm(x, weight.shape, weight, bias, 1e-5),
        "rms": lambda x, weight, bias: functional.rms_norm(x, weight.shape, weight, 1e-5),
    },
}
SMOLLM2 = {
    "vocab": 49152, "dim": 576, "layers": 30, "heads": 9, "kv_heads": 3, "hidden": 1536, "context": 2048,
}  # fmt: skip
BOOKKEEPING = {
    "empty", "empty_like", "empty_strided", "view", "reshape", "to", "_to_copy", "copy_", "fill_", "type_as",
    "as_strided", "result_type", "clone", "contiguous", "resolve_conj", "resolve_neg",
}  # fmt: skip
"""What moves, makes or describes a tensor, and computes nothing."""


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
            " the model's norms, called one after the other, as a percent of its forward pass, median over rounds;"
            " norms saved: the percent of the forward pass with LayerNorm that its norms alone save when they are"
            " RMSNorms, likewise; kernels: how many separate computations one forward call of the norm makes"
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
    counts = {
        f"{name} kernels": kernels(partial(norm, x, scale, shift), where)
        for name, norm in FORMS[form].items()
    }
    measured = row(
        times,
        repeats,
        what="norm",
        form=form,
        dtype=dtype,
        tokens=shape[0],
        features=shape[1],
        backward=backward,
    )
    return measured | counts


def whole(tokens: int, dtype: torch.dtype, where: torch.device, *, rounds: int) -> dict[str, object]:
    """One row: a decoder of SmolLM2's shape with either norm reads `tokens` tokens; and its norms by themselves."""
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
        runs |= {name: partial(read, model), f"{name} norms": partial(norm_all, norms_of(model))}
    times = take_turns(runs, rounds=rounds, device=where)
    shares = {f"{name} share": percent(times[f"{name} norms"], times[name]) for name in ("layer", "rms")}
    fewer = [layer - rms for layer, rms in zip(times["layer norms"], times["rms norms"], strict=True)]
    shares["norms saved"] = percent(fewer, times["layer"])
    measured = row(
        times,
        1,
        what="model",
        form="library",
        dtype=dtype,
        tokens=tokens,
        features=SMOLLM2["dim"],
        backward=False,
    )
    return measured | shares


def percent(parts: list[float], wholes: list[float]) -> float:
    """Median over rounds of a part's share of the whole."""
    return 100 * statistics.median(part / whole for part, whole in zip(parts, wholes, strict=True))


def kernels(call: Callable[[], Tensor], where: torch.device) -> int:
    """How many separate computations a call makes without gradients: launches on a CUDA device, operators elsewhere."""
    cuda = where.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch.no_grad():
        call()  # what is set up once must not count
        with profile(activities=activities, acc_events=True) as seen:
            call()
            synchronize(where)
    events = seen.events()
    if cuda:
        launched = [event.name for event in events if event.device_type == DeviceType.CUDA]
        return sum(not name.startswith(("Memcpy", "Memset")) for name in launched)
    return sum(_computes(event) for event in events if event.cpu_parent is None)


def _computes(event: Any) -> int:
    """Operators at or below a profiled one that compute, and call no other that does."""
    library, _, name = event.name.partition("::")
    if library != "aten" or name in BOOKKEEPING:
        return 0
    return sum(_computes(child) for child in event.cpu_children) or 1


def norms_of(model: Decoder) -> list[nn.Module]:
    """Every norm of a model: two a block and the last."""
    return [module for module in model.modules() if isinstance(module, LayerNorm | RMSNorm)]


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
        "norms saved": None,
        "layer kernels": None,
        "rms kernels": None,
    }


if __name__ == "__main__":
    typer.run(main)
