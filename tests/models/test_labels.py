"""Labels: integer dtypes are class ids, and labels that do not fit raise one error before a loss is computed."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from ..support.models import build, images

INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
HEADS = ("BeitForImageClassification", "BeitForMaskedImageModeling", "BeitForSemanticSegmentation")
MASK = torch.arange(32).view(2, 16) % 3 == 0


def call(name, labels, **options):
    masked = {"bool_masked_pos": MASK} if name == "BeitForMaskedImageModeling" else {}
    return build(name, **options)(images(), labels=labels, **masked)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_class_ids_of_any_integer_dtype_have_one_loss(dtype):
    output = call("BeitForImageClassification", torch.tensor([4, 0], dtype=dtype))
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, torch.tensor([4, 0])))
    column = call("BeitForImageClassification", torch.tensor([[4], [0]], dtype=dtype))
    assert column.loss.isfinite()


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_masks_of_any_integer_dtype_have_one_loss(dtype):
    labels = torch.arange(2 * 32 * 32).view(2, 32, 32) % 5
    losses = [call("BeitForSemanticSegmentation", x, use_auxiliary_head=False) for x in (labels, labels.to(dtype))]
    size = {"size": (32, 32), "mode": "bilinear", "align_corners": False}
    expected = F.cross_entropy(F.interpolate(losses[1].logits, **size), labels)
    torch.testing.assert_close(losses[1].loss, expected)


def test_uint8_mask_ignores_255():
    labels = torch.full((2, 32, 32), 255, dtype=torch.uint8)
    labels[:, :16] = 3
    assert call("BeitForSemanticSegmentation", labels).loss.isfinite()


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_visual_tokens_of_any_integer_dtype_have_one_loss(dtype):
    labels = torch.arange(int(MASK.sum()), dtype=dtype) % 11
    output = call("BeitForMaskedImageModeling", labels)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits[MASK], labels.long()))


@pytest.mark.parametrize("labels", [[0, 1], np.array([0, 1])], ids=["list", "array"])
@pytest.mark.parametrize("name", HEADS)
def test_labels_that_are_not_tensors_raise(name, labels):
    with pytest.raises(TypeError, match=rf"^labels is of type {type(labels).__name__} \(expected a torch\.Tensor\)$"):
        call(name, labels)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (torch.tensor([0, 5]), {}, r"labels contain 5 \(expected class ids .* from 0 to 4 or -100"),
        (torch.tensor([-1, 0]), {}, r"labels contain -1 \(expected class ids"),
        (torch.tensor([0, 9], dtype=torch.uint8), {}, r"labels contain 9 \(expected class ids"),
        (
            torch.tensor([0, 1, 2]),
            {},
            r"labels are int64 \[3\] \(expected class ids of an integer dtype, \[batch\] = \[2",
        ),
        (torch.zeros(2, 5, dtype=torch.long), {}, r"labels are int64 \[2, 5\] \(expected class ids"),
        (
            torch.tensor([0.0, 1.0]),
            {},
            r"labels are float32 \[2\] .*num_labels\] = \[2, 5\].*or class ids of an integer",
        ),
        (torch.tensor([True, False]), {}, r"labels are bool \[2\]"),
        (torch.full((2, 5), 2.0), {}, r"labels are from 2\.0 to 2\.0 \(expected numbers from 0 to 1"),
        (torch.zeros(2, 2), {"num_labels": 1}, r"labels are float32 \[2, 2\] \(expected numbers, \[batch\] = \[2\]\)"),
        (torch.zeros(2), {"problem_type": "regression"}, r"labels are float32 \[2\] \(expected numbers, \[2, 5\]\)"),
        (
            torch.tensor([0.0, 1.0]),
            {"problem_type": "single_label_classification"},
            r"labels are float32 \[2\] \(expected class ids of an integer dtype",
        ),
    ],
)
def test_image_labels_that_do_not_fit_raise(labels, options, message):
    with pytest.raises(ValueError, match=message):
        call("BeitForImageClassification", labels, **options)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            torch.zeros(2, 16, dtype=torch.long),
            r"labels are int64 \[2, 16\] .*pass labels\[bool_masked_pos\.bool\(\)\]",
        ),
        (torch.zeros(3, dtype=torch.long), r"labels are int64 \[3\] \(expected \[11\]"),
        (torch.full((11,), 11), r"labels contain 11 \(expected visual tokens .* from 0 to 10"),
        (torch.zeros(11), r"labels are float32 \[11\] \(expected visual tokens of an integer dtype"),
    ],
)
def test_patch_labels_that_do_not_fit_raise(labels, message):
    with pytest.raises(ValueError, match=message):
        call("BeitForMaskedImageModeling", labels)


def test_patch_labels_as_the_error_suggests_are_accepted():
    labels = torch.arange(32).view(2, 16) % 11
    assert call("BeitForMaskedImageModeling", labels[MASK]).loss.isfinite()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(2, 1, 32, 32, dtype=torch.long), r"labels are int64 \[2, 1, 32, 32\] \(expected classes"),
        (torch.zeros(3, 32, 32, dtype=torch.long), r"labels are int64 \[3, 32, 32\] .*\[batch, height, width\] = \[2"),
        (torch.zeros(2, 32, 32), r"labels are float32 \[2, 32, 32\] \(expected classes of an integer dtype"),
        (torch.full((2, 32, 32), 7, dtype=torch.uint8), r"labels contain 7 \(expected .* from 0 to 4 or 255 \(ignored"),
    ],
)
def test_pixel_labels_that_do_not_fit_raise(labels, message):
    with pytest.raises(ValueError, match=message):
        call("BeitForSemanticSegmentation", labels)


def test_many_wrong_labels_are_counted():
    labels = torch.arange(2 * 32 * 32).view(2, 32, 32)
    with pytest.raises(ValueError, match=r"labels contain 5, 6, 7, 8, 9 and \d+ more"):
        call("BeitForSemanticSegmentation", labels)


def test_labels_follow_a_replaced_classifier():
    model = build()
    model.classifier = torch.nn.Linear(32, 9)
    assert model(images(), labels=torch.tensor([8, 0])).loss.isfinite()
    with pytest.raises(ValueError, match="labels contain 9"):
        model(images(), labels=torch.tensor([9, 0]))


@pytest.mark.parametrize("name", HEADS)
def test_loss_is_nan_if_all_labels_are_ignored(name):
    """PyTorch's cross entropy is the mean of no number then, and the docstrings say so."""
    ignored = {
        "BeitForImageClassification": torch.full((2,), -100),
        "BeitForMaskedImageModeling": torch.full((int(MASK.sum()),), -100),
        "BeitForSemanticSegmentation": torch.full((2, 32, 32), 255),
    }
    assert call(name, ignored[name]).loss.isnan()


def test_values_of_labels_on_other_devices_are_not_read():
    model = build().to("meta")
    output = model(images().to("meta"), labels=torch.tensor([0, 1], device="meta"))
    assert output.loss.shape == ()
    with pytest.raises(ValueError, match=r"labels are int64 \[3\]"):
        model(images().to("meta"), labels=torch.zeros(3, dtype=torch.long, device="meta"))


def test_labels_under_vmap_and_dispatch_modes_run():
    model, pixels, labels = build(), images(), torch.tensor([0, 1])
    expected = model(pixels, labels=labels).loss
    with FlopCounterMode(display=False):
        torch.testing.assert_close(model(pixels, labels=labels).loss, expected)
    single = torch.vmap(lambda x, y: model(x[None], labels=y[None]).loss)(pixels, labels)
    torch.testing.assert_close(single.mean(), expected)
