"""Batch norm whose statistics are not simply those of the input: of a mask's positions only, or of
the batches of several processes.

Mean, variance and count are merged in the order of the ranks (Chan, Golub, LeVeque 1979), so that
every process has the same bits; the kernels then normalize as with running statistics. With g the
gradient of what precedes the activation, x̂ the normalized input and N the number of values that
count, backward adds up two sums per channel:

    dx = w / sqrt(var + eps) * (g - (Σ g + x̂ Σ g x̂) / N)

The first product is the kernels' gradient with constant statistics, which also returns this
process's part of both sums (the gradients of bias and weight); the rest is their scale and shift of
x, with the first product as the residual. Where a mask is false, input and result are set to 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastnorm import _channels, _ops, _reference
from fastnorm._channels import Frozen, Normed
from fastnorm._ops import NormCall
from fastnorm._reference import MEAN_VAR


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
    group: Any = None,
) -> Normed:
    """`_channels.norm` of a batch whose other parts are in the processes of `group`, if given."""
    if frozen is not None:
        return _channels.norm(x, groups, weight, bias, residual, frozen, seed, call, mask=mask)
    if not _ops.use_kernel(x, weight, bias, residual):
        return reference(x, weight, bias, residual, seed, call, mask, group)
    if mask is not None:
        x, residual = _channels.zero_outside(mask, x), _channels.zero_outside(mask, residual)
    x, _ = _channels.make_dense(x)
    if residual is not None:
        residual = _ops.laid_out(residual, x)
    if x.numel() > 0:
        view = _channels.batch_view(x, not x.is_contiguous(), x.shape[0])
        _ops.note(lambda: _ops.describe("norm", x, view))
    dtype = _reference.accumulate_dtype(x.dtype)
    # In the type of sums, because their gradients are this process's part of the sums.
    w, b = (None if p is None else p.to(dtype).contiguous() for p in (weight, bias))
    y, mean, var, count = _PartNorm.apply(x, w, b, residual, seed, call, mask, group)
    if mask is not None:
        y = _channels.zero_outside(mask, y)
    return Normed(y, mean.unsqueeze(0), var.unsqueeze(0), count)


def reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    call: NormCall,
    mask: Tensor | None,
    group: Any,
) -> Normed:
    """The same in plain PyTorch, differentiable to any order."""
    if group is None:
        return _channels.reference(
            x, 0, weight, bias, residual, None, seed, call, max(x.shape[0], 1), mask
        )
    wide = x.to(_reference.accumulate_dtype(x.dtype))
    dims = (0, *range(2, x.dim()))
    valid = None if mask is None else mask.unsqueeze(1)
    number = wide.new_full((1,), x.numel() // x.shape[1]) if valid is None else valid.sum()
    if valid is not None:
        wide = torch.where(valid, wide, 0.0)
    sums = _AllReduce.apply(torch.cat([wide.sum(dims), number.reshape(1).to(wide.dtype)]), group)
    count = sums[-1:].detach()
    mean = sums[:-1] / count.clamp(min=1)
    d = wide - mean.reshape(-1, *(1,) * len(dims[1:]))
    if valid is not None:
        d = torch.where(valid, d, 0.0)
    var = _AllReduce.apply(d.square().sum(dims), group) / count.clamp(min=1)
    y = _channels.reference(
        x, 0, weight, bias, residual, (mean, var), seed, call, max(x.shape[0], 1), mask
    ).y
    return Normed(y, mean.detach().unsqueeze(0), var.detach().unsqueeze(0), count)


def merge(parts: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and count of the union of sets, a row [mean, var, count] for each."""
    means, variances, counts = parts.split([channels, channels, 1], 1)
    mean, var, count = means[0], variances[0], counts[0]
    for m, v, n in zip(means[1:], variances[1:], counts[1:], strict=True):
        total = count + n
        k = n / total.clamp(min=1)
        var = (1 - k) * var + k * v + k * (1 - k) * (m - mean).square()
        mean = mean + k * (m - mean)
        count = total
    return mean, var, count


class _AllReduce(torch.autograd.Function):
    """The sum over a group; its gradient is the sum of the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        out = x.contiguous().clone()
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _AllReduce.apply(grad, ctx.group), None


def masked_moments(x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and number of the values that count; the others are 0 in `x`."""
    dims = (0, *range(2, x.dim()))
    dtype = _reference.accumulate_dtype(x.dtype)
    count = valid.sum()
    some = count.clamp(min=1)
    mean = x.sum(dims, dtype=dtype) / some
    d = (x.to(dtype) - mean.reshape(-1, *(1,) * len(dims[1:]))).mul_(valid)
    var = d.square().sum(dims) / some
    return mean, var, count


