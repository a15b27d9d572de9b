"""`register()`: Transformers' Auto classes build this package's models, and its own BEiT takes `"triton"`.

Each part keeps how it is undone. Nothing is touched before `register()` is called.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ...layers.attention import BeitRelativePositionBias
from ...layers.block import BeitLayer
from ...layers.embeddings import BeitEmbeddings
from ...models.base import BeitPreTrainedModel
from . import auto_classes
from .attention_interface import enter_attention
from .monkey_patch import replace_attribute, set_item

_PARAMETER_OWNERS = (BeitEmbeddings, BeitLayer, BeitRelativePositionBias)

_lock = threading.Lock()
_registered: dict[str, ExitStack] = {}


def register(*, models: bool = True, backbones: bool = True, attention: bool = True) -> None:
    """Let Transformers build and run BEiT by this package, from now on in this process; `unregister` undoes it.

    A second call adds what the first left out, and is otherwise without effect. Models that exist already stay what
    they are, and can be given `"triton"` by `set_attn_implementation`.

    Args:
        models: `AutoModel`, `AutoModelForImageClassification` and `AutoModelForSemanticSegmentation`, and pipelines
            through them, give this package's classes for `model_type="beit"`, so for every BEiT on the hub, with
            Transformers' output classes. Transformers' own stay under their names, such as `transformers.BeitModel`.
        backbones: `AutoBackbone`, and through it UperNet, DPT, ZoeDepth and whatever else takes a `backbone_config`,
            likewise. `model_type="beit_fast"` in a configuration then also means this package's classes. Transformers
            5.23 writes a backbone's shared bias table under a name that 4.57 and this do not know: where a file is of
            that kind, give `from_pretrained` the argument `key_mapping={r"^backbone\\.beit\\.": "backbone."}`.
        attention: `attn_implementation="triton"` is valid for Transformers' own BEiT: attention is
            `rel_pos_attention`, which reads bias tables, and no dense bias is built. With Transformers 5 anywhere that
            it takes the argument; with 4.57, and for Data2VecVision, where a layer's class follows from it, for models
            built afterwards.
    """
    asked = {"models": models, "backbones": backbones, "attention": attention}
    with _lock:
        for part, enter in _ENTRANCES.items():
            if asked[part] and part not in _registered:
                with ExitStack() as undo:  # undoes what was done where the rest fails
                    enter(undo)
                    _registered[part] = undo.pop_all()


def unregister() -> None:
    """Undo `register()`. Models that were built in between stay and work on, but for Transformers' with `"triton"`."""
    with _lock:
        while _registered:
            _registered.popitem()[1].close()


def with_transformers_outputs(model: BeitPreTrainedModel) -> BeitPreTrainedModel:
    """The model itself, giving Transformers' output classes from now on, as what `register()` has Auto classes build.

    For code that asks for the class, such as the image segmentation pipeline.

    Raises:
        TypeError: a model that no Auto class builds.
    """
    return auto_classes.adopt(model)


def _enter_models(undo: ExitStack) -> None:
    _enter_config(undo)
    _enter_class(undo, transformers.AutoModel, auto_classes.BeitModel)
    _enter_class(undo, transformers.AutoModelForImageClassification, auto_classes.BeitForImageClassification)
    _enter_class(undo, transformers.AutoModelForSemanticSegmentation, auto_classes.BeitForSemanticSegmentation)


def _enter_backbones(undo: ExitStack) -> None:
    _enter_config(undo)
    _enter_class(undo, transformers.AutoBackbone, auto_classes.BeitBackbone)
    draw = transformers.PreTrainedModel._initialize_weights
    replace_attribute(undo, transformers.PreTrainedModel, "_initialize_weights", _drawing_ours_too(draw))


_ENTRANCES = {"models": _enter_models, "backbones": _enter_backbones, "attention": enter_attention}


def _enter_config(undo: ExitStack) -> None:
    config_class = auto_classes.BeitFastConfig
    set_item(undo, CONFIG_MAPPING._extra_content, config_class.model_type, config_class)


def _enter_class(undo: ExitStack, auto_class: Any, model_class: type) -> None:
    """What `auto_class.register` does with `exist_ok=True`, which has no way back."""
    for config_class in (transformers.BeitConfig, auto_classes.BeitFastConfig):
        set_item(undo, auto_class._model_mapping._extra_content, config_class, model_class)


def _drawing_ours_too(draw: Callable[..., None]) -> Callable[..., None]:
    """Transformers' initialisation of what a checkpoint lacks, for parameters of this package's modules as well.

    It builds a model without values, fills in those of the checkpoint, and has its own submodels draw the rest; our
    backbone is none of them, and what it lacks would stay uninitialised memory.
    """

    def initialize_weights(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        if isinstance(module, _PARAMETER_OWNERS) and not getattr(module, "_is_hf_initialized", False):
            for owner in _models_around(module, self):
                _draw_missing(owner, module)
        draw(self, module, *args, **kwargs)

    return initialize_weights


def _models_around(module: nn.Module, outermost: nn.Module) -> Iterator[BeitPreTrainedModel]:
    ours = (part for part in outermost.modules() if isinstance(part, BeitPreTrainedModel))
    return (model for model in ours if any(part is module for part in model.modules()))


@torch.no_grad()
def _draw_missing(owner: BeitPreTrainedModel, module: nn.Module) -> None:
    """Initialise the module's own parameters but those that Transformers marks as loaded."""
    loaded = [
        (parameter, parameter.clone())
        for parameter in module.parameters(recurse=False)
        if getattr(parameter, "_is_hf_initialized", False)
    ]
    owner._init_weights(module)
    for parameter, values in loaded:
        parameter.copy_(values)
