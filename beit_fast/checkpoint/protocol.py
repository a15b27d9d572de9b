"""The part of a model that loading and saving use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import nn

from ..configuration.beit_config import BeitConfig


class PretrainedModel(Protocol):
    """A model as `BeitPreTrainedModel` defines it; every such class is an `nn.Module`."""

    config: BeitConfig
    _no_split_modules: ClassVar[list[str]]

    def __init__(
        self,
        config: BeitConfig,
        attn_implementation: str | None = None,
        patch_embed_implementation: str | None = None,
        **options: Any,
    ) -> None: ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""

    def state_dict(self, *, keep_vars: bool = False) -> dict[str, Any]:
        """`nn.Module.state_dict`."""

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """`nn.Module.load_state_dict`."""

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """`nn.Module.named_modules`."""

    def eval(self) -> Self:
        """`nn.Module.eval`."""

    def _init_weights(self, module: nn.Module) -> None:
        """Initialize the parameters that `module` itself owns."""
