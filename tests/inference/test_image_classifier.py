"""`ImageClassifier`: inputs, scores by problem type, modes, and its errors."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import beit_fast
from beit_fast import BeitImageProcessor, BeitImageProcessorFast, ClassScore, ImageClassifier

from ..support.models import build

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
FILES = sorted((DIGITS / "images").glob("*.png"))
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="module")
def digits() -> ImageClassifier:
    return ImageClassifier.from_pretrained(DIGITS)


@pytest.fixture
def processor() -> BeitImageProcessor:
    return BeitImageProcessor(size=32, do_center_crop=False)


def photographs(*sizes: tuple[int, int]) -> list[np.ndarray]:
    """Random RGB photographs `[H, W, 3]` in uint8."""
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def test_one_line_classifies_a_file() -> None:
    best = ImageClassifier.from_pretrained(DIGITS)(FILES[0], top=3)
    assert [type(score) for score in best] == [ClassScore] * 3
    assert best[0].label == "zero"
    assert best[0].id == 0
    assert best[0].score > 0.9
    assert best == sorted(best, key=lambda score: -score.score)


def test_scores_equal_those_of_the_pipeline_of_transformers(digits: ImageClassifier) -> None:
    model = transformers.BeitForImageClassification.from_pretrained(DIGITS)
    processor = transformers.BeitImageProcessorPil.from_pretrained(DIGITS)
    pipeline = transformers.pipeline("image-classification", model=model, image_processor=processor)
    expected = pipeline([str(file) for file in FILES], top_k=4)
    found = digits(FILES, top=4)
    assert [[score.label for score in scores] for scores in found] == [
        [entry["label"] for entry in scores] for scores in expected
    ]
    for scores, entries in zip(found, expected, strict=True):
        assert [score.score for score in scores] == pytest.approx([entry["score"] for entry in entries], abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_lists_keep_their_order_for_any_batch_size(digits: ImageClassifier, batch_size: int) -> None:
    answers = digits(FILES, top=1, batch_size=batch_size)
    assert [scores[0].label for scores in answers] == [NAMES[int(file.name[0])] for file in FILES]


def test_every_form_of_an_image_gives_the_same_scores(digits: ImageClassifier) -> None:
    file = FILES[5]
    image = Image.open(file)
    array = np.array(image)
    forms = [file, str(file), image, array, torch.from_numpy(array), np.moveaxis(array, -1, 0)]
    expected = digits(file)
    assert all(digits(form) == expected for form in forms)
    several = (digits(forms, batch_size=1), digits([forms[:2], (image,)], batch_size=1))
    assert several == ([expected] * len(forms), [expected] * 3)
    assert digits(np.stack([array, array]), batch_size=1) == [expected] * 2
    assert digits(torch.from_numpy(array).permute(2, 0, 1)[None]) == [expected]
    assert digits([]) == []


@pytest.mark.parametrize("side", [1, 3, 4])
def test_small_side_that_looks_like_channels_is_not_guessed_again(side: int) -> None:
    """A file of 3 pixels' height has the channels `[3, 3, W]` after it is read."""
    model = build()
    processor = BeitImageProcessor(size=32, do_center_crop=False)
    image = Image.fromarray(photographs((side, 3))[0])
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(pixels).logits.softmax(-1)[0]
    scores = ImageClassifier(model, processor)(image)
    assert [score.score for score in scores] == pytest.approx(expected[[score.id for score in scores]].tolist())


@pytest.mark.parametrize("processor_class", [BeitImageProcessor, BeitImageProcessorFast])
def test_images_of_several_sizes_without_resizing_keep_their_order(processor_class: type[BeitImageProcessor]) -> None:
    processor = processor_class(do_resize=False, do_center_crop=False)
    classifier = ImageClassifier(build(), processor)
    images = photographs((16, 24), (32, 32), (16, 24), (40, 8))
    together = classifier(images, top=5)
    for image, scores in zip(images, together, strict=True):
        alone = classifier(image, top=5)
        assert [score.id for score in alone] == [score.id for score in scores]
        assert [score.score for score in alone] == pytest.approx([score.score for score in scores], abs=1e-5)


@pytest.mark.parametrize(
    ("num_labels", "problem_type", "meaning"),
    [
        (5, None, "softmax"),
        (5, "single_label_classification", "softmax"),
        (5, "multi_label_classification", "sigmoid"),
        (1, "multi_label_classification", "sigmoid"),
        (5, "regression", "value"),
        (1, None, "value"),
    ],
)
def test_scores_follow_problem_type(
    processor: BeitImageProcessor, num_labels: int, problem_type: str | None, meaning: str
) -> None:
    model = build(num_labels=num_labels, problem_type=problem_type)
    image = photographs((32, 32))[0]
    with torch.no_grad():
        logits = model(processor(image, return_tensors="pt")["pixel_values"]).logits[0]
    scores = ImageClassifier(model, processor)(image, top=3)
    expected = {"softmax": logits.softmax(-1), "sigmoid": logits.sigmoid(), "value": logits}[meaning]
    if meaning == "value":
        assert [score.id for score in scores] == list(range(num_labels))
    else:
        assert [score.id for score in scores] == expected.argsort(descending=True)[:3].tolist()
    assert [score.score for score in scores] == pytest.approx([expected[score.id].item() for score in scores])
    assert [score.label for score in scores] == [f"LABEL_{score.id}" for score in scores]


