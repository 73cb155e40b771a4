"""Initialization: variance scaling with the fans of the layer, gains by definition, and
data-dependent inits.

A unit y = Σ_{i=1..n} w_i x_i with independent w of variance v and inputs of second moment m has
second moment n v m, and an activation f multiplies the second moment of a unit normal by E[f(z)²].
Signals keep their size when v = gain² / n with gain² = 1 / E[f(z)²]; n is the fan-in, or the
fan-out for gradients. The literature's names:

=====================  ===========================  ==========================================
variance               name                         here
=====================  ===========================  ==========================================
1 / fan_in             LeCun 1998; often "Xavier"   ``lecun_normal_(w)``
2 / (fan_in+fan_out)   Glorot and Bengio 2010       ``variance_scaling_(w, mode="fan_avg")``
2 / fan_in             He et al. 2015, "Kaiming"    ``variance_scaling_(w, 2.0)``
gain² / fan_in         by activation                ``init_(model, "silu")``
=====================  ===========================  ==========================================

The second and third are ``torch.nn.init.xavier_normal_`` and ``kaiming_normal_``, except that
``torch.nn.init`` reads fans off the shape of a tensor. They are wrong for grouped convolutions
(fan-out), transposed ones (swapped), and the packed projections of attention and recurrent layers;
:func:`fans_of` asks the layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from numbers import Real
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from fastnorm._data_init import InitReport, LayerInit, lsuv_, weight_norm_init_
from fastnorm._parameters import (
    CONVS,
    LAYERS,
    TRANSPOSED,
    change_,
    orthogonal_,
    positive,
    raw_parameter,
    unwrap,
)

__all__ = [
    "InitReport",
    "LayerInit",
    "fans_of",
    "gain",
    "init_",
    "lecun_normal_",
    "lecun_uniform_",
    "lsuv_",
    "variance_scaling_",
    "weight_norm_init_",
]

Mode = Literal["fan_in", "fan_out", "fan_avg"]
Distribution = Literal["normal", "truncated_normal", "uniform"]
Activation = Callable[[Tensor], Tensor]

# The standard deviation of a unit normal cut off at ±2.
_TRUNCATED_STD = 0.87962566103423978

_ACTIVATIONS: dict[str, Activation] = {
    "linear": lambda z: z,
    "identity": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "selu": F.selu,
    "celu": F.celu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "swish": F.silu,
    "mish": F.mish,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "hardsigmoid": F.hardsigmoid,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


# ---- Gains


def gain(nonlinearity: str | Activation, negative_slope: float | None = None) -> float:
    """``1 / √E[f(z)²]`` for z ~ N(0, 1): the factor that keeps the second moment of activations.

    Computed from the definition by quadrature, so any function has one: relu √2, gelu 1.534, silu
    1.676, selu 1. ``torch.nn.init.calculate_gain`` agrees for relu and leaky relu; its tanh 5/3 is
    a rule of thumb (the definition gives 1.593), and its selu 3/4 breaks self-normalization.

    For functions that are not homogeneous, unit variance is a fixed point that need not be stable:
    deep gelu and silu networks without norms drift from it. :func:`lsuv_` measures instead.

    Args:
        nonlinearity: a name such as ``"gelu"``, or a function from tensors to tensors of the same
            shape.
        negative_slope: of ``"leaky_relu"`` (default 0.01).

    Raises:
        ValueError: the name is unknown, ``negative_slope`` is given for another function, or the
            function is 0 or not finite.
        TypeError: ``nonlinearity`` is neither.

    Example::

        torch.nn.init.orthogonal_(layer.weight, gain=fastnorm.init.gain("silu"))
    """
    if negative_slope is not None and nonlinearity != "leaky_relu":
        raise ValueError(f'negative_slope: only for "leaky_relu", got it for {nonlinearity!r}')
    if isinstance(nonlinearity, str):
        return _named_gain(nonlinearity, 0.01 if negative_slope is None else float(negative_slope))
    if not callable(nonlinearity):
        raise TypeError(f"nonlinearity: expected a name or a function, got {nonlinearity!r}")
    return _gain(nonlinearity)


@lru_cache(maxsize=128)
def _named_gain(name: str, negative_slope: float) -> float:
    if name not in _ACTIVATIONS:
        raise ValueError(f"nonlinearity: expected one of {sorted(_ACTIVATIONS)}, got {name!r}")
    if name == "leaky_relu":
        return _gain(lambda z: F.leaky_relu(z, negative_slope))
    return _gain(_ACTIVATIONS[name])


def _gain(function: Activation) -> float:
    with torch.no_grad():
        # The trapezoid rule converges faster than any power of the step here, or as its square at a
        # kink.
        z = torch.linspace(-12, 12, 24_001, dtype=torch.float64, device="cpu")
        density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
        moment = torch.trapezoid(function(z).square() * density, z).item()
    if not (math.isfinite(moment) and moment > 0):
        raise ValueError(
            f"nonlinearity: E[f(z)²] must be finite and > 0, got {moment} for {function!r}"
        )
    return 1 / math.sqrt(moment)


# ---- Fans


def fans_of(module: nn.Module, name: str = "weight") -> tuple[float, float]:
    """(fan_in, fan_out) of a layer's weight: how many inputs one output sums over, and the reverse.

    ===========================  =======================  =========================
    layer                        fan_in                   fan_out
    ===========================  =======================  =========================
    ``Linear``                   in                       out
    ``Bilinear``                 in1 · in2                out
    ``Conv*d``, g groups         in / g · ∏k              out / g · ∏k
    ``ConvTranspose*d``          in / g · ∏max(k / s, 1)  out / g · ∏k
    ``MultiheadAttention``       of each projection       of each projection
    ``LSTM``, ``GRU``, ``RNN``   of each gate             of each gate
    ``Embedding``                1: a row is looked up    embedding_dim
    ===========================  =======================  =========================

    k is the kernel size and s the stride. A strided transposed convolution spreads its taps over
    the outputs, so each output sums over k / s of them on average; the fan-out of a strided
    convolution is torch's, which does not count the stride.

    Args:
        module: one of the layers above or a subclass, parametrized or not.
        name: the parameter, for layers with several (``"in_proj_weight"``, ``"weight_hh_l0"``).

    Raises:
        TypeError: another kind of module.
        ValueError: ``name`` is not a weight of ``module``, or the module is lazy.

    Example::

        fan_in, fan_out = fans_of(nn.ConvTranspose2d(8, 32, 3))  # (72, 288)
    """
    weight = getattr(module, name, None) if isinstance(module, nn.Module) else None
    known = (
        *LAYERS,
        nn.MultiheadAttention,
        nn.RNNBase,
        nn.RNNCellBase,
        nn.Embedding,
        nn.EmbeddingBag,
    )
    if not isinstance(module, known):
        raise TypeError(
            "module: expected a linear, convolution, attention, recurrent or embedding layer, got "
            f"{type(module).__name__}; pass fans=(fan_in, fan_out) to variance_scaling_ instead"
        )
    if not isinstance(weight, Tensor) or "bias" in name:
        raise ValueError(f"name: {type(module).__name__} has no weight {name!r}")
    if is_lazy(weight):
        raise ValueError(
            "module: its weight is lazy and has no shape yet; run a forward pass first"
        )
    if isinstance(module, CONVS):
        taps = math.prod(module.kernel_size)
        return (
            module.in_channels / module.groups * taps,
            module.out_channels / module.groups * taps,
        )
    if isinstance(module, TRANSPOSED):
        taps = math.prod(module.kernel_size)
        taps_in = math.prod(
            max(k / s, 1) for k, s in zip(module.kernel_size, module.stride, strict=True)
        )
        return (
            module.in_channels / module.groups * taps_in,
            module.out_channels / module.groups * taps,
        )
    if isinstance(module, nn.Bilinear):
        return float(module.in1_features * module.in2_features), float(module.out_features)
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return 1.0, float(module.embedding_dim)
    rows, columns = weight.shape
    return float(columns), rows / _packed(module, name)


def _packed(module: nn.Module, name: str) -> int:
    """How many matrices are stacked in the rows of a weight."""
    if isinstance(module, nn.MultiheadAttention):
        return 3 if name == "in_proj_weight" else 1
    if isinstance(module, nn.RNNBase | nn.RNNCellBase) and "_hr" not in name:
        if isinstance(module, nn.LSTM | nn.LSTMCell):
            return 4
        return 3 if isinstance(module, nn.GRU | nn.GRUCell) else 1
    return 1


# ---- One tensor


def variance_scaling_(
    tensor: Tensor,
    scale: float = 1.0,
    mode: Mode = "fan_in",
    distribution: Distribution = "normal",
    *,
    fans: tuple[float, float] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill ``tensor`` with zero-mean values of variance ``scale / n``.

    n is the fan-in, the fan-out, or their mean (``"fan_avg"``). ``"truncated_normal"`` cuts at two
    standard deviations and is widened so that the variance is right after the cut; ``"uniform"`` is
    U(−√(3v), √(3v)).

    Args:
        tensor: of any floating-point dtype; filled in place, without recording gradients.
        scale: finite and > 0; gain² in the usual terms.
        mode: "fan_in", "fan_out" or "fan_avg".
        distribution: "normal", "truncated_normal" or "uniform".
        fans: ``(fan_in, fan_out)``, such as ``fans_of(layer)``; by default torch's reading of the
            shape, right for ``Linear`` and for convolutions without groups.
        generator: torch's default one if None.

    Returns:
        ``tensor``.

    Raises:
        ValueError: an option is unknown, ``scale`` or a fan is not a finite number > 0, or ``fans``
            is None and the tensor has fewer than two dimensions.

    Example::

        variance_scaling_(conv.weight, gain("silu") ** 2, fans=fans_of(conv))
    """
    scale = positive("scale", scale)
    _check_option("mode", mode, ("fan_in", "fan_out", "fan_avg"))
    _check_option("distribution", distribution, ("normal", "truncated_normal", "uniform"))
    if fans is None:
        if tensor.dim() < 2:
            raise ValueError(
                f"fans: a tensor of shape {tuple(tensor.shape)} has no fans of its own; "
                "pass fans=(fan_in, fan_out)"
            )
        fans = nn.init._calculate_fan_in_and_fan_out(tensor)
        if tensor.numel() == 0:
            return tensor
    fan_in, fan_out = (positive(f"fans[{i}]", fan) for i, fan in enumerate(fans))
    n = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[mode]
    std = math.sqrt(scale / n)
    if distribution == "normal":
        return nn.init.normal_(tensor, 0.0, std, generator=generator)
    if distribution == "uniform":
        bound = math.sqrt(3) * std
        return nn.init.uniform_(tensor, -bound, bound, generator=generator)
    std /= _TRUNCATED_STD
    return nn.init.trunc_normal_(tensor, 0.0, std, -2 * std, 2 * std, generator=generator)


