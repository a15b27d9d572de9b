"""Parameter groups with a learning rate for each layer."""

from __future__ import annotations

import math
import re
from typing import Any

from torch import nn

from ..configuration.fields import is_number
from ..utils.messages import FieldError, describe, full_name, raise_errors

_WRAPPERS = r"^(?:(?:module|_orig_mod|base_model|model|backbone)\.)*(?:beit\.)?"
_EMBEDDINGS = re.compile(_WRAPPERS + r"embeddings\.")
_LAYER = re.compile(_WRAPPERS + r"(?:encoder\.layer|layers)\.(\d+)\.")
_NOT_DECAYED = ("cls_token", "mask_token", "position_embeddings", "relative_position_bias_table")


def layer_decay_parameter_groups(
    model: nn.Module, lr: float, decay: float = 0.65, weight_decay: float = 0.05
) -> list[dict[str, Any]]:
    """Group the parameters of a BEiT model by layer and weight decay.

    The embeddings are layer 0, block `i` is layer `i + 1`, and all others are the last layer, `blocks + 1`: heads,
    final norms and a shared relative position bias. The learning rate of a layer is `lr * decay ** (blocks + 1 -
    layer)`, as in unilm's fine-tuning; the paper uses 0.65 for base and 0.75 for large models.

    Vectors and biases have no weight decay, which includes norms and layer scale. Neither have the CLS and mask
    tokens, position embeddings and relative position bias tables. timm excludes the tables too; unilm decays the mask
    token, and the tables unless told otherwise.

    Args:
        model: A model of this package or a BEiT model of Transformers, also one that DistributedDataParallel, PEFT or
            `torch.compile` wraps, or that is the `backbone` of another model. Freeze parameters before the call.
        lr: Learning rate of the last layer.
        decay: Factor from one layer to the one before it, above 0 and at most 1.
        weight_decay: Weight decay of the matrices.

    Returns:
        Groups with `params`, `lr`, `weight_decay` and `name`, from layer 0 on, for any torch optimizer. Each trainable
        parameter is in one group. A parameter that several modules share belongs to the first of them.

    Raises:
        TypeError, ValueError: If numbers do not fit; the error lists all of them.
        ValueError: If the model is not a BEiT model, or has no trainable parameter.
    """
    _check_numbers({"lr": lr, "decay": decay, "weight_decay": weight_decay})
    names = [name for name, _ in model.named_parameters()]
    blocks = max((int(match[1]) + 1 for name in names if (match := _LAYER.match(name))), default=0)
    if blocks == 0 or not any(map(_EMBEDDINGS.match, names)):
        raise ValueError(
            f"{full_name(type(model))} is not a BEiT model: it has no parameters `embeddings.*` with `encoder.layer.*` "
            "or `layers.*` (expected a model of beit_fast or a Beit class of Transformers)"
        )
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layer_of(name, blocks)
        is_decayed = parameter.ndim > 1 and name.rpartition(".")[2] not in (*_NOT_DECAYED, "bias")
        group = groups.setdefault(
            (layer, not is_decayed),
            {
                "params": [],
                "lr": lr * decay ** (blocks + 1 - layer),
                "weight_decay": weight_decay if is_decayed else 0.0,
                "name": f"layer_{layer}_{'decay' if is_decayed else 'no_decay'}",
            },
        )
        group["params"].append(parameter)
    if not groups:
        raise ValueError(f"{full_name(type(model))} has no trainable parameter; all have requires_grad=False")
    return [groups[key] for key in sorted(groups)]


def layer_of(name: str, blocks: int) -> int:
    """Return the layer of a parameter: 0 for embeddings, block + 1, or `blocks + 1`."""
    if _EMBEDDINGS.match(name):
        return 0
    match = _LAYER.match(name)
    return blocks + 1 if match is None else int(match[1]) + 1


def _check_numbers(numbers: dict[str, float]) -> None:
    """Raise one error that lists every number out of range."""
    expected = {
        "lr": "a finite number from 0",
        "decay": "a number above 0 and at most 1",
        "weight_decay": "a finite number from 0",
    }
    errors = []
    for name, value in numbers.items():
        fits = is_number(value) and (0 < value <= 1 if name == "decay" else 0 <= value < math.inf)
        if not fits:
            errors.append(FieldError(f"{describe(name, value)} (expected {expected[name]})", not is_number(value)))
    raise_errors("layer_decay_parameter_groups", errors)
