"""Hints for options by their names in other libraries."""

import inspect

import pytest

from beit_fast.configuration.labels_and_stages import known_fields
from beit_fast.image_processing.options import OPTION_NAMES
from beit_fast.models.base import BeitPreTrainedModel
from beit_fast.utils.foreign_names import FOREIGN_NAMES, suggest_options

from ..support import timm_reference

ARGUMENTS = set(inspect.signature(BeitPreTrainedModel.from_pretrained).parameters)
OPTIONS = known_fields() | OPTION_NAMES | ARGUMENTS


@pytest.mark.parametrize("name", FOREIGN_NAMES)
def test_foreign_name_is_not_an_option_and_those_that_it_stands_for_are(name):
    assert name not in OPTIONS
    assert set(FOREIGN_NAMES[name]) <= OPTIONS


def test_every_argument_of_the_model_in_timm_is_an_option_or_has_a_hint():
    names = set(inspect.signature(timm_reference.timm.models.beit.Beit).parameters) - {"kwargs", "device"}
    without = {name for name in names - known_fields() if not suggest_options([name], known_fields())}
    assert without == set()


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        (["note"], ""),
        (["mean"], " (did you mean 'image_mean'?)"),
        (["note", "crop_sise"], " (did you mean 'crop_size'?)"),
        (["mean", "crop_sise"], " (mean: did you mean 'image_mean'?; crop_sise: did you mean 'crop_size'?)"),
        (["crop_pct"], " (did you mean 'size' or 'crop_size'?)"),
        (["num_classes"], ""),
    ],
)
def test_suggest_options_names_what_exists_here(names, hint):
    assert suggest_options(names, iter(["size", "crop_size", "image_mean"])) == hint
