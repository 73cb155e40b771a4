"""Batch norm over the batches of all processes, on torch.distributed as it is.

Forward gathers mean, variance and count of each process and merges them in the order of the ranks
(Chan, Golub, LeVeque 1979), so that every process has the same bits; the kernels then normalize as
with running statistics. With g the gradient of what precedes the activation, x̂ the normalized
input and N the number of values of all processes, backward adds up two sums per channel:

    dx = w / sqrt(var + eps) * (g - (Σ g + x̂ Σ g x̂) / N)

The first product is the kernels' gradient with constant statistics, which also returns this
process's part of both sums (the gradients of bias and weight); the rest is their scale and shift of
x, with the first product as the residual.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastnorm import _channels, _ops, _reference
from fastnorm._channels import Frozen, Normed
from fastnorm._ops import NormCall
from fastnorm._reference import MEAN_VAR
from fastnorm.batch_norm import _BatchNorm, _RunningBatchNorm, normalize

__all__ = ["SyncBatchNorm"]


class SyncBatchNorm(_BatchNorm):
    """`torch.nn.SyncBatchNorm` with a fused activation, residual add and dropout, on CPU and CUDA.

    In training mode the statistics are those of the batches of all processes together, of any size
    on each. In evaluation mode, in a single process, and where torch.distributed is not
    initialized, this is `BatchNorm1d` for any number of dimensions.

    Args:
        num_features, eps, momentum, affine, track_running_stats, process_group, device, dtype,
            bias: as in `torch.nn.SyncBatchNorm`, with the same attributes and state_dict keys.
        activation, dropout_p, channel_dim, nonfinite_stats: as in `BatchNorm1d`. Each process draws
            its own dropout.

    Shape:
        ``forward(input, residual=None, *, mask=None, lengths=None)``: input, residual and result
        are (N, C) or (N, C, *), contiguous or channels-last; mask and lengths as in `batch_norm`
        (a forward with a mask runs in plain PyTorch).

    The gradients of weight and bias are this process's part, to be averaged by
    `torch.nn.parallel.DistributedDataParallel` or `torch.distributed.fsdp.fully_shard` as all
    others. All processes of the group must run the same forwards and backwards, with the same
    inputs requiring gradients. Second derivatives are right; `torch.func` transforms and
    forward-mode differentiation are refused. Under `torch.compile` the layer is a graph break.

    Raises:
        ValueError: as `BatchNorm1d`; for fewer than 2 dimensions; without channels.

    Example:
        >>> norm = fastnorm.SyncBatchNorm(16, activation="relu")
        >>> norm(torch.randn(2, 16, 8, 8)).shape
        torch.Size([2, 16, 8, 8])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        dropout_p: float = 0.0,
        channel_dim: int = 1,
        nonfinite_stats: str = "propagate",
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias,
            activation=activation, dropout_p=dropout_p, channel_dim=channel_dim,
            nonfinite_stats=nonfinite_stats,
        )  # fmt: skip
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")
        if input.size(self.channel_dim) == 0:
            raise ValueError("SyncBatchNorm number of input channels should be non-zero")

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        batch_statistics, update = self._mode(self.running_mean)
        if not (self.training and (batch_statistics or update) and is_shared(self.process_group)):
            return super().forward(input, residual, mask=mask, lengths=lengths)
        return self._synced(input, residual, mask, lengths, batch_statistics, update)

    def _synced(
        self,
        input: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        lengths: Tensor | Sequence[int] | None,
        batch_statistics: bool,
        update: bool,
    ) -> Tensor:
        self._check_input_dim(input)
        reason = _ops.disturbance(input, self.weight, self.bias, residual)
        if reason is not None:
            raise NotImplementedError(
                f"SyncBatchNorm: expected plain tensors in training mode, got {reason}; use "
                "BatchNorm, or freeze() or eval() this module"
            )
        group = self.process_group or dist.group.WORLD

        def norm(*args: Any, chunk: int = 0, mask: Tensor | None = None) -> Normed:
            return sync_norm(group, *args, mask=mask)

        return normalize(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            batch_statistics=batch_statistics,
            update=update,
            training=True,
            momentum=self.momentum,
            eps=self.eps,
            activation=self.activation,
            residual=residual,
            dropout_p=self.dropout_p,
            channel_dim=self.channel_dim,
            mask=mask,
            lengths=lengths,
            tracked=self.num_batches_tracked,
            skipped=self.num_batches_skipped if self.nonfinite_stats == "skip" else None,
            synced=norm,
        )

    # torch._dynamo.disable without its import (1.5 s): collectives belong to the eager part.
    _synced._torchdynamo_disable = True  # type: ignore[attr-defined]

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """Replace every batch norm of a model, fastnorm's and torch's, by a `SyncBatchNorm`.

        Parameters, buffers and hooks are shared with the layers replaced; activation, dropout,
        frozen statistics and mode are kept. torch's own function of this name refuses layers of
        fastnorm that have any of these.

        Args:
            module: a model, changed in place, or a single batch norm.
            process_group: the processes that share statistics; by default all.

        Returns:
            `module`, or the new layer where it is itself a batch norm.

        Raises:
            ValueError: a layer with a `virtual_batch_size`, with a parametrized weight, or a
                `RunningBatchNorm`. The model is not changed.

        Example:
            >>> model = nn.Sequential(nn.Linear(4, 8), fastnorm.BatchNorm1d(8, activation="relu"))
            >>> fastnorm.SyncBatchNorm.convert_sync_batchnorm(model)[1].activation
            'relu'
        """
        made: dict[nn.Module, nn.Module] = {}
        for name, old in module.named_modules():
            if isinstance(old, nn.modules.batchnorm._BatchNorm):
                made[old] = cls._like(old, process_group, name)
        for parent in list(module.modules()):
            for name, child in parent._modules.items():
                if child in made:
                    parent._modules[name] = made[child]
        return made.get(module, module)

    @classmethod
    def _like(cls, old: nn.modules.batchnorm._BatchNorm, process_group: Any, name: str) -> Any:
        for found, what in (
            (isinstance(old, _RunningBatchNorm), "a RunningBatchNorm"),
            (getattr(old, "virtual_batch_size", None) is not None, "virtual_batch_size"),
            (nn.utils.parametrize.is_parametrized(old), "a parametrization"),
        ):
            if found:
                raise ValueError(
                    f"module: expected batch norms without {what}, got {type(old).__name__} "
                    f"{name!r}; SyncBatchNorm has no such thing"
                )
        new = cls(old.num_features, affine=False, track_running_stats=False, device="meta")
        buffers = new._buffers
        vars(new).update(vars(old))
        new._buffers = {**buffers, **old._buffers}
        new.process_group = process_group
        return new


