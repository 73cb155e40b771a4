"""When to stop, which weights to keep, and which learning rate to start from.

`EarlyStopping` is a plain object for a plain loop: give it one number per validation and it says
when to stop, why, and puts the best weights back. `overfitting_gap` reads two loss histories.
`lr_find` runs a learning-rate range test and leaves everything it touched as it found it.
"""

from __future__ import annotations

import copy
import math
import numbers
import os
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastnorm._rewind import rewind, rewind_rng

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["EarlyStopping", "GapReport", "LRFindResult", "lr_find", "overfitting_gap"]


def _number(name: str, value: Any) -> float:
    """`value` as a float; numbers and one-element tensors or arrays qualify, text does not."""
    if isinstance(value, Tensor) or (hasattr(value, "item") and hasattr(value, "size")):
        count = value.numel() if isinstance(value, Tensor) else value.size
        if count != 1:
            raise ValueError(f"{name} must be a single number, got shape {tuple(value.shape)}")
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")
    return float(value)


def _count(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def _choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


class EarlyStopping:
    r"""Stop when a validated quantity has stopped improving, and keep the best weights.

    A value improves on the best so far when, for ``mode="min"``,

    .. math:: v < v_\text{best} - \delta, \qquad
              \delta = \texttt{min\_delta} \;\text{("abs")} \quad\text{or}\quad
                       \texttt{min\_delta}\,|v_\text{best}| \;\text{("rel")}

    and mirrored for ``mode="max"``. An equal value is no improvement, the first finite value is
    one. Training stops once `patience` values in a row have not improved (Prechelt, "Early
    stopping, but when?", 1998). Patience counts calls of `step`, at whatever rhythm the caller
    validates.

    Args:
        patience: values without improvement after which to stop, at least 1.
        mode: ``"min"`` for a loss, ``"max"`` for a score.
        min_delta: the gain that counts as an improvement, at least 0.
        min_delta_mode: ``"abs"``, or ``"rel"`` for a share of ``|best|`` (right for negative values
            too).
        start_from: this many first values are a warm-up: counted as steps, otherwise not looked at.
        target: stop, with reason ``"target"``, at a value at least as good as this.
        diverged: stop, with reason ``"diverged"``, at a value worse than this.
        on_nonfinite: what NaN and infinities do. ``"stop"`` with reason ``"non_finite"``;
            ``"count"`` as a value without improvement; ``"ignore"``; ``"raise"`` a ValueError. None
            of them is ever best.
        keep_best: where the best weights go. ``None`` (not kept), ``"cpu"``, ``"device"`` (beside
            the model), or a path, written atomically. `step` then needs its `model` argument.
        sync: agreement between processes. ``None`` calls no collective. ``True`` (the default
            process group, if there is one) or a ``ProcessGroup`` replaces each value by its mean
            over the ranks, so that every rank decides alike; every rank must then call `step`. A
            callable ``float -> float`` does it your way.
        cumulative: with ``False`` every better value, however small its gain, becomes the best one,
            while gains up to `min_delta` still use up patience. With ``True`` small gains may add
            up.

    Attributes:
        best: best value so far, or ``None``.
        best_step: the step it came from (the call's number from 1, or its `at`), or ``None``.
        num_steps: calls so far.
        num_bad: values since the last improvement.
        stopped: whether training should be over. It stays so until `reset`; later calls change
            nothing.
        reason: ``None``, ``"patience"``, ``"target"``, ``"diverged"`` or ``"non_finite"``.

    Raises:
        ValueError: an argument out of its range. TypeError: an argument of the wrong type.

    Example::

        >>> model = nn.Linear(2, 1)
        >>> stopper = EarlyStopping(patience=2, keep_best="cpu")
        >>> for loss in [1.0, 0.8, 0.9, 0.85, 0.7]:
        ...     if stopper.step(loss, model=model):
        ...         break
        >>> stopper.best, stopper.best_step, stopper.num_steps, stopper.reason
        (0.8, 2, 4, 'patience')
        >>> stopper.restore_best_(model)
        True
    """

    def __init__(
        self,
        patience: int = 5,
        *,
        mode: str = "min",
        min_delta: float = 0.0,
        min_delta_mode: str = "abs",
        start_from: int = 0,
        target: float | None = None,
        diverged: float | None = None,
        on_nonfinite: str = "stop",
        keep_best: str | os.PathLike[str] | None = None,
        sync: Any = None,
        cumulative: bool = True,
    ) -> None:
        self.patience = _count("patience", patience, 1)
        self.mode = _choice("mode", mode, ("min", "max"))
        self.min_delta = _number("min_delta", min_delta)
        if not 0 <= self.min_delta < math.inf:
            raise ValueError(f"min_delta must be finite and at least 0, got {min_delta}")
        self.min_delta_mode = _choice("min_delta_mode", min_delta_mode, ("abs", "rel"))
        self.start_from = _count("start_from", start_from, 0)
        self.target = None if target is None else _number("target", target)
        self.diverged = None if diverged is None else _number("diverged", diverged)
        for name, limit in (("target", self.target), ("diverged", self.diverged)):
            if limit is not None and math.isnan(limit):
                raise ValueError(f"{name} must be a number, got nan")
        self.on_nonfinite = _choice(
            "on_nonfinite", on_nonfinite, ("stop", "count", "ignore", "raise")
        )
        self.keep_best: str | Path | None
        if keep_best is None or keep_best in ("cpu", "device"):
            self.keep_best = keep_best
        elif isinstance(keep_best, (str, os.PathLike)):
            self.keep_best = Path(keep_best)
        else:
            raise TypeError(
                f"keep_best must be None, 'cpu', 'device' or a path, got {type(keep_best).__name__}"
            )
        if sync is False:
            sync = None
        if not (sync is None or sync is True or callable(sync) or _is_group(sync)):
            raise TypeError(
                f"sync must be None, True, a ProcessGroup or a callable, got {type(sync).__name__}"
            )
        self.sync = sync
        self.cumulative = bool(cumulative)
        self.reset()

    def reset(self) -> None:
        """Forget every value and the kept weights, as if newly made."""
        self.best: float | None = None
        self.best_step: int | None = None
        self.num_steps = 0
        self.num_bad = 0
        self.reason: str | None = None
        self._best_model: dict[str, Any] | None = None
        # Written into the file of keep_best, so that another run's file is never taken for ours.
        self._run = uuid.uuid4().hex

    @property
    def stopped(self) -> bool:
        return self.reason is not None

    def step(self, value: Any, *, model: nn.Module | None = None, at: int | None = None) -> bool:
        """Take one validated value; return whether training should stop.

        Args:
            value: a number, or a tensor or array of one element.
            model: the model the value belongs to; needed when `keep_best` is set.
            at: the caller's own step or epoch number, reported as `best_step`. Default: the number
                of this call, from 1.

        Raises:
            TypeError: `value` is not a real number, or `model` is not a module.
            ValueError: `value` has several elements; a non-finite one under
                ``on_nonfinite="raise"``; `model` is missing. The object is as it was before the
                call.
        """
        if self.keep_best is not None and not isinstance(model, nn.Module):
            if model is None:
                raise ValueError(f"model is needed because keep_best={str(self.keep_best)!r}")
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        value = _number("value", value)
        at = None if at is None else _count("at", at, 0)
        if self.stopped:
            return True
        value = self._agree(value)

        num_steps = self.num_steps + 1
        num_bad, reason, improved = self.num_bad, None, False
        if num_steps > self.start_from:
            if math.isfinite(value):
                improved = self._better(value, self._bar())
                num_bad = 0 if improved else num_bad + 1
                if improved or (not self.cumulative and self._better(value, self.best)):
                    label = num_steps if at is None else at
                    if self.keep_best is not None and model is not None:
                        self._keep(model, value, label)
                    self.best, self.best_step = value, label
                reason = self._verdict(value, num_bad)
            elif self.on_nonfinite == "raise":
                raise ValueError(f"value must be finite, got {value} at step {num_steps}")
            elif self.on_nonfinite == "stop":
                reason = "non_finite"
            elif self.on_nonfinite == "count":
                num_bad += 1
                reason = self._verdict(value, num_bad)
        self.num_steps, self.num_bad, self.reason = num_steps, num_bad, reason
        return self.stopped

    def _better(self, value: float, bar: float | None) -> bool:
        if bar is None:
            return True
        return value < bar if self.mode == "min" else value > bar

    def _bar(self) -> float | None:
        """What the next value has to beat."""
        if self.best is None:
            return None
        delta = self.min_delta * (abs(self.best) if self.min_delta_mode == "rel" else 1.0)
        return self.best - delta if self.mode == "min" else self.best + delta

    def _verdict(self, value: float, num_bad: int) -> str | None:
        if math.isfinite(value):
            if self.target is not None and not self._better(self.target, value):
                return "target"
            if self.diverged is not None and self._better(self.diverged, value):
                return "diverged"
        return "patience" if num_bad >= self.patience else None

    def _agree(self, value: float) -> float:
        if self.sync is None:
            return value
        if callable(self.sync):
            return _number("sync(value)", self.sync(value))
        import torch.distributed as dist

        group = None if self.sync is True else self.sync
        if group is None and not (dist.is_available() and dist.is_initialized()):
            return value
        device = "cuda" if "nccl" in dist.get_backend(group) else "cpu"
        mine = torch.tensor([value], dtype=torch.float64, device=device)
        values = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        # Gathered and summed in rank order: the same bits on every rank, which a reduction does not
        # promise.
        dist.all_gather(values, mine, group=group)
        return sum(v.item() for v in values) / len(values)

    def _keep(self, model: nn.Module, value: float, step: int) -> None:
        device = None if self.keep_best == "device" else torch.device("cpu")
        kept = _own_all(model.state_dict(), device)
        if not isinstance(self.keep_best, Path):
            self._best_model = kept
            return
        path = self.keep_best
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f"{path.name}.{os.getpid()}.{uuid.uuid4().hex}.tmp")
        try:
            torch.save({"run": self._run, "step": step, "value": value, "model": kept}, scratch)
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)

    def _kept(self) -> dict[str, Any] | None:
        if self.best is None or not isinstance(self.keep_best, Path):
            return self._best_model
        if not self.keep_best.exists():
            raise RuntimeError(f"{self.keep_best}, which held the best weights, is gone")
        saved = torch.load(self.keep_best, map_location="cpu", weights_only=True)
        found = (saved.get("run"), saved.get("step"), saved.get("value"))
        if found != (self._run, self.best_step, self.best):
            raise RuntimeError(
                f"{self.keep_best} holds another best: expected step {self.best_step} with value "
                f"{self.best} of this run, found step {found[1]} with value {found[2]}"
                + ("" if found[0] == self._run else " of another run")
            )
        return saved["model"]

    def restore_best_(self, model: nn.Module, *, missing_ok: bool = False) -> bool:
        """Load the best weights and buffers (all of ``state_dict()``) into `model`, in place.

        Works after any end of training: early stop, last epoch, Ctrl-C, exception.

        Args:
            model: the model given to `step`, or one of the same structure.
            missing_ok: return ``False`` and leave `model` alone, instead of raising, when no value
                has qualified yet.

        Returns:
            ``True`` when the weights were restored.

        Raises:
            RuntimeError: nothing was kept, or the file of `keep_best` is not this run's best.
            ValueError: `model` has other entries or shapes; it is left unchanged.
        """
        kept = self._kept()
        if kept is None:
            if missing_ok and self.best is None:
                return False
            raise RuntimeError(
                "no best weights were kept: "
                + ("no value has qualified yet" if self.best is None else "keep_best is None")
            )
        # load_state_dict copies what fits before it reports what does not; look first.
        own = model.state_dict()
        wrong = sorted(kept.keys() ^ own.keys()) or [
            f"{name} {_shape(kept[name])} instead of {_shape(entry)}"
            for name, entry in own.items()
            if _shape(kept[name]) != _shape(entry)
        ]
        if wrong:
            raise ValueError(f"model does not match the kept weights: {', '.join(wrong)}")
        # Modules may hold on to what is not a tensor (extra state): they get a copy.
        model.load_state_dict(_own_all(kept, share_tensors=True))
        return True

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings and tensors only; loads with ``torch.load(..., weights_only=True)``.

        Holds the best weights when `keep_best` is ``"cpu"`` or ``"device"``; with a path they stay
        in their file.
        """
        return {
            "mode": self.mode,
            "best": self.best,
            "best_step": self.best_step,
            "num_steps": self.num_steps,
            "num_bad": self.num_bad,
            "reason": self.reason,
            "run": self._run,
            "best_model": self._best_model,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken. The options stay those of this object.

        Raises:
            ValueError: entries are missing or unknown, or `state_dict` is of the other `mode`.
        """
        wrong = sorted(state_dict.keys() ^ self.state_dict().keys())
        if wrong:
            raise ValueError(f"state_dict has missing or unknown entries: {', '.join(wrong)}")
        if state_dict["mode"] != self.mode:
            raise ValueError(
                f"state_dict is of mode {state_dict['mode']!r}, this object of {self.mode!r}"
            )
        best_model = state_dict["best_model"]
        if best_model is not None:
            device = torch.device("cpu") if self.keep_best == "cpu" else None
            best_model = _own_all(best_model, device)
        for name in ("best", "best_step", "num_steps", "num_bad", "reason"):
            setattr(self, name, state_dict[name])
        self._run = state_dict["run"]
        self._best_model = best_model

    def __repr__(self) -> str:
        options = f"patience={self.patience}, mode={self.mode!r}"
        return f"EarlyStopping({options}, best={self.best}, reason={self.reason!r})"


