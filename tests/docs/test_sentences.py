"""The length of sentences in every tracked Markdown file."""

from __future__ import annotations

import subprocess

import pytest

from ..support.checkout import ROOT
from .sentences import sentences_of, words_in

MOST_WORDS = 25


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="runs from a checkout")
def test_sentences_of_tracked_pages_have_at_most_25_words() -> None:
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    pages = [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]
    assert {"README.md", "docs/cli.md", "CHANGELOG.md"} <= set(pages)
    too_long = [
        f"{page}: {words_in(sentence)} words: {sentence}"
        for page in pages
        for sentence in sentences_of((ROOT / page).read_text(encoding="utf-8"))
        if words_in(sentence) > MOST_WORDS
    ]
    assert too_long == [], "\n".join(["a `x` stands for a code span", *too_long])


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two?\nThree\nlines!", ["One.", "Two?", "Three lines!"]),
        (
            "One `a. b`. `code` two. [Link](x.md) three. **Bold** four.",
            ["One x.", "x two.", "Link three.", "**Bold** four."],
        ),
        ("One (e.g. two) ... three. 64 rows.", ["One (e.g. two) ... three.", "64 rows."]),
        ("(One.) Two: three; four.", ["(One.)", "Two: three; four."]),
        ("- one\n  two\n- three\n\n  four\n\nfive", ["one two", "three", "four", "five"]),
        ("1. one\n   - two\n2. three", ["one", "two", "three"]),
        ("One,\n\n    formula = 1\n    more = 2\n\ntwo.", ["One,", "two."]),
        ("- one\n\n      formula = 1\n\n  two", ["one", "two"]),
        ("# Head\n\n| a | b |\n| --- | --- |\n\n<!-- no\nprose -->\none\n\n```python\ntwo\n```", ["one"]),
    ],
)
def test_sentences_of_leaves_out_what_is_not_prose(text: str, sentences: list[str]) -> None:
    assert sentences_of(text) == sentences


@pytest.mark.parametrize(("sentence", "count"), [("A x of 2 x 3.", 6), ("a / b = c - 1", 4), ("**Bold** 20-30 %.", 2)])
def test_words_in_counts_letters_and_digits_between_spaces(sentence: str, count: int) -> None:
    assert words_in(sentence) == count
