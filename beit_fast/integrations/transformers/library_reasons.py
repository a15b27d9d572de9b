"""Why Transformers' own code must run in an accelerated module: what users patched, asked at each call."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.integrations import sdpa_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.beit import modeling_beit

from ...layers.module_hooks import watches_output
from ..library_code import Functions, changed_function, changed_sdpa, library_functions

INDEX = "generate_relative_position_index"
_OURS = f"{__name__.rpartition('.')[0]}.attention_interface"


class FromLibrary(nn.Module):
    """A module whose forward takes the place of Transformers'.

    Attributes:
        library_class: Transformers' class.
        library_forward: its forward, as its file defines it.
    """

    library_class: type[nn.Module]
    library_forward: Functions

    def changed_forward(self) -> str:
        """Return a reason if Transformers' forward was patched, or an empty string."""
        return changed_function(self.library_forward, self.library_class)


class FromLibraryBias(FromLibrary):
    """A bias module whose forward takes the place of Transformers'.

    Attributes:
        library_index: `generate_relative_position_index`, as its file defines it.
    """

    library_index: Functions

    def library_forward_reason(self) -> str:
        """Return why Transformers' own forward must run, or an empty string."""
        if watches_output(self):
            return "has hooks, which expect a dense bias"
        return self.changed_forward() or changed_function(self.library_index, type(self), self)


def attributes_of(original: type[nn.Module]) -> dict[str, Any]:
    """Return the attributes of a subclass of `FromLibrary`, or `FromLibraryBias`."""
    found = {"library_class": original, "library_forward": library_functions(original, "forward")}
    return found | ({"library_index": library_functions(original, INDEX)} if hasattr(original, INDEX) else {})


def attention_function_reason(implementation: str | None) -> str:
    """Return a reason if an attention function is not Transformers'."""
    function = modeling_beit.eager_attention_forward
    if implementation is not None and implementation != "eager":
        function = ALL_ATTENTION_FUNCTIONS.get(implementation, function)
    if function is _SDPA:
        return changed_sdpa()
    if function is _EAGER or function.__module__ == _OURS:
        return ""
    return f"has an attention function for {implementation!r} that is not Transformers' eager or sdpa"


def _own(module: Any, name: str) -> Any:
    function = getattr(module, name, None)  # BEiT before 5.8 has no attention functions
    own = getattr(function, "__globals__", {}).get("__name__") == module.__name__
    return function if own else None


_EAGER = _own(modeling_beit, "eager_attention_forward")
_SDPA = _own(sdpa_attention, "sdpa_attention_forward")
