"""What every test has: the markers' meaning, one thread a worker, hypothesis without a clock."""

from __future__ import annotations

import os
import shutil
import signal

import pytest
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:
    # Set before torch is imported. Two workers with a thread for each core are slower than with one each.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if shutil.which("nvidia-smi") is None:
    # Set before a kernel is imported: without a GPU Triton's interpreter runs it.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell without job control lets what it starts in the background ignore Ctrl-C, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A slow machine is no counterexample; a failure prints the line that replays it.
settings.register_profile("llm-atlas", deadline=None, print_blob=True)
settings.load_profile("llm-atlas")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not any("gpu" in item.keywords for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
