"""Image classifiers from timm's `Beit` to `BeitForImageClassification` and back, parameters copied."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint.key_mapping import to_hub_names, to_timm_names
from ...configuration.beit_config import BeitConfig
from ...models.beit import BeitForImageClassification

try:
    from timm import create_model
    from timm.layers import LayerNorm, Mlp
    from timm.models import beit as timm_beit
except ImportError as error:
    raise ImportError(
        f"beit_fast.integrations.timm needs timm 1.0.31 or later: pip install 'timm>=1.0.31' ({error})"
    ) from error

_LARGE_LAYERS = 24
_TRAINED_EPS = 1e-6
_EXACT_GELU = ("gelu", "gelu_python")
_POOLINGS: dict[tuple[str, ...], bool] = {("avg", "fc_norm"): True, ("token", "norm"): False}
"""timm's pooling and the norm it goes with, and `use_mean_pooling` for each."""
_SHOWN = 8


def to_timm(model: BeitForImageClassification) -> timm_beit.Beit:
    """timm's `Beit` with a copy of these parameters, on their device, in their dtype and in the model's mode.

    Its `pretrained_cfg` has the image size and, where the configuration has them, mean and standard deviation, else
    BEiT's 0.5. timm has no place for the names of classes.

    Raises:
        TypeError: not a `BeitForImageClassification`.
        ValueError: timm has no such network, with every reason.
    """
    if not isinstance(model, BeitForImageClassification):
        raise TypeError(f"to_timm takes a BeitForImageClassification, not a {type(model).__name__}")
    config = model.config
    _refuse("timm's Beit", _obstacles_to_timm(model))
    created = create_model(
        "beit_large_patch16_224" if config.num_hidden_layers == _LARGE_LAYERS else "beit_base_patch16_224",
        pretrained_cfg=_pretrained_options(config),
        **_timm_arguments(config),
    )
    for block in created.blocks:
        block.mlp.drop1.p = 0.0  # ours has no dropout inside the MLP
    created = created.to(model.device, model.dtype).train(model.training)
    state = to_timm_names(model.state_dict())
    _refuse("timm's Beit", _parameter_problems(created.state_dict(), state))
    created.load_state_dict({key: tensor.clone() for key, tensor in state.items()}, assign=True)
    return created


def from_timm(
    model: timm_beit.Beit, attn_implementation: str | None = None, patch_embed_implementation: str | None = None
) -> BeitForImageClassification:
    """`BeitForImageClassification` with a copy of these parameters, on their device, in their dtype and the same mode.

    An accelerated model is taken too. Mean and standard deviation are no part of timm's network: for uint8 images give
    those of its `pretrained_cfg` to `set_pixel_normalization`.

    Args:
        model: a `timm.models.beit.Beit`.
        attn_implementation, patch_embed_implementation: as in `BeitForImageClassification`.

    Raises:
        TypeError: not a `timm.models.beit.Beit`.
        ValueError: the network is unlike ours, with every reason.
    """
    if not isinstance(model, timm_beit.Beit):
        raise TypeError(f"from_timm takes a Beit of timm.models.beit, not a {type(model).__name__}")
    _refuse("BeitForImageClassification", _obstacles_from_timm(model))
    with torch.device("meta"):
        ours = BeitForImageClassification(_config_of(model), attn_implementation, patch_embed_implementation)
    state, _ = to_hub_names(model.state_dict())
    _refuse("BeitForImageClassification", _parameter_problems(ours.state_dict(), state))
    ours.load_state_dict({key: tensor.clone() for key, tensor in state.items()}, assign=True)
    return ours.train(model.training)


def _obstacles_to_timm(model: BeitForImageClassification) -> list[str]:
    config = model.config
    problems = []
    if config.attention_head_dim * config.num_attention_heads != config.hidden_size:
        problems.append(f"head_dim={config.head_dim}; accepted: hidden_size / num_attention_heads")
    if config.hidden_act not in _EXACT_GELU:
        problems.append(f"hidden_act={config.hidden_act!r}; accepted: {', '.join(map(repr, _EXACT_GELU))}")
    if config.use_mask_token:
        problems.append("a mask token, which timm has not: from_pretrained(..., use_mask_token=False) leaves it out")
    return problems + _meta_problems(model)


def _pretrained_options(config: BeitConfig) -> dict[str, Any]:
    """What timm's `pretrained_cfg` says of images and of the head."""
    channels = config.num_channels
    return {
        "input_size": (channels, *config.image_height_width),
        "fixed_input_size": True,
        "num_classes": config.num_labels,
        "mean": tuple(config.pixel_mean or [0.5] * channels),
        "std": tuple(config.pixel_std or [0.5] * channels),
        "crop_pct": 0.9,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }


