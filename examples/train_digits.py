"""BEiT's recipe in small: masked image modeling on handwritten digits, then classification.

python examples/train_digits.py [--out FOLDER] [--seed 0] [--attn sdpa] [--quick]

The data are scikit-learn's 1797 digits of 8x8 pixels. Visual tokens, which BEiT takes from DALL-E's tokenizer, are
clusters of patches here. A fifth of the digits is held out: neither weights nor epochs are chosen by them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from beit_fast import BeitConfig, BeitForImageClassification, BeitForMaskedImageModeling, __version__

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZE, PATCH, TOKENS, LAYERS = 48, 8, 64, 4
HELD_OUT, MASKED = 0.2, 0.4
IMAGES_PER_CLASS, QUICK_IMAGES = 2, 256
SHARED_TABLE = "encoder.relative_position_bias.relative_position_bias_table"
LAYER_TABLE = "encoder.layer.{}.attention.attention.relative_position_bias.relative_position_bias_table"
ARCHITECTURE: dict[str, Any] = {
    "vocab_size": TOKENS,
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "image_size": SIZE,
    "patch_size": PATCH,
    "initializer_range": 0.1,
}
PROCESSOR = {
    "image_processor_type": "BeitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"height": SIZE, "width": SIZE},
    "resample": int(Image.Resampling.BILINEAR),
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_reduce_labels": False,
}
Log = list[dict[str, Any]]
Step = Callable[[Tensor], tuple[Tensor, Tensor]]
Scores = Callable[[], dict[str, float]]
Optimization = tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]


@dataclass(frozen=True)
class Digits:
    """Images, pixels and labels, and the indices of each split."""

    images: np.ndarray  # uint8 [n, 8, 8]
    pixels: Tensor  # [n, 3, 48, 48]
    labels: Tensor  # [n]
    training: Tensor
    held_out: Tensor


def main(arguments: list[str] | None = None) -> int:
    """Train, evaluate, write the checkpoint, and return the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        digits = load_digits(options.seed, QUICK_IMAGES if options.quick else None)
    except ImportError as error:
        parser.error(f"the digits come with scikit-learn: pip install scikit-learn ({error})")
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(options.seed)
    start = time.perf_counter()
    pretrained, pretraining = pretrain(digits, options)
    model, fine_tuning = fine_tune(pretrained, digits, options)
    log = {
        "held_out_accuracy": accuracy(model, digits, digits.held_out),
        "training_accuracy": accuracy(model, digits, digits.training),
        "images_accuracy": accuracy(model, digits, shown_indices(digits)),
        "split": {"training": len(digits.training), "held_out": len(digits.held_out), "random_state": options.seed},
        "options": {name: value for name, value in vars(options).items() if name != "out"},
        "seconds": round(time.perf_counter() - start, 1),
        "environment": {
            "system": f"{platform.system()} {platform.machine()}",
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "scikit-learn": importlib.metadata.version("scikit-learn"),
            "beit_fast": __version__,
        },
        "pretraining": pretraining,
        "fine_tuning": fine_tuning,
    }
    save(model, digits, log, options.out)
    print(f"held-out accuracy {log['held_out_accuracy']:.2%} in {log['seconds']} s; written: {options.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Pre-train and fine-tune a tiny BEiT on handwritten digits.")
    parser.add_argument("--out", type=Path, default=Path("digits"), help="folder to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of all random numbers")
    parser.add_argument("--pretraining-epochs", type=int, default=15, help="default: %(default)s")
    parser.add_argument("--fine-tuning-epochs", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--attn", choices=("eager", "sdpa", "triton"), help="attention (default: by device and dtype)")
    parser.add_argument(
        "--threads", type=int, default=1, help="more threads are hardly faster here (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help=f"train on {QUICK_IMAGES} digits, to try the script")
    return parser


def load_digits(seed: int, limit: int | None = None) -> Digits:
    """Load the digits and hold out a stratified fifth; `limit` truncates the training split."""
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    data = datasets.load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)
    parts = train_test_split(np.arange(len(images)), test_size=HELD_OUT, stratify=data.target, random_state=seed)
    pixels = torch.stack([preprocess(Image.fromarray(image)) for image in images])
    training, held_out = (torch.from_numpy(np.sort(part)) for part in (parts[0][:limit], parts[1]))
    return Digits(images, pixels, torch.from_numpy(data.target).long(), training, held_out)


def preprocess(image: Image.Image) -> Tensor:
    """Convert a picture to pixels `[3, 48, 48]` in [-1, 1]. `PROCESSOR` describes the steps."""
    resized = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return (torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255 - 0.5) / 0.5


def augment(pixels: Tensor) -> Tensor:
    """Rotate, shear, scale and shift each image `[B, 3, H, W]` slightly. Padding is background."""
    angle, shear = torch.empty(2, len(pixels)).uniform_(-0.15, 0.15)  # radians
    across, down = torch.empty(2, len(pixels)).uniform_(0.9, 1.1)
    right, below = torch.empty(2, len(pixels)).uniform_(-0.12, 0.12)  # halves of the image
    first = torch.stack([angle.cos() * across, (shear - angle.sin()) * across, right], dim=-1)
    second = torch.stack([angle.sin() * down, angle.cos() * down, below], dim=-1)
    grid = F.affine_grid(torch.stack([first, second], dim=1), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels + 1, grid, align_corners=False) - 1


def patches_of(pixels: Tensor) -> Tensor:
    """Cut `[B, 3, H, W]` into flat patches, row by row. They are `[B, P, 3 * 8 * 8]`."""
    return F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2)


