"""A backbone with the arguments, files and outputs of mmsegmentation's `BEiT`; mmsegmentation is not required.

To make a project build it without a change of its configuration:

    from mmseg.registry import MODELS
    from beit_fast.integrations.mmseg import MmsegBeit

    MODELS.register_module(name="BEiT", module=MmsegBeit, force=True)
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..checkpoint.key_mapping import TRUNK_PREFIX
from ..checkpoint.state_dict_names import rename_entries
from ..configuration.beit_config import BeitConfig
from ..models.backbone import BeitBackbone
from ..utils.messages import join_choices, raise_value_error
from ..utils.names import POSITION_INTERPOLATIONS, AttentionImplementation, PatchEmbedImplementation

_ACTIVATIONS = {"GELU": "gelu", "ReLU": "relu"}
_NORM_EPS = 1e-5
"""The default eps of mmcv's norms."""
_FIXED = {"qv_bias": True, "patch_norm": False, "final_norm": False, "num_fcs": 2}
"""Arguments of mmsegmentation that support one value here."""


class MmsegBeit(nn.Module):
    """BEiT's feature maps for mmsegmentation: the arguments of its `BEiT`, and a few more.

    The network is `trunk`, a `BeitBackbone`, which has `set_attn_implementation`, `attention_report`,
    `gradient_checkpointing_enable` and `save_pretrained`. Images of any size are supported: bias tables are resized
    bilinearly. (mmsegmentation supports `img_size` only.)

    `load_state_dict` accepts parameter names of mmsegmentation and unilm. `pretrained` accepts every file that
    `from_pretrained` accepts.

    Args:
        img_size: native size in pixels, an int or (height, width).
        patch_size, in_channels, embed_dims, num_layers, num_heads: sizes.
        mlp_ratio: channels inside the MLP, in units of `embed_dims`.
        out_indices: blocks whose output is returned, counted from 0, in ascending order; negative ones from the last.
        attn_drop_rate, drop_path_rate: dropout of attention weights; stochastic depth of the last block.
        norm_cfg: `dict(type="LN")`, with `eps` (1e-5 as in mmcv; BEiT was trained with 1e-6) and `requires_grad`.
        act_cfg: `dict(type="GELU")` or `"ReLU"`.
        qv_bias, patch_norm, final_norm, num_fcs: True, False, False and 2.
        norm_eval: ignored, because the norms are LayerNorms.
        pretrained, init_cfg: the file for `init_weights`: a path, or `dict(type="Pretrained", checkpoint=path)`.
        init_values: initial value of layer scale.
        feature_pyramid: resize four maps by 4, 2, 1 and 1/2, as the neck `Feature2Pyramid(rescales=[4, 2, 1, 0.5])` of
            mmsegmentation and the backbone of unilm do.
        position_interpolation: resizing of bias tables of `pretrained`: `"geometric"` (mmsegmentation, unilm and timm)
            or `"bilinear"`.
        attn_implementation, patch_embed_implementation: as in `BeitBackbone`.

    Raises:
        TypeError, ValueError: If the backbone cannot be built, with every reason.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        embed_dims: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4,
        out_indices: int | Sequence[int] = -1,
        qv_bias: bool = True,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_cfg: Mapping[str, Any] | None = None,
        act_cfg: Mapping[str, Any] | None = None,
        patch_norm: bool = False,
        final_norm: bool = False,
        num_fcs: int = 2,
        norm_eval: bool = False,
        pretrained: str | os.PathLike[str] | None = None,
        init_values: float = 0.1,
        init_cfg: Mapping[str, Any] | None = None,
        *,
        feature_pyramid: bool = False,
        position_interpolation: str = "geometric",
        attn_implementation: AttentionImplementation | None = None,
        patch_embed_implementation: PatchEmbedImplementation | None = None,
    ) -> None:
        super().__init__()
        norm = {"type": "LN"} | dict(norm_cfg or {})
        activation = dict(act_cfg or {"type": "GELU"})
        indices = [out_indices] if isinstance(out_indices, int) else list(out_indices)
        fixed = {"qv_bias": qv_bias, "patch_norm": patch_norm, "final_norm": final_norm, "num_fcs": num_fcs}
        errors = _fixed_errors(fixed) + _layer_errors(norm, activation, init_values)
        errors += _index_errors(indices, num_layers, feature_pyramid)
        errors += _pretrained_errors(pretrained, init_cfg, position_interpolation)
        raise_value_error("MmsegBeit cannot be built", errors)
        self.out_indices = [index % num_layers for index in indices]
        self.embed_dims, self.norm_eval, self.position_interpolation = embed_dims, norm_eval, position_interpolation
        self.pretrained = init_cfg["checkpoint"] if init_cfg else pretrained
        config = BeitConfig(
            image_size=img_size if isinstance(img_size, int) else tuple(img_size),
            patch_size=patch_size,
            num_channels=in_channels,
            hidden_size=embed_dims,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            intermediate_size=int(mlp_ratio * embed_dims),
            hidden_act=_ACTIVATIONS[activation["type"]],
            attention_probs_dropout_prob=attn_drop_rate,
            drop_path_rate=drop_path_rate,
            layer_norm_eps=norm.get("eps", _NORM_EPS),
            layer_scale_init_value=init_values,
            use_relative_position_bias=True,
            out_indices=[index + 1 for index in self.out_indices],
            add_fpn=feature_pyramid,
        )
        self.trunk = BeitBackbone(config, attn_implementation, patch_embed_implementation)
        _set_norms_trainable(self.trunk, norm.get("requires_grad", True))
        self.register_load_state_dict_pre_hook(_take_other_names)

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Return one contiguous map `[B, E, h, w]` per block of `out_indices`.

        The inputs are images `[B, C, H, W]`.
        """
        return self.trunk(inputs, return_dict=True).feature_maps

    def init_weights(self, pretrained: str | os.PathLike[str] | None = None) -> None:
        """Load `pretrained` or the constructor's file; without a file initialize all parameters.

        Bias tables are resized to `img_size`. Parameters change in place, as mmengine requires.

        Raises:
            FileNotFoundError, ValueError: As in `BeitBackbone.from_pretrained`; the parameters do not change.
        """
        source = self.pretrained if pretrained is None else pretrained
        if source is None:
            self.trunk.init_weights()
            return
        config = self.trunk.config
        loaded = BeitBackbone.from_pretrained(
            source,
            config=config,
            image_size=config.image_size,
            position_interpolation=self.position_interpolation,
        )
        self.trunk.load_state_dict(loaded.state_dict())


