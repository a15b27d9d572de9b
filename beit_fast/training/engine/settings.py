"""Settings that every training run has."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self, TypeAlias, get_args

from ...configuration.fields import is_integer, is_number
from ...utils.messages import FieldError, describe, join_choices, raise_errors
from ...utils.names import ATTENTION_IMPLEMENTATIONS, AttentionImplementation
from ...utils.paths import as_path

Precision: TypeAlias = Literal["float32", "bfloat16"]
TrainingDevice: TypeAlias = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How a model is trained; the names are those of unilm, or plain words where it has none.

    Attributes:
        output: The folder of the run: settings, log, checkpoints and model.
        overwrite: If True, delete the run in `output` and start from the beginning.
        seed: Seed of all random numbers.
        epochs: Passes over the data.
        max_steps: Optimizer steps after which the run ends earlier, or None. The schedule still has all epochs.
        batch_size: Images of one process in one forward.
        gradient_accumulation: Forwards before each optimizer step.
        lr: Peak learning rate. None: `reference_lr` for a step of `reference_batch` images, and in proportion.
        min_lr: Learning rate of the last step. None: `reference_min_lr` in proportion.
        warmup_lr: Learning rate of the first step of the warmup.
        warmup_epochs: Epochs of linear warmup.
        warmup_steps: Steps of linear warmup, instead of `warmup_epochs`, or None.
        weight_decay: Weight decay of matrices.
        weight_decay_end: Weight decay of the last step, reached by a cosine; None is `weight_decay`.
        opt_betas, opt_eps: Numbers of AdamW.
        clip_grad: Largest norm of the gradients of a step, or None.
        precision: "bfloat16" computes under autocast; weights are float32.
        compile: If True, compile the model by `torch.compile`.
        gradient_checkpointing: If True, recompute blocks in the backward pass.
        model_ema_decay: Decay of an exponential moving average of the weights, or None.
        fsdp: If True, shard weights, gradients and optimizer state among processes (FSDP2).
        attn_implementation: Attention implementation, or None to choose by device and dtype.
        device: "cpu", "cuda", or "auto" for CUDA if it is available.
        num_workers: Processes that read images for each training process; 0 reads in the training process.
        save_every_epochs: Epochs between checkpoints; the last epoch has one too.
        save_every_steps: Also write a checkpoint after so many steps, or None.
        keep_checkpoints: Checkpoints to keep; older ones are deleted.
        log_every: Steps between rows of the log.
        tensorboard: If True, also write TensorBoard's files.
    """

    reference_lr: ClassVar[float] = 5e-4
    reference_min_lr: ClassVar[float] = 1e-5
    reference_batch: ClassVar[int] = 1024

    output: Path
    overwrite: bool = False
    seed: int = 0
    epochs: int = 100
    max_steps: int | None = None
    batch_size: int = 32
    gradient_accumulation: int = 1
    lr: float | None = None
    min_lr: float | None = None
    warmup_lr: float = 0.0
    warmup_epochs: float = 5.0
    warmup_steps: int | None = None
    weight_decay: float = 0.05
    weight_decay_end: float | None = None
    opt_betas: tuple[float, float] = (0.9, 0.999)
    opt_eps: float = 1e-8
    clip_grad: float | None = None
    precision: Precision = "float32"
    compile: bool = False
    gradient_checkpointing: bool = False
    model_ema_decay: float | None = None
    fsdp: bool = False
    attn_implementation: AttentionImplementation | None = None
    device: TrainingDevice = "auto"
    num_workers: int = 2
    save_every_epochs: int = 1
    save_every_steps: int | None = None
    keep_checkpoints: int = 2
    log_every: int = 10
    tensorboard: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", as_path("the output", self.output))
        raise_errors(type(self).__name__, self.errors())

    def errors(self) -> list[FieldError]:
        """Return every value that does not fit; a subclass adds its own."""
        errors = rule_errors(self, RULES)
        if not errors and self.lr is not None and self.min_lr is not None and self.min_lr > self.lr:
            errors.append(FieldError(f"min_lr={self.min_lr} (expected at most lr={self.lr})"))
        return errors

    def images_per_step(self, processes: int) -> int:
        """Return the images of one optimizer step of that many processes."""
        return self.batch_size * self.gradient_accumulation * processes

    def resolved(self, processes: int) -> Self:
        """Copy the settings with learning rates in the place of None."""
        scale = self.images_per_step(processes) / self.reference_batch
        peak = self.reference_lr * scale if self.lr is None else self.lr
        least = min(self.reference_min_lr * scale, peak) if self.min_lr is None else self.min_lr
        return dataclasses.replace(self, lr=peak, min_lr=least)

    def recorded(self) -> dict[str, Any]:
        """Return what a resumed run must have too, as JSON's types."""
        values = dataclasses.asdict(self)
        return {name: _as_json(value) for name, value in values.items() if name not in FREE_SETTINGS}


