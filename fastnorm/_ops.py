"""Between the public functions and the kernels: which implementation runs, and its autograd.

In eager mode the compiled module's own nodes carry autograd (``csrc/autograd.cpp``): a Python
`torch.autograd.Function` alone costs more than all of ``F.layer_norm`` on a small input. Under
`torch.compile` the operators are called through the Functions of this file. Both go back to the
pure-PyTorch reference when a backward pass must itself be differentiable.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastnorm import _build, _philox, _reference
from fastnorm._checks import exporting

View = tuple[int, int, int, int, int, int]


class NormCall(NamedTuple):
    """What a norm is, beside its tensors: ``csrc/common/norm.h``."""

    view: View
    statistic: int
    eps: float
    weight_offset: float = 0.0
    activation: int = 0
    dropout_p: float = 0.0


def row_view(rows: int, columns: int) -> View:
    """Statistics over each of `rows` contiguous rows, one parameter per column."""
    return (rows, 1, 1, columns, 1, 1)


_notes = threading.local()


def start_notes() -> list[str]:
    """From now on this thread's calls say what they do; `fastnorm.explain`."""
    _notes.steps = []
    return _notes.steps


def stop_notes() -> None:
    _notes.steps = None


def note(make: Callable[[], str]) -> None:
    """Record a step where `explain` listens. `make` is only called there."""
    if torch.compiler.is_compiling():
        return
    steps = getattr(_notes, "steps", None)
    if steps is not None:
        steps.append(make())


def disturbance(*tensors: Tensor | None) -> str | None:
    """What intercepts operators on these tensors (a transform, a subclass), or None."""
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    if torch.jit.is_tracing():
        return "torch.jit is tracing"
    dual = torch.autograd.forward_ad._current_level >= 0
    for t in tensors:
        if t is None:
            continue
        # isinstance would take a subclass for a Parameter that is marked as one.
        if type(t) is not Tensor and not issubclass(type(t), torch.nn.Parameter):
            return f"{type(t).__name__} is a subclass of Tensor"
        if dual and has_tangent(t):
            return "forward-mode differentiation"
    return None


def is_plain(*tensors: Tensor | None) -> bool:
    """Nothing intercepts these tensors: no transform, no tangent, no subclass, no tracing."""
    return disturbance(*tensors) is None


def has_tangent(t: Tensor) -> bool:
    """Whether `t` is a dual number of forward-mode differentiation."""
    if torch.autograd.forward_ad._current_level < 0:
        return False
    return torch.autograd.forward_ad.unpack_dual(t).tangent is not None


def use_kernel(input: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels, rather than the reference, compute this call.

    Depends on the backend, the device and the kind of tensors; never on their values. Builds the
    kernels on first use.
    """
    if torch.compiler.is_compiling():
        return keeps_operator(input, input.device.type == "cpu")
    reason = disturbance(input, *others)
    device = input.device.type
    if reason is None:
        if _build.backend() == "reference":
            reason = "the backend is 'reference'"
        elif device not in _build.DEVICES:
            reason = f"there are no kernels for {device}"
        elif not (_build.load_cuda() if device == "cuda" else _build.load() is not None):
            reason = _build.reason(device) or _build.reason("cpu") or "no kernels"
    if reason is not None:
        note(lambda: f"reference: {reason}")
    return reason is None


def keeps_operator(input: Tensor, auto: bool) -> bool:
    """Whether a compiled graph gets our operator, not what the compiler makes of the reference.

    The backend says so; `auto` is what "auto" means for this operator, by the measurements of
    benchmarks/bench_compile.py.
    """
    backend = _build.backend()
    device = input.device.type
    if (
        exporting()
        or device not in _build.DEVICES
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or (type(input) is not Tensor and not isinstance(input, torch.nn.Parameter))
    ):
        return False
    return (auto if backend == "auto" else backend == "kernel") and register_fakes(device)


def norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    seed: Tensor | None,
    call: NormCall,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The norm operator with autograd: ``(y, mean, var)``. Inputs are dense and laid out alike."""
    if torch.compiler.is_compiling():
        x, weight, bias, residual = distinct(x, weight, bias, residual)
        return NormFunction.apply(x, weight, bias, residual, mean, var, seed, call)
    assert _build.module is not None
    note(lambda: describe("norm", x, call.view))
    return _build.module.norm(x, weight, bias, residual, mean, var, seed, *call)


def add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    call: NormCall,
) -> tuple[Tensor, Tensor]:
    """``sum = residual + dropout(x)`` and ``y = norm(sum)`` with autograd: ``(y, sum)``."""
    if torch.compiler.is_compiling():
        x, residual, weight, bias = distinct(x, residual, weight, bias)
        y, total, *_ = AddNormFunction.apply(x, residual, weight, bias, seed, call)
        return y, total
    assert _build.module is not None
    note(lambda: describe("add_norm", x, call.view))
    return _build.module.add_norm(x, residual, weight, bias, seed, *call[:4], call.dropout_p)


