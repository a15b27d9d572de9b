"""BEiT's recipe: masks, views, batches and parameter groups, and whole training runs."""

from typing import TYPE_CHECKING, Any

from ..utils.first_use import import_at_first_use
from .block_masks import BlockMaskGenerator
from .collator import MaskedImageCollator
from .parameter_groups import layer_decay_parameter_groups
from .two_views import TwoViewTransform

if TYPE_CHECKING:
    from .recipes.evaluate import evaluate
    from .recipes.evaluate_options import EvaluateOptions
    from .recipes.finetune import finetune
    from .recipes.finetune_options import FinetuneOptions
    from .recipes.pretrain import PretrainOptions, pretrain

_IMPORTED_AT_FIRST_USE = {
    "EvaluateOptions": ".recipes.evaluate_options",
    "FinetuneOptions": ".recipes.finetune_options",
    "PretrainOptions": ".recipes.pretrain",
    "evaluate": ".recipes.evaluate",
    "finetune": ".recipes.finetune",
    "pretrain": ".recipes.pretrain",
}


def __getattr__(name: str) -> Any:
    """Import a training run at its first use."""
    return import_at_first_use(__name__, _IMPORTED_AT_FIRST_USE, name)


def __dir__() -> list[str]:
    return sorted(__all__)


__all__ = [
    "BlockMaskGenerator",
    "EvaluateOptions",
    "FinetuneOptions",
    "MaskedImageCollator",
    "PretrainOptions",
    "TwoViewTransform",
    "evaluate",
    "finetune",
    "layer_decay_parameter_groups",
    "pretrain",
]
