"""The exercises of chapter 16, activation functions.

Every reference is written here in plain torch from its equation; nothing is imported from the layers that the
chapter teaches.
"""

import math

import torch
from torch import Tensor

from llm_atlas.book.checks import Trial, checker


def _sigmoid(z: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-z))


def _silu(z: Tensor) -> Tensor:
    return z * _sigmoid(z)


def _phi(z: Tensor) -> Tensor:
    """The standard normal density."""
    return torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)


def _below(z: Tensor) -> Tensor:
    """The probability that a standard normal variable lies below z."""
    return 0.5 * torch.erfc(-z / math.sqrt(2))


def _gelu(z: Tensor) -> Tensor:
    return z * _below(z)


def _gelu_slope(z: Tensor) -> Tensor:
    return _below(z) + z * _phi(z)


def _tanh_slope(z: Tensor) -> Tensor:
    a, c = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(a * (z + c * z**3))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t**2) * a * (1 + 3 * c * z**2)


@checker(
    "swiglu",
    asks="Write swiglu(x, w_gate, w_up, w_down): x (tokens, dim), w_gate and w_up (dim, hidden), w_down "
    "(hidden, dim), all used as x @ w; silu of the gate times the up projection, then down.",
    praise="The gate went through silu, the up projection did not, and their product went down.",
)
def grade_swiglu(trial: Trial) -> None:
    for tokens, dim, hidden in [(1, 1, 2), (2, 2, 2), (2, 2, 3), (3, 4, 6), (4, 6, 16)]:
        x, w_down = trial.normal(tokens, dim), trial.normal(hidden, dim)
        w_gate, w_up = trial.normal(dim, hidden), trial.normal(dim, hidden)
        if tokens == 1:
            # one gate open, one closed, neither far from zero: here silu, gelu and relu differ most
            x = torch.tensor([[1.0]])
            w_gate, w_up = torch.tensor([[1.5, -1.0]]) + 0.1 * w_gate.sign(), torch.tensor([[-2.0, 3.0]])
            w_down = torch.tensor([[1.0], [2.0]])
        inputs = {"x": x, "w_gate": w_gate, "w_up": w_up, "w_down": w_down}
        gate, up = x @ w_gate, x @ w_up
        trial.compare(
            trial.ask(**inputs),
            (_silu(gate) * up) @ w_down,
            inputs,
            hints=[
                (
                    "silu went over the up projection; it belongs on the gate",
                    lambda g=gate, u=up, d=w_down: (g * _silu(u)) @ d,
                ),
                (
                    "this is a sigmoid gate (GLU); swish is z * sigmoid(z)",
                    lambda g=gate, u=up, d=w_down: (_sigmoid(g) * u) @ d,
                ),
                (
                    "this is z * sigmoid(1.702 z), a quick GELU; swish is z * sigmoid(z)",
                    lambda g=gate, u=up, d=w_down: (g * _sigmoid(1.702 * g) * u) @ d,
                ),
                ("the gate is a GELU here: this is GeGLU", lambda g=gate, u=up, d=w_down: (_gelu(g) * u) @ d),
                (
                    "the gate is a ReLU here: this is ReGLU",
                    lambda g=gate, u=up, d=w_down: (g.clamp(min=0) * u) @ d,
                ),
                (
                    "silu went over the product; only the gate",
                    lambda g=gate, u=up, d=w_down: _silu(g * u) @ d,
                ),
                (
                    "silu is missing: without it the gate is a plain product",
                    lambda g=gate, u=up, d=w_down: (g * u) @ d,
                ),
                (
                    "silu went over both projections; the up projection stays linear",
                    lambda g=gate, u=up, d=w_down: (_silu(g) * _silu(u)) @ d,
                ),
                (
                    "gate and up were added; a gate multiplies",
                    lambda g=gate, u=up, d=w_down: (_silu(g) + u) @ d,
                ),
                (
                    "the up projection is missing: there is nothing to gate",
                    lambda g=gate, d=w_down: _silu(g) @ d,
                ),
                ("w_down is missing", lambda g=gate, u=up: _silu(g) * u),
            ],
            rtol=1e-3,
            atol=1e-4,
        )


