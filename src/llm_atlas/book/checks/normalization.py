"""The exercises of chapter 17, normalization techniques.

Every reference is written here in plain torch; nothing is imported from the layers that the chapter teaches.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llm_atlas.book.checks import Trial, checker


def _rms_norm(x: Tensor, gamma: Tensor, eps: float, *, axis: int = -1) -> Tensor:
    return x / (x.square().mean(axis, keepdim=True) + eps).sqrt() * gamma


def _flat_statistic(x: Tensor, gamma: Tensor, eps: float) -> Tensor:
    """Without keepdim: with as many tokens as features it runs, and divides the features by the tokens' sizes."""
    return x / (x.square().mean(-1) + eps).sqrt() * gamma


@checker(
    "rmsnorm",
    asks="Write rms_norm(x, gamma, eps): x (tokens, dim); each token over the root of (the mean of its squared "
    "features + eps), times gamma, which is (dim,).",
    praise="The mean of the squares, eps under the root, a gain a feature, and zeros stay zeros.",
)
def grade_rmsnorm(trial: Trial) -> None:
    for tokens, dim in [(1, 2), (2, 2), (1, 3), (2, 4), (3, 3), (5, 8)]:
        # a large eps makes its place visible
        for eps in (0.5, 1e-5):
            x, gamma = trial.normal(tokens, dim), trial.normal(dim)
            # neither zeros nor a mean of zero by chance, and gains that no slip can hide behind
            x[0, :2] = torch.tensor([1.0, 2.5]) * trial.integer(1, 4)
            gamma[:2] = torch.tensor([0.6, 1.7])
            inputs = {"x": x, "gamma": gamma, "eps": eps}
            args = (x, gamma, eps)
            centred = x - x.mean(-1, keepdim=True)
            rms = x.square().mean(-1, keepdim=True).sqrt()
            trial.compare(
                trial.ask(**inputs),
                _rms_norm(*args),
                inputs,
                hints=[
                    (
                        "the mean was subtracted: this is LayerNorm; RMSNorm leaves the mean in",
                        lambda c=centred, a=args: (
                            c / (c.square().mean(-1, keepdim=True) + a[2]).sqrt() * a[1]
                        ),
                    ),
                    (
                        "the spread around the mean was used; RMSNorm takes the mean of the squares themselves",
                        lambda c=centred, a=args: (
                            a[0] / (c.square().mean(-1, keepdim=True) + a[2]).sqrt() * a[1]
                        ),
                    ),
                    (
                        "the squares were added up, not averaged: that divides by the vector's length",
                        lambda a=args: a[0] / (a[0].square().sum(-1, keepdim=True) + a[2]).sqrt() * a[1],
                    ),
                    (
                        "it divides by the vector's length: that is the root of the sum, not of the mean",
                        lambda a=args: a[0] / a[0].norm(dim=-1, keepdim=True) * a[1],
                    ),
                    (
                        "eps is added outside the root; it belongs under it, beside the mean of the squares",
                        lambda a=args, r=rms: a[0] / (r + a[2]) * a[1],
                    ),
                    ("eps is not used", lambda a=args: _rms_norm(*a[:2], 0.0)),
                    (
                        "it divides by the mean of the squares, not by its root",
                        lambda a=args: a[0] / (a[0].square().mean(-1, keepdim=True) + a[2]) * a[1],
                    ),
                    (
                        "the statistics run over the tokens; each token is normalised over its own features",
                        lambda a=args: _rms_norm(*a, axis=0),
                    ),
                    (
                        "one mean was taken over all tokens; each token has its own",
                        lambda a=args: a[0] / (a[0].square().mean() + a[2]).sqrt() * a[1],
                    ),
                    *(
                        [
                            (
                                "keepdim=True is missing: sizes of tokens were lined up with the features",
                                lambda a=args: _flat_statistic(*a),
                            )
                        ]
                        if tokens == dim
                        else []
                    ),
                    ("gamma is missing", lambda a=args: _rms_norm(a[0], torch.ones_like(a[1]), a[2])),
                    (
                        "gamma is added; it is a gain, one factor a feature",
                        lambda a=args: _rms_norm(a[0], torch.ones_like(a[1]), a[2]) + a[1],
                    ),
                ],
            )
    # a token of zeros has no size: only eps keeps the division finite
    x, gamma = torch.zeros(1, 2), trial.normal(2)
    inputs = {"x": x, "gamma": gamma, "eps": 1e-5}
    trial.compare(trial.ask(**inputs), torch.zeros(1, 2), inputs)


