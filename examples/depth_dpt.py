"""Depth from a single picture: Transformers' DPT around this package's backbone.

python examples/depth_dpt.py [--out depth.png] [--model FOLDER_OR_ID --image PATH]

With --model, a DPT checkpoint with a BEiT backbone, such as Intel/dpt-beit-base-384, predicts a photograph. Without it,
a small DPT is trained for some seconds on drawn scenes of discs, of which distant ones are darker and smaller. Then it
predicts held-out scenes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import BeitConfig, DPTConfig, DPTForDepthEstimation

from beit_fast import BeitBackbone
from beit_fast.integrations.transformers import register

SIDE, DISCS, TILE = 64, 6, 192
STEPS, BATCH, RATE = 90, 8, 2e-3
STAGES = ["stage1", "stage2", "stage3", "stage4"]


def main(arguments: list[str] | None = None) -> int:
    """Write the picture, print the error, and return the exit code."""
    parser = argparse.ArgumentParser(description="Depth with DPT around beit_fast's backbone.")
    parser.add_argument("--out", type=Path, default=Path("depth.png"), help="default: depth.png")
    parser.add_argument("--model", help="a DPT checkpoint with a BEiT backbone (default: a small one is trained)")
    parser.add_argument("--image", type=Path, help="the photograph for --model")
    options = parser.parse_args(arguments)
    if (options.model is None) != (options.image is None):
        parser.error("--model and --image go together")
    register()  # BEiT backbones inside Transformers models are now beit_fast's
    torch.manual_seed(0)
    if options.model is not None:
        model = DPTForDepthEstimation.from_pretrained(options.model).eval()
        picture = of_photograph(model, Image.open(options.image).convert("RGB"))
    else:
        model = train(small_dpt())
        picture = of_scenes(model)
    if not isinstance(model.backbone, BeitBackbone):
        parser.error(f"{options.model} has a {type(model.backbone).__name__} as its backbone, not BEiT")
    print(f"backbone: beit_fast's, attention: {model.backbone.attention_report().kernel}")
    picture.save(options.out)
    print(f"picture: {options.out}, {picture.width} x {picture.height}")
    return 0


def small_dpt() -> DPTForDepthEstimation:
    """A DPT with random weights around a backbone of four layers. Pictures are 64x64 pixels."""
    backbone = BeitConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        image_size=SIDE,
        patch_size=8,
        use_relative_position_bias=True,
        out_features=STAGES,
        reshape_hidden_states=False,
    )
    return DPTForDepthEstimation(
        DPTConfig(
            backbone_config=backbone,
            hidden_size=backbone.hidden_size,
            neck_hidden_sizes=[32, 32, 32, 32],
            fusion_hidden_size=32,
            readout_type="project",
            is_hybrid=False,
            reassemble_factors=[4, 2, 1, 0.5],
        )
    )


def train(model: DPTForDepthEstimation) -> DPTForDepthEstimation:
    """Train on new scenes in every step. Print the error on held-out scenes."""
    random = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS)
    model.train()
    for _ in (bar := tqdm(range(STEPS), desc="training", unit="step", disable=None)):
        pixels, nearness = draw_scenes(BATCH, random)
        loss = F.l1_loss(predict(model, pixels), nearness)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    pixels, nearness = held_out_scenes()
    error = F.l1_loss(predict(model.eval(), pixels), nearness).item()
    constant = (nearness - nearness.median()).abs().mean().item()
    print(f"mean error of nearness, from 0 to 1, on held-out scenes: {error:.3f} (of the best constant {constant:.3f})")
    return model


def predict(model: DPTForDepthEstimation, pixels: Tensor) -> Tensor:
    """Nearness `[B, H, W]` of pictures `[B, 3, H, W]`."""
    with torch.set_grad_enabled(model.training):
        depth = model(pixels).predicted_depth  # [B, h, w]
    return F.interpolate(depth.unsqueeze(1), size=pixels.shape[-2:], mode="bilinear")[:, 0]


def draw_scenes(count: int, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Draw noisy pictures `[B, 3, 64, 64]` and nearness `[B, 64, 64]`. Ranges are [-1, 1] and [0, 1]."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    pictures, maps = [], []
    for _ in range(count):
        nearness = np.full((SIDE, SIDE), 0.1)
        colors = np.full((3, SIDE, SIDE), 0.1)
        for near in np.sort(random.uniform(0.2, 1, DISCS)):  # the nearest is drawn last
            center = random.uniform(0, SIDE, 2)
            disc = (rows - center[0]) ** 2 + (columns - center[1]) ** 2 < (near * SIDE / 4) ** 2
            nearness[disc] = near
            colors[:, disc] = near * random.uniform(0.5, 1, (3, 1))
        pictures.append(2 * colors - 1 + random.normal(0, 0.05, colors.shape))
        maps.append(nearness)
    return torch.from_numpy(np.stack(pictures)).float(), torch.from_numpy(np.stack(maps)).float()


def held_out_scenes() -> tuple[Tensor, Tensor]:
    return draw_scenes(BATCH, np.random.default_rng(1))


def of_scenes(model: DPTForDepthEstimation) -> Image.Image:
    """Held-out scenes, their nearness, and the predictions, one row each."""
    pixels, nearness = held_out_scenes()
    lines = [(pixels.permute(0, 2, 3, 1) + 1) / 2, gray(nearness), gray(predict(model, pixels))]
    sheet = torch.cat([torch.cat(list(line), dim=1) for line in lines])  # [3 * 64, B * 64, 3]
    picture = Image.fromarray((sheet.clamp(0, 1) * 255).byte().numpy())
    return picture.resize((picture.width * TILE // SIDE, picture.height * TILE // SIDE), Image.Resampling.NEAREST)


def of_photograph(model: DPTForDepthEstimation, photograph: Image.Image) -> Image.Image:
    """A photograph beside its predicted nearness; white is nearest."""
    side = model.config.backbone_config.image_size
    small = torch.from_numpy(np.array(photograph.resize((side, side)))).permute(2, 0, 1)[None] / 127.5 - 1
    depth = predict(model, small)[0]
    depth = (depth - depth.min()) / (depth.max() - depth.min()).clamp(min=1e-6)
    shown = Image.fromarray((gray(depth) * 255).byte().numpy()).resize(photograph.size)
    both = Image.new("RGB", (2 * photograph.width, photograph.height))
    both.paste(photograph)
    both.paste(shown, (photograph.width, 0))
    return both


def gray(numbers: Tensor) -> Tensor:
    """`[..., H, W]` as a gray picture `[..., H, W, 3]`."""
    return numbers.unsqueeze(-1).expand(*numbers.shape, 3)


if __name__ == "__main__":
    sys.exit(main())
