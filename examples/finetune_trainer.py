"""Fine-tune with Transformers' Trainer: is a handwritten digit odd or even?

python examples/finetune_trainer.py [--out FOLDER] [--steps 120]

The trunk of the digits model beside this script gets a new head with two classes, and Trainer trains both on
scikit-learn's digits. The held-out fifth is the one that the trunk was not trained on.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch.utils.data import Dataset
from train_digits import Digits, load_digits
from transformers import Trainer, TrainingArguments

from beit_fast import BeitForImageClassification, BeitImageProcessor

DIGITS = Path(__file__).parent / "digits"
NAMES = ("even", "odd")


class Parity(Dataset):
    """Digits at `indices`; the label of an odd digit is 1."""

    def __init__(self, digits: Digits, indices: torch.Tensor) -> None:
        self.pixels = digits.pixels[indices]
        self.labels = digits.labels[indices] % 2

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


def main(arguments: list[str] | None = None) -> int:
    """Train, write the checkpoint, and return the exit code. Accuracy is evaluated before and after."""
    parser = argparse.ArgumentParser(description="Fine-tune a BEiT with Transformers' Trainer.")
    parser.add_argument(
        "--out", type=Path, help="folder for the checkpoint and its image processor (default: not saved)"
    )
    parser.add_argument("--steps", type=int, default=120, help="default: 120")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    digits = load_digits(seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the head is new
        model = BeitForImageClassification.from_pretrained(
            DIGITS,
            attn_implementation="triton",
            num_labels=len(NAMES),
            id2label=dict(enumerate(NAMES)),
            ignore_mismatched_sizes=True,
        )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=options.steps,
                per_device_train_batch_size=32,
                per_device_eval_batch_size=256,
                learning_rate=1e-3,
                lr_scheduler_type="cosine",
                report_to="none",
                save_strategy="no",
                logging_steps=20,
            ),
            train_dataset=Parity(digits, digits.training),
            eval_dataset=Parity(digits, digits.held_out),
            compute_metrics=lambda prediction: {
                "accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())
            },
        )
        before = trainer.evaluate()["eval_accuracy"]
        trainer.train()
        after = trainer.evaluate()["eval_accuracy"]
    print(f"attention: {model.attention_report().kernel}")
    print(f"held-out accuracy {before:.1%} before, {after:.1%} after {options.steps} steps")
    if options.out is not None:
        model.save_pretrained(options.out)
        BeitImageProcessor.from_pretrained(DIGITS).save_pretrained(options.out)
        print(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
