"""BEiT on a photograph under its three attention backends: the differences, the cost, and a picture.

python examples/demo.py [--image PATH] [--model FOLDER_OR_ID] [--out demo.png]

Without --model the weights are random, from a fixed seed: the numbers compare the backends only. Then a small trained
model classifies held-out handwritten digits.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from beit_fast import (
    BeitConfig,
    BeitForImageClassification,
    BeitImageProcessor,
    __version__,
    plot_relative_position_bias,
)
from beit_fast.position_bias import Window
from beit_fast.testing import latency, peak_memory

BACKENDS = ("eager", "sdpa", "triton")
COLORS = ("#8d99ae", "#457b9d", "#d1495b")
SEED = 0
REPEATS = 7
FIGURE_INCHES = (13.6, 8.4)
DIGITS = Path(__file__).parent / "digits"
TABLE_SUFFIX = "relative_position_bias_table"


@dataclass(frozen=True)
class Result:
    """A backend, its kernels, and its logits, time and memory."""

    backend: str
    kernel: str
    patches: str
    logits: Tensor  # [1, num_labels]
    seconds: float  # median
    memory: int | None  # peak bytes, on CUDA only


def main(arguments: list[str] | None = None, config: BeitConfig | None = None) -> int:
    """Run the demo and return the exit code; `config` replaces BEiT-base/16-224."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        import matplotlib.cbook
        from PIL import Image

        path = options.image or matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
        photograph = Image.open(path).convert("RGB")
    except ImportError as error:
        parser.error(f"the picture needs matplotlib: pip install 'beit-fast[plot]' ({error})")
    except OSError as error:
        parser.error(f"cannot read the image: {error}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    conditions = conditions_on(device)
    if options.model is None:
        model = build_model(config or BeitConfig(use_relative_position_bias=True, num_labels=1000), device)
        pixels = preprocess(photograph, model.config.image_size).to(device)
        weights = f"random (seed {SEED}), bias tables smooth with deviation 1: no classes to name"
    else:
        try:
            model, info = BeitForImageClassification.from_pretrained(
                options.model, device=device, output_loading_info=True
            )
            check_classifier(model, info["missing_keys"])
            processor = BeitImageProcessor.from_pretrained(options.model)
            pixels = processor(photograph, return_tensors="pt")["pixel_values"].to(device)
        except (OSError, ValueError) as error:
            parser.error(f"--model {options.model}: {error}")
        weights = options.model
    print(describe_run(model, conditions, Path(path), weights))
    results = measure_backends(model, pixels)
    print(format_table(results))
    if options.model is not None:
        print("\n".join(format_classes(results[-1].logits[0], model.config.id2label)))
    print(f"with every bias table at zero the logits move by {effect_of_bias(model, pixels):.1e} (relative)")
    if device.type != "cuda":
        print("peak memory is measured on CUDA only")
    draw(photograph, model, results, conditions, options.out)
    print(f"picture: {options.out}")
    print(classify_digits(DIGITS, device))
    return 0


def check_classifier(model: BeitForImageClassification, missing: list[str]) -> None:
    """Check that a checkpoint has a classifier whose logits mean probabilities.

    Raises:
        ValueError: If parameters are missing and random, or the classes do not exclude each other.
    """
    if missing:
        raise ValueError(f"the checkpoint does not contain {', '.join(sorted(missing))}, which would be random")
    kind = model.config.problem_type or ("regression" if model.config.num_labels == 1 else None)
    if kind not in (None, "single_label_classification"):
        raise ValueError(f"the checkpoint is for {kind}, and this demo prints the most probable class of one image")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Run BEiT on a photograph under eager, sdpa and triton attention.")
    parser.add_argument("--image", type=Path, help="a photograph (default: the one that matplotlib ships)")
    parser.add_argument("--model", metavar="FOLDER_OR_ID", help="a checkpoint to use instead of random weights")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="the picture to write (default: demo.png)")
    return parser


