"""Penalties on a model's parameters, and every exact way of applying them.

=================  =================================  =============================================
rule               penalty Ω(w)                       proximal step with step size t
=================  =================================  =============================================
``L1(λ)``          λ Σ|w|                             sign(w) · max(|w| − tλ, 0): exact zeros
``L2(λ)``          λ Σw²                              w / (1 + 2tλ)
with ``half``      ½λ Σw²                             w / (1 + tλ)
``L1L2(λ₁, λ₂)``   λ₁ Σ|w| + λ₂ Σw²  (elastic net)    L1's, then L2's
``GroupLasso(λ)``  λ Σ_g √|g| ‖w_g‖  (whole units)    w_g · max(0, 1 − tλ√|g| / ‖w_g‖)
``MaxNorm(c)``     none; the constraint ‖w_g‖ ≤ c     none; ``project_`` scales w_g onto the ball
=================  =================================  =============================================

``half=True`` is the ``weight_decay`` of every optimizer (gradient λw) and Goodfellow, Bengio and
Courville, *Deep Learning*, section 7.1; without it L2 is what most training code adds to its loss
(gradient 2λw). The two differ by that factor and by nothing else. Penalties are sums over all
elements, never means.

A :class:`Regularizer` binds rules to a model. There are four ways to apply it:

=====================  ============================================================================
``loss + reg()``       a differentiable term
``reg.add_grads_()``   adds dΩ/dw to ``.grad``: the same step without a graph, several times faster
``reg.decay_(lr)``     decoupled: w ← w − lr·dΩ/dw, never seen by an optimizer's moments (AdamW)
``reg.prox_(lr)``      after ``optimizer.step()``: the proximal operator, which makes exact zeros
=====================  ============================================================================

For L2 and plain SGD, the first three and ``attach(how="prox")`` are the same trajectory. With
momentum or Adam they differ: the first two pass through the moments ("L2 regularization"), the
others do not (Loshchilov and Hutter 2019, "Decoupled weight decay regularization").
:meth:`Regularizer.attach` installs any of them in an optimizer.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastnorm import _ops
from fastnorm._parameters import RuleKey, assign, key_text, left_out_by, parameters, table
from fastnorm._rules import (
    L1,
    L1L2,
    L2,
    GroupLasso,
    MaxNorm,
    NonNegative,
    Rule,
    UnitNorm,
    l1_penalty,
    l2_penalty,
    nonnegative,
    total,
)

__all__ = [
    "L1",
    "L1L2",
    "L2",
    "AttachedHandle",
    "GroupLasso",
    "MaxNorm",
    "NonNegative",
    "ParamRule",
    "Regularizer",
    "Rule",
    "UnitNorm",
    "l1_penalty",
    "l2_penalty",
    "param_groups_weight_decay",
]


@dataclass(frozen=True)
class ParamRule:
    """One line of :meth:`Regularizer.describe`: which rule a parameter has, and why."""

    name: str
    shape: tuple[int, ...]
    kind: str
    rule: Rule | None
    reason: str


@dataclass
class _Bound:
    """A parameter with its rule, the name of its rule, and the point it is drawn towards."""

    name: str
    param: nn.Parameter
    rule: Rule
    label: str
    reference: Tensor | None

    def reference_here(self) -> Tensor | None:
        """The reference point on the parameter's device, where ``model.to`` may have moved it."""
        if self.reference is not None and self.reference.device != self.param.device:
            self.reference = self.reference.to(self.param.device)
        return self.reference


