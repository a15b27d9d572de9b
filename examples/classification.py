"""Classify images with a checkpoint, as it is and optimized for inference.

python examples/classification.py [IMAGE ...] [--model FOLDER_OR_ID]

Without arguments, the digits model beside this script classifies twenty held-out handwritten digits.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from beit_fast import BeitForImageClassification, BeitImageProcessor, optimize_for_inference

DIGITS = Path(__file__).parent / "digits"
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def main(arguments: list[str] | None = None) -> int:
    """Print a line for each image, and return the exit code. The optimized model's difference is printed too."""
    parser = argparse.ArgumentParser(description="Classify images with BEiT.")
    parser.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="default: the digits")
    parser.add_argument("--model", default=str(DIGITS), help="a checkpoint for classification (default: the digits')")
    options = parser.parse_args(arguments)
    images = options.images or sorted((DIGITS / "images").glob("*.png"))

    model, info = BeitForImageClassification.from_pretrained(
        options.model, attn_implementation="triton", output_loading_info=True
    )
    if info["missing_keys"]:
        parser.error(f"{options.model} lacks {', '.join(info['missing_keys'])}: these would be random")
    if model.config.problem_type not in (None, "single_label_classification") or model.config.num_labels == 1:
        parser.error(f"{options.model} has no classes that exclude each other, so softmax is not its probability")
    processor = BeitImageProcessor.from_pretrained(options.model)
    pixels = processor(images, return_tensors="pt")["pixel_values"]  # [B, 3, H, W]
    with torch.inference_mode():
        logits = model(pixels).logits  # [B, num_labels]

    probabilities, classes = logits.softmax(-1).max(-1)
    names = [model.config.id2label[index] for index in classes.tolist()]
    for image, name, probability in zip(images, names, probabilities.tolist(), strict=True):
        print(f"{image.name:16}{name:24}{100 * probability:6.2f} %")
    if not options.images and options.model == str(DIGITS):
        right = sum(name == DIGIT_NAMES[int(image.name[0])] for image, name in zip(images, names, strict=True))
        print(f"{right} of {len(images)} right")
    print(f"attention: {model.attention_report().kernel}")

    fast = optimize_for_inference(model, example=pixels)
    again = fast(pixels).logits
    print(fast.inference_report())
    print(f"relative difference of its logits: {((again - logits).norm() / logits.norm()).item():.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