def fit_tokenizer(pixels: Tensor, seed: int) -> Tensor:
    """Cluster the patches; the index of a center `[V, 3 * 8 * 8]` is a visual token."""
    from sklearn.cluster import MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    clusters = MiniBatchKMeans(TOKENS, batch_size=4096, n_init=3, random_state=seed)
    with threadpool_limits(1):  # sums of several threads differ from run to run
        clusters.fit(patches_of(pixels).flatten(0, 1).numpy())
    return torch.from_numpy(clusters.cluster_centers_).float()


def blockwise_mask(window: tuple[int, int], random: np.random.Generator) -> np.ndarray:
    """Mask random blocks of 40 % of the window, bool `[Wh, Ww]`. This is algorithm 1 of arXiv 2106.08254."""
    mask = np.zeros(window, dtype=bool)
    smallest, wanted = mask.size * 16 / 196, MASKED * mask.size
    while mask.sum() <= wanted:
        area = random.uniform(smallest, max(wanted - mask.sum(), smallest))
        aspect = math.exp(random.uniform(math.log(0.3), -math.log(0.3)))
        sides = math.sqrt(area * aspect), math.sqrt(area / aspect)
        height, width = (min(max(round(side), 1), limit) for side, limit in zip(sides, window, strict=True))
        top, left = random.integers(window[0] - height + 1), random.integers(window[1] - width + 1)
        mask[top : top + height, left : left + width] = True
    return mask


def pretrain(digits: Digits, options: argparse.Namespace) -> tuple[BeitForMaskedImageModeling, Log]:
    """Predict the visual tokens of masked patches; one relative position bias for all layers."""
    config = BeitConfig(use_mask_token=True, use_shared_relative_position_bias=True, **ARCHITECTURE)
    model = BeitForMaskedImageModeling(config, attn_implementation=options.attn)
    random = np.random.default_rng(options.seed)
    centers = fit_tokenizer(digits.pixels[digits.training], options.seed)

    def step(batch: Tensor) -> tuple[Tensor, Tensor]:
        pixels = augment(digits.pixels[batch])
        mask = torch.from_numpy(np.stack([blockwise_mask(config.window, random) for _ in batch])).flatten(1)  # [B, P]
        labels = torch.cdist(patches_of(pixels), centers).argmin(-1)[mask]  # the nearest centers' numbers
        output = model(pixels, bool_masked_pos=mask, labels=labels)
        return output.loss, output.logits[mask].argmax(-1) == labels

    return model, train("pre-training", model, step, digits, options.pretraining_epochs, options, dict)


def fine_tune(
    pretrained: BeitForMaskedImageModeling, digits: Digits, options: argparse.Namespace
) -> tuple[BeitForImageClassification, Log]:
    """Classify; every layer starts from a copy of the shared bias table and then has its own."""
    labels = {"id2label": dict(enumerate(NAMES)), "architectures": ["BeitForImageClassification"]}
    config = BeitConfig(use_relative_position_bias=True, dtype="float32", **labels, **ARCHITECTURE)
    model = BeitForImageClassification(config, attn_implementation=options.attn)
    start_from(pretrained, model)

    def step(batch: Tensor) -> tuple[Tensor, Tensor]:
        logits, labels = model(augment(digits.pixels[batch])).logits, digits.labels[batch]
        return F.cross_entropy(logits, labels, label_smoothing=0.1), logits.argmax(-1) == labels

    def scores() -> dict[str, float]:
        return {"held_out_accuracy": accuracy(model, digits, digits.held_out)}

    return model, train("fine-tuning", model, step, digits, options.fine_tuning_epochs, options, scores)