def build_model(config: BeitConfig, device: torch.device) -> BeitForImageClassification:
    """A model with seeded random weights and smooth bias tables. The tables have deviation 1."""
    torch.manual_seed(SEED)
    model = BeitForImageClassification(config).eval()
    window = window_of(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(TABLE_SUFFIX):
                parameter.copy_(smooth_table(window, config.num_attention_heads))
    return model.to(device)


def window_of(config: BeitConfig) -> Window:
    """The window in patches (height, width) of the configuration's image size."""
    height, width = _pair(config.image_size)
    return height // config.patch_size, width // config.patch_size


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def smooth_table(window: Window, heads: int) -> Tensor:
    """Blurred noise `[rows, heads]` of mean 0 and deviation 1; later heads are blurred more."""
    height, width = (2 * side - 1 for side in window)
    noise = torch.randn(1, heads, height, width)
    for axis in (2, 3):
        noise = _blur(noise, axis)
    grid = noise[0].flatten(1)  # [heads, (2Wh-1)(2Ww-1)]
    grid = (grid - grid.mean(1, keepdim=True)) / grid.std(1, keepdim=True)
    return torch.cat([grid.t(), torch.randn(3, heads)])


def _blur(noise: Tensor, axis: int) -> Tensor:
    """Gaussian blur along one axis of `[1, heads, h, w]`. Its width is 0.8 to 2.6 patches, by head."""
    heads = noise.shape[1]
    reach = 12
    distance = torch.arange(-reach, reach + 1, dtype=noise.dtype)
    widths = torch.linspace(0.8, 2.6, heads)[:, None]
    weights = torch.exp(-((distance / widths) ** 2) / 2)  # [heads, 2 * reach + 1]
    shape = (heads, 1, -1, 1) if axis == 2 else (heads, 1, 1, -1)
    padding = (reach, 0) if axis == 2 else (0, reach)
    return F.conv2d(noise, weights.view(shape), padding=padding, groups=heads)


def preprocess(photograph: Any, image_size: Any) -> Tensor:
    """Resize an RGB photograph bicubically to pixels `[1, 3, H, W]`. They are in [-1, 1]."""
    from PIL import Image

    height, width = _pair(image_size)
    pixels = torch.from_numpy(np.array(photograph.resize((width, height), Image.Resampling.BICUBIC)))
    return pixels.permute(2, 0, 1)[None].float() / 127.5 - 1.0


def measure_backends(model: BeitForImageClassification, pixels: Tensor) -> list[Result]:
    """Measure logits, latency and, on CUDA, peak memory of one forward under each backend."""
    results = []
    with (
        tqdm(total=3 * len(BACKENDS), unit="step", file=sys.stderr, leave=False, disable=None) as bar,
        torch.inference_mode(),
    ):
        for backend in BACKENDS:
            model.set_attn_implementation(backend)

            def forward() -> Tensor:
                return model(pixels).logits

            bar.set_description(f"{backend}: logits")
            logits = forward()
            kernel, patches = model.attention_report().kernel, model.patch_embed_report().kernel
            bar.update()
            bar.set_description(f"{backend}: latency")
            seconds = latency(forward, pixels.device, repeats=REPEATS, warmup=1).median
            bar.update()
            bar.set_description(f"{backend}: memory")
            memory = peak_memory(forward, pixels.device) if pixels.is_cuda else None
            results.append(Result(backend, kernel, patches, logits, seconds, memory))
            bar.update()
    return results


def effect_of_bias(model: BeitForImageClassification, pixels: Tensor) -> float:
    """The relative change of the logits when every bias table is zero."""
    tables = [parameter for name, parameter in model.named_parameters() if name.endswith(TABLE_SUFFIX)]
    saved = [table.detach().clone() for table in tables]
    with torch.no_grad():
        exact = model(pixels).logits
        for table in tables:
            table.zero_()
        without = model(pixels).logits
        for table, values in zip(tables, saved, strict=True):
            table.copy_(values)
    return ((without - exact).norm() / exact.norm()).item()


def format_classes(logits: Tensor, id2label: dict[int, str]) -> list[str]:
    """The five most probable classes, a line each."""
    values, indices = logits.float().softmax(-1).topk(min(5, logits.numel()))
    return [
        f"{100 * probability:7.2f} %  {index:5d}  {id2label[index]}"
        for index, probability in zip(indices.tolist(), values.tolist(), strict=True)
    ]


def classify_digits(folder: Path, device: torch.device) -> str:
    """Classify the shipped images with the shipped digits model. These images were held out."""
    model = BeitForImageClassification.from_pretrained(folder, attn_implementation="triton", device=device)
    files = sorted((folder / "images").glob("*.png"))
    processor = BeitImageProcessor.from_pretrained(folder)
    pixels = processor([str(file) for file in files], return_tensors="pt")["pixel_values"].to(device)
    with torch.inference_mode():
        answers = model(pixels).logits.argmax(-1).tolist()
    right = sum(file.name.startswith(f"{answer}_") for file, answer in zip(files, answers, strict=True))
    return (
        f"digits: {right} of {len(files)} held-out handwritten digits are correct with the trained model in "
        f"{folder.name}/ ({model.attention_report().kernel}): {' '.join(map(str, answers))}"
    )


def conditions_on(device: torch.device) -> dict[str, Any]:
    """The device and the versions that the numbers belong to."""
    return {
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None,
        "beit_fast": __version__,
    }


def describe_run(model: BeitForImageClassification, conditions: dict[str, Any], image: Path, weights: str) -> str:
    """The device, versions, image, model and weights of this run."""
    config = model.config
    height, width = _pair(config.image_size)
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return "\n".join(
        [
            f"device   {conditions['device_name']}, {conditions['threads']} CPU threads",
            f"with     torch {conditions['torch']}, triton {conditions['triton'] or 'none'}, "
            f"beit_fast {conditions['beit_fast']}",
            f"image    {image.name}, resized to {height}x{width}",
            f"model    BEiT, {config.num_hidden_layers} layers of width {config.hidden_size}, "
            f"patch {config.patch_size}, {parameters:.1f} M parameters, fp32, batch 1",
            f"weights  {weights}",
            "",
        ]
    )


def format_table(results: list[Result]) -> str:
    """One line per backend; differences of the logits are against the first backend."""
    head = f"{'backend':9}{'kernel':20}{'patches':16}{'largest difference':>20}{'relative':>11}"
    lines = [f"{head}{'median ms':>11}{'peak MiB':>10}"]
    exact = results[0].logits.double()
    for result in results:
        difference = (result.logits.double() - exact).abs().max().item()
        relative = ((result.logits.double() - exact).norm() / exact.norm()).item()
        memory = "-" if result.memory is None else f"{result.memory / 2**20:.1f}"
        apart = f"{difference:20.2e}{relative:11.2e}" if result is not results[0] else f"{'(reference)':>20}{'':11}"
        ran = f"{result.backend:9}{result.kernel:20}{result.patches:16}"
        lines.append(f"{ran}{apart}{result.seconds * 1e3:11.1f}{memory:>10}")
    lines.append(
        f"logits against {results[0].backend}: largest difference, and norm of the difference over norm;\n"
        f"median of {REPEATS} forwards; peak memory above the level before a forward"
    )
    return "\n".join(lines)


def draw(
    photograph: Any, model: BeitForImageClassification, results: list[Result], conditions: dict[str, Any], path: Path
) -> None:
    """Draw the photograph, one patch's bias, and bars of time and memory. The bias is that of some heads."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=FIGURE_INCHES, layout="constrained")
    figure.suptitle(
        "BEiT's relative position bias: what the marked patch adds to its score for every patch", fontsize=14
    )
    figure.supxlabel(_caption(conditions), fontsize=9, color="#555555")
    above, below = figure.subfigures(2, 1, height_ratios=(3.6, 1), hspace=0.02)
    left, right = above.subfigures(1, 2, width_ratios=(1, 1.5))
    window = window_of(model.config)
    query = window[0] // 2, window[1] // 2
    _draw_photograph(left.subplots(), photograph, window, query)
    heads = _spread(model.config.num_attention_heads, 6)
    plot_relative_position_bias(model, layer=0, heads=heads, query=query, figure=right)
    for axis, field, scale, title in zip(
        below.subplots(1, 2),
        ("seconds", "memory"),
        (1e3, 1 / 2**20),
        ("median latency of one image, ms", "peak memory of a forward, MiB"),
        strict=True,
    ):
        _draw_bars(axis, results, field, scale, title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_photograph(axis: Any, photograph: Any, window: Window, query: tuple[int, int]) -> None:
    """Draw the photograph in units of patches, and mark the patch `query`."""
    from matplotlib.patches import Rectangle

    axis.imshow(np.asarray(photograph), extent=(0, window[1], window[0], 0))
    axis.add_patch(Rectangle((query[1], query[0]), 1, 1, fill=False, edgecolor="#ffb000", linewidth=2))
    axis.set_title("the photograph and the marked patch", fontsize=11)
    axis.set_axis_off()


def _spread(heads: int, wanted: int) -> list[int]:
    return sorted({round(float(head)) for head in np.linspace(0, heads - 1, min(wanted, heads))})


def _draw_bars(axis: Any, results: list[Result], field: str, scale: float, title: str) -> None:
    """Draw one bar per backend of `field` times `scale`, or "not measured"."""
    rows = range(len(results))
    known = [getattr(result, field) for result in results]
    lengths = [0.0 if value is None else value * scale for value in known]
    longest = max(lengths) or 1.0
    axis.barh(rows, lengths, color=COLORS[: len(results)], height=0.66)
    for row, (value, length) in enumerate(zip(known, lengths, strict=True)):
        text = "not measured" if value is None else f"{length:.1f}"
        axis.text(length + 0.015 * longest, row, text, va="center", fontsize=10)
    axis.set_title(title, fontsize=11, loc="left")
    axis.set_xlim(0, 1.15 * longest)
    axis.set_xticks([])
    axis.set_yticks(rows, [_label(result) for result in results])
    axis.tick_params(left=False)
    axis.invert_yaxis()
    axis.spines[["top", "right", "bottom"]].set_visible(False)


def _label(result: Result) -> str:
    return result.backend if result.kernel == result.backend else f"{result.backend}\n({result.kernel})"


def _caption(conditions: dict[str, Any]) -> str:
    return (
        f"{conditions['device_name']}, {conditions['threads']} CPU threads; torch {conditions['torch']}; "
        f"triton {conditions['triton'] or 'none'}; beit_fast {conditions['beit_fast']}; "
        f"fp32, batch 1, median of {REPEATS} forwards; seeded random weights"
    )


if __name__ == "__main__":
    sys.exit(main())
