"""Transformers' dense-prediction models with a tiny BEiT backbone, for 4.57 and 5.x."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers

from .transformers_reference import TINY

LAYERS = {"num_hidden_layers": 4, "out_features": ["stage1", "stage2", "stage3", "stage4"]}
OPTIONS = TINY | LAYERS | {"use_relative_position_bias": True, "use_mask_token": False}
OPTIONS = {key: value for key, value in OPTIONS.items() if key not in ("num_labels", "vocab_size")}
HAS_PYRAMID = not transformers.__version__.startswith("4.")
"""Whether Transformers' backbone supports `add_fpn`; 4.57 always crashes."""


def upernet(**options: Any) -> tuple[Any, tuple[int, int]]:
    options = {"add_fpn": HAS_PYRAMID, **options}
    return transformers.UperNetConfig(
        backbone_config=_backbone(options), hidden_size=16, auxiliary_channels=8, auxiliary_in_channels=32,
        pool_scales=[1, 2], num_labels=3,
    ), (32, 48)  # fmt: skip


def dpt(**options: Any) -> tuple[Any, tuple[int, int]]:
    options = {"reshape_hidden_states": False, **options}
    return transformers.DPTConfig(
        backbone_config=_backbone(options), hidden_size=32, neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=8,
        readout_type="project", is_hybrid=False, reassemble_factors=[4, 2, 1, 0.5],
    ), (48, 32)  # fmt: skip


def zoedepth(**options: Any) -> tuple[Any, tuple[int, int]]:
    options = {"reshape_hidden_states": False, **options}
    return transformers.ZoeDepthConfig(
        backbone_config=_backbone(options), neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=8,
        bottleneck_features=8, num_relative_features=8, bin_embedding_dim=8, reassemble_factors=[4, 2, 1, 0.5],
    ), (32, 48)  # fmt: skip


def _backbone(options: dict[str, Any]) -> Any:
    values = OPTIONS | options
    model_type = values.pop("model_type", "beit")
    return transformers.AutoConfig.for_model(model_type, **values)


DENSE_MODELS: dict[Callable[..., Any], str] = {
    upernet: "UperNetForSemanticSegmentation",
    dpt: "DPTForDepthEstimation",
    zoedepth: "ZoeDepthForDepthEstimation",
}


def model_class(build: Callable[..., Any]) -> Any:
    """The Transformers class for the configuration that `build` returns."""
    return getattr(transformers, DENSE_MODELS[build])


def main_output(outputs: Any) -> Any:
    """Return the logits or the depth map."""
    return outputs.logits if "logits" in outputs else outputs.predicted_depth
