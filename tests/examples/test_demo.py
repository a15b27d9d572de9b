"""The demo with a small model."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from beit_fast import BeitConfig
from beit_fast.ops.dispatch import attention, availability

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"


@pytest.fixture(scope="module")
def demo() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("beit_fast_demo", DEMO)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def config() -> BeitConfig:
    return BeitConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=64,
        patch_size=16,
        num_labels=5,
        use_relative_position_bias=True,
    )


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    path = tmp_path / "photograph.png"
    pixels = np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_demo_compares_backends_and_saves_figure(
    demo: ModuleType, config: BeitConfig, photograph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "folder" / "demo.png"
    assert demo.main(["--image", str(photograph), "--out", str(picture)], config) == 0
    text = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.startswith(demo.BACKENDS)}
    assert list(rows) == ["eager", "sdpa", "triton"]
    assert rows["triton"][1] == attention.kernel_name("triton", "cpu", torch.float32, config.attention_head_dim)
    assert [rows["eager"][2], rows["sdpa"][2]] == ["conv", "conv"]
    assert rows["triton"][2] in availability.PATCH_EMBED_KERNELS
    for backend in ("sdpa", "triton"):
        assert float(rows[backend][4]) < 1e-5
        assert float(rows[backend][5]) > 0
    moved = re.search(r"the logits move by (\S+)", text)
    assert moved is not None
    assert float(moved[1]) > 1e-4
    assert "photograph.png, resized to 64x64" in text
    assert "random" in text
    assert "digits: 20 of 20" in text
    with Image.open(picture) as image:
        assert image.size == tuple(round(side * 120) for side in demo.FIGURE_INCHES)


def test_demo_with_a_checkpoint_prints_classes(
    demo: ModuleType, photograph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--image", str(photograph), "--out", str(tmp_path / "demo.png"), "--model", str(demo.DIGITS)]
    assert demo.main(arguments) == 0
    text = capsys.readouterr().out
    assert f"weights  {demo.DIGITS}" in text
    classes = re.findall(r"^ +(\d+\.\d\d) % +\d  (\w+)$", text, re.MULTILINE)
    assert len(classes) == 5
    assert {name for _, name in classes} <= {
        "zero",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
    }
    assert sum(float(share) for share, _ in classes) <= 100.1


def test_smooth_table_is_smooth_with_unit_deviation(demo: ModuleType) -> None:
    torch.manual_seed(0)
    table = demo.smooth_table((14, 14), 12)
    assert table.shape == (27 * 27 + 3, 12)
    torch.testing.assert_close(table[:-3].std(0), torch.ones(12))
    grid = table[:-3].t().reshape(12, 27, 27)
    steps = (grid[:, :, 1:] - grid[:, :, :-1]).std((1, 2))
    assert steps.max() < 1.0
    assert steps[-1] < steps[0] / 2


def test_effect_of_bias_restores_the_model(demo: ModuleType, config: BeitConfig) -> None:
    model = demo.build_model(config, torch.device("cpu"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert demo.effect_of_bias(model, torch.randn(1, 3, 64, 64)) > 1e-4
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_preprocess_covers_minus_one_to_one(demo: ModuleType) -> None:
    pixels = demo.preprocess(Image.fromarray(np.array([[[0, 0, 0]], [[255, 255, 255]]], np.uint8)), (2, 1))
    assert pixels.shape == (1, 3, 2, 1)
    assert pixels[0, :, :, 0].tolist() == [[-1.0, 1.0]] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "there-is/no-such-model"], "no checkpoint 'there-is/no-such-model'"),
        (["--image", "there-is-no-such-file.jpg"], "cannot read the image"),
        (["--image", str(DEMO)], "cannot read the image"),
    ],
)
def test_demo_invalid_arguments_exit_with_one_error(
    demo: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        demo.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
