import pytest
import torch

from llm_atlas.core.device import default_dtype, pick_device, synchronize


@pytest.fixture
def machine(monkeypatch):
    """A machine with the accelerators asked for."""

    def pretend(cuda: int = 0, mps: bool = False, bf16: bool = True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


def test_order(machine):
    machine()
    assert pick_device() == torch.device("cpu")
    machine(mps=True)
    assert pick_device() == torch.device("mps")
    machine(cuda=1, mps=True)
    assert pick_device() == torch.device("cuda")
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device(torch.device("meta")) == torch.device("meta")


def test_what_is_not_there(machine):
    machine()
    with pytest.raises(ValueError, match="'cuda' is not available here; this machine has: cpu"):
        pick_device("cuda")
    with pytest.raises(ValueError, match="'tpu' is not a device"):
        pick_device("tpu")
    machine(cuda=2)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="'cuda:2' is not available here; CUDA devices: 2"):
        pick_device("cuda:2")


def test_dtypes(machine):
    machine(cuda=1)
    assert default_dtype("cuda") == torch.bfloat16
    machine(cuda=1, bf16=False)
    assert default_dtype(torch.device("cuda", 0)) == torch.float16
    assert default_dtype("mps") == torch.float16
    assert default_dtype("cpu") == default_dtype("meta") == torch.float32


def test_synchronize(monkeypatch):
    called = []
    monkeypatch.setattr(torch.cuda, "synchronize", called.append)
    monkeypatch.setattr(torch.mps, "synchronize", lambda: called.append("mps"))
    for device in ("cpu", "mps", "cuda:1"):
        synchronize(device)
    assert called == ["mps", "cuda:1"]


@pytest.mark.gpu
def test_on_a_gpu():
    device = pick_device()
    assert device.type == "cuda"
    x = torch.ones(2, device=device, dtype=default_dtype(device))
    synchronize(device)
    assert x.sum() == 2
