"""Parts of BEiT's recipe for a training loop: masks, views, batches, parameter groups."""

from .block_masks import BlockMaskGenerator
from .collator import MaskedImageCollator
from .parameter_groups import layer_decay_parameter_groups
from .two_views import TwoViewTransform

__all__ = ["BlockMaskGenerator", "MaskedImageCollator", "TwoViewTransform", "layer_decay_parameter_groups"]
