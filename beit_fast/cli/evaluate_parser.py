"""The parser of `beit-fast eval`; its values are checked by `EvaluateOptions`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .training_parsers import add_labeled_data


def add_eval(commands: Any, add_model_options: Callable[[argparse.ArgumentParser], Any]) -> None:
    """Add the parser of `beit-fast eval`."""
    parser = commands.add_parser(
        "eval",
        help="measure accuracy, mean IoU, k-NN and linear probe of a checkpoint",
        description="Evaluate a checkpoint on labeled images: top-1 and top-5, or mean IoU of segmentation, and k-NN "
        "and linear probe on its features. `torchrun --nproc-per-node N -m beit_fast eval ...` shares the images.",
    )
    add_labeled_data(parser)
    parser.add_argument(
        "--task",
        choices=("classification", "segmentation", "features"),
        help="what to evaluate (default: by the checkpoint)",
    )
    parser.add_argument("--knn", type=Path, metavar="TRAIN_DATA", help="k-NN on features of these images")
    parser.add_argument("--linear-probe", type=Path, metavar="TRAIN_DATA", help="fit a linear probe to these images")
    parser.add_argument(
        "--classes-by-order", action="store_true", help="the sorted classes of DATA are the ids of the checkpoint"
    )
    parser.add_argument(
        "--pooling", choices=("patches", "cls"), default="patches", help="mean of the patch tokens, or CLS"
    )
    parser.add_argument("--layer", type=int, help="block whose output gives the features (default: the last)")
    parser.add_argument("--k", type=int, default=20, help="neighbors of k-NN (default: 20)")
    parser.add_argument(
        "--temperature", type=float, default=0.07, help="temperature of the votes of k-NN (default: 0.07)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the images that the linear probe holds out (default: 0)"
    )
    parser.add_argument(
        "--reduce-labels",
        action=argparse.BooleanOptionalAction,
        help="segmentation: subtract 1 from ids, 0 is ignored (default: as the image processor)",
    )
    parser.add_argument("--ignore-index", type=int, help="segmentation: the ignored id (default: the checkpoint's)")
    parser.add_argument("--batch-size", type=int, default=32, help="images in one forward (default: 32)")
    parser.add_argument("--num-workers", type=int, default=2, help="processes that read images (default: 2)")
    add_model_options(parser)
