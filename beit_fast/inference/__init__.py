"""Models prepared for inference: folded weights, packed linear layers and CUDA graphs."""

from .optimized_model import optimize_for_inference

__all__ = ["optimize_for_inference"]
