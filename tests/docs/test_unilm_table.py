"""The tables of unilm's flags in docs/training.md are those of the parser."""

from __future__ import annotations

import pytest

from beit_fast.cli.unilm_flags import FLAGS, UnilmFlag

from ..support.checkout import ROOT

PAGE = ROOT / "docs" / "training.md"


def effect(flag: UnilmFlag) -> str:
    """Say what a flag does that is not an option of the same name."""
    if flag.effect == "option":
        return f"`{flag.target}`"
    if flag.effect == "configuration":
        value = "the value" if flag.parse is not None else flag.value
        return f"`{flag.target}`: {value}"
    if flag.effect == "ignored":
        return f"no effect: {flag.note}"
    if flag.effect == "refused":
        values = " or ".join(f"`{value}`" if value != "" else "empty" for value in flag.accepted)
        return f"refused{f', unless {values}' if flag.accepted else ''}: {flag.note}"
    return flag.note


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def tables() -> str:
    """Return both tables of the page."""
    lines = ["| command | options of the same name, with `_` or `-` |", "|---|---|"]
    for commands, title in (
        (("pretrain", "finetune"), "both"),
        (("pretrain",), "pretrain"),
        (("finetune",), "finetune"),
    ):
        names = [f"`{flag.flag}`" for flag in FLAGS if flag.effect == "same" and flag.commands == commands]
        lines.append(f"| {title} | {', '.join(names)} |")
    lines += ["", "| flag | command | here |", "|---|---|---|"]
    rows = {}
    for flag in FLAGS:
        if flag.effect != "same":
            command = "both" if len(flag.commands) == 2 else flag.commands[0]
            rows.setdefault((command, effect(flag)), []).append(f"`{flag.flag}`")
    lines += [f"| {', '.join(names)} | {command} | {cell(text)} |" for (command, text), names in rows.items()]
    return "\n".join(lines)


@pytest.mark.skipif(not PAGE.exists(), reason="runs from a checkout")
def test_page_has_every_flag_as_the_parser_takes_it() -> None:
    assert tables() in PAGE.read_text(encoding="utf-8"), tables()
