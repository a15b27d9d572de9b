"""The commands `beit-fast classify` and `convert`."""

from __future__ import annotations

import sys
from pathlib import Path

from tqdm import tqdm

from ..checkpoint.files import find_checkpoint
from ..checkpoint.read_tensors import check_pickle_is_safe
from ..configuration.beit_config import BeitConfig
from ..utils.files import CONFIG_NAME, writing
from ..utils.hub import HubOptions
from .forward import CLASSIFIER, class_entries, load, load_complete, run_batch
from .images import batch_of, read_pixels
from .options import TASKS, ClassifyOptions, ConvertOptions, ExitCode
from .outputs import check_folder, check_keeps
from .processors import converted_processor
from .reports import ClassificationReport, report_failures, report_unreadable


def classify(options: ClassifyOptions) -> int:
    """Print the most probable classes of every image, batch by batch.

    Images that cannot be opened are named before the model is loaded. The result is the exit code.
    """
    errors = report_unreadable(options.images)
    size, count = options.batch_size, len(options.images)
    if len(errors) == len(set(options.images)):
        return report_failures(options, errors)
    model, processor = load(options, TASKS["image-classification"], CLASSIFIER)
    with (
        tqdm(total=count, unit="image", disable=None if count > 1 else True) as bar,
        ClassificationReport(options, model, bar) as report,
    ):
        for start in range(0, count, size):
            paths = options.images[start : start + size]
            batch = batch_of(errors.get(path) or read_pixels(processor, Path(path)) for path in paths)
            found = run_batch(model, batch, "classes")
            for index, path in enumerate(paths):
                row = found[index]
                if isinstance(row, str):
                    report.fail(path, row, is_printed=path in errors)
                else:
                    report.add(path, class_entries(row, model.config, options.top))
            bar.update(len(paths))
    return ExitCode.SOME_FAILED if report.failures else ExitCode.DONE


def convert(options: ConvertOptions) -> int:
    """Rewrite a checkpoint of any known format in the hub's layout.

    The image processor is written too. The result is the exit code.
    """
    check_folder("the checkpoint", options.target)
    source = Path(options.source)
    check_keeps([options.target], [source.parent if source.is_file() else source])
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
