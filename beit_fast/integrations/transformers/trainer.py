"""Transformers' `Trainer`: an error without labels, and `config.json`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import ModuleType
from typing import Any

from ...checkpoint.infer_config import copy_config
from ...models.base import BeitPreTrainedModel
from ...models.beit import BeitForMaskedImageModeling
from ...ops.import_hooks import when_imported
from . import auto_classes
from .monkey_patch import replace_attribute


def enter_trainer(undo: ExitStack) -> None:
    """Patch `Trainer` until `undo` is closed.

    If it is not imported yet, it is patched after its import.
    """
    patches = undo.enter_context(ExitStack())

    def patch(module: ModuleType) -> None:
        trainer = module.Trainer
        replace_attribute(patches, trainer, "compute_loss", _requiring_labels(trainer.compute_loss))
        replace_attribute(patches, trainer, "_save", _writing_config(trainer._save))

    undo.callback(when_imported("transformers.trainer", patch))


def _requiring_labels(compute_loss: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `compute_loss` to name what masked image modeling lacks.

    Batches of Transformers' `run_mim.py` have masks and no labels.
    """

    @functools.wraps(compute_loss)
    def compute_loss_of_labels(self: Any, model: Any, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        is_masked = inputs.get("bool_masked_pos") is not None and inputs.get("labels") is None
        if is_masked and getattr(self, "compute_loss_func", None) is None:
            _raise_without_labels(_own_model(self))
        return compute_loss(self, model, inputs, *args, **kwargs)

    return compute_loss_of_labels


def _writing_config(save: Callable[..., None]) -> Callable[..., None]:
    """Wrap `_save` to write `config.json` too.

    `Trainer` writes it for its own classes only.
    """

    @functools.wraps(save)
    def save_with_config(self: Any, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        save(self, output_dir, *args, **kwargs)
        model = _own_model(self)
        if self.args.should_save and isinstance(model, BeitPreTrainedModel):
            config = copy_config(model.config, architectures=[type(model).__name__], dtype=model.dtype)
            config.save_pretrained(self.args.output_dir if output_dir is None else output_dir)

    return save_with_config


def _own_model(trainer: Any) -> Any:
    """Return the model of a trainer without wrappers such as DDP."""
    return trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)


def _raise_without_labels(model: Any) -> None:
    """Raise ValueError if a model of this package makes no labels."""
    if hasattr(model, "get_base_model"):  # of PEFT
        model = model.get_base_model()
    if not isinstance(model, BeitForMaskedImageModeling):
        return
    errors = []
    if model.config.visual_tokenizer is None:
        errors.append("its configuration names no tokenizer (expected visual_tokenizer=FOLDER in config.json)")
    if not isinstance(model, auto_classes.BeitForMaskedImageModeling):
        errors.append("its class makes no labels (expected a model of AutoModelForMaskedImageModeling)")
    if errors:
        raise ValueError(
            f"{type(model).__name__} has bool_masked_pos and no labels, so there is no loss: {', and '.join(errors)}. "
            "Or pass labels, such as those of beit_fast.training.MaskedImageCollator"
        )
