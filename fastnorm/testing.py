"""What the tests of every norm share: inputs, layouts, and an error budget that is computed.

A result is judged against the same formula in float64 on the same (already rounded) inputs, and may
be no further from it than 1.5 times what PyTorch's own operators in the same dtype are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["LAYOUTS", "assert_within_budget", "gradient_like", "poisoned_memory", "random_tensor"]

# One rounding of the result itself is not an error that any implementation could avoid.
_UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}


def random_tensor(
    *shape: int, dtype: torch.dtype = torch.float32, mean: float = 0.0, std: float = 1.0
) -> Tensor:
    """Normal values, rounded to `dtype`; drawn in float64 so that dtypes see the same numbers.

    Example:
        >>> random_tensor(2, 3, dtype=torch.bfloat16).dtype
        torch.bfloat16
    """
    return (torch.randn(*shape, dtype=torch.float64) * std + mean).to(dtype)


def seeded(seed: int) -> torch.Generator:
    """A generator of the default device.

    Example:
        >>> torch.rand(3, generator=seeded(1)).shape
        torch.Size([3])
    """
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def rng_state() -> Tensor:
    """The state of the default device's own generator.

    Example:
        >>> state = rng_state()
        >>> bool(torch.rand(3).any()), torch.equal(state, rng_state())
        (True, False)
    """
    on_cuda = torch.get_default_device().type == "cuda"
    return torch.cuda.get_rng_state() if on_cuda else torch.get_rng_state()


def _strided(x: Tensor, step: int, offset: int) -> Tensor:
    """The values of `x` every `step` elements along the last dimension, from `offset` on."""
    base = x.new_full((*x.shape[:-1], x.shape[-1] * step + offset), float("nan"))
    view = base[..., offset::step][..., : x.shape[-1]]
    view.copy_(x)
    return view


def _transposed(x: Tensor) -> Tensor:
    if x.dim() < 2:
        return x.clone()
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def _expanded(x: Tensor) -> Tensor:
    """Stride 0 along the first dimension: every slice is the first one."""
    return x[:1].expand(x.shape)


def _channels_last(x: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.dim()]) if x.dim() in formats else x.clone()


# Each gives a tensor of the same shape in another layout; all but "expanded" with the same values.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "transposed": _transposed,
    "sliced": lambda x: torch.cat([x, x], dim=0)[: x.shape[0]],
    "step": lambda x: _strided(x, 2, 0),
    "offset": lambda x: _strided(x, 1, 3),
    "expanded": _expanded,
    "channels_last": _channels_last,
}


def gradient_like(y: Tensor, layout: str = "contiguous") -> Tensor:
    """A random gradient for `y` in one of `LAYOUTS`."""
    return LAYOUTS[layout](random_tensor(*y.shape, dtype=y.dtype).to(y.device))


def error(result: Tensor, exact: Tensor) -> tuple[float, float]:
    """Root mean square and largest absolute difference from `exact`, where that is finite.

    Example:
        >>> error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0], dtype=torch.float64))
        (0.0, 0.0)
    """
    d = (result.double() - exact).masked_fill(~exact.isfinite(), 0.0)
    return d.square().mean().sqrt().item(), d.abs().max().item()


def assert_within_budget(
    ours: Tensor | Sequence[Tensor | None],
    theirs: Tensor | Sequence[Tensor | None],
    exact: Tensor | Sequence[Tensor | None],
    factor: float = 1.5,
    what: str = "",
) -> None:
    """`ours` is at most `factor` times as far from `exact` as `theirs`, plus one rounding.

    The distance is the root mean square of the differences over a tensor, and the largest of them
    may be twice as much over. The rounding is half a unit in the last place of the tensor's largest
    value, more for a tensor of a few elements, where both distances are luck. A float64 result is
    judged by what torch does in float32, scaled to the precision of float64 (`theirs` is then
    float32), and `exact` has as much of an error again. Sequences are compared item by item; an
    absent gradient is a zero one.

    Raises:
        AssertionError: it is further away, or has other NaN or infinities than `exact`.

    Example:
        >>> x = random_tensor(100)
        >>> assert_within_budget(x.exp(), x.exp(), x.double().exp())
    """
    if isinstance(ours, Tensor) or ours is None:
        ours, theirs, exact = [ours], [theirs], [exact]  # type: ignore[list-item]
    assert len(ours) == len(theirs) == len(exact), f"{what}: different numbers of results"
    for i, (a, b, e) in enumerate(zip(ours, theirs, exact, strict=True)):
        if e is None or a is None:
            rest = [t for t in (a, e) if t is not None]
            assert not any(t.any() for t in rest), f"{what}[{i}]: one result is missing"
            continue
        assert b is not None
        assert a.shape == e.shape, f"{what}[{i}]: shape {list(a.shape)}, not {list(e.shape)}"
        if e.numel() == 0:
            continue
        assert e.dtype == torch.float64, "the exact result must be float64"
        assert torch.equal(a.isfinite(), e.isfinite()), f"{what}[{i}]: wrongly finite or not"
        rounding = _UNIT_ROUNDOFF[a.dtype] * e[e.isfinite()].abs().max().item()
        rounding *= 1 + 8 / e.numel()
        (own, own_max), (peer, peer_max) = error(a, e), error(b, e)
        allowed = factor
        if a.dtype == torch.float64:
            allowed = (factor + 1) * _UNIT_ROUNDOFF[a.dtype] / _UNIT_ROUNDOFF[b.dtype]
        budget = allowed * peer + rounding
        budget_max = 2 * (allowed * peer_max + rounding)
        assert own <= budget and own_max <= budget_max, (
            f"{what}[{i}]: error {own:.3g} (largest {own_max:.3g}) against float64, where torch in "
            f"{b.dtype} has {peer:.3g} ({peer_max:.3g}) and the budget is {budget:.3g} "
            f"({budget_max:.3g}); {a.dtype}, shape {list(a.shape)}"
        )


class poisoned_memory:
    """Within it, fresh outputs on every device start as NaN: what a kernel leaves out shows.

    Example:
        >>> with poisoned_memory():
        ...     bool(torch.empty(3).isnan().all())
        True
    """

    def __enter__(self) -> None:
        self._mode = torch.are_deterministic_algorithms_enabled()
        self._fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(self._mode)
        torch.utils.deterministic.fill_uninitialized_memory = self._fill  # type: ignore[attr-defined]


def leaves(
    tensors: Sequence[Tensor | None], dtype: torch.dtype | None = None
) -> list[Tensor | None]:
    """Detached copies that keep their layout and require gradients; optionally in another dtype."""
    out: list[Tensor | None] = []
    for t in tensors:
        out.append(None if t is None else t.detach().to(dtype or t.dtype).requires_grad_())
    return out


def run_with_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    tensors: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    dtype: torch.dtype | None = None,
) -> list[Tensor | None]:
    """The outputs of `function(*tensors)`, then the gradient of every tensor that is given.

    With `dtype`, everything is converted first: float64 gives the exact result of the same inputs.
    """
    inputs = leaves(tensors, dtype)
    out = function(*inputs)
    outputs = list(out) if isinstance(out, tuple) else [out]
    used = [
        (y, g.to(dtype or g.dtype)) for y, g in zip(outputs, grads, strict=True) if g is not None
    ]
    sources = [t for t in inputs if t is not None]
    found: Iterator[Tensor | None] = iter(
        torch.autograd.grad([y for y, _ in used], sources, [g for _, g in used], allow_unused=True)
    )
    return [y.detach() for y in outputs] + [next(found) if t is not None else None for t in inputs]