def _fixed_errors(given: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}={value} is not supported (expected {_FIXED[name]})"
        for name, value in given.items()
        if value != _FIXED[name]
    ]


def _set_norms_trainable(trunk: nn.Module, trainable: bool) -> None:
    for module in trunk.modules():
        if isinstance(module, nn.LayerNorm):
            module.requires_grad_(trainable)


def _layer_errors(norm: Mapping[str, Any], activation: Mapping[str, Any], init_values: float) -> list[str]:
    errors = []
    if norm["type"] != "LN" or set(norm) - {"type", "eps", "requires_grad"}:
        errors.append(f"norm_cfg={dict(norm)} is not supported (expected type 'LN' with eps and requires_grad)")
    if set(activation) != {"type"} or activation["type"] not in _ACTIVATIONS:
        accepted = join_choices(_ACTIVATIONS)
        errors.append(f"act_cfg={dict(activation)} is not supported (expected type {accepted})")
    if not init_values > 0:
        errors.append(f"init_values={init_values} is not supported (expected a number above 0)")
    return errors


def _index_errors(indices: Sequence[int], layers: int, feature_pyramid: bool) -> list[str]:
    errors = []
    counted = [index % layers for index in indices if -layers <= index < layers]
    if len(counted) != len(indices) or counted != sorted(set(counted)) or not counted:
        errors.append(f"out_indices={list(indices)} is not supported (expected 0 to {layers - 1}, ascending)")
    if feature_pyramid and len(indices) != 4:
        errors.append(f"feature_pyramid=True with {len(indices)} out_indices is not supported (expected 4)")
    return errors


def _pretrained_errors(pretrained: Any, init_cfg: Any, interpolation: str) -> list[str]:
    errors = []
    if init_cfg and pretrained is not None:
        errors.append("pretrained and init_cfg were both passed (expected one of them)")
    is_mapping = isinstance(init_cfg, Mapping)
    if init_cfg and not (is_mapping and init_cfg.get("type") == "Pretrained" and "checkpoint" in init_cfg):
        errors.append(f"init_cfg={init_cfg} is not supported (expected dict(type='Pretrained', checkpoint=...))")
    if interpolation not in POSITION_INTERPOLATIONS:
        accepted = join_choices(POSITION_INTERPOLATIONS)
        errors.append(f"position_interpolation={interpolation!r} is not supported (expected {accepted})")
    return errors


def _take_other_names(module: nn.Module, state_dict: dict[str, Any], prefix: str, *unused: Any) -> None:
    """Rename parameters of other formats to those of `MmsegBeit`.

    The formats are those of mmsegmentation, unilm, timm and the hub.
    """
    rename_entries(
        state_dict,
        prefix,
        lambda names: not any(name.startswith("trunk.") for name in names),
        lambda name: f"trunk.{name.removeprefix(TRUNK_PREFIX)}",
    )
