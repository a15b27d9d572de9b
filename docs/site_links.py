"""Hook of mkdocs: pictures and links that point outside docs/."""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from repository_links import without_relative_links  # noqa: E402

PICTURES = "benchmarks/results"
_OUTSIDE = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(\.\./[^()\s]+\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pictures of the benchmarks to the site."""
    for path in sorted((ROOT / PICTURES).glob("*.png")):
        files.append(File.generated(config, f"{PICTURES}/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point pictures to the site. Point every other link outside docs/ to the repository."""
    folder = posixpath.dirname(f"docs/{page.file.src_uri}")
    markdown = markdown.replace(f"](../{PICTURES}/", f"]({PICTURES}/") if folder == "docs" else markdown
    markdown = re.sub(rf"(?<!!)(\[[^\]]*\]\(){PICTURES}/([^()\s]+\.(?!png)\w+\))", rf"\1../{PICTURES}/\2", markdown)
    return _OUTSIDE.sub(lambda match: without_relative_links(match[0], folder), markdown)