def _backward(
    grad: Tensor, x: Tensor, gamma: Tensor, eps: float, *, mean: bool = True, scale: bool = True
) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    normed, g = centred / deviation, grad * gamma
    out = g
    if mean:
        out = out - g.mean(-1, keepdim=True)
    if scale:
        out = out - normed * (g * normed).mean(-1, keepdim=True)
    return out / deviation


@checker(
    "layernorm",
    asks="Write backward(grad, x, gamma, eps): grad and x (tokens, dim). grad is the gradient of the loss at the "
    "output of layer norm, gamma * (x - mean) / sqrt(variance + eps) + beta; return its gradient at x.",
    praise="Gain first, then both projections, then the division: nothing is left along the mean or the scale.",
)
def grade_layernorm(trial: Trial) -> None:
    for tokens, dim in [(1, 3), (3, 3), (2, 3), (1, 4), (3, 5), (4, 8)]:
        for eps in (0.5, 1e-5):
            grad, x, gamma = trial.normal(tokens, dim), trial.normal(tokens, dim), trial.normal(dim)
            # a spread that is never near zero, so that no gradient is made of rounding
            x[:, :3] = torch.tensor([1.0, -0.5, 0.8]) * trial.integer(1, 4)
            grad[:, :3] += torch.tensor([0.5, 2.0, -1.0])
            gamma[:3] = torch.tensor([0.6, 1.7, -1.2])
            inputs = {"grad": grad, "x": x, "gamma": gamma, "eps": eps}
            args = (grad, x, gamma, eps)
            ones = torch.ones_like(gamma)
            deviation = (x.var(-1, correction=0, keepdim=True) + eps).sqrt()

            def rms_only(a=args) -> Tensor:
                root = (a[1].square().mean(-1, keepdim=True) + a[3]).sqrt()
                normed, g = a[1] / root, a[0] * a[2]
                return (g - normed * (g * normed).mean(-1, keepdim=True)) / root

            def summed(a=args, d=deviation) -> Tensor:
                normed, g = (a[1] - a[1].mean(-1, keepdim=True)) / d, a[0] * a[2]
                return (g - g.sum(-1, keepdim=True) - normed * (g * normed).sum(-1, keepdim=True)) / d

            def second_summed(a=args, d=deviation) -> Tensor:
                normed, g = (a[1] - a[1].mean(-1, keepdim=True)) / d, a[0] * a[2]
                return (g - g.mean(-1, keepdim=True) - normed * (g * normed).sum(-1, keepdim=True)) / d

            def x_for_normed(a=args, d=deviation) -> Tensor:
                g = a[0] * a[2]
                return (g - g.mean(-1, keepdim=True) - a[1] * (g * a[1]).mean(-1, keepdim=True)) / d

            def centred_for_normed(a=args, d=deviation) -> Tensor:
                centred, g = a[1] - a[1].mean(-1, keepdim=True), a[0] * a[2]
                return (g - g.mean(-1, keepdim=True) - centred * (g * centred).mean(-1, keepdim=True)) / d

            def all_tokens(a=args) -> Tensor:
                centred, g = a[1] - a[1].mean(), a[0] * a[2]
                d = (centred.square().mean() + a[3]).sqrt()
                return (g - g.mean() - centred / d * (g * centred / d).mean()) / d

            def one_less(a=args) -> Tensor:
                d = (a[1].var(-1, keepdim=True) + a[3]).sqrt()
                normed, g = (a[1] - a[1].mean(-1, keepdim=True)) / d, a[0] * a[2]
                return (g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True)) / d

            def flat(a=args) -> Tensor:
                centred, g = a[1] - a[1].mean(-1), a[0] * a[2]
                d = (centred.square().mean(-1) + a[3]).sqrt()
                return (g - g.mean(-1) - centred / d * (g * centred / d).mean(-1)) / d

            several = [("the means run over all tokens; each token has its own", all_tokens)]
            if tokens == dim:  # elsewhere it stops
                several.append(
                    ("keepdim=True is missing: the means of tokens were lined up with the features", flat)
                )

            trial.compare(
                trial.ask(**inputs),
                _backward(*args),
                inputs,
                hints=[
                    (
                        "the statistics were held fixed: they depend on x too, and that gives the two projections",
                        lambda a=args: _backward(*a, mean=False, scale=False),
                    ),
                    (
                        "the part along the mean direction is still there: take mean(g) off",
                        lambda a=args: _backward(*a, mean=False),
                    ),
                    (
                        "the part along the normalised token is still there: take x_hat * mean(g * x_hat) off",
                        lambda a=args: _backward(*a, scale=False),
                    ),
                    ("this is the backward of RMSNorm: the mean is part of layer norm", rms_only),
                    (
                        "gamma is missing: the gradient passes through the gain first",
                        lambda a=args, ones=ones: _backward(a[0], a[1], ones, a[3]),
                    ),
                    (
                        "gamma is applied last; it must come before the projections",
                        lambda a=args, ones=ones: _backward(a[0], a[1], ones, a[3]) * a[2],
                    ),
                    (
                        "the division by the standard deviation is missing: small tokens get large gradients",
                        lambda a=args, d=deviation: _backward(*a) * d,
                    ),
                    (
                        "it multiplies by the standard deviation where it should divide",
                        lambda a=args, d=deviation: _backward(*a) * d.square(),
                    ),
                    ("the projections add up over the features; they are means", summed),
                    ("the second projection adds up over the features; it is a mean too", second_summed),
                    (
                        "x stands where x_hat belongs: the second projection is along the normalised token",
                        x_for_normed,
                    ),
                    (
                        "x - mean stands where x_hat belongs: divide it by the standard deviation as well",
                        centred_for_normed,
                    ),
                    ("the variance divides by n - 1; layer norm's divides by n", one_less),
                    *several,
                    ("eps is not used", lambda a=args: _backward(*a[:3], 0.0)),
                ],
                rtol=1e-3,
                atol=1e-4,
            )


