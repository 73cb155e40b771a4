"""Dropout (Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting",
JMLR 2014) and its relatives, with the work that surrounds it in the same pass.

    y = residual + dropout(activation(input + bias)),   dropout(h) = keep ? h / (1 - p) : 0

`p` is the probability of dropping. An element is kept when 16 random bits are below
``t = round((1 - p) * 65536)``, and scaled by ``65536 / t``, so that the expectation is exact for
the probability really used. The bits are Philox4x32-10 of the element's position in the memory of
the (dense) input and a seed: one int64 that is drawn from the generator for each call. A mask is
thus the same in the kernels of every device, in this file's plain PyTorch, in a compiled graph and
in a recomputation under checkpointing, and the seed alone is saved for the backward pass.

The channel variants, stochastic depth and `Dropout(shared_dims=...)` differ in one thing: which
dimensions share their mask. See docs/dropout.md.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnorm import _build, _dtensor, _ops, _philox, _reference
from fastnorm._checks import check_device, check_input, check_probability, exporting
from fastnorm._reference import accumulate_dtype
from fastnorm.epilogue import ACTIVATION_CODES, FUNCTIONS, activation_code

__all__ = [
    "AlphaDropout",
    "DropPath",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "FeatureAlphaDropout",
    "StochasticDepth",
    "alpha_dropout",
    "drop_path_rates",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "feature_alpha_dropout",
    "stochastic_depth",
]

# The numbers of csrc/common/dropout.h: kept elements are divided by the keep probability, stay as
# they are, or take part in alpha dropout's affine map.
SCALED, MASK_ONLY, ALPHA = 0, 1, 2

# -lambda * alpha of SELU (Klambauer et al., "Self-normalizing neural networks", NIPS 2017).
_SELU_LIMIT = -1.7580993408473766


# ---------------------------------------------------------------------------------------------
# Reference
# ---------------------------------------------------------------------------------------------


def coefficients(p: float, kind: int) -> tuple[float, float, float]:
    """``(scale, shift, dropped)`` of ``keep ? scale * h + shift : dropped``."""
    keep = _philox.threshold(p) / 65536.0
    if keep == 0.0:
        return 0.0, 0.0, 0.0
    if kind == MASK_ONLY:
        return 1.0, 0.0, 0.0
    if kind == SCALED:
        return 1.0 / keep, 0.0, 0.0
    # Mean 0 and variance 1 are kept: Klambauer et al., section 3, "New dropout technique".
    scale = 1.0 / math.sqrt(keep + _SELU_LIMIT**2 * keep * (1.0 - keep))
    shift = -scale * _SELU_LIMIT * (1.0 - keep)
    return scale, shift, scale * _SELU_LIMIT + shift


def is_dense(x: Tensor) -> bool:
    """Whether the elements of `x` fill a stretch of memory, each once."""
    expected = 1
    for d in reversed(_reference.memory_order(x)):
        if x.shape[d] != 1:
            if x.stride(d) != expected:
                return False
            expected = expected * x.shape[d]
    return True


def _order(x: Tensor) -> list[int]:
    """The dimensions by which a mask counts the elements of `x`, the outermost first."""
    return _reference.memory_order(x) if is_dense(x) else list(range(x.dim()))


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def keep_mask(x: Tensor, seed: Tensor, p: float, shared: int = 0) -> Tensor:
    """Which elements of `x` are kept: bool, of size 1 in each dimension of the bit set `shared`."""
    order = _order(x)
    sizes = [1 if shared >> d & 1 else x.shape[d] for d in order]
    flat = _philox.keep_mask(math.prod(sizes), seed, p)
    return flat.reshape(sizes).permute(_inverse(order))


def dropout_reference(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    p: float,
    kind: int = SCALED,
    shared: int = 0,
    activation: int = 0,
) -> Tensor:
    """The definition of every function here, in plain PyTorch and differentiable to any order."""
    h = x.to(accumulate_dtype(x.dtype))
    if bias is not None:
        h = h + bias
    keep = None if seed is None else keep_mask(x, seed, p, shared)
    if activation and keep is not None:
        # A dropped infinity would make 0 * nan of the activation's derivative.
        h = torch.where(keep, h, 0.0)
    h = FUNCTIONS[activation](h)
    if keep is not None:
        scale, shift, dropped = coefficients(p, kind)
        kept = h * scale + shift if shift else h * scale
        h = torch.where(keep, kept, dropped)
    if residual is not None:
        h = h + residual
    return h.to(x.dtype)


def _masked(grad: Tensor, seed: Tensor | None, p: float, kind: int, shared: int) -> Tensor:
    """``keep ? scale * grad : 0``, for a gradient in the memory order of the input."""
    if seed is None:
        return grad
    scale = coefficients(p, kind)[0]
    wide = grad.to(accumulate_dtype(grad.dtype)) * scale
    return torch.where(keep_mask(grad, seed, p, shared), wide, 0.0).to(grad.dtype)


def _reference_vjp(
    grad: Tensor,
    x: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    activation: int,
    p: float,
) -> list[Tensor | None]:
    """Gradients of x and bias through an activation, as a differentiable function.

    Called by the C++ node, and by `DropoutFunction`, when a backward pass is itself recorded.
    """
    with torch.enable_grad():
        # Views: one may be computed from the other, and that path is the engine's to follow.
        x, bias = x.view_as(x), None if bias is None else bias.view_as(bias)
        y = dropout_reference(x, bias, None, seed, p, activation=activation)
        inputs = (x, bias)
        sources = [t for t in inputs if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(y, sources, grad, create_graph=True))
        return [next(found) if t is not None and t.requires_grad else None for t in inputs]


# ---------------------------------------------------------------------------------------------
# Kernel, under torch.compile
# ---------------------------------------------------------------------------------------------


def mask_view(x: Tensor, shared: int) -> tuple[int, int, int] | None:
    """(outer, shared, inner) of csrc/common/dropout.h for a dense `x`; None where the shared
    dimensions do not lie next to each other in memory."""
    if not shared:
        return (x.numel(), 1, 1)
    view = [1, 1, 1]
    stretch = 0
    for d in _reference.memory_order(x):
        if x.shape[d] == 1:
            continue
        if shared >> d & 1:
            if stretch == 2:
                return None
            stretch = 1
        elif stretch == 1:
            stretch = 2
        view[stretch] = view[stretch] * x.shape[d]
    return (view[0], view[1], view[2])


class DropoutFunction(torch.autograd.Function):
    """The operators with autograd, for torch.compile; eager mode has this in C++."""

    @staticmethod
    def forward(ctx: Any, x, bias, residual, seed, view, activation, p, kind, shared):  # type: ignore[no-untyped-def]
        ctx.order = _order(x)
        ctx.activation, ctx.p, ctx.kind, ctx.shared, ctx.view = activation, p, kind, shared, view
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x if activation else None, bias if activation else None, seed)
        return torch.ops.fastnorm.dropout_fwd(x, bias, residual, seed, view, activation, p, kind)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[no-untyped-def]
        x, bias, seed = ctx.saved_tensors
        ordered = grad.permute(ctx.order).contiguous().permute(_inverse(ctx.order))
        dx: Tensor | None
        db: Tensor | None = None
        if not ctx.activation:
            if torch.is_grad_enabled():
                dx = _masked(ordered, seed, ctx.p, ctx.kind, ctx.shared)
            else:
                dx = torch.ops.fastnorm.dropout_bwd(
                    ordered, None, None, seed, ctx.view, 0, ctx.p, ctx.kind
                )
        elif torch.is_grad_enabled():
            dx, db = _reference_vjp(ordered, x, bias, seed, ctx.activation, ctx.p)
        else:
            dx = torch.ops.fastnorm.dropout_bwd(
                ordered, x, bias, seed, ctx.view, ctx.activation, ctx.p, ctx.kind
            )
        if ctx.has_bias and ctx.needs_input_grad[1] and db is None:
            assert dx is not None
            db = dx.reshape(-1, dx.shape[-1]).sum(0)
        residual = grad if ctx.needs_input_grad[2] else None
        return dx, db, residual, None, None, None, None, None, None


# ---------------------------------------------------------------------------------------------
# Functions
# ---------------------------------------------------------------------------------------------


def check_generator(generator: object, input: Tensor) -> None:
    """`generator` is None or draws on the input's device."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator: expected a torch.Generator or None, got {type(generator).__name__}"
        )
    if generator.device.type != input.device.type:
        raise RuntimeError(
            f"generator: expected one of the input's device {input.device}, got one of "
            f"{generator.device}"
        )


