"""Relative links of Markdown pages, for readers without the repository.

setup.py makes the long description of the package from README with it, and docs/site_links.py the site's pages.
"""

from __future__ import annotations

import posixpath
import re

REPOSITORY_URL = ""
"""Address of the repository, such as `https://example.org/owner/beit_fast`.

While it is empty, pictures are left out and relative links become plain text."""

BRANCH = "main"

_FENCE = re.compile(r"(^ *```.*?^ *```[^\S\n]*$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?P<picture>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^()\s]+)\)")


def without_relative_links(markdown: str, folder: str = "", repository_url: str = REPOSITORY_URL) -> str:
    """Replace a page's relative links by repository addresses or plain text.

    Args:
        markdown: the page.
        folder: the folder of the page, from the root of the repository.
        repository_url: the repository; empty if it has no address.
    """
    parts = _FENCE.split(markdown)
    text = "".join(part if number % 2 else _replace(part, folder, repository_url) for number, part in enumerate(parts))
    return re.sub(r"\n{3,}", "\n\n", text)


def _replace(markdown: str, folder: str, repository_url: str) -> str:
    def link(match: re.Match[str]) -> str:
        picture, text, target = match["picture"], match["text"], match["target"]
        if "://" in target:
            return match[0]
        if target.startswith("#"):
            return match[0]
        if not repository_url:
            return "" if picture else text
        path = posixpath.normpath(posixpath.join(folder, target))
        kind = "raw" if picture else "blob"
        return f"{picture}[{text}]({repository_url}/{kind}/{BRANCH}/{path})"

    return _LINK.sub(link, markdown)
