"""Accuracies of classification and segmentation against scikit-learn and plain sums."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, top_k_accuracy_score

from beit_fast import BeitImageProcessor
from beit_fast.training.evaluation import ClassificationAccuracy, SegmentationAccuracy


def accuracy_of(scores, labels):
    accuracy = ClassificationAccuracy(scores.shape[1])
    for part in range(0, len(scores), 7):
        accuracy.update(scores[part : part + 7], labels[part : part + 7])
    return accuracy.compute()


@pytest.mark.parametrize("classes", [6, 40])
def test_top1_and_top5_equal_those_of_scikit_learn(classes):
    scores, labels = torch.randn(50, classes), torch.randint(classes, (50,))
    scores[torch.arange(50), labels] += 1.5
    found = accuracy_of(scores, labels)
    wanted = [top_k_accuracy_score(labels, scores, k=k, labels=range(classes)) for k in (1, 5)]
    assert (found["top1"], found["top5"], found["images"]) == (*wanted, 50)
    assert found["top1"] == accuracy_score(labels, scores.argmax(1)) < found["top5"]


def test_top5_of_fewer_than_5_classes_counts_all_images():
    found = accuracy_of(torch.tensor([[0.0, 1.0, 2.0]] * 4), torch.tensor([0, 1, 2, 2]))
    assert (found["top1"], found["top5"]) == (0.5, 1.0)


def test_lowest_class_is_first_of_equal_scores():
    found = accuracy_of(torch.zeros(7, 7), torch.arange(7))
    assert (found["top1"], found["top5"]) == (1 / 7, 5 / 7)


@pytest.mark.parametrize("score", [math.nan, -math.inf, math.inf])
def test_image_without_a_finite_score_of_its_class_is_wrong(score):
    found = accuracy_of(torch.tensor([[score, 0.0, 1.0]]), torch.tensor([0]))
    assert (found["top1"], found["top5"], found["images"]) == (0.0, 0.0, 1)


def test_image_with_nan_for_another_class_is_wrong():
    assert accuracy_of(torch.tensor([[1.0, math.nan]]), torch.tensor([0]))["top1"] == 0.0


@pytest.mark.parametrize(
    ("scores", "labels", "error", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 3]), ValueError, r"labels include 3 \(expected 0 to 2\)"),
        (torch.zeros(2, 3), torch.tensor([-1, 5]), ValueError, "labels include -1, 5"),
        (torch.zeros(2, 3), torch.tensor([0.0, 1.0]), TypeError, "float32"),
        (torch.zeros(2, 4), torch.tensor([0, 1]), ValueError, r"\[2, 4\] and labels \[2\] \(expected \[B, 3\]"),
    ],
)
def test_update_with_labels_that_do_not_fit_raises(scores, labels, error, message):
    with pytest.raises(error, match=message):
        ClassificationAccuracy(3).update(scores, labels)


def test_accuracy_of_no_image_is_an_error():
    with pytest.raises(ValueError, match="no images is not defined"):
        ClassificationAccuracy(3).compute()


def test_segmentation_equals_sums_over_the_confusion_matrix_of_scikit_learn():
    predicted = [torch.randint(5, size) for size in ((8, 9), (4, 30), (17, 3))]
    annotated = [torch.where(torch.rand(p.shape) < 0.6, p, torch.randint(4, p.shape)) for p in predicted]
    for ids in annotated:
        ids[torch.rand(ids.shape) < 0.2] = 255
    metric = SegmentationAccuracy(6)
    metric.update(predicted[:2], [ids.to(torch.uint8) for ids in annotated[:2]])
    metric.update(predicted[2:], annotated[2:])
    found = metric.compute()
    flat_annotated, flat_predicted = (torch.cat([ids.flatten() for ids in maps]) for maps in (annotated, predicted))
    is_counted = flat_annotated != 255
    matrix = confusion_matrix(flat_annotated[is_counted], flat_predicted[is_counted], labels=range(6))
    hits, rows, columns = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    iou = [h / (r + c - h) if r + c else None for h, r, c in zip(hits, rows, columns, strict=True)]
    accuracy = [h / r if r else None for h, r in zip(hits, rows, strict=True)]
    assert found["iou"] == pytest.approx(iou)
    assert found["accuracy"] == pytest.approx(accuracy)
    assert iou[5] is accuracy[5] is None  # class 5 occurs nowhere
    assert accuracy[4] is None or rows[4]
    assert found["mean_iou"] == pytest.approx(sum(filter(None, iou)) / sum(value is not None for value in iou))
    counted = [value for value in accuracy if value is not None]
    assert found["mean_accuracy"] == pytest.approx(sum(counted) / len(counted))
    assert found["pixel_accuracy"] == pytest.approx(hits.sum() / matrix.sum())
    assert (found["images"], found["pixels"]) == (3, int(is_counted.sum()))


def test_reduced_labels_ignore_the_background_and_255():
    metric = SegmentationAccuracy(2, do_reduce_labels=True)
    metric.update([torch.tensor([[0, 1, 1, 0]])], [torch.tensor([[1, 2, 0, 255]], dtype=torch.uint8)])
    assert metric.compute()["pixels"] == 2
    assert metric.compute()["pixel_accuracy"] == 1.0


def test_other_ignore_index_is_not_counted_and_255_is_then_an_error():
    metric = SegmentationAccuracy(2, ignore_index=7)
    metric.update([torch.tensor([[0, 1]])], [torch.tensor([[0, 7]])])
    assert metric.compute()["pixels"] == 1
    with pytest.raises(ValueError, match=r"annotations include 255 \(expected 0 to 1\)"):
        metric.update([torch.tensor([[0, 1]])], [torch.tensor([[0, 255]])])
    assert metric.compute()["images"] == 1  # nothing was counted


def test_predictions_at_another_size_than_the_annotations_are_an_error():
    with pytest.raises(ValueError, match=r"shape \[2, 2\], but annotations \[4, 4\]"):
        SegmentationAccuracy(2).update([torch.zeros(2, 2).long()], [torch.zeros(4, 4).long()])


def test_segmentation_without_counted_pixels_is_an_error():
    metric = SegmentationAccuracy(2)
    metric.update([torch.zeros(2, 2).long()], [torch.full((2, 2), 255)])
    with pytest.raises(ValueError, match="no pixel of an annotation is counted"):
        metric.compute()


def test_logits_upsampled_by_the_processor_are_scored_at_the_size_of_the_annotation():
    logits = torch.zeros(1, 2, 2, 2)
    logits[0, 1, :, 1] = 1.0
    logits[0, 0, :, 0] = 1.0
    annotation = torch.tensor([[0, 0, 1, 1]] * 4)
    predicted = BeitImageProcessor().post_process_semantic_segmentation({"logits": logits}, [annotation.shape])
    metric = SegmentationAccuracy(2)
    metric.update(predicted, [annotation])
    assert metric.compute()["mean_iou"] == 1.0