def check_inplace(input: Tensor) -> None:
    if torch.is_grad_enabled() and input.requires_grad and input.is_leaf:
        raise RuntimeError(
            "inplace: expected an input that autograd lets us overwrite, got a leaf Variable that "
            "requires grad, which must not be used in an in-place operation"
        )
    # What else copy_ would find, but after a seed was drawn.
    if torch.compiler.is_compiling() or not _ops.is_plain(input):
        return
    base = input._base
    if torch.is_grad_enabled() and base is not None and base.is_leaf and base.requires_grad:
        raise RuntimeError(
            "inplace: expected an input that autograd lets us overwrite, got a view of a leaf "
            "Variable that requires grad, which must not be used in an in-place operation"
        )
    if torch._debug_has_internal_overlap(input) == 1:
        raise RuntimeError(
            "inplace: expected an input whose elements lie apart, got strides "
            f"{tuple(input.stride())} for shape {list(input.shape)}; clone() it first"
        )
    if input.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            "inplace: expected a normal tensor outside inference mode, got an inference tensor"
        )


def _check_operand(argument: str, value: object, shape: Sequence[int], input: Tensor) -> None:
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}: expected a tensor or None, got {type(value).__name__}")
    if tuple(value.shape) != tuple(shape):
        raise RuntimeError(f"{argument}: expected shape {list(shape)}, got {list(value.shape)}")
    if not value.is_floating_point():
        raise TypeError(f"{argument}: expected a floating-point dtype, got {value.dtype}")
    check_device(argument, value, input)


