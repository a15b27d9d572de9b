"""The parser of `beit-fast finetune`; its values are checked by `FinetuneOptions`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .training_parsers import Option, add_labeled_data, add_training_arguments
from .unilm_parser import add_flags

DEFAULT_EMA_DECAY = 0.9999
NO_POLICY = ("none", "null")
"""Values of `--aa` for no policy."""

FINETUNE_OPTIONS = (
    Option("task", str, "what to learn", "classification", choices=("classification", "segmentation")),
    Option("eval_data_path", Path, "images to evaluate on after each epoch, as DATA", metavar="FOLDER"),
    Option("nb_classes", int, "number of classes; for segmentation, unless --class-names has them"),
    Option("class_names", Path, "segmentation: a text file with one name a line", metavar="FILE"),
    Option("reduce_labels", None, "segmentation: subtract 1 from class ids; 0 is ignored"),
    Option("ignore_index", int, "segmentation: the class id without a loss", "255"),
    Option("input_size", int, "size of the model's images (default: that of the checkpoint)"),
    Option("drop_path", float, "drop path of the last block", "0.1"),
    Option("layer_decay", float, "factor of the learning rate from one layer to the one before it", "0.65"),
    Option("smoothing", float, "label smoothing", "0.1"),
    Option("mixup", float, "alpha of mixup; 0 turns it off", "0.8"),
    Option("cutmix", float, "alpha of CutMix; 0 turns it off", "1.0"),
    Option("mixup_prob", float, "probability of mixing", "1.0"),
    Option("mixup_switch_prob", float, "probability of CutMix rather than mixup", "0.5"),
    Option("mixup_mode", str, "what shares a draw", "batch", choices=("batch", "elem", "pair")),
    Option("aa", str, "RandAugment's policy by timm's name, or none", "rand-m9-mstd0.5-inc1", metavar="POLICY"),
    Option("color_jitter", float, "largest change of colors, without a policy; 0 changes none", "0.4"),
    Option("train_interpolation", str, "filter of resizing in training", "bicubic"),
    Option("reprob", float, "probability of erasing a rectangle", "0.25"),
    Option("remode", str, "what replaces its pixels", "pixel", choices=("const", "rand", "pixel")),
    Option("recount", int, "most rectangles of an image", "1"),
    Option("crop_scale", float, "range of the area of the crop", "0.08 1.0", metavar="X", values=2),
    Option("hflip", float, "probability of a horizontal flip", "0.5"),
    Option("crop_pct", float, "share of the image in evaluation (default: 0.875 below 384 pixels, and 1)"),
    Option("epochs", int, "passes over the images", "100"),
    Option("lr", float, "peak learning rate (default: 4e-3 for 1024 images a step, 3e-5 for 16 in segmentation)"),
    Option("warmup_epochs", float, "epochs of linear warmup", "20.0"),
    Option("opt_betas", float, "betas of AdamW", "0.9 0.999", metavar="X", values=2),
    Option("clip_grad", float, "largest norm of the gradients (default: any)"),
    Option("model_ema", None, f"also save an average of the weights, with --model-ema-decay {DEFAULT_EMA_DECAY}"),
    Option("model_ema_decay", float, "decay of the average of the weights, which is then saved"),
    Option("image_mean", float, "mean of the normalization (default: of the checkpoint)", metavar="X", values=3),
    Option("image_std", float, "standard deviation of it (default: of the checkpoint)", metavar="X", values=3),
)
"""Options of `beit-fast finetune`."""


def add_finetune(commands: Any) -> None:
    """Add the parser of `beit-fast finetune`."""
    parser = commands.add_parser(
        "finetune",
        help="fine-tune a checkpoint on labeled images",
        description="Fine-tune a pre-trained BEiT for classification or segmentation. OUT gets model/, checkpoints/, "
        "log.jsonl and run.json. Rerun the same command to resume. `torchrun --nproc-per-node N -m beit_fast finetune "
        "...` trains in N processes. The flags of unilm's run_class_finetuning.py are accepted.",
    )
    add_labeled_data(parser)
    parser.add_argument(
        "--model", required=True, metavar="CHECKPOINT", help="the checkpoint to start from: a folder, file or hub name"
    )
    add_training_arguments(parser, FINETUNE_OPTIONS)
    add_flags(parser, "finetune")
