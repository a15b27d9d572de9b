"""Map parameter names of every checkpoint format to those of the hub.

Full hub names have the prefix `beit.` for the trunk and none for heads. Formats: Transformers 4.x (files on the hub)
and 5.x (in memory), Data2VecVision, DiT (plain BEiT), timm and unilm, mmsegmentation and unilm's ADE20k.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..utils.messages import join_some
from .wrappers import REMEDY, strip_wrappers

CheckpointFormat = Literal["transformers", "transformers5", "data2vec", "timm", "mmseg"]
"""Formats by their names of parameters; `"timm"` includes unilm, and `"mmseg"` unilm's ADE20k."""

TRUNK_PREFIX = "beit."
_TRUNK_PARTS = ("embeddings.", "encoder.", "pooler.")
_Rules = Sequence[tuple[str, str]]

_TABLE_IN_LAYER = "attention.attention.relative_position_bias."

_TRANSFORMERS_5: _Rules = (
    (r"^(beit\.)?layers\.(\d+)\.attention\.q_proj\.", r"\1encoder.layer.\2.attention.attention.query."),
    (r"^(beit\.)?layers\.(\d+)\.attention\.k_proj\.", r"\1encoder.layer.\2.attention.attention.key."),
    (r"^(beit\.)?layers\.(\d+)\.attention\.v_proj\.", r"\1encoder.layer.\2.attention.attention.value."),
    (r"^(beit\.)?layers\.(\d+)\.attention\.o_proj\.", r"\1encoder.layer.\2.attention.output.dense."),
    (r"^(beit\.)?layers\.(\d+)\.relative_position_bias\.", rf"\1encoder.layer.\2.{_TABLE_IN_LAYER}"),
    (r"^(beit\.)?layers\.(\d+)\.mlp\.fc1\.", r"\1encoder.layer.\2.intermediate.dense."),
    (r"^(beit\.)?layers\.(\d+)\.mlp\.fc2\.", r"\1encoder.layer.\2.output.dense."),
    (r"^(beit\.)?layers\.(\d+)\.(lambda_|layernorm_)", r"\1encoder.layer.\2.\3"),
    (r"^(beit\.)?shared_position_bias\.", r"\1encoder.relative_position_bias."),
    (r"^fpn\.fpn1\.conv_transpose1\.", "fpn1.0."),
    (r"^fpn\.fpn1\.normalization\.", "fpn1.1."),
    (r"^fpn\.fpn1\.conv_transpose2\.", "fpn1.3."),
    (r"^fpn\.fpn2\.", "fpn2.0."),
    (r"^decode_head\.psp_bottleneck\.", "decode_head.bottleneck."),
    (r"^decode_head\.psp_modules\.blocks\.(\d+)\.conv\.", r"decode_head.psp_modules.\1.1."),
    (r"^(decode_head\..*|auxiliary_head\..*)\.convolution\.", r"\1.conv."),
    (r"^(decode_head\..*|auxiliary_head\..*)\.normalization\.", r"\1.bn."),
)  # fmt: skip

