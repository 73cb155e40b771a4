r"""Parametrizations that torch does not have; for weight, spectral and orthogonal norm see
``torch.nn.utils.parametrizations``.

Weight standardization (Qiao et al., "Micro-batch training with batch-channel normalization and
weight standardization", 2019): each output unit's weights, over its fan-in :math:`m`,

.. math:: \hat w = \frac{w - \mu}{\sqrt{\sigma^2 + \epsilon}}, \qquad
          \mu = \frac1m \sum w, \quad \sigma^2 = \frac1m \sum (w - \mu)^2

Scaled (Brock et al., "Characterizing signal propagation to close the performance gap in
unnormalized ResNets", 2021): :math:`\hat w \cdot g / \sqrt m` with a learned gain :math:`g` per
output unit, 1 at the start, so that a unit-variance input gives a unit-variance output.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, register_parametrization

__all__ = ["weight_standardization"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class _WeightStandardization(nn.Module):
    def __init__(self, weight: Tensor, groups: int | None, eps: float, scaled: bool) -> None:
        super().__init__()
        # A transposed convolution stores (in, out / groups, ...), everything else (out, ...).
        self.groups = groups
        self.eps = eps
        self.gain: nn.Parameter | None = None
        if scaled:
            shape = self._units(weight).mean(self._fan(weight), keepdim=True).shape
            self.gain = nn.Parameter(weight.new_ones(shape))

    def _units(self, weight: Tensor) -> Tensor:
        if self.groups is None:
            return weight
        return weight.unflatten(0, (self.groups, -1))

    def _fan(self, weight: Tensor) -> list[int]:
        """Dimensions of `_units(weight)` that one output unit sums over."""
        if self.groups is None:
            return list(range(1, weight.dim()))
        return [1, *range(3, weight.dim() + 1)]

    def forward(self, weight: Tensor) -> Tensor:
        fan = self._fan(weight)
        w = self._units(weight)
        w = w.float() if w.dtype in (torch.float16, torch.bfloat16) else w
        var, mean = torch.var_mean(w, fan, correction=0, keepdim=True)
        w = (w - mean) * torch.rsqrt(var + self.eps)
        if self.gain is not None:
            w = w * (self.gain * (mean.numel() / w.numel()) ** 0.5)
        return w.reshape(weight.shape).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


def weight_standardization(
    module: nn.Module, name: str = "weight", *, eps: float = 1e-6, scaled: bool = False
) -> nn.Module:
    r"""Standardize the weight of a linear or convolution layer; formula at the top of the module.

    The learned tensor becomes ``module.parametrizations.<name>.original``, with the values that
    ``module.<name>`` has now; with `scaled`, the gain is
    ``module.parametrizations.<name>[0].gain``.
    ``torch.nn.utils.parametrize.remove_parametrizations(module, name)`` bakes the weight in.

    Args:
        module: a layer with a weight of shape (out, in / groups, ...), or a transposed convolution.
        name: the parameter's name.
        eps: added to the variance; a unit whose weights are all equal becomes 0.
        scaled: divide by the root of the fan-in and learn a gain per output unit.

    Returns:
        `module`, changed in place.

    Raises:
        AttributeError: `module` has no parameter `name`. ValueError: the weight has fewer than two
            dimensions or only one element per output unit, or is parametrized already; `eps` < 0.

    Example::

        >>> layer = weight_standardization(nn.Conv2d(3, 8, 3))
        >>> layer.weight.mean((1, 2, 3)).abs().max() < 1e-6
        tensor(True)
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise AttributeError(f"{type(module).__name__} has no parameter {name!r}")
    if is_parametrized(module, name):
        raise ValueError(f"{name} of {type(module).__name__} is parametrized already")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    groups = module.groups if isinstance(module, _TRANSPOSED) else None
    if weight.dim() < 2 or weight.numel() == weight.shape[0] * (1 if groups is None else 0):
        raise ValueError(
            f"{name} must have several weights per output unit, got shape {tuple(weight.shape)}"
        )
    parametrization = _WeightStandardization(weight.detach(), groups, eps, scaled)
    register_parametrization(module, name, parametrization)
    return module