def distinct(*tensors: Any) -> list[Any]:
    """The tensors, a repeated one as a view: Dynamo takes no tensor twice in a Function."""
    out: list[Any] = []
    for t in tensors:
        out.append(t.view_as(t) if t is not None and any(t is other for other in out) else t)
    return out


def describe(name: str, x: Tensor, view: Sequence[int] | None = None) -> str:
    """The kernel that runs, for `explain`; `view` is a norm's."""
    assert _build.module is not None
    if view is None:
        form = ""
    elif x.is_cuda:
        form = "row, " if view[1] == 1 and view[5] == 1 else "column, "
    else:
        form = _build.module.form(view, x.element_size()) + ", "
    return f"{name} on {x.device}: {form}{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


def contiguous(argument: str, t: Tensor) -> Tensor:
    """`t`, or one dense copy of it."""
    if t.is_contiguous():
        return t
    note(lambda: f"{argument}: copied, its strides {tuple(t.stride())} are not a layout we read")
    return t.contiguous()


def laid_out(t: Tensor, x: Tensor) -> Tensor:
    """`t` in the memory order of the dense tensor `x`: a copy unless it is; differentiable."""
    if t.stride() == x.stride() and t.dtype == x.dtype:
        return t
    note(lambda: f"residual: copied, its strides {tuple(t.stride())} are not the input's")
    order = _reference.memory_order(x)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return t.to(x.dtype).permute(order).contiguous().permute(inverse)


class NormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, residual, mean, var, seed, call):  # type: ignore[no-untyped-def]
        frozen = var is not None
        y, new_mean, new_var = torch.ops.fastnorm.norm_fwd(
            x, weight, bias, residual, mean, var, seed, *call
        )
        ctx.call, ctx.frozen = call, frozen
        kept = residual if call.activation else None
        stats = (mean, var) if frozen else (new_mean, new_var)
        ctx.save_for_backward(x, weight, bias, kept, *stats, seed)
        ctx.mark_non_differentiable(new_mean, new_var)
        return y, new_mean, new_var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None):  # type: ignore[no-untyped-def]
        x, weight, bias, residual, mean, var, seed = ctx.saved_tensors
        call: NormCall = ctx.call
        needs = list(ctx.needs_input_grad[:4])
        if torch.is_grad_enabled():
            m, v = (mean, var) if ctx.frozen else (None, None)
            grads = differentiable_vjp(
                False, [grad], [x, weight, bias, residual], m, v, seed, *call, needs
            )
            return *grads, None, None, None, None
        epilogue = bool(call.activation) or seed is not None
        mask = [*needs[:3], needs[3] and epilogue]
        dx, dw, db, dr = torch.ops.fastnorm.norm_bwd(
            laid_out(grad, x), x, weight, bias, residual, mean, var, seed,
            *call[:2], ctx.frozen, *call[2:], mask,
        )  # fmt: skip
        return (
            dx if needs[0] else None,
            dw.view(weight.shape) if needs[1] else None,
            db.view(bias.shape) if needs[2] else None,
            (dr if epilogue else grad) if needs[3] else None,
            None, None, None, None,
        )  # fmt: skip


class AddNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, residual, weight, bias, seed, call):  # type: ignore[no-untyped-def]
        y, total, mean, var = torch.ops.fastnorm.add_norm_fwd(
            x, residual, weight, bias, seed, *call[:4], call.dropout_p
        )
        ctx.call = call
        ctx.save_for_backward(total, weight, bias, mean, var, seed)
        ctx.mark_non_differentiable(mean, var)
        return y, total, mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_sum: Tensor, *_: Tensor | None):  # type: ignore[no-untyped-def]
        total, weight, bias, mean, var, seed = ctx.saved_tensors
        call: NormCall = ctx.call
        needs = list(ctx.needs_input_grad[:4])
        if torch.is_grad_enabled():
            grads = differentiable_vjp(
                True, [grad, grad_sum], [total, weight, bias], None, None, seed, *call, needs
            )
            return *grads, None, None
        dropout = seed is not None
        mask = [needs[0] and dropout, needs[2], needs[3], needs[1] or (needs[0] and not dropout)]
        dx, dw, db, dr = torch.ops.fastnorm.add_norm_bwd(
            laid_out(grad, total), laid_out(grad_sum, total), total, weight, mean, var,
            seed, *call[:4], call.dropout_p, mask,
        )  # fmt: skip
        return (
            (dx if dropout else dr) if needs[0] else None,
            dr if needs[1] else None,
            dw.view(weight.shape).to(weight.dtype) if needs[2] else None,
            db.view(bias.shape).to(bias.dtype) if needs[3] else None,
            None, None,
        )  # fmt: skip


