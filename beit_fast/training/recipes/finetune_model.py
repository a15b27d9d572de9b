"""Load a checkpoint for fine-tuning, and choose its image processor."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from ...checkpoint.key_mapping import full_name, head_of
from ...configuration.beit_config import BeitConfig
from ...image_processing.of_checkpoint import find_processor
from ...image_processing.options import Resampling
from ...image_processing.processor import BeitImageProcessor
from ...models.beit import BeitForImageClassification, BeitModel
from ...models.segmentation import BeitForSemanticSegmentation
from ...utils.hub import HubOptions
from ...utils.messages import join_some
from ..arguments import three_numbers
from ..seeding import INITIALIZATION, derived_seed
from ..transforms import evaluation_processor
from .finetune_options import FinetuneOptions

FinetunedModel: TypeAlias = "BeitForImageClassification | BeitForSemanticSegmentation"

_SEGMENTER = BeitForSemanticSegmentation.__name__


def load_finetuned_model(options: FinetuneOptions, names: Sequence[str] | None) -> FinetunedModel:
    """Load a checkpoint into a model of the task.

    A shared bias table is copied to each layer, which then has its own. Classification pools the mean of the patches.
    A head that the checkpoint does not have, or of another number of classes, is initialized as a function of the
    seed.

    Args:
        options: The options of fine-tuning.
        names: Names of the classes; None keeps those of a segmentation model.

    Returns:
        The model in float32, on the CPU.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If it does not fit, or says nothing about its classes and `names` is None.
    """
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message="some parameters of .* were initialized")
        stored = BeitModel.from_pretrained(options.model).config
        is_segmenter = _SEGMENTER in (stored.architectures or [])
        if names is None and not is_segmenter:
            raise ValueError(
                f"{options.model!r} is not a segmentation model, so the number of classes is not known (expected "
                "nb_classes or class_names)"
            )
        changes = _changes(options, stored, names, is_segmenter) | options.configuration
        kind = BeitForImageClassification if options.task == "classification" else BeitForSemanticSegmentation
        torch.manual_seed(derived_seed(options.seed, INITIALIZATION))
        model, info = kind.from_pretrained(
            options.model,
            image_size=options.input_size,
            attn_implementation=options.attn_implementation,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **changes,
        )
    wrong = sorted(key for key, *_ in info["mismatched_keys"] if head_of(full_name(key)) is None)
    if wrong:
        raise ValueError(
            f"{options.model!r} does not fit the configuration: the shape of {join_some(wrong, 5)} differs"
        )
    if model.config.num_channels != 3:
        raise ValueError(f"{options.model!r} has num_channels={model.config.num_channels} (expected 3: images are RGB)")
    if isinstance(model, BeitForSemanticSegmentation):
        _freeze_unused(model)
    return model


def _freeze_unused(model: BeitForSemanticSegmentation) -> None:
    """Freeze what no stage of a segmentation model reads: blocks after the last one, and the final norm.

    They have no gradient, so an optimizer has no state for them, which a checkpoint would lack.
    """
    used = max(model.config.out_indices) - 1  # stage i is the output of i - 1 blocks
    for block in model.beit.encoder.layer[used:]:
        block.requires_grad_(False)
    model.beit.layernorm.requires_grad_(False)


def _changes(
    options: FinetuneOptions, stored: BeitConfig, names: Sequence[str] | None, is_segmenter: bool
) -> dict[str, Any]:
    """Return the fields of the configuration that fine-tuning changes."""
    changes: dict[str, Any] = {"drop_path_rate": options.drop_path, "use_mask_token": False}
    if stored.use_shared_relative_position_bias:
        changes |= {"use_shared_relative_position_bias": False, "use_relative_position_bias": True}
    if names is not None:
        changes |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    if options.task == "classification":
        return changes | {"use_mean_pooling": True}
    changes["semantic_loss_ignore_index"] = options.ignore_index
    if not is_segmenter:
        changes["out_indices"] = _four_stages(stored.num_hidden_layers)
    return changes


def _four_stages(layers: int) -> list[int]:
    """Return the stages of a segmentation model: 3, 5, 7, 11 of 12 layers, and in proportion.

    A model of less than 6 layers has the last four.

    Raises:
        ValueError: If there are less than four layers.
    """
    if layers < 4:
        raise ValueError(f"the checkpoint has {layers} layers (expected at least 4 for segmentation)")
    if layers < 6:
        return list(range(layers - 3, layers + 1))
    return [layers * part // 12 - 1 for part in (4, 6, 8, 12)]


def normalization_of(options: FinetuneOptions, config: BeitConfig) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation: the options, those of the checkpoint's image processor, or 0.5."""
    found = find_processor(options.model, config, HubOptions())
    stored = {} if found is None else found.to_dict()
    mean, std = (three_numbers(stored.get(name, 0.5)) for name in ("image_mean", "image_std"))
    mean = mean if options.image_mean is None else list(options.image_mean)
    return mean, std if options.image_std is None else list(options.image_std)


def processor_of(
    options: FinetuneOptions, config: BeitConfig, mean: list[float], std: list[float]
) -> BeitImageProcessor:
    """Return the image processor that evaluates the trained model."""
    height, width = config.image_height_width
    if options.task == "classification":
        name: Any = options.train_interpolation
        interpolation: Resampling = "bicubic" if name == "random" else name
        return evaluation_processor((height, width), mean, std, crop_pct=options.crop_pct, interpolation=interpolation)
    return BeitImageProcessor(
        size={"height": height, "width": width},
        do_center_crop=False,
        do_reduce_labels=options.reduce_labels,
        image_mean=mean,
        image_std=std,
    )
