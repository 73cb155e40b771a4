"""What batch, group and instance norm share: channels at dimension 1, masks, the reference."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastnorm import _ops, _reference
from fastnorm._checks import check_device
from fastnorm._layers import dense as dense_parameter
from fastnorm._ops import NormCall, View
from fastnorm._reference import MEAN_VAR

Frozen = tuple[Tensor, Tensor]


class Normed(NamedTuple):
    """A result and the statistics it used, [outer][kept], each over `counts` values.

    `counts` are two numbers, of every block but the last and of the last, or with a mask a tensor
    of one number for each block.
    """

    y: Tensor
    mean: Tensor | None
    var: Tensor | None
    counts: tuple[int, int] | Tensor


def make_dense(x: Tensor) -> tuple[Tensor, bool]:
    """`x`, or a copy if neither layout is its own, and whether its channels are innermost."""
    if x.is_contiguous():
        return x, False
    if x.dim() > 2:
        inside = x.movedim(1, -1)
        if inside.is_contiguous():
            return x, True
        if x.stride(1) == 1 and x.size(1) > 1:
            return _ops.contiguous("input", inside).movedim(-1, 1), True
    return _ops.contiguous("input", x), False


def spatial_numel(x: Tensor) -> int:
    return math.prod(x.shape[2:])


def batch_view(x: Tensor, channels_last: bool, chunk: int) -> View:
    """Statistics of each channel over the batch, or over every `chunk` samples of it if not 0."""
    n, channels, spatial = x.shape[0], x.shape[1], spatial_numel(x)
    chunks = -(-n // chunk) if chunk else 1
    chunk = chunk or n
    tail = n - (chunks - 1) * chunk
    if channels_last or spatial == 1:
        return (chunks, chunk * spatial, channels, 1, 1, tail * spatial)
    return (chunks, chunk, channels, spatial, spatial, tail)


def group_view(x: Tensor, channels_last: bool, groups: int) -> View:
    """Statistics of each sample's groups of channels."""
    n, width, spatial = x.shape[0], x.shape[1] // groups, spatial_numel(x)
    if channels_last:
        return (n, spatial, groups, width, 1, spatial)
    return (n, 1, groups, width * spatial, spatial, 1)


def norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    frozen: Frozen | None,
    seed: Tensor | None,
    call: NormCall,
    *,
    chunk: int = 0,
    mask: Tensor | None = None,
) -> Normed:
    """Batch norm (`groups` 0), or group norm, of a validated input; `call.view` is filled in here.

    `frozen` holds a mean and a variance that replace the input's own. Of `mask` (N, spatial), only
    the true positions count, and the others are zero in the result.
    """
    mean, var = frozen or (None, None)
    if mask is not None and frozen is not None and not torch.compiler.is_compiling():
        x, residual = zero_outside(mask, x), zero_outside(mask, residual)
        out = norm(x, groups, weight, bias, residual, frozen, seed, call)
        return out._replace(y=zero_outside(mask, out.y))
    if (
        mask is not None
        or x.numel() == 0
        or not _ops.use_kernel(x, weight, bias, residual, mean, var)
    ):
        return reference(x, groups, weight, bias, residual, frozen, seed, call, chunk, mask)
    x, last = make_dense(x)
    view = group_view(x, last, groups) if groups else batch_view(x, last, chunk)
    if residual is not None:
        residual = _ops.laid_out(residual, x)
    y, new_mean, new_var = _ops.norm(
        x,
        dense_parameter(weight),
        dense_parameter(bias),
        residual,
        mean,
        var,
        seed,
        call._replace(view=view),
    )
    return Normed(y, new_mean, new_var, counts_of(view))


def zero_outside(mask: Tensor, t: Any) -> Any:
    """`t` with zeros at the positions that do not count, whatever is there."""
    return None if t is None else torch.where(mask.unsqueeze(1), t, 0.0)


def counts_of(view: Sequence[int]) -> tuple[int, int]:
    _, reduce_outer, _, reduce_inner, _, tail = view
    return reduce_outer * reduce_inner, tail * reduce_inner