def start_from(pretrained: BeitForMaskedImageModeling, model: BeitForImageClassification) -> None:
    """Load the pre-trained trunk without its mask token; copy its bias table into every layer."""
    weights = pretrained.beit.state_dict()
    table = weights.pop(SHARED_TABLE)
    del weights["embeddings.mask_token"]
    weights |= {LAYER_TABLE.format(layer): table for layer in range(LAYERS)}
    pooler = {f"pooler.{name}": value for name, value in model.beit.pooler.state_dict().items()}  # new in this model
    model.beit.load_state_dict(weights | pooler)


def train(
    title: str, model: nn.Module, step: Step, digits: Digits, epochs: int, options: argparse.Namespace, scores: Scores
) -> Log:
    """Run `step` over the training split `epochs` times; return a row of the log per epoch."""
    batches = math.ceil(len(digits.training) / options.batch_size)
    optimizer, schedule = optimizer_for(model, options.rate, max(batches * epochs, 1))
    log: Log = []
    for epoch in (bar := tqdm(range(1, epochs + 1), desc=title, unit="epoch", disable=None)):
        model.train()
        losses, hits = [], []
        for batch in digits.training[torch.randperm(len(digits.training))].split(options.batch_size):
            loss, hit = step(batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 3.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            hits.append(hit)
        row = {"loss": float(np.mean(losses)), "accuracy": torch.cat(hits).float().mean().item()} | scores()
        log.append({"epoch": epoch} | {name: round(value, 4) for name, value in row.items()})
        bar.set_postfix({name: f"{value:.3f}" for name, value in row.items()})
    return log


def optimizer_for(model: nn.Module, rate: float, steps: int) -> Optimization:
    """AdamW with weight decay on matrices, and a one-cycle learning rate.

    The bias tables start at zero, so their rate is ten times that of the rest.
    """
    tables, matrices, others = [], [], []
    for name, parameter in model.named_parameters():
        is_matrix = name.endswith(".weight") and parameter.ndim > 1
        (tables if name.endswith("bias_table") else matrices if is_matrix else others).append(parameter)
    groups = [{"params": tables}, {"params": matrices, "weight_decay": 0.05}, {"params": others}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    rates = [10 * rate, rate, rate]
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps, pct_start=0.1, cycle_momentum=False)


@torch.no_grad()
def accuracy(model: BeitForImageClassification, digits: Digits, indices: Tensor) -> float:
    """The share of the digits at `indices` that the model classifies correctly."""
    model.eval()
    hits = [model(digits.pixels[part]).logits.argmax(-1) == digits.labels[part] for part in indices.split(256)]
    return torch.cat(hits).double().mean().item()


def shown_indices(digits: Digits) -> Tensor:
    """The indices `[20]` of the first held-out digits of each class."""
    classes = (digits.held_out[digits.labels[digits.held_out] == label] for label in range(len(NAMES)))
    return torch.cat([indices[:IMAGES_PER_CLASS] for indices in classes])


def save(model: BeitForImageClassification, digits: Digits, log: dict[str, Any], folder: Path) -> None:
    """Write the checkpoint in the hub's layout, the log, and held-out digits."""
    model.config.save_pretrained(folder)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=2, sort_keys=True) + "\n")
    (folder / "training_log.json").write_text(json.dumps(log, indent=2) + "\n")
    indices = shown_indices(digits)
    sheet = digits.images[indices].reshape(len(NAMES), -1, 8, 8).transpose(1, 2, 0, 3).reshape(-1, 8 * len(NAMES))
    Image.fromarray(sheet).resize((640, 128), Image.Resampling.NEAREST).save(folder / "images.png")
    (folder / "images").mkdir(exist_ok=True)
    for index in indices.tolist():
        Image.fromarray(digits.images[index]).convert("RGB").save(folder / f"images/{digits.labels[index]}_{index}.png")


if __name__ == "__main__":
    raise SystemExit(main())
