"""README as the long description of the package, and the citation file."""

import re
import runpy

import pytest

import beit_fast

from ..support.checkout import ROOT

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="runs from a checkout")

README = (ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else ""
URL = "https://example.org/owner/beit_fast"
LINK = re.compile(r"(!?)\[[^\]]*\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def without_relative_links():
    return runpy.run_path(str(ROOT / "repository_links.py"))["without_relative_links"]


def test_relative_links_without_url_are_removed(without_relative_links):
    text = without_relative_links(README, repository_url="")
    assert [target for _, target in LINK.findall(text) if "://" not in target] == []
    assert "![" not in text
    assert "Contributing" in text  # the text of a link remains


def test_relative_links_with_url_become_absolute(without_relative_links):
    text = without_relative_links(README, repository_url=URL)
    assert len(LINK.findall(text)) == len(LINK.findall(README))
    assert all("://" in target for _, target in LINK.findall(text))
    assert f"({URL}/raw/main/benchmarks/results/" in text
    assert f"({URL}/blob/main/docs/training.md#torchcompile)" in text


def test_relative_links_of_page_in_folder_resolve_from_folder(without_relative_links):
    text = without_relative_links("[a](../kernels/README.md) [b](cli.md) [c](#d)", "docs", URL)
    assert text == f"[a]({URL}/blob/main/kernels/README.md) [b]({URL}/blob/main/docs/cli.md) [c](#d)"


def test_relative_links_in_code_blocks_are_unchanged(without_relative_links):
    block = "```python\nx = [a](b)\n```\n"
    assert without_relative_links(block, repository_url="") == block


def test_citation_has_version_and_paper():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == beit_fast.__version__
    assert citation["references"][0]["title"].startswith("BEiT")
