"""fastnorm: fused normalization and dropout for PyTorch."""

__version__ = "0.1.0"

from fastnorm.losses import LabelSmoothingCrossEntropy, cross_entropy, smooth_labels
from fastnorm.parametrizations import weight_standardization
from fastnorm.penalties import (
    L1,
    L1L2,
    L2,
    GroupLasso,
    MaxNorm,
    Regularizer,
    param_groups_weight_decay,
)
from fastnorm.stopping import EarlyStopping, GapReport, LRFindResult, lr_find, overfitting_gap
from fastnorm.transforms import StandardScaler

__all__ = [
    "L1",
    "L1L2",
    "L2",
    "EarlyStopping",
    "GapReport",
    "GroupLasso",
    "LRFindResult",
    "LabelSmoothingCrossEntropy",
    "MaxNorm",
    "Regularizer",
    "StandardScaler",
    "cross_entropy",
    "lr_find",
    "overfitting_gap",
    "param_groups_weight_decay",
    "smooth_labels",
    "weight_standardization",
]
