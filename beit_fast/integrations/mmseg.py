"""BEiT as mmsegmentation builds and calls its backbones; mmsegmentation itself is not needed.

`MmsegBeit` takes the arguments of mmsegmentation's `BEiT`, reads its files and gives what its `forward` gives. To make
a project build it instead, without a change to its configuration:

    from mmseg.registry import MODELS
    from beit_fast.integrations.mmseg import MmsegBeit

    MODELS.register_module(name="BEiT", module=MmsegBeit, force=True)
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..checkpoint.key_mapping import TRUNK_PREFIX, to_hub_names
from ..configuration.beit_config import BeitConfig
from ..models.backbone import BeitBackbone
from ..utils.names import POSITION_INTERPOLATIONS

_ACTIVATIONS = {"GELU": "gelu", "ReLU": "relu"}
_NORM_EPS = 1e-5
"""What mmcv gives a norm whose configuration names no eps."""
_FIXED = {"qv_bias": True, "patch_norm": False, "final_norm": False, "num_fcs": 2}
"""Arguments of mmsegmentation that have one value here."""


class MmsegBeit(nn.Module):
    """BEiT's feature maps for mmsegmentation: the arguments of its `BEiT`, and a few more.

    The network is `trunk`, a `BeitBackbone`, which has `set_attn_implementation`, `attention_report`,
    `gradient_checkpointing_enable` and `save_pretrained`. Where mmsegmentation takes images of `img_size` only, this
    one takes any, with bias tables resized bilinearly.

    `load_state_dict` takes the names of mmsegmentation and unilm too, beside its own; `pretrained` takes
    every file that `from_pretrained` takes.

    Args:
        img_size: native size in pixels, an int or (height, width).
        patch_size, in_channels, embed_dims, num_layers, num_heads: sizes.
        mlp_ratio: channels inside the MLP, in units of `embed_dims`.
        out_indices: blocks whose output is returned, counted from 0, in ascending order; negative ones from the last.
        attn_drop_rate, drop_path_rate: dropout of attention weights; stochastic depth of the last block.
        norm_cfg: `dict(type="LN")`, with `eps` (1e-5 as in mmcv; BEiT was trained with 1e-6) and `requires_grad`.
        act_cfg: `dict(type="GELU")` or `"ReLU"`.
        qv_bias, patch_norm, final_norm, num_fcs: True, False, False and 2.
        norm_eval: without effect, as the norms are LayerNorms.
        pretrained, init_cfg: what `init_weights` reads: a path, or `dict(type="Pretrained", checkpoint=path)`.
        init_values: where layer scale starts.
        feature_pyramid: bring four maps to 4, 2, 1 and 1/2 times the resolution, as the neck
            `Feature2Pyramid(rescales=[4, 2, 1, 0.5])` does in mmsegmentation and the backbone itself in unilm.
        position_interpolation: how bias tables of `pretrained` are resized, `"geometric"` (mmsegmentation and unilm,
            linear between the places as in timm) or `"bilinear"`.
        attn_implementation, patch_embed_implementation: as in `BeitBackbone`.

    Raises:
        TypeError, ValueError: what cannot be built, with every reason.
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
        attn_implementation: str | None = None,
        patch_embed_implementation: str | None = None,
    ) -> None:
        super().__init__()
        norm = {"type": "LN"} | dict(norm_cfg or {})
        activation = dict(act_cfg or {"type": "GELU"})
        indices = [out_indices] if isinstance(out_indices, int) else list(out_indices)
        fixed = {"qv_bias": qv_bias, "patch_norm": patch_norm, "final_norm": final_norm, "num_fcs": num_fcs}
        problems = _fixed_problems(fixed) + _layer_problems(norm, activation)
        problems += _index_problems(indices, num_layers, feature_pyramid)
        problems += _pretrained_problems(pretrained, init_cfg, position_interpolation)
        if not init_values > 0:
            problems.append(f"init_values={init_values}; accepted: above 0")
        if problems:
            raise ValueError("MmsegBeit cannot be built:\n" + "\n".join(f"- {problem}" for problem in problems))
        self.out_indices = [index % num_layers for index in indices]
        self.embed_dims = embed_dims
        self.norm_eval = norm_eval
        self.pretrained = init_cfg["checkpoint"] if init_cfg else pretrained
        self.position_interpolation = position_interpolation
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
        for module in self.trunk.modules():
            if isinstance(module, nn.LayerNorm):
                module.requires_grad_(norm.get("requires_grad", True))
        self.register_load_state_dict_pre_hook(_take_other_names)

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Images `[B, C, H, W]` to one contiguous map `[B, E, h, w]` for every block of `out_indices`."""
        return self.trunk(inputs, return_dict=True).feature_maps

    def init_weights(self, pretrained: str | os.PathLike[str] | None = None) -> None:
        """Read `pretrained`, or the file given to the constructor, or draw every parameter anew where there is none.

        Bias tables are resized to `img_size`. Parameters are changed in place, as mmengine wants it.

        Raises:
            FileNotFoundError, ValueError: as `BeitBackbone.from_pretrained`; the parameters are as they were.
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


