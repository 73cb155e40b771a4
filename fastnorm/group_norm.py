"""Group normalization (Wu and He, "Group Normalization", 2018).

    y = dropout(activation((x - mean) / sqrt(var + eps) * weight + bias + residual))

with mean and (biased) variance of each sample over each of `num_groups` groups of channels and
every position.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from fastnorm import _build, _channels, _dtensor, _export, _fx, _layers
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
from fastnorm.epilogue import ACTIVATION_CODES, activation_code

__all__ = ["GroupNorm", "group_norm"]


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
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
    """Group norm with what usually follows it, in one pass.

    ``dropout(activation((input - mean) / sqrt(var + eps) * weight + bias + residual))``, as
    `torch.nn.functional.group_norm` defines the norm; var is biased.

    Args:
        input: (N, C, *); float32, float64, bfloat16 or float16. Contiguous and channels-last inputs
            are read as they are, any other layout is copied once.
        num_groups: divides C.
        weight, bias: (C,), each optional; float32, bfloat16 or float16 in any combination with such
            an input, float64 with float64.
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
        ValueError: one value per group; another activation, an `eps` that is not finite, a
            `residual`, `mask` or `lengths` of another shape, or `dropout_p` outside [0, 1].
        RuntimeError: C is no multiple of `num_groups`, the input has fewer than two dimensions, or
            `weight` or `bias` does not fit the channels or lies on another device.
        TypeError: not a tensor, or a dtype that does not go with the input's.

    Example:
        >>> x = torch.randn(2, 64, 32, 32)
        >>> weight, bias = torch.ones(64), torch.zeros(64)
        >>> fastnorm.group_norm(x, 8, weight, bias, activation="silu").shape
        torch.Size([2, 64, 32, 32])
    """
    if (
        not (training and dropout_p)
        and mask is None
        and lengths is None
        and num_groups is not None
        and not torch.compiler.is_compiling()
        and _build.module is not None
    ):
        code = ACTIVATION_CODES.get(activation, -1)
        y = _build.module.group_norm(input, num_groups, weight, bias, residual, eps, code)
        if y is not None:
            return y
    if torch.overrides.has_torch_function((input, weight, bias, residual)):
        return torch.overrides.handle_torch_function(
            group_norm,
            (input, weight, bias, residual),
            input,
            num_groups,
            weight,
            bias,
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
        raise RuntimeError(
            f"input: Expected at least 2 dimensions for input tensor but received {input.dim()}"
        )
    if not isinstance(num_groups, (int, torch.SymInt)) and isinstance(num_groups, numbers.Integral):
        num_groups = int(num_groups)  # NumPy's
    if isinstance(num_groups, bool) or not isinstance(num_groups, (int, torch.SymInt)):
        raise TypeError(f"num_groups: expected an int, got {type(num_groups).__name__}")
    channels = input.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise RuntimeError(
            f"num_groups: expected a divisor of the {channels} channels of the input, got "
            f"{num_groups}"
        )
    if input.numel() == num_groups:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {input.shape} "
            f"with {num_groups} groups"
        )
    if _dtensor.is_dtensor(input):
        if mask is not None or lengths is not None:
            raise NotImplementedError("mask, lengths: expected None with a DTensor input")
        return _dtensor.run(
            lambda x, r, w, b: group_norm(
                x, num_groups, w, b, eps, activation=activation, residual=r, dropout_p=dropout_p,
                training=training, generator=generator,
            ),
            range(1, input.dim()), input, residual, weight, bias,
        )  # fmt: skip
    check_parameter("weight", weight, (channels,), input)
    check_parameter("bias", bias, (channels,), input)
    check_residual(residual, input)
    eps = check_number("eps", eps)
    code = activation_code(activation)
    valid = _channels.read_mask(mask, lengths, input)
    if exporting() and valid is None and generator is None:
        check_probability("dropout_p", dropout_p)
        return _export.channels(
            input, num_groups, weight, bias, residual, eps, code, dropout_p if training else 0.0
        )
    seed = _layers.draw(input, dropout_p, training, generator)
    call = NormCall((0,) * 6, MEAN_VAR, eps, 0.0, code, dropout_p if seed is not None else 0.0)
    return _channels.norm(input, num_groups, weight, bias, residual, None, seed, call, mask=valid).y


class GroupNorm(torch.nn.GroupNorm):
    """`torch.nn.GroupNorm` with a fused activation, residual add and dropout, and masks.

    Args:
        num_groups, num_channels, eps, affine, device, dtype, bias: as in `torch.nn.GroupNorm`, with
            the same attributes and state_dict keys.
        activation: applied to the result; see `group_norm`.
        dropout_p: dropout after the activation, in training mode only.

    Shape:
        ``forward(input, residual=None, *, mask=None, lengths=None)``: input, residual and result
        are (N, C, *); mask (N, *) and lengths (N,) as in `group_norm`.

    Raises:
        ValueError: `num_channels` is no multiple of `num_groups`, another activation, or
            `dropout_p` outside [0, 1].

    Example:
        >>> norm = fastnorm.GroupNorm(8, 64, activation="silu")
        >>> norm(torch.randn(2, 64, 32, 32)).shape
        torch.Size([2, 64, 32, 32])
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        dropout_p: float = 0.0,
    ) -> None:
        activation_code(activation)
        _layers.check_probability("dropout_p", dropout_p)
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
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
        return group_norm(
            input,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            activation=self.activation,
            residual=residual,
            dropout_p=self.dropout_p if self.training else 0.0,
            mask=mask,
            lengths=lengths,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + _layers.extra_repr(self)
