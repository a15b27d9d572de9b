"""Image processors: preprocessing of images and label maps, postprocessing of segmentation."""

from .processor import BatchFeature, BeitFeatureExtractor, BeitImageProcessor
from .processor_fast import BeitImageProcessorFast

__all__ = ["BatchFeature", "BeitFeatureExtractor", "BeitImageProcessor", "BeitImageProcessorFast"]
