"""Gradient checkpointing: recompute blocks in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..layers.block import BeitEncoder


class GradientCheckpointingMixin:
    """Recomputation of blocks in the backward pass, and inputs that require gradients."""

    def _encoders(self) -> Iterator[BeitEncoder]:
        model: Any = self
        return (module for module in model.modules() if isinstance(module, BeitEncoder))

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        *,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute layers in the backward pass instead of storing their activations.

        Args:
            gradient_checkpointing_kwargs: Arguments of `torch.utils.checkpoint.checkpoint`. `use_reentrant` is False
                by default.
            every_n_layers: Recompute the first layer and every n-th after it. The others store their activations.
            offload: Keep the inputs of recomputed layers in host memory until the backward pass.

        Raises:
            ValueError: If `every_n_layers` is not a positive int.
        """
        if not isinstance(every_n_layers, int) or every_n_layers < 1:
            raise ValueError(f"{every_n_layers=} is not supported (expected a positive int)")
        for encoder in self._encoders():
            encoder.gradient_checkpointing = True
            encoder.checkpoint_options = {"use_reentrant": False} | (gradient_checkpointing_kwargs or {})
            encoder.checkpoint_every = every_n_layers
            encoder.checkpoint_offload = offload
            encoder._gradient_checkpointing_func = None

    def gradient_checkpointing_disable(self) -> None:
        """Store activations again."""
        for encoder in self._encoders():
            encoder.gradient_checkpointing = False

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """`gradient_checkpointing_enable` under its name in Transformers 5."""
        self.gradient_checkpointing_enable(
            activation_checkpointing_kwargs, every_n_layers=every_n_layers, offload=offload
        )

    def activation_checkpointing_disable(self) -> None:
        """Store activations again."""
        self.gradient_checkpointing_disable()

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether layers are recomputed in the backward pass."""
        return any(encoder.gradient_checkpointing for encoder in self._encoders())

    @property
    def is_activation_checkpointing(self) -> bool:
        """`is_gradient_checkpointing` under its name in Transformers 5."""
        return self.is_gradient_checkpointing

    def enable_input_require_grads(self) -> None:
        """Let the patch embeddings require gradients.

        Adapters on frozen weights need it with gradient checkpointing.
        """
        self.disable_input_require_grads()
        model: Any = self
        model._require_grads_hook = model.get_input_embeddings().register_forward_hook(_require_grad)

    def disable_input_require_grads(self) -> None:
        """Undo `enable_input_require_grads`."""
        hook = vars(self).pop("_require_grads_hook", None)
        if hook is not None:
            hook.remove()


def _require_grad(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output if output.requires_grad else output.requires_grad_()
