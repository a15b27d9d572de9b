"""Convert image classifiers between timm's `Beit` and `BeitForImageClassification`."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint.key_mapping import to_hub_names, to_timm_names
from ...configuration.beit_config import BeitConfig
from ...image_processing.timm_options import normalization_entries, resize_entries
from ...models.beit import BeitForImageClassification
from ...utils.messages import join_choices, join_some, raise_value_error
from ...utils.names import AttentionImplementation, PatchEmbedImplementation

try:
    from timm import create_model
    from timm.layers import LayerNorm, Mlp
    from timm.models import beit as timm_beit
except ImportError as error:
    missing = (error.name or "timm").partition(".")[0]
    if missing != "timm":
        raise ImportError(
            f"beit_fast.integrations.timm needs {missing}, because the installed timm imports it: "
            f"install the {missing} that fits torch {torch.__version__} ({error})"
        ) from error
    raise ImportError(
        f"beit_fast.integrations.timm needs timm 1.0.31 or later: pip install 'timm>=1.0.31' ({error})"
    ) from error

_LARGE_LAYERS = 24
_TRAINED_EPS = 1e-6
_EXACT_GELU = ("gelu", "gelu_python")
_POOLINGS: dict[tuple[str, ...], bool] = {("avg", "fc_norm"): True, ("token", "norm"): False}
"""timm's pooling with its norm, and the matching `use_mean_pooling`."""
_SHOWN = 8
# `BeitImageProcessor` resizes the whole image bicubically by default.
_WHOLE_IMAGE = {"interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "squash"}


def to_timm(model: BeitForImageClassification) -> timm_beit.Beit:
    """Convert to timm's `Beit`, with copied parameters.

    The device, dtype and mode are those of `model`. The result's `pretrained_cfg` has the image size and the
    configuration's mean, standard deviation and `pixel_resize`. If these are None, it has the defaults of
    `BeitImageProcessor`: 0.5, and the whole image resized bicubically. Names of classes are dropped, because timm does
    not store them.

    Raises:
        TypeError: If `model` is not a `BeitForImageClassification`.
        ValueError: If timm cannot represent the model, with every reason.
    """
    if not isinstance(model, BeitForImageClassification):
        raise TypeError(f"to_timm takes a BeitForImageClassification, not a {type(model).__name__}")
    config = model.config
    raise_value_error("this model cannot be converted to timm's Beit", _errors_to_timm(model))
    created = create_model(
        "beit_large_patch16_224" if config.num_hidden_layers == _LARGE_LAYERS else "beit_base_patch16_224",
        pretrained_cfg=_pretrained_options(config),
        **_timm_arguments(config),
    )
    for block in created.blocks:
        block.mlp.drop1.p = 0.0  # our MLP has no dropout here
    created = created.to(model.device, model.dtype).train(model.training)
    state = to_timm_names(model.state_dict())
    raise_value_error("this model cannot be converted to timm's Beit", _parameter_errors(created.state_dict(), state))
    created.load_state_dict({key: tensor.clone() for key, tensor in state.items()}, assign=True)
    return created


def from_timm(
    model: timm_beit.Beit,
    attn_implementation: AttentionImplementation | None = None,
    patch_embed_implementation: PatchEmbedImplementation | None = None,
) -> BeitForImageClassification:
    """Convert to `BeitForImageClassification`, with copied parameters.

    The device, dtype and mode are those of `model`. An accelerated model is accepted. Mean and standard deviation of
    its `pretrained_cfg` become `pixel_mean` and `pixel_std` of the configuration. Its filter and crop become
    `pixel_resize`. A network that has no `pretrained_cfg`, or one for other channels, leaves them None.

    Args:
        model: a `timm.models.beit.Beit`.
        attn_implementation, patch_embed_implementation: as in `BeitForImageClassification`.

    Raises:
        TypeError: If `model` is not a `timm.models.beit.Beit`.
        ValueError: If this package cannot represent the model, with every reason.
    """
    if not isinstance(model, timm_beit.Beit):
        raise TypeError(f"from_timm takes a Beit of timm.models.beit, not a {type(model).__name__}")
    raise_value_error("this model cannot be converted to BeitForImageClassification", _errors_from_timm(model))
    with torch.device("meta"):
        ours = BeitForImageClassification(_config_of(model), attn_implementation, patch_embed_implementation)
    state, _ = to_hub_names(model.state_dict())
    raise_value_error(
        "this model cannot be converted to BeitForImageClassification", _parameter_errors(ours.state_dict(), state)
    )
    ours.load_state_dict({key: tensor.clone() for key, tensor in state.items()}, assign=True)
    return ours.train(model.training)


def _errors_to_timm(model: BeitForImageClassification) -> list[str]:
    config = model.config
    errors = []
    if config.attention_head_dim * config.num_attention_heads != config.hidden_size:
        errors.append(f"head_dim={config.head_dim} is not supported (expected hidden_size / num_attention_heads)")
    if config.hidden_act not in _EXACT_GELU:
        errors.append(f"hidden_act={config.hidden_act!r} is not supported (expected {join_choices(_EXACT_GELU)})")
    if config.use_mask_token:
        errors.append("a mask token, which timm does not have: from_pretrained(..., use_mask_token=False) drops it")
    return errors + _meta_errors(model)


def _pretrained_options(config: BeitConfig) -> dict[str, Any]:
    """Return the entries of timm's `pretrained_cfg` for images and the head."""
    channels = config.num_channels
    return {
        "input_size": (channels, *config.image_height_width),
        "fixed_input_size": True,
        "num_classes": config.num_labels,
        "mean": tuple(config.pixel_mean or [0.5] * channels),
        "std": tuple(config.pixel_std or [0.5] * channels),
        **(_WHOLE_IMAGE if config.pixel_resize is None else config.pixel_resize),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }


def _timm_arguments(config: BeitConfig) -> dict[str, Any]:
    """Return the arguments of timm's `Beit`."""
    dropout = config.hidden_dropout_prob
    arguments = {
        "img_size": config.image_height_width,
        "patch_size": config.patch_size,
        "in_chans": config.num_channels,
        "num_classes": config.num_labels,
        "global_pool": "avg" if config.use_mean_pooling else "token",
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": _mlp_ratio(config.hidden_size, config.intermediate_size),
        "pos_drop_rate": dropout,
        "proj_drop_rate": dropout,
        "attn_drop_rate": config.attention_probs_dropout_prob,
        "drop_path_rate": config.drop_path_rate,
        "init_values": config.layer_scale_init_value,
        "use_abs_pos_emb": config.use_absolute_position_embeddings,
        "use_rel_pos_bias": config.use_relative_position_bias,
        "use_shared_rel_pos_bias": config.use_shared_relative_position_bias,
    }
    if config.layer_norm_eps != _TRAINED_EPS:
        arguments["norm_layer"] = functools.partial(LayerNorm, eps=config.layer_norm_eps)
    return arguments


def _mlp_ratio(size: int, inner: int) -> float:
    """Return the ratio for which timm's `int(size * ratio)` is `inner`."""
    ratio = inner / size
    return ratio if int(size * ratio) == inner else math.nextafter(ratio, math.inf)


def _config_of(model: timm_beit.Beit) -> BeitConfig:
    first = model.blocks[0]
    height, width = model.patch_embed.img_size
    head_dim = first.attn.proj.in_features // first.attn.num_heads
    return BeitConfig(
        hidden_size=model.embed_dim,
        num_hidden_layers=len(model.blocks),
        num_attention_heads=first.attn.num_heads,
        head_dim=None if head_dim * first.attn.num_heads == model.embed_dim else head_dim,
        intermediate_size=first.mlp.fc1.out_features,
        image_size=height if height == width else (height, width),
        patch_size=model.patch_embed.patch_size[0],
        num_channels=model.patch_embed.proj.in_channels,
        num_labels=model.num_classes,
        layer_norm_eps=first.norm1.eps,
        layer_scale_init_value=first.init_values or 0.0,
        hidden_dropout_prob=model.pos_drop.p,
        attention_probs_dropout_prob=first.attn.attn_drop.p,
        drop_path_rate=round(_drop_path_rates(model)[-1], 6),  # timm computes it in fp32
        use_mean_pooling=_POOLINGS[_pooling_of(model)],
        use_absolute_position_embeddings=model.pos_embed is not None,
        use_relative_position_bias=first.attn.relative_position_bias_table is not None,
        use_shared_relative_position_bias=model.rel_pos_bias is not None,
        **_pixel_fields(model),
    )


def _pixel_fields(model: timm_beit.Beit) -> dict[str, Any]:
    """Return the fields that store the preprocessing in `pretrained_cfg`."""
    entries = getattr(model, "pretrained_cfg", None) or {}
    normalization = normalization_entries(entries, model.patch_embed.proj.in_channels)
    if normalization is None:
        return {}
    mean, std = normalization
    return {"pixel_mean": mean, "pixel_std": std, "pixel_resize": resize_entries(entries)}


def _errors_from_timm(model: timm_beit.Beit) -> list[str]:
    errors = _meta_errors(model)
    patches = model.patch_embed
    if len(set(patches.patch_size)) != 1 or patches.dynamic_img_pad:
        errors.append(
            f"patches of {tuple(patches.patch_size)} with dynamic_img_pad={patches.dynamic_img_pad} are not supported "
            "(expected square patches and dynamic_img_pad=False)"
        )
    pooling = _pooling_of(model)
    if pooling not in _POOLINGS:
        errors.append(
            f"global_pool={pooling[0]!r} with {' and '.join(pooling[1:]) or 'no norm'} is not supported "
            "(expected 'avg' with fc_norm or 'token' with norm)"
        )
    unlike = [
        f"blocks.{index}.mlp ({block.mlp})" for index, block in enumerate(model.blocks) if not _is_plain(block.mlp)
    ]
    if unlike:
        errors.append(f"{join_some(unlike, _SHOWN)}: not supported (expected Mlp with GELU())")
    eps = sorted({module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)})
    if len(eps) > 1:
        errors.append(f"norms with eps {join_some(eps, _SHOWN)}: not supported (expected one eps)")
    return errors + _dropout_errors(model)


