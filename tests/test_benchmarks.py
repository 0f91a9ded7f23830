"""The benchmark of the norms: what it times, what a row says, and the rows that are committed."""

import importlib
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from llm_atlas.core.seeds import generator
from llm_atlas.models.decoder import Decoder, DecoderConfig
from llm_atlas.nn.norm import LayerNorm, RMSNorm
from llm_atlas.recipes import load_results

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
KEYS = [
    "what", "form", "dtype", "tokens", "features", "backward", "layer ms", "rms ms", "ratio", "ratio_min",
    "ratio_max", "saved", "layer share", "rms share", "norms saved", "layer kernels", "rms kernels",
]  # fmt: skip


@pytest.fixture
def norm_cost(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("norm_cost")


@pytest.mark.parametrize("form", ["readable", "library"])
def test_both_forms_are_the_norms_they_are_named_after(norm_cost, form):
    rng = generator(0)
    x, scale, shift = (3 * torch.randn(shape, generator=rng) + 1 for shape in ((5, 8), (8,), (8,)))
    layer, rms = (norm_cost.FORMS[form][name](x, scale, shift) for name in ("layer", "rms"))
    torch.testing.assert_close(layer, functional.layer_norm(x, (8,), scale, shift, 1e-5))
    torch.testing.assert_close(rms, functional.rms_norm(x, (8,), scale, 1e-5))


@pytest.mark.parametrize(("norm", "kind"), [("layer", LayerNorm), ("rms", RMSNorm)])
def test_a_model_of_smollm2s_shape_has_61_norms(norm_cost, norm, kind):
    with torch.device("meta"):
        model = Decoder(DecoderConfig(**norm_cost.SMOLLM2, norm=norm))
    norms = norm_cost.norms_of(model)
    assert len(norms) == 61
    assert {type(module) for module in norms} == {kind}


@pytest.mark.parametrize("backward", [False, True])
def test_the_slower_norm_is_named_as_such(norm_cost, monkeypatch, backward):
    """A LayerNorm that sleeps: were the two swapped, the ratio would be under 1."""

    def slow(x, weight, bias):
        time.sleep(1e-3)
        return functional.layer_norm(x, weight.shape, weight, bias)

    rms = norm_cost.FORMS["library"]["rms"]
    monkeypatch.setitem(norm_cost.FORMS, "library", {"layer": slow, "rms": rms})
    row = norm_cost.alone((1, 8), "library", backward, torch.float32, CPU, rounds=3)
    assert list(row) == KEYS  # the order too: it is that of the table
    assert row["ratio"] > 1.1
    assert row["saved"] == pytest.approx(100 * (1 - 1 / row["ratio"]))
    assert row["layer ms"] > row["rms ms"]
    assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
    assert (row["tokens"], row["features"], row["backward"], row["dtype"]) == (1, 8, backward, "float32")


def test_the_row_of_a_model_splits_its_time(norm_cost, monkeypatch):
    """Two blocks with norms that sleep: they take nearly all of the model's time, and LayerNorm more of it."""
    tiny = {"vocab": 16, "dim": 8, "layers": 2, "heads": 2, "kv_heads": 1, "hidden": 8, "context": 8}
    monkeypatch.setattr(norm_cost, "SMOLLM2", tiny)
    for kind, delay in ((LayerNorm, 0.02), (RMSNorm, 0.01)):

        def forward(self, x, delay=delay):
            time.sleep(delay)
            return x

        monkeypatch.setattr(kind, "forward", forward)
    row = norm_cost.whole(8, torch.float32, CPU, rounds=3)
    assert list(row) == KEYS  # the order too: it is that of the table
    assert row["what"] == "model"
    assert row["form"] == "library"
    assert 60 < row["layer share"] < 105
    assert 50 < row["rms share"] < 105
    assert 25 < row["saved"] < 65
    assert row["norms saved"] == pytest.approx(row["saved"], abs=15)
    assert isinstance(norm_cost.make_model("rms", torch.float32, CPU), nn.Module)


def test_kernels_are_counted(norm_cost):
    x = torch.ones(4, 8)
    assert norm_cost.kernels(lambda: x + 1, CPU) == 1
    assert norm_cost.kernels(lambda: (x + 1).view(8, 4) * x.view(8, 4), CPU) == 2
    assert norm_cost.kernels(lambda: functional.layer_norm(x, (8,)), CPU) == 1
    assert norm_cost.kernels(lambda: x.square().mean(-1), CPU) >= 2


def test_the_committed_rows():
    document = load_results("norm-cost")
    rows = document["rows"]
    wanted = {
        ("norm", form, dtype, *shape, backward)
        for form in ("readable", "library")
        for dtype in ("float32", "bfloat16")
        for shape in ((4096, 576), (1, 576), (4096, 4096), (512, 576))
        for backward in (False, True)
    } | {("model", "library", dtype, 512, 576, False) for dtype in ("float32", "bfloat16")}
    names = ("what", "form", "dtype", "tokens", "features", "backward")
    assert {tuple(row[name] for name in names) for row in rows} == wanted
    assert len(rows) == len(wanted)
    for row in rows:
        assert list(row) == KEYS  # the order too: it is that of the table
        assert 0 < row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
        # All are rounded to four digits.
        assert row["saved"] == pytest.approx(100 * (1 - 1 / row["ratio"]), rel=2e-3, abs=0.06)
        if row["what"] == "model":
            assert 0 < row["layer share"] < 100
            assert 0 < row["rms share"] < 100
            assert abs(row["norms saved"]) < max(row["layer share"], row["rms share"])
            assert row["layer kernels"] is row["rms kernels"] is None
        else:
            assert row["layer share"] is row["rms share"] is row["norms saved"] is None
            assert min(row["layer kernels"], row["rms kernels"]) >= 1
            if row["form"] == "readable":  # LayerNorm does all that RMSNorm does, and centres
                assert row["layer kernels"] > row["rms kernels"] > 1
