"""Names that generic code expects of any configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Self


class SingleConfig:
    """A configuration without nested ones."""

    sub_configs: ClassVar[dict[str, type]] = {}
    base_model_tp_plan: ClassVar[dict[str, str] | None] = None  # `beit_fast.parallel` has one of PyTorch's form

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the fields."""
        fields: Any = self
        return iter(fields.to_dict())

    def get_text_config(self, *args: Any, **kwargs: Any) -> Self:
        """Return the configuration itself: no part of it is for text."""
        return self
