"""Batch norm over the batches of all processes; `_parts` has the formulas."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastnorm import _fx, _ops, _parts
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
        are (N, C) or (N, C, *), contiguous or channels-last; mask and lengths as in `batch_norm`.

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
        if isinstance(input, _fx.Proxy):
            return _fx.leaf(self, input, residual, mask=mask, lengths=lengths)
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
            synced=partial(_parts.norm, group=self.process_group or dist.group.WORLD),
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
