"""Batch normalization (Ioffe and Szegedy, "Batch Normalization", 2015).

    y = dropout(activation((x - mean) / sqrt(var + eps) * weight + bias + residual))

with mean and (biased) variance of each channel over the batch and every position, or, in evaluation
mode, with running averages of them. The running variance is the average of the unbiased one.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fastnorm import (
    _build,
    _channels,
    _dtensor,
    _export,
    _fx,
    _layers,
    _parts,
    _reference,
    _running,
)
from fastnorm._channels import Normed
from fastnorm._checks import (
    check_input,
    check_number,
    check_parameter,
    check_probability,
    check_residual,
    exporting,
)
from fastnorm._ops import NormCall
from fastnorm._reference import MEAN_VAR
from fastnorm._running import RunningStatistics
from fastnorm.epilogue import ACTIVATION_CODES, activation_code

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "RunningBatchNorm1d",
    "RunningBatchNorm2d",
    "batch_norm",
]


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    channel_dim: int = 1,
    virtual_batch_size: int | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
) -> Tensor:
    """Batch norm with what usually follows it, in one pass.

    ``dropout(activation((input - mean) / sqrt(var + eps) * weight + bias + residual))``, as
    `torch.nn.functional.batch_norm` defines the norm.

    Args:
        input: (N, C) or (N, C, *), or with `channel_dim` the channels at another place; float32,
            float64, bfloat16 or float16. Contiguous and channels-last inputs are read as they are,
            any other layout is copied once.
        running_mean, running_var: (C,), both or neither. With `training` they are updated after a
            forward that succeeded: ``running = (1 - momentum) * running + momentum * new``, `new`
            being the mean and the unbiased variance; otherwise they normalize.
        weight, bias: (C,), each optional; float32, bfloat16 or float16 in any combination with such
            an input, float64 with float64.
        training: normalize with the batch's own statistics, and drop.
        momentum: weight of the new statistics in the running ones.
        eps: added to the variance.
        activation: one of "relu", "leaky_relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh".
        residual: added before the activation; shape and dtype of `input`.
        dropout_p: probability of dropping an element of the result, where `training`.
        generator: draws dropout's seed in place of the default generator.
        channel_dim: where the channels are: 1, or -1 for (N, L, C).
        virtual_batch_size: statistics over every so many samples rather than over the batch (ghost
            batch norm), where `training`. The running statistics move as in a loop over these
            parts; the last part has what is left.
        mask: (N, *), nonzero where a position counts. Positions that do not count enter no
            statistic; their output and gradients are 0. A mask of ones gives the bits of no mask
            (eagerly, for which its values are read; a compiled graph always takes the masked way).
        lengths: (N,) integers for an input with one dimension beside N and C: the first positions
            of each sample count. Takes the place of `mask`.

    A DTensor may be sharded anywhere but in the channels, and with `training` nowhere: the
    statistics of a part are not the batch's (see `SyncBatchNorm`).

    Returns:
        A tensor of the input's shape, dtype and memory format. Statistics and sums are float32
        (float64 for float64). An empty batch gives an empty result, zero gradients, and leaves the
        running statistics alone; so does a batch, or part, whose mask leaves nothing.

    Raises:
        ValueError: one value per channel in training; another activation; a `residual`, `mask` or
            `lengths` of another shape; an `eps` that is negative, or 0 in training; a DTensor
            that is sharded elsewhere.
        RuntimeError: `weight`, `bias`, `running_mean` or `running_var` does not fit the channels,
            lies on another device, or is missing.
        TypeError: not a tensor, or a dtype that does not go with the input's.

    Example:
        >>> x = torch.randn(8, 16, 32, 32)
        >>> mean, var = torch.zeros(16), torch.ones(16)
        >>> fastnorm.batch_norm(x, mean, var, training=True, activation="relu").shape
        torch.Size([8, 16, 32, 32])
    """
    if (
        not (training and dropout_p)
        and channel_dim == 1
        and mask is None
        and lengths is None
        and virtual_batch_size is None
        and momentum is not None
        and not torch.compiler.is_compiling()
        and _build.module is not None
    ):
        y = _build.module.batch_norm(
            input, running_mean, running_var, weight, bias, residual, None, None, bool(training),
            bool(training) and running_mean is not None, momentum, eps,
            ACTIVATION_CODES.get(activation, -1), 0,
        )  # fmt: skip
        if y is not None:
            return y
    tensors = (input, running_mean, running_var, weight, bias, residual)
    if torch.overrides.has_torch_function(tensors):
        return torch.overrides.handle_torch_function(
            batch_norm,
            tensors,
            input,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            eps,
            activation=activation,
            residual=residual,
            dropout_p=dropout_p,
            generator=generator,
            channel_dim=channel_dim,
            virtual_batch_size=virtual_batch_size,
            mask=mask,
            lengths=lengths,
        )
    return normalize(
        input,
        running_mean,
        running_var,
        weight,
        bias,
        batch_statistics=bool(training),
        update=bool(training) and running_mean is not None,
        training=bool(training),
        momentum=check_number("momentum", momentum),
        eps=eps,
        activation=activation,
        residual=residual,
        dropout_p=dropout_p,
        generator=generator,
        channel_dim=channel_dim,
        virtual_batch_size=virtual_batch_size,
        mask=mask,
        lengths=lengths,
    )


def check_channels(input: Tensor, channel_dim: int) -> int:
    """`channel_dim` counted from 0."""
    if not isinstance(channel_dim, int) or isinstance(channel_dim, bool):
        raise TypeError(f"channel_dim: expected an int, got {type(channel_dim).__name__}")
    if input.dim() < 2 or not -input.dim() <= channel_dim < input.dim():
        raise IndexError(
            "input: expected at least 2 dimensions, one of them the channels at dimension "
            f"{channel_dim}, got shape {list(input.shape)}"
        )
    if channel_dim % input.dim() == 0:
        raise ValueError("channel_dim: expected a dimension other than the batch's (0), got 0")
    return channel_dim % input.dim()


def check_virtual_batch_size(size: object) -> None:
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"virtual_batch_size: expected an int or None, got {type(size).__name__}")
    if size < 1:
        raise ValueError(f"virtual_batch_size: expected at least 1, got {size}")


def check_values(input: Tensor, chunk: int) -> None:
    """More than one value per channel, in the batch and in its last part."""
    spatial = _channels.spatial_numel(input)
    if input.shape[0] * spatial == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {input.shape}"
        )
    if chunk and spatial == 1 and (chunk == 1 or input.shape[0] % chunk == 1):
        raise ValueError(
            "virtual_batch_size: expected parts of more than 1 value per channel, got a last part "
            f"of 1 from {input.shape[0]} samples by {chunk}"
        )


def normalize(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    batch_statistics: bool,
    update: bool,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: str | None,
    residual: Tensor | None,
    dropout_p: float,
    generator: torch.Generator | None = None,
    channel_dim: int = 1,
    virtual_batch_size: int | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    tracked: Tensor | None = None,
    skipped: Tensor | None = None,
    synced: Callable[..., Normed] | None = None,
) -> Tensor:
    """Everything that the eager entry leaves: validation, layout, choice of implementation.

    What to normalize with (`batch_statistics`), whether the running statistics move (`update`) and
    whether dropout drops (`training`) are separate here. `synced` takes the place of
    `_channels.norm` where other processes have a part of the batch.
    """
    check_input(input)
    if input.shape == (0,):  # torch takes it for an empty batch
        return input.clone()
    axis = check_channels(input, channel_dim)
    check_residual(residual, input)
    if _dtensor.is_dtensor(input):
        if mask is not None or lengths is not None:
            raise NotImplementedError("mask, lengths: expected None with a DTensor input")
        return _dtensor.run(
            lambda x, r, w, b, mean, var, tracked, skipped: normalize(
                x, mean, var, w, b, batch_statistics=batch_statistics, update=update,
                training=training, momentum=momentum, eps=eps, activation=activation, residual=r,
                dropout_p=dropout_p, generator=generator, channel_dim=channel_dim,
                virtual_batch_size=virtual_batch_size, tracked=tracked, skipped=skipped,
            ),
            range(input.dim()) if batch_statistics or update else (axis,),
            input, residual, weight, bias, running_mean, running_var, tracked, skipped,
            names="weight, bias, running_mean, running_var, num_batches_tracked, "
            "num_batches_skipped",
        )  # fmt: skip
    x = input if axis == 1 else input.movedim(axis, 1)
    if residual is not None and axis != 1:
        residual = residual.movedim(axis, 1)
    channels = x.shape[1]
    chunk = 0
    if virtual_batch_size is not None:
        check_virtual_batch_size(virtual_batch_size)
        if batch_statistics and virtual_batch_size < x.shape[0]:
            chunk = virtual_batch_size
    if batch_statistics and synced is None:
        check_values(x, chunk)
    eps = check_number("eps", eps)
    if momentum is not None:
        momentum = check_number("momentum", momentum)
    if eps < 0 or (batch_statistics and eps == 0):
        least = "a positive number when training" if batch_statistics else "a number >= 0"
        raise ValueError(f"eps: expected {least}, got {eps}")
    check_parameter("weight", weight, (channels,), x)
    check_parameter("bias", bias, (channels,), x)
    _running.check_running(running_mean, running_var, channels, x)
    if not batch_statistics and running_mean is None:
        raise RuntimeError(
            "running_mean: expected a tensor where the batch's statistics are not used, got None"
        )
    code = activation_code(activation)
    valid = _channels.read_mask(mask, lengths, x)
    one_left = valid is not None and _channels.is_readable(valid) and int(valid.sum()) == 1
    if batch_statistics and one_left and synced is None:
        raise ValueError(
            "mask: Expected more than 1 value per channel when training, got a mask with 1 "
            f"valid position for input size {input.shape}"
        )
    if update:
        assert running_mean is not None
        _running.check_updatable(running_mean, x)
    if (
        exporting()
        and _export.is_updatable(x, running_mean, update)
        and (batch_statistics or not update)
        and momentum is not None
        and not chunk
        and valid is None
        and skipped is None
        and synced is None
        and generator is None
    ):
        check_probability("dropout_p", dropout_p)
        used = update or not batch_statistics
        y = _export.channels(
            x, 0, weight, bias, residual, eps, code, dropout_p if training else 0.0,
            running_mean if used else None, running_var if used else None, batch_statistics,
            momentum,
        )  # fmt: skip
        if update and tracked is not None:
            tracked.add_(1)
        return y if axis == 1 else y.movedim(1, axis)
    seed = _layers.draw(input, dropout_p, training, generator)
    call = NormCall((0,) * 6, MEAN_VAR, eps, 0.0, code, dropout_p if seed is not None else 0.0)
    frozen = None
    if not batch_statistics:
        assert running_mean is not None and running_var is not None
        frozen = _running.frozen_statistics(
            running_mean, running_var, update, x, weight, bias, residual
        )
    norm = synced or _channels.norm
    if valid is not None and not chunk and not torch.compiler.is_compiling():
        norm = synced or _parts.norm
    out = norm(x, 0, weight, bias, residual, frozen, seed, call, chunk=chunk, mask=valid)
    if update and (synced is not None or input.numel() > 0):
        assert running_mean is not None and running_var is not None
        if frozen is not None:
            with torch.no_grad():
                plain = NormCall((0,) * 6, MEAN_VAR, 1.0)
                measured = norm(x, 0, None, None, None, None, None, plain, mask=valid)
        else:
            measured = out
        assert measured.mean is not None and measured.var is not None
        _running.update(
            running_mean, running_var, tracked, skipped,
            measured.mean, measured.var, measured.counts, momentum,
        )  # fmt: skip
    return out.y if axis == 1 else out.y.movedim(1, axis)


class _BatchNorm(RunningStatistics, torch.nn.modules.batchnorm._BatchNorm):
    num_batches_skipped: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        dropout_p: float = 0.0,
        channel_dim: int = 1,
        virtual_batch_size: int | None = None,
        nonfinite_stats: str = "propagate",
    ) -> None:
        activation_code(activation)
        _layers.check_probability("dropout_p", dropout_p)
        if nonfinite_stats not in ("propagate", "skip"):
            raise ValueError(
                f"nonfinite_stats: expected 'propagate' or 'skip', got {nonfinite_stats!r}"
            )
        if virtual_batch_size is not None:
            check_virtual_batch_size(virtual_batch_size)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self._init_running()
        self.activation = activation
        self.dropout_p = dropout_p
        self.channel_dim = channel_dim
        self.virtual_batch_size = virtual_batch_size
        self.nonfinite_stats = nonfinite_stats
        skipping = nonfinite_stats == "skip" and track_running_stats
        self.register_buffer(
            "num_batches_skipped",
            torch.zeros((), dtype=torch.long, device=device) if skipping else None,
            persistent=False,
        )

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
        self._check_input_dim(input)
        running_mean, running_var = self.running_mean, self.running_var
        weight, bias = self.weight, self.bias
        tracked = self.num_batches_tracked
        skipped = self.num_batches_skipped if self.nonfinite_stats == "skip" else None
        training = self.training
        batch_statistics, update = self._mode(running_mean)
        kernels = _build.module
        if (
            kernels is not None
            and mask is None
            and lengths is None
            and self.channel_dim == 1
            and not (training and self.dropout_p)
            and not torch.compiler.is_compiling()
        ):
            y = kernels.batch_norm(
                input, running_mean, running_var, weight, bias, residual, tracked, skipped,
                batch_statistics, update, self.momentum, self.eps,
                ACTIVATION_CODES.get(self.activation, -1), self.virtual_batch_size or 0,
            )  # fmt: skip
            if y is not None:
                return y
        return normalize(
            input,
            running_mean,
            running_var,
            weight,
            bias,
            batch_statistics=batch_statistics,
            update=update,
            training=training,
            momentum=self.momentum,
            eps=self.eps,
            activation=self.activation,
            residual=residual,
            dropout_p=self.dropout_p,
            channel_dim=self.channel_dim,
            virtual_batch_size=self.virtual_batch_size,
            mask=mask,
            lengths=lengths,
            tracked=tracked,
            skipped=skipped,
        )

    def named_children(self) -> Iterator[tuple[str, torch.nn.Module]]:
        # torch's converter copies what torch's layer has and asks for the children last. Nothing
        # else in it can tell it that the rest would be lost.
        converter = torch.nn.SyncBatchNorm.convert_sync_batchnorm.__func__.__code__  # type: ignore[attr-defined]
        if sys._getframe(1).f_code is converter and (lost := self._beyond_torch()):
            raise RuntimeError(
                f"module: expected batch norms of torch's own kind, got {type(self).__name__} with "
                f"{lost}, which torch.nn.SyncBatchNorm would lose; use "
                "fastnorm.SyncBatchNorm.convert_sync_batchnorm"
            )
        return super().named_children()

    def _beyond_torch(self) -> str:
        """What this layer does and torch's does not."""
        return _running.extra_repr(self).removeprefix(", ")

    def extra_repr(self) -> str:
        return super().extra_repr() + _running.extra_repr(self)


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` with a fused activation, residual add and dropout, and more.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: as in
            `torch.nn.BatchNorm1d`, with the same attributes and state_dict keys. Running statistics
            are float32 (float64) whatever 16-bit type the module is in.
        activation: applied to the result; see `batch_norm`.
        dropout_p: dropout after the activation, in training mode only.
        channel_dim: where the channels are: 1, or -1 for (N, L, C).
        virtual_batch_size: ghost batch norm in training mode; see `batch_norm`. Its last part must
            have more than one value per channel.
        nonfinite_stats: "skip" keeps a batch whose mean or variance is infinite or NaN out of the
            running statistics and counts it in the buffer `num_batches_skipped`.

    Shape:
        ``forward(input, residual=None, *, mask=None, lengths=None)``: input, residual and result
        are (N, C) or (N, C, L); mask (N, L) and lengths (N,) as in `batch_norm`.

    `freeze` and `unfreeze` stop and resume the use of batch statistics in training mode. A forward
    that activation checkpointing runs again does not update the statistics again: inside a running
    backward they never change. A module that was compiled by itself can't see this: compile the
    function that calls the checkpoint, not the module inside it.

    Raises:
        ValueError: another activation or `nonfinite_stats`, or `dropout_p` outside [0, 1]; in
            forward as `batch_norm`, and for another number of dimensions.

    Example:
        >>> norm = fastnorm.BatchNorm1d(16, activation="relu")
        >>> norm(torch.randn(8, 16, 100), lengths=torch.randint(1, 100, (8,))).shape
        torch.Size([8, 16, 100])
    """


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` with a fused activation, residual add and dropout, and more.

    Arguments, attributes and errors are those of `BatchNorm1d`.

    Shape:
        ``forward(input, residual=None, *, mask=None)``: input, residual and result are
        (N, C, H, W), contiguous or channels-last; mask is (N, H, W).

    Example:
        >>> norm = fastnorm.BatchNorm2d(16, activation="relu")
        >>> x, shortcut = torch.randn(2, 8, 16, 32, 32)
        >>> norm(x, shortcut).shape
        torch.Size([8, 16, 32, 32])
    """


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` with a fused activation, residual add and dropout, and more.

    Arguments, attributes and errors are those of `BatchNorm1d`.

    Shape:
        ``forward(input, residual=None, *, mask=None)``: input, residual and result are
        (N, C, D, H, W), contiguous or channels-last; mask is (N, D, H, W).

    Example:
        >>> norm = fastnorm.BatchNorm3d(16)
        >>> norm(torch.randn(2, 16, 4, 8, 8)).shape
        torch.Size([2, 16, 4, 8, 8])
    """


