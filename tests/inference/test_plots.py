"""`plot_relative_position_bias` and `plot_attention`: the numbers in the pictures, the layout, and the errors."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from torch import Tensor

import beit_fast
from beit_fast import plot_attention, plot_relative_position_bias
from beit_fast.inference.head_maps import grid_size
from beit_fast.position_bias import gather_bias, resize_table

from ..support.models import build, images

HEADS, LAYERS, PATCH = 4, 3, 8
BIASES = ("per layer", "shared", "both")
WINDOWS = ((4, 4), (3, 6), (7, 2))


@pytest.fixture(autouse=True)
def pictures() -> Iterator[None]:
    """Draw without a screen, and close the figures of pyplot."""
    with matplotlib.rc_context({"backend": "agg"}):
        yield
    pyplot.close("all")


def panels_of(figure: Figure) -> list[Any]:
    return [axis for axis in figure.axes if axis.get_title()]


def map_of(panel: Any) -> np.ndarray:
    return np.asarray(panel.images[0].get_array())


def cls_entries_of(panel: Any) -> list[float]:
    return np.asarray(panel.images[1].get_array())[0].tolist()


def texts_of(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def dense_bias_of(model: Any, layer: int, window: tuple[int, int]) -> Tensor:
    """The bias `[H, N, N]` of a layer from the tables by name."""
    tables = [
        parameter.detach()
        for name, parameter in model.named_parameters()
        if name.endswith("relative_position_bias_table") and (f"layer.{layer}." in name or "layer." not in name)
    ]
    native = model.config.window
    return sum(gather_bias(resize_table(table, native, window), window) for table in tables)  # type: ignore[return-value]


@pytest.mark.parametrize("position", BIASES)
@pytest.mark.parametrize("window", WINDOWS)
def test_bias_of_a_query_equals_the_dense_bias(position: str, window: tuple[int, int]) -> None:
    model = build(position=position)
    size = (window[0] * PATCH, window[1] * PATCH + 3)
    query = (window[0] - 1, 1)
    figure = plot_relative_position_bias(model, layer=1, query=query, image_size=size)
    expected = dense_bias_of(model, 1, window)[:, 1 + query[0] * window[1] + query[1]]
    panels = panels_of(figure)
    assert [panel.get_title() for panel in panels] == [f"head {head}" for head in range(HEADS)]
    for panel, row in zip(panels, expected, strict=True):
        np.testing.assert_allclose(map_of(panel), row[1:].view(window), atol=1e-6)
        assert cls_entries_of(panel) == pytest.approx([row[0].item()])
    assert f"row {query[0]}, column 1" in texts_of(figure)


@pytest.mark.parametrize("position", BIASES)
def test_table_of_a_rectangular_model_shows_every_relative_position(position: str) -> None:
    model = build(position=position, image_size=(24, 40))
    window = model.config.window
    assert window == (3, 5)
    dense = dense_bias_of(model, LAYERS - 1, window)
    for head, panel in enumerate(panels_of(plot_relative_position_bias(model, layer=-1))):
        shown = map_of(panel)
        assert shown.shape == (5, 9)
        for query, key in (((0, 0), (2, 4)), ((2, 1), (0, 3)), ((1, 1), (1, 1))):
            tokens = [1 + row * window[1] + column for row, column in (query, key)]
            offset = key[0] - query[0] + 2, key[1] - query[1] + 4
            assert shown[offset] == pytest.approx(dense[head, tokens[0], tokens[1]].item())
        entries = [dense[head, 0, 1], dense[head, 1, 0], dense[head, 0, 0]]
        assert cls_entries_of(panel) == pytest.approx([entry.item() for entry in entries])


@pytest.mark.parametrize(
    "name", ["BeitModel", "BeitForSemanticSegmentation", "BeitBackbone", "BeitForMaskedImageModeling"]
)
@pytest.mark.parametrize("query", ["cls", (1, 2)])
def test_attention_equals_output_attentions_of_every_class(name: str, query: Any) -> None:
    model = build(name)
    pixels = images(1, 3, 32, 48)
    with torch.no_grad():
        weights = model(pixels, output_attentions=True).attentions[1][0]  # [H, N, N]
    figure = plot_attention(model, pixels[0], layer=1, query=query)
    picture, *maps = panels_of(figure)
    assert np.asarray(picture.images[0].get_array()).shape == (32, 48, 3)
    token = 0 if query == "cls" else 1 + 1 * 6 + 2
    for panel, row in zip(maps, weights[:, token], strict=True):
        np.testing.assert_allclose(map_of(panel), row[1:].view(4, 6), atol=1e-6)
        assert cls_entries_of(panel) == pytest.approx([row[0].item()], abs=1e-6)
        assert map_of(panel).sum() + cls_entries_of(panel)[0] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "triton"])
def test_attention_of_a_fused_model_in_training_leaves_it_as_it_was(implementation: str) -> None:
    model = build(attn_implementation=implementation, attention_probs_dropout_prob=0.5)
    pixels = images(1, 3, 32, 32)
    expected = map_of(panels_of(plot_attention(model, pixels))[1])
    model.train()
    np.testing.assert_allclose(map_of(panels_of(plot_attention(model, pixels))[1]), expected, atol=1e-6)
    assert all(module.training for module in model.modules())
    assert model.attn_implementation == implementation
    assert all(parameter.grad is None for parameter in model.parameters())


def test_attention_of_an_optimized_model_is_that_of_its_original() -> None:
    model = build()
    pixels = images(1, 3, 32, 32)
    first, second = (plot_attention(each, pixels) for each in (model, beit_fast.optimize_for_inference(model)))
    for ours, theirs in zip(panels_of(first)[1:], panels_of(second)[1:], strict=True):
        np.testing.assert_allclose(map_of(ours), map_of(theirs), atol=1e-5)


@pytest.mark.parametrize(
    ("heads", "titles"),
    [
        (None, ["head 0", "head 1", "head 2", "head 3"]),
        (2, ["head 2"]),
        ((3, -4), ["head 3", "head 0"]),
        (np.array([1, 2]), ["head 1", "head 2"]),
        ("mean", ["mean of 4 heads"]),
    ],
)
def test_heads_select_the_panels(heads: Any, titles: list[str]) -> None:
    model = build()
    figure = plot_relative_position_bias(model, heads=heads)
    assert [panel.get_title() for panel in panels_of(figure)] == titles
    if isinstance(heads, str):
        every = np.stack([map_of(panel) for panel in panels_of(plot_relative_position_bias(model))])
        np.testing.assert_allclose(map_of(panels_of(figure)[0]), every.mean(0), atol=1e-6)


def test_figure_subfigure_and_axes_of_the_caller_are_drawn_on() -> None:
    model = build()
    own = Figure(layout="constrained")
    assert plot_relative_position_bias(model, figure=own) is own
    assert len(panels_of(own)) == HEADS
    above, below = Figure(layout="constrained").subfigures(2, 1)
    assert plot_relative_position_bias(model, figure=above) is above.figure
    assert plot_attention(model, images(1, 3, 32, 32), figure=below) is above.figure
    figure, axes = pyplot.subplots(1, 3)
    assert plot_attention(model, images(1, 3, 32, 32), heads=(0, 1), axes=axes[:2], colorbar=False) is figure
    assert plot_relative_position_bias(model, heads=3, axes=axes[2], colorbar=False) is figure
    assert [axis.get_title() for axis in axes] == ["head 0", "head 1", "head 3"]
    assert len(figure.axes) == 3
    assert pyplot.get_fignums() == [figure.number]


def test_color_scale_has_a_label_and_zero_in_the_middle_for_a_bias() -> None:
    bias = plot_relative_position_bias(build())
    attention = plot_attention(build(), images(1, 3, 32, 32))
    assert "added to the attention score" in texts_of(bias)
    assert "attention weight" in texts_of(attention)
    norm = panels_of(bias)[0].images[0].norm
    assert norm.vmin == -norm.vmax
    assert panels_of(attention)[1].images[0].norm.vmin == 0
    zero = beit_fast.BeitModel(
        beit_fast.BeitConfig(use_relative_position_bias=True, image_size=32, num_hidden_layers=1)
    )
    assert panels_of(plot_relative_position_bias(zero))[0].images[0].norm.vmax == 1


@pytest.mark.parametrize("window", [(4, 4), (3, 12), (11, 2), (1, 1)])
@pytest.mark.parametrize("heads", [None, 0])
def test_texts_and_maps_do_not_overlap_and_stay_in_the_figure(window: tuple[int, int], heads: Any) -> None:
    size = (window[0] * PATCH, window[1] * PATCH)
    figures = [
        plot_relative_position_bias(build(), heads=heads, image_size=size),
        plot_relative_position_bias(build(), heads=heads, image_size=size, query=(0, 0)),
        plot_attention(build(), images(1, 3, *size), heads=heads),
    ]
    for figure in figures:
        figure.canvas.draw()
        renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
        boxes = [axis.get_tightbbox(renderer) for axis in figure.axes]
        boxes += [text.get_window_extent(renderer) for text in figure.texts]
        assert all(box.width > 5 and box.height > 5 for box in boxes)
        for place, box in enumerate(boxes):
            assert figure.bbox.x0 - 1 <= box.x0 <= box.x1 <= figure.bbox.x1 + 1, (place, box)
            assert figure.bbox.y0 - 1 <= box.y0 <= box.y1 <= figure.bbox.y1 + 1, (place, box)
            for other in boxes[:place]:
                shared = [min(box.x1, other.x1) - max(box.x0, other.x0), min(box.y1, other.y1) - max(box.y0, other.y0)]
                assert min(shared) < 1, (box, other)


@pytest.mark.parametrize(
    ("count", "size"),
    [(1, (1, 1)), (5, (1, 5)), (6, (2, 3)), (7, (2, 4)), (10, (2, 5)), (12, (3, 4)), (13, (3, 5)), (16, (4, 4))],
)
def test_grid_leaves_few_places_empty(count: int, size: tuple[int, int]) -> None:
    assert grid_size(count) == size


def test_missing_matplotlib_is_one_error_and_import_does_not_need_it() -> None:
    code = """
