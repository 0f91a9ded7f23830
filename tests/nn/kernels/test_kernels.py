"""The Triton twins against the readable forms: in Triton's interpreter on a CPU, compiled on a GPU.

Without a GPU they are compiled for one all the same, down to its machine code, in a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llm_atlas.core.device import pick_device
from llm_atlas.core.seeds import generator
from llm_atlas.nn import activations, norm
from llm_atlas.nn.kernels import _triton
from llm_atlas.nn.kernels.rms_norm import rms_norm
from llm_atlas.nn.kernels.swiglu import swiglu

triton = pytest.importorskip("triton")

DEVICE = pick_device() if torch.cuda.is_available() else torch.device("cpu")
SHAPES = [(1, 1), (3, 5), (7, 576), (300, 33), (2, 3, 64), (0, 4), (64,)]


def draw(*shape, seed=0, dtype=torch.float32):
    x = torch.randn(*shape, generator=generator(seed)).to(DEVICE, dtype)
    return x.requires_grad_()


def agree(ours, theirs, inputs, **tolerance):
    """Outputs, and the gradients of a random linear function of them."""
    torch.testing.assert_close(ours, theirs, **tolerance)
    ahead = torch.randn(*theirs.shape, generator=generator(9)).to(theirs)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, ahead), torch.autograd.grad(theirs, inputs, ahead), strict=True
    ):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_is_its_readable_form(shape, weighted):
    x = draw(*shape)
    weight = draw(shape[-1], seed=1) if weighted else None
    inputs = (x, weight) if weighted else (x,)
    agree(rms_norm(x, weight, 1e-5), norm.rms_norm(x, weight, 1e-5), inputs, rtol=1e-5, atol=1e-5)


def test_rms_norm_of_zeros_and_of_very_large_rows():
    x = torch.stack([torch.zeros(8), torch.full((8,), 1e18), torch.full((8,), 1e-18)]).to(DEVICE)
    x.requires_grad_()
    agree(rms_norm(x), norm.rms_norm(x), (x,))
    assert torch.equal(rms_norm(x)[0], torch.zeros(8, device=DEVICE))


def test_rms_norm_takes_what_lies_in_another_order():
    x = draw(5, 2, 7).transpose(0, 1)
    x = x.detach().requires_grad_()
    assert not x.is_contiguous()
    agree(rms_norm(x), norm.rms_norm(x), (x,))


@pytest.mark.parametrize("shape", [*SHAPES, (3, 700), (1024,), (1025,)])
def test_swiglu_is_its_readable_form(shape):
    gate, up = draw(*shape), draw(*shape, seed=1)
    agree(swiglu(gate, up), activations.swiglu(gate, up), (gate, up), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # NumPy's, in the interpreter
def test_swiglu_far_out():
    gate = torch.tensor([-1e4, -90.0, -0.0, 0.0, 90.0, 1e4], device=DEVICE, requires_grad=True)
    up = torch.full((6,), 2.0, device=DEVICE, requires_grad=True)
    agree(swiglu(gate, up), activations.swiglu(gate, up), (gate, up))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    # Not in the interpreter, whose bfloat16 is wrong.
    x, weight = draw(300, 576, dtype=dtype), draw(576, seed=1, dtype=dtype)
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 5e-3}[dtype]
    agree(rms_norm(x, weight), norm.rms_norm(x, weight), (x, weight), rtol=tolerance, atol=20 * tolerance)
    up = draw(300, 576, seed=2, dtype=dtype)
    exact = activations.swiglu(x, up)
    agree(swiglu(x, up), exact, (x, up), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: rms_norm(draw(2, 4), draw(3)), ValueError, r"weight has shape \(3,\), .* 4 features"),
        (lambda: rms_norm(draw(2, 4, dtype=torch.float64)), TypeError, "got torch.float64"),
        (lambda: rms_norm(draw(1, 20_000)), ValueError, "rows of 20000 torch.float32 are over 65536 bytes"),
        (lambda: swiglu(draw(2, 4), draw(2, 3)), ValueError, r"gate is \(2, 4\) .* they must be alike"),
        (lambda: swiglu(draw(2), draw(2, dtype=torch.float16)), ValueError, "they must be alike"),
    ],
)
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_without_triton_the_call_says_what_to_install(monkeypatch):
    monkeypatch.setattr(_triton, "triton", None)
    with pytest.raises(ImportError, match=r'pip install "llm-atlas\[triton\]"'):
        swiglu(draw(2), draw(2))
    assert _triton.jit(agree) is agree
    assert _triton.jit(do_not_specialize=[])(agree) is agree


APART = """
import sys, warnings
warnings.simplefilter("ignore")
sys.modules.update(dict.fromkeys(sys.argv[2:]))  # None: as if it were not installed
import torch
from llm_atlas.nn.kernels.flash import flash_attention
from llm_atlas.nn.kernels.rms_norm import rms_norm
from llm_atlas.nn.kernels.swiglu import swiglu
for call in (lambda x: rms_norm(x), lambda x: swiglu(x, x), lambda x: flash_attention(x, x, x)):
    try:
        call(torch.ones(2, 3))
    except (ImportError, ValueError) as error:
        assert type(error).__name__ == sys.argv[1], error
        print(error)
"""


@pytest.mark.parametrize(
    ("kind", "hidden", "says"),
    [
        ("ImportError", ["triton"], "needs Triton"),
        ("ValueError", [], "runs on a GPU, got tensors on the CPU"),
    ],
)
def test_they_can_be_imported_where_they_cannot_run(kind, hidden, says):
    out = apart("-c", APART, kind, *hidden)
    assert out.count(says) == 3


def test_they_compile_to_machine_code_for_real_gpus(tmp_path):
    out = apart(str(Path(__file__).with_name("compile_for_gpu.py")), TRITON_CACHE_DIR=str(tmp_path))
    assert out.split("\n")[-2] == "54 kernels"


def apart(*command, **environment):
    """What a fresh Python without the interpreter prints."""
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
