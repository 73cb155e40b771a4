"""Whole models: torch's norms and dropouts become ours in place, and go back.

A module keeps its identity: only its class changes, as in torch's lazy and parametrized modules,
and the attributes that ours has in addition appear. Parameters, buffers, hooks, names, flags and
every reference to the module stay as they are because nothing touches them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.lazy import LazyModuleMixin

from fastnorm.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from fastnorm.dropout import (
    AlphaDropout,
    Dropout,
    Dropout1d,
    Dropout2d,
    Dropout3d,
    FeatureAlphaDropout,
)
from fastnorm.group_norm import GroupNorm
from fastnorm.instance_norm import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from fastnorm.layer_norm import LayerNorm
from fastnorm.rms_norm import RMSNorm
from fastnorm.sync_batch_norm import SyncBatchNorm

__all__ = ["Change", "Report", "replace", "restore"]

# Each of torch's classes, ours, and the smallest arguments that construct either.
CLASSES: dict[type[nn.Module], tuple[type[nn.Module], tuple[int, ...]]] = {
    nn.LayerNorm: (LayerNorm, (1,)),
    nn.RMSNorm: (RMSNorm, (1,)),
    nn.BatchNorm1d: (BatchNorm1d, (1,)),
    nn.BatchNorm2d: (BatchNorm2d, (1,)),
    nn.BatchNorm3d: (BatchNorm3d, (1,)),
    nn.SyncBatchNorm: (SyncBatchNorm, (1,)),
    nn.GroupNorm: (GroupNorm, (1, 1)),
    nn.InstanceNorm1d: (InstanceNorm1d, (1,)),
    nn.InstanceNorm2d: (InstanceNorm2d, (1,)),
    nn.InstanceNorm3d: (InstanceNorm3d, (1,)),
    nn.Dropout: (Dropout, ()),
    nn.Dropout1d: (Dropout1d, ()),
    nn.Dropout2d: (Dropout2d, ()),
    nn.Dropout3d: (Dropout3d, ()),
    nn.AlphaDropout: (AlphaDropout, ()),
    nn.FeatureAlphaDropout: (FeatureAlphaDropout, ()),
}
_BASES = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase, _DropoutNd)

# Norms of model libraries that are one of ours where `_prove` agrees. RMS norms end so:
_RMS_NAMES = (
    "RMSNorm",
    "Pix2StructLayerNorm",
    "Pop2PianoLayerNorm",
    "SwitchTransformersLayerNorm",
    "T5LayerNorm",
    "UdopLayerNorm",
)
# Subclasses of torch.nn.LayerNorm are called so:
_LAYER_NAMES = (
    "ConvNextLayerNorm",
    "ConvNextV2LayerNorm",
    "Fp32LayerNorm",
    "LayerNorm2d",
    "LayerNormFp32",
)
_EPS_NAMES = ("variance_epsilon", "eps", "epsilon")

_RECORD = "_fastnorm_replaced"
FOLDED = "_fastnorm_folded"  # what `fuse` folded into a norm
BASE = "_fastnorm_base"  # the class of a module whose forward `fuse` rewrote
NORMS = "_fastnorm_norms"  # and the names of the norms that it calls otherwise than before


@dataclass(frozen=True)
class Change:
    """One module in a `Report`.

    Attributes:
        name: where it is in the model; every name of a module that is used in several places,
            "(root)" for the model itself.
        before, after: its class; `after` is None for a module that was left alone.
        reason: why it was left alone; None otherwise.
    """

    name: str
    before: str
    after: str | None = None
    reason: str | None = None


@dataclass
class Report:
    """What `replace` or `restore` did; `print` shows it as a table.

    Attributes:
        swapped: the modules that changed their class.
        skipped: the norms and dropouts that were left alone, and why.
    """

    swapped: list[Change] = field(default_factory=list)
    skipped: list[Change] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.swapped and not self.skipped:
            return "no norm or dropout that fastnorm knows; nothing changed"
        return table(f"{len(self.swapped)} swapped, {len(self.skipped)} skipped",
                     self.swapped + self.skipped)  # fmt: skip


def table(head: str, changes: list[Change]) -> str:
    """The changes as lines, like ones together: how many, what, where."""
    groups: dict[str, list[str]] = {}
    for c in changes:
        what = f"{c.before} -> {c.after}" if c.after else f"{c.before} left alone: {c.reason}"
        groups.setdefault(what, []).append(c.name)
    lines = [head]
    for what, names in groups.items():
        more = f", and {len(names) - 2} more" if len(names) > 3 else ""
        shown = names[:2] if more else names
        lines.append(f"{len(names):>5}  {what}  [{', '.join(shown)}{more}]")
    return "\n".join(lines)


class _Record(NamedTuple):
    """How to undo a swap: the classes, the attributes and buffers added, and what they hid."""

    theirs: type[nn.Module]
    ours: type[nn.Module]
    added: dict[str, Any]
    buffers: tuple[str, ...]
    hidden: dict[str, Any]


class Fold(NamedTuple):
    """What a norm does beside normalizing since `fuse`."""

    plain: type[nn.Module]
    fused: type[nn.Module]
    activation: str | None
    dropout_p: float

    def apply(self, norm: nn.Module) -> None:
        if self.plain is not self.fused:
            norm.__class__ = self.fused
        vars(norm).update({"activation": self.activation, "dropout_p": self.dropout_p})
        vars(norm)[FOLDED] = self


class _Skip(Exception):
    pass


_CHANGED = "its class was changed again after {}: undo that first"


def unfold(module: nn.Module) -> str | None:
    """Undoes `fuse` on one module; returns the class that it has then, None if it had nothing.

    Raises:
        _Skip: somebody else gave the module another class since.
    """
    cls = type(module)
    fold: Fold | None = vars(module).get(FOLDED)
    if fold is not None:
        if fold.plain is not fold.fused:
            if cls is not fold.fused:
                raise _Skip(_CHANGED.format("fuse"))
            module.__class__ = fold.plain
        del vars(module)[FOLDED]
        vars(module).update({"activation": None, "dropout_p": 0.0})
    elif BASE in vars(cls):
        module.__class__ = vars(cls)[BASE]
    elif hasattr(cls, BASE):
        raise _Skip(_CHANGED.format("fuse"))
    else:
        return None
    return class_name(type(module))


def class_name(cls: type) -> str:
    return f"fastnorm.{cls.__name__}" if cls.__module__.startswith("fastnorm.") else cls.__name__


def places(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module of the model once, under all of its names."""
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        modules[id(module)] = module
        names.setdefault(id(module), []).append(name or "(root)")
    for key, module in modules.items():
        yield " = ".join(names[key]), module


