"""fastnorm: fused normalization and dropout for PyTorch."""

__version__ = "0.1.0"

from fastnorm.losses import LabelSmoothingCrossEntropy, cross_entropy, smooth_labels
from fastnorm.parametrizations import weight_standardization
from fastnorm.stopping import EarlyStopping, GapReport, LRFindResult, lr_find, overfitting_gap
from fastnorm.transforms import StandardScaler

__all__ = [
    "EarlyStopping",
    "GapReport",
    "LRFindResult",
    "LabelSmoothingCrossEntropy",
    "StandardScaler",
    "cross_entropy",
    "lr_find",
    "overfitting_gap",
    "smooth_labels",
    "weight_standardization",
]
