"""This package's models as Transformers' Auto classes build them: its arguments in, its output classes out.

Importing this imports Transformers.
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

try:
    from transformers.backbone_utils import BackboneType
except ImportError:  # 4.57
    from transformers.utils.backbone_utils import BackboneType

# What an Auto class or a pipeline passes on that says nothing about what to load.
_UNUSED = (
    "_from_auto",
    "_from_pipeline",
    "_commit_hash",
    "trust_remote_code",
    "code_revision",
    "low_cpu_mem_usage",
)


class BeitFastConfig(transformers.BeitConfig):
    """Transformers' `BeitConfig` under a model type of its own, which after `register()` always means this package.

    For one process that has both backbones, or a `config.json` that names this one: `{"model_type": "beit_fast", ...}`.
    """

    model_type = "beit_fast"


def own_config(config: Any) -> beit_fast.BeitConfig:
    """A configuration of Transformers as this package's, with the attention implementation that was asked for."""
    if isinstance(config, beit_fast.BeitConfig):
        return config
    values = config.to_dict() | {"model_type": beit_fast.BeitConfig.model_type}
    asked = getattr(config, "_attn_implementation", None)
    return beit_fast.BeitConfig.from_dict(values, attn_implementation=asked)


class TransformersConventions(beit_fast.BeitPreTrainedModel):
    """Classmethods with the arguments that Transformers' Auto classes pass."""

    @classmethod
    def _from_config(
        cls,
        config: Any,
        attn_implementation: str | None = None,
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
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *, config: Any = None, **kwargs: Any
    ) -> Any:
        """See `beit_fast.BeitPreTrainedModel.from_pretrained`; arguments of Transformers that are None do not count."""
        _refuse_adapter(kwargs.pop("adapter_kwargs", None))
        if kwargs.get("use_safetensors"):
            del kwargs["use_safetensors"]  # safetensors come first here too
        given = {name: value for name, value in kwargs.items() if name not in _UNUSED and value is not None}
        config = own_config(config) if isinstance(config, transformers.PretrainedConfig) else config
        return super().from_pretrained(pretrained_model_name_or_path, config=config, **given)


def _refuse_adapter(adapter_kwargs: Mapping[str, Any] | None) -> None:
    path = (adapter_kwargs or {}).get("_adapter_model_path")
    if path is not None:
        raise ValueError(
            f"{os.fspath(path)!r} holds a PEFT adapter: load the model that it was trained on, "
            "then peft.PeftModel.from_pretrained(model, path)"
        )


def _giving(output_class: type, forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` with Transformers' output class, which its pipelines look for; tuples stay tuples."""

    @functools.wraps(forward)
    def forward_with_their_output(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        return output if type(output) is tuple else output_class(**output)

    return forward_with_their_output


class BeitModel(TransformersConventions, beit_fast.BeitModel):
    """`beit_fast.BeitModel` that gives Transformers' output class."""

    forward = _giving(BeitModelOutputWithPooling, beit_fast.BeitModel.forward)


class BeitForImageClassification(TransformersConventions, beit_fast.BeitForImageClassification):
    """`beit_fast.BeitForImageClassification` that gives Transformers' output class."""

    forward = _giving(modeling_outputs.ImageClassifierOutput, beit_fast.BeitForImageClassification.forward)


class BeitForSemanticSegmentation(TransformersConventions, beit_fast.BeitForSemanticSegmentation):
    """`beit_fast.BeitForSemanticSegmentation` that gives Transformers' output class."""

    forward = _giving(modeling_outputs.SemanticSegmenterOutput, beit_fast.BeitForSemanticSegmentation.forward)


class BeitBackbone(TransformersConventions, beit_fast.BeitBackbone):
    """`beit_fast.BeitBackbone` that gives Transformers' output class."""

    backbone_type = BackboneType.TRANSFORMERS
    forward = _giving(modeling_outputs.BackboneOutput, beit_fast.BeitBackbone.forward)


def adopt(model: Any) -> Any:
    """Exchange the class of a model of this package for the one here that gives Transformers' output class."""
    made: dict[type, type] = {
        cls.__bases__[-1]: cls
        for cls in (BeitModel, BeitForImageClassification, BeitForSemanticSegmentation, BeitBackbone)
    }
    if type(model) not in made.values():
        if type(model) not in made:
            accepted = ", ".join(cls.__name__ for cls in made)
            raise TypeError(
                f"a {type(model).__module__}.{type(model).__name__} was given; accepted: {accepted} of beit_fast"
            )
        model.__class__ = made[type(model)]
    return model
