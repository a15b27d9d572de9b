"""The command `beit-fast`, also run as `python -m beit_fast`."""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from ..utils.names import ATTENTION_IMPLEMENTATIONS, POSITION_INTERPOLATIONS, dtype_name
from ..utils.paths import as_path
from ..utils.version import __version__
from .evaluate_parser import add_eval
from .finetune_parser import add_finetune
from .options import (
    TASKS,
    ClassifyOptions,
    ConvertOptions,
    ExitCode,
    Format,
    InfoOptions,
    PredictOptions,
    SegmentOptions,
    SelftestOptions,
    TuneOptions,
)
from .process import run
from .training_parsers import add_pretrain

# Modules are imported when their command runs: `info` needs neither NumPy nor a model.
_COMMANDS: dict[str, tuple[str, type]] = {
    "info": (".info", InfoOptions),
    "classify": (".commands", ClassifyOptions),
    "segment": (".segment", SegmentOptions),
    "predict": (".predict.command", PredictOptions),
    "convert": (".commands", ConvertOptions),
    "selftest": (".selftest", SelftestOptions),
    "tune": (".tune", TuneOptions),
    "pretrain": (".training", dict),
    "finetune": (".training", dict),
    "eval": (".evaluate", dict),
}
_FUNCTIONS = {"eval": "evaluate"}  # `eval` is a builtin


def main(arguments: Sequence[str] | None = None, prepare: Callable[[], object] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The command line without the program, or None for `sys.argv[1:]`.
        prepare: Called before the modules of the command are imported, which help and errors do not need.

    Returns:
        The exit code; bad input is one message on stderr and `ExitCode.ERROR`, and Ctrl-C one and
        `ExitCode.INTERRUPTED`. Without arguments the help is printed.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    return run(" ".join(["beit-fast", *given[:1]]), lambda: _run(given, prepare))


def _run(arguments: Sequence[str], prepare: Callable[[], object] | None) -> int:
    parser = _parser()
    if not arguments:
        parser.print_help()
        return ExitCode.DONE
    fields = vars(parser.parse_args(arguments))
    name = fields.pop("command")
    if prepare is not None:
        prepare()
    module, options_class = _COMMANDS[name]
    command = getattr(importlib.import_module(module, __package__), _FUNCTIONS.get(name, name))
    return command(options_class(**fields))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="beit-fast", description="BEiT with its relative position bias inside the attention kernels."
    )
    parser.add_argument("--version", action="version", version=f"beit_fast {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    info = commands.add_parser(
        "info",
        help="print versions, devices, and the kernels that are available",
        description="Print versions, devices, native libraries and environment variables, and for each kernel whether "
        "it is available or every reason why it is not.",
    )
    info.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    _add_classify(commands)
    _add_segment(commands)
    _add_predict(commands)
    _add_convert(commands)
    _add_selftest(commands)
    _add_tune(commands)
    add_pretrain(commands)
    add_finetune(commands)
    add_eval(commands, _add_model_options)
    return parser


def _add_classify(commands: Any) -> None:
    parser = commands.add_parser(
        "classify",
        help="print the most probable classes of images",
        description="Print the most probable classes of each image, with their probabilities.",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files; for a folder: beit-fast predict")
    parser.add_argument("--top", type=_positive, default=5, help="classes to print for each image (default: 5)")
    parser.add_argument("--batch-size", type=_positive, default=8, help="images in one forward (default: 8)")
    form = _add_model_options(parser)
    form.add_argument("--csv", action="store_true", help="print CSV instead of text: image, rank, index, label, score")


def _add_segment(commands: Any) -> None:
    parser = commands.add_parser(
        "segment",
        help="draw the class of every pixel over images",
        description="Draw the class of every pixel in color over images, with a legend, and print the share and color "
        "of each class.",
    )
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="an image file, several, or folders of images with their subfolders"
    )
    parser.add_argument(
        "--out",
        type=_path,
        required=True,
        metavar="PNG",
        help="the picture to write, of any suffix that Pillow writes in color; a folder of NAME.png if there are "
        "several images or a folder",
    )
    parser.add_argument(
        "--labels",
        type=_path,
        metavar="PNG",
        help="also write the classes as 16-bit gray, .png or .tiff; another folder if --out is a folder",
    )
    parser.add_argument(
        "--no-legend",
        action="store_false",
        dest="legend",
        help="draw no legend, so that the picture has the size of the image",
    )
    parser.add_argument(
        "--opacity", type=_fraction, default=0.5, help="opacity of the colors over the image, 0 to 1 (default: 0.5)"
    )
    _add_model_options(parser)


