"""RMS normalization (Zhang, Sennrich, "Root Mean Square Layer Normalization", 2019).

    y = dropout(activation(x / sqrt(mean(x^2) + eps) * (weight + weight_offset) + residual))

with the mean square of each sample over the trailing dimensions `normalized_shape`, or over one
dimension `dim`. eps is inside the root, and everything up to the result is float32 (float64 for
float64), as in `torch.nn.functional.rms_norm`; Hugging Face's Llama rounds to 16 bits before the
weight, which differs by one rounding, and in float32 not at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnorm import _build, _fx, _layers
from fastnorm._reference import MEAN_SQUARE
from fastnorm.epilogue import ACTIVATION_CODES, activation_code

__all__ = ["AddRMSNorm", "RMSNorm", "add_rms_norm", "rms_norm"]

_EPS = torch.finfo(torch.float32).eps
_EPS_DOUBLE = torch.finfo(torch.float64).eps


def default_eps(input: Tensor) -> float:
    """What torch uses for ``eps=None``: the spacing of the type the statistics are in."""
    return _EPS_DOUBLE if input.dtype == torch.float64 else _EPS


def rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dim: int | None = None,
    weight_offset: float = 0.0,
    activation: str | None = None,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """RMS norm with what usually follows it, in one pass.

    ``dropout(activation(input / sqrt(mean(input^2) + eps) * (weight + weight_offset)
    + residual))``, as `torch.nn.functional.rms_norm` defines the norm.

    Args:
        input: any shape that ends in `normalized_shape`; float32, float64, bfloat16 or float16. Any
            strides: a layout that is not dense is copied once.
        normalized_shape: the trailing sizes to normalize over; with `dim`, the size of that
            dimension.
        weight: of shape `normalized_shape`, optional; float32, bfloat16 or float16 in any
            combination with such an input, float64 with float64.
        eps: added to the mean square. None: the machine epsilon of float32 (of float64 for
            float64), which is what torch uses.
        dim: normalize over this one dimension instead, such as the channels (1) of an image in
            either memory format; nothing is permuted or copied.
        weight_offset: added to the weight in float32: 1.0 for models that store ``weight - 1``
            (Gemma).
        activation: one of "relu", "leaky_relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh".
        residual: added before the activation; shape and dtype of `input`.
        dropout_p: probability of dropping an element of the result, where `training`.
        generator: draws dropout's seed in place of the default generator.

    Returns:
        A tensor of the input's shape and dtype, with ``dim=1`` in its memory format and otherwise
        contiguous, as torch's. A float32 row whose squares overflow (beyond about 1e18) normalizes
        to zeros.

    Raises:
        RuntimeError: `normalized_shape` or `weight` does not fit the input, or lies on another
            device.
        ValueError: another activation, an `eps` that is not finite, a `residual` of another
            shape, or `dropout_p` outside [0, 1].
        TypeError: not a tensor, or a dtype that does not go with the input's.

    Example:
        >>> x = torch.randn(8, 128, 512)
        >>> fastnorm.rms_norm(x, (512,), torch.ones(512)).shape
        torch.Size([8, 128, 512])
    """
    if (
        dropout_p == 0.0
        and dim is None
        and not torch.compiler.is_compiling()
        and _build.module is not None
    ):
        code = ACTIVATION_CODES.get(activation, -1)
        y = _build.module.row_norm(
            input,
            normalized_shape,
            weight,
            None,
            eps,
            MEAN_SQUARE,
            weight_offset,
            code,
            residual,
        )
        if y is not None:
            return y
    if torch.overrides.has_torch_function((input, weight, residual)):
        return torch.overrides.handle_torch_function(
            rms_norm,
            (input, weight, residual),
            input,
            normalized_shape,
            weight,
            eps,
            dim=dim,
            weight_offset=weight_offset,
            activation=activation,
            residual=residual,
            dropout_p=dropout_p,
            training=training,
            generator=generator,
        )
    _layers.check_input(input)
    return _layers.layer(
        input,
        normalized_shape,
        weight,
        None,
        default_eps(input) if eps is None else eps,
        statistic=MEAN_SQUARE,
        weight_offset=weight_offset,
        dim=dim,
        activation=activation,
        residual=residual,
        dropout_p=dropout_p,
        training=training,
        generator=generator,
    )


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    dropout_p: float = 0.0,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Dropout, residual add and RMS norm of a transformer block, in one pass.

    ``residual_out = residual + dropout(input)`` and ``output = rms_norm(residual_out)``; both are
    differentiable.

    Args:
        input: any shape that ends in `normalized_shape`; float32, float64, bfloat16 or float16.
        residual: shape and dtype of `input`.
        normalized_shape, weight, eps, weight_offset: as in `rms_norm`.
        dropout_p: probability of dropping an element of `input`, where `training`.
        generator: draws dropout's seed in place of the default generator.

    Returns:
        ``(output, residual_out)``, of the input's shape and dtype. A 16-bit sum is rounded before
        it is normalized, as the separate operations would.

    Raises:
        RuntimeError, ValueError, TypeError: as `rms_norm`.

    Example:
        >>> x, residual = torch.randn(2, 4, 64, 512).unbind()
        >>> y, residual = fastnorm.add_rms_norm(x, residual, (512,), torch.ones(512))
    """
    if dropout_p == 0.0 and not torch.compiler.is_compiling() and _build.module is not None:
        both = _build.module.add_row_norm(
            input, residual, normalized_shape, weight, None, eps, MEAN_SQUARE, weight_offset
        )
        if both is not None:
            return both
    if torch.overrides.has_torch_function((input, residual, weight)):
        return torch.overrides.handle_torch_function(
            add_rms_norm,
            (input, residual, weight),
            input,
            residual,
            normalized_shape,
            weight,
            eps,
            weight_offset=weight_offset,
            dropout_p=dropout_p,
            training=training,
            generator=generator,
        )
    _layers.check_input(input)
    return _layers.add_layer(
        input,
        residual,
        normalized_shape,
        weight,
        None,
        default_eps(input) if eps is None else eps,
        statistic=MEAN_SQUARE,
        weight_offset=weight_offset,
        dropout_p=dropout_p,
        training=training,
        generator=generator,
    )


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` with a fused activation, residual add and dropout.

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: as in `torch.nn.RMSNorm`, with the
            same attributes and state_dict keys.
        dim: normalize over this dimension instead of the trailing ones (`rms_norm`).
        weight_offset: added to the weight, which then starts at ``1 - weight_offset``; see
            `rms_norm`.
        activation: applied to the result; see `rms_norm`.
        dropout_p: dropout after the activation, in training mode only.

    Shape:
        ``forward(input, residual=None)``: both (*, normalized_shape), and so is the result.

    Raises:
        ValueError: another activation, or `dropout_p` outside [0, 1].

    Example:
        >>> norm = fastnorm.RMSNorm(512, eps=1e-6)
        >>> norm(torch.randn(8, 512)).shape
        torch.Size([8, 512])
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        dim: int | None = None,
        weight_offset: float = 0.0,
        activation: str | None = None,
        dropout_p: float = 0.0,
    ) -> None:
        activation_code(activation)
        _layers.check_probability("dropout_p", dropout_p)
        self.weight_offset = weight_offset
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self.dim = dim
        self.activation = activation
        self.dropout_p = dropout_p

    def reset_parameters(self) -> None:
        _reset_weight(self)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if isinstance(input, _fx.Proxy):
            return _fx.leaf(self, input, residual)
        return rms_norm(
            input,
            self.normalized_shape,
            self.weight,
            self.eps,
            dim=self.dim,
            weight_offset=self.weight_offset,
            activation=self.activation,
            residual=residual,
            dropout_p=self.dropout_p if self.training else 0.0,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + _layers.extra_repr(self)


class AddRMSNorm(torch.nn.RMSNorm):
    """`add_rms_norm` as a module: ``forward(input, residual) -> (output, residual_out)``.

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: as in `torch.nn.RMSNorm`, with the
            same attributes and state_dict keys.
        weight_offset: added to the weight, which then starts at ``1 - weight_offset``.
        dropout_p: dropout of the input before the add, in training mode only.

    Raises:
        ValueError: `dropout_p` outside [0, 1].

    Example:
        >>> norm = fastnorm.AddRMSNorm(512, dropout_p=0.1)
        >>> y, residual = norm(torch.randn(8, 512), torch.randn(8, 512))
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        weight_offset: float = 0.0,
        dropout_p: float = 0.0,
    ) -> None:
        _layers.check_probability("dropout_p", dropout_p)
        self.weight_offset = weight_offset
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self.dropout_p = dropout_p

    def reset_parameters(self) -> None:
        _reset_weight(self)

    def forward(  # type: ignore[override]
        self, input: Tensor, residual: Tensor
    ) -> tuple[Tensor, Tensor]:
        if isinstance(input, _fx.Proxy):
            return _fx.leaf(self, input, residual)
        return add_rms_norm(
            input,
            residual,
            self.normalized_shape,
            self.weight,
            self.eps,
            weight_offset=self.weight_offset,
            dropout_p=self.dropout_p if self.training else 0.0,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + _layers.extra_repr(self)


def _reset_weight(module: RMSNorm | AddRMSNorm) -> None:
    if module.elementwise_affine:
        torch.nn.init.constant_(module.weight, 1.0 - module.weight_offset)
