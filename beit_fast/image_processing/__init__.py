"""Image processors: preprocessing of images and label maps, postprocessing of segmentation."""

from .batch_feature import BatchFeature
from .processor import BeitFeatureExtractor, BeitImageProcessor
from .processor_fast import BeitImageProcessorFast

__all__ = ["BatchFeature", "BeitFeatureExtractor", "BeitImageProcessor", "BeitImageProcessorFast"]
