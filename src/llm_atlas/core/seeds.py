"""Randomness that is passed by hand, never set for the whole process."""

import torch


def generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A random generator of its own, seeded; pass it to whatever draws.

    The same seed gives the same draws on the same kind of device and version of PyTorch, however much other
    code drew in between; CPU and CUDA give different draws for one seed.
    Errors: TypeError for a seed that is no int, ValueError for one outside [0, 2**63).
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed {seed!r} must be an int")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed {seed} must be at least 0 and below 2**63")
    return torch.Generator(device).manual_seed(seed)
