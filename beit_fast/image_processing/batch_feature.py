"""The dict that image processors return."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor


class BatchFeature(dict[str, Any]):
    """Dict with attribute access: `features.pixel_values`, `features["labels"]`, `model(**features)`."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"{type(self).__name__} has {list(self)}, not {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Apply `Tensor.to` to every tensor in place. A dtype applies to floating-point tensors only."""
        for name, value in self.items():
            self[name] = [_moved(item, args, kwargs) for item in value] if type(value) is list else value
            if isinstance(value, Tensor):
                self[name] = _moved(value, args, kwargs)
        return self


def _moved(value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not isinstance(value, Tensor):
        return value
    if not value.dtype.is_floating_point:
        args = tuple(arg for arg in args if not isinstance(arg, torch.dtype))
        kwargs = {name: argument for name, argument in kwargs.items() if name != "dtype"}
    return value.to(*args, **kwargs) if args or kwargs else value
