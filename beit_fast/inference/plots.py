"""Pictures of the relative position bias and of attention weights."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..layers.block import BeitEncoder
from ..layers.embeddings import check_pixel_shape, window_of
from ..models.base import BeitPreTrainedModel
from ..position_bias import CLS_ROWS, Window
from ..utils.messages import FieldError, describe, raise_errors
from .evaluation import evaluation_mode
from .head_maps import Canvas, HeadMaps, Text, draw, import_pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

Heads: TypeAlias = int | Sequence[int] | Literal["mean"] | None


@torch.no_grad()
def plot_relative_position_bias(
    model: BeitPreTrainedModel,
    layer: int = 0,
    heads: Heads = None,
    *,
    query: tuple[int, int] | None = None,
    image_size: int | tuple[int, int] | None = None,
    figure: Figure | SubFigure | None = None,
    axes: Axes | Sequence[Axes] | None = None,
    colorbar: bool = True,
) -> Figure:
    """Draw what the relative position bias adds to attention scores.

    If the model has a bias for each layer and a shared one, their sum is drawn. The entries of the class token are
    below each map.

    Args:
        model: A model of this package with a relative position bias.
        layer: The index of the layer, from 0; negative indices count from the last layer.
        heads: The indices of one or more heads, `"mean"` for the mean of all, or None for all.
        query: The (row, column) of a patch, to draw its bias for every patch of the image. None draws the table: the
            bias for every position of a key relative to its query.
        image_size: Resize the table to images of this size in pixels: a side, or (height, width). None: the native
            size.
        figure: The figure to draw in, best with `layout="constrained"`. None: a new figure of pyplot.
        axes: The axes to draw on instead, one for each map; these get no heading.
        colorbar: Whether the color scale is drawn.

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError, ValueError: If an argument is not valid, or the model has no relative position bias.
    """
    import_pyplot()
    owner = "plot_relative_position_bias"
    raise_errors(owner, _model_errors(model) or _index_errors(model.config, layer, heads))
    encoder = next((module for module in model.modules() if isinstance(module, BeitEncoder)), None)
    if encoder is None:
        raise TypeError(f"{type(model).__name__} has no bias tables; pass the model that it was made from")
    window, errors = _window(model.config, image_size)
    raise_errors(owner, errors or _query_errors(query, window))
    values, titles = _of_heads(_table(encoder, layer, window).t(), heads)  # [P, rows]
    subject, note = "Relative position bias", "position of the key; the query is outlined"
    if query is None:
        note = f"position of the key, up to {window[0] - 1} rows and {window[1] - 1} columns\nfrom the query (outlined)"
    else:
        subject += f" of {_query_name(query)}"
    text = Text(_heading(subject, model.config, layer, window), note, "added to the attention score")
    maps = _bias_maps(values.numpy(), titles, window, query)
    return draw(maps, text, Canvas(figure, axes, colorbar), is_signed=True)


@torch.no_grad()
def plot_attention(
    model: BeitPreTrainedModel,
    pixel_values: Tensor,
    layer: int = -1,
    heads: Heads = None,
    *,
    query: tuple[int, int] | Literal["cls"] = "cls",
    figure: Figure | SubFigure | None = None,
    axes: Axes | Sequence[Axes] | None = None,
    colorbar: bool = True,
) -> Figure:
    """Draw the attention weights of one query in an image.

    The model runs once with `output_attentions=True`, which uses `"eager"` for this call, in evaluation mode. Its own
    mode does not change. The weight of the class token is below each map. A figure also shows the pixels.

    Args:
        model: A model of this package.
        pixel_values: The pixels of one image of any size, from an image processor, `[1, C, H, W]` or `[C, H, W]`.
        layer: The index of the layer, from 0; negative indices count from the last layer.
        heads: The indices of one or more heads, `"mean"` for the mean of all, or None for all.
        query: The (row, column) of a patch, or `"cls"` for the class token.
        figure, axes, colorbar: As in `plot_relative_position_bias`. On axes, the pixels are not drawn.

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError, ValueError: If an argument is not valid.
    """
    import_pyplot()
    errors = _model_errors(model) or _index_errors(model.config, layer, heads)
    raise_errors("plot_attention", [*errors, *_pixel_errors(pixel_values)])
    pixels = pixel_values.reshape(1, *pixel_values.shape[-3:])
    check_pixel_shape(pixels, model.config.num_channels)
    window = window_of(pixels, model.config.patch_size)
    patch = None if query == "cls" else query
    raise_errors("plot_attention", _query_errors(patch, window, "'cls' or "))
    with evaluation_mode(model):
        attentions = model(pixels.to(model.device), output_attentions=True, return_dict=True).attentions
    token = 0 if patch is None else 1 + patch[0] * window[1] + patch[1]
    weights, titles = _of_heads(attentions[layer][0, :, token].float().cpu(), heads)  # [P, N]
    picture = None if axes is not None else _picture(pixels, window, model.config.patch_size)
    shown = weights[:, 1:].unflatten(1, window).numpy()
    maps = HeadMaps(shown, titles, {"CLS": weights[:, 0].numpy()}, patch, picture)
    note = "position of the key" if patch is None else "position of the key; the query is outlined"
    heading = _heading(f"Attention of {_query_name(patch)}", model.config, layer, window)
    text = Text(heading, note, "attention weight")
    return draw(maps, text, Canvas(figure, axes, colorbar), is_signed=False)


def _table(encoder: BeitEncoder, layer: int, window: Window) -> Tensor:
    """Return the float32 table of a layer, `[rows, H]`: its own, the shared one, or their sum."""
    block: Any = encoder.layer[layer]
    biases = (encoder.relative_position_bias, block.attention.attention.relative_position_bias)
    tables = [bias(window) for bias in biases if bias is not None]
    if not tables:
        raise ValueError(
            "the model has no relative position bias (expected use_relative_position_bias=True or "
            "use_shared_relative_position_bias=True in its configuration)"
        )
    return sum(table.float().cpu() for table in tables)


def _bias_maps(values: np.ndarray, titles: list[str], window: Window, query: tuple[int, int] | None) -> HeadMaps:
    """Arrange table rows `[P, rows]` by the position of the key."""
    cls_to_patch, patch_to_cls, cls_to_cls = values[:, -CLS_ROWS:].T
    grid = values[:, :-CLS_ROWS].reshape(-1, 2 * window[0] - 1, 2 * window[1] - 1)
    by_key = grid[:, ::-1, ::-1]  # rows of the table count from the key to the query
    center = window[0] - 1, window[1] - 1
    if query is None:
        entries = {"CLS→patch": cls_to_patch, "patch→CLS": patch_to_cls, "CLS→CLS": cls_to_cls}
        return HeadMaps(by_key, titles, entries, center)
    top, left = center[0] - query[0], center[1] - query[1]
    shown = by_key[:, top : top + window[0], left : left + window[1]]
    return HeadMaps(shown, titles, {"CLS": patch_to_cls}, query)


def _of_heads(values: Tensor, heads: Heads) -> tuple[Tensor, list[str]]:
    """Select heads of `[H, n]`: their values `[P, n]` and names."""
    count = len(values)
    if isinstance(heads, str):
        return values.mean(0, keepdim=True), [f"mean of {count} heads"]
    chosen = list(range(count)) if heads is None else [head % count for head in _listed(heads)]
    return values[chosen], [f"head {head}" for head in chosen]


def _listed(heads: Any) -> list[Any]:
    heads = heads.tolist() if hasattr(heads, "tolist") else heads  # arrays and tensors
    return list(heads) if isinstance(heads, Sequence) and not isinstance(heads, str) else [heads]


def _picture(pixels: Tensor, window: Window, patch_size: int) -> np.ndarray:
    """Scale the pixels that the model sees to 0..1: `[H, W, 3]`, or gray `[H, W]` unless there are 3 channels."""
    shown = pixels[0, :, : window[0] * patch_size, : window[1] * patch_size].float().cpu()
    low, high = shown.min(), shown.max()
    shown = (shown - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny)
    return (shown.permute(1, 2, 0) if len(shown) == 3 else shown.mean(0)).numpy()


def _heading(subject: str, config: Any, layer: int, window: Window) -> str:
    return f"{subject}\nlayer {layer % config.num_hidden_layers}, {_size_name(window)}"


def _query_name(query: tuple[int, int] | None) -> str:
    return "the class token (CLS)" if query is None else f"the patch at row {query[0]}, column {query[1]}"


def _size_name(window: Window) -> str:
    return f"{window[0]} x {window[1]} patches"


def _window(config: Any, image_size: Any) -> tuple[Window, list[FieldError]]:
    """Return the window of an image size, and the errors."""
    if image_size is None:
        return config.window, []
    size = (image_size, image_size) if _is_index(image_size) else image_size
    expected = "expected a side in pixels, or (height, width)"
    if not _is_pair(size):
        return (1, 1), [FieldError(f"{describe('image_size', image_size)} is not valid ({expected})", wrong_type=True)]
    if min(size) < config.patch_size:
        text = f"{describe('image_size', image_size)} is smaller than one patch of {config.patch_size} pixels"
        return (1, 1), [FieldError(text)]
    return (size[0] // config.patch_size, size[1] // config.patch_size), []


def _is_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(map(_is_index, value))


def _is_index(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _model_errors(model: Any) -> list[FieldError]:
    if isinstance(model, BeitPreTrainedModel):
        return []
    return [FieldError(f"model is of type {type(model).__name__} (expected a model of beit_fast)", wrong_type=True)]


def _index_errors(config: Any, layer: Any, heads: Any) -> list[FieldError]:
    errors = _range_errors("layer", [layer], config.num_hidden_layers)
    if heads is None or (isinstance(heads, str) and heads == "mean"):
        return errors
    chosen = _listed(heads)
    if not chosen:
        errors.append(FieldError("heads is empty (expected at least one index, 'mean' or None)"))
    return errors + _range_errors("heads", chosen, config.num_attention_heads)


def _range_errors(name: str, indices: Sequence[Any], count: int) -> list[FieldError]:
    errors = []
    for index in indices:
        if not _is_index(index):
            errors.append(FieldError(f"{describe(name, index)} is not an int", wrong_type=True))
        elif not -count <= index < count:
            errors.append(FieldError(f"{describe(name, index)} is out of range (expected {-count} to {count - 1})"))
    return errors


def _query_errors(query: Any, window: Window, others: str = "") -> list[FieldError]:
    if query is None:
        return []
    expected = f"expected {others}(row, column) of a patch"
    if not _is_pair(query):
        return [FieldError(f"{describe('query', query)} is not valid ({expected})", wrong_type=True)]
    if not all(0 <= place < side for place, side in zip(query, window, strict=True)):
        return [FieldError(f"{describe('query', query)} is outside of the {_size_name(window)} ({expected})")]
    return []


def _pixel_errors(pixel_values: Any) -> list[FieldError]:
    expected = "expected the pixels of one image, [1, C, H, W] or [C, H, W]"
    if not isinstance(pixel_values, Tensor):
        text = f"pixel_values is of type {type(pixel_values).__name__} ({expected} in a tensor)"
        return [FieldError(text, wrong_type=True)]
    if pixel_values.ndim == 3 or (pixel_values.ndim == 4 and len(pixel_values) == 1):
        return []
    return [FieldError(f"pixel_values has the shape {list(pixel_values.shape)} ({expected})")]
