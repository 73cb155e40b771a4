"""Instance normalization (Ulyanov, Vedaldi, Lempitsky, "Instance Normalization", 2016).

    y = dropout(activation((x - mean) / sqrt(var + eps) * weight + bias + residual))

with mean and (biased) variance of each channel of each sample over its positions.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.modules.instancenorm import _InstanceNorm as _TorchInstanceNorm

from fastnorm import _build, _channels, _dtensor, _export, _fx, _layers, _running
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

__all__ = ["InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d", "instance_norm"]


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    generator: torch.Generator | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
) -> Tensor:
    """Instance norm with what usually follows it, in one pass.

    ``dropout(activation((input - mean) / sqrt(var + eps) * weight + bias + residual))``, as
    `torch.nn.functional.instance_norm` defines the norm; var is biased.

    Args:
        input: (N, C, *); float32, float64, bfloat16 or float16. Contiguous and channels-last inputs
            are read as they are, any other layout is copied once.
        running_mean, running_var: (C,), both or neither. With `use_input_stats` they are updated
            after a forward that succeeded, by the averages over the samples of the mean and the
            unbiased variance; otherwise they normalize, as in batch norm.
        weight, bias: (C,), each optional; float32, bfloat16 or float16 in any combination with such
            an input, float64 with float64.
        use_input_stats: normalize each sample by its own statistics.
        momentum: weight of the new statistics in the running ones.
        eps: added to the variance.
        activation: one of "relu", "leaky_relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh".
        residual: added before the activation; shape and dtype of `input`.
        dropout_p: probability of dropping an element of the result, where `training`.
        generator: draws dropout's seed in place of the default generator.
        mask: (N, *), nonzero where a position counts. Positions that do not count enter no
            statistic; their output and gradients are 0. A mask of ones gives the bits of no mask
            (eagerly, for which its values are read; a compiled graph always takes the masked way).
        lengths: (N,) integers for an input (N, C, L): the first positions of each sample count.
            Takes the place of `mask`.

    Returns:
        A tensor of the input's shape, dtype and memory format. Statistics and sums are float32
        (float64 for float64).

    Raises:
        ValueError: one position, of any number of samples, with `use_input_stats`; another
            activation, an `eps` that is not finite, a `residual`, `mask` or `lengths` of another
            shape, or `dropout_p` outside [0, 1].
        RuntimeError: `weight`, `bias`, `running_mean` or `running_var` does not fit the channels,
            lies on another device, or is missing.
        TypeError: not a tensor, or a dtype that does not go with the input's.

    Example:
        >>> x = torch.randn(2, 64, 32, 32)
        >>> fastnorm.instance_norm(x, activation="relu").shape
        torch.Size([2, 64, 32, 32])
    """
    if (
        not (training and dropout_p)
        and mask is None
        and lengths is None
        and not torch.compiler.is_compiling()
        and _build.module is not None
    ):
        code = ACTIVATION_CODES.get(activation, -1)
        y = None
        if not use_input_stats:
            y = _build.module.batch_norm(
                input, running_mean, running_var, weight, bias, residual, None, None,
                False, False, momentum, eps, code, 0,
            )  # fmt: skip
        elif running_mean is None and running_var is None:
            y = _build.module.group_norm(input, None, weight, bias, residual, eps, code)
        if y is not None:
            return y
    tensors = (input, running_mean, running_var, weight, bias, residual)
    if torch.overrides.has_torch_function(tensors):
        return torch.overrides.handle_torch_function(
            instance_norm,
            tensors,
            input,
            running_mean,
            running_var,
            weight,
            bias,
            use_input_stats,
            momentum,
            eps,
            activation=activation,
            residual=residual,
            dropout_p=dropout_p,
            training=training,
            generator=generator,
            mask=mask,
            lengths=lengths,
        )
    check_input(input)
    if input.dim() < 2:
        raise IndexError(f"input: expected at least 2 dimensions, got shape {list(input.shape)}")
    channels = input.shape[1]
    if use_input_stats and _channels.spatial_numel(input) == 1:
        raise ValueError(
            "input: Expected more than 1 spatial element when training, got input size "
            f"{input.shape}"
        )
    _running.check_running(running_mean, running_var, channels, input)
    if not use_input_stats and running_mean is None:
        raise RuntimeError(
            "running_mean: Expected running_mean and running_var to be defined when "
            "use_input_stats is false, got None"
        )
    if _dtensor.is_dtensor(input):
        if mask is not None or lengths is not None:
            raise NotImplementedError("mask, lengths: expected None with a DTensor input")
        # Running statistics are averages over the samples.
        updates = use_input_stats and running_mean is not None
        return _dtensor.run(
            lambda x, r, w, b, mean, var: instance_norm(
                x, mean, var, w, b, use_input_stats, momentum, eps, activation=activation,
                residual=r, dropout_p=dropout_p, training=training, generator=generator,
            ),
            range(0 if updates else 1, input.dim() if use_input_stats else 2),
            input, residual, weight, bias, running_mean, running_var,
            names="weight, bias, running_mean, running_var",
        )  # fmt: skip
    check_parameter("weight", weight, (channels,), input)
    check_parameter("bias", bias, (channels,), input)
    check_residual(residual, input)
    eps = check_number("eps", eps)
    momentum = check_number("momentum", momentum)
    code = activation_code(activation)
    valid = _channels.read_mask(mask, lengths, input)
    if use_input_stats and running_mean is not None:
        _running.check_updatable(running_mean, input)
    if (
        exporting()
        and _export.is_updatable(input, running_mean, use_input_stats)
        and valid is None
        and generator is None
    ):
        check_probability("dropout_p", dropout_p)
        return _export.channels(
            input, channels, weight, bias, residual, eps, code, dropout_p if training else 0.0,
            running_mean, running_var, use_input_stats, momentum,
        )  # fmt: skip
    seed = _layers.draw(input, dropout_p, training, generator)
    call = NormCall((0,) * 6, MEAN_VAR, eps, 0.0, code, dropout_p if seed is not None else 0.0)
    if not use_input_stats:
        assert running_mean is not None and running_var is not None
        frozen = _running.frozen_statistics(
            running_mean, running_var, False, input, weight, bias, residual
        )
        return _channels.norm(input, 0, weight, bias, residual, frozen, seed, call, mask=valid).y
    out = _channels.norm(input, channels, weight, bias, residual, None, seed, call, mask=valid)
    if running_mean is not None and running_var is not None and input.numel() > 0:
        assert out.mean is not None and out.var is not None
        _running.update(
            running_mean, running_var, None, None,
            out.mean, out.var, out.counts, momentum, average=True,
        )  # fmt: skip
    return out.y


class _InstanceNorm(RunningStatistics, _TorchInstanceNorm):
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        dropout_p: float = 0.0,
    ) -> None:
        activation_code(activation)
        _layers.check_probability("dropout_p", dropout_p)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self._init_running()
        self.activation = activation
        self.dropout_p = dropout_p

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
        unbatched = input.dim() == self._get_no_batch_dim()
        channels = input.size(0 if unbatched else 1)
        if channels != self.num_features:
            if self.affine:
                raise ValueError(
                    f"input: expected input's size at dim={0 if unbatched else 1} to match "
                    f"num_features ({self.num_features}), but got: {channels}."
                )
            warnings.warn(
                f"input's size at dim={0 if unbatched else 1} does not match num_features. "
                "You can silence this warning by not passing in num_features, "
                "which is not used because affine=False",
                stacklevel=2,
            )
        if unbatched:
            input = input.unsqueeze(0)
            residual = None if residual is None else residual.unsqueeze(0)
            mask = None if mask is None else mask.unsqueeze(0)
        use_input, update = self._mode(self.running_mean)
        running = not use_input or update
        y = instance_norm(
            input,
            self.running_mean if running else None,
            self.running_var if running else None,
            self.weight,
            self.bias,
            use_input,
            self.momentum if self.momentum is not None else 0.0,
            self.eps,
            activation=self.activation,
            residual=residual,
            dropout_p=self.dropout_p if self.training else 0.0,
            mask=mask,
            lengths=lengths,
        )
        if update and not use_input:
            with torch.no_grad():
                instance_norm(
                    input, self.running_mean, self.running_var, None, None, True,
                    self.momentum if self.momentum is not None else 0.0, 1.0, mask=mask,
                    lengths=lengths,
                )  # fmt: skip
        return y.squeeze(0) if unbatched else y

    def extra_repr(self) -> str:
        return super().extra_repr() + _running.extra_repr(self)


class InstanceNorm1d(_InstanceNorm, torch.nn.InstanceNorm1d):
    """`torch.nn.InstanceNorm1d` with a fused activation, residual add and dropout, and masks.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: as in
            `torch.nn.InstanceNorm1d`, with the same defaults, attributes and state_dict keys.
        activation: applied to the result; see `instance_norm`.
        dropout_p: dropout after the activation, in training mode only.

    Shape:
        ``forward(input, residual=None, *, mask=None, lengths=None)``: input, residual and result
        are (N, C, L) or (C, L); mask (N, L) or (L,) and lengths (N,) as in `instance_norm`.

    By default there are no running statistics: evaluation mode gives the bits of training mode.
    With `track_running_stats`, evaluation mode normalizes all samples by the running statistics,
    as torch's module does.

    Raises:
        ValueError: another activation, or `dropout_p` outside [0, 1]; in forward as
            `instance_norm`, and for another number of dimensions or, with `affine`, channels.

    Example:
        >>> norm = fastnorm.InstanceNorm1d(16, affine=True, activation="relu")
        >>> norm(torch.randn(8, 16, 100)).shape
        torch.Size([8, 16, 100])
    """


class InstanceNorm2d(_InstanceNorm, torch.nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d` with a fused activation, residual add and dropout, and masks.

    Arguments, attributes and errors are those of `InstanceNorm1d`.

    Shape:
        ``forward(input, residual=None, *, mask=None)``: input, residual and result are
        (N, C, H, W), contiguous or channels-last, or (C, H, W); mask is (N, H, W) or (H, W).

    Example:
        >>> norm = fastnorm.InstanceNorm2d(16, activation="relu")
        >>> norm(torch.randn(8, 16, 32, 32)).shape
        torch.Size([8, 16, 32, 32])
    """


class InstanceNorm3d(_InstanceNorm, torch.nn.InstanceNorm3d):
    """`torch.nn.InstanceNorm3d` with a fused activation, residual add and dropout, and masks.

    Arguments, attributes and errors are those of `InstanceNorm1d`.

    Shape:
        ``forward(input, residual=None, *, mask=None)``: input, residual and result are
        (N, C, D, H, W), contiguous or channels-last, or (C, D, H, W).

    Example:
        >>> norm = fastnorm.InstanceNorm3d(16)
        >>> norm(torch.randn(2, 16, 4, 8, 8)).shape
        torch.Size([2, 16, 4, 8, 8])
    """
