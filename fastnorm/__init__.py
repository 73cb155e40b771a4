"""fastnorm: fused normalization and dropout for PyTorch."""

from fastnorm import activations, init
from fastnorm._build import KernelUnavailable, build, use_backend
from fastnorm.batch_norm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    RunningBatchNorm1d,
    RunningBatchNorm2d,
    batch_norm,
)
from fastnorm.convert import replace, restore
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
from fastnorm.dropout import (
    AlphaDropout,
    Dropout,
    Dropout1d,
    Dropout2d,
    Dropout3d,
    DropPath,
    FeatureAlphaDropout,
    StochasticDepth,
    alpha_dropout,
    drop_path_rates,
    dropout,
    dropout1d,
    dropout2d,
    dropout3d,
    feature_alpha_dropout,
    stochastic_depth,
)
from fastnorm.explain import Explanation, explain
from fastnorm.fusion import fuse
from fastnorm.group_norm import GroupNorm, group_norm
from fastnorm.instance_norm import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d, instance_norm
from fastnorm.layer_norm import AddLayerNorm, LayerNorm, add_layer_norm, layer_norm
from fastnorm.losses import LabelSmoothingCrossEntropy, cross_entropy, smooth_labels
from fastnorm.noise import DropBlock2d, DropBlock3d, GaussianDropout, GaussianNoise
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
from fastnorm.rms_norm import AddRMSNorm, RMSNorm, add_rms_norm, rms_norm
from fastnorm.status import status
from fastnorm.stopping import EarlyStopping, GapReport, LRFindResult, lr_find, overfitting_gap
from fastnorm.sync_batch_norm import SyncBatchNorm
from fastnorm.transforms import StandardScaler

__version__ = "0.1.0"

__all__ = [
    "L1",
    "L1L2",
    "L2",
    "ActivationStats",
    "AddLayerNorm",
    "AddRMSNorm",
    "Advice",
    "AlphaDropout",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "DropBlock2d",
    "DropBlock3d",
    "DropPath",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "EarlyStopping",
    "Explanation",
    "FeatureAlphaDropout",
    "Finding",
    "GapReport",
    "GaussianDropout",
    "GaussianNoise",
    "GroupLasso",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "KernelUnavailable",
    "LRFindResult",
    "LabelSmoothingCrossEntropy",
    "LayerNorm",
    "MaxNorm",
    "RMSNorm",
    "Regularizer",
    "RunningBatchNorm1d",
    "RunningBatchNorm2d",
    "StandardScaler",
    "StochasticDepth",
    "SyncBatchNorm",
    "activations",
    "add_layer_norm",
    "add_rms_norm",
    "alpha_dropout",
    "batch_norm",
    "build",
    "check_model",
    "cross_entropy",
    "drop_path_rates",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "early_stopping_factors",
    "explain",
    "feature_alpha_dropout",
    "fuse",
    "gradient_norms",
    "group_norm",
    "init",
    "instance_norm",
    "layer_norm",
    "lr_find",
    "outliers",
    "overfitting_gap",
    "param_groups_weight_decay",
    "remove_redundant_bias_",
    "replace",
    "restore",
    "rms_norm",
    "shrinkage_factors",
    "smooth_labels",
    "status",
    "stochastic_depth",
    "suggest_norm",
    "update_ratios",
    "use_backend",
    "weight_standardization",
]
