"""The commands `beit-fast classify`, `segment` and `convert`."""

from __future__ import annotations

import colorsys
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..utils.files import atomic_write, writing
from ..utils.messages import count_of
from .devices import usable_device
from .images import unreadable_reason
from .options import TASKS, ClassifyOptions, ConvertOptions, ExitCode, ModelOptions, SegmentOptions
from .processors import converted_processor, processor_of


def classify(options: ClassifyOptions) -> int:
    """Print the most probable classes of every image.

    The result is the exit code.
    """
    model, processor = load(options, TASKS["image-classification"])
    results, failures = [], []
    with tqdm(total=len(options.images), unit="image", disable=None if len(options.images) > 1 else True) as bar:
        for paths, images, unreadable in batches_of(options.images, options.batch_size):
            failures += unreadable
            if images:
                pixels = processor(images, return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
                with torch.inference_mode():
                    logits = model(pixels).logits
                results += [
                    {"image": path, "classes": top_classes(row, model.config.id2label, options.top)}
                    for path, row in zip(paths, logits, strict=True)
                ]
            bar.update(len(images) + len(unreadable))
    _report(options, model, {"results": results}, failures, _classification_lines(results))
    return ExitCode.SOME_FAILED if failures else ExitCode.DONE


def segment(options: SegmentOptions) -> int:
    """Draw the classes over the image and print their shares.

    The result is the exit code.
    """
    from PIL import Image

    model, processor = load(options, TASKS["semantic-segmentation"])
    try:
        photograph = Image.fromarray(torch.as_tensor(read_image(options.image)).permute(1, 2, 0).contiguous().numpy())
    except (OSError, ValueError) as error:
        raise OSError(f"{options.image!r} {unreadable_reason(error, Path(options.image))}") from error
    pixels = processor([photograph], return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
    with torch.inference_mode():
        outputs = model(pixels)
    classes = processor.post_process_semantic_segmentation(outputs, [photograph.size[::-1]])[0].cpu()  # [height, width]
    _save_picture(overlay(photograph, classes, model.config.num_labels, options.opacity), options.out)
    if options.labels is not None:
        _save_picture(Image.fromarray(classes.to(torch.int32).numpy().astype("uint16")), options.labels)
    shares = class_shares(classes, model.config.id2label)
    lines = [f"{100 * share['share']:6.2f} %  {share['index']:4d}  {share['label']}" for share in shares]
    _report(options, model, {"out": str(options.out), "classes": shares}, [], [*lines, f"picture: {options.out}"])
    return ExitCode.DONE


def convert(options: ConvertOptions) -> int:
    """Rewrite a checkpoint of any known format in the hub's layout.

    The image processor is written too. The result is the exit code.
    """
    import beit_fast

    name = TASKS[options.task] if options.task else _architecture_of(options.source)
    model, info = getattr(beit_fast, name).from_pretrained(
        options.source,
        image_size=options.image_size,
        position_interpolation=options.position_interpolation,
        dtype=options.dtype,
        local_files_only=options.local_files_only,
        output_loading_info=True,
    )
    if info["missing_keys"]:
        raise ValueError(
            f"{options.source} lacks {count_of(len(info['missing_keys']), 'parameter')} of {name}, "
            f"which would be random: {', '.join(sorted(info['missing_keys'])[:8])}; choose another --task "
            f"({', '.join(TASKS)})"
        )
    processor = converted_processor(options, model.config)
    model.save_pretrained(options.target)
    if processor is None:
        note = "the preprocessing is not known, so no image processor was written; pass --processor to write one"
        print(f"{options.source}: {note}", file=sys.stderr)
    else:
        with writing("the image processor", options.target):
            processor.save_pretrained(options.target)
    print(f"{options.target}: {name}, {model.num_parameters():,} parameters, {model.dtype}")
    return ExitCode.DONE


def load(options: ModelOptions, class_name: str) -> tuple[Any, Any]:
    """Load the model `class_name` and the image processor of the checkpoint `options.model`."""
    import beit_fast

    model = getattr(beit_fast, class_name).from_pretrained(
        options.model,
        attn_implementation=options.attn,
        dtype=options.dtype,
        device=usable_device(options.device),
        local_files_only=options.local_files_only,
    )
    return model, processor_of(options, model.config)


def read_image(path: str) -> Any:
    """Read an image file as RGB bytes `[3, height, width]`.

    The EXIF orientation is applied.
    """
    from ..image_processing.inputs import read_images

    return next(iter(read_images([path], convert_rgb=True, input_data_format=None)))


def batches_of(paths: Sequence[str], size: int) -> Iterator[tuple[list[str], list[Any], list[dict[str, str]]]]:
    """Read images in batches of `size`.

    Yields:
        The paths and the images that could be read, and the path and reason of each that could not.
    """
    for start in range(0, len(paths), size):
        names, images, unreadable = [], [], []
        for path in paths[start : start + size]:
            try:
                images.append(read_image(path))
                names.append(path)
            except (OSError, ValueError) as error:
                unreadable.append({"image": path, "reason": unreadable_reason(error, Path(path))})
        yield names, images, unreadable


def top_classes(logits: Tensor, id2label: dict[int, str], count: int) -> list[dict[str, Any]]:
    """The `count` most probable classes of logits `[num_labels]`, most probable first."""
    probabilities = logits.float().softmax(-1)
    values, indices = probabilities.topk(min(count, probabilities.numel()))
    return [
        {"index": index, "label": id2label.get(index, str(index)), "probability": value}
        for index, value in zip(indices.tolist(), values.tolist(), strict=True)
    ]


def class_shares(classes: Tensor, id2label: dict[int, str]) -> list[dict[str, Any]]:
    """The share of the pixels of each class, largest first."""
    indices, counts = classes.unique(return_counts=True)
    shares = [
        {"index": index, "label": id2label.get(index, str(index)), "share": count / classes.numel()}
        for index, count in zip(indices.tolist(), counts.tolist(), strict=True)
    ]
    return sorted(shares, key=lambda share: -share["share"])


def overlay(photograph: Any, classes: Tensor, count: int, opacity: float) -> Any:
    """Tint every pixel of the photograph by the color of its class."""
    from PIL import Image

    palette = torch.tensor([class_color(index) for index in range(count)], dtype=torch.float32)
    tint = Image.fromarray(palette[classes].mul(255).round().to(torch.uint8).numpy())
    return Image.blend(photograph, tint, opacity)


def class_color(index: int) -> tuple[float, float, float]:
    """The color of a class: the hues of consecutive classes are a golden angle apart."""
    return colorsys.hsv_to_rgb((index * 0.6180339887) % 1.0, 0.85, 1.0 - 0.25 * (index // 8 % 3))


def _save_picture(picture: Any, path: Path) -> None:
    with writing("the picture", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as unfinished:
            picture.save(unfinished)


def _architecture_of(source: str) -> str:
    from ..configuration.beit_config import BeitConfig

    config = Path(source, "config.json")
    named = BeitConfig.from_pretrained(source).architectures if config.exists() else None
    known = [name for name in named or [] if name in TASKS.values()]
    if not known:
        raise ValueError(
            f"the task of {source} cannot be inferred from its config.json; pass --task (one of {', '.join(TASKS)})"
        )
    return known[0]


def _classification_lines(results: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for result in results:
        lines.append(result["image"])
        lines += [
            f"{100 * entry['probability']:7.2f} %  {entry['index']:5d}  {entry['label']}" for entry in result["classes"]
        ]
    return lines


def _report(
    options: ModelOptions, model: Any, facts: dict[str, Any], failures: list[dict[str, str]], lines: list[str]
) -> None:
    report = model.attention_report()
    kernel = report.kernel if report.has_run else None
    if options.json:
        print(json.dumps({"model": options.model, "kernel": kernel, **facts, "failures": failures}, indent=1))
    else:
        print("\n".join([*lines, *([f"attention: {kernel}"] if kernel else [])]))
    for failure in failures:
        print(f"failed: {failure['image']}: {failure['reason']}", file=sys.stderr)