class _RunningBatchNorm(_BatchNorm):
    """Normalizes with running statistics in training mode too (Howard, fastai course v3, 2019).

    With `a` the weight of the new batch, 1 - (1 - momentum) / sqrt(max(N - 1, 1)), running sums of
    x, x² and 1 move by ``sums = (1 - a) * sums + a * new``; mean and variance are their quotients.
    The batch's part keeps its gradient, what came before is a constant. Kept here as mean, variance
    and count, merged by Chan's formula, which is the same and does not cancel:

        W = (1 - a) count + a n,  k = a n / W
        mean = (1 - k) mean + k m
        var = (1 - k) var + k v + k (1 - k) (m - mean)²
    """

    running_count: Tensor
    num_samples: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        min_var: float = 0.01,
        warmup_samples: int = 20,
        activation: str | None = None,
        dropout_p: float = 0.0,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, True, device, dtype, bias=bias,
            activation=activation, dropout_p=dropout_p,
        )  # fmt: skip
        self.min_var = min_var
        self.warmup_samples = warmup_samples
        self.register_buffer("running_count", torch.zeros((), device=device))
        self.register_buffer("num_samples", torch.zeros((), dtype=torch.long, device=device))

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        if "running_count" in self._buffers:
            self.running_count.zero_()
            self.num_samples.zero_()

    def forward(  # type: ignore[override]
        self, input: Tensor, residual: Tensor | None = None
    ) -> Tensor:
        if isinstance(input, _fx.Proxy):
            return _fx.leaf(self, input, residual)
        self._check_input_dim(input)
        check_input(input)
        check_residual(residual, input)
        mean, var = self.running_mean, self.running_var
        assert mean is not None and var is not None
        _running.check_running(mean, var, input.shape[1], input)
        if not self._mode(mean)[1] or input.numel() == 0:
            return normalize(
                input,
                mean,
                self._clamp(var, self.num_samples),
                self.weight,
                self.bias,
                batch_statistics=False,
                update=False,
                training=self.training,
                momentum=None,
                eps=self.eps,
                activation=self.activation,
                residual=residual,
                dropout_p=self.dropout_p,
            )
        _running.check_updatable(mean, input)
        if _running.recomputing():
            raise RuntimeError(
                f"{type(self).__name__}: expected a module outside activation checkpointing, got a "
                "forward that is run again; its result depends on the statistics before it"
            )
        check_parameter("weight", self.weight, (input.shape[1],), input)
        check_parameter("bias", self.bias, (input.shape[1],), input)
        check_number("eps", self.eps)
        dtype = _reference.accumulate_dtype(input.dtype)
        dims = (0, *range(2, input.dim()))
        m, v = (
            None if s is None else s.reshape(-1)
            for s in _reference.statistics(input.to(dtype), dims, MEAN_VAR)
        )
        assert m is not None and v is not None
        samples, values = input.shape[0], input.numel() // input.shape[1]
        a = 1 - (1 - (self.momentum or 0.0)) / math.sqrt(max(samples - 1, 1))
        count = (1 - a) * _running.snapshot(self.running_count) + a * values
        k = (a * values / count.clamp(min=torch.finfo(count.dtype).tiny)).to(dtype)
        old = _running.snapshot(mean, dtype)
        new_mean = old + k * (m - old)
        new_var = (1 - k) * _running.snapshot(var, dtype) + k * v + k * (1 - k) * (m - old).square()
        seen = _running.snapshot(self.num_samples) + samples
        code = activation_code(self.activation)
        seed = _layers.draw(input, self.dropout_p, True, None)
        call = NormCall(
            (0,) * 6, MEAN_VAR, self.eps, 0.0, code, self.dropout_p if seed is not None else 0.0
        )
        y = _channels.reference(
            input, 0, self.weight, self.bias, residual, (new_mean, self._clamp(new_var, seen)),
            seed, call, max(samples, 1), None,
        ).y  # fmt: skip
        with torch.no_grad():
            mean.copy_(new_mean)
            var.copy_(new_var)
            self.running_count.copy_(count)
            self.num_samples.copy_(seen)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        return y

    def _beyond_torch(self) -> str:
        return "statistics of several batches"

    def _clamp(self, var: Tensor, samples: Tensor) -> Tensor:
        """The variance is not believed to be small before enough samples were seen."""
        return torch.where(samples < self.warmup_samples, var.clamp(min=self.min_var), var)


