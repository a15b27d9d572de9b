"""Options of fine-tuning."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeAlias, get_args

from ...image_processing.processor import IGNORED_LABEL
from ...utils.messages import FieldError, describe, join_choices
from ..data.source import SourceKind
from ..engine.settings import COUNT, FLAG, FRACTION, NOT_NEGATIVE, OPTIONAL_COUNT, EngineSettings, Rule, rule_errors
from ..transforms.mixup import MixupMode
from ..transforms.random_erasing import ErasingMode

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
        errors = super().errors() + rule_errors(self, rules)
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
