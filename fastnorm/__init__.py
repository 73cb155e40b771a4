"""fastnorm: fused normalization and dropout for PyTorch."""

__version__ = "0.1.0"

from fastnorm import activations, init
from fastnorm.diagnostics import (
    ActivationStats,
    Advice,
    Finding,
    check_model,
    early_stopping_factors,
    gradient_norms,
    outliers,
    remove_redundant_bias_,
    shrinkage_factors,
    suggest_norm,
    update_ratios,
)
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
    "ActivationStats",
    "Advice",
    "EarlyStopping",
    "Finding",
    "GapReport",
    "GroupLasso",
    "LRFindResult",
    "LabelSmoothingCrossEntropy",
    "MaxNorm",
    "Regularizer",
    "StandardScaler",
    "activations",
    "check_model",
    "cross_entropy",
    "early_stopping_factors",
    "gradient_norms",
    "init",
    "lr_find",
    "outliers",
    "overfitting_gap",
    "param_groups_weight_decay",
    "remove_redundant_bias_",
    "shrinkage_factors",
    "smooth_labels",
    "suggest_norm",
    "update_ratios",
    "weight_standardization",
]