def _add_predict(commands: Any) -> None:
    parser = commands.add_parser(
        "predict",
        help="write the classes or features of all images of a folder or list, also under torchrun",
        description="Predict all images of a folder or list. Progress is kept in OUT.run: rerun the same command to "
        "resume, but without --overwrite. A complete run leaves a manifest there, and its batches if an image failed; "
        "remove OUT.run with OUT. `torchrun --nproc-per-node N -m beit_fast predict ...` shares the images "
        "among N processes.",
    )
    dataset = "a folder, or a text file with one path per line; each image once, sorted by path"
    parser.add_argument("dataset", metavar="DATASET", help=dataset)
    parser.add_argument("out", type=_path, metavar="OUT", help="the .jsonl or .parquet file to write")
    parser.add_argument("--format", choices=get_args(Format), help="format of OUT (default: by its suffix)")
    parser.set_defaults(output="classes", start="resume")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--top", type=_positive, default=5, help="most probable classes to record (default: 5)")
    output.add_argument(
        "--logits", action="store_const", dest="output", const="logits", help="record the logits of all classes"
    )
    output.add_argument(
        "--features",
        action="store_const",
        dest="output",
        const="features",
        help="record the pooled features; a classifier is not needed",
    )
    parser.add_argument("--batch-size", type=_positive, default=32, help="images in one forward (default: 32)")
    parser.add_argument(
        "--workers",
        type=_not_negative,
        help="processes that read images (default: one per CPU, at most 8; 0: read in the main process)",
    )
    parser.add_argument("--optimize", action="store_true", help="fold and pack the weights (optimize_for_inference)")
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--overwrite",
        action="store_const",
        dest="start",
        const="overwrite",
        help="start from the beginning, also when rerun; an existing OUT is replaced at the end",
    )
    start.add_argument(
        "--retry-failed",
        action="store_const",
        dest="start",
        const="retry-failed",
        help="run the batches with failed images again, with all of their images",
    )
    _add_model_options(parser)


def _add_convert(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        help="rewrite a checkpoint of Transformers, timm, unilm or mmseg",
        description="Rewrite a checkpoint of Transformers, timm, unilm or mmsegmentation in the layout of the hub: "
        "config.json, safetensors and preprocessor_config.json.",
    )
    parser.add_argument("source", metavar="SRC", help="a folder, a file, or a name on the hub")
    parser.add_argument("target", type=_path, metavar="DST", help="the folder to write")
    parser.add_argument("--task", choices=TASKS, help="the model in the checkpoint (default: from its config.json)")
    parser.add_argument("--processor", metavar="SOURCE", help=_PROCESSOR_HELP)
    parser.add_argument("--image-size", type=_size, metavar="N or HxW", help="resize positions for this image size")
    parser.add_argument(
        "--position-interpolation",
        choices=POSITION_INTERPOLATIONS,
        default="bilinear",
        help="how --image-size resizes: bilinear as Transformers, geometric as timm and unilm (default: bilinear)",
    )
    parser.add_argument("--dtype", type=dtype_name, help="float32, bfloat16 or float16 (default: the checkpoint's)")
    parser.add_argument("--local-files-only", action="store_true", help="never use the network")


