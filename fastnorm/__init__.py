"""fastnorm: fused normalization and dropout for PyTorch."""

__version__ = "0.1.0"
