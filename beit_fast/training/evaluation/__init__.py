"""Metrics of classification and segmentation, k-NN and linear probe on features."""

from .classification import ClassificationAccuracy
from .features import FeatureTable, pooled_features
from .knn import knn_scores
from .linear_probe import LinearProbe
from .segmentation import SegmentationAccuracy

__all__ = [
    "ClassificationAccuracy",
    "FeatureTable",
    "LinearProbe",
    "SegmentationAccuracy",
    "knn_scores",
    "pooled_features",
]