class RunningBatchNorm1d(_RunningBatchNorm, torch.nn.BatchNorm1d):
    """Batch norm for small batches: running statistics normalize in training mode too.

    The statistics are averages over the last batches, with this batch in them and its gradient; see
    fastai's course v3 (Howard, 2019). A batch of one sample works. Training mode runs in plain
    PyTorch, evaluation mode on the kernels.

    Args:
        num_features, eps, affine, device, dtype, bias: as in `BatchNorm1d`.
        momentum: the weight of a new batch of N samples is
            ``1 - (1 - momentum) / sqrt(max(N - 1, 1))``.
        min_var, warmup_samples: before so many samples were seen, a variance below `min_var` counts
            as `min_var`.
        activation, dropout_p: as in `BatchNorm1d`.

    Shape:
        ``forward(input, residual=None)``: (N, C) or (N, C, L), and so is the result.

    The state_dict has `running_count` and `num_samples` beside torch's keys, and the running
    variance is biased.

    Raises:
        RuntimeError: run again by activation checkpointing in training mode: the result depends on
            statistics that the first run has replaced.

    Example:
        >>> norm = fastnorm.RunningBatchNorm1d(16)
        >>> norm(torch.randn(1, 16)).shape
        torch.Size([1, 16])
    """


class RunningBatchNorm2d(_RunningBatchNorm, torch.nn.BatchNorm2d):
    """`RunningBatchNorm1d` for images.

    Shape:
        ``forward(input, residual=None)``: (N, C, H, W), and so is the result.

    Example:
        >>> norm = fastnorm.RunningBatchNorm2d(16, activation="relu")
        >>> norm(torch.randn(2, 16, 8, 8)).shape
        torch.Size([2, 16, 8, 8])
    """
