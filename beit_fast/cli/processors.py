"""The image processors of the commands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..image_processing.of_checkpoint import find_processor, fit_to_image_size, unknown_preprocessing
from ..image_processing.processor import PREPROCESSOR_NAME, BeitImageProcessor
from ..utils.hub import HubOptions

if TYPE_CHECKING:
    from .options import ConvertOptions, ModelOptions


def processor_of(options: ModelOptions, config: Any) -> BeitImageProcessor:
    """Load the image processor of `--processor`, else that of the checkpoint.

    Raises:
        ValueError: If the checkpoint says nothing about preprocessing.
    """
    processor = _named_or_found(options.processor, options.model, config, options.local_files_only)
    if processor is None:
        raise unknown_preprocessing(
            options.model,
            "pass --processor: a name on the hub, or a folder or file that BeitImageProcessor(size=..., "
            "image_mean=..., image_std=...).save_pretrained(FOLDER) wrote",
        )
    return processor


def converted_processor(options: ConvertOptions, config: Any) -> BeitImageProcessor | None:
    """Load the image processor that `convert` writes.

    Its sizes are those of `--image-size`.

    Args:
        options: The options of `convert`.
        config: The configuration of the converted model.

    Returns:
        The processor, or None if the source says nothing about preprocessing.

    Raises:
        ValueError: If nothing is known, but the target has the file of another checkpoint.
    """
    processor = _named_or_found(options.processor, options.source, config, options.local_files_only)
    if processor is None and (options.target / PREPROCESSOR_NAME).exists():
        raise ValueError(
            f"the preprocessing of {options.source!r} is not known, and {str(options.target)!r} has the "
            f"{PREPROCESSOR_NAME} of another checkpoint; remove it, or pass --processor"
        )
    if processor is None or options.image_size is None:
        return processor
    return fit_to_image_size(processor, config.image_height_width)


def _named_or_found(
    named: str | None, checkpoint: str, config: Any, local_files_only: bool
) -> BeitImageProcessor | None:
    if named is not None:
        return BeitImageProcessor.from_pretrained(named, local_files_only=local_files_only)
    try:
        return find_processor(checkpoint, config, HubOptions(local_files_only=local_files_only))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the preprocessing of {str(Path(checkpoint))!r}: {error}; pass another by --processor"
        ) from error
