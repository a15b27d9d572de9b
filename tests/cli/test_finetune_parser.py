"""The parser of `beit-fast finetune`: its defaults are those of the options, and unilm's flags arrive."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest

from beit_fast.cli.finetune_parser import FINETUNE_OPTIONS, add_finetune
from beit_fast.cli.training import finetuning_fields
from beit_fast.training import FinetuneOptions

COMMAND_OF_UNILM = """
    --model beit_base_patch16_224 --data_path data --finetune pretrained.pth --output_dir out --batch_size 64 --lr 4e-3
    --update_freq 2 --warmup_epochs 20 --epochs 100 --layer_decay 0.65 --drop_path 0.1 --weight_decay 0.05 --mixup 0.8
    --cutmix 1.0 --nb_classes 3 --imagenet_default_mean_and_std --disable_rel_pos_bias --model_ema
"""


def parsed(*arguments: str) -> FinetuneOptions:
    parser = argparse.ArgumentParser()
    add_finetune(parser.add_subparsers(dest="command"))
    fields = vars(parser.parse_args(["finetune", *arguments]))
    fields.pop("command")
    return FinetuneOptions(**finetuning_fields(fields))


def test_help_shows_the_defaults_of_the_options():
    defaults = {field.name: field.default for field in dataclasses.fields(FinetuneOptions)}
    for option in FINETUNE_OPTIONS:
        if option.default:
            value = defaults[option.name]
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            assert option.default == shown, option.name


def test_every_option_of_the_class_has_a_flag():
    options = parsed("data", "out", "--model", "m", "--aa", "none", "--image-mean", "0.1", "0.2", "0.3")
    assert options.aa is None
    assert options.image_mean == (0.1, 0.2, 0.3)
    fields = {field.name for field in dataclasses.fields(FinetuneOptions)}
    own = {option.name for option in FINETUNE_OPTIONS} - {"model_ema"}
    assert own <= fields


def test_options_that_are_not_given_have_the_defaults_of_the_class():
    expected = FinetuneOptions(data=Path("data"), output=Path("out"), model="m")
    assert parsed("data", "out", "--model", "m") == expected


def test_model_ema_has_the_decay_of_unilm_unless_one_is_given():
    assert parsed("data", "out", "--model", "m", "--model-ema").model_ema_decay == 0.9999
    given = parsed("data", "out", "--model", "m", "--model-ema", "--model-ema-decay", "0.9")
    assert given.model_ema_decay == 0.9


def test_command_of_unilm_gives_the_same_options():
    options = parsed(*COMMAND_OF_UNILM.split())
    assert (options.data, options.output, options.model) == (Path("data"), Path("out"), "pretrained.pth")
    assert (options.input_size, options.gradient_accumulation, options.lr) == (224, 2, 4e-3)
    assert options.image_std == (0.229, 0.224, 0.225)
    assert options.configuration == {"use_relative_position_bias": False}
    assert options.model_ema_decay == 0.9999


def test_model_is_required(capsys):
    with pytest.raises(SystemExit):
        parsed("data", "out")
    assert "--model" in capsys.readouterr().err
