"""Base class of an operator's random inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor


@dataclass
class OperatorCase:
    """Inputs of an operator and gradients of its outputs, one field each."""

    FIXED: ClassVar[tuple[str, ...]] = ()
    """Tensors whose dtype `to` does not change."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the fields that are tensors, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def map(self, function: Callable[[Tensor], Tensor], *names: str) -> Self:
        """Copy the case with `function` applied to the named tensors.

        Names of fields that are None are ignored.
        """
        mapped: dict[str, Any] = {name: function(x) for name, x in self.tensors().items() if name in names}
        return replace(self, **mapped)

    def to(self, dtype: torch.dtype) -> Self:
        """Convert the floating-point tensors to another dtype, without their history."""
        numbers = [name for name, x in self.tensors().items() if x.is_floating_point() and name not in self.FIXED]
        return self.map(lambda x: x.detach().to(dtype), *numbers)