_LAYER = "beit.encoder.layer"
_HEADS_OF_MMSEG: _Rules = (
    (r"^(decode_head|auxiliary_head)\.conv_seg\.", r"\1.classifier."),
    (r"^neck\.upsample_4x\.", "fpn1."),
    (r"^neck\.upsample_2x\.", "fpn2."),
    (r"^backbone\.(fpn\d)\.", r"\1."),
    (r"^backbone\.", ""),
)
_UNILM_BLOCK: _Rules = (
    (r"^cls_token$", "beit.embeddings.cls_token"),
    (r"^mask_token$", "beit.embeddings.mask_token"),
    (r"^pos_embed$", "beit.embeddings.position_embeddings"),
    (r"^patch_embed\.(?:proj|projection)\.", "beit.embeddings.patch_embeddings.projection."),
    (r"^rel_pos_bias\.", "beit.encoder.relative_position_bias."),
    (r"^blocks\.(\d+)\.attn\.q_bias$", rf"{_LAYER}.\1.attention.attention.query.bias"),
    (r"^blocks\.(\d+)\.attn\.v_bias$", rf"{_LAYER}.\1.attention.attention.value.bias"),
    (r"^blocks\.(\d+)\.attn\.relative_position", rf"{_LAYER}.\1.{_TABLE_IN_LAYER}relative_position"),
    (r"^blocks\.(\d+)\.attn\.proj\.", rf"{_LAYER}.\1.attention.output.dense."),
    (r"^blocks\.(\d+)\.norm1\.", rf"{_LAYER}.\1.layernorm_before."),
    (r"^blocks\.(\d+)\.norm2\.", rf"{_LAYER}.\1.layernorm_after."),
    (r"^blocks\.(\d+)\.mlp\.fc1\.", rf"{_LAYER}.\1.intermediate.dense."),
    (r"^blocks\.(\d+)\.mlp\.fc2\.", rf"{_LAYER}.\1.output.dense."),
    (r"^blocks\.(\d+)\.gamma_([12])$", rf"{_LAYER}.\1.lambda_\2"),
    (r"^fc_norm\.", "beit.pooler.layernorm."),
    (r"^head\.", "classifier."),
)  # fmt: skip
_MMSEG_BLOCK: _Rules = (
    (r"^layers\.(\d+)\.ln([12])\.", r"blocks.\1.norm\2."),
    (r"^layers\.(\d+)\.ffn\.layers\.0\.0\.", r"blocks.\1.mlp.fc1."),
    (r"^layers\.(\d+)\.ffn\.layers\.1\.", r"blocks.\1.mlp.fc2."),
    (r"^layers\.(\d+)\.", r"blocks.\1."),
    (r"^ln1\.", "norm."),
)
_TO_TIMM: _Rules = (
    (r"^beit\.embeddings\.cls_token$", "cls_token"),
    (r"^beit\.embeddings\.position_embeddings$", "pos_embed"),
    (r"^beit\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^beit\.encoder\.relative_position_bias\.", "rel_pos_bias."),
    (r"^beit\.encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"^(blocks\.\d+)\.attention\.attention\.query\.bias$", r"\1.attn.q_bias"),
    (r"^(blocks\.\d+)\.attention\.attention\.value\.bias$", r"\1.attn.v_bias"),
    (r"^(blocks\.\d+)\.attention\.attention\.relative_position_bias\.", r"\1.attn."),
    (r"^(blocks\.\d+)\.attention\.output\.dense\.", r"\1.attn.proj."),
    (r"^(blocks\.\d+)\.layernorm_before\.", r"\1.norm1."),
    (r"^(blocks\.\d+)\.layernorm_after\.", r"\1.norm2."),
    (r"^(blocks\.\d+)\.intermediate\.dense\.", r"\1.mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"^(blocks\.\d+)\.lambda_([12])$", r"\1.gamma_\2"),
    (r"^beit\.pooler\.layernorm\.", "fc_norm."),
    (r"^beit\.layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)  # fmt: skip
_PACKED = re.compile(r"^blocks\.(\d+)\.attn\.qkv\.weight$")

OTHER_TASKS = (
    "classifier.",
    "lm_head.",
    "layernorm.",
    "decode_head.",
    "auxiliary_head.",
    "fpn1.",
    "fpn2.",
    "beit.pooler.",
    "beit.layernorm.",
    "beit.embeddings.mask_token",
    "cls_pt_",
)
"""Prefixes of the full names of heads and pooling, which a model of another task does not have."""


def to_hub_names(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], CheckpointFormat]:
    """Rename tensors to full hub names and drop index buffers.

    Prefixes of wrappers are removed, see `strip_wrappers`.

    Returns:
        The tensors and their format.

    Raises:
        ValueError: If the names are not those of a supported format, a prefix is ambiguous, or there are tensors beside
            the model.
    """
    state = {key: tensor for key, tensor in tensors.items() if not key.endswith("relative_position_index")}
    model = strip_wrappers(state)
    if model.left_aside:
        raise ValueError(f"there are names beside the BEiT model: {join_some(model.left_aside, 5)}: {REMEDY}")
    state = model.tensors
    checkpoint_format = format_of(state)
    if checkpoint_format in ("timm", "mmseg"):
        state = _from_unilm(_renamed(state, (*_HEADS_OF_MMSEG, *_MMSEG_BLOCK) if checkpoint_format == "mmseg" else ()))
    else:
        # Names of version 4 match no rule. Data2VecVision mixes both versions.
        state = _renamed(state, ((r"^data2vec_vision\.", TRUNK_PREFIX), *_TRANSFORMERS_5))
    masked_modeling = any(key.startswith("lm_head.") for key in state)
    return {full_name(key, masked_modeling): tensor for key, tensor in state.items()}, checkpoint_format


def rename_keys(tensors: Mapping[str, Tensor], key_mapping: Mapping[str, str] | None) -> dict[str, Tensor]:
    """Rename tensors by regular expressions, each in turn: the argument `key_mapping` of `from_pretrained`.

    Raises:
        ValueError: If two names become equal, or a pattern or replacement is not valid.
    """
    try:
        renamed = _renamed(tensors, tuple((key_mapping or {}).items()))
    except (re.error, TypeError) as error:
        expected = "regular expressions and their replacements"
        raise ValueError(f"key_mapping={key_mapping} is not supported (expected {expected}): {error}") from error
    if len(renamed) < len(tensors):
        raise ValueError(f"key_mapping={dict(key_mapping or {})} gives {len(tensors) - len(renamed)} names twice")
    return renamed


def to_timm_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors from full hub names to timm's.

    Query, key and value are packed into one tensor.
    """
    state = dict(tensors)
    for key in [key for key in state if key.endswith(".attention.attention.query.weight")]:
        parts = [state.pop(key.replace("query", name)) for name in ("query", "key", "value")]
        layer = key.removeprefix(f"{_LAYER}.").partition(".")[0]
        state[f"blocks.{layer}.attn.qkv.weight"] = torch.cat(parts)
    return _renamed(state, _TO_TIMM)


def format_of(keys: Iterable[str]) -> CheckpointFormat:
    """Detect the format of a checkpoint from its names.

    Raises:
        ValueError: If no supported format has such names.
    """
    keys = list(keys)

    def has(pattern: str) -> bool:
        return any(re.match(pattern, key) for key in keys)

    if has(r"backbone\.(layers|blocks)\.\d+\.attn\.") or has(r"layers\.\d+\.attn\.qkv\."):
        return "mmseg"
    if has(r"blocks\.\d+\.attn\."):
        return "timm"
    if has(r"(beit\.)?layers\.\d+\.attention\.q_proj\."):
        return "transformers5"
    if has(r"data2vec_vision\."):
        return "data2vec"
    if has(r"(beit\.)?encoder\.layer\.\d+\.attention\."):
        return "transformers"
    shown = join_some(keys, 5) or "no names"
    raise ValueError(
        "the checkpoint is not a BEiT model: expected names of Transformers (encoder.layer.0.attention...), "
        f"Data2VecVision, timm or unilm (blocks.0.attn...) or mmsegmentation (backbone.layers.0.attn...), got {shown}"
    )


def full_name(key: str, masked_modeling: bool = False) -> str:
    """Return the full hub name of a parameter.

    A name of a bare trunk or backbone gets the prefix of the trunk. `layernorm` belongs to the head of masked image
    modeling if there is one, and to the trunk otherwise.
    """
    trunk = key.startswith(_TRUNK_PARTS) or (key.startswith("layernorm.") and not masked_modeling)
    return TRUNK_PREFIX + key if trunk else key


def head_of(name: str) -> str | None:
    """Return the prefix in `OTHER_TASKS` that a full name has, or None."""
    return next((head for head in OTHER_TASKS if name.startswith(head)), None)


def share_table_among_layers(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Copy a shared table to each layer, as unilm does before fine-tuning."""
    shared = "beit.encoder.relative_position_bias.relative_position_bias_table"
    own = _TABLE_IN_LAYER + "relative_position_bias_table"
    copies = {f"{_LAYER}.{layer}.{own}": state[shared].clone() for layer in range(layers)}
    return {key: tensor for key, tensor in state.items() if key != shared} | copies


def _renamed(state: Mapping[str, Tensor], rules: _Rules) -> dict[str, Tensor]:
    """Every rule is applied in turn to every name."""
    renamed = {}
    for key, tensor in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        renamed[key] = tensor
    return renamed


def _from_unilm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename from unilm and split packed projections; `norm` belongs to an `lm_head` if there is one."""
    norm = "layernorm." if any(key.startswith("lm_head.") for key in state) else "beit.layernorm."
    unpacked: dict[str, Tensor] = {}
    for key, tensor in state.items():
        packed = _PACKED.match(key)
        if packed is None:
            unpacked[key] = tensor
            continue
        for name, part in zip(("query", "key", "value"), torch.chunk(tensor, 3), strict=True):
            unpacked[f"{_LAYER}.{packed[1]}.attention.attention.{name}.weight"] = part.clone()
    return _renamed(unpacked, (*_UNILM_BLOCK, (r"^norm\.", norm)))