def lecun_normal_(
    tensor: Tensor,
    *,
    fans: tuple[float, float] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``variance_scaling_(tensor, 1.0, "fan_in", "normal")``: N(0, 1 / fan_in), what SELU networks
    need.

    Example::

        lecun_normal_(layer.weight)
    """
    return variance_scaling_(tensor, fans=fans, generator=generator)


def lecun_uniform_(
    tensor: Tensor,
    *,
    fans: tuple[float, float] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``variance_scaling_(tensor, 1.0, "fan_in", "uniform")``: U(−√(3 / fan_in), √(3 / fan_in)).

    Example::

        lecun_uniform_(layer.weight)
    """
    return variance_scaling_(tensor, distribution="uniform", fans=fans, generator=generator)


# ---- A whole model


def init_(
    model: nn.Module,
    nonlinearity: str | Activation = "relu",
    *,
    distribution: Distribution = "normal",
    bias: float | None = 0.0,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Initialize every linear and convolution layer of ``model`` for its activation function.

    Weights of ``Linear``, ``Bilinear``, ``Conv*d`` and ``ConvTranspose*d`` get variance
    ``gain(nonlinearity)² / fan_in`` with the fans of the layer; for ``"tanh"`` and ``"sigmoid"``
    the gain is 1, at which deep saturating networks neither amplify nor lose a small signal. The
    projections of attention and the input weights of recurrent layers, whose nonlinearity is their
    own, get variance 1 / fan_in, and recurrent weights are orthogonal for each gate (Saxe et al.
    2014). All their biases become ``bias``. Norms, embeddings, parameters of your own modules and
    frozen parameters stay as they are; tied weights are drawn once; parametrized weights are set
    through their parametrization.

    Args:
        nonlinearity: what follows the layers, as for :func:`gain`.
        distribution: as in :func:`variance_scaling_`.
        bias: value of the biases, None to leave them.
        generator: torch's default one if None.

    Returns:
        ``model``.

    Raises:
        ValueError, TypeError: an option is unknown, or a layer is lazy. Nothing is changed then.

    Example::

        model = init_(nn.Sequential(nn.Linear(784, 256), nn.SiLU(), nn.Linear(256, 10)), "silu")
    """
    _check_option("distribution", distribution, ("normal", "truncated_normal", "uniform"))
    scale = 1.0 if nonlinearity in ("tanh", "sigmoid") else gain(nonlinearity) ** 2
    if bias is not None and (isinstance(bias, bool) or not isinstance(bias, Real)):
        raise TypeError(f"bias: expected a number or None, got {bias!r}")
    for name, module in unwrap(model).named_modules():
        if any(is_lazy(p) for p in module.parameters(recurse=False)):
            raise ValueError(f"model: {name!r} is lazy; run a forward pass first")
    done: set[int] = set()
    for module in unwrap(model).modules():
        for name in _tensor_names(module):
            raw = raw_parameter(module, name)
            how = _recipe(module, name, scale, distribution, bias, generator)
            if how is not None and raw is not None and raw.requires_grad and id(raw) not in done:
                done.add(id(raw))
                change_(module, name, how)
    return model


def _recipe(
    module: nn.Module,
    name: str,
    scale: float,
    distribution: Distribution,
    bias: float | None,
    generator: torch.Generator | None,
) -> Callable[[Tensor], Any] | None:
    """How :func:`init_` fills one tensor of a layer; None for what it leaves alone."""
    recurrent = isinstance(module, nn.RNNBase | nn.RNNCellBase)
    plain = isinstance(module, LAYERS)
    if not (plain or recurrent or isinstance(module, nn.MultiheadAttention)):
        return None
    # bias_k and bias_v are a key and a value to attend to; a subclass may own more than a layer.
    if name in ("bias_k", "bias_v") or (plain and name not in ("weight", "bias")):
        return None
    if "bias" in name:
        return None if bias is None else lambda b: nn.init.constant_(b, bias)
    if recurrent and "_hh" in name:
        gates = _packed(module, name)
        return lambda w: [orthogonal_(gate, generator) for gate in w.chunk(gates)]
    attention_output = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    fans, factor = fans_of(module, name), scale if plain and not attention_output else 1.0
    return lambda w: variance_scaling_(
        w, factor, "fan_in", distribution, fans=fans, generator=generator
    )


def _tensor_names(module: nn.Module) -> list[str]:
    """Names of a layer's own tensors, parametrized ones included."""
    names = [name for name, p in module._parameters.items() if p is not None]
    if parametrize.is_parametrized(module):
        chains: Any = module.parametrizations
        names += list(chains)
    return names


def _check_option(name: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, options))}, got {value!r}")
