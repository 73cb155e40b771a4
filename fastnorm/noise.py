"""Noise on hidden units that is not a mask of single elements or channels: Gaussian noise, additive
and multiplicative, and dropped blocks of a feature map. Plain PyTorch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnorm import _fx
from fastnorm._checks import check_generator, check_input, check_probability

__all__ = ["DropBlock2d", "DropBlock3d", "GaussianDropout", "GaussianNoise"]


def _normal(input: Tensor, generator: torch.Generator | None) -> Tensor:
    check_input(input)
    check_generator(generator, input)
    return torch.empty(input.shape, dtype=input.dtype, device=input.device).normal_(
        generator=generator
    )


class GaussianNoise(torch.nn.Module):
    """Adds normal noise in training: ``input + std * e``, ``e`` of mean 0 and variance 1.

    Args:
        std: the noise's standard deviation, at least 0.
        generator: draws the noise in place of the device's default generator.

    Shape:
        input: any; the result has the same shape and dtype. Evaluation, and ``std=0``, return the
        input and draw nothing.

    Raises:
        ValueError: a negative `std` or NaN.

    Example:
        >>> y = fastnorm.GaussianNoise(0.1)(torch.randn(8, 16))
    """

    def __init__(self, std: float, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if not (std >= 0 and math.isfinite(std)):
            raise ValueError(f"std: expected a finite number >= 0, got {std}")
        self.std = std
        self.generator = generator

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, _fx.Proxy):
            return _fx.leaf(self, input)
        if not self.training or self.std == 0:
            return input
        return input + self.std * _normal(input, self.generator)

    def extra_repr(self) -> str:
        return f"std={self.std}"


class GaussianDropout(torch.nn.Module):
    """Multiplies by normal noise of mean 1 in training (Srivastava et al., JMLR 2014, section 10).

    ``input * (1 + sqrt(p / (1 - p)) * e)``: the mean and variance that dropout of probability `p`
    gives, and nothing to do in evaluation.

    Args:
        p: the drop probability whose variance ``p / (1 - p)`` is taken, in [0, 1).
        generator: draws the noise in place of the device's default generator.

    Shape:
        input: any; the result has the same shape and dtype. Evaluation, and ``p=0``, return the
        input and draw nothing.

    Raises:
        ValueError: `p` outside [0, 1): at 1 the variance is infinite.

    Example:
        >>> y = fastnorm.GaussianDropout(0.2)(torch.randn(8, 16))
    """

    def __init__(self, p: float, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        check_probability("p", p)
        if p == 1:
            raise ValueError("p: expected a probability below 1, got 1 (infinite variance)")
        self.p = p
        self.generator = generator

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, _fx.Proxy):
            return _fx.leaf(self, input)
        if not self.training or self.p == 0:
            return input
        return input * (1 + math.sqrt(self.p / (1 - self.p)) * _normal(input, self.generator))

    def extra_repr(self) -> str:
        return f"p={self.p}"


class _DropBlock(torch.nn.Module):
    spatial: int
    shapes: str

    def __init__(
        self,
        p: float,
        block_size: int,
        *,
        couple_channels: bool = False,
        calibrated: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_probability("p", p)
        if not isinstance(block_size, int) or block_size < 1:
            raise ValueError(f"block_size: expected an int >= 1, got {block_size!r}")
        self.p = p
        self.block_size = block_size
        self.couple_channels = couple_channels
        self.calibrated = calibrated
        self.generator = generator

    def _keep(self, input: Tensor) -> Tensor:
        """1 for what stays and 0 for what is dropped; (N, C, ...), or (N, 1, ...)."""
        n, c, *sizes = input.shape
        k = self.block_size
        if self.calibrated:
            # Centres lie on a grid k - 1 larger each way, so that every position, those at the
            # border included, lies in exactly k^d possible blocks; (1 - gamma)^(k^d) = 1 - p says
            # that nothing is dropped by any of them.
            block = [k] * self.spatial
            grid = [size + k - 1 for size in sizes]
            gamma = -math.expm1(math.log1p(-self.p) / math.prod(block)) if self.p < 1 else 1.0
        else:
            # Ghiasi et al., equation 1: blocks lie inside the map, and overlaps are not counted.
            block = [min(k, size) for size in sizes]
            grid = [size - b + 1 for size, b in zip(sizes, block, strict=True)]
            gamma = min(1.0, self.p / math.prod(block) * math.prod(sizes) / math.prod(grid))
        centres = torch.empty(
            (n, 1 if self.couple_channels else c, *grid), device=input.device
        ).uniform_(generator=self.generator)
        hit = (centres < gamma).to(torch.float32)
        if not self.calibrated:
            hit = F.pad(hit, [b - 1 for b in reversed(block) for _ in range(2)])
        pool = F.max_pool2d if self.spatial == 2 else F.max_pool3d
        return 1.0 - pool(hit, block, stride=1)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, _fx.Proxy):
            return _fx.leaf(self, input)
        check_input(input)
        if input.dim() != self.spatial + 2:
            raise ValueError(f"input: expected {self.shapes}, got {input.dim()} dimensions")
        check_generator(self.generator, input)
        if not self.training or self.p == 0:
            return input
        keep = self._keep(input)
        scale = 1.0 / (1.0 - self.p) if self.p < 1 else 0.0
        return torch.where(keep > 0, input * scale, 0.0)

    def extra_repr(self) -> str:
        text = f"p={self.p}, block_size={self.block_size}"
        if self.couple_channels:
            text += ", couple_channels=True"
        return text if self.calibrated else text + ", calibrated=False"


class DropBlock2d(_DropBlock):
    """Drops square blocks of feature maps (Ghiasi et al., "DropBlock", NeurIPS 2018), calibrated.

    Every position, at the border too, is dropped with probability exactly `p`: block centres are
    drawn with ``gamma = 1 - (1 - p)^(1 / k^2)`` on a grid enlarged by ``k - 1``, for any block size
    k, even ones and ones larger than the map included. What stays is divided by ``1 - p``, a
    constant, so that samples do not depend on one another.

    Args:
        p: probability of dropping a position, in [0, 1].
        block_size: side of a block.
        couple_channels: all channels of a sample share their blocks.
        calibrated: False takes the paper's gamma, with which less is dropped the larger the block.
        generator: draws the centres in place of the device's default generator.

    Shape:
        input: ``(N, C, H, W)``; the result has the same shape and dtype. Evaluation, and ``p=0``,
        return the input and draw nothing.

    Raises:
        ValueError: `p` outside [0, 1], a block size below 1, or an input of another rank.

    Example:
        >>> y = fastnorm.DropBlock2d(0.1, 7)(torch.randn(2, 16, 28, 28))
    """

    spatial = 2
    shapes = "(N, C, H, W)"


class DropBlock3d(_DropBlock):
    """`DropBlock2d` with cubes, ``gamma = 1 - (1 - p)^(1 / k^3)``.

    Args:
        p, block_size, couple_channels, calibrated, generator: as in `DropBlock2d`.

    Shape:
        input: ``(N, C, D, H, W)``; the result has the same shape and dtype.

    Raises:
        ValueError: as `DropBlock2d`.

    Example:
        >>> y = fastnorm.DropBlock3d(0.1, 3)(torch.randn(2, 4, 8, 8, 8))
    """

    spatial = 3
    shapes = "(N, C, D, H, W)"
