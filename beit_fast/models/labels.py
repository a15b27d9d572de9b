"""Checks of labels, which a loss compares with logits.

Dtypes and shapes are checked on every device. Values are checked on CPU: elsewhere this would wait for the device.
Under `torch.compile` and `torch.export` nothing is checked, because the shapes would be fixed. PyTorch's losses check
them there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ..ops.functorch import transforms_are_active
from ..utils.messages import join_some

IGNORED_LABEL = -100
"""The label that `torch.nn.functional.cross_entropy` ignores by default."""

_SHOWN = 5


def problem_of_labels(labels: Tensor, num_labels: int, problem_type: str | None) -> str:
    """Name the problem: `problem_type`, else by the labels.

    The default is regression for one label, `"single_label_classification"` for integers, else several labels.
    """
    if problem_type is not None:
        return problem_type
    if num_labels == 1:
        return "regression"
    return "single_label_classification" if _is_integer(labels) else "multi_label_classification"


def check_image_labels(labels: Tensor, batch: int, num_labels: int, problem_type: str | None) -> None:
    """Check the labels of images, by the type of the problem.

    Raises:
        ValueError: If shape, dtype or values do not fit.
    """
    if torch.compiler.is_compiling():
        return
    problem = problem_of_labels(labels, num_labels, problem_type)
    if problem == "single_label_classification":
        expected = f"class ids of an integer dtype, [batch] = [{batch}], each from 0 to {num_labels - 1}"
        expected += f" or {IGNORED_LABEL} (ignored)"
        shapes: list[tuple[int, ...]] = [(batch,), (batch, 1)]
        _check_shape(labels, shapes, expected, _is_integer(labels))
        _check_classes(labels, num_labels, IGNORED_LABEL, expected)
    elif problem == "regression":
        expected = f"numbers, [batch] = [{batch}]" if num_labels == 1 else f"numbers, [{batch}, {num_labels}]"
        shapes = [(batch,), (batch, 1)] if num_labels == 1 else [(batch, num_labels)]
        _check_shape(labels, shapes, expected, not labels.is_complex())
    else:
        expected = f"numbers from 0 to 1, [batch, num_labels] = [{batch}, {num_labels}], for several labels an image"
        if problem_type is None:
            expected += f", or class ids of an integer dtype, [batch] = [{batch}]"
        _check_shape(labels, [(batch, num_labels)], expected, not labels.is_complex())
        if _has_values(labels) and bool(((labels < 0) | (labels > 1)).any()):
            low, high = labels.min().item(), labels.max().item()
            raise ValueError(f"labels are from {low} to {high} (expected {expected})")


def check_patch_labels(labels: Tensor, vocab_size: int) -> None:
    """Check the labels of masked patches, `[masked patches]`.

    Raises:
        ValueError: If shape, dtype or values do not fit.
    """
    if torch.compiler.is_compiling():
        return
    expected = (
        "visual tokens of an integer dtype, [masked patches], one for each True of bool_masked_pos in row-major order, "
        f"each from 0 to {vocab_size - 1} or {IGNORED_LABEL} (ignored)"
    )
    if labels.ndim in (2, 3):
        expected += "; for the tokens of all patches, pass labels[bool_masked_pos.bool()]"
    _check_shape(labels, None, expected, _is_integer(labels) and labels.ndim == 1)
    _check_classes(labels, vocab_size, IGNORED_LABEL, expected)


def check_patch_label_count(labels: Tensor, masked: int) -> None:
    """Check that there is one label for each of the `masked` patches.

    Raises:
        ValueError: If the numbers differ.
    """
    if not torch.compiler.is_compiling() and labels.shape[0] != masked:
        raise ValueError(
            f"labels are {_summary(labels)} (expected [{masked}], one visual token for each True of bool_masked_pos)"
        )


def check_pixel_labels(labels: Tensor, batch: int, num_labels: int, ignored: int) -> None:
    """Check the classes of pixels, `[B, height, width]`.

    Raises:
        ValueError: If shape, dtype or values do not fit.
    """
    if torch.compiler.is_compiling():
        return
    expected = (
        f"classes of an integer dtype, [batch, height, width] = [{batch}, height, width], each from 0 to "
        f"{num_labels - 1} or {ignored} (ignored)"
    )
    fits = labels.ndim == 3 and labels.shape[0] == batch
    _check_shape(labels, None, expected, _is_integer(labels) and fits)
    _check_classes(labels, num_labels, ignored, expected)


def _check_shape(labels: Tensor, shapes: Sequence[tuple[int, ...]] | None, expected: str, fits: bool) -> None:
    """Raise ValueError unless `fits` and the shape is one of `shapes`; None accepts any."""
    if not fits or (shapes is not None and tuple(labels.shape) not in shapes):
        raise ValueError(f"labels are {_summary(labels)} (expected {expected})")


def _check_classes(labels: Tensor, classes: int, ignored: int, expected: str) -> None:
    if not _has_values(labels):
        return
    labels = labels.long()
    wrong = ((labels < 0) | (labels >= classes)) & (labels != ignored)
    if bool(wrong.any()):
        found = labels[wrong].unique().tolist()
        raise ValueError(f"labels contain {join_some(found, _SHOWN)} (expected {expected})")


def _has_values(labels: Tensor) -> bool:
    """Whether values can be read: on CPU, outside tracing and transforms."""
    if labels.device.type != "cpu" or type(labels) is not Tensor or labels.numel() == 0:
        return False
    if torch.jit.is_tracing() or transforms_are_active():
        return False
    return not is_in_torch_dispatch_mode()


def _is_integer(labels: Tensor) -> bool:
    return labels.dtype != torch.bool and not labels.is_floating_point() and not labels.is_complex()


def _summary(labels: Tensor) -> str:
    return f"{str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}"
