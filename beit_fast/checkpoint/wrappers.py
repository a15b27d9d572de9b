"""Names in state dicts of training scripts: prefixes, averages, and tensors beside the model."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from ..utils.messages import join_some

AVERAGED = re.compile(
    r"(?<![a-z])(?<!no_)(?<!non_)(?<!not_)(?<!without_)(?<!before_)(?:ema|swa|avg|averaged?)(?![a-z])", re.IGNORECASE
)
"""Keys and prefixes of averaged weights, such as `model_ema`, `averaged_model` and `swa_state_dict`."""

REMEDY = "pass the tensors of one model as state_dict=..., or rename them by key_mapping={r'^prefix\\.': ''}"

_COUNTER = "n_averaged"  # a buffer of torch.optim.swa_utils.AveragedModel
_WRAPPED = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Every name of an attention layer, in any format; the optional `beit.` belongs to the format.
_BEIT = re.compile(
    r"(?<![^.])(?:"
    r"backbone\.(?:layers|blocks)\.\d+\.attn\.|layers\.\d+\.attn\.qkv\.|blocks\.\d+\.attn\.|"
    r"(?:beit\.)?layers\.\d+\.attention\.q_proj\.|data2vec_vision\.|(?:beit\.)?encoder\.layer\.\d+\.attention\."
    r")"
)
_HEADS = ("classifier.", "head.", "lm_head.", "decode_head.")
# First components of names outside the attention layers, in any format.
_PARTS = frozenset(
    (
        *("data2vec_vision", "beit", "backbone", "embeddings", "encoder", "layers", "blocks", "shared_position_bias"),
        *("cls_token", "mask_token", "pos_embed", "patch_embed", "rel_pos_bias", "norm", "fc_norm", "layernorm"),
        *("pooler", "classifier", "head", "lm_head", "decode_head", "auxiliary_head", "neck"),
        *("fpn", "fpn1", "fpn2", "fpn3", "fpn4"),
    )
)


class OneModel(NamedTuple):
    """The tensors of one model, and the names of the others.

    `average` is the prefix of averaged weights if these were chosen.
    """

    tensors: dict[str, Tensor]
    left_aside: tuple[str, ...]
    average: str | None = None


def is_name_of_beit(name: object) -> bool:
    """Whether a name is that of an attention layer of BEiT.

    It may have any format and any prefix.
    """
    return isinstance(name, str) and _BEIT.search(name) is not None


def without_wrappers(name: str) -> str:
    """Remove the prefixes of `torch.compile`, FSDP and activation checkpointing."""
    return _WRAPPED.sub("", name)


def averaging_counter(names: Collection[str]) -> str | None:
    """The name of the counter that `torch.optim.swa_utils.AveragedModel` keeps beside averaged weights."""
    return next((name for name in names if name.rpartition(".")[2] == _COUNTER), None)


def choose_average(tensors: Mapping[str, Tensor], use_ema: bool | None, is_averaged: bool) -> OneModel:
    """Choose between a model and its average in one state dict.

    Their names differ in a prefix, such as `model.` and `ema_model.`.

    Args:
        tensors: The state dict.
        use_ema: Which to read. None does not choose.
        is_averaged: Whether the state dict is that of an averaging module, which may also have the model itself.
    """
    prefixes = _prefixes(tensors)
    averages = [prefix for prefix in prefixes if AVERAGED.search(prefix)]
    others = [prefix for prefix in prefixes if prefix not in averages]
    if len(averages) != 1 or len(others) > 1:
        return OneModel(dict(tensors), ())
    if not others:
        return OneModel(dict(tensors), (), averages[0].rstrip("."))
    if use_ema is None and not is_averaged:
        return OneModel(dict(tensors), ())
    reads_average = is_averaged or bool(use_ema)
    dropped = others[0] if reads_average else averages[0]
    counter = None if reads_average else averaging_counter(tensors)
    kept = {name: tensor for name, tensor in tensors.items() if _owner(name, prefixes) != dropped and name != counter}
    left_aside = tuple(name for name in tensors if name not in kept)
    return OneModel(kept, left_aside, averages[0].rstrip(".") if reads_average else None)


def strip_wrappers(tensors: Mapping[str, Tensor]) -> OneModel:
    """Remove from all names what wrappers add: DDP, `torch.compile`, FSDP, Lightning, `AveragedModel`.

    A prefix is removed if every name has it. Losses and metrics beside the model may lack it: they are left aside.
    Names without BEiT's attention layers are returned unchanged.

    Raises:
        ValueError: If it is not clear whether names without the prefix belong to the model. Also if several prefixes
            have a BEiT model, or two names become equal. The error lists the names or prefixes.
    """
    counter = averaging_counter(tensors)
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        key = without_wrappers(name)
        if key in state:
            raise ValueError(f"the checkpoint contains {key!r} twice, once inside a wrapper ({name!r}): {REMEDY}")
        if name != counter:
            state[key] = tensor
    prefixes = _prefixes(state)
    if len(prefixes) > 1:
        found_prefixes = ", ".join(repr(prefix) if prefix else "no prefix" for prefix in prefixes)
        choice = "pass use_ema=True or use_ema=False, or " if any(map(AVERAGED.search, prefixes)) else ""
        raise ValueError(f"the checkpoint contains several BEiT models, under {found_prefixes}: {choice}{REMEDY}")
    prefix = prefixes[0] if prefixes else ""
    model = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    others = {key: tensor for key, tensor in state.items() if not key.startswith(prefix)}
    unclear = _possible_parts(others, model)
    if unclear:
        raise ValueError(
            f"the checkpoint contains a BEiT model under the prefix {prefix!r}, and other names without it: "
            f"{join_some(unclear, 5)}. It is not clear whether they belong to the model: {REMEDY}"
        )
    return OneModel(model, tuple(others))


def _possible_parts(others: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> list[str]:
    """Return names beside a model that may belong to it.

    They have the name of a part of BEiT; or the model has no head, and they have a dimension of its width.
    """
    has_head = any(key.startswith(_HEADS) for key in model)
    widths = {tensor.shape[-1] for key, tensor in model.items() if key.rpartition(".")[2] == "cls_token"}
    return [
        name
        for name, tensor in others.items()
        if name.partition(".")[0] in _PARTS or not (has_head or (widths and widths.isdisjoint(tensor.shape)))
    ]


def _prefixes(names: Collection[str]) -> list[str]:
    """Return the prefixes of BEiT's attention layers, without wrappers of single modules."""
    keys = (_WRAPPED.sub("", name) for name in names)
    return sorted({key[: found.start()] for key in keys if (found := _BEIT.search(key))})


def _owner(name: str, prefixes: Sequence[str]) -> str | None:
    """Return the longest prefix that a name has."""
    key = _WRAPPED.sub("", name)
    return max((prefix for prefix in prefixes if key.startswith(prefix)), key=len, default=None)
