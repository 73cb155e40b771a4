"""Inputs and comparisons for the tests of batch, group and instance norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fastnorm.epilogue import ACTIVATIONS

UNIT_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


def channels_last(x: Tensor) -> Tensor:
    """Channels innermost, for any number of dimensions from 3 on."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def every_second(x: Tensor) -> Tensor:
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
    wide[..., ::2] = x
    return wide[..., ::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": channels_last,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": every_second,
    "sliced channels_last": lambda x: channels_last(torch.cat([x, x], -1))[..., : x.shape[-1]],
    "expanded": lambda x: x[..., :1].expand(x.shape),
}


def strides(x: Tensor) -> list[int]:
    """Of the dimensions where they mean something."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


def parameters(channels: int, dtype: torch.dtype, weight: bool = True, bias: bool = True):
    w = torch.randn(channels, dtype=torch.float64).mul(0.5).add(1.5).to(dtype)
    b = torch.randn(channels, dtype=torch.float64).to(dtype)
    return (w if weight else None), (b if bias else None)


def with_gradients(
    f: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    grad: Tensor,
    dtype: torch.dtype | None = None,
) -> list[Tensor | None]:
    """The result of `f` and the gradient of each tensor, all computed in `dtype` if given."""
    inputs = [
        None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors
    ]
    y = f(*inputs)
    y.backward(grad.to(y.dtype))
    return [y.detach(), *(None if t is None else t.grad for t in inputs)]


def assert_as_good(ours, theirs, exact, what: str = "", roundings: int = 4) -> None:
    """No error above 1.5 times torch's on the same input, both against float64.

    Plus `roundings` of the largest value: on a few values torch's own error is a matter of luck.
    """
    for i, (a, b, e) in enumerate(zip(ours, theirs, exact, strict=True)):
        if e is None:
            assert a is None
            continue
        assert a.shape == e.shape and e.dtype == torch.float64
        own, peer = ((t.double() - e).abs().max().item() for t in (a, b))
        budget = 1.5 * peer + roundings * UNIT_ROUNDOFF[a.dtype] * max(e.abs().max().item(), 1.0)
        assert own <= budget, f"{what}[{i}]: error {own:.3g}, torch's {peer:.3g}"


def check(ours, theirs, tensors, grad, what: str = "", roundings: int = 4) -> None:
    """`ours` and `theirs` take the tensors; forward and every gradient are compared."""
    assert_as_good(
        with_gradients(ours, tensors, grad),
        with_gradients(theirs, tensors, grad),
        with_gradients(theirs, tensors, grad, torch.float64),
        what,
        roundings,
    )


def check_derivatives(ours, theirs, tensors: Sequence[Tensor | None]) -> None:
    """First and second derivatives in float64, and torch's values under two gradients."""
    present = [t for t in tensors if t is not None]
    assert all(t.dtype == torch.float64 for t in present)
    inputs = tuple(t.detach().clone().requires_grad_() for t in present)

    def run(*args: Tensor) -> Tensor:
        rest = iter(args)
        return ours(*(None if t is None else next(rest) for t in tensors))

    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs, fast_mode=True)
    like = present[0]
    dense = torch.randn_like(like)
    for grad in (dense, dense.flatten()[:1].view((1,) * like.dim()).expand(like.shape)):
        mine = with_gradients(ours, tensors, grad)
        peer = with_gradients(theirs, tensors, grad)
        for a, b in zip(mine, peer, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def composed(norm: Callable[..., Tensor], activation: str | None) -> Callable[..., Tensor]:
    """``activation(norm(x, weight, bias) + residual)`` by torch."""

    def run(x, w, b, r=None):
        y = norm(x, *(None if p is None else p.to(x.dtype) for p in (w, b)))
        return ACTIVATIONS[activation].function(y if r is None else y + r)

    return run
