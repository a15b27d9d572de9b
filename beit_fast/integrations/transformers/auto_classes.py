"""Subclasses of this package's models for Transformers' Auto classes.

They have the arguments and output classes that the Auto classes expect.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
import transformers
from transformers import modeling_outputs
from transformers.models.beit.modeling_beit import BeitModelOutputWithPooling

import beit_fast
from beit_fast.configuration.conversion import as_beit_config

from ...utils.names import AttentionImplementation
from .token_labels import making_labels

try:
    from transformers.backbone_utils import BackboneType
except ImportError:  # 4.57
    from transformers.utils.backbone_utils import BackboneType

# Arguments of Auto classes and pipelines that do not change what is loaded.
_UNUSED = ("_from_auto", "_from_pipeline", "_commit_hash", "code_revision")
# Formats that Transformers 4 read; its scripts pass False.
_OTHER_FORMATS = ("from_tf", "from_flax")


class BeitFastConfig(transformers.BeitConfig):
    """Transformers' `BeitConfig` with `model_type="beit_fast"`, which after `register()` means this package.

    Use it in a process with both backbones, or in a `config.json`: `{"model_type": "beit_fast", ...}`.
    """

    model_type = "beit_fast"


def own_config(config: Any) -> beit_fast.BeitConfig:
    """Convert a Transformers configuration, with its requested attention implementation."""
    own = as_beit_config(config, beit_fast.BeitConfig.model_type)
    requested = getattr(config, "_attn_implementation", None)  # Auto classes pass a request for "sdpa" only here
    return own if requested is None else own.with_implementations(attn_implementation=requested)


class TransformersConventions(beit_fast.BeitPreTrainedModel):
    """Class methods with the arguments that Transformers' Auto classes pass."""

    @classmethod
    def _from_config(
        cls,
        config: Any,
        attn_implementation: AttentionImplementation | None = None,
        dtype: torch.dtype | str | None = None,
        *,
        torch_dtype: torch.dtype | str | None = None,
        **kwargs: Any,
    ) -> Self:
        return super()._from_config(
            own_config(config), attn_implementation, torch_dtype if dtype is None else dtype, **kwargs
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *, config: Any = None, **kwargs: Any
    ) -> Any:
        """See `beit_fast.BeitPreTrainedModel.from_pretrained`; arguments of Transformers that are None are ignored.

        So are `from_tf=False` and `from_flax=False`.
        """
        _raise_on_adapter(kwargs.pop("adapter_kwargs", None))
        _raise_on_other_formats(kwargs)
        unused = (*_UNUSED, *_OTHER_FORMATS)
        given = {name: value for name, value in kwargs.items() if name not in unused and value is not None}
        config = own_config(config) if isinstance(config, transformers.PretrainedConfig) else config
        return super().from_pretrained(pretrained_model_name_or_path, config=config, **given)


def _raise_on_adapter(adapter_kwargs: Mapping[str, Any] | None) -> None:
    path = (adapter_kwargs or {}).get("_adapter_model_path")
    if path is not None:
        raise ValueError(
            f"{os.fspath(path)!r} holds a PEFT adapter: load the model that it was trained on, then call "
            "peft.PeftModel.from_pretrained(model, path)"
        )


def _raise_on_other_formats(kwargs: Mapping[str, Any]) -> None:
    asked = [f"{name}=True" for name in _OTHER_FORMATS if kwargs.get(name)]
    if asked:
        raise ValueError(f"{' and '.join(asked)} is not supported (expected a checkpoint in safetensors or of PyTorch)")


def _returning(output_class: type, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a forward to return Transformers' output class; tuples stay tuples."""

    @functools.wraps(forward)
    def forward_with_their_output(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        return output if type(output) is tuple else output_class(**output)

    return forward_with_their_output


class BeitModel(TransformersConventions, beit_fast.BeitModel):
    """`beit_fast.BeitModel` that returns Transformers' output class."""

    forward = _returning(BeitModelOutputWithPooling, beit_fast.BeitModel.forward)


class BeitForMaskedImageModeling(TransformersConventions, beit_fast.BeitForMaskedImageModeling):
    """`beit_fast.BeitForMaskedImageModeling` that returns Transformers' output class.

    If its configuration names a `visual_tokenizer`, it makes the labels of a mask that comes without labels.
    """

    forward = _returning(modeling_outputs.MaskedLMOutput, making_labels(beit_fast.BeitForMaskedImageModeling.forward))


class BeitForImageClassification(TransformersConventions, beit_fast.BeitForImageClassification):
    """`beit_fast.BeitForImageClassification` that returns Transformers' output class."""

    forward = _returning(modeling_outputs.ImageClassifierOutput, beit_fast.BeitForImageClassification.forward)


class BeitForSemanticSegmentation(TransformersConventions, beit_fast.BeitForSemanticSegmentation):
    """`beit_fast.BeitForSemanticSegmentation` that returns Transformers' output class."""

    forward = _returning(modeling_outputs.SemanticSegmenterOutput, beit_fast.BeitForSemanticSegmentation.forward)


class BeitBackbone(TransformersConventions, beit_fast.BeitBackbone):
    """`beit_fast.BeitBackbone` that returns Transformers' output class."""

    backbone_type = BackboneType.TRANSFORMERS
    forward = _returning(modeling_outputs.BackboneOutput, beit_fast.BeitBackbone.forward)


def adopt(model: Any) -> Any:
    """Set a model's class to the subclass with Transformers' output class."""
    made: dict[type, type] = {
        cls.__bases__[-1]: cls
        for cls in (
            BeitModel,
            BeitForMaskedImageModeling,
            BeitForImageClassification,
            BeitForSemanticSegmentation,
            BeitBackbone,
        )
    }
    if type(model) not in made.values():
        if type(model) not in made:
            accepted = ", ".join(cls.__name__ for cls in made)
            raise TypeError(
                f"{type(model).__module__}.{type(model).__name__} is not supported (expected {accepted} of beit_fast)"
            )
        model.__class__ = made[type(model)]
    return model