class Regularizer:
    """Binds penalties and constraints to a model's parameters, each parameter exactly once.

    Args:
        model: any module; DDP, DataParallel and compiled wrappers are looked through, so names are
            the inner model's.
        default: the rule of every parameter that no entry of ``rules`` names and no flag leaves
            out; None for none.
        rules: ``{key: rule}``, or ``{key: None}`` to exempt. A key is a glob pattern on parameter
            names (``"head.*"``), a module type (the parameters its instances own directly,
            subclasses included) or a parameter. A pattern or type passes over parameters that a
            flag leaves out, unless it matches nothing else: ``"head.*"`` takes the head's weight,
            ``"*.bias"`` the biases. An exact name or a parameter always applies.
        bias: include biases (default False).
        norm: include gains and shifts of norms and the other vectors: layer scales, class tokens,
            ``PReLU`` slopes, the gain of weight norm (default False).
        embedding: include embedding tables (default True).
        norm_types: module types to count as norms beside torch's and fastnorm's.

    Tied parameters count once. Frozen ones (``requires_grad=False``) are left out for as long as
    they are frozen. Rules are kept by reference: change ``rule.lam`` at any time. Parameters are
    bound once; after replacing one, make a new regularizer.

    Raises:
        TypeError: ``default`` or a value of ``rules`` is not a :class:`Rule`, or a key has another
            type.
        ValueError: a rule matches no parameter, two rules match the same one, a rule does not fit
            a parameter's shape, or ``toward`` lacks a parameter or has it in another shape.

    Example::

        reg = Regularizer(model, L2(1e-4), rules={"head.*": L1(1e-5), nn.Embedding: None})
        print(reg)                          # one line per parameter, with the reason
        loss = criterion(model(x), y) + reg()
    """

    def __init__(
        self,
        model: nn.Module,
        default: Rule | None = None,
        *,
        rules: Mapping[RuleKey, Rule | None] | None = None,
        bias: bool = False,
        norm: bool = False,
        embedding: bool = True,
        norm_types: tuple[type[nn.Module], ...] = (),
    ):
        rules = dict(rules or {})
        _check_rule("default", default)
        for named, rule in rules.items():
            _check_rule(f"rules: {key_text(named)}", rule)
        self._bound: list[_Bound] = []
        self._labelled: dict[str, list[_Bound]] = {}
        self._described: list[tuple[nn.Parameter, ParamRule]] = []
        self._attached: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self.skipped: dict[str, int] = {"no_grad": 0, "sparse": 0}
        """Parameters that the last ``add_grads_`` passed over, by reason."""
        entries = parameters(model, norm_types)
        for entry, key, reason in assign(entries, rules, left_out_by(bias, norm, embedding)):
            rule = rules[key] if key is not None else default if reason == "default" else None
            shape = tuple(entry.tensor.shape)
            line = ParamRule(entry.name, shape, entry.kind, rule, reason)
            self._described.append((entry.tensor, line))
            if rule is not None:
                label = _label(key, entry.name)
                rule.check(entry.name, entry.tensor)
                reference = _reference(rule, entry.names, entry.tensor)
                bound = _Bound(entry.name, entry.tensor, rule, label, reference)
                self._bound.append(bound)
                self._labelled.setdefault(label, []).append(bound)

    def __call__(self) -> Tensor:
        """The sum of all penalties, a scalar with graph on the first parameter's device.

        With every strength at 0 no parameter is read and no graph node is made.
        """
        terms = [rule.penalty(_differences(group)) for rule, group in self._groups().values()]
        if terms:
            return total(terms)
        return torch.zeros((), device=self._bound[0].param.device if self._bound else None)

    @torch.no_grad()
    def value(self) -> dict[str, Tensor]:
        """Each rule's penalty, detached, by "default", pattern, type name or parameter name."""
        labels = {bound.label: torch.zeros((), device=bound.param.device) for bound in self._bound}
        for label, (rule, group) in self._groups().items():
            labels[label] = rule.penalty(_differences(group))
        return labels

    @torch.no_grad()
    def add_grads_(self, *, scale: float | Tensor = 1.0) -> Tensor:
        """``p.grad += scale * dΩ/dp`` without building a graph; returns Ω, unscaled and detached.

        Call it once per optimizer step, after the last ``backward()`` of an accumulation (and, with
        DDP, after the gradients are reduced: it adds the same on all ranks). Clipping before it
        leaves the penalty unclipped, clipping after it clips both.

        Parameters without a gradient are passed over unless their rule has ``always=True``, and
        those with a sparse gradient always; ``skipped`` counts them. The returned value covers them
        all the same.

        Args:
            scale: the loss scale, a number or a one-element tensor (``scaler.get_scale()`` for
                scaled gradients).

        Raises:
            TypeError, ValueError: ``scale`` is not a finite number >= 0.
        """
        if not isinstance(scale, Tensor):
            scale = nonnegative("scale", scale)
        return self._add_grads(scale)

    @torch.no_grad()
    def decay_(
        self,
        lr: float,
        *,
        schedule: Literal["lr", "relative"] = "lr",
        initial_lr: float | None = None,
    ) -> None:
        """Decoupled step ``w ← w − lr * dΩ/dw``; for ``L2(λ, half=True)`` it is AdamW's.

        With ``schedule="relative"`` the step is ``lr / initial_lr``, so that the decay follows the
        schedule but not the base learning rate.

        Raises:
            TypeError, ValueError: ``lr`` is not a finite number >= 0; ``schedule`` is neither "lr"
                nor "relative"; or ``initial_lr`` is missing or not positive with "relative".
        """
        _check_schedule(schedule)
        lr = nonnegative("lr", lr)
        if schedule == "relative":
            lr /= _positive("initial_lr", initial_lr)
        self._decay(lambda param: lr)

    @torch.no_grad()
    def prox_(self, lr: float) -> None:
        """Proximal step ``w ← argmin_v Ω(v) + ‖v − w‖² / (2 lr)``: exact zeros for L1, GroupLasso.

        Call it after ``optimizer.step()``. It is the closed form in the table at the top of
        :mod:`fastnorm.penalties`, L2 included.

        Raises:
            TypeError, ValueError: ``lr`` is not a finite number >= 0.
        """
        lr = nonnegative("lr", lr)
        self._prox(lambda param: lr)

    @torch.no_grad()
    def project_(self) -> None:
        """Move every parameter with a constraint to the nearest point that meets it."""
        self._project()

    def attach(
        self,
        optimizer: Optimizer,
        how: Literal["grad", "decoupled", "prox"] = "grad",
        *,
        schedule: Literal["lr", "relative"] = "lr",
    ) -> AttachedHandle:
        """Apply this regularizer in every ``optimizer.step()`` from now on.

        ===========  ==============================================================================
        ``how``      what a step does
        ===========  ==============================================================================
        "grad"       ``add_grads_`` before the optimizer's step
        "decoupled"  ``decay_`` before it, with the ``lr`` of each parameter's group
        "prox"       proximal gradient: L2 terms as in "decoupled", then the proximal step of L1 and
                     GroupLasso after the optimizer's. With Adam its step size is still ``lr``
        ===========  ==============================================================================

        "decoupled" and "prox" take ``lr`` for the length of a step. With momentum μ, SGD's are
        1 / (1 − μ) times longer in the long run, and the penalty that much weaker beside the loss.

        Constraints are met again after each step. Only parameters that the optimizer holds are
        touched, so several optimizers may share one regularizer.

        It is right under ``torch.amp.GradScaler``, fused optimizers included: their gradients are
        still scaled inside a step, so the penalty's are multiplied by ``optimizer.grad_scale``, and
        a step that the scaler skips changes nothing. It acts once per step, so it is right with
        gradient accumulation and DDP. Given a closure (LBFGS), it adds the gradients after each
        call of the closure, and the penalty to the loss that the closure returns.

        Args:
            optimizer: a ``torch.optim.Optimizer`` that holds at least one of the bound parameters.
            how: see above. Parameters without a gradient in a step are left alone in all three,
                unless their rule has ``always=True``.
            schedule: as in :meth:`decay_`; "relative" divides by the group's ``initial_lr``, which
                schedulers set, or else by its ``lr`` at the time of attaching.

        Returns:
            A handle; ``handle.remove()``, or leaving it as a context manager, ends the effect.

        Warns:
            UserWarning: the optimizer also decays a parameter that an L2 rule penalizes.

        Raises:
            TypeError: ``optimizer`` is not an optimizer.
            ValueError: ``how`` or ``schedule`` is unknown, this regularizer is attached to
                ``optimizer`` already, or they share no parameter.

        Example::

            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0, fused=True)
            handle = Regularizer(model, L1(1e-5)).attach(optimizer, how="prox")
        """
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        if how not in ("grad", "decoupled", "prox"):
            raise ValueError(f'how: expected "grad", "decoupled" or "prox", got {how!r}')
        _check_schedule(schedule)
        if how == "grad" and schedule != "lr":
            raise ValueError('schedule: "relative" needs how="decoupled" or "prox", got how="grad"')
        if optimizer in self._attached:
            raise ValueError("optimizer: this regularizer is attached to it already")
        held = _groups_of(optimizer)
        shared = [bound for bound in self._bound if bound.param in held]
        if not shared:
            raise ValueError(
                "optimizer: it holds none of the parameters that this regularizer penalizes"
            )
        for bound in shared:
            if held[bound.param].get("weight_decay", 0) and isinstance(bound.rule, L2 | L1L2):
                warnings.warn(
                    f"parameter {bound.name!r} has both {bound.rule!r} and the optimizer's "
                    f"weight_decay={held[bound.param]['weight_decay']}; both apply",
                    stacklevel=2,
                )
                break
        base_lr: dict[Tensor, float] = {
            bound.param: float(held[bound.param].get("initial_lr", held[bound.param]["lr"]))
            for bound in shared
            if schedule == "relative"
        }
        for lr in base_lr.values():
            _positive("initial_lr", lr)
        handle = AttachedHandle(self, optimizer, how, schedule, base_lr)
        self._attached.add(optimizer)
        return handle

    def describe(self) -> list[ParamRule]:
        """A :class:`ParamRule` with the reason for each distinct parameter, in model order."""
        return [
            line
            if param.requires_grad
            else ParamRule(line.name, line.shape, line.kind, None, "frozen")
            for param, line in self._described
        ]

    def __repr__(self) -> str:
        lines = self.describe()
        if not lines:
            return "Regularizer(no parameters)"
        rows = [
            (line.name, "×".join(map(str, line.shape)), line.kind, line.rule or "-", line.reason)
            for line in lines
        ]
        return "Regularizer\n" + table(("parameter", "shape", "kind", "rule", "reason"), rows)

    def state_dict(self) -> dict[str, Any]:
        """Strengths by rule and reference points by parameter name."""
        return {
            "strengths": {
                bound.label: {name: getattr(bound.rule, name) for name in bound.rule._strengths}
                for bound in self._bound
            },
            "toward": {
                bound.name: bound.reference.clone()
                for bound in self._bound
                if bound.reference is not None
            },
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, for a regularizer made with the same rules.

        Raises:
            ValueError: rules, parameters or shapes differ. Nothing is changed then.
        """
        expected = self.state_dict()
        for part in ("strengths", "toward"):
            given = state_dict.get(part)
            if not isinstance(given, Mapping) or set(given) != set(expected[part]):
                keys = sorted(given) if isinstance(given, Mapping) else given
                raise ValueError(
                    f"state_dict[{part!r}]: expected the keys {sorted(expected[part])}, got {keys}"
                )
        for label, strengths in state_dict["strengths"].items():
            if set(strengths) != set(expected["strengths"][label]):
                raise ValueError(
                    f"state_dict['strengths'][{label!r}]: expected the strengths "
                    f"{sorted(expected['strengths'][label])}, got {sorted(strengths)}"
                )
            for name, strength in strengths.items():
                nonnegative(f"state_dict['strengths'][{label!r}][{name!r}]", strength)
        for name, reference in state_dict["toward"].items():
            if reference.shape != expected["toward"][name].shape:
                raise ValueError(
                    f"state_dict['toward'][{name!r}]: expected shape "
                    f"{tuple(expected['toward'][name].shape)}, got {tuple(reference.shape)}"
                )
        for bound in self._bound:
            for name, strength in state_dict["strengths"][bound.label].items():
                setattr(bound.rule, name, strength)
            if bound.reference is not None:
                bound.reference = state_dict["toward"][bound.name].to(bound.reference, copy=True)

    # ---- The same steps for the parameters of one optimizer, each with its own step size.

    def _groups(self, only: _Filter = None) -> dict[str, tuple[Rule, list[_Bound]]]:
        """Trainable parameters under active rules, by label."""
        groups: dict[str, tuple[Rule, list[_Bound]]] = {}
        for label, bounds in self._labelled.items():
            rule = bounds[0].rule
            if not rule.active:
                continue
            chosen = [b for b in bounds if b.param.requires_grad and (not only or only(b))]
            if chosen:
                groups[label] = rule, chosen
        return groups

    def _add_grads(self, scale: float | Tensor, only: _Filter = None, value: bool = True) -> Tensor:
        values: list[Tensor] = []
        self.skipped = {"no_grad": 0, "sparse": 0}
        for rule, group in self._groups(only).values():
            ready, passed = [], []
            for bound in group:
                grad = bound.param.grad
                if grad is None and rule.always:
                    bound.param.grad = torch.zeros_like(bound.param)
                elif grad is None or grad.layout is not torch.strided:
                    self.skipped["no_grad" if grad is None else "sparse"] += 1
                    passed.append(bound)
                    continue
                ready.append(bound)
            for part in _alike(ready):
                grads = [bound.param.grad for bound in part if bound.param.grad is not None]
                ds = _differences(part)
                added = _add_in_one_pass(rule, grads, ds, scale)
                if added is None:
                    rule.add_gradients_(grads, ds, scale)
                if value:
                    values.append(rule.penalty(ds) if added is None else added)
            if value and passed:
                values.append(rule.penalty(_differences(passed)))
        if values:
            return total(values)
        return torch.zeros((), device=self._bound[0].param.device if self._bound else None)

    def _decay(
        self, step: _StepSize, only: _Filter = None, part: _Part = lambda rule: rule
    ) -> None:
        for rule, group in self._groups(only).values():
            if (term := part(rule)) is None or not term.active:
                continue
            for alike in _alike(group, step):
                ds, lr = _differences(alike), step(alike[0].param)
                params: list[Tensor] = [bound.param for bound in alike]
                if lr and _add_in_one_pass(term, params, ds, -lr) is not None:
                    torch.autograd.graph.increment_version(params)
                else:
                    torch._foreach_add_(params, term.gradients(ds), alpha=-lr)

    def _prox(self, step: _StepSize, only: _Filter = None, part: _Part = lambda rule: rule) -> None:
        for rule, group in self._groups(only).values():
            if (term := part(rule)) is None or not term.active:
                continue
            for bound in group:
                reference = bound.reference_here()
                (difference,) = _differences([bound])
                moved = term.prox(difference, step(bound.param))
                bound.param.copy_(moved if reference is None else reference + moved)

    def _project(self, only: _Filter = None) -> None:
        for bound in self._bound:
            if bound.param.requires_grad and (not only or only(bound)):
                projected = bound.rule.project(bound.param)
                if projected is not None:
                    bound.param.copy_(projected)


_Filter = Callable[[_Bound], bool] | None
_StepSize = Callable[[Tensor], float]
_Part = Callable[[Rule], Rule | None]


def _alike(bounds: Iterable[_Bound], step: _StepSize | None = None) -> list[list[_Bound]]:
    """Split by device, dtype and step size, as multi-tensor kernels need."""
    parts: dict[tuple[Any, ...], list[_Bound]] = {}
    for bound in bounds:
        param = bound.param
        key = (param.device, param.dtype, step and step(param))
        parts.setdefault(key, []).append(bound)
    return list(parts.values())


def _differences(bounds: Iterable[_Bound]) -> list[Tensor]:
    """w, or w − w₀ for the parameters with a reference point."""
    ds: list[Tensor] = []
    for bound in bounds:
        reference = bound.reference_here()
        ds.append(bound.param if reference is None else bound.param - reference)
    return ds


def _add_in_one_pass(
    rule: Rule, grads: list[Tensor], ds: list[Tensor], scale: float | Tensor
) -> Tensor | None:
    """Gradient and value by the CPU kernel; None where it does not apply."""
    slopes = rule.slopes()
    if slopes is None or isinstance(scale, Tensor) or ds[0].device.type != "cpu":
        return None
    for grad, d in zip(grads, ds, strict=True):
        if grad.dtype != d.dtype or grad.stride() != d.stride():
            return None
        if not (d.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(d)):
            return None
    if torch.compiler.is_compiling() or not _ops.use_kernel(ds[0], *ds[1:], *grads):
        return None
    l1, l2 = slopes
    sums = torch.ops.fastnorm.add_penalty_grad_(grads, ds, l1 * scale, l2 * scale)
    # With scale 0 nothing was summed.
    return rule.penalty(ds) if scale == 0 else l1 * sums[0] + l2 / 2 * sums[1]


def _reference(rule: Rule, names: list[str], param: Tensor) -> Tensor | None:
    toward = rule.toward
    if toward is None:
        return None
    if isinstance(toward, str) and toward == "init":
        return param.detach().clone()
    if isinstance(toward, Real) and not isinstance(toward, bool):
        if not math.isfinite(toward):
            raise ValueError(f"toward: expected a finite number, got {toward}")
        return torch.tensor(float(toward), dtype=param.dtype, device=param.device)
    if isinstance(toward, Mapping):
        found = [toward[name] for name in names if name in toward]
        if not found:
            raise ValueError(f"toward: the mapping has no entry for parameter {names[0]!r}")
        if not isinstance(found[0], Tensor) or found[0].shape != param.shape:
            given = tuple(found[0].shape) if isinstance(found[0], Tensor) else found[0]
            raise ValueError(
                f"toward: expected a tensor of shape {tuple(param.shape)} for parameter "
                f"{names[0]!r}, got {given}"
            )
        return found[0].detach().to(param, copy=True)
    raise TypeError(f'toward: expected None, "init", a number or a mapping, got {toward!r}')


def _label(key: RuleKey | None, name: str) -> str:
    if isinstance(key, type):
        return f"{key.__module__}.{key.__qualname__}".removeprefix("torch.nn.modules.")
    return "default" if key is None else key if isinstance(key, str) else name


def _check_rule(label: str, rule: Rule | None) -> None:
    if rule is not None and not isinstance(rule, Rule):
        raise TypeError(f"{label}: expected a rule such as L2(1e-4), or None, got {rule!r}")


def _check_schedule(schedule: str) -> None:
    if schedule not in ("lr", "relative"):
        raise ValueError(f'schedule: expected "lr" or "relative", got {schedule!r}')


def _positive(name: str, value: float | None) -> float:
    if value is None or nonnegative(name, value) == 0:
        raise ValueError(f"{name}: expected a number > 0, got {value}")
    return float(value)


def _groups_of(optimizer: Optimizer) -> dict[Tensor, dict[str, Any]]:
    return {param: group for group in optimizer.param_groups for param in group["params"]}


class AttachedHandle:
    """Removes what :meth:`Regularizer.attach` installed: by ``remove()``, or on leaving it as a
    context manager."""

    def __init__(
        self,
        regularizer: Regularizer,
        optimizer: Optimizer,
        how: str,
        schedule: str,
        base_lr: dict[Tensor, float],
    ):
        self._regularizer, self._base_lr = regularizer, base_lr
        self._how, self._schedule = how, schedule
        self._optimizer = weakref.ref(optimizer)
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def remove(self) -> None:
        """Undo the attachment; a second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        optimizer = self._optimizer()
        if optimizer is not None and self._hooks:
            self._regularizer._attached.discard(optimizer)
        self._hooks = []

    def __enter__(self) -> AttachedHandle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    @torch.no_grad()
    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._how == "grad":
            held = _groups_of(optimizer)
            closure = (
                kwargs["closure"] if "closure" in kwargs else args[1] if len(args) > 1 else None
            )
            if closure is None:
                scale = _loss_scale(optimizer)
                self._regularizer._add_grads(scale, lambda b: b.param in held, value=False)
                return None

            def penalized() -> Any:
                loss = closure()
                with torch.no_grad():
                    value = self._regularizer._add_grads(1.0, lambda b: b.param in held)
                return loss if loss is None else loss + value

            # args[0] is the optimizer itself.
            return (args[0], penalized, *args[2:]), {
                k: v for k, v in kwargs.items() if k != "closure"
            }
        step, only = self._step_sizes(optimizer)
        if not _skips(optimizer):
            smooth = self._how == "prox"
            self._regularizer._decay(step, only, lambda rule: rule.smooth() if smooth else rule)
        return None

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        step, only = self._step_sizes(optimizer)
        if _skips(optimizer):
            return
        if self._how == "prox":
            self._regularizer._prox(step, only, lambda rule: rule.kinked())
        self._regularizer._project(only)

    def _step_sizes(self, optimizer: Optimizer) -> tuple[_StepSize, _Filter]:
        """Each parameter's step size, and which parameters this optimizer moves now."""
        held = _groups_of(optimizer)

        def step(param: Tensor) -> float:
            lr = float(held[param]["lr"])
            if self._schedule == "lr":
                return lr
            return lr / self._base_lr.setdefault(param, float(held[param].get("initial_lr", lr)))

        def only(bound: _Bound) -> bool:
            return bound.param in held and (bound.param.grad is not None or bound.rule.always)

        return step, only


def _loss_scale(optimizer: Optimizer) -> float | Tensor:
    """What the gradients of a fused optimizer are still multiplied by: GradScaler leaves unscaling
    to its kernel."""
    scale = getattr(optimizer, "grad_scale", None)
    found_inf = getattr(optimizer, "found_inf", None)
    if scale is None:
        scale = 1.0
    if isinstance(found_inf, Tensor):  # 0 for a step that will be skipped, without a host sync
        scale = scale * (found_inf == 0)
    return scale


def _skips(optimizer: Optimizer) -> bool:
    """Whether GradScaler found an inf and the fused optimizer skips this step."""
    return bool(getattr(optimizer, "found_inf", None) or False)


# ---- Parameter groups


def param_groups_weight_decay(
    model: nn.Module,
    weight_decay: float = 1e-2,
    *,
    bias: bool = False,
    norm: bool = False,
    embedding: bool = True,
    no_decay: Iterable[RuleKey] = (),
    rules: Mapping[RuleKey, float | None] | None = None,
    norm_types: tuple[type[nn.Module], ...] = (),
) -> list[dict[str, Any]]:
    """Optimizer parameter groups with weight decay where it belongs, by module type and not by
    name.

    Every parameter is in exactly one group, tied and frozen ones too. Biases, gains and shifts of
    norms, and vectors (layer scales, class tokens, ``PReLU`` slopes, the gain of weight norm) are
    not decayed; matrices and embeddings are. A parameter that a module of your own holds directly
    is a vector when at most one of its dimensions is larger than 1, so a free position table is
    decayed unless ``no_decay`` names it.

    Args:
        model: any module; DDP and compiled wrappers are looked through. weight_decay: for the
            decayed parameters, finite and >= 0. bias, norm, embedding, norm_types: as in
            :class:`Regularizer`. no_decay: patterns, module types or parameters to leave undecayed.
            rules: a weight decay of its own, or None for 0, by pattern, module type or parameter.
            Which parameters a key
            reaches is as in :class:`Regularizer`.

    Returns:
        Groups ``{"params": [...], "param_names": [...], "weight_decay": w}``, one for each distinct
        value: ``weight_decay`` first, then the values of ``rules`` in their order, then 0. Empty
        groups are left out, and names and order follow the model, so the same call on the same
        architecture restores an optimizer's state.

    Raises:
        TypeError: a strength is not a number, or a key has the wrong type.
        ValueError: a strength is negative or not finite, a key matches no parameter, or two match
            the same one.

    Example::

        groups = param_groups_weight_decay(model, 0.05, no_decay=("*pos_embed",))
        optimizer = torch.optim.AdamW(groups, lr=1e-3)
    """
    default = nonnegative("weight_decay", weight_decay)
    if isinstance(no_decay, str):
        raise TypeError(f"no_decay: expected a sequence of patterns, got the string {no_decay!r}")
    no_decay = tuple(no_decay)
    decays: dict[RuleKey, float] = {}
    for key, decay in (rules or {}).items():
        decays[key] = 0.0 if decay is None else nonnegative(f"rules: {key_text(key)}", decay)
    for key in no_decay:
        if key in decays:
            raise ValueError(f"no_decay: {key_text(key)} is in rules too; expected it once")
        decays[key] = 0.0
    groups: dict[float, dict[str, Any]] = {
        decay: {"params": [], "param_names": [], "weight_decay": decay}
        for decay in dict.fromkeys([default, *(d for d in decays.values() if d), 0.0])
    }
    entries = parameters(model, norm_types)
    left_out = left_out_by(bias, norm, embedding)
    for entry, key_of, reason in assign(entries, decays, left_out, no_decay):
        decay = decays[key_of] if key_of is not None else default if reason == "default" else 0.0
        groups[decay]["params"].append(entry.tensor)
        groups[decay]["param_names"].append(entry.name)
    return [group for group in groups.values() if group["params"]]