import sys
sys.modules["matplotlib"] = None
import beit_fast
try:
    beit_fast.plot_attention(None, None)
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "plots need matplotlib: pip install 'beit-fast[plot]'" in done.stdout


def test_drawing_functions_are_public_and_load_matplotlib_at_the_call_only() -> None:
    code = (
        "import sys, beit_fast; beit_fast.plot_attention; beit_fast.ImageClassifier; print('matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
    assert {"plot_attention", "plot_relative_position_bias"} <= set(dir(beit_fast))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layer": 3}, ValueError, r"layer=3 is out of range \(expected -3 to 2\)"),
        ({"layer": 1.0}, TypeError, "layer=1.0 is not an int"),
        ({"heads": (0, 4)}, ValueError, r"heads=4 is out of range \(expected -4 to 3\)"),
        ({"heads": ()}, ValueError, "heads is empty"),
        ({"heads": "all"}, TypeError, "heads='all' is not an int"),
        ({"query": (4, 0)}, ValueError, r"query=\(4, 0\) is outside of the 4 x 4 patches"),
        ({"query": 3}, TypeError, "query=3 is not valid"),
        ({"image_size": 7}, ValueError, "image_size=7 is smaller than one patch of 8 pixels"),
        ({"image_size": "32"}, TypeError, "image_size='32' is not valid"),
        ({"axes": []}, ValueError, "got 0 axes for 4 maps"),
    ],
)
def test_invalid_arguments_are_one_error(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plot_relative_position_bias(build(), **options)
    assert pyplot.get_fignums() == []


def test_models_without_a_bias_are_refused() -> None:
    with pytest.raises(ValueError, match="has no relative position bias"):
        plot_relative_position_bias(build(position="absolute"))
    with pytest.raises(TypeError, match="pass the model that it was made from"):
        plot_relative_position_bias(beit_fast.optimize_for_inference(build()))
    with pytest.raises(TypeError, match="model is of type Linear"):
        plot_relative_position_bias(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((1, 3, 32, 32)), "pixel_values is of type ndarray"),
        (torch.zeros(2, 3, 32, 32), r"pixel_values has the shape \[2, 3, 32, 32\]"),
        (torch.zeros(32, 32), r"pixel_values has the shape \[32, 32\]"),
        (torch.zeros(1, 3, 4, 32), "smaller than one patch"),
    ],
)
def test_other_pixels_are_one_error(pixels: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        plot_attention(build(), pixels)
    with pytest.raises(TypeError, match=r"query='class' is not valid \(expected 'cls' or"):
        plot_attention(build(), torch.zeros(1, 3, 32, 32), query="class")  # type: ignore[arg-type]


def test_plot_attention_of_channels_last_pixels_says_how_to_pass_them() -> None:
    with pytest.raises(ValueError, match=re.escape("the channels are last: pass pixel_values.permute(0, 3, 1, 2)")):
        plot_attention(build(), torch.zeros(32, 32, 3))
