"""What each parameter of a model is, and which rule reaches it.

Weight decay, penalties and the model checks all ask the same two questions: *is this tensor a
weight, a bias, a norm's gain, an embedding?* and *which of the user's rules names it?* Both are
answered here, once, by module type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

#: A rule names parameters by glob pattern, by the type of the module that owns them, or by
#: themselves.
RuleKey = str | type[nn.Module] | nn.Parameter
T = TypeVar("T")

TORCH_NORMS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,  # batch and instance norm, SyncBatchNorm
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Bilinear, *CONVS, *TRANSPOSED)


@dataclass
class Parameter:
    """One distinct parameter tensor: every name it has, every module that owns it, and its kind."""

    tensor: nn.Parameter
    kind: str  # "weight" | "bias" | "norm" | "embedding" | "vector"
    names: list[str] = field(default_factory=list)
    owners: list[nn.Module] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.names[0]


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel and torch.compile, whose names users
    know."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def is_norm(module: nn.Module, norm_types: tuple[type[nn.Module], ...] = ()) -> bool:
    """True for torch's norms, fastnorm's norms, subclasses of either, and the types in
    ``norm_types``."""
    return isinstance(module, TORCH_NORMS + norm_types) or any(
        base.__module__.partition(".")[0] == "fastnorm" and "Norm" in base.__name__
        for base in type(module).__mro__
    )


def parameters(model: nn.Module, norm_types: tuple[type[nn.Module], ...] = ()) -> list[Parameter]:
    """Every distinct parameter of ``model`` in the order of ``model.named_parameters()``, frozen
    ones included.

    Raises:
        TypeError: ``model`` is not a module, or ``norm_types`` holds something else than module
            types. ValueError: a parameter is lazy and has no shape yet.
    """
    for norm_type in norm_types:
        if not (isinstance(norm_type, type) and issubclass(norm_type, nn.Module)):
            raise TypeError(f"norm_types: expected torch.nn.Module types, got {norm_type!r}")
    model = unwrap(model)
    found: dict[int, Parameter] = {}
    parents: dict[
        int, tuple[nn.Module, str]
    ] = {}  # a parametrization list -> its layer, its tensor
    for prefix, module in model.named_modules(remove_duplicate=False):
        if parametrize.is_parametrized(module):
            for tensor_name, chain in module.parametrizations.items():
                parents[id(chain)] = (module, tensor_name)
        for local, tensor in module._parameters.items():
            if tensor is None:
                continue
            name = f"{prefix}.{local}" if prefix else local
            if is_lazy(tensor):
                raise ValueError(
                    f"model: parameter {name!r} is lazy and has no shape; run a forward pass first"
                )
            owner, role = parents.get(id(module), (module, local))
            if id(tensor) not in found:
                kind = _kind(module, owner, local, role, tensor, norm_types)
                found[id(tensor)] = Parameter(tensor, kind)
            entry = found[id(tensor)]
            if name not in entry.names:
                entry.names.append(name)
                entry.owners.append(owner)
    return list(found.values())


def _kind(
    module: nn.Module,
    owner: nn.Module,
    local: str,
    role: str,
    tensor: torch.Tensor,
    norm_types: tuple[type[nn.Module], ...],
) -> str:
    """``module`` holds ``tensor`` as ``local``; for a parametrized tensor ``owner`` uses it as
    ``role``."""
    if is_norm(owner, norm_types):
        return "norm"
    if _is_weight_norm_gain(module, local):
        return "vector"
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    vector = sum(size != 1 for size in tensor.shape) <= 1
    bias_like = role.startswith("bias") or role.endswith("bias")
    if isinstance(owner, nn.PReLU):
        return "vector"
    if _is_torch_layer(owner):
        # Linear(10, 1).weight has one non-singleton dimension and is a matrix all the same.
        if bias_like:
            return "bias"
        if "weight" in role:
            return "weight"
    if vector:
        return "bias" if bias_like else "vector"
    return "weight"


def _is_torch_layer(module: nn.Module) -> bool:
    return any(
        base.__module__.startswith("torch.nn.modules.")
        and not base.__module__.endswith((".module", ".container"))
        for base in type(module).__mro__
    )


def _is_weight_norm_gain(module: nn.Module, local: str) -> bool:
    if isinstance(module, parametrize.ParametrizationList):
        return local == "original0" and type(module[0]).__name__ == "_WeightNorm"
    return (
        local.endswith("_g") and f"{local[:-2]}_v" in module._parameters
    )  # torch.nn.utils.weight_norm


def key_text(key: RuleKey) -> str:
    """How messages and tables write a rule's key."""
    if isinstance(key, torch.Tensor):
        return f"parameter of shape {tuple(key.shape)}"
    return key.__name__ if isinstance(key, type) else repr(key)


