"""Accelerate an existing model of Transformers in one line, and restore it.

python examples/accelerate_transformers.py [--model FOLDER_OR_ID] [--image-size 640] [--dtype float32]

Without --model the weights are random: four layers as wide as BEiT-base's. It prints the time of a forward before and
after, and the difference of the outputs.
"""

from __future__ import annotations

import argparse
import sys

import torch
from transformers import BeitConfig, BeitForImageClassification

from beit_fast.integrations.transformers import accelerate, restore
from beit_fast.testing import latency


def main(arguments: list[str] | None = None) -> int:
    """Print the comparison and return the exit code."""
    parser = argparse.ArgumentParser(description="Accelerate Transformers' BEiT.")
    parser.add_argument("--model", help="a checkpoint for classification (default: random weights)")
    parser.add_argument("--image-size", type=int, default=640, help="of the square image, in pixels (default: 640)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    if options.model is None:
        config = BeitConfig(num_hidden_layers=4, image_size=options.image_size, use_relative_position_bias=True)
        model = BeitForImageClassification(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias_table"):
                torch.nn.init.normal_(parameter)
    else:
        model = BeitForImageClassification.from_pretrained(options.model)
    dtype = getattr(torch, options.dtype)
    model = model.to(dtype).eval()
    pixels = torch.randn(1, 3, options.image_size, options.image_size, dtype=dtype)

    with torch.inference_mode():
        before, theirs = model(pixels).logits, median_of(model, pixels)
        print(accelerate(model))
        after, ours = model(pixels).logits, median_of(model, pixels)
        restore(model)
        again = model(pixels).logits
    difference = (after.double() - before.double()).norm() / before.double().norm()
    print(f"before {theirs:.3f} s, accelerated {ours:.3f} s: {theirs / ours:.1f} times as fast")
    print(f"relative difference of its logits: {difference.item():.1e}")
    print(f"restored: logits {'the same to the bit' if torch.equal(again, before) else 'DIFFER'}")
    return 0


def median_of(model: BeitForImageClassification, pixels: torch.Tensor) -> float:
    """Median seconds of a forward."""
    return latency(lambda: model(pixels), repeats=5, warmup=1).median


if __name__ == "__main__":
    sys.exit(main())
