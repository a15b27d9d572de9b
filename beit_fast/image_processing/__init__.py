"""Image processors: pixels in, normalised tensors out, and segmentation maps back."""

from .processor import BatchFeature, BeitFeatureExtractor, BeitImageProcessor
from .processor_fast import BeitImageProcessorFast

__all__ = ["BatchFeature", "BeitFeatureExtractor", "BeitImageProcessor", "BeitImageProcessorFast"]