def _is_group(sync: Any) -> bool:
    import torch.distributed as dist

    return dist.is_available() and isinstance(sync, dist.ProcessGroup)


def _shape(entry: Any) -> tuple[int, ...] | None:
    return tuple(entry.shape) if isinstance(entry, Tensor) else None


def _own_all(
    state_dict: Mapping[str, Any],
    device: torch.device | None = None,
    *,
    share_tensors: bool = False,
) -> OrderedDict[str, Any]:
    """A copy that later training can't change, with the version numbers of the modules."""
    own: OrderedDict[str, Any] = OrderedDict()
    for name, entry in state_dict.items():
        if isinstance(entry, Tensor) and share_tensors:
            own[name] = entry
        elif isinstance(entry, Tensor):
            entry = entry.detach()
            own[name] = torch.empty_like(entry, device=device or entry.device).copy_(entry)
        else:
            own[name] = copy.deepcopy(entry)
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is not None:
        own._metadata = copy.deepcopy(metadata)  # type: ignore[attr-defined]
    return own


@dataclass(frozen=True)
class GapReport:
    """What `overfitting_gap` found. Steps count from 1.

    Attributes:
        gap: last validation loss minus last training loss, both smoothed.
        gaps: the same at every step.
        best_step: step of the lowest smoothed validation loss (the first of equals).
        train_change: change of the smoothed training loss since `best_step`.
        val_change: change of the smoothed validation loss since `best_step`.
        overfitting: training loss fell and validation loss rose since `best_step`.
    """

    gap: float
    gaps: tuple[float, ...]
    best_step: int
    train_change: float
    val_change: float
    overfitting: bool