def _add_selftest(commands: Any) -> None:
    parser = commands.add_parser(
        "selftest",
        help="check every kernel of this machine against fp64, and time it",
        description="Check every kernel, dtype and bias layout of this machine against fp64, and time it.",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if available, else cpu)")
    parser.add_argument(
        "--include-refused",
        action="store_true",
        help="also run the kernels of a GPU and Triton that are refused for faults of the compiler; they are not timed",
    )
    _add_measurement_options(parser)


def _add_tune(commands: Any) -> None:
    parser = commands.add_parser(
        "tune",
        help="measure the tiles of the GPU kernels, and use the fastest from then on",
        description="Measure candidate tiles of each kernel on a GPU. The fastest are written to the user's cache and "
        "used by every later launch on this GPU, with this Triton and this version. BEIT_FAST_TUNED=0 ignores them.",
    )
    parser.add_argument(
        "--image-size",
        type=_size,
        action="append",
        default=[],
        metavar="N or HxW",
        help="image size to tune for; pass it again for more sizes (default: 224 and 384, or the model's)",
    )
    parser.add_argument(
        "--batch",
        type=_positive,
        action="append",
        default=[],
        metavar="N",
        help="images in a batch; pass it again for more (default: 16; without sizes 64 of 224 pixels, 16 and 1 of 384)",
    )
    parser.add_argument(
        "--dtype",
        type=dtype_name,
        choices=_HALF_AND_SINGLE,
        action="append",
        default=[],
        help="dtype to tune for; pass it again for more dtypes (default: bfloat16)",
    )
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--model", help="take sizes from a checkpoint: a folder, or a name on the hub")
    sizes.add_argument("--head-dim", type=_positive, metavar="D", help="dimension of each of 12 heads (default: 64)")
    parser.add_argument("--device", help="cuda, cuda:1 ... (default: cuda)")
    parser.add_argument("--budget", type=_seconds, metavar="SECONDS", help="start no other kernel after this time")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--forget", action="store_true", help="delete the tuned tiles of the GPU, of all versions")
    action.add_argument("--show", action="store_true", help="print the tuned tiles of the GPU")
    parser.add_argument("--local-files-only", action="store_true", help="never use the network")
    _add_measurement_options(parser)


_PROCESSOR_HELP = "image processor: a folder, a preprocessor_config.json, or a hub name (default: the checkpoint's)"
_HALF_AND_SINGLE = ("bfloat16", "float16", "float32")


def _add_measurement_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--rows", type=_path, metavar="FILE.jsonl", help="write each row here once it is measured")


def _add_model_options(parser: argparse.ArgumentParser) -> Any:
    """Add the options of `ModelOptions`.

    Returns:
        The group of the options that choose what is printed.
    """
    parser.add_argument("--model", required=True, help="a checkpoint: a folder, a file, or a name on the hub")
    parser.add_argument("--processor", metavar="SOURCE", help=_PROCESSOR_HELP)
    parser.add_argument("--attn", choices=ATTENTION_IMPLEMENTATIONS, help="attention (default: by device and dtype)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if available, else cpu)")
    parser.add_argument("--dtype", type=dtype_name, help="float32, bfloat16 or float16 (default: the checkpoint's)")
    parser.add_argument("--local-files-only", action="store_true", help="never use the network")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return form


def _positive(text: str) -> int:
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _not_negative(text: str) -> int:
    value = _whole(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _fraction(text: str) -> float:
    value = _number(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def _seconds(text: str) -> float:
    value = _number(text)
    if not 0.0 <= value < math.inf:  # NaN fails both
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds, 0 or more")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _path(text: str) -> Path:
    try:
        return as_path("the file or folder", text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _size(text: str) -> int | tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise argparse.ArgumentTypeError(f"{text} is not a number or HEIGHTxWIDTH")
    numbers = [_positive(side) for side in sides]
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])
