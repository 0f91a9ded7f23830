"""The one training loop."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

Loss = Callable[[nn.Module, Any], tuple[Tensor, Mapping[str, Any]]]
"""The loss seam: `loss(model, batch) -> (scalar, metrics)`; metrics are numbers or tensors of one element."""

Row = dict[str, int | float]


def fit(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    *,
    steps: int,
    lr: float | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    clip: float | None = None,
    require_finite: bool = False,
    on_step: Callable[[int, Row], None] | None = None,
    progress: bool | None = None,
) -> list[Row]:
    r"""Train `model` in place: $\theta \leftarrow \text{optimizer}(\theta, \nabla_\theta\,\text{loss})$.

    batches:        one is taken a step; an endless generator will do. On the model's device already.
    lr, optimizer:  give one of them; `lr` alone makes an AdamW with torch's defaults.
    clip:           the largest norm of the whole gradient; a longer one is shortened to it, and its norm is
                    recorded as `grad_norm` (Pascanu et al. 2013, section 3.2, arXiv 1211.5063).
    require_finite: raise FloatingPointError at the first loss that is NaN or infinite, before it reaches the
                    weights. Otherwise training goes on, so that a divergence can be recorded.
    on_step:        called after every update with the step (from 0) and its row; it may add to the row, or
                    set the optimizer's learning rate for the next step.
    progress:       a bar on or off; None shows it in a terminal only.

    Returns one row a step, plain numbers: step, loss (before the update), grad_norm if clipped, the metrics.
    The model is in training mode within, and afterwards in the mode it was in. A row reads the loss back from
    the device, so a GPU waits once a step.
    Errors: ValueError for arguments that do not fit, batches that end early and a loss that is no scalar.
    """
    if steps < 1:
        raise ValueError(f"steps {steps} must be at least 1")
    if (lr is None) == (optimizer is None):
        raise ValueError("give either lr or optimizer")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip {clip} must be positive")
    parameters = [p for p in model.parameters() if p.requires_grad]
    if optimizer is None:
        optimizer = torch.optim.AdamW(parameters, lr=lr)
    rows: list[Row] = []
    was_training = model.training
    model.train()
    source = iter(batches)
    try:
        with tqdm(total=steps, desc="train", unit="step", leave=False, disable=_hidden(progress)) as bar:
            for step in range(steps):
                try:
                    batch = next(source)
                except StopIteration:
                    raise ValueError(f"batches ended after {step} of {steps} steps") from None
                value, metrics = loss(model, batch)
                if value.numel() != 1:
                    raise ValueError(f"loss must return a scalar, got shape {tuple(value.shape)}")
                row = {"step": step, "loss": float(value.detach())}
                if require_finite and not math.isfinite(row["loss"]):
                    why = "lower the learning rate or clip the gradient"
                    raise FloatingPointError(f"loss is {row['loss']} at step {step}: {why}")
                optimizer.zero_grad(set_to_none=True)
                value.backward()
                if clip is not None:
                    row["grad_norm"] = float(nn.utils.clip_grad_norm_(parameters, clip))
                optimizer.step()
                row |= {name: float(number) for name, number in metrics.items()}
                if on_step is not None:
                    on_step(step, row)
                rows.append(row)
                bar.update()
                bar.set_postfix_str(f"loss {row['loss']:.3f}", refresh=False)
    finally:
        model.train(was_training)
    return rows


def _hidden(progress: bool | None) -> bool | None:
    return None if progress is None else not progress