def _timm_arguments(config: BeitConfig) -> dict[str, Any]:
    """Arguments of timm's `Beit`."""
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
    """The ratio of which timm's `int(size * ratio)` makes `inner`."""
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
        drop_path_rate=round(_drop_path_rates(model)[-1], 6),  # timm's comes from an fp32 linspace
        use_mean_pooling=_POOLINGS[_pooling_of(model)],
        use_absolute_position_embeddings=model.pos_embed is not None,
        use_relative_position_bias=first.attn.relative_position_bias_table is not None,
        use_shared_relative_position_bias=model.rel_pos_bias is not None,
    )


def _obstacles_from_timm(model: timm_beit.Beit) -> list[str]:
    problems = _meta_problems(model)
    patches = model.patch_embed
    if len(set(patches.patch_size)) != 1 or patches.dynamic_img_pad:
        problems.append(
            f"patches of {tuple(patches.patch_size)}, dynamic_img_pad={patches.dynamic_img_pad}; accepted: square "
            "patches, images that are not padded"
        )
    pooling = _pooling_of(model)
    if pooling not in _POOLINGS:
        problems.append(
            f"global_pool={pooling[0]!r} with {' and '.join(pooling[1:]) or 'no norm'}; accepted: 'avg' with fc_norm, "
            "'token' with norm"
        )
    unlike = [
        f"blocks.{index}.mlp ({block.mlp})" for index, block in enumerate(model.blocks) if not _is_plain(block.mlp)
    ]
    if unlike:
        problems.append(f"{_listed(unlike)}; accepted: Mlp with GELU()")
    eps = sorted({module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)})
    if len(eps) > 1:
        problems.append(f"norms with an eps of {_listed(eps)}; accepted: one for all")
    return problems + _dropout_problems(model)


def _is_plain(mlp: nn.Module) -> bool:
    return type(mlp) is Mlp and type(mlp.act) is nn.GELU and mlp.act.approximate == "none"


def _dropout_problems(model: timm_beit.Beit) -> list[str]:
    """Ours drops after the embeddings, after both branches and in attention, and drops paths linearly from 0."""
    after_branches, in_attention = model.pos_drop.p, model.blocks[0].attn.attn_drop.p
    accepted = {
        "head_drop": 0.0,
        "mlp.drop1": 0.0,
        "attn.proj_drop": after_branches,
        "mlp.drop2": after_branches,
        "attn.attn_drop": in_attention,
    }
    problems = []
    for name, rate in accepted.items():
        found = sorted({module.p for path, module in model.named_modules() if path.endswith(name)} - {rate})
        if found:
            problems.append(f"{name} with p={_listed(found)}; accepted here: {rate}")
    rates = _drop_path_rates(model)
    last = max(len(rates) - 1, 1)
    if any(abs(rate - rates[-1] * index / last) > 1e-6 for index, rate in enumerate(rates)):
        problems.append(f"drop path with rates {_listed(rates)}; accepted: linear from 0")
    return problems


def _drop_path_rates(model: timm_beit.Beit) -> list[float]:
    return [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]


def _pooling_of(model: timm_beit.Beit) -> tuple[str, ...]:
    """How timm pools, and which of its two final norms are there."""
    norms = (name for name in ("norm", "fc_norm") if not isinstance(getattr(model, name), nn.Identity))
    return model.global_pool, *norms


def _meta_problems(model: nn.Module) -> list[str]:
    on_meta = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    return [f"parameters on the meta device, which have no values: {_listed(on_meta)}"] if on_meta else []


def _parameter_problems(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """How parameters under the wanted model's names differ from it."""
    missing = [key for key in wanted if key not in given]
    left_over = [key for key in given if key not in wanted]
    shapes = [
        f"{key} {list(given[key].shape)} instead of {list(wanted[key].shape)}"
        for key in wanted
        if key in given and given[key].shape != wanted[key].shape
    ]
    groups = {"lacks": missing, "has beyond it": left_over, "has in another shape": shapes}
    return [f"the model {what}: {_listed(names)}" for what, names in groups.items() if names]


def _refuse(target: str, problems: list[str]) -> None:
    if problems:
        raise ValueError(f"{target} cannot be this model:\n" + "\n".join(f"- {problem}" for problem in problems))


def _listed(items: Iterable[object]) -> str:
    shown = [str(item) for item in items]
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + more
