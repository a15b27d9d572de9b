"""Draw maps of attention heads in panels with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

PANEL_INCHES = 2.0
LEAST_SIZE = (4.8, 2.6)
"""The width of the longest heading and the height of the color scale with its label, in inches."""

COLUMN_COUNTS = (5, 4, 3)
OUTLINE = "#ffb000"
STRIP_GAP, STRIP_HEIGHT = 0.03, 0.16
"""The gap above the class token's entries and their height, as parts of a map's longer side."""


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
    """The heading, the note below the maps, and the color scale's label."""

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
    """Return the figure and its axes: of the picture, if any, and the maps."""
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
    longer = max(height, width)
    across = PANEL_INCHES * max(width / longer, len(maps.cls_entries) / 3, 0.5)
    down = PANEL_INCHES * (height / longer + STRIP_GAP + STRIP_HEIGHT) + 0.3  # title
    size = max(columns * across + 1.2, LEAST_SIZE[0]), max(rows * down + 1.0, LEAST_SIZE[1])
    return import_pyplot().figure(figsize=size, layout="constrained")


def _draw_picture(axis: Any, maps: HeadMaps) -> None:
    height, width = maps.values.shape[1:]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)  # in patches
    axis.imshow(maps.picture, cmap="gray", vmin=0, vmax=1, extent=extent)
    _finish_panel(axis, "image" if maps.query is None else "image and query", maps)


def _draw_map(axis: Any, maps: HeadMaps, place: int, colors: Any) -> None:
    axis.imshow(maps.values[place], cmap=colors.cmap, norm=colors.norm, interpolation="nearest")
    _draw_cls_entries(axis, {name: float(entries[place]) for name, entries in maps.cls_entries.items()}, maps, colors)
    _finish_panel(axis, maps.titles[place], maps)


def _finish_panel(axis: Any, title: str, maps: HeadMaps) -> None:
    height, width = maps.values.shape[1:]
    longer = max(height, width)
    across = max(width, longer * len(maps.cls_entries) / 3)
    axis.set_xlim(width / 2 - 0.5 - across / 2, width / 2 - 0.5 + across / 2)
    axis.set_ylim(height - 0.5 + (STRIP_GAP + STRIP_HEIGHT) * longer, -0.5)
    axis.set_title(title, fontsize=9.5, pad=3)
    axis.set_axis_off()
    _outline(axis, (-0.5, -0.5), width, height, "k", 0.8)
    if maps.query is not None:
        _outline(axis, (maps.query[1] - 0.5, maps.query[0] - 0.5), 1, 1, OUTLINE, 1.6)


def _outline(axis: Any, corner: tuple[float, float], width: float, height: float, color: str, thickness: float) -> None:
    from matplotlib.patches import Rectangle

    outline = Rectangle(corner, width, height, fill=False, edgecolor=color, linewidth=thickness, clip_on=False)
    axis.add_patch(outline)


def _draw_cls_entries(axis: Any, entries: dict[str, float], maps: HeadMaps, colors: Any) -> None:
    """Draw the class token's entries below a map; each has a third of the map's longer side."""
    height, width = maps.values.shape[1:]
    longer = max(height, width)
    left, top = width / 2 - 0.5 - longer * len(entries) / 6, height - 0.5 + STRIP_GAP * longer
    right, bottom = left + longer * len(entries) / 3, top + STRIP_HEIGHT * longer
    cells = [list(entries.values())]
    axis.imshow(cells, cmap=colors.cmap, norm=colors.norm, interpolation="nearest", extent=(left, right, bottom, top))
    _outline(axis, (left, top), right - left, bottom - top, "k", 0.8)
    for place, (name, value) in enumerate(entries.items()):
        red, green, blue, _ = colors.to_rgba(value)
        ink = "w" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "k"  # by the luminance of the cell
        middle = left + (place + 0.5) * longer / 3, (top + bottom) / 2
        axis.text(*middle, f"{name}\n{value:.3f}", ha="center", va="center", fontsize=6.5, color=ink)
