"""Images for training and evaluation: sources, order, data sets and loaders."""

from .dataset import (
    EvaluationDataset,
    TrainingDataset,
    build_loader,
    collate_evaluation,
    collate_items,
)
from .folders import ClassFolder, ImageFolder, SegmentationFolder
from .opening import open_source
from .sampler import EpochSampler, EvaluationSampler, Key
from .source import Example, ImageSource
from .tables import TableSource

__all__ = [
    "ClassFolder",
    "EpochSampler",
    "EvaluationDataset",
    "EvaluationSampler",
    "Example",
    "ImageFolder",
    "ImageSource",
    "Key",
    "SegmentationFolder",
    "TableSource",
    "TrainingDataset",
    "build_loader",
    "collate_evaluation",
    "collate_items",
    "open_source",
]