def _additions(theirs: type[nn.Module]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The attributes and the (absent) buffers that our class has in addition to torch's."""
    ours, arguments = CLASSES[theirs]
    plain, fused = theirs(*arguments), ours(*arguments)
    attributes = {k: v for k, v in vars(fused).items() if k not in vars(plain)}
    return attributes, tuple(name for name in fused._buffers if name not in plain._buffers)


def _one_argument(cls: type[nn.Module]) -> bool:
    """Whether forward takes the input alone: a second argument would become our residual."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = list(inspect.signature(cls.forward).parameters.values())
    return len(parameters) == 2 and all(p.kind in kinds for p in parameters)


def _channels_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    rows = F.layer_norm(x.movedim(1, -1), (x.shape[1],), weight, bias, eps)
    return rows.movedim(-1, 1)


def _prove(module: nn.Module, shape: tuple[int, ...], formula: Callable[..., Tensor]) -> bool:
    """Whether the module computes `formula(x, weight, bias)`: results and gradients agree.

    With random parameters in place of the module's, on the CPU, without its hooks, for rows whose
    size makes eps matter and for others. 32 units of roundoff are more than the sums of a norm
    lose, and far less than any other formula is away. Gradients in float32 only: in 16 bits they
    are as good as the order of the module's casts.
    """
    cls = type(module)
    clone = cls.__new__(cls)
    generator = torch.Generator("cpu").manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64, device="cpu")

    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    scales = torch.tensor([1e-3, 1.0, 30.0], dtype=torch.float64, device="cpu")
    x = draw(3, *shape) * scales.reshape(3, *[1] * len(shape))
    values = [x, *[draw(*p.shape) for p in parameters.values()]]
    grad = draw(*x.shape)
    for dtype, unit, compared in ((torch.float32, 2.0**-24, None), (torch.bfloat16, 2.0**-8, 1)):
        found: list[list[Any]] = []
        for wide in (False, True):
            inputs = [t.to(dtype) for t in values]
            inputs = [(t.double() if wide else t).requires_grad_() for t in inputs]
            named = dict(zip(parameters, inputs[1:], strict=True))
            if wide:
                y = formula(inputs[0], named.get("weight"), named.get("bias"))
            else:
                vars(clone).update(vars(module), _parameters={**module._parameters, **named})
                y = cls.forward(clone, inputs[0])
                if y.shape != x.shape or y.dtype != dtype:
                    return False
            y.backward(grad.to(y.dtype))
            found.append([y.detach(), *[t.grad for t in inputs]][:compared])
        for theirs, exact in zip(*found, strict=True):
            rows = exact.reshape(3, -1) if exact.shape == x.shape else exact.reshape(1, -1)
            error = (theirs.double().reshape(rows.shape) - rows).abs().amax(1)
            if not bool((error <= 32 * unit * rows.abs().amax(1)).all()):
                return False
    return True


def _library_norm(module: nn.Module) -> tuple[type[nn.Module], dict[str, Any]]:
    """Our class and the attributes that make a model library's norm one of ours.

    Raises:
        _Skip: there is none, or the proof failed.
    """
    name = type(module).__name__
    layer = isinstance(module, nn.LayerNorm) and name in _LAYER_NAMES
    if not layer and not name.endswith(_RMS_NAMES):
        base = next((b.__name__ for b in CLASSES if isinstance(module, b)), None)
        raise _Skip(
            f"a subclass of torch.nn.{base}, whose code may differ"
            if base
            else "not a class that is known to compute one of our norms"
        )
    if not _one_argument(type(module)):
        raise _Skip("its forward takes more than the input")
    eps = next((getattr(module, n) for n in _EPS_NAMES if hasattr(module, n)), None)
    weight = module._parameters.get("weight")
    shape = () if weight is None else tuple(weight.shape)
    others = set(module._parameters) - ({"weight", "bias"} if layer else {"weight"})
    if not isinstance(eps, (int, float)) or len(shape) != 1:
        raise _Skip("it has no eps, or no weight of one dimension")
    if others or module._modules or module._buffers:
        raise _Skip("it has more parameters, buffers or modules than the norm it is named for")
    c = shape[0]
    tried: list[tuple[tuple[int, ...], Callable[..., Tensor], dict[str, Any]]]
    if layer:
        tried = [
            ((2, c), lambda x, w, b: F.layer_norm(x, shape, w, b, eps), {}),
            ((c, 2, 3), lambda x, w, b: _channels_norm(x, w, b, eps), {"dim": 1}),
        ]
    else:
        tried = [
            ((2, c), lambda x, w, b: F.rms_norm(x, shape, w, eps), {}),
            ((2, c), lambda x, w, b: F.rms_norm(x, shape, 1 + w, eps), {"weight_offset": 1.0}),
        ]
    for size, formula, options in tried:
        try:
            with torch.inference_mode(False), torch.enable_grad():
                same = _prove(module, size, formula)
        except Exception:  # whatever a foreign forward raises: it is not this norm
            same = False
        if same and "dim" in options:
            # Ours would be right, and slow what follows: convolutions that now see channels-last.
            raise _Skip("it permutes channels-first input, and its result is channels-last")
        if same:
            theirs = nn.LayerNorm if layer else nn.RMSNorm
            attributes = dict(_additions(theirs)[0])
            attributes |= {"normalized_shape": shape, "eps": eps, "elementwise_affine": True}
            return CLASSES[theirs][0], attributes | options
    raise _Skip("its results on random inputs are not those of the norm it is named for")


def _target(module: nn.Module) -> tuple[type[nn.Module], dict[str, Any], tuple[str, ...]] | None:
    """Our class for a module with the attributes and buffers to add; None if it is no norm."""
    cls = type(module)
    name = cls.__name__
    if cls.__module__.startswith("fastnorm."):
        if _RECORD in vars(module) or isinstance(module, _BASES):
            raise _Skip("already fastnorm's")
        return None
    named = not name.startswith("_") and any(n in name for n in ("Norm", "Dropout", "DropPath"))
    if not isinstance(module, _BASES) and (module._modules or not named):
        return None
    if isinstance(module, LazyModuleMixin):
        raise _Skip("lazy: run a forward first")
    if nn.utils.parametrize.is_parametrized(module):
        raise _Skip("parametrized: replace the norm first, then parametrize it")
    if "forward" in vars(module):
        raise _Skip("its forward was replaced on the instance")
    if cls in CLASSES:
        return CLASSES[cls][0], *_additions(cls)
    return *_library_norm(module), ()


def _swap(module: nn.Module) -> str | None:
    """Makes the module ours; returns the name of the class it now has, None if it is no norm."""
    target = _target(module)
    if target is None:
        return None
    ours, added, buffers = target
    theirs = type(module)
    hidden = {name: vars(module)[name] for name in added if name in vars(module)}
    try:
        module.__class__ = ours
    except TypeError as error:
        raise _Skip(f"its class can't be changed: {error}") from None
    vars(module).update(added)
    for name in buffers:
        module.register_buffer(name, None, persistent=False)
    vars(module)[_RECORD] = _Record(theirs, ours, added, buffers, hidden)
    return class_name(ours)


def unswap(module: nn.Module) -> str | None:
    """Undoes `fuse` and `replace` on one module; as `_swap`."""
    unfolded = unfold(module)
    record: _Record | None = vars(module).get(_RECORD)
    if record is None and unfolded:
        return unfolded
    if record is None:
        if type(module).__module__.startswith("fastnorm.") and isinstance(module, _BASES):
            raise _Skip("built as fastnorm's, nothing to go back to")
        return None
    if type(module) is not record.ours:
        raise _Skip(_CHANGED.format("replace"))
    for name, value in record.added.items():
        if vars(module)[name] != value:
            raise _Skip(
                f"{name} was set to {vars(module)[name]!r} after replace, which "
                f"{record.theirs.__name__} does not have"
            )
    for name in record.buffers:
        delattr(module, name)
    for name in (*record.added, _RECORD):
        del vars(module)[name]
    vars(module).update(record.hidden)
    module.__class__ = record.theirs
    return record.theirs.__name__


def check_model(model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return model


def _walk(model: nn.Module, change: Callable[[nn.Module], str | None]) -> Report:
    report = Report()
    for name, module in places(model):
        before = class_name(type(module))
        try:
            after = change(module)
        except _Skip as skip:
            report.skipped.append(Change(name, before, reason=str(skip)))
        else:
            if after is not None:
                report.swapped.append(Change(name, before, after))
    return report


def replace(model: nn.Module) -> Report:
    """Make torch's norms and dropouts in a model fastnorm's, in place.

    Every module whose class is exactly `torch.nn.LayerNorm`, `RMSNorm`, `BatchNorm1d/2d/3d`,
    `SyncBatchNorm`, `GroupNorm`, `InstanceNorm1d/2d/3d`, `Dropout`, `Dropout1d/2d/3d`,
    `AlphaDropout` or `FeatureAlphaDropout` gets the fastnorm class of the same name. It stays the
    same object, with the same parameters and buffers, state_dict keys, hooks, name and flags: an
    optimizer, a reference held elsewhere or a checkpoint does not notice. `model` may be such a
    module itself.
    `torch.nn` is not touched.

    A norm of a model library is swapped where its class is named as such (``LlamaRMSNorm``,
    ``T5LayerNorm``, ``ConvNextLayerNorm``, ...) and its results and gradients on random inputs are
    those of the norm. Such a class may return float32 for a 16-bit input with float32 weights; ours
    returns the input's dtype.

    Call it before `torch.compile`, DistributedDataParallel or `fully_shard` wrap the model.
    Dropout's masks are fastnorm's own (docs/dropout.md): a seed drops other elements than before.

    Args:
        model: any module; built with weights, on the meta device, or loaded.

    Returns:
        A `Report`: what was swapped, what was skipped and why. Norms that were skipped work as
        before.

    Raises:
        TypeError: `model` is no module.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Dropout(0.1))
        >>> print(fastnorm.replace(model))
        2 swapped, 0 skipped
            1  LayerNorm -> fastnorm.LayerNorm  [1]
            1  Dropout -> fastnorm.Dropout  [2]
    """
    return _walk(check_model(model), _swap)


def restore(model: nn.Module) -> Report:
    """Undo `replace` and `fuse`: every module that they changed has its own class again.

    A module whose added attributes were set since (an `activation`, say, or a frozen batch norm)
    is left alone, because its class of before can't do that; so is one built as fastnorm's.

    Args:
        model: a model, or a part or a copy of it, on which `replace` or `fuse` was called.

    Returns:
        A `Report`: what went back, what did not and why.

    Raises:
        TypeError: `model` is no module.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        >>> report = fastnorm.replace(model)
        >>> print(fastnorm.restore(model))
        1 swapped, 0 skipped
            1  fastnorm.LayerNorm -> LayerNorm  [1]
    """
    folding = {
        m.get_submodule(name)
        for m in check_model(model).modules()
        for name in getattr(type(m), NORMS, ())
    }

    def change(module: nn.Module) -> str | None:
        if FOLDED in vars(module) and module not in folding:
            raise _Skip("fused into a module outside of this part: restore that")
        return unswap(module)

    return _walk(model, change)