def is_shared(process_group: Any) -> bool:
    """Whether there are other processes to share statistics with."""
    return (
        dist.is_available()
        and dist.is_initialized()
        and dist.get_world_size(process_group or dist.group.WORLD) > 1
    )


def sync_norm(
    group: Any,
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    frozen: Frozen | None,
    seed: Tensor | None,
    call: NormCall,
    *,
    mask: Tensor | None,
) -> Normed:
    """`_channels.norm` with the statistics of all processes in the group."""
    if frozen is not None:
        return _channels.norm(x, groups, weight, bias, residual, frozen, seed, call, mask=mask)
    if mask is not None or not _ops.use_kernel(x, weight, bias, residual):
        return reference(group, x, weight, bias, residual, seed, call, mask)
    x, _ = _channels.make_dense(x)
    if residual is not None:
        residual = _ops.laid_out(residual, x)
    dtype = _reference.accumulate_dtype(x.dtype)
    # In the type of sums, because their gradients are this process's part of the sums.
    w, b = (None if p is None else p.to(dtype).contiguous() for p in (weight, bias))
    y, mean, var, count = _SyncNorm.apply(x, w, b, residual, seed, call, group)
    return Normed(y, mean.unsqueeze(0), var.unsqueeze(0), count)


def reference(
    group: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    call: NormCall,
    mask: Tensor | None = None,
) -> Normed:
    """The same in plain PyTorch, differentiable to any order."""
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


