"""Add a digest of the operators' source to `torch.compile` cache keys.

AOTAutograd keys a compiled graph by the operators' names and stores the traced backward with it. After a change to the
autograd, fake or autocast functions here it would silently reuse the old backward (seen in torch 2.13). Its keys
include a user-defined tag, so a digest of the source is appended to that tag.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch.compiler.config

from ..utils.version import __version__


def source_tag() -> str:
    """Digest of the operators' source; the package's version if there are no source files."""
    folder = Path(__file__).parent
    source = b"".join(file.read_bytes() for file in sorted(folder.rglob("*.py")))
    if not source:
        return f"beit_fast={__version__}"
    return f"beit_fast={hashlib.sha256(source).hexdigest()[:16]}"


def _tag_caches() -> None:
    config = torch.compiler.config
    config.cache_key_tag = " ".join(filter(None, (config.cache_key_tag, source_tag())))


_tag_caches()
