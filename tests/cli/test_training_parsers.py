"""The parsers of the training commands against the options of the recipes."""

from __future__ import annotations

import dataclasses

import pytest

from beit_fast.cli.main import main
from beit_fast.cli.training_parsers import ENGINE_OPTIONS, PRETRAIN_OPTIONS
from beit_fast.training import PretrainOptions

FIELDS = {field.name: field for field in dataclasses.fields(PretrainOptions)}
NOT_ON_THE_LINE = {"data", "output", "attn_implementation", "configuration"}  # positional, --attn, unilm's flags


def test_each_option_of_pretraining_has_a_flag():
    flags = {option.name for option in (*ENGINE_OPTIONS, *PRETRAIN_OPTIONS)}
    assert flags == FIELDS.keys() - NOT_ON_THE_LINE


@pytest.mark.parametrize("option", [*ENGINE_OPTIONS, *PRETRAIN_OPTIONS], ids=lambda option: option.name)
def test_default_in_help_is_that_of_the_options(option):
    default = FIELDS[option.name].default
    if option.default:
        assert option.default == (" ".join(map(str, default)) if isinstance(default, tuple) else str(default))
    else:
        assert default in (None, False)


def test_pretrain_reports_every_bad_value_in_one_error(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    arguments = ["pretrain", str(tmp_path / "images"), str(tmp_path / "run"), "--epochs", "0", "--drop-path", "2"]
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert "epochs=0" in message
    assert "drop_path=2.0" in message
    assert not (tmp_path / "run").exists()
