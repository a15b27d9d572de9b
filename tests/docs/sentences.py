"""The sentences of a Markdown text, and their number of words."""

from __future__ import annotations

import re

from .pages import without_fences

_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_CODE_SPAN = re.compile(r"(?<!`)(`+)(?!`)(?:(?!\n\s*\n).)+?(?<!`)\1(?!`)", re.DOTALL)
_LINK = re.compile(r"!?\[((?:[^\[\]]|\[[^\]]*\])*)\]\([^()\s]+\)")
_NO_PROSE = re.compile(r"\s*(?:\||#{1,6} |:::|<|\[[^\]]+\]: )")
_ITEM = re.compile(r" *(?:[-*+]|\d+[.)]) +")
_END = re.compile(r"(?<=[.!?])(?<!\.\.)[)\"'*_\]]*\s+")
_ABBREVIATIONS = ("e.g.", "i.e.", "etc.", "cf.", "vs.")


def sentences_of(text: str) -> list[str]:
    """Split the prose of a Markdown text into sentences.

    A code span becomes `x`, and a link its text. Tables, fences, headings, comments and indented formulas are left out.
    The end of a paragraph or list item ends a sentence; a colon or semicolon does not.
    """
    text = _CODE_SPAN.sub("x", _COMMENT.sub("", without_fences(text)))
    return [sentence for paragraph in _paragraphs_of(_LINK.sub(r"\1", text)) for sentence in _split(paragraph)]


def words_in(sentence: str) -> int:
    """Count the parts between spaces that have a letter or a digit."""
    return sum(any(character.isalnum() for character in part) for part in sentence.split())


def _paragraphs_of(text: str) -> list[str]:
    """The paragraphs and list items of a text, each in one line."""
    paragraphs: list[list[str]] = []
    column = 0  # where the text of the last list item begins
    for block in re.split(r"\n(?:[ \t]*\n)+", text.strip("\n")):
        lines = block.splitlines()
        indent = len(block) - len(block.lstrip())
        if indent >= column + 4:
            continue
        if lines and not _ITEM.match(lines[0]) and indent < column:
            column = 0
        paragraphs.append([])
        for line in lines:
            if item := _ITEM.match(line):
                column = item.end()
                paragraphs.append([line[column:]])
            elif _NO_PROSE.match(line):
                paragraphs.append([])
            else:
                paragraphs[-1].append(line.strip())
    return [" ".join(lines) for lines in paragraphs if lines]


def _split(paragraph: str) -> list[str]:
    sentences, start = [], 0
    for end in _END.finditer(paragraph):
        if not paragraph[start : end.start()].endswith(_ABBREVIATIONS):
            sentences.append(paragraph[start : end.end()].strip())
            start = end.end()
    return [*sentences, *filter(None, [paragraph[start:].strip()])]
