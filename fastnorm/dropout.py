"""Dropout (Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting",
JMLR 2014) and its relatives, with the work that surrounds it in the same pass.

    y = residual + dropout(activation(input + bias)),   dropout(h) = keep ? h / (1 - p) : 0

`p` is the probability of dropping. An element is kept when 16 random bits are below
``t = round((1 - p) * 65536)``, and scaled by ``65536 / t``, so that the expectation is exact for
the probability really used. The bits are Philox4x32-10 of the element's position in the memory of
the (dense) input and a seed: one int64 that is drawn from the generator for each call. A mask is
thus the same in the kernels of every device, in this file's plain PyTorch, in a compiled graph and
in a recomputation under checkpointing, and the seed alone is saved for the backward pass.

The channel variants, stochastic depth and `Dropout(shared_dims=...)` differ in one thing: which
dimensions share their mask. See docs/dropout.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd

from fastnorm import _build, _fx, _philox
from fastnorm._checks import check_generator, check_input, check_probability
from fastnorm._dropout import (
    ALPHA,
    MASK_ONLY,
    SCALED,
    feature_bits,
    general,
    shared_dropout,
)
from fastnorm.epilogue import ACTIVATION_CODES, FUNCTIONS, activation_code

__all__ = [
    "AlphaDropout",
    "DropPath",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "FeatureAlphaDropout",
    "StochasticDepth",
    "alpha_dropout",
    "drop_path_rates",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "feature_alpha_dropout",
    "stochastic_depth",
]


# ---------------------------------------------------------------------------------------------
# Functions
# ---------------------------------------------------------------------------------------------


def _call(function: Callable[..., Tensor], input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`function` of a tensor that overrides torch's functions."""
    return torch.overrides.handle_torch_function(function, (input,), input, *args, **kwargs)


def dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    activation: str | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Dropout with the work around it, in one pass:
    ``residual + dropout(activation(input + bias))``.

    Each element of ``activation(input + bias)`` is dropped with probability `p`, becoming 0 (+0
    even for infinities and NaN); the others are divided by the keep probability. With
    ``training=False`` or ``p=0`` nothing is dropped and nothing is drawn: the fused rest remains,
    and without any the result is `input` itself.

    Args:
        input: any shape and strides, or jagged; float32, float64, bfloat16 or float16 (anything
            where there is nothing to do).
        p: probability of dropping, in [0, 1], in steps of 1/65536. 1 gives zeros and zero
            gradients.
        training: whether anything is dropped.
        inplace: overwrite `input` with the result.
        activation: one of "relu", "leaky_relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh".
        bias: added before the activation; shape ``(input.shape[-1],)``.
        residual: added at the end; the input's shape. A residual or bias of another floating dtype
            promotes the result as torch's addition does.
        generator: draws the seed in place of the device's default generator: one
            ``torch.randint(2**63 - 1, (1,))`` for each call that drops.

    Returns:
        A tensor of the input's shape, dtype and memory format. Its gradients, of any order, use the
        same mask, of which only the seed is saved.

    Raises:
        ValueError: `p` outside [0, 1] or NaN, or an unknown activation.
        RuntimeError: `bias` or `residual` of another shape or device, a generator of another
            device, or ``inplace=True`` on a leaf that requires grad. Nothing is drawn.
        TypeError: not a floating-point tensor (for an integer one the error is NotImplementedError
            too, as torch's).

    Example:
        >>> x = torch.randn(32, 128, requires_grad=True)
        >>> y = fastnorm.dropout(x, 0.1, activation="gelu", bias=torch.zeros(128))
    """
    if not torch.compiler.is_compiling() and (m := _build.module) is not None:
        y = m.dropout(
            input, p, training, inplace, SCALED, 0, ACTIVATION_CODES.get(activation, -1), bias,
            residual, generator,
        )  # fmt: skip
        if y is not None:
            return y
    if torch.overrides.has_torch_function((input, bias, residual)):
        return torch.overrides.handle_torch_function(
            dropout, (input, bias, residual), input, p, training, inplace, activation=activation,
            bias=bias, residual=residual, generator=generator,
        )  # fmt: skip
    return general(
        input, p, training, inplace, activation=activation, bias=bias, residual=residual,
        generator=generator,
    )  # fmt: skip


def _feature_dropout(
    function: Callable[..., Tensor],
    input: Tensor,
    p: float,
    training: bool,
    inplace: bool,
    kind: int,
    unbatched: bool,
    generator: torch.Generator | None,
) -> Tensor:
    if torch.overrides.has_torch_function_unary(input):
        return _call(function, input, p, training, inplace, generator=generator)
    if not isinstance(input, Tensor):
        raise TypeError(f"input: expected a tensor, got {type(input).__name__}")
    if input.dim() < 2 and training and p:
        raise RuntimeError(
            f"input: expected at least 2 dimensions (batch, channel), got {input.dim()}"
        )
    shared = feature_bits(input, unbatched) if input.dim() > 1 else 0
    return shared_dropout(input, p, training, inplace, kind, shared, None, generator)


def dropout1d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Drops whole channels of ``(N, C, L)`` or ``(C, L)``: `torch.nn.functional.dropout1d`.

    Args:
        input, p, training, inplace, generator: as in `dropout`.

    Returns:
        A tensor of the input's shape, dtype and memory format.

    Raises:
        RuntimeError: the input has neither 2 nor 3 dimensions; else as `dropout`.

    Example:
        >>> y = fastnorm.dropout1d(torch.randn(8, 16, 100), 0.2)
    """
    if isinstance(input, Tensor) and input.dim() not in (2, 3):
        raise RuntimeError(
            f"input: expected 2 or 3 dimensions, (C, L) or (N, C, L), got {input.dim()}"
        )
    unbatched = isinstance(input, Tensor) and input.dim() == 2
    return _feature_dropout(dropout1d, input, p, training, inplace, SCALED, unbatched, generator)


def dropout2d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Drops whole channels of ``(N, C, H, W)``: `torch.nn.functional.dropout2d`.

    Three dimensions are taken as ``(N, C, L)`` with a warning, as torch does.

    Args:
        input, p, training, inplace, generator: as in `dropout`.

    Returns:
        A tensor of the input's shape, dtype and memory format.

    Raises:
        RuntimeError: something is to be dropped from fewer than 2 dimensions; else as `dropout`.

    Example:
        >>> y = fastnorm.dropout2d(torch.randn(8, 16, 32, 32), 0.2)
    """
    if isinstance(input, Tensor) and input.dim() != 4:
        warnings.warn(
            f"dropout2d: expected (N, C, H, W), got {input.dim()} dimensions; channels are taken "
            "to be dimension 1. Use dropout1d for (N, C, L), and unsqueeze an unbatched image.",
            stacklevel=2,
        )
    return _feature_dropout(dropout2d, input, p, training, inplace, SCALED, False, generator)


def dropout3d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Drops whole channels of ``(N, C, D, H, W)`` or ``(C, D, H, W)``:
    `torch.nn.functional.dropout3d`.

    Args:
        input, p, training, inplace, generator: as in `dropout`.

    Returns:
        A tensor of the input's shape, dtype and memory format.

    Raises:
        RuntimeError: something is to be dropped from fewer than 2 dimensions; else as `dropout`.

    Example:
        >>> y = fastnorm.dropout3d(torch.randn(2, 16, 8, 8, 8), 0.2)
    """
    dims = input.dim() if isinstance(input, Tensor) else 5
    if dims not in (4, 5):
        warnings.warn(
            f"dropout3d: expected (N, C, D, H, W) or (C, D, H, W), got {dims} dimensions; channels "
            "are taken to be dimension 1.",
            stacklevel=2,
        )
    return _feature_dropout(dropout3d, input, p, training, inplace, SCALED, dims == 4, generator)


def alpha_dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Dropout for SELU networks, which keeps mean 0 and variance 1
    (Klambauer et al., NIPS 2017): `torch.nn.functional.alpha_dropout`.

    Dropped elements become SELU's lower limit; the affine map that follows is exact for the
    probability really used. ``p=1`` gives zeros.

    Args:
        input, p, training, inplace, generator: as in `dropout`; `training` is False by default, as
            in torch.

    Returns:
        A tensor of the input's shape, dtype and memory format.

    Raises:
        ValueError, RuntimeError, TypeError: as `dropout`.

    Example:
        >>> y = fastnorm.alpha_dropout(torch.randn(8, 16), 0.1, training=True)
    """
    if torch.overrides.has_torch_function_unary(input):
        return _call(alpha_dropout, input, p, training, inplace, generator=generator)
    return shared_dropout(input, p, training, inplace, ALPHA, 0, None, generator)


def feature_alpha_dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`alpha_dropout` of whole channels of ``(N, C, ...)``:
    `torch.nn.functional.feature_alpha_dropout`.

    Args:
        input, p, training, inplace, generator: as in `alpha_dropout`.

    Returns:
        A tensor of the input's shape, dtype and memory format.

    Raises:
        RuntimeError: something is to be dropped from fewer than 2 dimensions; else as `dropout`.

    Example:
        >>> y = fastnorm.feature_alpha_dropout(torch.randn(8, 16, 4, 4), 0.1, training=True)
    """
    return _feature_dropout(
        feature_alpha_dropout, input, p, training, inplace, ALPHA, False, generator
    )


def _check_depth_mode(mode: object) -> None:
    if mode not in ("row", "batch"):
        raise ValueError(f"mode: expected 'row' or 'batch', got {mode!r}")


def stochastic_depth(
    input: Tensor,
    p: float,
    mode: str = "row",
    training: bool = True,
    *,
    residual: Tensor | None = None,
    scale_by_keep: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Drops whole samples of a residual branch (Huang et al., "Deep networks with stochastic
    depth", ECCV 2016): `torchvision.ops.stochastic_depth`, optionally with the residual add in the
    same pass.

    Args:
        input: shape ``(N, ...)``; else as in `dropout`.
        p: probability of dropping.
        mode: "row" decides for each sample, "batch" for all of them at once.
        training: whether anything is dropped.
        residual: added to the result; the input's shape.
        scale_by_keep: divide what is kept by the keep probability, so that the expectation in
            training is what evaluation computes. False trains each kept branch at its full size.
        generator: as in `dropout`.

    Returns:
        ``residual + stochastic_depth(input)``, of the input's shape, dtype and memory format.

    Raises:
        ValueError: another mode; else as `dropout`.

    Example:
        >>> x = torch.randn(8, 16, 32, 32)
        >>> y = fastnorm.stochastic_depth(torch.relu(x), 0.2, residual=x)
    """
    _check_depth_mode(mode)
    if torch.overrides.has_torch_function((input, residual)):
        return torch.overrides.handle_torch_function(
            stochastic_depth, (input, residual), input, p, mode, training, residual=residual,
            scale_by_keep=scale_by_keep, generator=generator,
        )  # fmt: skip
    dims = input.dim() if isinstance(input, Tensor) else 1
    if dims == 0:
        raise RuntimeError("input: expected at least 1 dimension (batch), got 0")
    shared = (1 << dims) - (2 if mode == "row" else 1)
    kind = SCALED if scale_by_keep else MASK_ONLY
    return shared_dropout(input, p, training, False, kind, shared, residual, generator)


def _exact_count(input: Tensor, p: float, generator: torch.Generator | None) -> Tensor:
    """Keeps exactly ``round((1 - p) n)`` of the n elements of each row, every subset alike."""
    check_input(input)
    check_generator(generator, input)
    n = input.shape[-1] if input.dim() else 1
    count = round((1.0 - p) * n)
    # Ties among 53-bit numbers are too rare to favour a position.
    random = torch.empty(input.shape, dtype=torch.float64, device=input.device)
    order = random.uniform_(generator=generator).argsort(-1)
    keep = torch.zeros(input.shape, dtype=torch.bool, device=input.device)
    keep = keep.scatter(-1, order[..., :count], True) if input.dim() else keep.fill_(count == 1)
    return torch.where(keep, input * (n / count if count else 0.0), 0.0)


# ---------------------------------------------------------------------------------------------
# Modules
# ---------------------------------------------------------------------------------------------


class Dropout(torch.nn.Dropout):
    """`torch.nn.Dropout` in one pass, with what may surround it.

    Args:
        p: probability of dropping, in [0, 1].
        inplace: overwrite the input.
        shared_dims: dimensions along which an element shares its mask: ``(2, 3)`` of an image is
            `Dropout2d`, ``(1,)`` of ``(N, T, C)`` is variational dropout over time. Negative ones
            count from the end.
        mode: "inverted" divides what is kept by the keep probability and leaves evaluation alone.
            "classical" (Srivastava et al. 2014) only masks, and multiplies by the keep probability
            in evaluation. "exact_count" keeps exactly ``round((1 - p) n)`` of each row of the last
            dimension. "inverted" is the fast one.
        activation: applied before, as in `fastnorm.dropout`.
        generator: draws the seeds in place of the device's default generator.

    Shape:
        input: any; ``forward(input, residual=None)`` gives the same shape.

    Raises:
        ValueError: `p` outside [0, 1], an unknown mode or activation, or "exact_count" together
            with shared dimensions.

    Example:
        >>> m = fastnorm.Dropout(0.1, activation="gelu")
        >>> y = m(torch.randn(20, 16))
    """

    def __init__(
        self,
        p: float = 0.5,
        inplace: bool = False,
        *,
        shared_dims: Sequence[int] | int | None = None,
        mode: str = "inverted",
        activation: str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        check_probability("p", p)
        super().__init__(p, inplace)
        if mode not in ("inverted", "classical", "exact_count"):
            raise ValueError(
                f"mode: expected 'inverted', 'classical' or 'exact_count', got {mode!r}"
            )
        activation_code(activation)
        if isinstance(shared_dims, int):
            shared_dims = (shared_dims,)
        if mode == "exact_count" and shared_dims:
            raise ValueError(
                f"shared_dims: expected None with mode='exact_count', got {tuple(shared_dims)}"
            )
        self.shared_dims = None if shared_dims is None else tuple(shared_dims)
        self.mode = mode
        self.activation = activation
        self.generator = generator

    @classmethod
    def from_keep_prob(cls, keep_prob: float, **kwargs: Any) -> Dropout:
        """The layer that keeps an element with probability `keep_prob`: ``p = 1 - keep_prob``."""
        check_probability("keep_prob", keep_prob)
        return cls(1.0 - keep_prob, **kwargs)

    def _bits(self, input: Tensor) -> int:
        bits = 0
        for d in self.shared_dims or ():
            if not -input.dim() <= d < input.dim():
                raise IndexError(
                    f"shared_dims: expected dimensions of the {input.dim()}-dimensional input, "
                    f"got {d}"
                )
            bits |= 1 << d % input.dim()
        return bits

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if isinstance(input, _fx.Proxy):
            return _fx.leaf(self, input, residual)
        if self.mode == "inverted" and not self.shared_dims:
            return dropout(
                input, self.p, self.training, self.inplace, activation=self.activation,
                residual=residual, generator=self.generator,
            )  # fmt: skip
        check_input(input)
        shared = self._bits(input)
        if self.activation is not None:
            code = activation_code(self.activation)
            input = FUNCTIONS[code](input)
        inplace = self.inplace and self.activation is None
        if self.mode == "exact_count":
            y = _exact_count(input, self.p, self.generator) if self.training and self.p else input
        elif self.mode == "classical" and not self.training:
            y = input * (_philox.threshold(self.p) / 65536.0)
        else:
            kind = SCALED if self.mode == "inverted" else MASK_ONLY
            return shared_dropout(
                input, self.p, self.training, inplace, kind, shared, residual, self.generator
            )
        if residual is not None:
            return y + residual
        return input.copy_(y) if inplace and y is not input else y

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.shared_dims is not None:
            text += f", shared_dims={self.shared_dims}"
        if self.mode != "inverted":
            text += f", mode={self.mode!r}"
        if self.activation is not None:
            text += f", activation={self.activation!r}"
        return text


class _Drops(_DropoutNd):
    """Constructor and forward of torch.nn's dropout modules, with a generator and a check of p."""

    ranks: tuple[int, ...] | None = None  # None: any
    shapes: str
    function: Callable[..., Tensor]

    def __init__(
        self, p: float = 0.5, inplace: bool = False, *, generator: torch.Generator | None = None
    ) -> None:
        check_probability("p", p)
        super().__init__(p, inplace)
        self.generator = generator

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, _fx.Proxy):
            return _fx.leaf(self, input)
        if self.ranks and isinstance(input, Tensor) and input.dim() not in self.ranks:
            raise ValueError(f"input: expected {self.shapes}, got {input.dim()} dimensions")
        return type(self).function(
            input, self.p, self.training, self.inplace, generator=self.generator
        )


class Dropout1d(_Drops, torch.nn.Dropout1d):
    """Drops whole channels of ``(N, C, L)`` or ``(C, L)``, and refuses any other rank.

    Args:
        p, inplace, generator: as in `Dropout`.

    Raises:
        ValueError: an input of another rank; else as `dropout1d`.

    Example:
        >>> y = fastnorm.Dropout1d(0.2)(torch.randn(8, 16, 100))
    """

    ranks = (2, 3)
    shapes = "(C, L) or (N, C, L)"
    function = staticmethod(dropout1d)


class Dropout2d(_Drops, torch.nn.Dropout2d):
    """Drops whole channels of ``(N, C, H, W)``, and refuses any other rank: what torch makes of
    three dimensions has changed twice.

    Args:
        p, inplace, generator: as in `Dropout`.

    Raises:
        ValueError: an input of another rank; else as `dropout2d`.

    Example:
        >>> y = fastnorm.Dropout2d(0.2)(torch.randn(8, 16, 32, 32))
    """

    ranks = (4,)
    shapes = "(N, C, H, W); Dropout1d takes (N, C, L)"
    function = staticmethod(dropout2d)


class Dropout3d(_Drops, torch.nn.Dropout3d):
    """Drops whole channels of ``(N, C, D, H, W)`` or ``(C, D, H, W)``, and refuses any other rank.

    Args:
        p, inplace, generator: as in `Dropout`.

    Raises:
        ValueError: an input of another rank; else as `dropout3d`.

    Example:
        >>> y = fastnorm.Dropout3d(0.2)(torch.randn(2, 16, 8, 8, 8))
    """

    ranks = (4, 5)
    shapes = "(C, D, H, W) or (N, C, D, H, W)"
    function = staticmethod(dropout3d)


class AlphaDropout(_Drops, torch.nn.AlphaDropout):
    """`torch.nn.AlphaDropout`: see `alpha_dropout`.

    Args:
        p, inplace, generator: as in `Dropout`.

    Example:
        >>> y = fastnorm.AlphaDropout(0.1)(torch.randn(8, 16))
    """

    function = staticmethod(alpha_dropout)


class FeatureAlphaDropout(_Drops, torch.nn.FeatureAlphaDropout):
    """`torch.nn.FeatureAlphaDropout`: see `feature_alpha_dropout`.

    Args:
        p, inplace, generator: as in `Dropout`.

    Example:
        >>> y = fastnorm.FeatureAlphaDropout(0.1)(torch.randn(8, 16, 4, 4))
    """

    function = staticmethod(feature_alpha_dropout)


class StochasticDepth(torch.nn.Module):
    """`torchvision.ops.StochasticDepth`, with the residual add in the same pass.

    Args:
        p: probability of dropping a residual branch, in [0, 1].
        mode: "row" decides for each sample, "batch" for all at once.
        scale_by_keep: divide what is kept by the keep probability; see `stochastic_depth`.
        generator: draws the seeds in place of the device's default generator.

    Shape:
        input: ``(N, ...)``; ``forward(input, residual=None)`` gives the same shape.

    Example:
        >>> x = torch.randn(8, 16)
        >>> y = fastnorm.StochasticDepth(0.2)(torch.relu(x), x)
    """

    def __init__(
        self,
        p: float,
        mode: str = "row",
        *,
        scale_by_keep: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_probability("p", p)
        _check_depth_mode(mode)
        self.p = p
        self.mode = mode
        self.scale_by_keep = scale_by_keep
        self.generator = generator

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if isinstance(input, _fx.Proxy):
            return _fx.leaf(self, input, residual)
        return stochastic_depth(
            input, self.p, self.mode, self.training, residual=residual,
            scale_by_keep=self.scale_by_keep, generator=self.generator,
        )  # fmt: skip

    def extra_repr(self) -> str:
        tail = "" if self.scale_by_keep else ", scale_by_keep=False"
        return f"p={self.p}, mode={self.mode}{tail}"


class DropPath(StochasticDepth):
    """`StochasticDepth` by timm's name and arguments.

    Args:
        drop_prob: probability of dropping each sample's residual branch.
        scale_by_keep: as in `StochasticDepth`.
        generator: as in `StochasticDepth`.

    Example:
        >>> y = fastnorm.DropPath(0.1)(torch.randn(8, 16))
    """

    def __init__(
        self,
        drop_prob: float = 0.0,
        scale_by_keep: bool = True,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(drop_prob, "row", scale_by_keep=scale_by_keep, generator=generator)


@overload
def drop_path_rates(
    max_p: float, depths: int, *, stagewise: Literal[False] = False
) -> list[float]: ...
@overload
def drop_path_rates(
    max_p: float, depths: Sequence[int], *, stagewise: bool = False
) -> list[list[float]]: ...
def drop_path_rates(
    max_p: float, depths: int | Sequence[int], *, stagewise: bool = False
) -> list[float] | list[list[float]]:
    """Drop probabilities that grow linearly from 0 to `max_p` with the depth of a block.

    Args:
        max_p: probability of the last block.
        depths: the number of blocks, or the numbers of blocks of each stage.
        stagewise: all blocks of a stage alike.

    Returns:
        One probability per block; a list of them per stage where `depths` is a sequence.

    Raises:
        ValueError: `max_p` outside [0, 1], or `stagewise` without stages.

    Example:
        >>> drop_path_rates(0.2, [1, 2])
        [[0.0], [0.1, 0.2]]
    """
    check_probability("max_p", max_p)

    def rates(n: int) -> list[float]:
        return [max_p * i / (n - 1) if n > 1 else 0.0 for i in range(n)]

    if isinstance(depths, int):
        if stagewise:
            raise ValueError("depths: expected a number per stage with stagewise=True, got an int")
        return rates(depths)
    if stagewise:
        return [[p] * n for p, n in zip(rates(len(depths)), depths, strict=True)]
    flat = iter(rates(sum(depths)))
    return [[next(flat) for _ in range(n)] for n in depths]