class _PartNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, residual, seed, call, mask, group):  # type: ignore[no-untyped-def]
        channels = x.shape[1]
        dtype = _reference.accumulate_dtype(x.dtype)
        view = (0,) * 6
        own = x.new_zeros(2 * channels + 1, dtype=torch.float64)
        if x.numel() > 0:
            view = _channels.batch_view(x, not x.is_contiguous(), x.shape[0])
        if mask is not None:
            own[:channels], own[channels:-1], own[-1] = masked_moments(x, mask.unsqueeze(1))
        elif x.numel() > 0:
            # The kernel has no form that leaves its result out; this one is dropped.
            _, mean, var = torch.ops.fastnorm.norm_fwd(
                x, None, None, None, None, None, None, view, MEAN_VAR, 1.0, 0.0, 0, 0.0
            )
            own[:channels], own[channels:-1] = mean[0], var[0]
            own[-1] = x.numel() // channels
        parts = [own]
        if group is not None:
            parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, own, group=group)
        mean, var, count = merge(torch.stack(parts), channels)
        mean, var = mean.to(dtype), var.to(dtype)
        y = torch.empty_like(x)
        if x.numel() > 0:
            y, _, _ = torch.ops.fastnorm.norm_fwd(
                x, weight, bias, residual, mean, var, seed, view, *call[1:]
            )
        ctx.call, ctx.group = call._replace(view=view), group
        kept = residual if call.activation else None
        ctx.save_for_backward(x, weight, bias, kept, mean, var, count, seed, mask)
        ctx.mark_non_differentiable(mean, var, count)
        return y, mean, var, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any):  # type: ignore[no-untyped-def]
        x, weight, bias, residual, mean, var, count, seed, _ = ctx.saved_tensors
        call: NormCall = ctx.call
        needs = list(ctx.needs_input_grad[:4])
        if torch.is_grad_enabled():
            return *differentiable_vjp(ctx, grad, needs), None, None, None, None
        channels = x.shape[1]
        epilogue = bool(call.activation) or seed is not None
        sums = mean.new_zeros(2, channels)
        dx, dr = torch.zeros_like(x), grad
        if x.numel() > 0:
            wanted = [needs[0], True, True, needs[3] and epilogue]
            dx, sums[1], sums[0], own_dr = torch.ops.fastnorm.norm_bwd(
                _ops.laid_out(grad, x), x, weight, bias, residual, mean, var, seed,
                *call[:2], True, *call[2:], wanted,
            )  # fmt: skip
            dr = own_dr if epilogue else grad
        dw, db = sums[1].clone(), sums[0].clone()
        if needs[0]:
            total = sums.double()
            if ctx.group is not None:
                dist.all_reduce(total, group=ctx.group)
            if x.numel() > 0:
                slope = torch.rsqrt(var.double() + call.eps) / count.clamp(min=1)
                if weight is not None:
                    slope = slope * weight.double()
                shift, scale = (-total * slope).to(mean.dtype)
                dx, _, _ = torch.ops.fastnorm.norm_fwd(
                    x, scale, shift, dx, mean, var, None,
                    call.view, MEAN_VAR, call.eps, 0.0, 0, 0.0,
                )  # fmt: skip
        out = (dx, dw, db, dr)
        none = (None,) * 4
        return *(g if need else None for g, need in zip(out, needs, strict=True)), *none


def differentiable_vjp(ctx: Any, grad: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradients as a differentiable function of the inputs, those of other processes too."""
    x, weight, bias, residual, _, _, _, seed, mask = ctx.saved_tensors
    if needs[3] and residual is None:
        # Kept only where an activation follows it; without one its values change no gradient.
        residual = torch.zeros_like(x, requires_grad=True)
    with torch.enable_grad():
        inputs: list[Any] = [
            None if t is None else t.view_as(t) for t in (x, weight, bias, residual)
        ]
        x, weight, bias, residual = inputs
        y = reference(x, weight, bias, residual, seed, ctx.call, mask, ctx.group).y
        sources = [t for t, need in zip(inputs, needs, strict=True) if need and t is not None]
        found = iter(torch.autograd.grad(y, sources, grad, create_graph=True))
        return [next(found) if need else None for need in needs]