def _is_plain(mlp: nn.Module) -> bool:
    return type(mlp) is Mlp and type(mlp.act) is nn.GELU and mlp.act.approximate == "none"


def _dropout_errors(model: timm_beit.Beit) -> list[str]:
    """Return the dropout rates that differ from this package's scheme."""
    after_branches, in_attention = model.pos_drop.p, model.blocks[0].attn.attn_drop.p
    accepted = {
        "head_drop": 0.0,
        "mlp.drop1": 0.0,
        "attn.proj_drop": after_branches,
        "mlp.drop2": after_branches,
        "attn.attn_drop": in_attention,
    }
    errors = []
    for name, rate in accepted.items():
        found = sorted({module.p for path, module in model.named_modules() if path.endswith(name)} - {rate})
        if found:
            errors.append(f"{name} with p={join_some(found, _SHOWN)} is not supported (expected {rate})")
    rates = _drop_path_rates(model)
    last = max(len(rates) - 1, 1)
    if any(abs(rate - rates[-1] * index / last) > 1e-6 for index, rate in enumerate(rates)):
        errors.append(f"drop path rates {join_some(rates, _SHOWN)} are not supported (expected linear from 0)")
    return errors


def _drop_path_rates(model: timm_beit.Beit) -> list[float]:
    return [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]


def _pooling_of(model: timm_beit.Beit) -> tuple[str, ...]:
    """Return timm's pooling and its final norms that are not Identity."""
    norms = (name for name in ("norm", "fc_norm") if not isinstance(getattr(model, name), nn.Identity))
    return model.global_pool, *norms


def _meta_errors(model: nn.Module) -> list[str]:
    on_meta = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    return [f"parameters on the meta device have no values: {join_some(on_meta, _SHOWN)}"] if on_meta else []


def _parameter_errors(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """Return how the given parameters differ from the target model's."""
    missing = [key for key in wanted if key not in given]
    left_over = [key for key in given if key not in wanted]
    shapes = [
        f"{key} {list(given[key].shape)} instead of {list(wanted[key].shape)}"
        for key in wanted
        if key in given and given[key].shape != wanted[key].shape
    ]
    groups = {
        "lacks parameters": missing,
        "has unexpected parameters": left_over,
        "has parameters of another shape": shapes,
    }
    return [f"the model {what}: {join_some(names, _SHOWN)}" for what, names in groups.items() if names]
