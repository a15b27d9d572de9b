"""The legend of `beit-fast segment`: color, name and share of each class, below the picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

_FONT_SIZES_A_SIDE = 36  # of a square picture
_SMALLEST_FONT = 12
_LONGEST_LABEL = 40
_NO_CHARACTER = "\U0010ffff"


def check_legend() -> None:
    """Check that Pillow can draw a legend.

    Raises:
        ImportError: If Pillow was built without FreeType.
    """
    _font(_SMALLEST_FONT)


def with_legend(picture: Any, shares: Sequence[dict[str, Any]]) -> Any:
    """Add a panel with the classes below a picture of Pillow.

    The pixels of the picture are not covered. The panel has as many columns as the picture is wide, at least one.

    Args:
        picture: An RGB picture.
        shares: The result of `class_shares`.
    """
    from PIL import Image, ImageDraw

    size = max(_SMALLEST_FONT, round(math.sqrt(picture.width * picture.height) / _FONT_SIZES_A_SIDE))
    font = _font(size)
    texts = [f"{_percent(share['share'])}  {_readable(share, font)}" for share in shares]
    line, margin = round(1.5 * size), size // 2
    width = math.ceil(2 * size + 2 * margin + max(font.getlength(text) for text in texts))
    rows = math.ceil(len(texts) / max(1, picture.width // width))
    columns = math.ceil(len(texts) / rows)
    height = picture.height + rows * line + 2 * margin
    canvas = Image.new("RGB", (max(picture.width, columns * width), height), "white")
    canvas.paste(picture)
    draw = ImageDraw.Draw(canvas)
    for place, (share, text) in enumerate(zip(shares, texts, strict=True)):
        left = margin + place // rows * width
        middle = picture.height + margin + place % rows * line + line // 2
        box = (left, middle - size // 2, left + size, middle - size // 2 + size)
        draw.rectangle(box, fill=share["color"], outline="gray")
        draw.text((left + size + margin, middle), text, fill="black", font=font, anchor="lm")
    return canvas


def _font(size: int) -> Any:
    from PIL import ImageFont, features

    if not features.check("freetype2"):
        raise ImportError("the legend needs a Pillow that was built with FreeType; pass --no-legend to draw none")
    return ImageFont.load_default(size)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.001 else "< 0.1 %"


def _readable(share: dict[str, Any], font: Any) -> str:
    """Return the label of a class, shortened.

    It is the index of the class if the font lacks a character of the label.
    """
    label = " ".join(str(share["label"]).split())
    missing = bytes(font.getmask(_NO_CHARACTER))
    if not label or any(bytes(font.getmask(character)) == missing for character in set(label) - {" "}):
        return f"class {share['index']}"
    return label if len(label) <= _LONGEST_LABEL else label[: _LONGEST_LABEL - 3] + "..."
