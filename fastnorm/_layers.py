"""What layer and RMS norm share: trailing dimensions, one dimension, the fused residual add."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnorm import _dtensor, _export, _ops, _philox, _reference
from fastnorm._checks import (
    check_generator,
    check_input,
    check_number,
    check_parameter,
    check_probability,
    check_residual,
    exporting,
)
from fastnorm._ops import NormCall
from fastnorm.epilogue import activation_code


def normalized_tuple(normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(normalized_shape, int):
        return (normalized_shape,)
    try:
        return tuple(operator.index(size) for size in normalized_shape)
    except TypeError:
        raise TypeError(
            f"normalized_shape: expected an int or a sequence of int, got {normalized_shape!r}"
        ) from None


def check_normalized(input: Tensor, shape: tuple[int, ...], dim: int | None) -> int:
    """Checks `normalized_shape` against the input; returns `dim`, from 0, or -1 for trailing."""
    if dim is None:
        if not shape or tuple(input.shape[max(input.dim() - len(shape), 0) :]) != shape:
            raise RuntimeError(
                f"normalized_shape: expected an input of shape [*, "
                f"{', '.join(map(str, shape))}], got {list(input.shape)}"
            )
        return -1
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"dim: expected an int or None, got {type(dim).__name__}")
    if not -input.dim() <= dim < input.dim():
        raise IndexError(
            f"dim: expected a dimension of the {input.dim()}-dimensional input, got {dim}"
        )
    dim %= input.dim()
    if shape != (input.shape[dim],):
        raise RuntimeError(
            f"normalized_shape: expected the input's size along dim {dim}, "
            f"[{input.shape[dim]}], got {list(shape)}"
        )
    return -1 if dim == input.dim() - 1 else dim


def normalized_dims(shape: tuple[int, ...], dim: int | None) -> Sequence[int]:
    return range(-len(shape), 0) if dim is None else (dim,)


def channels_last(x: Tensor) -> bool:
    """Dense, with dimension 1 innermost in memory."""
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)


def view_of(x: Tensor, shape: tuple[int, ...], dim: int) -> tuple[Tensor, _ops.View]:
    """`x`, made dense if it is not, and the view that normalizes it over `shape` or `dim`."""
    if dim == 1 and channels_last(x) and not x.is_contiguous():
        return x, _ops.row_view(x.numel() // max(shape[0], 1), shape[0])
    x = _ops.contiguous("input", x)
    n = math.prod(shape)
    if dim < 0:
        return x, _ops.row_view(x.numel() // n if n else 0, n)
    kept = math.prod(x.shape[dim + 1 :])
    return x, (math.prod(x.shape[:dim]), n, kept, 1, 0, n)


def reference(
    x: Tensor,
    shape: tuple[int, ...],
    dim: int,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    call: NormCall,
) -> Tensor:
    """Layer and RMS norm in plain PyTorch; `dim` < 0 means the trailing dimensions of `shape`."""
    dims = range(x.dim() - len(shape), x.dim()) if dim < 0 else (dim,)
    if dim >= 0:
        spread = (-1,) + (1,) * (x.dim() - dim - 1)
        weight, bias = (None if p is None else p.reshape(spread) for p in (weight, bias))
    wide = x.to(_reference.accumulate_dtype(x.dtype))
    mean, var = _reference.statistics(wide, tuple(dims), call.statistic)
    pre = _reference.normalize(
        wide, mean, var, weight, bias, eps=call.eps, weight_offset=call.weight_offset
    )
    ordered = x if dim == 1 and channels_last(x) and not x.is_contiguous() else None
    keep, scale = _reference.keep_like(x, ordered, seed, call.dropout_p)
    return _reference.finish(pre, residual, call.activation, keep, scale).to(x.dtype)


def draw(
    input: Tensor, p: float, training: bool, generator: torch.Generator | None
) -> Tensor | None:
    """A seed where something is to be dropped; None, and nothing drawn, otherwise."""
    check_probability("dropout_p", p)
    check_generator(generator, input)
    return _philox.draw_seed(input, generator) if training and p > 0 else None


def layer(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    statistic: int,
    weight_offset: float,
    dim: int | None,
    activation: str | None,
    residual: Tensor | None,
    dropout_p: float,
    training: bool,
    generator: torch.Generator | None,
) -> Tensor:
    """Everything that the eager entry leaves: validation, layout, choice of implementation."""
    check_input(input)
    shape = normalized_tuple(normalized_shape)
    axis = check_normalized(input, shape, dim)
    if _dtensor.is_dtensor(input):

        def local(x: Tensor, r: Tensor | None, w: Tensor | None, b: Tensor | None) -> Tensor:
            return layer(
                x, shape, w, b, eps, statistic=statistic, weight_offset=weight_offset, dim=dim,
                activation=activation, residual=r, dropout_p=dropout_p, training=training,
                generator=generator,
            )  # fmt: skip

        return _dtensor.run(local, normalized_dims(shape, dim), input, residual, weight, bias)
    check_parameter("weight", weight, shape, input)
    check_parameter("bias", bias, shape, input)
    check_residual(residual, input)
    eps = check_number("eps", eps)
    code = activation_code(activation)
    if exporting() and generator is None:
        check_probability("dropout_p", dropout_p)
        return _export.layer(
            input, shape, axis, weight, bias, residual, statistic, eps, weight_offset, code,
            dropout_p if training else 0.0,
        )  # fmt: skip
    seed = draw(input, dropout_p, training, generator)
    call = NormCall(
        (0,) * 6, statistic, eps, weight_offset, code, dropout_p if seed is not None else 0.0
    )
    if not _ops.use_kernel(input, weight, bias, residual):
        return reference(input, shape, axis, weight, bias, residual, seed, call)
    x, view = view_of(input, shape, axis)
    if residual is not None:
        residual = _ops.laid_out(residual, x)
    return _ops.norm(
        x, dense(weight), dense(bias), residual, None, None, seed, call._replace(view=view)
    )[0]


def add_layer(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    statistic: int,
    weight_offset: float,
    dropout_p: float,
    training: bool,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    check_input(input)
    shape = normalized_tuple(normalized_shape)
    check_normalized(input, shape, None)
    if residual is None:
        raise TypeError("residual: expected a tensor, got None")
    if _dtensor.is_dtensor(input):

        def local(
            x: Tensor, r: Tensor, w: Tensor | None, b: Tensor | None
        ) -> tuple[Tensor, Tensor]:
            return add_layer(
                x, r, shape, w, b, eps, statistic=statistic, weight_offset=weight_offset,
                dropout_p=dropout_p, training=training, generator=generator,
            )  # fmt: skip

        return _dtensor.run(local, normalized_dims(shape, None), input, residual, weight, bias)
    check_residual(residual, input)
    check_parameter("weight", weight, shape, input)
    check_parameter("bias", bias, shape, input)
    eps = check_number("eps", eps)
    if exporting() and generator is None:
        check_probability("dropout_p", dropout_p)
        total = residual + (F.dropout(input, dropout_p) if training and dropout_p else input)
        y = _export.layer(
            total, shape, -1, weight, bias, None, statistic, eps, weight_offset, 0, 0.0
        )
        return y, total
    seed = draw(input, dropout_p, training, generator)
    n = math.prod(shape)
    view = _ops.row_view(input.numel() // n if n else 0, n)
    call = NormCall(view, statistic, eps, weight_offset, 0, dropout_p if seed is not None else 0.0)
    if not _ops.use_kernel(input, residual, weight, bias):
        dropped = input
        if seed is not None:
            keep = _philox.keep_mask(input.numel(), seed, dropout_p).view(input.shape)
            wide = input.to(_reference.accumulate_dtype(input.dtype))
            dropped = _reference.drop(wide, keep, _philox.scale(dropout_p))
        total = (residual + dropped).to(input.dtype)
        plain = call._replace(dropout_p=0.0)
        return reference(total, shape, -1, weight, bias, None, None, plain), total
    return _ops.add_norm(
        _ops.contiguous("input", input),
        _ops.contiguous("residual", residual),
        dense(weight),
        dense(bias),
        seed,
        call,
    )


def dense(p: Tensor | None) -> Tensor | None:
    return None if p is None else _ops.contiguous("weight or bias", p)


def extra_repr(module: torch.nn.Module) -> str:
    """The arguments that torch's module does not have, where they are not the defaults."""
    parts = []
    for name, default in (
        ("weight_offset", 0.0),
        ("dim", None),
        ("activation", None),
        ("dropout_p", 0.0),
    ):
        value = getattr(module, name, default)
        if value != default:
            parts.append(f", {name}={value!r}")
    return "".join(parts)
