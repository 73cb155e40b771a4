r"""Cross-entropy with label smoothing, for class ids and for distributions.

With logits :math:`x`, log-probabilities :math:`\log p = \operatorname{log\_softmax}(x)`, class
weights :math:`w`, target distribution :math:`t` (one-hot for class ids), prior :math:`u` (uniform
by default) and smoothing :math:`\varepsilon`:

.. math:: \ell = -\sum_k w_k \, t'_k \log p_k, \qquad t' = (1 - \varepsilon)\, t + \varepsilon\, u

(Szegedy et al., "Rethinking the Inception architecture", 2016, section 7: the smoothing mass is
spread over all classes, the true one included, which then holds
:math:`1 - \varepsilon + \varepsilon/K`.) The gradient is

.. math:: \partial\ell/\partial x_j = p_j \sum_k w_k t'_k - w_j t'_j .

A class whose logit is :math:`-\infty` is not allowed at that position: the prior is spread over the
others, and :math:`0 \cdot \infty` counts as 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastnorm import _build, _ops
from fastnorm._channels import is_readable
from fastnorm._checks import ClassIdError

__all__ = ["LabelSmoothingCrossEntropy", "cross_entropy", "smooth_labels"]

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # the operator's code


def smooth_labels(
    target: Tensor,
    num_classes: int,
    smoothing: float = 0.1,
    *,
    prior: Tensor | None = None,
    others_only: bool = False,
    dim: int | None = 1,
) -> Tensor:
    r"""The smoothed target distribution :math:`(1 - \varepsilon)\,t + \varepsilon\,u`.

    Args:
        target: integer class ids of any shape, or, when floating point, distributions over `dim`.
        num_classes: number of classes :math:`K`.
        smoothing: :math:`\varepsilon`, in [0, 1].
        prior: distribution :math:`u` over the classes, shape (K,). Default: uniform, :math:`1/K`.
        others_only: spread :math:`\varepsilon` over the other classes only, so that the true class
            keeps exactly :math:`1 - \varepsilon`; :math:`\varepsilon/(K-1)` each under the uniform
            prior.
        dim: where the class dimension is, or goes for class ids; the last one where there are
            fewer. ``None`` with two classes: `target` holds probabilities of class 1, as binary
            cross-entropy takes them.

    Returns:
        Floating point tensor, in the dtype of a floating point `target`, else in torch's default
        dtype.

    Raises:
        ValueError: `smoothing`, `num_classes` or a shape out of range. IndexError: a class id is;
            it is a ValueError too.

    Example::

        >>> smooth_labels(torch.tensor([0, 2]), 4, 0.2)
        tensor([[0.8500, 0.0500, 0.0500, 0.0500],
                [0.0500, 0.0500, 0.8500, 0.0500]])
    """
    _check_smoothing("smoothing", smoothing)
    if num_classes < 1 or (others_only and num_classes < 2):
        raise ValueError(f"num_classes must be at least {1 + others_only}, got {num_classes}")
    prior = _check_prior(prior, num_classes)
    if dim is None:
        if num_classes != 2:
            raise ValueError(f"dim=None is for num_classes=2, got {num_classes}")
        t = target if target.is_floating_point() else target.to(torch.get_default_dtype())
        both = smooth_labels(
            torch.stack([1 - t, t], -1), 2, smoothing, prior=prior, others_only=others_only, dim=-1
        )
        return both[..., 1]
    dim = min(dim, target.dim() - 1 if target.is_floating_point() else target.dim())
    if target.is_floating_point():
        t = target
        if not -t.dim() <= dim < t.dim() or t.shape[dim] != num_classes:
            raise ValueError(
                f"target must have {num_classes} classes in dim {dim}, got shape {tuple(t.shape)}"
            )
    else:
        _check_ids(target, num_classes, None)
        t = nn.functional.one_hot(target.long(), num_classes).to(torch.get_default_dtype())
        t = t.movedim(-1, dim)
    shape = [1] * t.dim()
    shape[dim] = num_classes
    u = t.new_full(shape, 1 / num_classes) if prior is None else prior.to(t).view(shape)
    if others_only:
        u = u * (1 - t)
        u = u / u.sum(dim, keepdim=True)
    return (1 - smoothing) * t + smoothing * u


def cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    prior: Tensor | None = None,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    reduction: str = "mean",
    check_targets: bool = False,
    torch_mean: bool = False,
) -> Tensor:
    r"""Cross-entropy as ``torch.nn.functional.cross_entropy``, right where that one is not defined.

    The formula is at the top of this module. What differs from torch:

    * Masked (:math:`-\infty`) logits give a finite loss under smoothing: the smoothing mass goes to
      the classes that are allowed. Only a target on a masked class is infinitely wrong.
    * ``reduction="mean"`` with `weight` divides by the weight of the actual (smoothed) target,
      :math:`\sum_i \sum_k w_k t'_{ik}`, for class ids and distributions alike. Torch's rules, which
      give different losses for the same labels, come with `torch_mean`.
    * The mean over no position at all (everything ignored or masked) is 0 with zero gradient.
    * Positions can be left out of soft targets too, by `mask`; nothing is read there, not even NaN.

    Args:
        input: logits, (K,), (N, K) or (N, K, d1, ...); any floating dtype, computed in float32 or
            better.
        target: class ids (any integer dtype) of `input`'s shape without K, or distributions of
            `input`'s shape. They are used as they are: not normalized.
        weight: weight of each class, shape (K,).
        label_smoothing: :math:`\varepsilon`, in [0, 1].
        prior: distribution the smoothing mass follows, shape (K,). Default: uniform.
        ignore_index: class id of positions that contribute nothing; may be a valid class.
        mask: bool, of `input`'s shape without K; positions that are ``False`` contribute nothing.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        check_targets: raise on distributions that are negative or sum to 1 only within more than
            1e-3, and on class ids out of range on every device: on CPU they always raise, on CUDA
            they otherwise make the loss NaN. Waits for the device.
        torch_mean: divide as torch does: by :math:`\sum_i w_{y_i}` for class ids (NaN when nothing
            is left), by the number of positions for distributions.

    Returns:
        A scalar, or `input`'s shape without K for ``"none"``, in `input`'s dtype (float32 under
        autocast).

    Raises:
        ValueError, RuntimeError: shapes, `reduction`, `label_smoothing` or dtypes that do not fit.
        IndexError: a class id out of range. It is torch's class, and a ValueError too.

    Example::

        >>> logits = torch.tensor([[2.0, 0.0, float("-inf")], [0.0, 1.0, 0.0]])
        >>> cross_entropy(logits, torch.tensor([0, 1]), label_smoothing=0.1)
        tensor(0.4225)
    """
    if (
        mask is None
        and not check_targets
        and not torch.compiler.is_compiling()
        and (m := _build.module) is not None
    ):
        loss = m.cross_entropy(
            input, target, weight, label_smoothing, prior, ignore_index,
            _REDUCTIONS.get(reduction, -1), torch_mean,
        )  # fmt: skip
        if loss is not None:
            return loss
    tensors = (input, target, weight, prior, mask)
    if torch.overrides.has_torch_function(tensors):
        return torch.overrides.handle_torch_function(
            cross_entropy, tensors, input, target, weight=weight, label_smoothing=label_smoothing,
            prior=prior, ignore_index=ignore_index, mask=mask, reduction=reduction,
            check_targets=check_targets, torch_mean=torch_mean,
        )  # fmt: skip
    if reduction not in _REDUCTIONS:
        raise ValueError(f"{reduction} is not a valid value for reduction")
    if not input.is_floating_point():
        raise RuntimeError(f"input must be floating point, got {input.dtype}")
    if input.dim() == 0:
        raise ValueError("input must have a class dimension, got a scalar")
    dim = min(input.dim() - 1, 1)
    num_classes = input.shape[dim]
    positions = input.shape[:dim] + input.shape[dim + 1 :]
    _check_smoothing("label_smoothing", label_smoothing)
    prior = _check_prior(prior, num_classes)
    if weight is not None and weight.shape != (num_classes,):
        raise RuntimeError(
            f"weight must be defined for all {num_classes} classes, got shape {tuple(weight.shape)}"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != positions):
        raise ValueError(
            f"mask must be bool of shape {tuple(positions)}, got {mask.dtype} {tuple(mask.shape)}"
        )
    soft = target.is_floating_point()
    expected = input.shape if soft else positions
    if target.shape != expected or target.is_complex() or target.dtype == torch.bool:
        raise ValueError(
            f"target must be class ids of shape {tuple(positions)} or distributions of shape "
            f"{tuple(input.shape)}, got {target.dtype} {tuple(target.shape)}"
        )
    if soft and ignore_index >= 0:
        raise RuntimeError(
            f"ignore_index is not supported for floating point target, got {ignore_index}; use mask"
        )
    if soft:
        if check_targets:
            _check_distributions(target, dim, mask)
    else:
        target = target.long()
        if mask is not None:
            target = target.masked_fill(~mask, ignore_index)
    if not soft and input.numel() and _use_kernel(input, weight, prior):
        if check_targets and target.device.type != "cpu":  # the CPU kernel always looks
            _check_ids(target, num_classes, target != ignore_index)
        rows = input if input.dim() == 2 else input.movedim(dim, -1).reshape(-1, num_classes)
        call = (
            _ops.contiguous("input", rows),
            _ops.contiguous("target", target.reshape(-1)),
            weight,
            prior,
            label_smoothing,
            ignore_index,
            _REDUCTIONS[reduction],
            torch_mean,
        )
        if not torch.compiler.is_compiling():
            assert _build.module is not None
            _ops.note(lambda: _ops.describe("cross_entropy", rows))
            loss = _build.module.prepared_cross_entropy(*call)
        elif rows.requires_grad and torch.is_grad_enabled():
            loss = CrossEntropyFunction.apply(*call)
        else:
            loss = torch.ops.fastnorm.cross_entropy(*call, False)[0]
        loss = loss.view(positions) if reduction == "none" else loss
    else:
        keep = mask if soft else target != ignore_index
        if not soft and (check_targets or target.device.type == "cpu"):
            _check_ids(target, num_classes, keep)
        loss = cross_entropy_reference(
            input, target, weight, label_smoothing, prior, keep, reduction, torch_mean
        )
    # The meta device has no autocast to ask for.
    autocast = not input.is_meta and torch.is_autocast_enabled(input.device.type)
    return loss if autocast else loss.to(input.dtype)


def cross_entropy_reference(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    prior: Tensor | None,
    keep: Tensor | None,
    reduction: str,
    torch_mean: bool,
) -> Tensor:
    """The definition, in plain PyTorch, of checked arguments; in float32 or better.

    ``keep`` is the mask of the positions that count (``None``: all of them).
    """
    dim = min(input.dim() - 1, 1)
    num_classes = input.shape[dim]
    along = [num_classes if d == dim else 1 for d in range(input.dim())]
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    soft = target.is_floating_point()

    logits = input.to(dtype)
    if keep is not None:
        logits = logits.masked_fill(~keep.unsqueeze(dim), 0)
        if soft:
            target = target.masked_fill(~keep.unsqueeze(dim), 0)
        else:
            target = target.masked_fill(~keep, 0)
    log_p = logits.log_softmax(dim)
    w = None if weight is None else weight.to(dtype)

    # Each part of the target is its coefficients c = w t', summed over the classes into a mass and
    # a loss.
    def part(c: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        return c.sum(dim), -(c * log_p.masked_fill(c == 0, 0)).sum(dim)

    if soft:
        t = target.to(dtype)
        mass, loss = part(t if w is None else t * w.view(along), log_p)
    else:
        ids = target.unsqueeze(dim)
        c = torch.ones_like(ids, dtype=dtype) if w is None else w[ids]
        mass, loss = part(c, log_p.gather(dim, ids))
    hard_mass = mass
    if label_smoothing > 0:
        u = (
            logits.new_full(along, 1 / num_classes)
            if prior is None
            else prior.to(dtype).view(along)
        )
        u = u * (logits != -torch.inf)
        # Where every allowed class has a prior of 0, nothing is left to smooth with.
        u = u / u.sum(dim, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
        smooth_mass, smooth_loss = part(u if w is None else u * w.view(along), log_p)
        if label_smoothing < 1:
            mass = (1 - label_smoothing) * mass + label_smoothing * smooth_mass
            loss = (1 - label_smoothing) * loss + label_smoothing * smooth_loss
        else:
            mass, loss = smooth_mass, smooth_loss
    if keep is not None:
        loss = loss.masked_fill(~keep, 0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if w is None or (torch_mean and soft):
        mass = torch.ones_like(mass)
    elif torch_mean:
        mass = hard_mass
    total = (mass if keep is None else mass.masked_fill(~keep, 0)).sum()
    return loss.sum() / (total if torch_mean else torch.where(total == 0, 1, total))


def _use_kernel(input: Tensor, weight: Tensor | None, prior: Tensor | None) -> bool:
    # The kernel differentiates the logits alone.
    if any(t is not None and t.requires_grad for t in (weight, prior)):
        return False
    if torch.compiler.is_compiling():
        return _ops.keeps_operator(input, False)
    return _ops.use_kernel(input, weight, prior)


def reference_vjp(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    prior: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    reduction: int,
    torch_mean: bool,
) -> Tensor:
    """The gradient of the logits as a differentiable function, where a backward is recorded."""
    name = next(name for name, code in _REDUCTIONS.items() if code == reduction)
    with torch.enable_grad():
        loss = cross_entropy_reference(
            input, target, weight, label_smoothing, prior, target != ignore_index, name, torch_mean
        )
        return torch.autograd.grad(loss, input, grad, create_graph=True)[0]


class CrossEntropyFunction(torch.autograd.Function):
    """The operator with autograd, for torch.compile; eager mode has this in C++."""

    @staticmethod
    def forward(ctx: Any, input, target, *call):  # type: ignore[no-untyped-def]
        ctx.call = call
        loss, grad, scale = torch.ops.fastnorm.cross_entropy(input, target, *call, True)
        ctx.save_for_backward(input, target, scale, grad)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor):  # type: ignore[no-untyped-def]
        input, target, scale, grad = ctx.saved_tensors
        rest = (None,) * 7
        if torch.is_grad_enabled():
            return reference_vjp(grad_output, input, target, *ctx.call), *rest
        factor = grad_output * scale
        factor = factor.unsqueeze(1) if factor.dim() else factor
        return (grad * factor).to(grad.dtype), *rest


def _fake_cross_entropy(input, target, weight, prior, smoothing, ignore_index, reduction, *rest):  # type: ignore[no-untyped-def]
    double = input.dtype == torch.float64
    dtype = torch.float64 if double else torch.float32
    rows = input.shape[:1] if reduction == 0 else ()
    grad = torch.empty_like(input) if rest[-1] else input.new_empty(0, input.shape[1])
    return input.new_empty(rows, dtype=dtype), grad, input.new_empty((), dtype=dtype)


_ops.FAKES["cross_entropy"] = _fake_cross_entropy


class LabelSmoothingCrossEntropy(nn.Module):
    r"""`cross_entropy` with label smoothing as a module.

    Args:
        smoothing: :math:`\varepsilon`, in [0, 1].
        weight: weight of each class, shape (K,); a buffer, as in ``nn.CrossEntropyLoss``.
        ignore_index: class id of positions that contribute nothing.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Shapes are those of `cross_entropy`; ``forward(input, target, mask=None)``.

    Example::

        >>> criterion = LabelSmoothingCrossEntropy(0.1)
        >>> criterion(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor(1.3863)
    """

    weight: Tensor | None

    def __init__(
        self,
        smoothing: float = 0.1,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        _check_smoothing("smoothing", smoothing)
        if reduction not in _REDUCTIONS:
            raise ValueError(f"{reduction} is not a valid value for reduction")
        self.smoothing = smoothing
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.register_buffer("weight", weight)

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        return cross_entropy(
            input,
            target,
            weight=self.weight,
            label_smoothing=self.smoothing,
            ignore_index=self.ignore_index,
            mask=mask,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return f"smoothing={self.smoothing}, reduction={self.reduction!r}"


def _check_smoothing(name: str, smoothing: float) -> None:
    if not 0.0 <= smoothing <= 1.0:
        raise ValueError(f"{name} must be between 0.0 and 1.0, got {smoothing}")


def _check_prior(prior: Tensor | None, num_classes: int) -> Tensor | None:
    if prior is not None and prior.shape != (num_classes,):
        raise ValueError(
            f"prior must be defined for all {num_classes} classes, got shape {tuple(prior.shape)}"
        )
    return prior


def _check_ids(target: Tensor, num_classes: int, keep: Tensor | None) -> None:
    if not is_readable(target):  # indexing still guards itself
        return
    wrong = (target < 0) | (target >= num_classes)
    if keep is not None:
        wrong &= keep
    if wrong.any():
        raise ClassIdError(
            f"Target {target[wrong][0].item()} is out of bounds: expected 0 to {num_classes - 1}"
        )


def _check_distributions(target: Tensor, dim: int, keep: Tensor | None) -> None:
    sums = target.detach().double().sum(dim)
    wrong = ~((sums - 1).abs() <= 1e-3) | ~(target >= 0).all(dim)
    if keep is not None:
        wrong &= keep
    if wrong.any():
        raise ValueError(
            "target must be distributions: nonnegative with sum 1 within 1e-3, "
            f"got a sum of {sums[wrong][0].item():.6g}"
        )
