"""Makes the disk caches of `torch.compile` see the Python behind the operators.

AOTAutograd keys a compiled graph by the operators' names and keeps the traced backward with it: after a change of ours
to autograd, fakes or autocast it would go on to serve the old one without a word (seen in torch 2.13). Its keys hold a
tag that is there to break caches, so a digest of our source is added to what the user has put there.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch.compiler.config

from .._version import __version__


def source_tag() -> str:
    """A name for the code that compiled graphs are traced through; the version where there are no source files."""
    folder = Path(__file__).parent
    source = b"".join(file.read_bytes() for file in sorted(folder.rglob("*.py")))
    if not source:
        return f"beit_fast={__version__}"
    return f"beit_fast={hashlib.sha256(source).hexdigest()[:16]}"


def _tag_caches() -> None:
    config = torch.compiler.config
    config.cache_key_tag = " ".join(filter(None, (config.cache_key_tag, source_tag())))


_tag_caches()