@checker(
    "gelu",
    asks="Write slope(x): the derivative of the exact GELU, x * Phi(x), at every element of x, where Phi is "
    "the standard normal distribution function, (1 + erf(x / sqrt(2))) / 2.",
    praise="Phi(x) + x * phi(x): the gate itself, and how the gate moves with x.",
)
def grade_gelu(trial: Trial) -> None:
    grid = torch.tensor([-3.0, -1.0, 0.5, 2.0])
    for x in (torch.tensor([-1.5]), grid, 2 * trial.normal(6), trial.normal(3, 4), 4 * trial.normal(2, 3, 3)):
        inputs = {"x": x}
        trial.compare(
            trial.ask(**inputs),
            _gelu_slope(x),
            inputs,
            hints=[
                (
                    "the second term is missing: x stands in Phi(x) too, so the product rule gives two",
                    lambda x=x: _below(x),
                ),
                (
                    "the first term is missing: the derivative of x is 1, times Phi(x)",
                    lambda x=x: x * _phi(x),
                ),
                ("the factor x before phi(x) is missing", lambda x=x: _below(x) + _phi(x)),
                (
                    "phi lacks its factor 1 / sqrt(2 pi)",
                    lambda x=x: _below(x) + x * torch.exp(-0.5 * x**2),
                ),
                (
                    "the exponent of phi is -x**2 / 2, not -x**2",
                    lambda x=x: _below(x) + x * torch.exp(-(x**2)) / math.sqrt(2 * math.pi),
                ),
                (
                    "the exponent of phi is -x**2 / 2: its sign is wrong",
                    lambda x=x: _below(x) + x * torch.exp(0.5 * x**2) / math.sqrt(2 * math.pi),
                ),
                (
                    "phi is divided by sqrt(2 pi), not by 2 pi",
                    lambda x=x: _below(x) + x * torch.exp(-0.5 * x**2) / (2 * math.pi),
                ),
                (
                    "phi is divided by sqrt(2) once too often",
                    lambda x=x: _below(x) + x * _phi(x) / math.sqrt(2),
                ),
                (
                    "Phi(x) needs erf(x / sqrt(2)), not erf(x)",
                    lambda x=x: 0.5 * (1 + torch.erf(x)) + x * _phi(x),
                ),
                (
                    "this is the derivative of x * sigmoid(1.702 x); take the exact GELU",
                    lambda x=x: _sigmoid(1.702 * x) * (1 + 1.702 * x * (1 - _sigmoid(1.702 * x))),
                ),
                ("the sign of the second term is wrong", lambda x=x: _below(x) - x * _phi(x)),
                ("this is GELU itself, not its derivative", lambda x=x: _gelu(x)),
                ("this is the derivative of the tanh form; take the exact one", lambda x=x: _tanh_slope(x)),
                (
                    "this is the derivative of silu",
                    lambda x=x: _sigmoid(x) * (1 + x * (1 - _sigmoid(x))),
                ),
                ("this is the derivative of ReLU", lambda x=x: (x > 0).to(x.dtype)),
            ],
        )


@checker(
    "geglu",
    asks="Write backward(grad, gate, up): h = gelu(gate) * up, all of one shape, and grad is the loss's "
    "gradient in h. Return torch.stack([gradient in gate, gradient in up]).",
    praise="Each factor's gradient is the other factor, and the gate's has the slope of GELU besides.",
)
def grade_geglu(trial: Trial) -> None:
    two = (torch.tensor([1.0, 1.0]), torch.tensor([1.0, -1.0]), torch.tensor([3.0, 2.0]))
    cases = [
        two,
        *((trial.normal(*s), trial.normal(*s), trial.normal(*s)) for s in [(4,), (2, 3), (3, 5, 4)]),
    ]
    for grad, gate, up in cases:
        inputs = {"grad": grad, "gate": gate, "up": up}
        to_gate, to_up = grad * up * _gelu_slope(gate), grad * _gelu(gate)
        silu_slope = _sigmoid(gate) * (1 + gate * (1 - _sigmoid(gate)))
        trial.compare(
            trial.ask(**inputs),
            torch.stack([to_gate, to_up]),
            inputs,
            hints=[
                (
                    "the two are swapped: the gate's gradient comes first",
                    lambda a=to_gate, b=to_up: torch.stack([b, a]),
                ),
                (
                    "the gate's gradient lacks the slope of GELU",
                    lambda g=grad, u=up, b=to_up: torch.stack([g * u, b]),
                ),
                (
                    "the gate's gradient has GELU where its slope belongs",
                    lambda g=grad, u=up, z=gate, b=to_up: torch.stack([g * u * _gelu(z), b]),
                ),
                (
                    "the gate's gradient lacks the factor up: h is a product",
                    lambda g=grad, z=gate, b=to_up: torch.stack([g * _gelu_slope(z), b]),
                ),
                (
                    "the slope of GELU lacks its second term, x * phi(x)",
                    lambda g=grad, u=up, z=gate, b=to_up: torch.stack([g * u * _below(z), b]),
                ),
                (
                    "the slope of GELU lacks its first term, Phi(x)",
                    lambda g=grad, u=up, z=gate, b=to_up: torch.stack([g * u * z * _phi(z), b]),
                ),
                (
                    "up's gradient is grad * gelu(gate), not grad * Phi(gate)",
                    lambda g=grad, z=gate, a=to_gate: torch.stack([a, g * _below(z)]),
                ),
                (
                    "up's gradient has the slope of GELU; up is not inside GELU, so take gelu(gate) itself",
                    lambda g=grad, z=gate, a=to_gate: torch.stack([a, g * _gelu_slope(z)]),
                ),
                (
                    "grad is missing in up's gradient",
                    lambda z=gate, a=to_gate: torch.stack([a, _gelu(z)]),
                ),
                (
                    "grad is missing in the gate's gradient",
                    lambda u=up, z=gate, b=to_up: torch.stack([u * _gelu_slope(z), b]),
                ),
                (
                    "this is the backward of ReGLU; the gate here is a GELU",
                    lambda g=grad, u=up, z=gate: torch.stack([g * u * (z > 0), g * z.clamp(min=0)]),
                ),
                (
                    "up's gradient is gelu(gate), not gate, times grad",
                    lambda g=grad, z=gate, a=to_gate: torch.stack([a, g * z]),
                ),
                (
                    "grad is missing: the chain rule begins with it",
                    lambda u=up, z=gate: torch.stack([u * _gelu_slope(z), _gelu(z)]),
                ),
                (
                    "this is the backward of SwiGLU; the gate here is a GELU",
                    lambda g=grad, u=up, z=gate, s=silu_slope: torch.stack([g * u * s, g * _silu(z)]),
                ),
                (
                    "this is the backward of the tanh form; take the exact GELU",
                    lambda g=grad, u=up, z=gate: torch.stack(
                        [
                            g * u * _tanh_slope(z),
                            g * torch.nn.functional.gelu(z, approximate="tanh"),
                        ]
                    ),
                ),
            ],
        )


