"""Run the Python blocks of one page in one namespace, as written: `python run_page.py PAGE`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.docs.pages import blocks_of


def main(page: str) -> None:
    """Run the blocks with the page's file name and line numbers in tracebacks."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    blocks = blocks_of(page, "python")
    if any("import timm" in block.text for block in blocks):
        from tests.support import timm_reference  # noqa: F401  timm imports torchvision, which is not installed
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks:
        source = "\n" * (block.line - 1) + block.text  # tracebacks have the line numbers of the page
        exec(compile(source, page, "exec"), namespace)


if __name__ == "__main__":
    main(sys.argv[1])
