"""What the functions of fastnorm.dropout share: their definition, its autograd under torch.compile,
the checks, and the choice of an implementation.

Every one of them is ``residual + (keep ? scale * h + shift : dropped)`` with
``h = activation(input + bias)``. They differ in the three numbers (the *kind*) and in the
dimensions along which a mask is shared (the bit set *shared*).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnorm import _build, _dtensor, _ops, _philox, _reference
from fastnorm._checks import (
    check_device,
    check_generator,
    check_input,
    check_probability,
    exporting,
)
from fastnorm._reference import accumulate_dtype
from fastnorm.epilogue import FUNCTIONS, activation_code

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


def reference_vjp(
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
            dx, db = reference_vjp(ordered, x, bias, seed, ctx.activation, ctx.p)
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
# Checks and choice
# ---------------------------------------------------------------------------------------------


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


def feature_bits(input: Tensor, unbatched: bool) -> int:
    """The dimensions that a channel of ``(N, C, ...)``, or of unbatched ``(C, ...)``, spans."""
    return (1 << input.dim()) - (2 if unbatched else 4)


def general(
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
    p = check_probability("p", p)
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
            lambda x, r: general(
                x, p, training, False, kind=kind, shared=shared, activation=activation,
                residual=r, generator=generator,
            ),
            (), input, residual, shared=shared,
        )  # fmt: skip
    if input.is_nested and (input.layout != torch.jagged or inplace or shared):
        raise NotImplementedError(
            "input: expected a jagged nested tensor, neither to be overwritten nor with shared "
            f"masks, got layout {input.layout}, inplace={inplace}"
        )
    if bias is not None:
        _check_operand("bias", bias, input.shape[-1:] if input.dim() else (1,), input)
    _check_operand("residual", residual, input.shape, input)
    check_generator(generator, input)
    if input.is_nested:
        jagged: Any = input
        y = general(
            jagged.values(), p, training, False, kind=kind, activation=activation, bias=bias,
            residual=None if residual is None else residual.values(), generator=generator,
        )  # fmt: skip
        return torch.nested.nested_tensor_from_jagged(
            y, jagged.offsets(), jagged.lengths(), jagged_dim=jagged._ragged_idx
        )
    if inplace:
        check_inplace(input)
        # The input is overwritten, but its old values are what an activation's gradient needs.
        result = general(
            input.clone() if code else input, p, training, False, kind=kind, shared=shared,
            activation=activation, bias=bias, residual=residual, generator=generator,
        )  # fmt: skip
        return input.copy_(result)
    if exporting() and drops and generator is None and kind == SCALED:
        # As an exported graph's own runtime draws: torch's functions, see fastnorm/_export.py.
        feature = shared and shared == feature_bits(input, False)
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


def shared_dropout(
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
    return general(
        input, p, training, inplace, kind=kind, shared=shared, residual=residual,
        generator=generator,
    )  # fmt: skip
