"""Run a command under a wall-clock limit: python tools/limit.py SECONDS COMMAND...

What coreutils' timeout does, on every machine that has a Python (macOS has no timeout). The command gets a
process group of its own, so that kernels and browsers it started end with it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

TIMED_OUT = 124  # as timeout(1) has it
GRACE = 10.0  # seconds between the polite signal and the other one


def run(command: list[str], seconds: float, *, grace: float = GRACE, cwd: str | None = None) -> int:
    """The exit status of `command`, or 124 if it was still running after `seconds` and was ended."""
    if seconds <= 0:
        raise ValueError(f"the limit must be positive, got {seconds} seconds")
    process = subprocess.Popen(command, start_new_session=True, cwd=cwd)
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        print(f"limit: {' '.join(command)} ran past {seconds:g} s and was ended", file=sys.stderr, flush=True)
        return TIMED_OUT
    finally:
        # Also after Ctrl-C, and after a normal end: a child that outlives its parent holds memory and ports.
        _end_group(process, grace)


def _end_group(process: subprocess.Popen[bytes], grace: float) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except (ProcessLookupError, PermissionError):  # macOS answers EPERM for a group of zombies
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=grace)


def main(arguments: list[str]) -> int:
    try:
        seconds, command = float(arguments[0]), arguments[1:]
        if not command:
            raise IndexError
    except (IndexError, ValueError):
        print("usage: python tools/limit.py SECONDS COMMAND...", file=sys.stderr)
        return 2
    return run(command, seconds)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