class _SyncNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, residual, seed, call, group):  # type: ignore[no-untyped-def]
        channels = x.shape[1]
        dtype = _reference.accumulate_dtype(x.dtype)
        view = (0,) * 6
        own = x.new_zeros(2 * channels + 1, dtype=torch.float64)
        if x.numel() > 0:
            view = _channels.batch_view(x, not x.is_contiguous(), x.shape[0])
            # The kernel has no form that leaves its result out; this one is dropped.
            _, mean, var = torch.ops.fastnorm.norm_fwd(
                x, None, None, None, None, None, None, view, MEAN_VAR, 1.0, 0.0, 0, 0.0
            )
            own[:channels], own[channels:-1] = mean[0], var[0]
            own[-1] = x.numel() // channels
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
        ctx.save_for_backward(x, weight, bias, kept, mean, var, count, seed)
        ctx.mark_non_differentiable(mean, var, count)
        return y, mean, var, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any):  # type: ignore[no-untyped-def]
        x, weight, bias, residual, mean, var, count, seed = ctx.saved_tensors
        call: NormCall = ctx.call
        needs = list(ctx.needs_input_grad[:4])
        if torch.is_grad_enabled():
            return *differentiable_vjp(ctx, grad, needs), None, None, None
        channels = x.shape[1]
        epilogue = bool(call.activation) or seed is not None
        sums = mean.new_zeros(2, channels)
        dx, dr = torch.zeros_like(x), grad
        if x.numel() > 0:
            mask = [needs[0], True, True, needs[3] and epilogue]
            dx, sums[1], sums[0], own_dr = torch.ops.fastnorm.norm_bwd(
                _ops.laid_out(grad, x), x, weight, bias, residual, mean, var, seed,
                *call[:2], True, *call[2:], mask,
            )  # fmt: skip
            dr = own_dr if epilogue else grad
        dw, db = sums[1].clone(), sums[0].clone()
        if needs[0]:
            total = sums.double()
            dist.all_reduce(total, group=ctx.group)
            if x.numel() > 0:
                slope = torch.rsqrt(var.double() + call.eps) / count
                if weight is not None:
                    slope = slope * weight.double()
                shift, scale = (-total * slope).to(mean.dtype)
                dx, _, _ = torch.ops.fastnorm.norm_fwd(
                    x, scale, shift, dx, mean, var, None,
                    call.view, MEAN_VAR, call.eps, 0.0, 0, 0.0,
                )  # fmt: skip
        out = (dx, dw, db, dr)
        return *(g if need else None for g, need in zip(out, needs, strict=True)), None, None, None


def differentiable_vjp(ctx: Any, grad: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradients as a differentiable function of the inputs, those of other processes too."""
    x, weight, bias, residual, *_, seed = ctx.saved_tensors
    if needs[3] and residual is None:
        # Kept only where an activation follows it; without one its values change no gradient.
        residual = torch.zeros_like(x, requires_grad=True)
    with torch.enable_grad():
        inputs: list[Any] = [
            None if t is None else t.view_as(t) for t in (x, weight, bias, residual)
        ]
        x, weight, bias, residual = inputs
        y = reference(ctx.group, x, weight, bias, residual, seed, ctx.call).y
        sources = [t for t, need in zip(inputs, needs, strict=True) if need and t is not None]
        found = iter(torch.autograd.grad(y, sources, grad, create_graph=True))
        return [next(found) if need else None for need in needs]
