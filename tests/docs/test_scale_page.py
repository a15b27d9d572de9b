"""The numbers of docs/pretraining-at-scale.md, counted again."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from beit_fast import BeitConfig, BeitForMaskedImageModeling
from beit_fast.training.tokenizers import DalleTokenizer

from ..support.checkout import ROOT

PAGE = ROOT / "docs" / "pretraining-at-scale.md"
IMAGES, BATCH, GPUS = 1e9, 64, 64
PEAK_BF16, PEAK_TF32, SHARE = 989e12, 495e12, 0.4
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}


def flops_of_a_step(config: BeitConfig) -> int:
    """Count the FLOPs of one image, forward and backward."""
    with torch.device("meta"):
        model = BeitForMaskedImageModeling(config, attn_implementation="sdpa").train()
        pixels, masked = torch.empty(1, 3, 224, 224), torch.zeros(1, 196, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter:
        model(pixels, bool_masked_pos=masked).logits.sum().backward()
    return counter.get_total_flops()


def flops_of_the_tokenizer() -> int:
    with torch.device("meta"):
        tokenizer = DalleTokenizer()
        values = torch.empty(1, 3, 112, 112)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tokenizer.logits(values)
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def numbers() -> dict[str, str]:
    config = BeitConfig(**LARGE, use_mask_token=True, use_shared_relative_position_bias=True)
    with torch.device("meta"):
        parameters = sum(each.numel() for each in BeitForMaskedImageModeling(config).parameters())
    step, tokens = flops_of_a_step(config), flops_of_the_tokenizer()
    seconds = step / (SHARE * PEAK_BF16) + tokens / (SHARE * PEAK_TF32)
    rate = 1 / seconds
    return {
        "parameters": f"{parameters / 1e6:.0f} million",
        "FLOPs of an image, forward and backward": f"{step / 1e9:.0f} GFLOP",
        "FLOPs of DALL-E's tokenizer": f"{tokens / 1e9:.0f} GFLOP",
        "images per second and GPU": f"{rate:.0f}",
        "GPU hours": f"{IMAGES / rate / 3600:.0f}",
        "days on 64 GPUs": f"{IMAGES / rate / GPUS / 86400:.1f}",
        "steps": f"{IMAGES / (BATCH * GPUS) / 1000:.0f} thousand",
        "seconds of a step": f"{BATCH / rate:.3f}",
        "gradients that a GPU sends, DDP": f"{2 * 4 * parameters / 1e9:.1f} GB",
        "rate of them": f"{2 * 4 * parameters / 1e9 / (BATCH / rate):.0f} GB/s",
        "weights and gradients that a GPU receives, FSDP2": f"{3 * 4 * parameters / 1e9:.1f} GB",
        "checkpoint": f"{16 * parameters / 1e9:.1f} GB",
        "`model/`": f"{4 * parameters / 1e9:.1f} GB",
        "images on disk": f"{IMAGES * 110e3 / 1e12:.0f} TB",
        "reading of a node of 8 GPUs": f"{8 * rate * 110e3 / 1e6:.0f} MB/s",
        "cores for a GPU": f"{rate / views_per_core():.1f}",
    }


def views_per_core() -> float:
    """Return the measured images per second and core, both views."""
    results = json.loads((ROOT / "benchmarks/results/input-pipeline/amd-epyc.json").read_text())
    rows = {(row["task"], row["baseline"]): row for row in results["rows"]}
    return rows["two-views", "beit_fast"]["images_per_second_and_core"]


def rows_of_page() -> dict[str, str]:
    lines = re.findall(r"^\| ([^|]+) \| [^|]+ \| ([^|]+) \|$", PAGE.read_text().partition("```")[0], re.MULTILINE)
    return {name: value for name, value in lines if name not in ("quantity", "---")}


def test_numbers_of_the_page_are_counted(numbers):
    assert rows_of_page() == numbers
    assert f"{numbers['GPU hours']} GPU hours" in PAGE.read_text()
