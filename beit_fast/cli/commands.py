"""The commands `beit-fast classify`, `segment` and `convert`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..checkpoint.files import find_checkpoint
from ..checkpoint.read_tensors import check_pickle_is_safe
from ..configuration.beit_config import BeitConfig
from ..utils.files import CONFIG_NAME, atomic_write, writing
from ..utils.hub import HubOptions
from .devices import usable_device
from .forward import CLASSIFIER, load_complete, run_batch, top_classes
from .images import group_by_size, read_pixels, unreadable_reason
from .options import TASKS, ClassifyOptions, ConvertOptions, ExitCode, ModelOptions, SegmentOptions
from .outputs import check_file, check_folder, check_keeps, class_format, color_format
from .overlay import class_shares, overlay
from .processors import converted_processor, processor_of
from .reports import ClassificationReport, kernel_of, report_kernel


def classify(options: ClassifyOptions) -> int:
    """Print the most probable classes of every image, batch by batch.

    The result is the exit code.
    """
    model, processor = load(options, TASKS["image-classification"], CLASSIFIER)
    size, count = options.batch_size, len(options.images)
    with (
        tqdm(total=count, unit="image", disable=None if count > 1 else True) as bar,
        ClassificationReport(options, model, bar) as report,
    ):
        for start in range(0, count, size):
            paths = options.images[start : start + size]
            batch = group_by_size(read_pixels(processor, Path(path)) for path in paths)
            found = run_batch(model, batch, "classes")
            for index, path in enumerate(paths):
                row = found[index]
                report.add(path, row if isinstance(row, str) else top_classes(row, model.config, options.top))
            bar.update(len(paths))
    return ExitCode.SOME_FAILED if report.failures else ExitCode.DONE


def segment(options: SegmentOptions) -> int:
    """Draw the classes over the image and print their shares.

    The result is the exit code.
    """
    from PIL import Image

    formats = _check_pictures(options)
    photograph = _read_photograph(options.image)
    model, processor = load(options, TASKS["semantic-segmentation"], "expected a checkpoint for semantic segmentation")
    pixels = processor([photograph], return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
    with torch.inference_mode():
        outputs = model(pixels)
    classes = processor.post_process_semantic_segmentation(outputs, [photograph.size[::-1]])[0].cpu()  # [height, width]
    pictures = [overlay(photograph, classes, model.config.num_labels, options.opacity)]
    if options.labels is not None:
        pictures.append(Image.fromarray(classes.to(torch.int32).numpy().astype("uint16")))
    _save_pictures([(path, picture, name) for (path, name), picture in zip(formats, pictures, strict=True)])
    shares = class_shares(classes, model.config.id2label)
    if options.json:
        facts = {"model": options.model, "kernel": kernel_of(model), "out": str(options.out), "classes": shares}
        print(json.dumps({**facts, "failures": []}, indent=1))
        return ExitCode.DONE
    for share in shares:
        print(f"{100 * share['share']:6.2f} %  {share['index']:4d}  {share['label']}")
    print(f"picture: {options.out}")
    report_kernel(model)
    return ExitCode.DONE


def _check_pictures(options: SegmentOptions) -> list[tuple[Path, str]]:
    """Check the files to write; return each with its format of Pillow."""
    formats = [(options.out, color_format(options.out))]
    if options.labels is not None:
        formats.append((options.labels, class_format(options.labels)))
        if options.labels.absolute() == options.out.absolute():
            raise ValueError(f"--out and --labels are the same file {str(options.out)!r} (expected two files)")
    for path, _ in formats:
        check_file("the picture", path)
        check_keeps(path, [Path(options.image)])
    return formats


def _read_photograph(path: str) -> Any:
    """Read an image file as an upright RGB image of Pillow."""
    from PIL import Image

    from ..image_processing.inputs import read_images

    try:
        pixels = next(iter(read_images(path, convert_rgb=True, input_data_format=None)))  # [3, height, width]
    except (OSError, ValueError) as error:
        raise OSError(f"{path!r} {unreadable_reason(error, Path(path))}") from error
    return Image.fromarray(torch.as_tensor(pixels).permute(1, 2, 0).contiguous().numpy())


def _save_pictures(pictures: Sequence[tuple[Path, Any, str]]) -> None:
    """Write all pictures, or none if one cannot be written."""
    with ExitStack() as stack:
        for path, picture, name in pictures:
            stack.enter_context(writing("the picture", path))
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(stack.enter_context(atomic_write(path)), format=name)


def convert(options: ConvertOptions) -> int:
    """Rewrite a checkpoint of any known format in the hub's layout.

    The image processor is written too. The result is the exit code.
    """
    check_folder("the checkpoint", options.target)
    hub = HubOptions(local_files_only=options.local_files_only)
    name = TASKS[options.task] if options.task else _architecture_of(options.source, hub)
    model = load_complete(
        name,
        options.source,
        f"expected another --task, one of {', '.join(TASKS)}",
        image_size=options.image_size,
        position_interpolation=options.position_interpolation,
        dtype=options.dtype,
        local_files_only=options.local_files_only,
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


def _architecture_of(source: str, hub: HubOptions) -> str:
    """Read the model class from the config.json of a checkpoint.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If the file is not a weights file, or the class is not known.
    """
    files = find_checkpoint(source, hub)
    for weights in files.weights:
        if weights.suffix != ".safetensors":
            check_pickle_is_safe(weights)
    named = None if files.config is None else BeitConfig.from_json_file(files.config).architectures
    known = [name for name in named or [] if name in TASKS.values()]
    if known:
        return known[0]
    reason = f"it has no {CONFIG_NAME}" if files.config is None else f"its {CONFIG_NAME} names {named or 'no model'}"
    raise ValueError(f"the task of {source} is not known: {reason}; pass --task (one of {', '.join(TASKS)})")
