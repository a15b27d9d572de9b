"""Draw maps of attention heads in panels with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

PANEL_INCHES = 2.0
LEAST_WIDTH = 4.8
"""The width of the longest heading, in inches."""

COLUMN_COUNTS = (5, 4, 3)
OUTLINE = "#ffb000"
STRIP_GAP, STRIP_HEIGHT = 0.03, 0.1
"""The gap above the class token's entries and their height, as parts of a panel."""


class HeadMaps(NamedTuple):
    """Maps to draw, one for each panel.

    Attributes:
        values: float `[P, h, w]`.
        titles: The title of each panel.
        cls_entries: Entries of the class token, float `[P]`, by their names.
        query: The (row, column) to outline, or None.
        picture: The image, `[H, W]` or `[H, W, 3]` from 0 to 1, for a panel of its own; or None.
    """

    values: np.ndarray
    titles: Sequence[str]
    cls_entries: dict[str, np.ndarray]
    query: tuple[int, int] | None
    picture: np.ndarray | None = None


class Text(NamedTuple):
    """The heading, the note at the bottom and the label of the color scale."""

    heading: str
    note: str
    scale: str


class Canvas(NamedTuple):
    """Where to draw: on `axes`, in `figure`, or in a new figure if both are None."""

    figure: Figure | SubFigure | None
    axes: Axes | Sequence[Axes] | None
    colorbar: bool


def import_pyplot() -> Any:
    """Import `matplotlib.pyplot`.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(f"plots need matplotlib: pip install 'beit-fast[plot]' ({error})") from error
    return pyplot


def draw(maps: HeadMaps, text: Text, canvas: Canvas, is_signed: bool) -> Any:
    """Draw one panel for each map, with one color scale.

    Args:
        maps: The maps.
        text: Texts of a figure; on `axes` only the label of the scale is drawn.
        canvas: Where to draw.
        is_signed: Whether zero is in the middle of the color scale, else at its lower end.

    Returns:
        The figure.

    Raises:
        ValueError: If the number of axes is not the number of maps, or axes and a figure are passed.
    """
    colors, extend = _color_scale(maps, is_signed)
    figure, panels = _panels(maps, text, canvas)
    if len(panels) > len(maps.values):
        _draw_picture(panels[0], maps)
    for place, axis in enumerate(panels[-len(maps.values) :]):
        _draw_map(axis, maps, place, colors)
    if canvas.colorbar:
        bar = figure.colorbar(colors, ax=list(panels), extend=extend, fraction=0.04, pad=0.02, aspect=30)
        bar.set_label(text.scale, fontsize=9)
        bar.ax.tick_params(labelsize=8)
    return figure.figure  # of a SubFigure, the figure that it is a part of


def _color_scale(maps: HeadMaps, is_signed: bool) -> tuple[Any, str]:
    """Map values to colors; a few outliers, and often the class token, are beyond the ends."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    limit = float(np.percentile(np.abs(maps.values), 99.5)) or 1.0
    largest = max(float(np.abs(entries).max()) for entries in (maps.values, *maps.cls_entries.values()))
    norm = Normalize(-limit if is_signed else 0.0, limit)
    extend = "neither" if largest <= limit else "both" if is_signed else "max"
    return ScalarMappable(norm, "RdBu_r" if is_signed else "viridis"), extend


def _panels(maps: HeadMaps, text: Text, canvas: Canvas) -> tuple[Any, list[Any]]:
    """Return the figure and one axis for each map, with one more in front for the picture."""
    count = len(maps.values)
    if canvas.axes is not None:
        axes = list(np.atleast_1d(np.asarray(canvas.axes, dtype=object)).flat)
        if len(axes) != count or canvas.figure is not None:
            also = " and a figure" if canvas.figure is not None else ""
            raise ValueError(f"got {len(axes)} axes{also} for {count} maps (expected as many axes, or a figure)")
        return axes[0].figure, axes
    total = count + (maps.picture is not None)
    rows, columns = grid_size(total)
    figure = _new_figure(maps, columns, rows) if canvas.figure is None else canvas.figure
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in grid[total:]:
        axis.remove()
    figure.suptitle(text.heading, fontsize=11)
    figure.supxlabel(text.note, fontsize=9)
    return figure, grid[:total]


def grid_size(count: int) -> tuple[int, int]:
    """Return the (rows, columns) for `count` panels; few stay empty."""
    if count <= max(COLUMN_COUNTS):
        return 1, count
    sizes = [(-(-count // columns), columns) for columns in COLUMN_COUNTS]
    return min(sizes, key=lambda size: size[0] * size[1] - count + size[0])


def _new_figure(maps: HeadMaps, columns: int, rows: int) -> Any:
    height, width = maps.values.shape[1:]
    across = PANEL_INCHES * min(1.0, max(width / height, len(maps.cls_entries) / 3, 0.5))
    down = PANEL_INCHES * min(1.0, height / width) + 0.6  # title and entries of the class token
    size = max(columns * across + 1.2, LEAST_WIDTH), rows * down + 1.0
    return import_pyplot().figure(figsize=size, layout="constrained")


def _draw_picture(axis: Any, maps: HeadMaps) -> None:
    height, width = maps.values.shape[1:]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)  # in patches
    axis.imshow(maps.picture, cmap="gray", vmin=0, vmax=1, extent=extent)
    _finish_panel(axis, "image" if maps.query is None else "image and query", maps.query)


def _draw_map(axis: Any, maps: HeadMaps, place: int, colors: Any) -> None:
    axis.imshow(maps.values[place], cmap=colors.cmap, norm=colors.norm, interpolation="nearest")
    _finish_panel(axis, maps.titles[place], maps.query)
    _draw_cls_entries(axis, {name: float(entries[place]) for name, entries in maps.cls_entries.items()}, maps, colors)


def _finish_panel(axis: Any, title: str, query: tuple[int, int] | None) -> None:
    from matplotlib.patches import Rectangle

    axis.set_title(title, fontsize=9.5, pad=3)
    axis.set_xticks([])
    axis.set_yticks([])
    if query is not None:
        corner = (query[1] - 0.5, query[0] - 0.5)
        axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=OUTLINE, linewidth=1.6, clip_on=False))


def _draw_cls_entries(axis: Any, entries: dict[str, float], maps: HeadMaps, colors: Any) -> None:
    """Draw the class token's entries below a map, a third of the panel each."""
    height, width = maps.values.shape[1:]
    across, down = max(1.0, height / width), max(1.0, width / height)  # the panel's sides over those of the map
    bottom = -(STRIP_GAP + STRIP_HEIGHT) * down
    length = across * len(entries) / 3
    strip = axis.inset_axes((0.5 - length / 2, bottom, length, STRIP_HEIGHT * down))
    strip.imshow([list(entries.values())], cmap=colors.cmap, norm=colors.norm, aspect="auto")
    for column, value in enumerate(entries.values()):
        red, green, blue, _ = colors.to_rgba(value)
        is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        strip.text(column, 0, f"{value:.3f}", ha="center", va="center", fontsize=7, color="w" if is_dark else "k")
    strip.set_xticks(range(len(entries)), list(entries), fontsize=6.5, va="baseline")
    strip.tick_params(length=0, pad=8)
    strip.set_yticks([])
