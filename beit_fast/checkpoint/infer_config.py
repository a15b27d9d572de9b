"""Read the configuration of a checkpoint, or infer it from shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..configuration.beit_config import BeitConfig
from ..utils.files import read_json_object
from .resize_positions import TABLE, is_position, square_window

_LAYER = re.compile(r"^beit\.encoder\.layer\.(\d+)\.")
_FIRST = "beit.encoder.layer.0."
_TRAINED_EPS = 1e-6
_POOL_SCALES = (1, 2, 3, 6)
_STAGES = {12: [3, 5, 7, 11], 24: [7, 11, 15, 23]}
"""`out_indices` by depth, as in files on the hub that were converted from unilm."""
_RESIZE = ("interpolation", "crop_pct", "crop_mode")
"""Entries of `pixel_resize`."""


def read_config(file: Path | None) -> BeitConfig | None:
    """Read a `config.json`; return None if there is none or if timm wrote it."""
    if file is None:
        return None
    values = read_json_object(file)
    if "model_type" not in values and ("architecture" in values or "pretrained_cfg" in values):
        return None
    return BeitConfig.from_dict(values)


def copy_config(config: BeitConfig, **overrides: Any) -> BeitConfig:
    """Copy `config`, with its implementations and with `overrides`."""
    return type(config).from_dict(config.to_dict(), **(config.implementations() | overrides))


def infer_config(
    state: Mapping[str, Tensor], name: str, overrides: Mapping[str, Any], options: Mapping[str, Any] | None = None
) -> BeitConfig:
    """Infer a configuration from shapes: files of timm, unilm and mmsegmentation contain none.

    Args:
        state: Tensors by their full hub names.
        name: The checkpoint, for errors.
        overrides: Fields that take precedence. Some fields cannot be inferred.
        options: Options of timm's training script, which may name the preprocessing.

    Raises:
        ValueError: If `num_attention_heads`, `image_size`, `out_indices` or `pool_scales` can neither be inferred nor
            was passed.
    """
    fields: dict[str, Any] = _trunk_fields(state)
    fields |= _position_fields(state, fields, name, overrides)
    fields |= _head_fields(state, fields, name, overrides)
    fields |= _pixel_fields(options or {}, fields["num_channels"])
    return BeitConfig(**{key: value for key, value in fields.items() if key not in overrides}, **overrides)


def _trunk_fields(state: Mapping[str, Tensor]) -> dict[str, Any]:
    needed = {
        "projection": "beit.embeddings.patch_embeddings.projection.weight",
        "expand": f"{_FIRST}intermediate.dense.weight",
    }
    missing = [key for key in needed.values() if key not in state]
    if missing:
        raise ValueError(f"a configuration cannot be inferred from a checkpoint without {', '.join(missing)}")
    size, channels, patch, _ = state[needed["projection"]].shape
    layers = {int(found[1]) for found in map(_LAYER.match, state) if found is not None}
    token_pooling = "beit.layernorm.weight" in state and "beit.pooler.layernorm.weight" not in state
    return {
        "hidden_size": size,
        "num_channels": channels,
        "patch_size": patch,
        "num_hidden_layers": max(layers) + 1,
        "intermediate_size": state[needed["expand"]].shape[0],
        "layer_norm_eps": _TRAINED_EPS,
        "layer_scale_init_value": 0.1 if f"{_FIRST}lambda_1" in state else 0.0,
        "use_mask_token": "beit.embeddings.mask_token" in state,
        "use_mean_pooling": not token_pooling,
    }


def _position_fields(
    state: Mapping[str, Tensor], trunk: Mapping[str, Any], name: str, overrides: Mapping[str, Any]
) -> dict[str, Any]:
    positions = {key: tensor for key, tensor in state.items() if is_position(key)}
    tables = [tensor for key, tensor in positions.items() if key.endswith(TABLE)]
    fields: dict[str, Any] = {
        "use_relative_position_bias": any(key.startswith(_FIRST) for key in positions),
        "use_shared_relative_position_bias": any(key.startswith("beit.encoder.relative") for key in positions),
        "use_absolute_position_embeddings": "beit.embeddings.position_embeddings" in positions,
    }
    if not tables and "num_attention_heads" not in overrides:
        raise ValueError(
            f"num_attention_heads can neither be inferred from {name!r}, which has no config.json and no bias table, "
            "nor was passed: pass num_attention_heads"
        )
    heads = overrides.get("num_attention_heads", tables[0].shape[1] if tables else None)
    inner = state[f"{_FIRST}attention.attention.query.weight"].shape[0]
    fields["num_attention_heads"] = heads
    if inner != trunk["hidden_size"] and heads:
        fields["head_dim"] = inner // heads
    if positions and "image_size" not in overrides:
        key, tensor = next(iter(positions.items()))
        window = square_window(key, tensor)
        if window is None:
            raise ValueError(
                f"image_size cannot be inferred from {name!r}, which has no config.json: {key} {list(tensor.shape)} is "
                "not for a square image. Pass config=BeitConfig(...) with image_size=(height, width)"
            )
        fields["image_size"] = window[0] * trunk["patch_size"]
    return fields


def _head_fields(
    state: Mapping[str, Tensor], trunk: Mapping[str, Any], name: str, overrides: Mapping[str, Any]
) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    classifier = state.get("classifier.weight", state.get("decode_head.classifier.weight"))
    labels_given = {"num_labels", "id2label", "label2id"} & set(overrides)
    if classifier is not None and not labels_given:
        fields["num_labels"] = classifier.shape[0]
    if "lm_head.weight" in state:
        fields["vocab_size"] = state["lm_head.weight"].shape[0]
    if any(key.startswith("decode_head.") for key in state):
        fields |= _segmentation_fields(state, trunk["num_hidden_layers"], name, overrides)
    return fields


def _pixel_fields(options: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """Return the preprocessing that options of timm's training script name.

    timm takes a missing mean, standard deviation or `crop_pct` from its table of architectures, which the file does not
    contain. Nothing is returned then. One number is for all channels.
    """
    mean, std = (_numbers(options.get(name), channels) for name in ("mean", "std"))
    if mean is None or std is None or not options.get("crop_pct"):
        return {}
    resize = {name: options[name] for name in _RESIZE if options.get(name)}
    return {"pixel_mean": mean, "pixel_std": std, "pixel_resize": resize}


def _numbers(value: Any, channels: int) -> list[float] | None:
    if not isinstance(value, (list, tuple)) or len(value) not in (1, channels):
        return None
    if not all(isinstance(number, (int, float)) for number in value):
        return None
    return list(value) * (channels // len(value))


def _segmentation_fields(
    state: Mapping[str, Tensor], layers: int, name: str, overrides: Mapping[str, Any]
) -> dict[str, Any]:
    scales = {key.split(".")[2] for key in state if key.startswith("decode_head.psp_modules.")}
    if len(scales) != len(_POOL_SCALES) and "pool_scales" not in overrides:
        raise ValueError(
            f"pool_scales cannot be inferred from {name!r}, which has {len(scales)} scales: pass pool_scales"
        )
    fields: dict[str, Any] = {"pool_scales": _POOL_SCALES}
    if not {"out_indices", "out_features"} & set(overrides):
        if layers not in _STAGES:
            raise ValueError(
                f"out_indices cannot be inferred from {name!r}, which has {layers} layers: pass out_indices"
            )
        fields["out_indices"] = _STAGES[layers]
    convolutions = {key.split(".")[2] for key in state if key.startswith("auxiliary_head.convs.")}
    auxiliary = state.get("auxiliary_head.classifier.weight")
    fields["use_auxiliary_head"] = auxiliary is not None
    if auxiliary is not None:
        fields["auxiliary_channels"] = auxiliary.shape[1]
        fields["auxiliary_num_convs"] = len(convolutions)
        fields["auxiliary_concat_input"] = "auxiliary_head.conv_cat.conv.weight" in state
    return fields
