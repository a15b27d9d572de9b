"""Augmentation of images and batches, seeded by one generator."""

from .classification import ClassificationTransform, evaluation_processor
from .mixup import Mixup, soft_targets
from .rand_augment import RandAugment
from .random_erasing import RandomErasing
from .segmentation import SegmentationTransform

__all__ = [
    "ClassificationTransform",
    "Mixup",
    "RandAugment",
    "RandomErasing",
    "SegmentationTransform",
    "evaluation_processor",
    "soft_targets",
]
