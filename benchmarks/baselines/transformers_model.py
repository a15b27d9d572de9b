"""Transformers' BEiT classifier with the weights of a case."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from beit_fast.checkpoint.key_mapping import to_hub_names

from ..harness.model_cases import ModelCase, parameters


def transformers_model(case: ModelCase, implementation: str, dtype: torch.dtype) -> nn.Module:
    """Build Transformers' classifier with the weights of the case."""
    from transformers import BeitConfig, BeitForImageClassification

    model = BeitForImageClassification(BeitConfig(**case.options, attn_implementation=implementation))
    fill(model, parameters(case))
    return model.to(case.device, dtype).train(case.trains)


@torch.no_grad()
def fill(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy weights with hub names into a model of Transformers or timm.

    Raises:
        ValueError: If the model's parameters do not match the weights.
    """
    own = dict(model.named_parameters())
    packed = {name: own.pop(name) for name in [name for name in own if name.endswith(".attn.qkv.weight")]}
    targets, _ = to_hub_names(own)
    known = set(targets)
    for name, target in packed.items():
        projection = f"beit.encoder.layer.{name.split('.')[1]}.attention.attention"
        parts = [f"{projection}.{part}.weight" for part in ("query", "key", "value")]
        target.copy_(torch.cat([weights[part] for part in parts]))
        known.update(parts)
    if known != weights.keys():
        raise ValueError(f"parameters and weights differ in {sorted(known ^ weights.keys())}")
    for name, target in targets.items():
        target.copy_(weights[name])
