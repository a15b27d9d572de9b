"""The command `beit-fast`, and `python -m beit_fast`, which is the same."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..utils.names import ATTENTION_IMPLEMENTATIONS, POSITION_INTERPOLATIONS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code is 0 done, 1 some images failed, 2 refused (argparse exits by itself)."""
    options = _parser().parse_args(arguments)
    return options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="beit-fast", description="BEiT with its position bias inside the attention kernels."
    )
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    info = commands.add_parser("info", help="versions, devices, and which attention kernel serves each of them")
    info.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    info.set_defaults(run=_command("info", module="info"))
    _add_classify(commands)
    _add_segment(commands)
    _add_predict(commands)
    _add_convert(commands)
    return parser


def _add_classify(commands: Any) -> None:
    parser = commands.add_parser("classify", help="the most probable classes of images")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--top", type=_positive, default=5, help="classes to print for each image (default: 5)")
    parser.add_argument("--batch-size", type=_positive, default=8, help="images in one forward (default: 8)")
    _add_model_options(parser)
    parser.set_defaults(run=_command("classify"))


def _add_segment(commands: Any) -> None:
    parser = commands.add_parser("segment", help="the class of every pixel of an image, drawn over it")
    parser.add_argument("image", metavar="IMAGE", help="an image file")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG", help="the picture to write")
    parser.add_argument("--labels", type=Path, metavar="PNG", help="also write the classes as a 16-bit grey picture")
    parser.add_argument("--opacity", type=_fraction, default=0.5, help="of the colours, 0 to 1 (default: 0.5)")
    _add_model_options(parser)
    parser.set_defaults(run=_command("segment"))


def _add_predict(commands: Any) -> None:
    parser = commands.add_parser(
        "predict",
        help="the classes or features of all images of a folder or list, alone or under torchrun",
        description="Predict all images of a folder or list. What is done is kept in OUT.run: after a kill the same "
        "command goes on. `torchrun --nproc-per-node N -m beit_fast predict ...` shares the images among N processes.",
    )
    parser.add_argument("dataset", metavar="DATASET", help="a folder, or a text file with one path a line")
    parser.add_argument("out", type=Path, metavar="OUT", help="the .jsonl or .parquet file to write")
    parser.add_argument("--format", choices=("jsonl", "parquet"), help="of OUT (default: as its name ends)")
    outputs = parser.add_mutually_exclusive_group()
    outputs.add_argument("--top", type=_positive, default=5, help="most probable classes to record (default: 5)")
    outputs.add_argument("--logits", action="store_true", help="record the logits of all classes instead")
    outputs.add_argument("--features", action="store_true", help="record the pooled features instead; needs no head")
    parser.add_argument("--batch-size", type=_positive, default=32, help="images in one forward (default: 32)")
    parser.add_argument("--workers", type=_positive, help="threads that read images (default: one a CPU, at most 8)")
    parser.add_argument("--optimize", action="store_true", help="fold and pack the weights, see optimize_for_inference")
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument("--overwrite", action="store_true", help="begin anew; an OUT that exists is replaced at the end")
    begin.add_argument("--retry-failed", action="store_true", help="do the batches again in which an image failed")
    _add_model_options(parser)
    parser.set_defaults(run=_command("predict", module="predict.command"))


def _add_convert(commands: Any) -> None:
    from .commands import TASKS

    parser = commands.add_parser(
        "convert", help="rewrite a checkpoint of Transformers, timm, unilm or mmseg for the hub"
    )
    parser.add_argument("source", metavar="SRC", help="a folder, a file, or a name on the hub")
    parser.add_argument("target", type=Path, metavar="DST", help="the folder to write")
    parser.add_argument("--task", choices=TASKS, help="the model it holds (default: what its config.json says)")
    parser.add_argument("--image-size", type=_size, metavar="N or HxW", help="resize positions for this image size")
    parser.add_argument("--position-interpolation", choices=POSITION_INTERPOLATIONS, default="bilinear")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: the checkpoint's)")
    parser.add_argument("--local-files-only", action="store_true", help="never ask the network")
    parser.set_defaults(run=_command("convert"))


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a checkpoint: a folder, or a name on the hub")
    parser.add_argument("--attn", choices=ATTENTION_IMPLEMENTATIONS, help="attention (default: by device and dtype)")
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: the checkpoint's)")
    parser.add_argument("--local-files-only", action="store_true", help="never ask the network")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def _command(name: str, module: str = "commands") -> Callable[[argparse.Namespace], int]:
    """The command's function, imported when it is called: `info` needs neither numpy nor a model."""

    def run(options: argparse.Namespace) -> int:
        return getattr(importlib.import_module(f".{module}", __package__), name)(options)

    return run


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def _size(text: str) -> int | tuple[int, int]:
    sides = [_positive(side) for side in text.lower().split("x")]
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"{text} is neither a number nor HEIGHTxWIDTH")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])
