"""The options of `beit-fast eval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from ...utils.messages import FieldError, raise_errors
from ..engine.settings import COUNT, FLAG, NATURAL, POSITIVE, Rule, one_of, rule_errors
from ..evaluation.features import Pooling

EvaluationTask: TypeAlias = Literal["classification", "segmentation", "features"]
"""What is evaluated; "features" is k-NN and linear probe alone."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What to evaluate, on what, and how.

    Attributes:
        data: A folder with one folder for each class; for segmentation with `images/` and `annotations/`; or Parquet.
        model: A checkpoint: a folder, a file, or a name on the hub.
        task: The task, or None for that of the checkpoint.
        knn: Images with classes whose features are the neighbors of k-NN, or None.
        linear_probe: Images with classes to which a linear probe is fitted, or None.
        classes_by_order: If True, the sorted classes of `data` are the ids of the checkpoint; otherwise names decide.
        pooling: Features: "patches" is the mean of the patch tokens, "cls" the CLS token.
        layer: Features: the block whose output is taken, from 1; None is the last one, after a final LayerNorm.
        k, temperature: k-NN: the number of neighbors, and the temperature of their weights.
        seed: Linear probe: the seed of the held-out images that choose the L2 strength.
        reduce_labels: Segmentation: whether 1 is subtracted from ids; None is the choice of the image processor.
        ignore_index: Segmentation: the id that is not counted, or None for that of the checkpoint.
        batch_size: Images in one forward.
        num_workers: Processes that read images; 0 reads in this process.
        processor: The source of the image processor, or None for the checkpoint's.
        attn_implementation: The attention implementation, or None to choose by device.
        device: "auto", "cpu" or "cuda".
        dtype: The dtype of the weights, or None for the checkpoint's.
        local_files_only: If True, never use the network.
    """

    data: Path
    model: str
    task: EvaluationTask | None = None
    knn: Path | None = None
    linear_probe: Path | None = None
    classes_by_order: bool = False
    pooling: Pooling = "patches"
    layer: int | None = None
    k: int = 20
    temperature: float = 0.07
    seed: int = 0
    reduce_labels: bool | None = None
    ignore_index: int | None = None
    batch_size: int = 32
    num_workers: int = 2
    processor: str | None = None
    attn_implementation: str | None = None
    device: str = "auto"
    dtype: str | None = None
    local_files_only: bool = False

    def __post_init__(self) -> None:
        errors = rule_errors(self, _RULES)
        has_probe = self.knn is not None or self.linear_probe is not None
        if self.task == "segmentation" and has_probe:
            errors.append(FieldError("knn and linear_probe need images with classes (expected another task)"))
        if self.task == "features" and not has_probe:
            errors.append(FieldError("task='features' without images to learn from (expected knn or linear_probe)"))
        raise_errors(type(self).__name__, errors)


def _optional(rule: Rule) -> Rule:
    return rule._replace(optional=True)


_RULES: dict[str, Any] = {
    "task": one_of(get_args(EvaluationTask), optional=True),
    "classes_by_order": FLAG,
    "pooling": one_of(get_args(Pooling)),
    "layer": _optional(NATURAL),
    "k": COUNT,
    "temperature": POSITIVE,
    "seed": NATURAL,
    "reduce_labels": _optional(FLAG),
    "ignore_index": _optional(NATURAL),
    "batch_size": COUNT,
    "num_workers": NATURAL,
    "device": one_of(("auto", "cpu", "cuda")),
}
