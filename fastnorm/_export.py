"""What `torch.export`, and ONNX through it, see: torch's own functions.

Other runtimes know them, and an exported graph must not need this library.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from fastnorm._reference import MEAN_SQUARE, accumulate_dtype
from fastnorm.epilogue import FUNCTIONS


def _alike(x: Tensor, *others: Tensor | None) -> tuple[Tensor, list[Tensor | None]]:
    """The tensors as they are if they have one dtype, else all in that of the statistics."""
    if all(t is None or t.dtype == x.dtype for t in others):
        return x, list(others)
    dtype = accumulate_dtype(x.dtype)
    return x.to(dtype), [None if t is None else t.to(dtype) for t in others]


def is_updatable(x: Tensor, running: Tensor | None, update: bool) -> bool:
    """Whether torch's function can write to the running statistics, rather than to a cast copy."""
    return not update or running is None or running.dtype == accumulate_dtype(x.dtype)


def _finish(
    pre: Tensor, like: Tensor, residual: Tensor | None, activation: int, p: float
) -> Tensor:
    if residual is not None:
        pre = pre + residual
    y = FUNCTIONS[activation](pre)
    return (F.dropout(y, p) if p else y).to(like.dtype)


def layer(
    input: Tensor,
    shape: Sequence[int],
    dim: int,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    statistic: int,
    eps: float,
    weight_offset: float,
    activation: int,
    p: float,
) -> Tensor:
    """Layer and RMS norm over trailing dimensions, or over `dim` if that is not negative."""
    if weight is not None and weight_offset:
        weight = weight + weight_offset
    x, (weight, bias) = _alike(input, weight, bias)
    x = x if dim < 0 else x.movedim(dim, -1)
    if statistic == MEAN_SQUARE:
        y = F.rms_norm(x, list(shape), weight, eps)
    else:
        y = F.layer_norm(x, list(shape), weight, bias, eps)
    return _finish(y if dim < 0 else y.movedim(-1, dim), input, residual, activation, p)


def channels(
    input: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: int,
    p: float,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    own_statistics: bool = True,
    momentum: float = 0.0,
) -> Tensor:
    """Batch norm (`groups` 0), instance norm (a group for every channel) and group norm.

    With `own_statistics` the running ones are updated; see `is_updatable`.
    """
    x, (weight, bias, mean, var) = _alike(input, weight, bias, running_mean, running_var)
    if not groups:
        y = F.batch_norm(x, mean, var, weight, bias, own_statistics, momentum, eps)
    elif groups == input.shape[1]:
        y = F.instance_norm(x, mean, var, weight, bias, own_statistics, momentum, eps)
    else:
        y = F.group_norm(x, groups, weight, bias, eps)
    return _finish(y, input, residual, activation, p)
