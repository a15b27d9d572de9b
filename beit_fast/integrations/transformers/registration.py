"""`register()`: Transformers' Auto classes build this package's models, and Transformers' BEiT accepts `"triton"`.

Nothing is patched before `register()` is called, and `unregister()` undoes every patch.
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
from ...ops.dispatch import attention
from . import auto_classes
from .attention_interface import enter_attention
from .monkey_patch import replace_attribute, set_item
from .trainer import enter_trainer

_PARAMETER_OWNERS = (BeitEmbeddings, BeitLayer, BeitRelativePositionBias)

_lock = threading.Lock()
_registered: dict[str, ExitStack] = {}


def register(*, models: bool = True, backbones: bool = True, attention: bool = True) -> None:
    """Make Transformers build and run BEiT with this package, in this process; `unregister` undoes it.

    A second call adds the parts that the first left out. Existing models do not change, but accept `"triton"` in
    `set_attn_implementation`.

    Args:
        models: `AutoModel`, `AutoModelForMaskedImageModeling`, `AutoModelForImageClassification`,
            `AutoModelForSemanticSegmentation` and pipelines build this package's classes for `model_type="beit"`, with
            Transformers' output classes. Transformers' own classes keep their names, such as `transformers.BeitModel`.
            With a `visual_tokenizer` in the configuration, masked image modeling makes its own labels. `Trainer`
            writes `config.json` of this package's models, and names what masked image modeling without labels lacks.
        backbones: `AutoBackbone` does the same, and with it UperNet, DPT, ZoeDepth and other models with a
            `backbone_config`. `model_type="beit_fast"` in a configuration then means this package's classes.
            `set_attn_implementation` of such a model reaches its backbone.
            Transformers 5.24 saves a backbone's shared bias table under a name that 4.57 and this package do not read.
            For such a file pass `key_mapping={r"^backbone\\.beit\\.": "backbone."}` to `from_pretrained`.
        attention: `attn_implementation="triton"` is valid for Transformers' own BEiT classes. Attention is then
            `rel_pos_attention`, and no dense bias is built. With 4.57, and for Data2VecVision, it takes effect for
            models that are built afterwards.
    """
    asked = {"models": models, "backbones": backbones, "attention": attention}
    with _lock:
        for part, enter in _ENTRANCES.items():
            if asked[part] and part not in _registered:
                with ExitStack() as undo:  # undone if a later step fails
                    enter(undo)
                    _registered[part] = undo.pop_all()


def unregister() -> None:
    """Undo `register()`. Models built in between keep working, except Transformers' models with `"triton"`."""
    with _lock:
        while _registered:
            _registered.popitem()[1].close()


def with_transformers_outputs(model: BeitPreTrainedModel) -> BeitPreTrainedModel:
    """Make a model of this package return Transformers' output classes; returns the model.

    For code that checks the class of outputs, such as the image segmentation pipeline.

    Raises:
        TypeError: If the model's class is not one that `register()` adds to the Auto classes.
    """
    return auto_classes.adopt(model)


def _enter_models(undo: ExitStack) -> None:
    _enter_config(undo)
    _enter_class(undo, transformers.AutoModel, auto_classes.BeitModel)
    _enter_class(undo, transformers.AutoModelForMaskedImageModeling, auto_classes.BeitForMaskedImageModeling)
    _enter_class(undo, transformers.AutoModelForImageClassification, auto_classes.BeitForImageClassification)
    _enter_class(undo, transformers.AutoModelForSemanticSegmentation, auto_classes.BeitForSemanticSegmentation)
    enter_trainer(undo)


def _enter_backbones(undo: ExitStack) -> None:
    _enter_config(undo)
    _enter_class(undo, transformers.AutoBackbone, auto_classes.BeitBackbone)
    draw = transformers.PreTrainedModel._initialize_weights
    replace_attribute(undo, transformers.PreTrainedModel, "_initialize_weights", _initializing_our_modules(draw))
    change = transformers.PreTrainedModel.set_attn_implementation
    replace_attribute(undo, transformers.PreTrainedModel, "set_attn_implementation", _changing_our_backbones(change))


_ENTRANCES = {"models": _enter_models, "backbones": _enter_backbones, "attention": enter_attention}


def _enter_config(undo: ExitStack) -> None:
    config_class = auto_classes.BeitFastConfig
    set_item(undo, CONFIG_MAPPING._extra_content, config_class.model_type, config_class)


def _enter_class(undo: ExitStack, auto_class: Any, model_class: type) -> None:
    """Register a class so that the registration can be undone.

    Otherwise it is the same as `auto_class.register(exist_ok=True)`.
    """
    for config_class in (transformers.BeitConfig, auto_classes.BeitFastConfig):
        set_item(undo, auto_class._model_mapping._extra_content, config_class, model_class)


def _initializing_our_modules(draw: Callable[..., None]) -> Callable[..., None]:
    """Patch Transformers' initialization of missing parameters to cover this package's modules.

    Transformers builds a model without values, loads the checkpoint, and initializes the rest only in submodels of its
    own classes. Missing parameters of our backbone would stay uninitialized memory.
    """

    def initialize_weights(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        if isinstance(module, _PARAMETER_OWNERS) and not getattr(module, "_is_hf_initialized", False):
            for owner in _models_around(module, self):
                _initialize_missing(owner, module)
        draw(self, module, *args, **kwargs)

    return initialize_weights


def _changing_our_backbones(change: Callable[..., None]) -> Callable[..., None]:
    """Patch Transformers' choice of attention to cover this package's backbones.

    Transformers changes only submodels of its own classes.
    """

    def set_attn_implementation(self: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        backbones = list(_requested_for_backbones(self, attn_implementation))
        for _, requested in backbones:
            attention.check_implementation(requested)
        change(self, attn_implementation, *args, **kwargs)
        for backbone, requested in backbones:
            backbone.set_attn_implementation(requested)

    return set_attn_implementation


def _requested_for_backbones(model: nn.Module, request: Any) -> Iterator[tuple[BeitPreTrainedModel, Any]]:
    """Yield this package's models inside a model, with their requested implementation."""
    for parent in model.modules():
        children = [] if isinstance(parent, BeitPreTrainedModel) else parent.children()
        for child in children:
            if not isinstance(child, BeitPreTrainedModel):
                continue
            if not isinstance(request, dict):
                yield child, request
            elif parent is model and "backbone_config" in request:
                yield child, request["backbone_config"]


def _models_around(module: nn.Module, outermost: nn.Module) -> Iterator[BeitPreTrainedModel]:
    ours = (part for part in outermost.modules() if isinstance(part, BeitPreTrainedModel))
    return (model for model in ours if any(part is module for part in model.modules()))


@torch.no_grad()
def _initialize_missing(owner: BeitPreTrainedModel, module: nn.Module) -> None:
    """Initialize a module's own parameters, except those that Transformers marks as loaded."""
    loaded = [
        (parameter, parameter.clone())
        for parameter in module.parameters(recurse=False)
        if getattr(parameter, "_is_hf_initialized", False)
    ]
    owner._init_weights(module)
    for parameter, values in loaded:
        parameter.copy_(values)