def differentiable_vjp(
    prologue: bool,
    grads: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    mean: Tensor | None,
    var: Tensor | None,
    seed: Tensor | None,
    view: Sequence[int],
    statistic: int,
    eps: float,
    weight_offset: float,
    activation: int,
    dropout_p: float,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of a norm as a differentiable function of its inputs and `grads`.

    `inputs` are (x, weight, bias, residual), and `needs` says which are asked for; with `prologue`
    they are (sum, weight, bias), and `needs` is for (x, residual, weight, bias). The C++ nodes call
    this when a backward pass is recorded (``create_graph=True``).
    """
    with torch.enable_grad():
        # Views, because one input may be computed from another (or be it): the gradient wanted here
        # is that of each place in the formula, and the engine adds up the rest.
        inputs = [None if t is None else t.view_as(t) for t in inputs]
        x, weight, bias = inputs[:3]
        assert x is not None
        residual = None if prologue else inputs[3]
        keep, scale = None, 1.0
        if seed is not None:
            keep = _philox.keep_mask(x.numel(), seed, dropout_p)
            scale = _philox.scale(dropout_p)
        y = _reference.norm_by_view(
            x, weight, bias, residual, mean, var, None if prologue else keep, view,
            statistic=statistic, eps=eps, weight_offset=weight_offset, activation=activation,
            scale=scale,
        )  # fmt: skip
        wanted = [*needs[:3], needs[3] and residual is not None]
        if prologue:
            wanted = [needs[0] or needs[1], needs[2], needs[3]]
        sources = [t for t, want in zip(inputs, wanted, strict=False) if want and t is not None]
        found: list[Tensor | None] = [None] * len(sources)
        if grads[0] is not None and sources:
            found = list(
                torch.autograd.grad(y, sources, grads[0], create_graph=True, allow_unused=True)
            )
        rest = iter(found)
        out: list[Tensor | None] = [next(rest) if want else None for want in wanted]
        if not prologue:
            # The residual is only kept where an activation follows it. Where none does, its
            # gradient is that of the dropped output.
            if needs[3] and residual is None and grads[0] is not None:
                out[3] = grads[0]
                if keep is not None:
                    flat = _reference.drop(_reference.flatten(laid_out(grads[0], x)), keep, scale)
                    out[3] = _reference.unflatten(flat, x)
            return out
        total = out[0]
        if len(grads) > 1 and grads[1] is not None and wanted[0]:
            total = grads[1] if total is None else total + grads[1]
        dx = total if needs[0] else None
        if dx is not None and keep is not None:
            flat = _reference.drop(_reference.flatten(laid_out(dx, x)), keep, scale)
            dx = _reference.unflatten(flat, x)
        return [dx, total if needs[1] else None, *out[1:]]


_fakes_registered = False


def register_fakes(device: str = "cpu") -> bool:
    """Load the kernels and describe their outputs to the compiler; False where there are none."""
    global _fakes_registered
    if not (_build.load_cuda() if device == "cuda" else _build.load() is not None):
        return False
    if not _fakes_registered:
        for name, fake in FAKES.items():
            torch.library.register_fake(f"fastnorm::{name}", fake)
        _fakes_registered = True
    return True


# What torch.compiler.assume_constant_result sets; calling it would import torch._dynamo (1.5 s).
register_fakes._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _statistic_like(x: Tensor, view: Sequence[int], wanted: bool) -> Tensor:
    shape = (view[0], view[2]) if wanted else (0,)
    dtype = _reference.accumulate_dtype(x.dtype) if wanted else x.dtype
    return x.new_empty(shape, dtype=dtype)


def _fake_norm_fwd(x, weight, bias, residual, mean, var, seed, view, statistic, *_):  # type: ignore[no-untyped-def]
    own = var is None
    centered = statistic == _reference.MEAN_VAR
    return (
        torch.empty_like(x),
        _statistic_like(x, view, own and centered),
        _statistic_like(x, view, own),
    )


def _fake_add_norm_fwd(x, residual, weight, bias, seed, view, statistic, *_):  # type: ignore[no-untyped-def]
    y, mean, var = _fake_norm_fwd(x, weight, bias, residual, None, None, seed, view, statistic)
    return y, torch.empty_like(x), mean, var


def _fake_gradients(x, weight, bias, view, mask):  # type: ignore[no-untyped-def]
    inner = view[4]
    channels = view[1] if inner == 0 else view[2] * (view[3] // inner)

    def per_channel(p: Tensor | None) -> Tensor:
        dtype = _reference.accumulate_dtype(x.dtype) if p is None else p.dtype
        return x.new_empty(channels, dtype=dtype)

    return (
        torch.empty_like(x) if mask[0] else x.new_empty(0),
        per_channel(weight) if mask[1] else x.new_empty(0),
        per_channel(bias) if mask[2] else x.new_empty(0),
        torch.empty_like(x) if mask[3] else x.new_empty(0),
    )


def _fake_norm_bwd(grad, x, weight, bias, residual, mean, var, seed, view, *rest):  # type: ignore[no-untyped-def]
    return _fake_gradients(x, weight, bias, view, rest[-1])


def _fake_add_norm_bwd(grad, grad_sum, total, weight, mean, var, seed, view, *rest):  # type: ignore[no-untyped-def]
    return _fake_gradients(total, weight, None, view, rest[-1])


def _fake_add_penalty_grad_(grads, params, l1, l2):  # type: ignore[no-untyped-def]
    return params[0].new_empty(2, dtype=_reference.accumulate_dtype(params[0].dtype))


FAKES: dict[str, Callable[..., Any]] = {
    "norm_fwd": _fake_norm_fwd,
    "norm_bwd": _fake_norm_bwd,
    "add_norm_fwd": _fake_add_norm_fwd,
    "add_norm_bwd": _fake_add_norm_bwd,
    "add_penalty_grad_": _fake_add_penalty_grad_,
}
