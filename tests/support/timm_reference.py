"""timm's BEiT as a reference, imported without torchvision as in the benchmarks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .benchmarks import import_benchmarks

import_benchmarks()

from benchmarks.baselines.timm_import import import_timm  # noqa: E402  needs the package above

timm = import_timm()

TINY = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 4,
    "mlp_ratio": 1.5,
    "num_classes": 5,
    "init_values": 0.1,
}
POSITIONS = {
    "per layer": {"use_rel_pos_bias": True},
    "shared": {"use_shared_rel_pos_bias": True},
    "absolute": {"use_abs_pos_emb": True},
    "absolute and shared": {"use_abs_pos_emb": True, "use_shared_rel_pos_bias": True},
}


def build(**options: object) -> torch.nn.Module:
    """Build a tiny timm `Beit` in evaluation mode with random parameters."""
    values = TINY | {"use_abs_pos_emb": False} | options
    model = timm.models.beit.Beit(**values).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gamma" in name:
                parameter.uniform_(0.1, 1.0, generator=generator)
            elif parameter.ndim == 1:
                parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3, generator=generator)
            else:
                spread = 1.0 if any(part in name for part in ("table", "pos_embed", "cls_token")) else 0.15
                parameter.normal_(0.0, spread, generator=generator)
    return model


def masked_modeling_state(model: torch.nn.Module, vocabulary: int = 11) -> dict[str, Tensor]:
    """Convert timm's state to unilm's pre-training names.

    It adds a mask token, `norm`, `lm_head` and the index buffers.
    """
    generator = torch.Generator().manual_seed(4)
    width = model.embed_dim
    state = {key: x for key, x in model.state_dict().items() if not key.startswith(("head.", "fc_norm.", "norm."))}
    state |= {
        "mask_token": torch.randn(1, 1, width, generator=generator),
        "norm.weight": torch.rand(width, generator=generator) + 0.5,
        "norm.bias": torch.randn(width, generator=generator),
        "lm_head.weight": torch.randn(vocabulary, width, generator=generator),
        "lm_head.bias": torch.randn(vocabulary, generator=generator),
    }
    for key in [key for key in state if key.endswith("relative_position_bias_table")]:
        side = model.patch_embed.grid_size[0]
        index = timm.layers.pos_embed_rel.gen_relative_position_index((side, side), class_token=True)
        state[key.replace("bias_table", "index")] = index
    return state


def mmseg_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a backbone's weights to the names of mmsegmentation's `BEiT`."""
    parts = {
        "blocks.": "layers.",
        "norm1.": "ln1.",
        "norm2.": "ln2.",
        "mlp.fc1.": "ffn.layers.0.0.",
        "mlp.fc2.": "ffn.layers.1.",
        "patch_embed.proj.": "patch_embed.projection.",
    }
    renamed = {}
    for key, tensor in state.items():
        if key.startswith(("head.", "fc_norm.", "norm.")):
            continue
        for old, new in parts.items():
            key = key.replace(old, new)
        renamed[f"backbone.{key}"] = tensor
    return renamed
