"""Fine-tuning for classification and segmentation: `beit-fast finetune`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...image_processing.processor import BeitImageProcessor
from ...image_processing.resampling import Size
from ..data.dataset import TrainingDataset, collate_items
from ..data.opening import open_source
from ..data.source import ImageSource
from ..engine.loop import recorded_settings, train
from ..engine.processes import Processes, processes_of_run
from ..engine.recipe import Batch
from ..engine.run_folder import RunFolder
from ..parameter_groups import layer_decay_parameter_groups
from ..seeding import MIXUP, derived_generator
from ..transforms import ClassificationTransform, Mixup, SegmentationTransform
from .finetune_classes import class_names_of
from .finetune_evaluation import Evaluator
from .finetune_model import FinetunedModel, load_finetuned_model, normalization_of, processor_of
from .finetune_options import SOURCE_KINDS, FinetuneOptions


def finetune(options: FinetuneOptions, conditions: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """Fine-tune BEiT; the same call resumes a run that was killed.

    Each layer gets its own bias table; a shared one of pre-training is copied to all of them. Under torchrun all
    processes call it. `output` gets `model/` with its image processor, which `from_pretrained` reads here and in
    Transformers, `log.jsonl`, `run.json` and `checkpoints/`, and `model_ema/` with `model_ema_decay`.

    Args:
        options: What to train, on what, and how.
        conditions: Facts to write into `run.json`, such as versions and hardware.

    Returns:
        The rows of the log: `step`, `epoch`, `loss`, `grad_norm`, `lr`, `images_per_second`; after an epoch with
        evaluation images `top1` and `top5`, or `mean_iou`, `mean_accuracy` and `pixel_accuracy`. Empty in all but the
        main process.

    Raises:
        FileNotFoundError: If there is no data or checkpoint at a path.
        ValueError: If values, classes or files do not fit together, or `output` has another run.
        RuntimeError: If the loss is not finite.
    """
    with processes_of_run(options.device) as processes:
        settings = options.resolved(processes.count)
        kind = SOURCE_KINDS[settings.task]
        source = open_source(settings.data, kind)
        evaluation = None if settings.eval_data_path is None else open_source(settings.eval_data_path, kind)
        names = class_names_of(settings, source, evaluation)
        extra = {"digest": source.digest(), "images": len(source), "classes": names}
        folder = RunFolder(settings.output)
        processes.on_main(lambda: folder.check(recorded_settings(settings, extra, processes), settings.overwrite))
        recipe = FinetuneRecipe(settings, source, evaluation, names, processes, extra)
        return train(recipe, settings, processes, conditions or {})


class FinetuneRecipe:
    """The model, the data and the loss of fine-tuning; see `engine.recipe.Recipe`.

    Args:
        options: Options with learning rates.
        source: The images of training.
        evaluation: The images of evaluation, or None.
        names: Names of the classes; None keeps those of a segmentation model.
        processes: The processes of the run.
        extra: Settings that must not differ if a run is resumed.
    """

    dataset_groups: tuple[int, ...] | None
    has_unused_parameters = False

    def __init__(
        self,
        options: FinetuneOptions,
        source: ImageSource,
        evaluation: ImageSource | None,
        names: Sequence[str] | None,
        processes: Processes,
        extra: Mapping[str, Any],
    ) -> None:
        self.options, self.settings = options, extra
        self.model: FinetunedModel = load_finetuned_model(options, names)
        mean, std = normalization_of(options, self.model.config)
        self.processor: BeitImageProcessor = processor_of(options, self.model.config, mean, std)
        size, count = self.model.config.image_height_width, self.model.config.num_labels
        self.dataset_groups = source.groups
        self.collate: Callable[[list[Any]], Batch]
        transform: ClassificationTransform | SegmentationTransform
        if options.task == "classification":
            transform = _classification_transform(options, size, mean, std)
            self.collate = MixedCollate(_mixup(options, count), options.seed)
        else:
            transform = _segmentation_transform(options, size, mean, std, count)
            self.collate = AnnotatedCollate(options.ignore_index)
        self.dataset = TrainingDataset(source, transform, options.seed)
        self.evaluator: Evaluator | None = None
        if evaluation is not None:
            labels_of = None if isinstance(transform, ClassificationTransform) else transform.labels_of
            self.evaluator = Evaluator(options, evaluation, self.processor, labels_of, processes)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return groups with a learning rate for each layer."""
        lr = self.options.lr
        assert lr is not None  # resolved
        return layer_decay_parameter_groups(self.model, lr, self.options.layer_decay, self.options.weight_decay)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the cross-entropy of soft targets, or of labeled pixels."""
        if self.options.task == "classification":
            logits = model(batch["pixel_values"]).logits
            return F.cross_entropy(logits.float(), batch["targets"]), {}
        loss = model(batch["pixel_values"], labels=batch["labels"]).loss
        return loss * batch["has_labels"], {}

    def evaluate(self) -> dict[str, float]:
        """Evaluate on the evaluation images; nothing without them."""
        return {} if self.evaluator is None else self.evaluator(self.model)


class MixedCollate:
    """Stack a batch, and mix it by its first key.

    Args:
        mixup: Mixes images and makes soft targets.
        seed: The seed of the run.
    """

    def __init__(self, mixup: Mixup, seed: int) -> None:
        self.mixup, self.seed = mixup, seed

    def __call__(self, items: list[Any]) -> Batch:
        batch = collate_items(items)
        generator = derived_generator(self.seed, MIXUP, *batch.pop("key"))
        batch["pixel_values"], batch["targets"] = self.mixup(batch["pixel_values"], batch.pop("labels"), generator)
        return batch


class AnnotatedCollate:
    """Stack a batch; `has_labels` is 0 if all of its pixels are ignored, because their mean loss is NaN.

    Args:
        ignore_index: The class id of ignored pixels.
    """

    def __init__(self, ignore_index: int) -> None:
        self.ignore_index = ignore_index

    def __call__(self, items: list[Any]) -> Batch:
        batch = collate_items(items)
        del batch["key"]
        has_labels = bool((batch["labels"] != self.ignore_index).any())
        batch["has_labels"] = torch.tensor(float(has_labels))
        if not has_labels:
            batch["labels"] = torch.zeros_like(batch["labels"])
        return batch


def _mixup(options: FinetuneOptions, count: int) -> Mixup:
    return Mixup(
        count,
        options.mixup,
        options.cutmix,
        options.mixup_prob,
        options.mixup_switch_prob,
        options.mixup_mode,
        options.smoothing,
    )


def _classification_transform(
    options: FinetuneOptions, size: Size, mean: list[float], std: list[float]
) -> ClassificationTransform:
    return ClassificationTransform(
        size,
        mean,
        std,
        train_interpolation=options.train_interpolation,  # type: ignore[arg-type]
        aa=options.aa,
        color_jitter=options.color_jitter,
        reprob=options.reprob,
        remode=options.remode,
        recount=options.recount,
        scale=options.crop_scale,
        flip_probability=options.hflip,
    )


def _segmentation_transform(
    options: FinetuneOptions, size: Size, mean: list[float], std: list[float], count: int
) -> SegmentationTransform:
    return SegmentationTransform(
        size,
        mean,
        std,
        num_labels=count,
        do_reduce_labels=options.reduce_labels,
        ignore_index=options.ignore_index,
        flip_probability=options.hflip,
        color_jitter=bool(options.color_jitter),
        train_interpolation=options.train_interpolation,  # type: ignore[arg-type]
    )