def _unit(x: Tensor) -> Tensor:
    return x / x.square().mean().sqrt()


def _layer_unit(x: Tensor) -> Tensor:
    return _unit(x - x.mean())


def _stack(
    x: Tensor, weights: Tensor, placement: str, *, skip: bool = True, unit: Callable[[Tensor], Tensor] = _unit
) -> Tensor:
    for w in weights:
        keep = x if skip else 0
        if placement == "pre":
            x = keep + (w @ unit(x)).tanh()
        elif placement == "post":
            x = unit(keep + (w @ x).tanh())
        elif placement == "sandwich":
            x = keep + unit((w @ unit(x)).tanh())
        elif placement == "branch end":
            x = keep + unit((w @ x).tanh())
        elif placement == "both":
            x = unit(keep + (w @ unit(x)).tanh())
        elif placement == "linear":
            x = keep + w @ unit(x)
        elif placement == "pre, skip too":
            x = unit(x) + (w @ unit(x)).tanh()
        elif placement == "sandwich, skip too":
            x = unit(x) + unit((w @ unit(x)).tanh())
    return x


@checker(
    "pre-post-ln",
    asks="Write stack(x, weights, placement): x is (dim,), weights (layers, dim, dim). Sublayer i is "
    "f(x) = tanh(weights[i] @ x), the norm n(x) = x / sqrt(mean(x**2)). placement is 'pre': x + f(n(x)), "
    "'post': n(x + f(x)), or 'sandwich': x + n(f(n(x))).",
    praise="The norm on the branch, on the sum, or on both ends of the branch; the skip path is clean in all but post.",
)
def grade_pre_post_ln(trial: Trial) -> None:
    for layers, dim in [(1, 2), (2, 2), (1, 3), (3, 4), (5, 6)]:
        for placement in ("pre", "post", "sandwich"):
            x, weights = trial.normal(dim), trial.normal(layers, dim, dim)
            x[:2] = torch.tensor([2.0, -1.5]) * trial.integer(1, 3)  # never of size one, never near zero
            weights[:, 0, :2] = torch.tensor([1.2, 0.7])
            inputs = {"x": x, "weights": weights, "placement": placement}
            args = (x, weights)
            slips = {
                "pre, skip too": "the skip path was normalised too: it carries x as it is",
                "sandwich, skip too": "the skip path was normalised too: it carries x as it is",
                "post": "this is post-norm: there the sum is normalised",
                "pre": "this is pre-norm: one norm, at the entrance of the branch",
                "sandwich": "this is the sandwich: a norm at both ends of the branch",
            }
            if placement == "pre":
                slips["linear"] = "the tanh of the sublayer is missing"
            if placement == "post":
                slips["branch end"] = "only the branch was normalised: post-norm normalises the sum"
            if placement == "sandwich":
                slips["branch end"] = (
                    "the branch is normalised at its end alone; its entrance needs a norm too"
                )
                slips["both"] = (
                    "the sum is normalised, not the end of the branch: the sandwich leaves the sum alone"
                )
            trial.compare(
                trial.ask(**inputs),
                _stack(*args, placement),
                inputs,
                hints=[
                    *(
                        (hint, lambda a=args, p=other: _stack(*a, p))
                        for other, hint in slips.items()
                        if other != placement
                    ),
                    (
                        "only the first layer was applied",
                        lambda a=args, p=placement: _stack(a[0], a[1][:1], p),
                    ),
                    (
                        "only the last layer was applied: each reads what the one before returned",
                        lambda a=args, p=placement: _stack(a[0], a[1][-1:], p),
                    ),
                    (
                        "the mean was taken off: this norm only divides by the root mean square",
                        lambda a=args, p=placement: _stack(*a, p, unit=_layer_unit),
                    ),
                    (
                        "the residual sum is missing",
                        lambda a=args, p=placement: _stack(*a, p, skip=False),
                    ),
                    (
                        "the order is reversed: the first layer comes first",
                        lambda a=args, p=placement: _stack(a[0], a[1].flip(0), p),
                    ),
                    (
                        "one norm too many at the end: the last layer's result is returned as it is",
                        lambda a=args, p=placement: _unit(_stack(*a, p)),
                    ),
                    (
                        "the matrices were used transposed; here it is W @ x",
                        lambda a=args, p=placement: _stack(a[0], a[1].mT, p),
                    ),
                ],
                rtol=1e-3,
                atol=1e-4,
            )


