"""Layer normalization (Ba, Kiros, Hinton, "Layer Normalization", 2016).

    y = dropout(activation((x - mean) / sqrt(var + eps) * weight + bias + residual))

with mean and (biased) variance of each sample over the trailing dimensions `normalized_shape`, or
over one dimension `dim`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnorm import _build, _fx, _layers
from fastnorm._reference import MEAN_VAR
from fastnorm.epilogue import ACTIVATION_CODES, activation_code

__all__ = ["AddLayerNorm", "LayerNorm", "add_layer_norm", "layer_norm"]


def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dim: int | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Layer norm with what usually follows it, in one pass.

    ``dropout(activation((input - mean) / sqrt(var + eps) * weight + bias + residual))``, as
    `torch.nn.functional.layer_norm` defines the norm; var is biased.

    Args:
        input: any shape that ends in `normalized_shape`; float32, float64, bfloat16 or float16. Any
            strides: a layout that is not dense is copied once.
        normalized_shape: the trailing sizes to normalize over; with `dim`, the size of that
            dimension.
        weight, bias: of shape `normalized_shape`, each optional; float32, bfloat16 or float16 in
            any combination with such an input, float64 with float64.
        eps: added to the variance.
        dim: normalize over this one dimension instead, such as the channels (1) of an image in
            either memory format; nothing is permuted or copied.
        activation: one of "relu", "leaky_relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh".
        residual: added before the activation; shape and dtype of `input`.
        dropout_p: probability of dropping an element of the result, where `training`.
        generator: draws dropout's seed in place of the default generator.

    Returns:
        A tensor of the input's shape and dtype, with ``dim=1`` in its memory format and otherwise
        contiguous, as torch's. Statistics and sums are float32 (float64 for float64).

    Raises:
        RuntimeError: `normalized_shape`, `weight` or `bias` does not fit the input, or lies on
            another device.
        ValueError: another activation, an `eps` that is not finite, a `residual` of another
            shape, or `dropout_p` outside [0, 1].
        TypeError: not a tensor, or a dtype that does not go with the input's.

    Example:
        >>> x = torch.randn(8, 128, 512)
        >>> weight, bias = torch.ones(512), torch.zeros(512)
        >>> fastnorm.layer_norm(x, (512,), weight, bias, activation="gelu").shape
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
            input, normalized_shape, weight, bias, eps, MEAN_VAR, 0.0, code, residual
        )
        if y is not None:
            return y
    if torch.overrides.has_torch_function((input, weight, bias, residual)):
        return torch.overrides.handle_torch_function(
            layer_norm,
            (input, weight, bias, residual),
            input,
            normalized_shape,
            weight,
            bias,
            eps,
            dim=dim,
            activation=activation,
            residual=residual,
            dropout_p=dropout_p,
            training=training,
            generator=generator,
        )
    return _layers.layer(
        input,
        normalized_shape,
        weight,
        bias,
        eps,
        statistic=MEAN_VAR,
        weight_offset=0.0,
        dim=dim,
        activation=activation,
        residual=residual,
        dropout_p=dropout_p,
        training=training,
        generator=generator,
    )


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Dropout, residual add and layer norm of a transformer block, in one pass.

    ``residual_out = residual + dropout(input)`` and ``output = layer_norm(residual_out)``; both are
    differentiable.

    Args:
        input: any shape that ends in `normalized_shape`; float32, float64, bfloat16 or float16.
        residual: shape and dtype of `input`.
        normalized_shape, weight, bias, eps: as in `layer_norm`.
        dropout_p: probability of dropping an element of `input`, where `training`.
        generator: draws dropout's seed in place of the default generator.

    Returns:
        ``(output, residual_out)``, of the input's shape and dtype. A 16-bit sum is rounded before
        it is normalized, as the separate operations would.

    Raises:
        RuntimeError, ValueError, TypeError: as `layer_norm`.

    Example:
        >>> x, residual = torch.randn(2, 4, 64, 512).unbind()
        >>> y, residual = fastnorm.add_layer_norm(x, residual, (512,), dropout_p=0.1)
    """
    if dropout_p == 0.0 and not torch.compiler.is_compiling() and _build.module is not None:
        both = _build.module.add_row_norm(
            input, residual, normalized_shape, weight, bias, eps, MEAN_VAR, 0.0
        )
        if both is not None:
            return both
    if torch.overrides.has_torch_function((input, residual, weight, bias)):
        return torch.overrides.handle_torch_function(
            add_layer_norm,
            (input, residual, weight, bias),
            input,
            residual,
            normalized_shape,
            weight,
            bias,
            eps,
            dropout_p=dropout_p,
            training=training,
            generator=generator,
        )
    return _layers.add_layer(
        input,
        residual,
        normalized_shape,
        weight,
        bias,
        eps,
        statistic=MEAN_VAR,
        weight_offset=0.0,
        dropout_p=dropout_p,
        training=training,
        generator=generator,
    )


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` with a fused activation, residual add and dropout.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as in `torch.nn.LayerNorm`,
            with the same attributes and state_dict keys.
        dim: normalize over this dimension instead of the trailing ones (`layer_norm`).
        activation: applied to the result; see `layer_norm`.
        dropout_p: dropout after the activation, in training mode only.

    Shape:
        ``forward(input, residual=None)``: both (*, normalized_shape), and so is the result.

    Raises:
        ValueError: another activation, or `dropout_p` outside [0, 1].

    Example:
        >>> norm = fastnorm.LayerNorm(512, activation="gelu")
        >>> norm(torch.randn(8, 512)).shape
        torch.Size([8, 512])
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        dim: int | None = None,
        activation: str | None = None,
        dropout_p: float = 0.0,
    ) -> None:
        activation_code(activation)
        _layers.check_probability("dropout_p", dropout_p)
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.dim = dim
        self.activation = activation
        self.dropout_p = dropout_p

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if isinstance(input, _fx.Proxy):
            return _fx.leaf(self, input, residual)
        return layer_norm(
            input,
            self.normalized_shape,
            self.weight,
            self.bias,
            self.eps,
            dim=self.dim,
            activation=self.activation,
            residual=residual,
            dropout_p=self.dropout_p if self.training else 0.0,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + _layers.extra_repr(self)


class AddLayerNorm(torch.nn.LayerNorm):
    """`add_layer_norm` as a module: ``forward(input, residual) -> (output, residual_out)``.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as in `torch.nn.LayerNorm`,
            with the same attributes and state_dict keys.
        dropout_p: dropout of the input before the add, in training mode only.

    Raises:
        ValueError: `dropout_p` outside [0, 1].

    Example:
        >>> norm = fastnorm.AddLayerNorm(512, dropout_p=0.1)
        >>> y, residual = norm(torch.randn(8, 512), torch.randn(8, 512))
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        dropout_p: float = 0.0,
    ) -> None:
        _layers.check_probability("dropout_p", dropout_p)
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.dropout_p = dropout_p

    def forward(  # type: ignore[override]
        self, input: Tensor, residual: Tensor
    ) -> tuple[Tensor, Tensor]:
        if isinstance(input, _fx.Proxy):
            return _fx.leaf(self, input, residual)
        return add_layer_norm(
            input,
            residual,
            self.normalized_shape,
            self.weight,
            self.bias,
            self.eps,
            dropout_p=self.dropout_p if self.training else 0.0,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + _layers.extra_repr(self)