def reference(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    frozen: Frozen | None,
    seed: Tensor | None,
    call: NormCall,
    chunk: int,
    mask: Tensor | None,
) -> Normed:
    """Batch, group and instance norm in plain PyTorch; arguments as in `norm`."""
    n, channels, *spatial = x.shape
    kept = groups or channels
    width = channels // max(kept, 1)
    wide = x.to(_reference.accumulate_dtype(x.dtype)).reshape(n, kept, width, *spatial)
    spread = (kept, width) + (1,) * len(spatial)
    weight, bias = (None if p is None else p.reshape(spread) for p in (weight, bias))
    dims = tuple(range(2, wide.dim())) if groups else (0, *range(2, wide.dim()))
    valid = None if mask is None else mask.reshape(n, 1, 1, *spatial)
    outer = n if groups else max(-(-n // chunk), 1) if chunk else 1

    pieces, means, variances, counts = [], [], [], []
    # No parts of the whole: a compiler would take the batch's size for a constant.
    blocks = wide.split(chunk) if chunk else (wide,)
    valid_blocks = (valid,) if valid is None or not chunk else valid.split(chunk)
    for block, ok in zip(blocks, itertools.cycle(valid_blocks), strict=False):
        count: int | Tensor = math.prod([block.shape[d] for d in dims])
        if ok is not None:
            # Also where a padded value is not finite.
            block = torch.where(ok, block, 0.0)
            count = ok.sum(dims, keepdim=True) * width
        if frozen is not None:
            m, v = (s.reshape(1, kept, *(1,) * (wide.dim() - 2)) for s in frozen)
        elif ok is None:
            own, v = _reference.statistics(block, dims, MEAN_VAR)
            assert own is not None
            m = own
        else:
            m, v = masked_statistics(block, ok, count, dims)
        pieces.append(_reference.normalize(block, m, v, weight, bias, eps=call.eps))
        means.append(m)
        variances.append(v)
        counts.append(count)
    pre = (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).reshape(x.shape)

    ordered, last = make_dense(x)
    keep, scale = _reference.keep_like(x, ordered if last else None, seed, call.dropout_p)
    padded = None if mask is None else mask.unsqueeze(1)
    if residual is not None and padded is not None:
        residual = torch.where(padded, residual, 0.0)
    y = _reference.finish(pre, residual, call.activation, keep, scale).to(x.dtype)
    if padded is not None:
        y = torch.where(padded, y, 0.0)
    if frozen is not None:
        return Normed(y, None, None, (0, 0))
    mean, var = (torch.cat(s).detach().reshape(outer, kept) for s in (means, variances))
    if mask is None:
        return Normed(y, mean, var, (counts[0], counts[-1]))  # type: ignore[arg-type]
    flat = [torch.as_tensor(c, device=x.device).reshape(-1) for c in counts]
    return Normed(y, mean, var, torch.cat(flat))


def masked_statistics(
    x: Tensor, ok: Tensor, count: Tensor | int, dims: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the true positions; 0 and 1 where there is none."""
    dims = tuple(dims)
    count = torch.as_tensor(count, device=x.device)
    some = count.clamp(min=1).to(x.dtype)
    mean = x.sum(dims, keepdim=True) / some
    var = torch.where(ok, x - mean, 0.0).square().sum(dims, keepdim=True) / some
    return mean, torch.where(count > 0, var, 1.0)


def read_mask(
    mask: Tensor | None, lengths: Tensor | Sequence[int] | None, x: Tensor
) -> Tensor | None:
    """The valid positions (N, spatial) of an input (N, C, spatial), or None where all are."""
    if mask is None and lengths is None:
        return None
    n, _, *spatial = x.shape
    if mask is not None and lengths is not None:
        raise ValueError("mask: expected only one of mask and lengths, got both")
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask: expected a tensor or None, got {type(mask).__name__}")
        if list(mask.shape) != [n, *spatial]:
            raise ValueError(f"mask: expected shape {[n, *spatial]}, got {list(mask.shape)}")
        if mask.dtype != torch.bool and mask.is_complex():
            raise TypeError(f"mask: expected a bool tensor, got {mask.dtype}")
        check_device("mask", mask, x)
        valid = mask if mask.dtype == torch.bool else mask != 0
    else:
        if len(spatial) != 1:
            raise ValueError(
                "lengths: expected an input with one dimension beside the batch and the channels, "
                f"got shape {list(x.shape)}; use mask"
            )
        numbers = torch.as_tensor(lengths, device=x.device)
        if list(numbers.shape) != [n] or numbers.is_floating_point() or numbers.is_complex():
            raise ValueError(
                f"lengths: expected {n} integers, got {numbers.dtype} of shape "
                f"{list(numbers.shape)}"
            )
        valid = torch.arange(spatial[0], device=x.device) < numbers.unsqueeze(1)
    # A mask of ones takes the way without a mask. A compiled graph and a transform can't look.
    return None if is_readable(valid) and bool(valid.all()) else valid


def is_readable(mask: Tensor) -> bool:
    """Whether Python may look at the values."""
    return not torch.compiler.is_compiling() and _ops.is_plain(mask)