def test_model_in_training_is_evaluated_and_keeps_its_modes(processor: BeitImageProcessor) -> None:
    model = build(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    image = photographs((32, 32))[0]
    expected = ImageClassifier(model, processor)(image)
    model.train()
    model.classifier.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    assert ImageClassifier(model, processor)(image) == expected
    assert {name: module.training for name, module in model.named_modules()} == modes
    with pytest.raises(FileNotFoundError):
        ImageClassifier(model, processor)(["there-is-no-such-file.png"])
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_optimized_compiled_and_transformers_models_classify(digits: ImageClassifier) -> None:
    expected = [scores[0].id for scores in digits(FILES)]
    models = [
        beit_fast.optimize_for_inference(digits.model),
        torch.compile(digits.model, backend="eager"),
        transformers.BeitForImageClassification.from_pretrained(DIGITS),
        beit_fast.BeitForImageClassification.from_pretrained(DIGITS, dtype=torch.bfloat16),
    ]
    for model in models:
        classifier = ImageClassifier(model, digits.processor)
        assert [scores[0].id for scores in classifier(FILES)] == expected


def test_pixels_of_8_bits_reach_a_model_that_normalizes_them(processor: BeitImageProcessor) -> None:
    image = photographs((32, 32))[0]
    model = build()
    expected = ImageClassifier(model, processor)(image)
    model.set_pixel_normalization(processor.image_mean, processor.image_std)
    raw = BeitImageProcessor(size=32, do_center_crop=False, do_rescale=False, do_normalize=False)
    found = ImageClassifier(model, raw)(image)
    assert [score.id for score in found] == [score.id for score in expected]
    assert [score.score for score in found] == pytest.approx([score.score for score in expected], abs=1e-5)


def test_image_size_resizes_what_the_processor_gives() -> None:
    classifier = ImageClassifier.from_pretrained(DIGITS, image_size=64)
    assert classifier.processor.size == {"height": 64, "width": 64}
    assert classifier(FILES[0], top=1)[0].label == "zero"
    assert "BeitForImageClassification" in repr(classifier)


def test_checkpoint_without_preprocessing_is_refused_unless_a_processor_is_passed(tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(DIGITS / name, folder / name)
    with pytest.raises(ValueError, match="is not known") as caught:
        ImageClassifier.from_pretrained(folder)
    assert "processor=BeitImageProcessor(" in str(caught.value)
    processor = BeitImageProcessor.from_pretrained(DIGITS)
    assert ImageClassifier.from_pretrained(folder, processor=processor)(FILES[0], top=1)[0].label == "zero"
    assert ImageClassifier.from_pretrained(DIGITS / "model.safetensors")(FILES[0], top=1)[0].label == "zero"


def test_subfolder_holds_both_the_model_and_the_processor(tmp_path: Path) -> None:
    shutil.copytree(DIGITS, tmp_path / "repository" / "digits")
    BeitImageProcessor(size=224).save_pretrained(tmp_path / "repository")
    classifier = ImageClassifier.from_pretrained(tmp_path / "repository", subfolder="digits")
    assert classifier.processor.size == {"height": 48, "width": 48}


@pytest.mark.filterwarnings("ignore:some parameters")
def test_checkpoint_without_a_classifier_is_refused(tmp_path: Path) -> None:
    build("BeitModel").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"2 parameters of .* random: classifier\.bias, classifier\.weight"):
        ImageClassifier.from_pretrained(tmp_path, processor=BeitImageProcessor())


def test_wrong_models_and_processors_are_one_error(processor: BeitImageProcessor) -> None:
    with pytest.raises(TypeError, match=r"BeitModel \(expected a BeitForImageClassification\)") as caught:
        ImageClassifier(build("BeitModel"), "processor")  # type: ignore[arg-type]
    assert "processor is of type str (expected a BeitImageProcessor)" in str(caught.value)
    with pytest.raises(TypeError, match="model is of type Linear"):
        ImageClassifier(torch.nn.Linear(2, 2), processor)
    with pytest.raises(ValueError, match=r"config\.num_labels=0"):
        ImageClassifier(build(num_labels=0), processor)
    theirs = transformers.BeitModel(transformers.BeitConfig(image_size=32, num_hidden_layers=1))
    with pytest.raises(TypeError, match=r"BeitModel returned logits of NoneType \(expected \[images, num_labels\]"):
        ImageClassifier(theirs, processor)(photographs((32, 32))[0])


def test_logits_that_are_not_finite_are_one_error(processor: BeitImageProcessor) -> None:
    model = build()

    def overflow(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        output[-1, 0] = float("inf")

    model.classifier.register_forward_hook(overflow)
    with pytest.raises(ValueError, match="logits that are not finite for image 3"):
        ImageClassifier(model, processor)(photographs(*[(32, 32)] * 4), batch_size=4)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (3, TypeError, "image 0 is of type int"),
        (iter([FILES[0]]), TypeError, "image 0 is of type list_iterator"),
        ([*FILES[:9], None], TypeError, "image 9 is of type NoneType"),
        ("https://example.org/photograph.jpg", FileNotFoundError, "URLs are not supported"),
        ([*FILES[:9], "there-is-no-such-file.png"], FileNotFoundError, "image 9 .* there is no such file"),
        (DIGITS / "config.json", OSError, "does not recognize its format"),
        (np.zeros((2, 2, 2, 2, 2)), ValueError, "the shape"),
    ],
)
def test_other_inputs_are_one_error(
    digits: ImageClassifier, images: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        digits(images)  # type: ignore[call-overload]


def test_invalid_counts_are_one_error(digits: ImageClassifier) -> None:
    with pytest.raises(ValueError, match="top=0 is too small") as caught:
        digits(FILES[0], top=0, batch_size=1.5)  # type: ignore[call-overload]
    assert "batch_size=1.5 is not an int" in str(caught.value)
