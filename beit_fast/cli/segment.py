"""The command `beit-fast segment`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .forward import load, not_finite_reason, run_pixels
from .images import read_photograph
from .legend import check_legend, with_legend
from .options import TASKS, ExitCode, SegmentOptions
from .overlay import class_shares, overlay
from .pictures import Target, plan_pictures, save_pictures
from .reports import SegmentationReport, report_failures, report_unreadable

_SEGMENTER = "expected a checkpoint for semantic segmentation"


def segment(options: SegmentOptions) -> int:
    """Draw the classes over every image and print their shares and colors.

    The files to write and the images are looked at before the model is loaded. The result is the exit code.
    """
    targets, is_folder = plan_pictures(options)
    if options.legend:
        check_legend()
    if is_folder:
        errors, photograph = report_unreadable([target.image for target in targets]), None
        if len(errors) == len(targets):
            return report_failures(options, errors)
    else:
        errors, photograph = {}, _only_photograph(options.images[0])
    model, processor = load(options, TASKS["semantic-segmentation"], _SEGMENTER)
    with (
        tqdm(total=len(targets), unit="image", disable=None if is_folder else True) as bar,
        SegmentationReport(options, model, bar, is_folder) as report,
    ):
        for target in targets:
            found = errors.get(target.image) or _segment_one(options, model, processor, target, photograph)
            if isinstance(found, str):
                report.fail(target.image, found, is_printed=target.image in errors)
            else:
                report.add(target, found)
            bar.update()
    return ExitCode.SOME_FAILED if report.failures else ExitCode.DONE


def _only_photograph(path: str) -> Any:
    """Read the only image of the command.

    Raises:
        OSError: If it cannot be read.
    """
    photograph = read_photograph(path)
    if isinstance(photograph, str):
        raise OSError(f"{path!r} {photograph}")
    return photograph


def _segment_one(
    options: SegmentOptions, model: Any, processor: Any, target: Target, photograph: Any
) -> list[dict[str, Any]] | str:
    """Write the pictures of one image.

    Args:
        photograph: The image of Pillow, or None to read it.

    Returns:
        The shares of its classes, or the reason why it has none.
    """
    photograph = read_photograph(target.image) if photograph is None else photograph
    classes = photograph if isinstance(photograph, str) else _classes(model, processor, photograph)
    if isinstance(classes, str):
        return classes
    from PIL import Image

    shares = class_shares(classes, model.config.id2label)
    picture = overlay(photograph, classes, model.config.num_labels, options.opacity)
    pictures = [with_legend(picture, shares) if options.legend else picture]
    if options.labels is not None:
        pictures.append(Image.fromarray(classes.to(torch.int32).numpy().astype("uint16")))
    save_pictures(target.files, pictures)
    return shares


@torch.inference_mode()
def _classes(model: Any, processor: Any, photograph: Any) -> Tensor | str:
    """Return the class of every pixel `[height, width]`, or an error."""
    outputs = run_pixels(model, processor([photograph], return_tensors="pt")["pixel_values"])
    if isinstance(outputs, str):
        return outputs
    if not outputs.logits.isfinite().all():
        return not_finite_reason("logits")
    return processor.post_process_semantic_segmentation(outputs, [photograph.size[::-1]])[0].cpu()
