"""Names that generic code asks of any configuration."""

from __future__ import annotations

from typing import Any, ClassVar, Self


class SingleConfig:
    """A configuration without nested ones."""

    sub_configs: ClassVar[dict[str, type]] = {}

    def get_text_config(self, *args: Any, **kwargs: Any) -> Self:
        """Return the configuration itself: no part of it is for text."""
        return self
