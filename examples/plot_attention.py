"""Draw the relative position bias of a layer and what it attends to in an image.

python examples/plot_attention.py [IMAGE] [--model FOLDER_OR_ID] [--layer N] [--out attention.png]

Without arguments, the digits model beside this script reads a held-out handwritten digit. With
`--out docs/pictures/attention.png` it draws the picture of the documentation.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from matplotlib.figure import Figure

from beit_fast import ImageClassifier, plot_attention, plot_relative_position_bias

DIGITS = Path(__file__).parent / "digits"


def main(arguments: list[str] | None = None) -> int:
    """Write the picture, print the most probable class, and return the exit code."""
    parser = argparse.ArgumentParser(description="Draw the relative position bias and the attention of BEiT.")
    parser.add_argument("image", nargs="?", type=Path, default=DIGITS / "images" / "8_28.png", metavar="IMAGE")
    parser.add_argument("--model", default=str(DIGITS), help="a checkpoint for classification (default: the digits')")
    parser.add_argument("--layer", type=int, default=0, help="the index of the layer (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("attention.png"), help="the picture to write")
    options = parser.parse_args(arguments)
    try:
        classifier = ImageClassifier.from_pretrained(options.model)
        best = classifier(options.image, top=1)[0]
        pixels = classifier.processor(options.image, return_tensors="pt")["pixel_values"]
        figure = Figure(figsize=(10.5, 6.6), layout="constrained")
        above, below = figure.subfigures(2, 1, hspace=0.03)
        heads = range(min(4, classifier.model.config.num_attention_heads))
        plot_relative_position_bias(classifier.model, options.layer, heads, figure=above)
        plot_attention(classifier.model, pixels, options.layer, heads, figure=below)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=100)
    print(f"{options.image.name}: {best.label} ({best.score:.3f}); picture: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
