"""The benchmarks of norms and attention: what they time, what a row says, and the rows that are committed."""

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
from llm_atlas.nn.roofline import attainable, attention_flops, minimal_bytes
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


@pytest.fixture
def attention_roofline(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("attention_roofline")


def test_all_forms_of_attention_on_the_roofline_compute_the_same(attention_roofline):
    q, k, v = (torch.randn(1, 2, 150, 8, generator=generator(i)) for i in range(3))
    outs = [function(q, k, v) for function, _ in attention_roofline.METHODS.values()]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0])


def test_a_row_of_the_roofline(attention_roofline, monkeypatch):
    """A method that sleeps: its speed is what was counted over what it slept, and the fused one is faster."""

    def slow(q, k, v):
        time.sleep(5e-3)
        return v

    known = attention_roofline.METHODS["torch, fused"]
    monkeypatch.setattr(attention_roofline, "METHODS", {"slow": (slow, minimal_bytes), "torch, fused": known})
    slow_row, fast_row = attention_roofline.measure(16, 2, 8, CPU, rounds=3, peak=1e12, bandwidth=1e9)
    flops = attention_flops(16, 16, 8, heads=2)
    assert flops / 0.1 < slow_row["FLOP/s"] <= flops / 5e-3
    assert slow_row["ms"] >= 5
    assert fast_row["FLOP/s"] > slow_row["FLOP/s"]
    assert slow_row["intensity"] == slow_row["own intensity"] == 16 / 2 / 4 * 2 * 2 / 2
    assert fast_row["own intensity"] is None
    limit = attainable(slow_row["intensity"], 1e12, 1e9)
    assert slow_row["of limit"] == pytest.approx(slow_row["FLOP/s"] / limit)


def test_the_machine_is_measured_in_units_of_its_work(attention_roofline, monkeypatch):
    monkeypatch.setattr(attention_roofline, "seconds", lambda run, device: run() is None or 2.0)
    assert attention_roofline.matmul_peak(CPU, size=8) == 2 * 8**3 / 2.0
    assert attention_roofline.copy_bandwidth(CPU, numbers=10) == 2 * 40 / 2.0


def test_the_committed_roofline():
    document = load_results("bench-attention_roofline")
    assert document["ridge"] == pytest.approx(document["peak_flops"] / document["bandwidth"], rel=2e-3)
    assert {row["method"] for row in document["rows"]} == {
        "readable, stored scores", "flash_attention, readable", "flash_attention_2, readable", "torch, fused",
    }  # fmt: skip
    for row in document["rows"]:
        flops = attention_flops(row["length"], row["length"], document["dim"], heads=document["heads"])
        assert row["FLOP/s"] == pytest.approx(flops / row["ms"] * 1e3, rel=2e-3)
        limit = attainable(row["intensity"], document["peak_flops"], document["bandwidth"])
        assert row["of limit"] == pytest.approx(row["FLOP/s"] / limit, rel=2e-3)
        assert 0 < row["of limit"] < 1.2


@pytest.fixture
def attention_kernels(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("attention_kernels")
    monkeypatch.setattr(module, "DTYPE", torch.float32)  # the interpreter's bfloat16 is wrong
    return module


def test_without_a_gpu_the_kernels_are_not_measured(attention_kernels, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    attention_kernels.main("cuda", 1, True, tmp_path / "none.json")
    assert "needs a CUDA device" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_shapes_of_the_kernels_are_equal_work(attention_kernels):
    assert len(attention_kernels.shapes(True)) == 11
    for shape in attention_kernels.shapes(False):
        assert shape.batch * shape.tokens == 16384
        assert shape.heads * shape.dim == 2048
        assert shape.heads % shape.kv_heads == 0
        assert shape.window is None or shape.window < shape.tokens


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter runs where there is no GPU")
def test_rows_of_the_kernels(attention_kernels, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)  # needs a C++ compiler, and seconds
    common = {"batch": 1, "heads": 2, "tokens": 17, "dim": 16}
    rows = [
        *attention_kernels.attention_rows(attention_kernels.Shape(**common, kv_heads=1), CPU, 1),
        *attention_kernels.attention_rows(attention_kernels.Shape(**common, kv_heads=2, window=5), CPU, 1),
        *attention_kernels.elementwise_rows(4, 16, CPU, 1),
    ]
    assert {(row["what"], row["form"], row["backward"]) for row in rows} == {
        (what, form, backward)
        for what, peer in (
            ("attention, causal", "torch, flash"), ("attention, causal, window 5", "torch, mask"),
            ("rms_norm", "torch"), ("swiglu", "torch"),
        )
        for form in ("ours", peer, "readable", "readable, compiled")
        for backward in (False, True)
    }  # fmt: skip
    for row in rows:
        assert list(row) == list(rows[0])
        assert (row["TFLOP/s"] is None) != (row["GB/s"] is None)
        if row["form"] == "ours":
            assert row["ours is faster by"] == 1
        if row["what"] == "attention, causal":
            flops = attention_flops(17, 17, 16, heads=2, is_causal=True) * (3.5 if row["backward"] else 1)
            assert row["TFLOP/s"] == pytest.approx(flops / row["ms"] * 1e3 / 1e12)
        if row["what"] == "swiglu":
            assert row["GB/s"] == pytest.approx(4 * 16 * 4 * (8 if row["backward"] else 3) / row["ms"] / 1e6)


def test_a_form_that_computes_something_else_is_not_timed(attention_kernels):
    x = torch.ones(3)
    with pytest.raises(SystemExit, match="ours and wrong differ by 1"):
        attention_kernels.agree({"ours": lambda t: t, "wrong": lambda t: t + 1}, [x])
