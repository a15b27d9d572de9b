"""The error of an optimized model under `torch.compile` and `torch.export`."""

from __future__ import annotations

import torch

_MESSAGE = "an optimized model does not support torch.compile or torch.export: pass the model it was made from"


def raise_if_compiling() -> None:
    """Raise if the caller is being compiled or exported.

    Raises:
        RuntimeError: If torch compiles or exports the calling code.
    """
    if torch.compiler.is_compiling():
        # Without fullgraph=True, Dynamo reruns a frame that raises in eager mode, where nothing is compiled. After a
        # graph break only the rest of the frame is rerun, and it raises.
        torch._dynamo.graph_break(msg=_MESSAGE)
        raise RuntimeError(_MESSAGE)