def overfitting_gap(
    train_losses: Iterable[Any], val_losses: Iterable[Any], *, window: int = 1
) -> GapReport:
    """Read overfitting off two loss histories: training loss still falls while validation loss
    rises.

    Args:
        train_losses: one number per step.
        val_losses: one number per step, as many as `train_losses`.
        window: each loss is replaced by the mean of the last `window` ones (fewer at the start).

    Raises:
        ValueError: histories that are empty, of different lengths or not finite; `window` below 1.

    Example::

        >>> report = overfitting_gap([3.0, 2.0, 1.0, 0.5], [3.0, 2.5, 2.75, 3.0])
        >>> report.overfitting, report.best_step, report.gap
        (True, 2, 2.5)
    """
    window = _count("window", window, 1)
    train = [_number("train_losses", value) for value in train_losses]
    val = [_number("val_losses", value) for value in val_losses]
    if len(train) != len(val) or not train:
        raise ValueError(
            "train_losses and val_losses must have the same length, at least 1, "
            f"got {len(train)} and {len(val)}"
        )
    for name, values in (("train_losses", train), ("val_losses", val)):
        if not all(map(math.isfinite, values)):
            raise ValueError(f"{name} must be finite, got {values}")

    def smooth(values: list[float]) -> list[float]:
        tails = (values[max(0, i + 1 - window) : i + 1] for i in range(len(values)))
        return [math.fsum(tail) / len(tail) for tail in tails]

    train, val = smooth(train), smooth(val)
    best = val.index(min(val))
    gaps = tuple(v - t for t, v in zip(train, val, strict=True))
    train_change, val_change = train[-1] - train[best], val[-1] - val[best]
    overfitting = train_change < 0 < val_change
    return GapReport(gaps[-1], gaps, best + 1, train_change, val_change, overfitting)


