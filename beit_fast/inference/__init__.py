"""Image classification, and models prepared for it: folded weights, packed linear layers, CUDA graphs."""

from .image_classifier import ClassScore, ImageClassifier
from .optimized_model import optimize_for_inference

__all__ = ["ClassScore", "ImageClassifier", "optimize_for_inference"]
