"""`ImageClassifier`: images to classes, by a model and the image processor of its checkpoint."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Self, overload

import numpy as np
import torch
from torch import Tensor, nn

from ..checkpoint.loading import missing_parameters_error
from ..image_processing.inputs import Array, read_images
from ..image_processing.of_checkpoint import find_processor, fit_to_image_size, unknown_preprocessing
from ..image_processing.processor import BeitImageProcessor
from ..image_processing.size_groups import group_by_size
from ..models.base import BeitPreTrainedModel
from ..models.beit import BeitForImageClassification
from ..models.class_scores import ClassScore, top_classes
from ..utils.hub import HubOptions
from ..utils.messages import FieldError, describe, raise_errors
from .evaluation import evaluation_mode

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage


class ImageClassifier:
    """Classify images with a model and its image processor.

    `ImageClassifier.from_pretrained(name)("photograph.jpg", top=3)` lists the three most probable classes. The scores
    follow `config.problem_type`: softmax, or sigmoid for several labels an image, or the values of a regression. The
    latter are all returned, in the order of the labels.

    Args:
        model: `BeitForImageClassification`, also optimized or compiled. Another module serves if it has a `config` with
            `num_labels`, `id2label` and `problem_type`, and returns `logits` `[B, num_labels]`.
        processor: The image processor of the checkpoint.

    Raises:
        TypeError: If the model does not classify images, or the processor is of another type.
        ValueError: If the model has no classes.
    """

    def __init__(self, model: nn.Module, processor: BeitImageProcessor) -> None:
        raise_errors(type(self).__name__, [*_model_errors(model), *_processor_errors(processor)])
        self.model = model
        self.processor = processor

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        processor: BeitImageProcessor | None = None,
        **model_options: Any,
    ) -> Self:
        """Load a model and its image processor from a checkpoint.

        Args:
            name_or_path: A folder, a weights file or a hub repository such as `"microsoft/beit-base-patch16-224"`.
            processor: An image processor to use instead of the checkpoint's.
            model_options: Arguments of `BeitForImageClassification.from_pretrained`, such as `device` and `revision`.
                The checkpoint's processor resizes to `image_size` if that is given.

        Raises:
            FileNotFoundError: If there is no checkpoint.
            TypeError: If an option is not known.
            ValueError: If the checkpoint has no classifier, its preprocessing is not known, or it cannot be loaded.
        """
        model, info = BeitForImageClassification.from_pretrained(
            name_or_path, **model_options, output_loading_info=True
        )
        missing = sorted(info["missing_keys"])
        if missing:
            expected = "expected a checkpoint for image classification"
            raise missing_parameters_error(os.fspath(name_or_path), type(model).__name__, missing, expected)
        return cls(model, _processor_of(name_or_path, model, model_options) if processor is None else processor)

    @overload
    def __call__(
        self, images: str | os.PathLike[str] | PillowImage, top: int = ..., batch_size: int = ...
    ) -> list[ClassScore]: ...

    @overload
    def __call__(
        self, images: list[Any] | tuple[Any, ...], top: int = ..., batch_size: int = ...
    ) -> list[list[ClassScore]]: ...

    @overload
    def __call__(
        self, images: Array, top: int = ..., batch_size: int = ...
    ) -> list[ClassScore] | list[list[ClassScore]]: ...

    def __call__(self, images: Any, top: int = 5, batch_size: int = 8) -> Any:
        """List the most probable classes of one or more images.

        The model runs in evaluation mode on its device, without gradients. Its own mode does not change.

        Args:
            images: A Pillow image, a path, an array or tensor `[H, W]`, `[H, W, C]` or `[C, H, W]`, a batch of the
                latter two, or a list of these.
            top: The number of classes of each image.
            batch_size: Images that are read and go through the model together.

        Returns:
            `ClassScore`s of one image, most probable first. For a list or a batch, a list of these for each image.

        Raises:
            FileNotFoundError: If a file does not exist.
            OSError: If an image cannot be decoded.
            TypeError: If an input is not an image, or the model does not return logits.
            ValueError: If an image or an option is not valid, or logits are not finite.
        """
        raise_errors(type(self).__name__, [*_count_errors("top", top), *_count_errors("batch_size", batch_size)])
        is_batch = isinstance(images, (list, tuple)) or (isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4)
        processor: Any = self.processor
        arrays = read_images(images, processor.do_convert_rgb, processor.input_data_format)
        config: Any = self.model.config
        results: list[list[ClassScore]] = []
        with torch.no_grad(), evaluation_mode(self.model):
            while batch := list(islice(arrays, batch_size)):
                for row in self._logits(batch):
                    if not row.isfinite().all():
                        raise ValueError(f"the model returned logits that are not finite for image {len(results)}")
                    results.append(top_classes(row, config, top))
        return results if is_batch else results[0]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.model).__name__}, {type(self.processor).__name__})"

    def _logits(self, images: Sequence[Array]) -> list[Tensor]:
        """Compute the logits `[num_labels]` of each image `[C, H, W]`; images of one size share a forward."""
        rows: dict[int, Tensor] = {}
        for places, pixels in group_by_size(enumerate(map(self._pixels, images))):
            rows |= zip(places, self._forward(pixels).float().cpu(), strict=True)
        return [rows[place] for place in range(len(images))]

    def _pixels(self, image: Array) -> Tensor:
        """Preprocess an image: `[C, H, W]` to pixel values `[1, C, h, w]`."""
        options = {"do_convert_rgb": False, "input_data_format": "channels_first", "data_format": "channels_first"}
        return self.processor(image, return_tensors="pt", **options)["pixel_values"]

    def _forward(self, pixel_values: Tensor) -> Tensor:
        parameter = next(self.model.parameters())
        is_float = pixel_values.is_floating_point()
        pixel_values = pixel_values.to(parameter.device, parameter.dtype if is_float else None)
        logits: Any = getattr(self.model(pixel_values), "logits", None)
        config: Any = self.model.config
        expected = [len(pixel_values), config.num_labels]
        given = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if given != expected:
            raise TypeError(
                f"{type(self.model).__name__} returned logits of {given} (expected [images, num_labels] = {expected})"
            )
        return logits


def _processor_of(
    name_or_path: str | os.PathLike[str], model: BeitForImageClassification, model_options: dict[str, Any]
) -> BeitImageProcessor:
    hub = HubOptions(**{name: model_options[name] for name in HubOptions._fields if name in model_options})
    processor = find_processor(name_or_path, model.config, hub)
    if processor is None:
        raise unknown_preprocessing(
            name_or_path, "pass processor=BeitImageProcessor(size=..., image_mean=..., image_std=...)"
        )
    if model_options.get("image_size") is None:
        return processor
    return fit_to_image_size(processor, model.config.image_height_width)


def _model_errors(model: Any) -> list[FieldError]:
    config: Any = getattr(model, "config", None)
    name = type(model).__name__
    is_other = isinstance(model, BeitPreTrainedModel) and not isinstance(model, BeitForImageClassification)
    fields = ("num_labels", "id2label", "problem_type")
    if not isinstance(model, nn.Module) or is_other or not all(hasattr(config, field) for field in fields):
        return [FieldError(f"model is of type {name} (expected a BeitForImageClassification)", wrong_type=True)]
    if config.num_labels < 1:
        return [FieldError(f"model has config.num_labels={config.num_labels} (expected at least one class)")]
    return []


def _processor_errors(processor: Any) -> list[FieldError]:
    if isinstance(processor, BeitImageProcessor):
        return []
    name = type(processor).__name__
    return [FieldError(f"processor is of type {name} (expected a BeitImageProcessor)", wrong_type=True)]


def _count_errors(name: str, value: Any) -> list[FieldError]:
    if isinstance(value, bool) or not isinstance(value, int):
        return [FieldError(f"{describe(name, value)} is not an int (expected at least 1)", wrong_type=True)]
    return [] if value >= 1 else [FieldError(f"{describe(name, value)} is too small (expected at least 1)")]
