"""The rules of :mod:`fastnorm.penalties`: each a formula, its gradient and its proximal step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn


def nonnegative(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {value!r} of type {type(value).__name__}")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
    return float(value)


# ---- Sums, differentiable and in at least float32


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def total(terms: Sequence[Tensor]) -> Tensor:
    """Sum of scalars that may live on several devices, on the first one's."""
    if len(terms) == 1:
        return terms[0]
    device = terms[0].device
    return torch.stack([term.to(device) for term in terms]).sum()


def _sum_squares(w: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # the compiler fuses the plain form, and knows no custom jvp
        return w.to(_sum_dtype(w)).square().sum()
    return _SumSquares.apply(w)


def _sum_abs(w: Tensor) -> Tensor:
    return torch.linalg.vector_norm(w, 1, dtype=_sum_dtype(w))


class _SumSquares(torch.autograd.Function):
    """Σw²; d/dw = 2w. One read forward, one read and one write backward, where ``w.square().sum()``
    makes five passes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(w: Tensor) -> Tensor:
        # BLAS reads at memory speed; vector_norm takes every dtype and layout, and sums in float32.
        if w.dtype in (torch.float32, torch.float64) and w.is_contiguous():
            flat = w.view(-1)
            return torch.dot(flat, flat)
        return torch.linalg.vector_norm(w, dtype=_sum_dtype(w)).square()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (w,) = ctx.saved_tensors
        return w * (2 * grad)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (w,) = ctx.saved_tensors
        return 2 * (w * tangent).sum(dtype=_sum_dtype(w))


def _tensors(params: Tensor | Iterable[Tensor]) -> list[Tensor]:
    if isinstance(params, nn.Module):
        raise TypeError("params: expected tensors, got a module; pass module.parameters()")
    tensors = [params] if isinstance(params, Tensor) else list(params)
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"params: expected tensors, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"params: expected floating-point tensors, got {tensor.dtype}")
    return tensors


def l1_penalty(params: Tensor | Iterable[Tensor], lam: float = 1.0) -> Tensor:
    """``lam * Σ|w|`` over all elements of ``params``, summed in float32 or wider.

    Args:
        params: a floating-point tensor or an iterable of them, of any shapes. All are summed as
            given: nothing is left out and a tensor listed twice counts twice (:class:`Regularizer`
            is the one that knows biases and ties).
        lam: strength, finite and >= 0. With 0 no tensor is read and no graph is made.

    Returns:
        A scalar; its gradient is ``lam * sign(w)``, with 0 at 0.

    Raises:
        TypeError: ``params`` holds something else than floating-point tensors, or ``lam`` is not a
            number.
        ValueError: ``lam`` is negative or not finite.

    Example::

        loss = criterion(model(x), y) + l1_penalty(model.parameters(), 1e-5)
    """
    return _scaled_sum(_sum_abs, _tensors(params), nonnegative("lam", lam))


def l2_penalty(
    params: Tensor | Iterable[Tensor], lam: float = 1.0, *, half: bool = False
) -> Tensor:
    """``lam * Σw²`` (``half=True``: ``lam / 2 * Σw²``) over ``params``, summed in float32 or wider.

    Arguments, errors and the meaning of ``lam=0`` are those of :func:`l1_penalty`; the gradient is
    ``2 * lam * w``, or ``lam * w`` with ``half=True``, which is what an optimizer's
    ``weight_decay=lam`` adds.

    Example::

        loss = criterion(model(x), y) + l2_penalty(model.parameters(), 1e-4)
    """
    lam = nonnegative("lam", lam)
    return _scaled_sum(_sum_squares, _tensors(params), lam / 2 if half else lam)


def _scaled_sum(function: Callable[[Tensor], Tensor], ws: Sequence[Tensor], lam: float) -> Tensor:
    if lam == 0 or not ws:
        return torch.zeros((), device=ws[0].device if ws else None)
    return lam * total([function(w) for w in ws])


# ---- Rules

#: Where a penalty pulls to: zero, the values at binding time, one number, or tensors by parameter
#: name.
Toward = Literal["init"] | float | Mapping[str, Tensor] | None


class Rule:
    """A penalty or constraint for some parameters; a plain object that holds strengths and no
    tensors of the model.

    Strengths are attributes, checked when set, and may be changed at any time (a schedule:
    ``rule.lam *= 0.9``).
    """

    #: Names of the strengths: what ``repr`` shows and ``Regularizer.state_dict`` saves.
    _strengths: tuple[str, ...] = ()
    toward: Toward = None
    always: bool = False

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._strengths:
            value = nonnegative(name, value)
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        parts = [f"{name}={getattr(self, name):g}" for name in self._strengths]
        parts += [f"{flag}=True" for flag in ("half", "always") if getattr(self, flag, False)]
        parts += [f"dim={self.dim}"] if hasattr(self, "dim") else []
        if self.toward is not None:
            shown = "{...}" if isinstance(self.toward, Mapping) else repr(self.toward)
            parts.append(f"toward={shown}")
        return f"{type(self).__name__}({', '.join(parts)})"

    @property
    def active(self) -> bool:
        """Whether there is a penalty now: False for constraints and when every strength is 0. No
        parameter is read then."""
        return any(getattr(self, name) > 0 for name in self._strengths)

    # d is w, or w − w₀ where the rule has a ``toward``.

    def penalty(self, ds: Sequence[Tensor]) -> Tensor:
        """Ω as a differentiable scalar."""
        return torch.zeros((), device=ds[0].device)

    def gradients(self, ds: Sequence[Tensor]) -> list[Tensor]:
        """dΩ/dw, newly allocated."""
        return [torch.zeros_like(d) for d in ds]

    def add_gradients_(
        self, grads: list[Tensor], ds: Sequence[Tensor], scale: float | Tensor
    ) -> None:
        """``grads += scale * dΩ/dw`` for tensors alike in device and dtype."""
        slopes = self.gradients(ds)
        if isinstance(scale, Tensor):
            torch._foreach_mul_(slopes, scale.reshape(()).to(slopes[0].device))
            torch._foreach_add_(grads, slopes)
        else:
            torch._foreach_add_(grads, slopes, alpha=scale)

    def slopes(self) -> tuple[float, float] | None:
        """(a, b) when Ω = a Σ|w| + b/2 Σw², which one pass over w can apply."""
        return None

    def prox(self, d: Tensor, step: float) -> Tensor:
        """argmin_v Ω(v) + ‖v − d‖² / (2 step)."""
        return d

    def smooth(self) -> Rule | None:
        """The terms that proximal gradient descends; it takes the proximal step of ``kinked()``."""
        return None

    def kinked(self) -> Rule | None:
        return self

    def project(self, w: Tensor) -> Tensor | None:
        """The nearest tensor that meets the constraint; None when ``w`` meets it or there is no
        constraint."""
        return None

    def check(self, name: str, w: Tensor) -> None:
        """Raise ValueError when the rule cannot apply to parameter ``name``."""


class L1(Rule):
    """``lam * Σ|w − w₀|``, the lasso (Tibshirani 1996). Gradient ``lam * sign(w − w₀)``, 0 at the
    kink.

    Args:
        lam: strength, finite and >= 0; 0 switches the rule off.
        toward: ``w₀``. None for 0; ``"init"`` for the values at the time the rule is bound to a
            model; a number; or a mapping from parameter names to tensors, such as a pretrained
            ``state_dict()``. Copied, never trained, and part of ``Regularizer.state_dict()``.
        always: also penalize, in ``add_grads_``, parameters that got no gradient in this step.

    Gradient steps make weights small and oscillating, not zero: for exact zeros use ``prox_`` or
    ``attach(how="prox")``.

    Example::

        reg = Regularizer(model, L1(1e-5))
    """

    _strengths = ("lam",)

    def __init__(self, lam: float, *, toward: Toward = None, always: bool = False):
        self.lam, self.toward, self.always = lam, toward, always

    def penalty(self, ds: Sequence[Tensor]) -> Tensor:
        return l1_penalty(ds, self.lam)

    def gradients(self, ds: Sequence[Tensor]) -> list[Tensor]:
        signs = torch._foreach_sign(list(ds))
        torch._foreach_mul_(signs, self.lam)
        return list(signs)

    def slopes(self) -> tuple[float, float]:
        return self.lam, 0.0

    def prox(self, d: Tensor, step: float) -> Tensor:
        return nn.functional.softshrink(d, step * self.lam)


class L2(Rule):
    """``lam * Σ(w − w₀)²``; with ``half=True`` ``lam / 2 * Σ(w − w₀)²``, the ``weight_decay`` of
    optimizers.

    Also known as ridge regression, Tikhonov regularization and, for plain SGD, weight decay.
    Gradient ``2 * lam * (w − w₀)`` or, with ``half=True``, ``lam * (w − w₀)``. The other arguments
    are those of :class:`L1`; with ``toward="init"`` this is the L2-SP penalty of transfer learning
    (Li, Grandvalet and Davoine 2018).

    Example::

        reg = Regularizer(model, L2(5e-4, half=True))  # SGD(weight_decay=5e-4)
    """

    _strengths = ("lam",)

    def __init__(
        self, lam: float, *, half: bool = False, toward: Toward = None, always: bool = False
    ):
        self.lam, self.half, self.toward, self.always = lam, half, toward, always

    @property
    def slope(self) -> float:
        """The factor of w in the gradient."""
        return self.lam if self.half else 2 * self.lam

    def penalty(self, ds: Sequence[Tensor]) -> Tensor:
        return l2_penalty(ds, self.lam, half=self.half)

    def gradients(self, ds: Sequence[Tensor]) -> list[Tensor]:
        return list(torch._foreach_mul(list(ds), self.slope))

    def add_gradients_(
        self, grads: list[Tensor], ds: Sequence[Tensor], scale: float | Tensor
    ) -> None:
        if isinstance(scale, Tensor):
            super().add_gradients_(grads, ds, scale)
        else:
            torch._foreach_add_(grads, list(ds), alpha=self.slope * scale)

    def slopes(self) -> tuple[float, float]:
        return 0.0, self.slope

    def prox(self, d: Tensor, step: float) -> Tensor:
        return d / (1 + step * self.slope)

    def smooth(self) -> Rule | None:
        return self

    def kinked(self) -> Rule | None:
        return None


class L1L2(Rule):
    """Elastic net (Zou and Hastie 2005): ``l1 * Σ|w| + l2 * Σw²``, with ``half=True`` ``l1 * Σ|w| +
    l2 / 2 * Σw²``.

    Args:
        l1, l2: strengths, finite and >= 0; a term with strength 0 costs nothing.
        half, always: as in :class:`L2`.

    Example::

        reg = Regularizer(model, L1L2(l1=1e-5, l2=1e-4))
    """

    _strengths = ("l1", "l2")

    def __init__(
        self, l1: float = 0.0, l2: float = 0.0, *, half: bool = False, always: bool = False
    ):
        self.l1, self.l2, self.half, self.always = l1, l2, half, always

    @classmethod
    def from_ratio(
        cls, lam: float, ratio: float = 0.5, *, half: bool = False, always: bool = False
    ) -> L1L2:
        """``lam * (ratio * Σ|w| + (1 − ratio) * Σw²)``: ratio 1 is the lasso, 0 is ridge.

        ``half=True`` halves the second term, which is glmnet's and scikit-learn's definition (whose
        loss is ``‖y − Xw‖² / (2 n)``, so that ``lam`` is their ``alpha`` for a mean of squares
        halved).

        Raises:
            ValueError: ``lam`` is negative or not finite, or ``ratio`` is outside [0, 1].
        """
        lam, ratio = nonnegative("lam", lam), nonnegative("ratio", ratio)
        if ratio > 1:
            raise ValueError(f"ratio: expected a number in [0, 1], got {ratio}")
        return cls(lam * ratio, lam * (1 - ratio), half=half, always=always)

    def _terms(self) -> list[Rule]:
        return [term for term in (L1(self.l1), L2(self.l2, half=self.half)) if term.active]

    def penalty(self, ds: Sequence[Tensor]) -> Tensor:
        return total([term.penalty(ds) for term in self._terms()])

    def gradients(self, ds: Sequence[Tensor]) -> list[Tensor]:
        first, *rest = [term.gradients(ds) for term in self._terms()]
        for more in rest:
            torch._foreach_add_(first, more)
        return first

    def slopes(self) -> tuple[float, float]:
        return self.l1, self.l2 if self.half else 2 * self.l2

    def prox(self, d: Tensor, step: float) -> Tensor:
        # Soft threshold, then shrink: in this order it is the proximal step of the sum.
        for term in self._terms():
            d = term.prox(d, step)
        return d

    def smooth(self) -> Rule | None:
        return L2(self.l2, half=self.half)

    def kinked(self) -> Rule | None:
        return L1(self.l1)


class _PerUnit(Rule):
    """A rule on the slices of a parameter along ``dim``."""

    def __init__(self, dim: int):
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise TypeError(f"dim: expected an integer, got {dim!r}")
        self.dim = dim

    def check(self, name: str, w: Tensor) -> None:
        if not -w.dim() <= self.dim < w.dim():
            raise ValueError(
                f"rules: {self!r} needs a dimension {self.dim}, "
                f"but parameter {name!r} has shape {tuple(w.shape)}"
            )

    def _norms(self, w: Tensor) -> Tensor:
        """‖w_g‖ in at least float32, broadcastable to ``w``."""
        others = [axis for axis in range(w.dim()) if axis != self.dim % w.dim()]
        if not others:
            return w.to(_sum_dtype(w)).abs()
        return torch.linalg.vector_norm(w, dim=others, keepdim=True, dtype=_sum_dtype(w))

    def _root_size(self, w: Tensor) -> float:
        return math.sqrt(w.numel() / max(w.shape[self.dim], 1))


class GroupLasso(_PerUnit):
    """``lam * Σ_g √|g| ‖w_g‖`` over the slices ``w_g`` along ``dim`` (Yuan and Lin 2006): whole
    units go to zero.

    Args:
        lam: strength, finite and >= 0. dim: the axis that numbers the units. 0 is the output units
            of ``Linear`` and ``Conv``, 1 their inputs. always: as in :class:`L1`.

    The gradient is 0 at a group that is zero. Exact zeros need ``prox_`` or ``attach(how="prox")``.

    Example::

        reg = Regularizer(model, rules={nn.Conv2d: GroupLasso(1e-4)})
        handle = reg.attach(optimizer, how="prox")
    """

    _strengths = ("lam",)

    def __init__(self, lam: float, *, dim: int = 0, always: bool = False):
        super().__init__(dim)
        self.lam, self.always = lam, always

    def penalty(self, ds: Sequence[Tensor]) -> Tensor:
        if not self.active:
            return super().penalty(ds)
        return self.lam * total([self._root_size(d) * self._norms(d).sum() for d in ds])

    def gradients(self, ds: Sequence[Tensor]) -> list[Tensor]:
        grads = []
        for d in ds:
            norms = self._norms(d)
            factor = self.lam * self._root_size(d) / norms
            grads.append((d * factor.masked_fill(norms == 0, 0)).to(d.dtype))
        return grads

    def prox(self, d: Tensor, step: float) -> Tensor:
        norms = self._norms(d)
        threshold = step * self.lam * self._root_size(d)
        factor = (1 - threshold / norms).clamp_min(0).masked_fill(norms == 0, 0)
        return (d * factor).to(d.dtype)


class MaxNorm(_PerUnit):
    """The constraint ``‖w_g‖ ≤ max_norm`` on every slice along ``dim`` (Srebro and Shraibman 2005).

    Applied by :meth:`Regularizer.project_`, which an attached regularizer calls after every step. A
    unit outside is scaled onto the ball; one inside keeps its bits. It adds nothing to the loss.

    Example::

        reg = Regularizer(model, rules={"fc*.weight": MaxNorm(3.0)})
    """

    _strengths = ("max_norm",)

    def __init__(self, max_norm: float, *, dim: int = 0):
        super().__init__(dim)
        self.max_norm = max_norm

    @property
    def active(self) -> bool:
        return False

    def project(self, w: Tensor) -> Tensor | None:
        norms = self._norms(w)
        # Rounding the scaled elements to w's dtype must not carry the norm back over the bound.
        margin = 1 - 4 * torch.finfo(w.dtype).eps
        outside = norms > self.max_norm
        return torch.where(outside, (w * (self.max_norm * margin / norms)).to(w.dtype), w)


class UnitNorm(_PerUnit):
    """The constraint ``‖w_g‖ = 1`` on every slice along ``dim``; a slice of zeros stays zero.

    Example::

        reg = Regularizer(model, rules={nn.Embedding: UnitNorm()})
    """

    def __init__(self, *, dim: int = 0):
        super().__init__(dim)

    def project(self, w: Tensor) -> Tensor | None:
        norms = self._norms(w)
        return (w / norms.masked_fill(norms == 0, 1)).to(w.dtype)


class NonNegative(Rule):
    """The constraint ``w ≥ 0``.

    Example::

        reg = Regularizer(model, rules={"dictionary": NonNegative()})
    """

    def project(self, w: Tensor) -> Tensor | None:
        return w.clamp_min(0)


#: Rules that bound the parameters and add nothing to the loss.
CONSTRAINTS = (MaxNorm, UnitNorm, NonNegative)
