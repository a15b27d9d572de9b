"""Wrong inputs of the models: one error that says what was given, what is accepted and how to get it."""

import numpy as np
import pytest
import torch
from PIL import Image

import beit_fast

from ..support.models import build, images
from ..support.transformers_reference import CLASSES, TINY

PROCESSOR = r"convert images with a BeitImageProcessor, as in model\(\*\*processor\(images, return_tensors='pt'\)\)"
WRONG_PIXELS = {
    "list": ([[0.0]], "list"),
    "list of tensors": ([torch.zeros(3, 32, 32)], "list"),
    "array": (np.zeros((1, 3, 32, 32)), "ndarray"),
    "picture": (Image.new("RGB", (32, 32)), "Image"),
    "path": ("photograph.jpg", "str"),
    "nothing": (None, "NoneType"),
}


def processed():
    return beit_fast.BeitImageProcessor(size=32)(Image.new("RGB", (32, 32)), return_tensors="pt")


@pytest.mark.parametrize("given", WRONG_PIXELS)
@pytest.mark.parametrize("name", CLASSES)
def test_pixels_of_a_wrong_type_raise_with_a_hint_to_the_processor(name, given):
    value, kind = WRONG_PIXELS[given]
    with pytest.raises(TypeError, match=rf"^pixel_values is of type {kind} \(expected a torch\.Tensor\); {PROCESSOR}$"):
        build(name)(value)


@pytest.mark.parametrize("name", CLASSES)
def test_processor_output_as_one_argument_raises_with_the_right_call(name):
    model, inputs = build(name), processed()
    for given in (inputs, dict(inputs)):
        with pytest.raises(
            TypeError, match=r"pass the output of an image processor as keyword arguments, model\(\*\*i"
        ):
            model(given)
    model(**inputs)


@pytest.mark.parametrize(
    ("size", "hint"),
    [
        ((1, 64, 64, 3), r"not \[1, 64, 64, 3\]; the channels are last: pass pixel_values\.permute\(0, 3, 1, 2\)$"),
        ((64, 64, 3), r"not \[64, 64, 3\]; the channels are last: pass pixel_values\.permute\(2, 0, 1\)\[None\]$"),
        ((3, 64, 64), r"not \[3, 64, 64\]; for one image, pass pixel_values\[None\]$"),
        ((1, 1, 64, 64), r"not \[1, 1, 64, 64\]$"),
        ((64,), r"not \[64\]$"),
        ((), r"not \[\]$"),
    ],
)
@pytest.mark.parametrize("name", CLASSES)
def test_pixels_of_a_wrong_shape_raise_with_the_right_call(name, size, hint):
    with pytest.raises(ValueError, match=r"pixel_values must be \[batch, 3, height, width\], " + hint):
        build(name)(images(*size) if size else torch.tensor(0.0))


UNREADABLE = {
    "sparse": (torch.Tensor.to_sparse, r"has the layout torch\.sparse_coo \(expected a dense tensor: call to_dense"),
    "mkldnn": (torch.Tensor.to_mkldnn, r"has the layout torch\._mkldnn \(expected a dense tensor: call to_dense"),
    "nested": (lambda x: torch.nested.nested_tensor(list(x)), r"is a nested tensor \(expected a dense one: torch\.sta"),
    "meta": (lambda x: x.to("meta"), r"is on the device meta, which has no values \(expected a tensor on a CPU or GPU"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("given", UNREADABLE)
@pytest.mark.parametrize("name", CLASSES)
def test_pixels_without_values_or_not_dense_raise_with_the_reason(name, given):
    """Regression: errors of torch's storage, such as "Cannot access storage of SparseTensorImpl"."""
    convert, message = UNREADABLE[given]
    with pytest.raises(ValueError, match=rf"^pixel_values {message}"):
        build(name)(convert(images(1, 3, 32, 32)))


def test_masks_and_pixels_that_are_not_dense_are_all_listed():
    model, mask = build(), torch.ones(1, 17)
    with pytest.raises(ValueError, match=r"^pixel_values has the layout .*; attention_mask has the layout torch\.spa"):
        model(images(1, 3, 32, 32).to_sparse(), attention_mask=mask.to_sparse())


def test_pixels_on_the_meta_device_run_in_a_model_there():
    assert build().to("meta")(images(2, 3, 32, 32).to("meta")).logits.is_meta


def test_calls_that_the_errors_suggest_are_accepted():
    model = build()
    model(images(1, 32, 32, 3).permute(0, 3, 1, 2))
    model(images(32, 32, 3).permute(2, 0, 1)[None])
    model(images(3, 32, 32)[None])


def test_optimized_model_wrong_pixels_raise_as_in_the_model():
    model = build()
    optimized = beit_fast.optimize_for_inference(model)
    with pytest.raises(TypeError, match=r"pixel_values is of type list .*BeitImageProcessor"):
        optimized([[0.0]])
    for call in (optimized, lambda x: beit_fast.optimize_for_inference(model, example=x)):
        with pytest.raises(ValueError, match="the channels are last"):
            call(images(1, 32, 32, 3))
        with pytest.raises(ValueError, match=r"pixel_values has the layout torch\.sparse_coo"):
            call(images(1, 3, 32, 32).to_sparse())
    with pytest.raises(ValueError, match="pixel_values is on the device meta"):
        optimized(images(1, 3, 32, 32).to("meta"))


@pytest.mark.parametrize("name", CLASSES)
def test_configuration_of_a_wrong_type_raises_with_the_right_call(name):
    model_class = getattr(beit_fast, name)
    wrong = {
        rf"=.* is of type str .*call {name}\.from_pretrained\('microsoft/beit-base'\)": "microsoft/beit-base",
        rf"=.* is of type dict .*call {name}\(BeitConfig\.from_dict\(fields\)\)": TINY,
        rf"=None is of type NoneType \(expected a BeitConfig.*{name}\.from_pretrained\(name\)": None,
        rf"=.* is of type type \(expected a BeitConfig.*{name}\(BeitConfig\(\)\)": beit_fast.BeitConfig,
    }
    for message, config in wrong.items():
        with pytest.raises(TypeError, match=r"^config" + message):
            model_class(config)
    model_class(beit_fast.BeitConfig.from_dict(TINY | {"out_indices": [0, 1, 2, 3]}))