def _matcher(key: RuleKey) -> Callable[[Parameter], bool]:
    if isinstance(key, str):
        return lambda entry: any(fnmatchcase(name, key) for name in entry.names)
    if isinstance(key, torch.Tensor):
        return lambda entry: entry.tensor is key
    if isinstance(key, type) and issubclass(key, nn.Module):
        return lambda entry: any(isinstance(owner, key) for owner in entry.owners)
    raise TypeError(
        "rules: expected keys that are name patterns, module types or parameters, "
        f"got {key!r} of type {type(key).__name__}"
    )


def assign(
    entries: list[Parameter],
    rules: Mapping[RuleKey, T],
    left_out: Callable[[Parameter], str],
    no_decay: Collection[RuleKey] = (),
) -> Iterator[tuple[Parameter, RuleKey | None, str]]:
    """Give each parameter at most one rule: yields ``(parameter, key or None, reason)``.

    ``left_out(parameter)`` is the reason the flags leave it out, or "". A pattern or type passes
    over parameters that are left out unless it matches nothing else (``"head.*"`` takes the head's
    weight, ``"*.bias"`` takes biases); an exact name or a parameter always applies. Keys that the
    caller was given as `no_decay` are called so in errors.

    Raises:
        TypeError: a key is neither pattern, module type nor parameter.
        ValueError: a rule matches no parameter, or two rules match the same one.
    """
    chosen: dict[int, RuleKey] = {}
    for key in rules:
        matches = _matcher(key)
        matched = [entry for entry in entries if matches(entry)]
        if not matched:
            argument = "no_decay" if key in no_decay else "rules"
            raise ValueError(f"{argument}: {key_text(key)} matches no parameter of the model")
        named = isinstance(key, torch.Tensor) or any(key in entry.names for entry in matched)
        kept = [entry for entry in matched if not left_out(entry)]
        for entry in matched if named or not kept else kept:
            if id(entry) in chosen:
                raise ValueError(
                    f"rules: parameter {entry.name!r} is matched by two rules, "
                    f"{key_text(chosen[id(entry)])} and {key_text(key)}; expected exactly one"
                )
            chosen[id(entry)] = key
    for entry in entries:
        key_of = chosen.get(id(entry))
        if key_of is not None:
            yield entry, key_of, f"rule {key_text(key_of)}"
        else:
            yield entry, None, left_out(entry) or "default"


def left_out_by(bias: bool, norm: bool, embedding: bool) -> Callable[[Parameter], str]:
    """The flags of ``Regularizer`` and ``param_groups_weight_decay`` as a reason to leave a
    parameter out."""
    kinds = {"bias": bias, "norm": norm, "vector": norm, "embedding": embedding}
    return lambda entry: "" if kinds.get(entry.kind, True) else entry.kind


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Plain text with aligned columns."""
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def positive(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {value!r} of type {type(value).__name__}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a finite number > 0, got {value}")
    return float(value)


def raw_parameter(module: nn.Module, name: str) -> torch.Tensor | None:
    """The parameter that stores a tensor: itself, or the first original of its parametrization."""
    if parametrize.is_parametrized(module, name):
        chains: Any = module.parametrizations
        return next(chains[name].parameters(recurse=False), None)
    return module._parameters.get(name)


@torch.no_grad()
def change_(module: nn.Module, name: str, how: Callable[[torch.Tensor], Any]) -> None:
    """Change a layer's tensor in place by ``how``, through its parametrization if it has one."""
    if not parametrize.is_parametrized(module, name):
        how(getattr(module, name))
        return
    value = getattr(module, name).detach().clone()
    how(value)
    setattr(module, name, value)


def orthogonal_(weight: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """``torch.nn.init.orthogonal_`` for every dtype: its QR knows no float16 and bfloat16."""
    wide = torch.empty(
        weight.shape,
        dtype=torch.promote_types(weight.dtype, torch.float32),
        device=weight.device,
    )
    return weight.copy_(nn.init.orthogonal_(wide, generator=generator))
