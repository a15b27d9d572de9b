"""Classify images, and prepare models for inference.

Prepared models have folded weights, packed linear layers and CUDA graphs.
"""

from .image_classifier import ClassScore, ImageClassifier
from .optimized_model import optimize_for_inference

__all__ = ["ClassScore", "ImageClassifier", "optimize_for_inference"]
