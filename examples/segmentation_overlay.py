"""Draw the class of every pixel over a picture.

python examples/segmentation_overlay.py [--out overlay.png] [--model FOLDER_OR_ID --image PATH]

With --model, a checkpoint for semantic segmentation colors a photograph. Without it, the digits classifier beside this
script gets a new UPerNet head. The script trains it for some seconds to classify the ink of scikit-learn's handwritten
digits. Then it colors twenty held-out digits.
"""

from __future__ import annotations

import argparse
import colorsys
import sys
import warnings
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from train_digits import NAMES, Digits, augment, load_digits, shown_indices

from beit_fast import BeitForSemanticSegmentation, BeitImageProcessor

DIGITS = Path(__file__).parent / "digits"
STEPS, BATCH, RATE = 70, 16, 4e-3
TILE, COLUMNS, OPACITY = 120, 10, 0.6


def main(arguments: list[str] | None = None) -> int:
    """Write the picture, print the accuracy, and return the exit code."""
    parser = argparse.ArgumentParser(description="Segment with BEiT and draw the classes over the picture.")
    parser.add_argument("--out", type=Path, default=Path("overlay.png"), help="default: overlay.png")
    parser.add_argument(
        "--model", help="a checkpoint for semantic segmentation (default: trained from the digits model)"
    )
    parser.add_argument("--image", type=Path, help="the photograph for --model")
    parser.add_argument("--attn", choices=("eager", "sdpa", "triton"), default="triton", help="default: triton")
    options = parser.parse_args(arguments)
    if (options.model is None) != (options.image is None):
        parser.error("--model and --image go together")
    if options.model is not None:
        model, info = BeitForSemanticSegmentation.from_pretrained(
            options.model, attn_implementation=options.attn, output_loading_info=True
        )
        if info["missing_keys"]:
            parser.error(f"{options.model} lacks {', '.join(info['missing_keys'])}: these would be random")
        picture = color(model, BeitImageProcessor.from_pretrained(options.model), [Image.open(options.image)])[0]
    else:
        try:
            digits = load_digits(seed=0)
        except ImportError as error:
            parser.error(f"the digits come with scikit-learn: pip install scikit-learn ({error})")
        model = train(digits, options.attn)
        print(f"ink of {len(digits.held_out)} digits that were held out, in its own digit's class: "
              f"{ink_accuracy(model, digits):.1%}")  # fmt: skip
        picture = digit_sheet(model, digits)
    picture.save(options.out)
    print(f"attention: {model.attention_report().kernel}")
    print(f"picture: {options.out}, {picture.width} x {picture.height}")
    return 0


def train(digits: Digits, attn_implementation: str) -> BeitForSemanticSegmentation:
    """Train a new head on the digits classifier's trunk. The training split is the same."""
    torch.manual_seed(0)
    names = dict(enumerate(("background", *NAMES)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the head is new
        model = BeitForSemanticSegmentation.from_pretrained(
            DIGITS,
            attn_implementation=attn_implementation,
            id2label=names,
            out_indices=[1, 2, 3, 4],
            use_auxiliary_head=False,
            num_labels=len(names),
        )
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS)
    for _ in (bar := tqdm(range(STEPS), desc="training", unit="step", disable=None)):
        batch = digits.training[torch.randint(len(digits.training), (BATCH,))]
        pixels = augment(digits.pixels[batch])
        loss = model(pixels, labels=classes_of(pixels, digits.labels[batch])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def classes_of(pixels: Tensor, labels: Tensor) -> Tensor:
    """Classes `[B, H, W]` of digits `[B, 3, H, W]`: 0 for background, 1 + digit for ink."""
    return (pixels[:, 0] > 0) * (1 + labels[:, None, None])


@torch.inference_mode()
def ink_accuracy(model: BeitForSemanticSegmentation, digits: Digits) -> float:
    """The share of the held-out digits' ink that is classified correctly."""
    right = total = 0
    for batch in digits.held_out.split(60):
        pixels = digits.pixels[batch]
        wanted = classes_of(pixels, digits.labels[batch])
        logits = torch.nn.functional.interpolate(model(pixels).logits, size=wanted.shape[1:], mode="bilinear")
        ink = wanted > 0
        right += int((logits.argmax(1) == wanted)[ink].sum())
        total += int(ink.sum())
    return right / total


@torch.inference_mode()
def color(
    model: BeitForSemanticSegmentation,
    processor: BeitImageProcessor,
    pictures: list[Image.Image],
    background: int | None = None,
) -> list[Image.Image]:
    """Tint every pixel by its class, except those of the background."""
    pictures = [picture.convert("RGB") for picture in pictures]
    outputs = model(processor(pictures, return_tensors="pt")["pixel_values"])
    sizes = [(picture.height, picture.width) for picture in pictures]
    maps = processor.post_process_semantic_segmentation(outputs, sizes)  # [height, width] each
    hues = [(0.618 * index) % 1.0 for index in range(model.config.num_labels)]  # neighbors differ most
    palette = torch.tensor([colorsys.hsv_to_rgb(hue, 0.85, 1.0) for hue in hues]).mul(255).byte()
    colored = []
    for picture, classes in zip(pictures, maps, strict=True):
        tint = Image.fromarray(palette[classes].numpy())
        tinted = Image.blend(picture, tint, OPACITY)
        if background is not None:
            tinted = Image.composite(tinted, picture, Image.fromarray((classes != background).numpy()))
        colored.append(tinted)
    return colored


def digit_sheet(model: BeitForSemanticSegmentation, digits: Digits) -> Image.Image:
    """Two held-out digits of each class, one column per class."""
    images = [Image.fromarray(image).resize((TILE, TILE)) for image in digits.images[shown_indices(digits)]]
    tiles = color(model, BeitImageProcessor.from_pretrained(DIGITS), images, background=0)
    sheet = Image.new("RGB", (COLUMNS * TILE, len(tiles) // COLUMNS * TILE))
    for number, tile in enumerate(tiles):
        column, row = divmod(number, len(tiles) // COLUMNS)
        sheet.paste(tile, (column * TILE, row * TILE))
    return sheet


if __name__ == "__main__":
    sys.exit(main())
