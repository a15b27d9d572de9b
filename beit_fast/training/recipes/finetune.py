"""Fine-tuning for classification and segmentation: `beit-fast finetune`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...image_processing.processor import IGNORED_LABEL, BeitImageProcessor
from ...image_processing.resampling import Size
from ...utils.messages import FieldError, describe, join_choices
from ..data.dataset import TrainingDataset, collate_items
from ..data.opening import open_source
from ..data.source import ImageSource, SourceKind
from ..engine.loop import recorded_settings, train
from ..engine.processes import Processes, processes_of_run
from ..engine.recipe import Batch
from ..engine.run_folder import RunFolder
from ..engine.settings import COUNT, FLAG, FRACTION, NOT_NEGATIVE, OPTIONAL_COUNT, EngineSettings, Rule
from ..parameter_groups import layer_decay_parameter_groups
from ..seeding import MIXUP, derived_generator
from ..transforms import ClassificationTransform, Mixup, SegmentationTransform
from ..transforms.mixup import MixupMode
from ..transforms.random_erasing import ErasingMode
from .finetune_classes import class_names_of
from .finetune_evaluation import Evaluator
from .finetune_model import FinetunedModel, load_finetuned_model, normalization_of, processor_of

Task: TypeAlias = Literal["classification", "segmentation"]
TASKS: tuple[Task, ...] = get_args(Task)

SOURCE_KINDS: dict[Task, SourceKind] = {"classification": "classes", "segmentation": "segmentation"}
"""What a source of each task has."""

_SEGMENTATION_LR, _SEGMENTATION_BATCH = 3e-5, 16  # unilm's for ADE20k


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(EngineSettings):
    """Options of fine-tuning; names are those of unilm, defaults those of its base model.

    Attributes:
        data: Classification: a folder with one folder of images for each class. Segmentation: a folder with `images/`
            and `annotations/`. Or Parquet files; see `beit_fast.training.data.open_source`.
        model: The checkpoint to start from: a folder, a file or a name on the hub, pre-trained or fine-tuned.
        task: "classification" or "segmentation".
        eval_data_path: Images to evaluate on after each epoch, as `data`, or None.
        nb_classes: Number of classes. Classification: it is checked. Segmentation: required, unless `class_names` is
            given or the model is a segmentation model.
        class_names: Segmentation: a text file with the name of one class a line.
        reduce_labels: Segmentation: subtract 1 from class ids; 0 is ignored.
        ignore_index: Segmentation: the class id without a loss.
        input_size: Size of the model's images; None is that of the checkpoint.
        drop_path: Drop path of the last block.
        layer_decay: Factor of the learning rate from one layer to the one before it.
        smoothing: Label smoothing.
        mixup, cutmix: Alphas of both; 0 turns one off.
        mixup_prob, mixup_switch_prob, mixup_mode: Numbers of `Mixup`.
        aa: RandAugment's policy, or None.
        color_jitter: Largest change of colors, without a policy only; None and 0 change none. Segmentation: other
            numbers change colors as usual there.
        train_interpolation: Filter of resizing in training.
        reprob, remode, recount: Numbers of `RandomErasing`.
        crop_scale: Range of the area of the crop, as a fraction of the image.
        hflip: Probability of a horizontal flip.
        crop_pct: Share of an image that is left in evaluation; None is 224 / 256 below 384 pixels and 1 from there on.
        image_mean, image_std: Normalization; None is that of the checkpoint's image processor, or 0.5.
        configuration: Other fields of `BeitConfig` to set.
    """

    reference_lr: ClassVar[float] = 4e-3
    reference_min_lr: ClassVar[float] = 1e-6
    reference_batch: ClassVar[int] = 1024

    data: Path
    model: str
    task: Task = "classification"
    eval_data_path: Path | None = None
    nb_classes: int | None = None
    class_names: Path | None = None
    reduce_labels: bool = False
    ignore_index: int = IGNORED_LABEL
    input_size: int | None = None
    drop_path: float = 0.1
    layer_decay: float = 0.65
    smoothing: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_mode: MixupMode = "batch"
    aa: str | None = "rand-m9-mstd0.5-inc1"
    color_jitter: float | None = 0.4
    train_interpolation: str = "bicubic"
    reprob: float = 0.25
    remode: ErasingMode = "pixel"
    recount: int = 1
    crop_scale: tuple[float, float] = (0.08, 1.0)
    hflip: float = 0.5
    crop_pct: float | None = None
    image_mean: tuple[float, float, float] | None = None
    image_std: tuple[float, float, float] | None = None
    configuration: dict[str, Any] = field(default_factory=dict)
    epochs: int = 100
    warmup_epochs: float = 20.0

    def errors(self) -> list[FieldError]:
        """Return every value that does not fit."""
        rules: dict[str, Rule] = {
            "nb_classes": OPTIONAL_COUNT,
            "reduce_labels": FLAG,
            "input_size": OPTIONAL_COUNT,
            "drop_path": FRACTION,
            "layer_decay": Rule(FRACTION.has_type, lambda value: 0 < value <= 1, "a number above 0, at most 1"),
            "smoothing": FRACTION,
            "mixup": NOT_NEGATIVE,
            "cutmix": NOT_NEGATIVE,
            "mixup_prob": FRACTION,
            "mixup_switch_prob": FRACTION,
            "reprob": FRACTION,
            "recount": COUNT,
            "hflip": FRACTION,
            "color_jitter": FRACTION._replace(optional=True),
        }
        errors = super().errors() + self.rule_errors(rules)
        if self.task not in TASKS:
            errors.append(FieldError(f"{describe('task', self.task)} (expected {join_choices(TASKS)})"))
        elif self.task == "classification":
            given = {"class_names": self.class_names is not None, "reduce_labels": self.reduce_labels}
            errors += [
                FieldError(f"{describe(name, getattr(self, name))} (expected it with task='segmentation' only)")
                for name, is_given in given.items()
                if is_given
            ]
        return errors

    def resolved(self, processes: int) -> Self:
        """Copy the options with learning rates in the place of None."""
        if self.task == "segmentation" and self.lr is None:
            lr = _SEGMENTATION_LR * self.images_per_step(processes) / _SEGMENTATION_BATCH
            least = 0.0 if self.min_lr is None else self.min_lr
            return dataclasses.replace(self, lr=lr, min_lr=least).resolved(processes)
        return super().resolved(processes)

    def recorded(self) -> dict[str, Any]:
        """Return the values that must not differ if a run is resumed."""
        return {name: value for name, value in super().recorded().items() if name != "eval_data_path"}


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
        # A segmentation model does not use its last blocks if `out_indices` does not name them.
        self.has_unused_parameters = options.task == "segmentation"
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

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the model and its image processor."""
        self.model.save_pretrained(folder, state_dict=weights)
        self.processor.save_pretrained(folder)


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