def _differ(a: Any, b: Any) -> bool:
    return (
        isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and not torch.allclose(a.double(), b.double(), equal_nan=True)
    )


def _dropped(x: Tensor, u: Tensor, p: float, factor: float) -> Tensor:
    return torch.where(u < p, torch.zeros_like(x), x * factor)


@checker(
    "dropout",
    asks="Write dropout(x, u, p, training): u has the shape of x and holds uniform numbers in [0, 1); drop the "
    "features where u < p, and rescale the others so that the mean over many u is x. Without training, x.",
    praise="Dropped with probability p, the rest divided by 1 - p, and nothing at all in evaluation.",
)
def grade_dropout(trial: Trial) -> None:
    for shape in [(2,), (3,), (2, 3), (4, 5)]:
        for p in (0.3, 0.5, 0.1, 0.0):
            for training in (True, False):
                x = trial.normal(*shape)
                x = torch.where(x == 0, 0.7, x)  # a zero would hide the mask
                u = (torch.rand(shape, generator=trial.generator) * 100).floor() / 100
                # one of each, so that a mask the wrong way round is seen; both off the edge
                u.view(-1)[:2] = torch.tensor([p / 2, p + 0.25])
                inputs = {"x": x, "u": u, "p": p, "training": training}
                wanted = _dropped(x, u, p, 1 / (1 - p)) if training else x
                hints = [
                    (
                        "what is kept was not rescaled: the mean shrinks to 1 - p",
                        lambda x=x, u=u, p=p: _dropped(x, u, p, 1.0),
                    ),
                    (
                        "it multiplies by 1 - p where it should divide",
                        lambda x=x, u=u, p=p: _dropped(x, u, p, 1 - p),
                    ),
                    (
                        "the mask is the wrong way round: u < p happens with probability p, and those are dropped",
                        lambda x=x, u=u, p=p: torch.where(u < p, x / (1 - p), torch.zeros_like(x)),
                    ),
                    ("nothing was dropped, though training is True", lambda x=x: x),
                    (
                        "everything was divided by 1 - p and nothing dropped",
                        lambda x=x, p=p: x / (1 - p),
                    ),
                ]
                if p > 0:
                    hints.append(
                        (
                            "p was read as the rate of keeping; it is the rate of dropping",
                            lambda x=x, u=u, p=p: torch.where(u < p, x / p, torch.zeros_like(x)),
                        )
                    )
                    hints.append(
                        (
                            "it divides by p, the share that is dropped",
                            lambda x=x, u=u, p=p: _dropped(x, u, p, 1 / p),
                        )
                    )
                if not training:
                    hints = [
                        (
                            "training is False: dropout must be the identity",
                            lambda x=x, u=u, p=p: _dropped(x, u, p, 1 / (1 - p)),
                        ),
                        (
                            "training is False: dropout must be the identity",
                            lambda x=x, u=u, p=p: _dropped(x, u, p, 1.0),
                        ),
                        (
                            "the evaluation was rescaled; the division while training has done that already",
                            lambda x=x, p=p: x * (1 - p),
                        ),
                    ]
                # With u given, the same call gives the same mask: several, since two masks may agree by chance.
                results = [trial.ask(**inputs) for _ in range(12 if training and p > 0 else 1)]
                for other in results[1:]:
                    if _differ(results[0], other):
                        wrong = next(r for r in results if _differ(r, wanted))
                        drawn = "the same u gave two masks: use u, draw nothing"
                        trial.compare(wrong, wanted, inputs, hints=[(drawn, lambda r=wrong: r)])
                trial.compare(results[0], wanted, inputs, hints=hints)
