r"""Standardization of input features: computed once on the training set, the same ever after.

.. math:: y = \frac{x - \mu}{\sigma}, \qquad \mu = \frac1n \sum_i x_i, \qquad
          \sigma^2 = \frac1n \sum_i (x_i - \mu)^2

It divides by the standard deviation (not by the variance, as one sometimes reads), with the
population variance. Batches are merged exactly (Chan, Golub, LeVeque, 1979): with
:math:`\delta = \mu_B - \mu_A` and :math:`n = n_A + n_B`,

.. math:: \mu = \mu_A + \delta\, n_B / n, \qquad
          n \sigma^2 = n_A \sigma_A^2 + n_B \sigma_B^2 + \delta^2 n_A n_B / n .
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["StandardScaler"]


class StandardScaler(nn.Module):
    r"""Standardize each feature with the statistics of the data it was fitted on.

    Unlike a batch norm it has no training mode: `forward` never updates anything, and there are no
    parameters. Statistics are float64 buffers and stay so when the model is cast, so they are saved
    with the model. (Devices without float64 can't hold them.)

    Args:
        num_features: size of dimension `dim`. ``None``: taken from the first data, or from the
            state_dict that is loaded.
        dim: the dimension that holds the features; statistics are over all others.
        eps: lower bound of the standard deviation, at least 0. A constant feature becomes 0 with
            either: where the deviation is 0 (up to rounding), the feature is only centred.

    Shape: any, with `num_features` in `dim`; the output is of the same shape. Integer and bool
    inputs come out in torch's default dtype, floating ones in theirs.

    Buffers: ``mean``, ``var`` (float64, ``(num_features,)``), ``count`` (int64, elements seen of
    each feature).

    Example::

        >>> scaler = StandardScaler().fit(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
        >>> scaler(torch.tensor([[1.0, 5.0], [4.0, 6.0]]))
        tensor([[-1.,  0.],
                [ 2.,  1.]])
    """

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, num_features: int | None = None, *, dim: int = -1, eps: float = 0.0) -> None:
        super().__init__()
        if num_features is not None and num_features < 1:
            raise ValueError(f"num_features must be at least 1, got {num_features}")
        if not 0 <= eps < float("inf"):
            raise ValueError(f"eps must be finite and at least 0, got {eps}")
        self.dim = dim
        self.eps = eps
        self._allocate(num_features or 0, None)

    @property
    def num_features(self) -> int | None:
        """Number of features, ``None`` as long as it is not known."""
        return self.mean.numel() or None

    def _allocate(self, num_features: int, device: torch.device | None) -> None:
        zeros = torch.zeros(num_features, dtype=torch.float64, device=device)
        self.register_buffer("mean", zeros)
        self.register_buffer("var", torch.ones_like(zeros))
        self.register_buffer("count", zeros.long())

    def reset(self) -> None:
        """Forget the data; the number of features stays."""
        self.mean.zero_()
        self.var.fill_(1)
        self.count.zero_()

    def fit(self, input: Tensor, mask: Tensor | None = None) -> StandardScaler:
        """Forget earlier data and take the statistics of `input` alone; see `partial_fit`."""
        batch = self._moments(input, mask)
        self.reset()
        self._merge(*batch)
        return self

    def partial_fit(self, input: Tensor, mask: Tensor | None = None) -> StandardScaler:
        """Add a batch: afterwards the statistics are those of all data so far, exactly.

        Args:
            input: the batch.
            mask: bool, broadcastable to `input`; elements that are ``False`` are left out (not even
                read: they may be NaN).

        Raises:
            ValueError: `input` has other features, or `mask` does not fit. Nothing is changed then.
        """
        self._merge(*self._moments(input, mask))
        return self

    @torch.no_grad()
    def _moments(self, input: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Count, mean and sum of squared deviations of each feature of a batch."""
        self._check(input)
        x = input.detach().movedim(self.dim, -1).to(self.mean.device, torch.float64)
        if mask is None:
            x = x.reshape(-1, x.shape[-1])
            count = torch.full_like(x[:0].sum(0), x.shape[0])
        else:
            if mask.dtype != torch.bool:
                raise ValueError(f"mask must be bool, got {mask.dtype}")
            try:
                mask = mask.expand(input.shape)
            except RuntimeError:
                raise ValueError(
                    f"mask must be broadcastable to {tuple(input.shape)}, got {tuple(mask.shape)}"
                ) from None
            mask = mask.movedim(self.dim, -1).reshape(-1, x.shape[-1]).to(x.device)
            x = x.reshape(-1, x.shape[-1]).masked_fill(~mask, 0)
            count = mask.sum(0, dtype=torch.float64)
        divisor = count.clamp(min=1)
        mean = x.sum(0) / divisor
        deviation = x - mean
        if mask is not None:
            deviation = deviation.masked_fill(~mask, 0)
        # The deviations of a rounded mean don't sum to 0; what is left corrects both moments.
        rest = deviation.sum(0) / divisor
        return count, mean + rest, deviation.square().sum(0) - rest.square() * count

    @torch.no_grad()
    def _merge(self, count: Tensor, mean: Tensor, squares: Tensor) -> None:
        if self.num_features is None:
            self._allocate(mean.numel(), self.mean.device)
        before = self.count.double()
        total = before + count
        delta = mean - self.mean
        share = count / total.clamp(min=1)
        seen = total > 0
        squares = before * self.var + squares + delta.square() * before * share
        self.mean += delta * share
        self.var.copy_(torch.where(seen, squares / total.clamp(min=1), 1).clamp(min=0))
        self.count += count.long()

    def _check(self, input: Tensor) -> None:
        if not -input.dim() <= self.dim < input.dim():
            raise ValueError(f"input must have dimension {self.dim}, got {tuple(input.shape)}")
        size = input.shape[self.dim]
        if self.num_features not in (None, size) or size == 0:
            raise ValueError(
                f"input must have {self.num_features or 'some'} features in dim {self.dim}, "
                f"got shape {tuple(input.shape)}"
            )

    def scale(self) -> Tensor:
        """What `forward` divides by, float64: the deviation, at least `eps`, 1 where that is 0."""
        # A constant's computed variance is not 0 but of the size of its squared rounding errors.
        unit = torch.finfo(torch.float64).eps
        noise = self.count * unit * self.var + (self.count * unit * self.mean).square()
        std = torch.where(self.var <= noise, 0, self.var.sqrt()).clamp(min=self.eps)
        return torch.where(std == 0, 1, std)

    def _prepare(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`input` in the working dtype, the mean as the sum of two numbers of it, and the scale."""
        tracing = torch.compiler.is_compiling()
        if self.num_features is None or not (tracing or self.count.any()):
            raise RuntimeError("StandardScaler must be fitted before it is used")
        self._check(input)
        x = input if input.is_floating_point() else input.to(torch.get_default_dtype())
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        shape = [1] * x.dim()
        shape[self.dim] = -1
        # One float32 would round the mean of a feature far from 0 by more than its deviation.
        high = self.mean.to(dtype)
        low = (self.mean - high.double()).to(dtype)
        scale = self.scale().to(dtype)
        return x.to(dtype), high.view(shape), low.view(shape), scale.view(shape)

    def forward(self, input: Tensor) -> Tensor:
        """``(input - mean) / scale()``, differentiable in `input`.

        Raises:
            RuntimeError: nothing was fitted yet. ValueError: `input` has other features.
        """
        x, high, low, scale = self._prepare(input)
        y = (x - high - low) / scale
        return y.to(input.dtype) if input.is_floating_point() else y

    def inverse(self, input: Tensor) -> Tensor:
        """``input * scale() + mean``, the inverse of `forward`; the same errors."""
        y, high, low, scale = self._prepare(input)
        x = y * scale + low + high
        return x.to(input.dtype) if input.is_floating_point() else x

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StandardScaler:
        kept = {name: getattr(self, name) for name in ("mean", "var")}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        mean = state_dict.get(prefix + "mean")
        if self.num_features is None and mean is not None and mean.numel():
            self._allocate(mean.numel(), self.mean.device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{self.num_features}, dim={self.dim}, eps={self.eps}"
