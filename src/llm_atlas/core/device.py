"""Which device to compute on, and in which number format."""

import torch


def _available(kind: str) -> bool:
    if kind == "cuda":
        return torch.cuda.is_available()
    if kind == "mps":
        return torch.backends.mps.is_available()
    return kind in ("cpu", "meta")


def pick_device(prefer: torch.device | str | None = None) -> torch.device:
    """The device to use: `prefer` if it is given and there, else CUDA, else Apple's MPS, else the CPU.

    Errors: ValueError for a name that is no device, for one this machine lacks, and for an index past the
    last GPU.
    """
    if prefer is None:
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if _available(kind)))
    try:
        device = torch.device(prefer)
    except RuntimeError:
        raise ValueError(f"device {prefer!r} is not a device; use cpu, cuda, cuda:0, mps or meta") from None
    if not _available(device.type):
        usable = ", ".join(kind for kind in ("cuda", "mps", "cpu") if _available(kind))
        raise ValueError(f"device {str(device)!r} is not available here; this machine has: {usable}")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(
            f"device {str(device)!r} is not available here; CUDA devices: {torch.cuda.device_count()}"
        )
    return device


def default_dtype(device: torch.device | str) -> torch.dtype:
    """The number format to run a model in on `device`.

    | device | dtype | why |
    |---|---|---|
    | cuda with native bfloat16 (since Ampere) | bfloat16 | half the bytes of float32, its full range |
    | older cuda, mps | float16 | half the bytes; bfloat16 would be emulated or slow |
    | cpu, meta | float32 | most CPUs have no fast 16-bit arithmetic, and it is the reference |
    """
    kind = torch.device(device).type
    if kind == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    return torch.float16 if kind == "mps" else torch.float32


def synchronize(device: torch.device | str) -> None:
    """Wait until `device` has done what was asked of it; call before reading a clock. The CPU never lags."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()
