"""The one pure-PyTorch definition of a norm and of what surrounds it.

The tests compare the kernels with it; it runs where no kernel can; `torch.func`, forward-mode
differentiation and second derivatives see it. It is made of primitive operators only, so that it is
differentiable to any order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnorm import _philox
from fastnorm.epilogue import FUNCTIONS

MEAN_VAR, MEAN_SQUARE = 0, 1


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of statistics: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def statistics(x: Tensor, dims: Sequence[int], statistic: int) -> tuple[Tensor | None, Tensor]:
    """Mean and biased variance over `dims`, or None and the mean square; dimensions are kept."""
    dims = tuple(dims)
    if statistic == MEAN_SQUARE:
        return None, x.square().mean(dims, keepdim=True)
    mean = x.mean(dims, keepdim=True)
    return mean, (x - mean).square().mean(dims, keepdim=True)


def normalize(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    weight_offset: float = 0.0,
) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * (weight + weight_offset) + bias``; operands broadcast."""
    y = x if mean is None else x - mean
    y = y * torch.rsqrt(var + eps)
    if weight is not None:
        weight = weight.to(y.dtype)
        y = y * (weight + weight_offset if weight_offset else weight)
    return y if bias is None else y + bias.to(y.dtype)


def finish(
    pre: Tensor, residual: Tensor | None, activation: int, keep: Tensor | None, scale: float
) -> Tensor:
    """``dropout(activation(pre + residual))``, with `keep` the elements that stay."""
    if residual is not None:
        pre = pre + residual.to(pre.dtype)
    return drop(FUNCTIONS[activation](pre), keep, scale)


def drop(x: Tensor, keep: Tensor | None, scale: float) -> Tensor:
    """x * scale where `keep`, otherwise +0 (also for infinities and NaN)."""
    return x if keep is None else torch.where(keep, x * scale, 0.0)


def keep_like(
    x: Tensor, ordered: Tensor | None, seed: Tensor | None, p: float
) -> tuple[Tensor | None, float]:
    """Dropout's mask in the shape of `x`, and the scale of what is kept.

    Elements are counted in the memory order of `ordered`, or as if `x` were contiguous.
    """
    if seed is None:
        return None, 1.0
    keep = _philox.keep_mask(x.numel(), seed, p)
    keep = keep.view(x.shape) if ordered is None else unflatten(keep, ordered)
    return keep, _philox.scale(p)


def memory_order(x: Tensor) -> list[int]:
    """The dimensions of a dense tensor from the outermost in memory to the innermost."""
    order: list[int] = []
    for d in range(x.dim()):  # by hand, because a compiler cannot sort by symbolic strides
        at = d
        while at > 0 and x.stride(order[at - 1]) < x.stride(d):
            at -= 1
        order.insert(at, d)
    return order


def flatten(x: Tensor) -> Tensor:
    """The elements of a dense tensor in memory order."""
    return x.permute(memory_order(x)).reshape(-1)


def unflatten(flat: Tensor, like: Tensor) -> Tensor:
    """The inverse of `flatten`, for a result laid out like `like`."""
    order = memory_order(like)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return flat.reshape([like.shape[d] for d in order]).permute(inverse)


def split_view(flat: Tensor, view: Sequence[int]) -> list[Tensor]:
    """The blocks of ``csrc/common/norm.h``, [outer][reduce_outer][kept][reduce_inner] and tail."""
    outer, reduce_outer, kept, reduce_inner, _, tail = view
    if tail == reduce_outer or outer == 0:
        return [flat.view(outer, reduce_outer, kept, reduce_inner)]
    at = (outer - 1) * reduce_outer * kept * reduce_inner
    blocks = [flat[at:].view(1, tail, kept, reduce_inner)]
    if outer > 1:
        blocks.insert(0, flat[:at].view(outer - 1, reduce_outer, kept, reduce_inner))
    return blocks


def spread_parameter(p: Tensor | None, view: Sequence[int]) -> Tensor | None:
    """One value per channel, shaped to broadcast against a block of `split_view`."""
    if p is None:
        return None
    _, reduce_outer, kept, reduce_inner, inner, _ = view
    if inner == 0:
        return p.reshape(reduce_outer, 1, 1)
    per_kept = reduce_inner // inner
    return p.reshape(kept, per_kept, 1).expand(-1, -1, inner).reshape(kept, reduce_inner)


def norm_by_view(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    keep: Tensor | None,
    view: Sequence[int],
    *,
    statistic: int,
    eps: float,
    weight_offset: float,
    activation: int,
    scale: float,
) -> Tensor:
    """The kernels' operation: everything flat in memory order, statistics by `view`."""
    dtype = accumulate_dtype(x.dtype)
    weight, bias = spread_parameter(weight, view), spread_parameter(bias, view)
    out = []
    for block in split_view(flatten(x).to(dtype), view):
        if var is not None:
            m, v = (None if s is None else s.reshape(1, 1, -1, 1) for s in (mean, var))
        else:
            m, v = statistics(block, (1, 3), statistic)
        assert v is not None
        pre = normalize(block, m, v, weight, bias, eps=eps, weight_offset=weight_offset)
        out.append(pre.reshape(-1))
    pre = out[0] if len(out) == 1 else torch.cat(out)
    extra = None if residual is None else flatten(residual)
    return unflatten(finish(pre, extra, activation, keep, scale).to(x.dtype), x)