def _fixed_problems(given: Mapping[str, Any]) -> list[str]:
    return [f"{name}={value}; accepted: {_FIXED[name]}" for name, value in given.items() if value != _FIXED[name]]


def _layer_problems(norm: Mapping[str, Any], activation: Mapping[str, Any]) -> list[str]:
    problems = []
    if norm["type"] != "LN" or set(norm) - {"type", "eps", "requires_grad"}:
        problems.append(f"norm_cfg={dict(norm)}; accepted: type 'LN', with eps and requires_grad")
    if set(activation) != {"type"} or activation["type"] not in _ACTIVATIONS:
        problems.append(f"act_cfg={dict(activation)}; accepted: type {' or '.join(map(repr, _ACTIVATIONS))}")
    return problems


def _index_problems(indices: Sequence[int], layers: int, feature_pyramid: bool) -> list[str]:
    problems = []
    counted = [index % layers for index in indices if -layers <= index < layers]
    if len(counted) != len(indices) or counted != sorted(set(counted)) or not counted:
        problems.append(f"out_indices={list(indices)}; accepted: blocks from 0 to {layers - 1} in ascending order")
    if feature_pyramid and len(indices) != 4:
        problems.append(f"feature_pyramid=True with {len(indices)} out_indices; accepted: 4")
    return problems


def _pretrained_problems(pretrained: Any, init_cfg: Any, interpolation: str) -> list[str]:
    problems = []
    if init_cfg and pretrained is not None:
        problems.append("both pretrained and init_cfg; accepted: one of them")
    is_mapping = isinstance(init_cfg, Mapping)
    if init_cfg and not (is_mapping and init_cfg.get("type") == "Pretrained" and "checkpoint" in init_cfg):
        problems.append(f"init_cfg={init_cfg}; accepted: dict(type='Pretrained', checkpoint=...)")
    if interpolation not in POSITION_INTERPOLATIONS:
        accepted = " or ".join(map(repr, POSITION_INTERPOLATIONS))
        problems.append(f"position_interpolation={interpolation!r}; accepted: {accepted}")
    return problems


def _take_other_names(module: nn.Module, state_dict: dict[str, Any], prefix: str, *unused: Any) -> None:
    """Parameters under names of mmsegmentation, unilm, timm or the hub, brought to those of `MmsegBeit`."""
    given = {key.removeprefix(prefix): tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
    if any(key.startswith("trunk.") for key in given):
        return
    try:
        renamed, _ = to_hub_names(given)
    except ValueError:  # of no known format: load_state_dict says which names it misses
        return
    for key in given:
        del state_dict[prefix + key]
    state_dict.update({f"{prefix}trunk.{key.removeprefix(TRUNK_PREFIX)}": tensor for key, tensor in renamed.items()})