# --- Learning-rate range test (Smith, "Cyclical learning rates for training neural networks", 2017)


@dataclass(frozen=True)
class LRFindResult:
    """The curve of `lr_find`.

    Attributes:
        lrs: learning rates tried; of the largest group where the optimizer has several.
        losses: loss returned by each step.
        smoothed: their debiased exponential average.
        suggestion: the suggested learning rate, or ``None`` when the curve is too short for one.
        reason: why it ended: ``"completed"``, ``"diverged"`` or ``"non_finite"``.
    """

    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggestion: float | None
    reason: str

    def suggest(self, method: str = "valley") -> float | None:
        """Another suggestion from the same curve: ``"valley"``, ``"steepest"`` or ``"minimum"``."""
        return _suggest(method, self.lrs, self.smoothed)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the curve into `ax` (default: a new figure); needs matplotlib."""
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots()[1]
        ax.plot(self.lrs, self.losses, alpha=0.3, label="loss")
        ax.plot(self.lrs, self.smoothed, label="smoothed")
        if self.suggestion is not None:
            ax.axvline(
                self.suggestion, linestyle="--", color="grey", label=f"{self.suggestion:.1e}"
            )
        ax.set(xscale="log", xlabel="learning rate", ylabel="loss")
        ax.legend()
        return ax


def lr_find(
    step_fn: Callable[[], Any],
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    *,
    start_lr: float = 1e-7,
    end_lr: float = 10.0,
    num_iter: int = 100,
    step_mode: str = "exp",
    beta: float = 0.98,
    diverge: float = 4.0,
    suggest: str | None = "valley",
    restore: Any = (),
) -> LRFindResult:
    r"""Train a few steps with a growing learning rate and suggest one to train with.

    The loss is smoothed as :math:`a_i = \beta a_{i-1} + (1-\beta)\,\ell_i`, divided by
    :math:`1-\beta^i`. The test ends at `num_iter` steps, at a non-finite loss, or when the smoothed
    loss exceeds its lowest value `b` by more than ``(diverge - 1) * |b|`` (for a positive loss:
    ``diverge`` times the lowest).

    Afterwards, whatever happened, an exception included, everything is bit for bit as before: the
    parameters of `optimizer`, their gradients, its state and learning rates, the random generators
    of torch (CPU and devices), Python and numpy, and all that `restore` names. So two calls in a
    row give the same curve, provided `step_fn` starts from the same data.

    Args:
        step_fn: runs one whole training step, with ``optimizer.step()``, and returns its loss.
        optimizer: the optimizer, or several. Groups keep the ratios of their learning rates.
        start_lr, end_lr: first and last learning rate; of the largest group.
        num_iter: number of steps, at least 2.
        step_mode: ``"exp"`` for a geometric, ``"linear"`` for an arithmetic sequence of rates.
        beta: smoothing, in [0, 1).
        diverge: the factor above, greater than 1.
        suggest: ``"valley"`` (half way down the longest descent), ``"steepest"`` (the most
            negative slope against ``log(lr)``, before the minimum), ``"minimum"`` (a tenth of the
            rate with the lowest loss), or ``None``.
        restore: what else to put back: one or several of `nn.Module` (all buffers, modes and plain
            attributes), learning-rate scheduler, `GradScaler`, ``torch.Generator``, or any object
            with ``state_dict`` and ``load_state_dict``. **Name the model here** unless it has
            parameters only.

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong type; nothing has run then.

    Example::

        >>> model = nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> x, y = torch.randn(32, 4), torch.randn(32, 1)
        >>> def step():
        ...     optimizer.zero_grad()
        ...     loss = nn.functional.mse_loss(model(x), y)
        ...     loss.backward()
        ...     optimizer.step()
        ...     return loss
        >>> result = lr_find(step, optimizer, restore=model)
        >>> result.reason in ("completed", "diverged")
        True
    """
    start_lr, end_lr = _number("start_lr", start_lr), _number("end_lr", end_lr)
    if not 0 < start_lr < end_lr < math.inf:
        raise ValueError(f"expected 0 < start_lr < end_lr, got {start_lr} and {end_lr}")
    num_iter = _count("num_iter", num_iter, 2)
    _choice("step_mode", step_mode, ("exp", "linear"))
    beta, diverge = _number("beta", beta), _number("diverge", diverge)
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be in [0, 1), got {beta}")
    if not diverge > 1:
        raise ValueError(f"diverge must be greater than 1, got {diverge}")
    if suggest is not None:
        _choice("suggest", suggest, tuple(_SUGGESTIONS))
    optimizers: list[torch.optim.Optimizer]
    if isinstance(optimizer, torch.optim.Optimizer):
        optimizers = [optimizer]
    else:
        optimizers = list(optimizer)
    for one in optimizers:
        if not isinstance(one, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be an Optimizer, got {type(one).__name__}")
    if not callable(step_fn):
        raise TypeError(f"step_fn must be callable, got {type(step_fn).__name__}")
    extras = list(restore) if isinstance(restore, (list, tuple)) else [restore]

    groups = [group for one in optimizers for group in one.param_groups]
    base = [float(group["lr"]) for group in groups]
    largest = max(base, default=0.0)
    ratios = [lr / largest if largest > 0 else 1.0 for lr in base]
    lrs: list[float] = []
    losses: list[float] = []
    smoothed: list[float] = []
    average, lowest, reason = 0.0, math.inf, "completed"
    with ExitStack() as undo:
        undo.callback(rewind_rng())
        undo.callback(rewind(optimizers, extras))
        for i in range(num_iter):
            t = i / (num_iter - 1)
            if step_mode == "exp":
                lr = start_lr * (end_lr / start_lr) ** t
            else:
                lr = start_lr + (end_lr - start_lr) * t
            for group, ratio in zip(groups, ratios, strict=True):
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(lr * ratio)
                else:
                    group["lr"] = lr * ratio
            loss = _number("the value of step_fn", step_fn())
            if not math.isfinite(loss):
                reason = "non_finite"
                break
            average = beta * average + (1 - beta) * loss
            lrs.append(lr)
            losses.append(loss)
            smoothed.append(average / (1 - beta ** (i + 1)))
            if smoothed[-1] > lowest + (diverge - 1) * abs(lowest):
                reason = "diverged"
                break
            lowest = min(lowest, smoothed[-1])
    suggestion = None if suggest is None else _suggest(suggest, lrs, smoothed)
    return LRFindResult(tuple(lrs), tuple(losses), tuple(smoothed), suggestion, reason)


def _suggest(method: str, lrs: Sequence[float], losses: Sequence[float]) -> float | None:
    # The first tenth is noise of the smoothing; past the minimum the loss only grows.
    skip = len(losses) // 10
    index = _SUGGESTIONS[_choice("method", method, tuple(_SUGGESTIONS))](
        [math.log(lr) for lr in lrs[skip:]], losses[skip:]
    )
    if index is None:
        return None
    return lrs[skip + index] / (10 if method == "minimum" else 1)


def _valley(log_lrs: Sequence[float], losses: Sequence[float]) -> int | None:
    """Half way down the longest descent (a longest decreasing subsequence)."""
    if not losses:
        return None
    length = [1] * len(losses)
    for i in range(len(losses)):
        for j in range(i):
            if losses[i] < losses[j]:
                length[i] = max(length[i], length[j] + 1)
    end = max(range(len(losses)), key=length.__getitem__)
    return None if length[end] == 1 else end - length[end] // 2


def _steepest(log_lrs: Sequence[float], losses: Sequence[float]) -> int | None:
    end = _minimum(log_lrs, losses)
    if not end:
        return None

    def slope(i: int) -> float:
        low, high = max(i - 1, 0), min(i + 1, len(losses) - 1)
        return (losses[high] - losses[low]) / (log_lrs[high] - log_lrs[low])

    return min(range(end + 1), key=slope)


def _minimum(log_lrs: Sequence[float], losses: Sequence[float]) -> int | None:
    return min(range(len(losses)), key=losses.__getitem__, default=None)


_SUGGESTIONS: dict[str, Callable[[Sequence[float], Sequence[float]], int | None]] = {
    "valley": _valley,
    "steepest": _steepest,
    "minimum": _minimum,
}