@checker(
    "relu",
    asks="Write dead(x, w, b): x (tokens, dim), w (dim, hidden), b (hidden,). Return (hidden,) True/False: True "
    "where relu(x @ w + b) passes no gradient to its unit from any of these tokens.",
    praise="Dead is what no token at all switches on; a unit that most tokens leave off is only sparse.",
)
def grade_relu(trial: Trial) -> None:
    for tokens, dim, hidden in [(3, 3, 7), (4, 3, 8), (9, 4, 12), (40, 6, 20)]:
        x, w, b = trial.normal(tokens, dim), trial.normal(dim, hidden), trial.normal(hidden)
        # What every trial must hold: unit 0 dead, 1 at exactly 0, 2 on by its bias alone, and 3, 4, 5 on for
        # one token each, the second, the first and the last; 6 is on for the second with a mean below 0.
        x[:, :3] = -1.0
        x[1, 0] = x[0, 1] = x[-1, 2] = 3.0
        w[:, :7], b[:7] = 0.0, torch.tensor([-1.5, 0.0, 0.5, -0.5, -0.5, -0.5, -0.9])
        w[0, 3] = w[2, 5] = 1.0 * tokens
        w[0, 6] = 1.0
        w[1, 4], b[4] = 0.1, -0.29  # at its peak only 0.01: small is not dead
        order = torch.randperm(hidden, generator=trial.generator)
        w, b = w[:, order], b[order]
        inputs = {"x": x, "w": w, "b": b}
        z = x @ w + b
        wanted = ~(z > 0).any(0)
        bare = x @ w
        trial.compare(
            trial.ask(**inputs),
            wanted,
            inputs,
            hints=[
                ("the answer is the wrong way round: True is a dead unit", lambda v=wanted: ~v),
                (
                    "a unit that is off on some tokens is sparse; dead is off on all of them",
                    lambda z=z: (z <= 0).any(0),
                ),
                (
                    "an input of exactly 0 passes no gradient either: relu's slope there is 0",
                    lambda z=z: (z < 0).all(0),
                ),
                ("only the first token was looked at", lambda z=z: z[0] <= 0),
                ("only the last token was looked at", lambda z=z: z[-1] <= 0),
                (
                    "the mean over the tokens says little: one token that switches a unit on is enough",
                    lambda z=z: z.mean(0) <= 0,
                ),
                (
                    "a small activation passes its gradient in full: dead is 0 on all of them, not little",
                    lambda z=z: z.clamp(min=0).amax(0) < 0.1,
                ),
                ("the bias is subtracted; relu takes x @ w + b", lambda v=bare - b: ~(v > 0).any(0)),
                ("the bias is missing", lambda v=bare: ~(v > 0).any(0)),
            ],
        )
