"""Classify images, plot attention, and prepare models for inference.

Prepared models have folded weights, packed linear layers and CUDA graphs.
"""

from .image_classifier import ClassScore, ImageClassifier
from .optimized_model import optimize_for_inference
from .plots import plot_attention, plot_relative_position_bias

__all__ = ["ClassScore", "ImageClassifier", "optimize_for_inference", "plot_attention", "plot_relative_position_bias"]
