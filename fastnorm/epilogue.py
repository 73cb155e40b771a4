"""What may follow a norm: activation, residual add, dropout, as names, numbers and formulas.

The numbers are those of ``csrc/common/epilogue.h``. `ACTIVATIONS` holds each activation's number
and its plain-PyTorch function; both are read by every norm and by dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "ACTIVATION_CODES", "Activation", "activation_code"]


class Activation(NamedTuple):
    code: int
    function: Callable[[Tensor], Tensor]


ACTIVATIONS: dict[str | None, Activation] = {
    None: Activation(0, lambda x: x),
    "relu": Activation(1, F.relu),
    "leaky_relu": Activation(2, F.leaky_relu),
    "gelu": Activation(3, F.gelu),
    "gelu_tanh": Activation(4, lambda x: F.gelu(x, approximate="tanh")),
    "silu": Activation(5, F.silu),
    "sigmoid": Activation(6, lambda x: x.sigmoid()),
    "tanh": Activation(7, lambda x: x.tanh()),
}

# One dictionary look-up on the way to a kernel; -1 for anything else is refused there.
ACTIVATION_CODES: dict[str | None, int] = {name: a.code for name, a in ACTIVATIONS.items()}

FUNCTIONS: list[Callable[[Tensor], Tensor]] = [a.function for a in ACTIVATIONS.values()]


def activation_code(activation: str | None) -> int:
    """The number of an activation.

    Raises:
        ValueError: not one of `ACTIVATIONS`.

    Example:
        >>> activation_code("silu")
        5
    """
    code = ACTIVATION_CODES.get(activation) if isinstance(activation, (str, type(None))) else None
    if code is None:
        names = ", ".join(repr(name) for name in ACTIVATIONS)
        raise ValueError(f"activation: expected one of {names}, got {activation!r}")
    return code
