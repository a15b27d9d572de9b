"""Small tokenizers with random numbers."""

from __future__ import annotations

import torch

from beit_fast.training.tokenizers import DalleTokenizer, PatchColorTokenizer, PretrainedTokenizer, VQKDTokenizer


def dalle() -> DalleTokenizer:
    torch.manual_seed(0)
    return DalleTokenizer(vocab_size=48, hidden_size=8)


def vqkd() -> VQKDTokenizer:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    tokenizer = VQKDTokenizer(vocab_size=48, code_dim=8, image_size=32, patch_size=8, **sizes)
    for parameter in tokenizer.parameters():
        if parameter is not tokenizer.codebook:
            parameter.normal_(std=0.3)
    return tokenizer


def patch_colors() -> PatchColorTokenizer:
    torch.manual_seed(0)
    return PatchColorTokenizer(48, patch_size=8, cells=2)


BUILDERS = {"dalle": dalle, "vqkd": vqkd, "patch_colors": patch_colors}


def random_pixels(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def tokenizers() -> list[PretrainedTokenizer]:
    return [build() for build in BUILDERS.values()]
