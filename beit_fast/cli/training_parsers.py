"""Parsers of the training commands; their values are checked by the options of the recipes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..utils.names import ATTENTION_IMPLEMENTATIONS
from .unilm_parser import add_flags


class Option(NamedTuple):
    """One option of a training command.

    Attributes:
        name: The field of the options class; the flag has hyphens.
        kind: The type of the value; None for a switch.
        help: What it does, without the default.
        default: The default as help shows it. A test compares it with the options class.
        metavar: The name of the value in help, or None.
        values: How many values it takes, or None for one.
        choices: The values that it takes, or None.
    """

    name: str
    kind: Callable[[str], Any] | None
    help: str
    default: str = ""
    metavar: str | None = None
    values: int | None = None
    choices: tuple[str, ...] | None = None


ENGINE_OPTIONS = (
    Option("overwrite", None, "delete the run in OUT and start from the beginning"),
    Option("seed", int, "seed of all random numbers", "0"),
    Option("max_steps", int, "end after so many steps; the schedule still has all epochs"),
    Option("batch_size", int, "images of one process in one forward", "32"),
    Option("gradient_accumulation", int, "forwards before each step", "1"),
    Option("min_lr", float, "learning rate of the last step"),
    Option("warmup_lr", float, "learning rate of the first step of the warmup", "0.0"),
    Option("warmup_steps", int, "steps of linear warmup, instead of --warmup-epochs"),
    Option("weight_decay", float, "weight decay of matrices", "0.05"),
    Option("weight_decay_end", float, "weight decay of the last step, by a cosine"),
    Option("opt_eps", float, "epsilon of AdamW", "1e-08"),
    Option("precision", str, "bfloat16 computes under autocast", "float32", choices=("float32", "bfloat16")),
    Option("compile", None, "compile the model by torch.compile"),
    Option("gradient_checkpointing", None, "recompute blocks in the backward pass"),
    Option("fsdp", None, "shard weights and optimizer among the processes of torchrun (FSDP2)"),
    Option("device", str, "auto is CUDA if it is available", "auto", choices=("auto", "cpu", "cuda")),
    Option("num_workers", int, "processes that read images, for each training process", "2"),
    Option("save_every_epochs", int, "epochs between checkpoints", "1"),
    Option("save_every_steps", int, "also write a checkpoint after so many steps"),
    Option("keep_checkpoints", int, "checkpoints to keep", "2"),
    Option("log_every", int, "steps between rows of the log", "10"),
    Option("tensorboard", None, "also write TensorBoard's files to OUT/tensorboard"),
)
"""Options of both training commands."""

PRETRAIN_OPTIONS = (
    Option("model", str, "base, large, or a configuration: a folder, a JSON file or a name on the hub", "base"),
    Option("init_from", str, "a checkpoint to continue from", metavar="CHECKPOINT"),
    Option(
        "tokenizer",
        str,
        "patch_colors to fit one on the images; a folder or name on the hub; DALL-E's encoder.pkl; VQ-KD's .pth",
        "patch_colors",
    ),
    Option("vocab_size", int, "visual tokens of a tokenizer that is fitted", "512"),
    Option("input_size", int, "size of the model's images", "224"),
    Option("second_input_size", int, "size of the tokenizer's images (default: one token to each patch)"),
    Option("num_mask_patches", int, "patches to mask (default: 75 of 14x14, and in proportion)"),
    Option("max_mask_patches_per_block", int, "the largest block (default: --num-mask-patches)"),
    Option("min_mask_patches_per_block", int, "the smallest block (default: 16 of 14x14, and in proportion)"),
    Option("layer_scale_init_value", float, "initial layer scale (default: 0.1, or that of a given configuration)"),
    Option("drop_path", float, "drop path of the last block (default: 0.1, or that of a given configuration)"),
    Option("train_interpolation", str, "filter of the model's images", "bicubic"),
    Option("second_interpolation", str, "filter of the tokenizer's images", "lanczos"),
    Option("color_jitter", float, "largest change of colors"),
    Option("crop_scale", float, "range of the area of the crop", "0.08 1.0", metavar="X", values=2),
    Option("hflip", float, "probability of a horizontal flip", "0.5"),
    Option("epochs", int, "passes over the images", "300"),
    Option("lr", float, "peak learning rate (default: 1.5e-3 for 2048 images a step, and in proportion)"),
    Option("warmup_epochs", float, "epochs of linear warmup", "10.0"),
    Option("opt_betas", float, "betas of AdamW", "0.9 0.98", metavar="X", values=2),
    Option("clip_grad", float, "largest norm of the gradients", "3.0"),
    Option("model_ema_decay", float, "decay of an average of the weights, which is also saved"),
    Option("image_mean", float, "mean of the normalization", values=3, metavar="X", default="0.5 0.5 0.5"),
    Option("image_std", float, "standard deviation of the normalization", values=3, metavar="X", default="0.5 0.5 0.5"),
)
"""Options of `beit-fast pretrain`."""


def add_pretrain(commands: Any) -> None:
    """Add the parser of `beit-fast pretrain`."""
    parser = commands.add_parser(
        "pretrain",
        help="pre-train BEiT on a folder of images by masked image modeling",
        description="Pre-train BEiT: predict the visual tokens of masked patches. OUT gets model/, checkpoints/, "
        "tokenizer/, log.jsonl and run.json. Rerun the same command to resume. `torchrun --nproc-per-node N -m "
        "beit_fast pretrain ...` trains in N processes. The flags of unilm's run_beit_pretraining.py are accepted.",
    )
    parser.add_argument("data", type=Path, metavar="DATA", help="a folder of images with its subfolders, or Parquet")
    add_training_arguments(parser, PRETRAIN_OPTIONS)
    add_flags(parser, "pretrain")


def add_labeled_data(parser: argparse.ArgumentParser) -> None:
    """Add DATA of a command that takes labeled images."""
    parser.add_argument(
        "data",
        type=Path,
        metavar="DATA",
        help="a folder with one folder for each class; for segmentation with images/ and annotations/; or Parquet",
    )


def add_training_arguments(parser: argparse.ArgumentParser, options: tuple[Option, ...]) -> None:
    """Add OUT, the options of a command, and the common ones.

    Options that are not given are not among the parsed fields, so that the defaults of the recipe hold.
    """
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder of the run")
    for option in (*options, *ENGINE_OPTIONS):
        flag = "--" + option.name.replace("_", "-")
        if option.kind is None:
            parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=option.help)
            continue
        text = f"{option.help} (default: {option.default})" if option.default else option.help
        parser.add_argument(
            flag,
            type=option.kind,
            nargs=option.values,
            metavar=option.metavar or (None if option.choices else "N" if option.kind is int else "X"),
            choices=option.choices,
            default=argparse.SUPPRESS,
            help=text,
        )
    parser.add_argument(
        "--imagenet-default-mean-and-std",
        action="store_true",
        default=argparse.SUPPRESS,
        help="normalize by the mean and standard deviation of ImageNet",
    )
    parser.add_argument(
        "--attn",
        dest="attn_implementation",
        choices=ATTENTION_IMPLEMENTATIONS,
        default=argparse.SUPPRESS,
        help="attention implementation (default: by device and dtype)",
    )