def _general(
    input: Tensor,
    p: float,
    training: bool,
    inplace: bool,
    *,
    kind: int = SCALED,
    shared: int = 0,
    activation: str | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Everything that the eager entry leaves: checks, layout, choice of implementation."""
    check_probability("p", p)
    code = activation_code(activation)
    drops = training and p > 0.0
    if not drops and not code and bias is None and residual is None and isinstance(input, Tensor):
        check_generator(generator, input)
        return input  # of any dtype, as torch does
    check_input(input)
    if _dtensor.is_dtensor(input):
        if inplace or bias is not None:
            raise NotImplementedError("inplace, bias: expected neither with a DTensor input")
        return _dtensor.run(
            lambda x, r: _general(
                x, p, training, False, kind=kind, shared=shared, activation=activation,
                residual=r, generator=generator,
            ),
            (), input, residual, shared=shared,
        )  # fmt: skip
    if bias is not None:
        _check_operand("bias", bias, input.shape[-1:] if input.dim() else (1,), input)
    _check_operand("residual", residual, input.shape, input)
    check_generator(generator, input)
    if inplace:
        check_inplace(input)
        # The input is overwritten, but its old values are what an activation's gradient needs.
        result = _general(
            input.clone() if code else input, p, training, False, kind=kind, shared=shared,
            activation=activation, bias=bias, residual=residual, generator=generator,
        )  # fmt: skip
        return input.copy_(result)
    if exporting() and drops and generator is None and kind == SCALED:
        # As an exported graph's own runtime draws: torch's functions, see fastnorm/_export.py.
        feature = shared and shared == _feature_bits(input, False)
        if not shared or feature:
            h = FUNCTIONS[code](input if bias is None else input + bias)
            y = torch.feature_dropout(h, p, True) if feature else F.dropout(h, p)
            return y if residual is None else y + residual
    x = input
    if bias is not None and (bias.dtype != x.dtype or not x.is_contiguous()):
        x, bias = x + bias, None
    fused = residual if residual is not None and residual.dtype == x.dtype else None
    seed = _philox.draw_seed(x, generator) if drops else None
    p = float(p) if drops else 0.0
    y = _dispatch(x, bias, fused, seed, p, kind, shared if drops else 0, code)
    return y if residual is None or fused is not None else y + residual


def _use_kernel(x: Tensor, *others: Tensor | None) -> bool:
    # What a compiler makes of Philox in int64 is slower than the operator by far
    # (benchmarks/bench_compile.py), and would save masks in place of seeds.
    if torch.compiler.is_compiling():
        return _ops.keeps_operator(x, True)
    return _ops.use_kernel(x, *others)


def _dispatch(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    p: float,
    kind: int,
    shared: int,
    activation: int,
) -> Tensor:
    if x.numel() and _use_kernel(x, bias, residual):
        x = x if is_dense(x) else _ops.contiguous("input", x)
        view = mask_view(x, shared)
        if view is not None:
            if residual is not None:
                residual = _ops.laid_out(residual, x)
            bias = None if bias is None else bias.contiguous()
            if torch.compiler.is_compiling():
                # Dynamo does not take one tensor as two inputs of a Function.
                if residual is x:
                    residual = residual.view_as(residual)
                if bias is x:
                    bias = bias.view_as(bias)
                return DropoutFunction.apply(
                    x, bias, residual, seed, view, activation, p, kind, shared
                )
            assert _build.module is not None
            _ops.note(lambda: _ops.describe("dropout", x))
            return _build.module.prepared_dropout(
                x, bias, residual, seed, view, activation, p, kind
            )
    return dropout_reference(x, bias, residual, seed, p, kind, shared, activation)


def _call(function: Callable[..., Tensor], input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`function` of a tensor that overrides torch's functions."""
    return torch.overrides.handle_torch_function(function, (input,), input, *args, **kwargs)


def _shared_dropout(
    input: Tensor,
    p: float,
    training: bool,
    inplace: bool,
    kind: int,
    shared: int,
    residual: Tensor | None,
    generator: torch.Generator | None,
) -> Tensor:
    if not torch.compiler.is_compiling() and (m := _build.module) is not None:
        y = m.dropout(input, p, training, inplace, kind, shared, 0, None, residual, generator)
        if y is not None:
            return y
    return _general(
        input, p, training, inplace, kind=kind, shared=shared, residual=residual,
        generator=generator,
    )  # fmt: skip


def dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    activation: str | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Dropout with the work around it, in one pass:
    ``residual + dropout(activation(input + bias))``.

    Each element of ``activation(input + bias)`` is dropped with probability `p`, becoming 0 (+0
    even for infinities and NaN); the others are divided by the keep probability. With
    ``training=False`` or ``p=0`` nothing is dropped and nothing is drawn: the fused rest remains,
    and without any the result is `input` itself.

    Args:
        input: any shape and strides; float32, float64, bfloat16 or float16 (anything where there is
            nothing to do).
        p: probability of dropping, in [0, 1], in steps of 1/65536. 1 gives zeros and zero
            gradients.
        training: whether anything is dropped.
        inplace: overwrite `input` with the result.
        activation: one of "relu", "leaky_relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh".
        bias: added before the activation; shape ``(input.shape[-1],)``.
        residual: added at the end; the input's shape. A residual or bias of another floating dtype
            promotes the result as torch's addition does.
        generator: draws the seed in place of the device's default generator: one
            ``torch.randint(2**63 - 1, (1,))`` for each call that drops.

    Returns:
        A tensor of the input's shape, dtype and memory format. Its gradients, of any order, use the
        same mask, of which only the seed is saved.

    Raises:
        ValueError: `p` outside [0, 1] or NaN, or an unknown activation.
        RuntimeError: `bias` or `residual` of another shape or device, a generator of another
            device, or ``inplace=True`` on a leaf that requires grad. Nothing is drawn.
        TypeError: not a floating-point tensor (for an integer one the error is NotImplementedError
            too, as torch's).

    Example:
        >>> x = torch.randn(32, 128, requires_grad=True)
        >>> y = fastnorm.dropout(x, 0.1, activation="gelu", bias=torch.zeros(128))
    """
    if not torch.compiler.is_compiling() and (m := _build.module) is not None:
        y = m.dropout(
            input, p, training, inplace, SCALED, 0, ACTIVATION_CODES.get(activation, -1), bias,
            residual, generator,
        )  # fmt: skip
        if y is not None:
            return y
    if torch.overrides.has_torch_function((input, bias, residual)):
        return torch.overrides.handle_torch_function(
            dropout, (input, bias, residual), input, p, training, inplace, activation=activation,
            bias=bias, residual=residual, generator=generator,
        )  # fmt: skip
    return _general(
        input, p, training, inplace, activation=activation, bias=bias, residual=residual,
        generator=generator,
    )  # fmt: skip


def _feature_bits(input: Tensor, unbatched: bool) -> int:
    """The dimensions that a channel of ``(N, C, ...)``, or of unbatched ``(C, ...)``, spans."""
    return (1 << input.dim()) - (2 if unbatched else 4)


def _feature_dropout(
    function: Callable[..., Tensor],
    input: Tensor,
    p: float,
    training: bool,
    inplace: bool,
    kind: int,
    unbatched: bool,
    generator: torch.Generator | None,
) -> Tensor:
    if torch.overrides.has_torch_function_unary(input):
        return _call(function, input, p, training, inplace, generator=generator)
    if not isinstance(input, Tensor):
        raise TypeError(f"input: expected a tensor, got {type(input).__name__}")
    if input.dim() < 2 and training and p:
        raise RuntimeError(
            f"input: expected at least 2 dimensions (batch, channel), got {input.dim()}"
        )
    shared = _feature_bits(input, unbatched) if input.dim() > 1 else 0
    return _shared_dropout(input, p, training, inplace, kind, shared, None, generator)


def dropout1d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Drops whole channels of ``(N, C, L)`` or ``(C, L)``: `torch.nn.functional.dropout1d`.

    Args:
        input, p, training, inplace, generator: as in `dropout`.

    Returns:
        A tensor of the input's shape, dtype and memory format.

    Raises:
        RuntimeError: the input has neither 2 nor 3 dimensions; else as `dropout`.

    Example:
        >>> y = fastnorm.dropout1d(torch.randn(8, 16, 100), 0.2)
    """
    if isinstance(input, Tensor) and input.dim() not in (2, 3):
        raise RuntimeError(
            f"input: expected 2 or 3 dimensions, (C, L) or (N, C, L), got {input.dim()}"
        )
    unbatched = isinstance(input, Tensor) and input.dim() == 2
    return _feature_dropout(dropout1d, input, p, training, inplace, SCALED, unbatched, generator)


def dropout2d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Drops whole channels of ``(N, C, H, W)``: `torch.nn.functional.dropout2d`.

    Three dimensions are taken as ``(N, C, L)`` with a warning, as torch does.

    Args:
        input, p, training, inplace, generator: as in `dropout`.

    Returns:
        A tensor of the input's shape, dtype and memory format.

    Raises:
        RuntimeError: something is to be dropped from fewer than 2 dimensions; else as `dropout`.

    Example:
        >>> y = fastnorm.dropout2d(torch.randn(8, 16, 32, 32), 0.2)
    """
    if isinstance(input, Tensor) and input.dim() != 4:
        warnings.warn(
            f"dropout2d: expected (N, C, H, W), got {input.dim()} dimensions; channels are taken "
            "to be dimension 1. Use dropout1d for (N, C, L), and unsqueeze an unbatched image.",
            stacklevel=2,
        )
    return _feature_dropout(dropout2d, input, p, training, inplace, SCALED, False, generator)


def dropout3d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Drops whole channels of ``(N, C, D, H, W)`` or ``(C, D, H, W)``:
    `torch.nn.functional.dropout3d`.

    Args:
        input, p, training, inplace, generator: as in `dropout`.

    Returns:
        A tensor of the input's shape, dtype and memory format.

    Raises:
        RuntimeError: something is to be dropped from fewer than 2 dimensions; else as `dropout`.

    Example:
        >>> y = fastnorm.dropout3d(torch.randn(2, 16, 8, 8, 8), 0.2)
    """
    dims = input.dim() if isinstance(input, Tensor) else 5
    if dims not in (4, 5):
        warnings.warn(
            f"dropout3d: expected (N, C, D, H, W) or (C, D, H, W), got {dims} dimensions; channels "
            "are taken to be dimension 1.",
            stacklevel=2,
        )
    return _feature_dropout(dropout3d, input, p, training, inplace, SCALED, dims == 4, generator)


def alpha_dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Dropout for SELU networks, which keeps mean 0 and variance 1
    (Klambauer et al., NIPS 2017): `torch.nn.functional.alpha_dropout`.

    Dropped elements become SELU's lower limit; the affine map that follows is exact for the
    probability really used. ``p=1`` gives zeros.

    Args:
        input, p, training, inplace, generator: as in `dropout`; `training` is False by default, as
            in torch.

    Returns:
        A tensor of the input's shape, dtype and memory format.

    Raises:
        ValueError, RuntimeError, TypeError: as `dropout`.

    Example:
        >>> y = fastnorm.alpha_dropout(torch.randn(8, 16), 0.1, training=True)
    """
    if torch.overrides.has_torch_function_unary(input):
        return _call(alpha_dropout, input, p, training, inplace, generator=generator)
    return _shared_dropout(input, p, training, inplace, ALPHA, 0, None, generator)


def feature_alpha_dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`alpha_dropout` of whole channels of ``(N, C, ...)``:
    `torch.nn.functional.feature_alpha_dropout`.

    Args:
        input, p, training, inplace, generator: as in `alpha_dropout`.

    Returns:
        A tensor of the input's shape, dtype and memory format.

    Raises:
        RuntimeError: something is to be dropped from fewer than 2 dimensions; else as `dropout`.

    Example:
        >>> y = fastnorm.feature_alpha_dropout(torch.randn(8, 16, 4, 4), 0.1, training=True)
    """
    return _feature_dropout(
        feature_alpha_dropout, input, p, training, inplace, ALPHA, False, generator
    )


def _check_depth_mode(mode: object) -> None:
    if mode not in ("row", "batch"):
        raise ValueError(f"mode: expected 'row' or 'batch', got {mode!r}")


def stochastic_depth(
    input: Tensor,
    p: float,
    mode: str = "row",
    training: bool = True,
    *,
    residual: Tensor | None = None,
    scale_by_keep: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Drops whole samples of a residual branch (Huang et al., "Deep networks with stochastic
    depth", ECCV 2016): `torchvision.ops.stochastic_depth`, optionally with the residual add in the
    same pass.

    Args:
        input: shape ``(N, ...)``; else as in `dropout`.
        p: probability of dropping.
        mode: "row" decides for each sample, "batch" for all of them at once.
        training: whether anything is dropped.
        residual: added to the result; the input's shape.
        scale_by_keep: divide what is kept by the keep probability, so that the expectation in
            training is what evaluation computes. False trains each kept branch at its full size.
        generator: as in `dropout`.

    Returns:
        ``residual + stochastic_depth(input)``, of the input's shape, dtype and memory format.

    Raises:
        ValueError: another mode; else as `dropout`.

    Example:
        >>> x = torch.randn(8, 16, 32, 32)
        >>> y = fastnorm.stochastic_depth(torch.relu(x), 0.2, residual=x)
    """
    _check_depth_mode(mode)
    if torch.overrides.has_torch_function((input, residual)):
        return torch.overrides.handle_torch_function(
            stochastic_depth, (input, residual), input, p, mode, training, residual=residual,
            scale_by_keep=scale_by_keep, generator=generator,
        )  # fmt: skip
    dims = input.dim() if isinstance(input, Tensor) else 1
    if dims == 0:
        raise RuntimeError("input: expected at least 1 dimension (batch), got 0")
    shared = (1 << dims) - (2 if mode == "row" else 1)
    kind = SCALED if scale_by_keep else MASK_ONLY
    return _shared_dropout(input, p, training, False, kind, shared, residual, generator)


def _exact_count(input: Tensor, p: float, generator: torch.Generator | None) -> Tensor:
    """Keeps exactly ``round((1 - p) n)`` of the n elements of each row, every subset alike."""
    check_input(input)
    check_generator(generator, input)
    n = input.shape[-1] if input.dim() else 1
    count = round((1.0 - p) * n)
    # Ties among 53-bit numbers are too rare to favour a position.
    random = torch.empty(input.shape, dtype=torch.float64, device=input.device)
    order = random.uniform_(generator=generator).argsort(-1)
    keep = torch.zeros(input.shape, dtype=torch.bool, device=input.device)
    keep = keep.scatter(-1, order[..., :count], True) if input.dim() else keep.fill_(count == 1)
    return torch.where(keep, input * (n / count if count else 0.0), 0.0)


# ---------------------------------------------------------------------------------------------
# Modules
# ---------------------------------------------------------------------------------------------


class Dropout(torch.nn.Dropout):
    """`torch.nn.Dropout` in one pass, with what may surround it.

    Args:
        p: probability of dropping, in [0, 1].
        inplace: overwrite the input.
        shared_dims: dimensions along which an element shares its mask: ``(2, 3)`` of an image is
            `Dropout2d`, ``(1,)`` of ``(N, T, C)`` is variational dropout over time. Negative ones
            count from the end.
        mode: "inverted" divides what is kept by the keep probability and leaves evaluation alone.
            "classical" (Srivastava et al. 2014) only masks, and multiplies by the keep probability
            in evaluation. "exact_count" keeps exactly ``round((1 - p) n)`` of each row of the last
            dimension. "inverted" is the fast one.
        activation: applied before, as in `fastnorm.dropout`.
        generator: draws the seeds in place of the device's default generator.

    Shape:
        input: any; ``forward(input, residual=None)`` gives the same shape.

    Raises:
        ValueError: `p` outside [0, 1], an unknown mode or activation, or "exact_count" together
            with shared dimensions.

    Example:
        >>> m = fastnorm.Dropout(0.1, activation="gelu")
        >>> y = m(torch.randn(20, 16))
    """

    def __init__(
        self,
        p: float = 0.5,
        inplace: bool = False,
        *,
        shared_dims: Sequence[int] | int | None = None,
        mode: str = "inverted",
        activation: str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        check_probability("p", p)
        super().__init__(p, inplace)
        if mode not in ("inverted", "classical", "exact_count"):
            raise ValueError(
                f"mode: expected 'inverted', 'classical' or 'exact_count', got {mode!r}"
            )
        activation_code(activation)
        if isinstance(shared_dims, int):
            shared_dims = (shared_dims,)
        if mode == "exact_count" and shared_dims:
            raise ValueError(
                f"shared_dims: expected None with mode='exact_count', got {tuple(shared_dims)}"
            )
        self.shared_dims = None if shared_dims is None else tuple(shared_dims)
        self.mode = mode
        self.activation = activation
        self.generator = generator

    @classmethod
    def from_keep_prob(cls, keep_prob: float, **kwargs: Any) -> Dropout:
        """The layer that keeps an element with probability `keep_prob`: ``p = 1 - keep_prob``."""
        check_probability("keep_prob", keep_prob)
        return cls(1.0 - keep_prob, **kwargs)

    def _bits(self, input: Tensor) -> int:
        bits = 0
        for d in self.shared_dims or ():
            if not -input.dim() <= d < input.dim():
                raise IndexError(
                    f"shared_dims: expected dimensions of the {input.dim()}-dimensional input, "
                    f"got {d}"
                )
            bits |= 1 << d % input.dim()
        return bits

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.mode == "inverted" and not self.shared_dims:
            return dropout(
                input, self.p, self.training, self.inplace, activation=self.activation,
                residual=residual, generator=self.generator,
            )  # fmt: skip
        check_input(input)
        shared = self._bits(input)
        if self.activation is not None:
            code = activation_code(self.activation)
            input = FUNCTIONS[code](input)
        inplace = self.inplace and self.activation is None
        if self.mode == "exact_count":
            y = _exact_count(input, self.p, self.generator) if self.training and self.p else input
        elif self.mode == "classical" and not self.training:
            y = input * (_philox.threshold(self.p) / 65536.0)
        else:
            kind = SCALED if self.mode == "inverted" else MASK_ONLY
            return _shared_dropout(
                input, self.p, self.training, inplace, kind, shared, residual, self.generator
            )
        if residual is not None:
            return y + residual
        return input.copy_(y) if inplace and y is not input else y

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.shared_dims is not None:
            text += f", shared_dims={self.shared_dims}"
        if self.mode != "inverted":
            text += f", mode={self.mode!r}"
        if self.activation is not None:
            text += f", activation={self.activation!r}"
        return text


def _check_rank(input: object, ranks: Sequence[int], shapes: str) -> None:
    if isinstance(input, Tensor) and input.dim() not in ranks:
        raise ValueError(f"input: expected {shapes}, got {input.dim()} dimensions")


class Dropout1d(torch.nn.Dropout1d):
    """Drops whole channels of ``(N, C, L)`` or ``(C, L)``, and refuses any other rank.

    Args:
        p: probability of dropping, in [0, 1].
        inplace: overwrite the input.
        generator: draws the seeds in place of the device's default generator.

    Example:
        >>> y = fastnorm.Dropout1d(0.2)(torch.randn(8, 16, 100))
    """

    def __init__(
        self, p: float = 0.5, inplace: bool = False, *, generator: torch.Generator | None = None
    ) -> None:
        check_probability("p", p)
        super().__init__(p, inplace)
        self.generator = generator

    def forward(self, input: Tensor) -> Tensor:
        _check_rank(input, (2, 3), "(C, L) or (N, C, L)")
        return dropout1d(input, self.p, self.training, self.inplace, generator=self.generator)


class Dropout2d(torch.nn.Dropout2d):
    """Drops whole channels of ``(N, C, H, W)``, and refuses any other rank: what torch makes of
    three dimensions has changed twice.

    Args:
        p: probability of dropping, in [0, 1].
        inplace: overwrite the input.
        generator: draws the seeds in place of the device's default generator.

    Example:
        >>> y = fastnorm.Dropout2d(0.2)(torch.randn(8, 16, 32, 32))
    """

    def __init__(
        self, p: float = 0.5, inplace: bool = False, *, generator: torch.Generator | None = None
    ) -> None:
        check_probability("p", p)
        super().__init__(p, inplace)
        self.generator = generator

    def forward(self, input: Tensor) -> Tensor:
        _check_rank(input, (4,), "(N, C, H, W); Dropout1d takes (N, C, L)")
        return dropout2d(input, self.p, self.training, self.inplace, generator=self.generator)


class Dropout3d(torch.nn.Dropout3d):
    """Drops whole channels of ``(N, C, D, H, W)`` or ``(C, D, H, W)``, and refuses any other rank.

    Args:
        p: probability of dropping, in [0, 1].
        inplace: overwrite the input.
        generator: draws the seeds in place of the device's default generator.

    Example:
        >>> y = fastnorm.Dropout3d(0.2)(torch.randn(2, 16, 8, 8, 8))
    """

    def __init__(
        self, p: float = 0.5, inplace: bool = False, *, generator: torch.Generator | None = None
    ) -> None:
        check_probability("p", p)
        super().__init__(p, inplace)
        self.generator = generator

    def forward(self, input: Tensor) -> Tensor:
        _check_rank(input, (4, 5), "(C, D, H, W) or (N, C, D, H, W)")
        return dropout3d(input, self.p, self.training, self.inplace, generator=self.generator)


class AlphaDropout(torch.nn.AlphaDropout):
    """`torch.nn.AlphaDropout`: see `alpha_dropout`.

    Args:
        p: probability of dropping, in [0, 1].
        inplace: overwrite the input.
        generator: draws the seeds in place of the device's default generator.

    Example:
        >>> y = fastnorm.AlphaDropout(0.1)(torch.randn(8, 16))
    """

    def __init__(
        self, p: float = 0.5, inplace: bool = False, *, generator: torch.Generator | None = None
    ) -> None:
        check_probability("p", p)
        super().__init__(p, inplace)
        self.generator = generator

    def forward(self, input: Tensor) -> Tensor:
        return alpha_dropout(input, self.p, self.training, self.inplace, generator=self.generator)


class FeatureAlphaDropout(torch.nn.FeatureAlphaDropout):
    """`torch.nn.FeatureAlphaDropout`: see `feature_alpha_dropout`.

    Args:
        p: probability of dropping, in [0, 1].
        inplace: overwrite the input.
        generator: draws the seeds in place of the device's default generator.

    Example:
        >>> y = fastnorm.FeatureAlphaDropout(0.1)(torch.randn(8, 16, 4, 4))
    """

    def __init__(
        self, p: float = 0.5, inplace: bool = False, *, generator: torch.Generator | None = None
    ) -> None:
        check_probability("p", p)
        super().__init__(p, inplace)
        self.generator = generator

    def forward(self, input: Tensor) -> Tensor:
        return feature_alpha_dropout(
            input, self.p, self.training, self.inplace, generator=self.generator
        )


class StochasticDepth(torch.nn.Module):
    """`torchvision.ops.StochasticDepth`, with the residual add in the same pass.

    Args:
        p: probability of dropping a residual branch, in [0, 1].
        mode: "row" decides for each sample, "batch" for all at once.
        scale_by_keep: divide what is kept by the keep probability; see `stochastic_depth`.
        generator: draws the seeds in place of the device's default generator.

    Shape:
        input: ``(N, ...)``; ``forward(input, residual=None)`` gives the same shape.

    Example:
        >>> x = torch.randn(8, 16)
        >>> y = fastnorm.StochasticDepth(0.2)(torch.relu(x), x)
    """

    def __init__(
        self,
        p: float,
        mode: str = "row",
        *,
        scale_by_keep: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_probability("p", p)
        _check_depth_mode(mode)
        self.p = p
        self.mode = mode
        self.scale_by_keep = scale_by_keep
        self.generator = generator

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return stochastic_depth(
            input, self.p, self.mode, self.training, residual=residual,
            scale_by_keep=self.scale_by_keep, generator=self.generator,
        )  # fmt: skip

    def extra_repr(self) -> str:
        tail = "" if self.scale_by_keep else ", scale_by_keep=False"
        return f"p={self.p}, mode={self.mode}{tail}"


class DropPath(StochasticDepth):
    """`StochasticDepth` by timm's name and arguments.

    Args:
        drop_prob: probability of dropping each sample's residual branch.
        scale_by_keep: as in `StochasticDepth`.
        generator: as in `StochasticDepth`.

    Example:
        >>> y = fastnorm.DropPath(0.1)(torch.randn(8, 16))
    """

    def __init__(
        self,
        drop_prob: float = 0.0,
        scale_by_keep: bool = True,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(drop_prob, "row", scale_by_keep=scale_by_keep, generator=generator)


def drop_path_rates(
    max_p: float, depths: int | Sequence[int], *, stagewise: bool = False
) -> list[float] | list[list[float]]:
    """Drop probabilities that grow linearly from 0 to `max_p` with the depth of a block.

    Args:
        max_p: probability of the last block.
        depths: the number of blocks, or the numbers of blocks of each stage.
        stagewise: all blocks of a stage alike.

    Returns:
        One probability per block; a list of them per stage where `depths` is a sequence.

    Raises:
        ValueError: `max_p` outside [0, 1], or `stagewise` without stages.

    Example:
        >>> drop_path_rates(0.2, [1, 2])
        [[0.0], [0.1, 0.2]]
    """
    check_probability("max_p", max_p)

    def rates(n: int) -> list[float]:
        return [max_p * i / (n - 1) if n > 1 else 0.0 for i in range(n)]

    if isinstance(depths, int):
        if stagewise:
            raise ValueError("depths: expected a number per stage with stagewise=True, got an int")
        return rates(depths)
    if stagewise:
        return [[p] * n for p, n in zip(rates(len(depths)), depths, strict=True)]
    flat = iter(rates(sum(depths)))
    return [[next(flat) for _ in range(n)] for n in depths]
