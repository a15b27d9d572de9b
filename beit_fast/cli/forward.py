"""The model of a command: load it, run batches, rank classes."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ..checkpoint.loading import missing_parameters_error
from ..layers.embeddings import window_of
from ..models import class_scores
from .devices import usable_device
from .images import PixelBatch
from .options import ModelOptions, Output
from .processors import processor_of

ScoreName: TypeAlias = Literal["probability", "value"]

CLASSIFIER = "expected a checkpoint for image classification"
"""What a command with classes can load, for errors."""


def load(options: ModelOptions, class_name: str, expected: str) -> tuple[Any, Any]:
    """Load the model `class_name` and the image processor of the checkpoint `options.model`.

    Raises:
        ValueError: If the checkpoint lacks parameters of the model; `expected` describes one that does not.
    """
    model = load_complete(
        class_name,
        options.model,
        expected,
        attn_implementation=options.attn,
        dtype=options.dtype,
        device=usable_device(options.device),
        local_files_only=options.local_files_only,
    )
    return model, processor_of(options, model.config)


def load_complete(class_name: str, source: str, expected: str, allowed: Sequence[str] = (), **arguments: Any) -> Any:
    """Load a checkpoint that contains every parameter of the model.

    Args:
        class_name: A class of `beit_fast`.
        source: A folder, a file or a name on the hub.
        expected: What the user can pass instead, for the error.
        allowed: Prefixes of parameters that the checkpoint may lack, because their initial value is not random.
        arguments: Arguments of `from_pretrained`.

    Raises:
        ValueError: If parameters are missing and would be random.
    """
    import beit_fast

    with warnings.catch_warnings():
        # The error below says the same.
        warnings.filterwarnings("ignore", message="some parameters of .* were initialized", category=UserWarning)
        model, info = getattr(beit_fast, class_name).from_pretrained(source, output_loading_info=True, **arguments)
    initial = sorted(key for key in info["missing_keys"] if key.startswith(tuple(allowed)))
    missing = sorted(set(info["missing_keys"]) - set(initial))
    if missing:
        raise missing_parameters_error(source, class_name, missing, expected)
    if initial:
        print(f"{source} does not contain {', '.join(initial)}: they have their initial values", file=sys.stderr)
    return model


@torch.inference_mode()
def run_batch(model: Any, batch: PixelBatch, output: Output) -> dict[int, Tensor | str]:
    """Run a batch; images of one size go through the model together.

    Returns:
        By the index of each image, its logits or features in float32 on the CPU, or the reason why it has none.
    """
    found: dict[int, Tensor | str] = dict(batch.errors)
    for indices, pixels in batch.groups:
        outputs = run_pixels(model, pixels)
        if isinstance(outputs, str):
            found |= dict.fromkeys(indices, outputs)
            continue
        values = outputs.pooler_output if output == "features" else outputs.logits
        for index, row in zip(indices, values.float().cpu(), strict=True):
            found[index] = row if row.isfinite().all() else not_finite_reason(output)
    return found


def run_pixels(model: Any, pixels: Tensor) -> Any:
    """Run the model on pixels `[B, C, H, W]`.

    Returns:
        The outputs, or the reason why images of this size have none.
    """
    try:
        window_of(pixels, model.config.patch_size)
    except ValueError as error:  # of these images, not of the model
        return str(error)
    return model(pixels.to(model.device, model.dtype))


def not_finite_reason(output: Output) -> str:
    """Return why an image has no result although the model ran."""
    return f"the model returned {output} that are not finite"


def score_name(config: Any) -> ScoreName:
    """Return the name of a class's score: a regression has values, not probabilities."""
    return "value" if class_scores.problem_type_of(config) == "regression" else "probability"


def class_entries(logits: Tensor, config: Any, count: int) -> list[dict[str, Any]]:
    """Return `class_scores.top_classes` of one image as JSON objects.

    The score is under `score_name(config)`.
    """
    name = score_name(config)
    found = class_scores.top_classes(logits, config, count)
    return [{"index": entry.id, "label": entry.label, name: entry.score} for entry in found]