FREE_SETTINGS = frozenset(
    {"data", "output", "overwrite", "max_steps", "device", "num_workers", "keep_checkpoints", "tensorboard"}
    # The engine records their product with the number of processes.
    | {"batch_size", "gradient_accumulation"}
)
"""Settings that may differ when a run is resumed."""


class Rule(NamedTuple):
    """What a value must be."""

    has_type: Callable[[Any], bool]
    is_in_range: Callable[[Any], bool]
    expected: str
    optional: bool = False

    def fits(self, value: Any) -> bool:
        """Whether type and range are right."""
        return self.has_type(value) and self.is_in_range(value)


def rule_errors(options: object, rules: Mapping[str, Rule]) -> list[FieldError]:
    """Return the attributes of options that break a rule."""
    errors = []
    for name, rule in rules.items():
        value = getattr(options, name)
        if not (rule.optional and value is None) and not rule.fits(value):
            expected = f"{rule.expected}, or None" if rule.optional else rule.expected
            errors.append(FieldError(f"{describe(name, value)} (expected {expected})", not rule.has_type(value)))
    return errors


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def one_of(choices: tuple[str, ...], optional: bool = False) -> Rule:
    """Return the rule of a string among choices."""
    return Rule(lambda value: isinstance(value, str), lambda value: value in choices, join_choices(choices), optional)


def _are_betas(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(map(is_number, value))


FLAG = Rule(_is_flag, lambda value: True, "True or False")
COUNT = Rule(is_integer, lambda value: value >= 1, "a positive int")
OPTIONAL_COUNT = COUNT._replace(optional=True)
NATURAL = Rule(is_integer, lambda value: value >= 0, "an int from 0")
NOT_NEGATIVE = Rule(is_number, lambda value: 0 <= value < math.inf, "a finite number from 0")
POSITIVE = Rule(is_number, lambda value: 0 < value < math.inf, "a positive number")
FRACTION = Rule(is_number, lambda value: 0 <= value <= 1, "a number from 0 to 1")
BELOW_ONE = Rule(is_number, lambda value: 0 <= value < 1, "a number from 0, below 1")

RULES = {
    "overwrite": FLAG,
    "seed": NATURAL,
    "epochs": COUNT,
    "max_steps": OPTIONAL_COUNT,
    "batch_size": COUNT,
    "gradient_accumulation": COUNT,
    "lr": POSITIVE._replace(optional=True),
    "min_lr": NOT_NEGATIVE._replace(optional=True),
    "warmup_lr": NOT_NEGATIVE,
    "warmup_epochs": NOT_NEGATIVE,
    "warmup_steps": NATURAL._replace(optional=True),
    "weight_decay": NOT_NEGATIVE,
    "weight_decay_end": NOT_NEGATIVE._replace(optional=True),
    "opt_betas": Rule(
        _are_betas,
        lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value),
        "two numbers from 0, below 1",
    ),
    "opt_eps": POSITIVE,
    "clip_grad": POSITIVE._replace(optional=True),
    "precision": one_of(get_args(Precision)),
    "compile": FLAG,
    "gradient_checkpointing": FLAG,
    "model_ema_decay": BELOW_ONE._replace(optional=True),
    "fsdp": FLAG,
    "attn_implementation": one_of(tuple(ATTENTION_IMPLEMENTATIONS), optional=True),
    "device": one_of(get_args(TrainingDevice)),
    "num_workers": NATURAL,
    "save_every_epochs": COUNT,
    "save_every_steps": OPTIONAL_COUNT,
    "keep_checkpoints": COUNT,
    "log_every": COUNT,
    "tensorboard": FLAG,
}
"""What each setting must be."""


def _as_json(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
