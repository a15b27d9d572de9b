"""State dicts as training scripts save them: containers, averaged weights and prefixes of names."""

import argparse
import pathlib
import re

import pytest
import torch
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel

import beit_fast
from beit_fast.checkpoint.training_files import WEIGHT_KEYS

from ..support import timm_reference
from ..support.transformers_reference import TINY, randomize

Classifier = beit_fast.BeitForImageClassification
EMA_KEYS = (
    "state_dict_ema",
    "model_ema",
    "ema",
    "EMA",
    "ema_state_dict",
    "model_state_dict_ema",
    "model_ema_state_dict",
    "model_ema_state",
    "ema_model",
    "ema_model_state",
    "ema_model_state_dict",
    "ema_state",
    "averaged_model",
    "average_model_state",
    "swa_model",
    "swa_state_dict",
)


def make_model(seed=0):
    model = Classifier(beit_fast.BeitConfig(**TINY)).eval()
    randomize(model, seed)
    return model


class Wrapper(torch.nn.Module):
    """A network under an attribute, as Lightning modules have it."""

    def __init__(self, name, network):
        super().__init__()
        self.add_module(name, network)


def data_parallel(model):
    return Wrapper("module", model)


WRAPPED = {
    "compile": torch.compile,
    "data parallel": data_parallel,
    "data parallel of compile": lambda model: data_parallel(torch.compile(model)),
    "compile of data parallel": lambda model: torch.compile(data_parallel(model)),
    "Lightning model": lambda model: Wrapper("model", model),
    "Lightning net": lambda model: Wrapper("net", model),
    "Lightning model of compile": lambda model: Wrapper("model", torch.compile(model)),
    "an attribute of any name": lambda model: Wrapper("student", model),
    "average": AveragedModel,
    "compile of average": lambda model: torch.compile(AveragedModel(model)),
    "average of compile in data parallel": lambda model: AveragedModel(data_parallel(torch.compile(model))),
    "Lightning of average": lambda model: Wrapper("model", AveragedModel(model)),
}


def write(model, folder, content):
    model.config.save_pretrained(folder)
    torch.save(content, folder / "pytorch_model.bin")


def load(path, **options):
    return Classifier.from_pretrained(path, output_loading_info=True, **options)


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors", "epoch=3.ckpt"])
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_from_pretrained_removes_every_stack_of_prefixes(wrapper, file, tmp_path):
    model = make_model()
    state = WRAPPED[wrapper](model).state_dict()
    model.config.save_pretrained(tmp_path)
    if file == "model.safetensors":
        save_file({key: x.contiguous() for key, x in state.items()}, tmp_path / file)
    else:
        torch.save({"state_dict": state, "epoch": 3} if file.endswith("ckpt") else state, tmp_path / file)
    loaded, info = load(tmp_path / file)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert ("average" in wrapper) == (info["ema_weights"] is not None)
    assert_same_state(loaded.state_dict(), model.state_dict())


@pytest.mark.parametrize("wrapper", ["compile", "Lightning model", "average of compile in data parallel"])
def test_from_pretrained_removes_prefixes_from_names_of_timm(wrapper, tmp_path):
    theirs = timm_reference.build(use_rel_pos_bias=True)
    torch.save({"model": WRAPPED[wrapper](theirs).state_dict()}, tmp_path / "model_best.pth.tar")
    plain = tmp_path / "plain.pth"
    torch.save(theirs.state_dict(), plain)
    loaded, _ = load(tmp_path / "model_best.pth.tar")
    assert_same_state(loaded.state_dict(), load(plain)[0].state_dict())


def test_from_pretrained_removes_prefixes_inside_names(tmp_path):
    """Single blocks were compiled, or wrapped by activation checkpointing."""
    model = make_model()
    state = {
        key.replace("layer.1.", "layer.1._orig_mod.").replace("layer.2.", "layer.2._checkpoint_wrapped_module."): x
        for key, x in model.state_dict().items()
    }
    write(model, tmp_path, state)
    assert_same_state(load(tmp_path)[0].state_dict(), model.state_dict())


@pytest.mark.parametrize("key", WEIGHT_KEYS)
def test_from_pretrained_reads_every_usual_container(key, tmp_path):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters()).state_dict()
    write(model, tmp_path, {key: model.state_dict(), "optimizer": optimizer, "epoch": 3, "arch": "beit"})
    loaded, info = load(tmp_path)
    assert info["ema_weights"] is None
    assert_same_state(loaded.state_dict(), model.state_dict())


@pytest.mark.parametrize("key", EMA_KEYS)
def test_from_pretrained_takes_averaged_weights_by_default_and_reports_them(key, tmp_path):
    raw, averaged = make_model(0), make_model(1)
    write(raw, tmp_path, {"state_dict": raw.state_dict(), key: averaged.state_dict()})
    for use_ema, wanted, taken in ((None, averaged, key), (True, averaged, key), (False, raw, None)):
        loaded, info = load(tmp_path, use_ema=use_ema)
        assert info["ema_weights"] == taken
        assert_same_state(loaded.state_dict(), wanted.state_dict())


@pytest.mark.parametrize("names", [("state_dict", "state_dict_ema"), ("model", "model_ema")])
def test_from_pretrained_takes_the_weights_that_timm_takes(names, tmp_path):
    from timm.models import load_state_dict

    raw, averaged = (timm_reference.build(use_rel_pos_bias=True).state_dict() for _ in range(2))
    averaged = {key: x + 1 if x.is_floating_point() else x for key, x in averaged.items()}
    file = tmp_path / "checkpoint.pth.tar"
    torch.save(dict(zip(names, (raw, averaged), strict=True)), file)
    theirs = load_state_dict(file)["head.weight"]
    assert torch.equal(load(file)[0].classifier.weight, theirs)
    theirs = load_state_dict(file, use_ema=False)["head.weight"]
    assert torch.equal(load(file, use_ema=False)[0].classifier.weight, theirs)


def test_from_pretrained_with_only_averaged_weights_reads_them(tmp_path):
    model = make_model()
    write(model, tmp_path, {"state_dict_ema": model.state_dict()})
    assert load(tmp_path)[1]["ema_weights"] == "state_dict_ema"
    with pytest.raises(ValueError, match="only averaged weights, under 'state_dict_ema', and use_ema=False"):
        load(tmp_path, use_ema=False)
    write(model, tmp_path, AveragedModel(model).state_dict())
    assert load(tmp_path)[1]["ema_weights"] == "n_averaged"
    with pytest.raises(ValueError, match=r"only averaged weights \(it has 'n_averaged'\), and use_ema=False"):
        load(tmp_path, use_ema=False)


def test_from_pretrained_knows_that_mmengine_swaps_averaged_weights(tmp_path):
    """Its `state_dict` has the averages, and its `ema_state_dict` the others with a counter."""
    raw, averaged = make_model(0), make_model(1)
    others = {f"module.{key}": x for key, x in raw.state_dict().items()} | {"steps": torch.tensor(7)}
    write(raw, tmp_path, {"state_dict": averaged.state_dict(), "ema_state_dict": others, "meta": {"epoch": 1}})
    for use_ema, wanted, taken in ((None, averaged, "state_dict"), (True, averaged, "state_dict"), (False, raw, None)):
        loaded, info = load(tmp_path, use_ema=use_ema)
        assert info["ema_weights"] == taken
        assert_same_state(loaded.state_dict(), wanted.state_dict())


def test_from_pretrained_with_a_dictionary_that_contains_itself_raises(tmp_path):
    content = {"epoch": 3}
    content["model"] = content
    write(make_model(), tmp_path, content)
    with pytest.raises(ValueError, match="does not contain a state dict"):
        load(tmp_path)


def test_from_pretrained_with_use_ema_and_no_averaged_weights_raises(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    for path in (tmp_path, tmp_path / "model.pth"):
        with pytest.raises(ValueError, match="does not contain averaged weights, and use_ema=True"):
            load(path, use_ema=True)


def test_from_pretrained_ignores_entries_that_hold_no_beit(tmp_path):
    """A setting under a usual key of averaged weights, and the weights of a loss beside a model."""
    model = make_model()
    write(
        model, tmp_path, {"model": model.state_dict(), "ema": {"decay": torch.ones(1)}, "weights": {"w": torch.ones(2)}}
    )
    loaded, info = load(tmp_path)
    assert info["ema_weights"] is None
    assert_same_state(loaded.state_dict(), model.state_dict())


def prefixed(prefix, model):
    return {f"{prefix}{key}": x for key, x in model.state_dict().items()}


AMBIGUOUS = {
    "two models": (
        lambda model: prefixed("student.", model) | prefixed("teacher.", model),
        "several BEiT models, under 'student.', 'teacher.'",
    ),
    "a model and its average": (
        lambda model: model.state_dict() | prefixed("ema_model.", model),
        "several BEiT models, under no prefix, 'ema_model.'",
    ),
    "a head beside the model": (
        lambda model: prefixed("model.", model) | {"head.weight": torch.ones(3)},
        "under the prefix 'model.', and other names without it: head.weight",
    ),
    "one name twice": (
        lambda model: model.state_dict() | {"classifier._orig_mod.bias": torch.ones(5)},
        "contains 'classifier.bias' twice, once inside a wrapper ('classifier._orig_mod.bias')",
    ),
    "two containers": (
        lambda model: {"model": model.state_dict(), "state_dict": model.state_dict()},
        "several state dicts, under 'model', 'state_dict'",
    ),
    "two averages": (
        lambda model: {"ema": model.state_dict(), "model_ema": model.state_dict()},
        "several state dicts, under 'ema', 'model_ema'",
    ),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_from_pretrained_with_an_ambiguous_file_names_what_was_found(case, tmp_path):
    model = make_model()
    content, message = AMBIGUOUS[case]
    write(model, tmp_path, content(model))
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        load(tmp_path)
    assert "state_dict=..." in str(raised.value)
    assert "key_mapping=" in str(raised.value)


def test_from_pretrained_with_state_dict_or_key_mapping_resolves_an_ambiguous_file(tmp_path):
    student, teacher = make_model(0), make_model(1)
    write(student, tmp_path, prefixed("student.", student) | {"head.weight": torch.ones(2)})
    with pytest.raises(ValueError, match=r"under the prefix 'student\.'"):
        load(tmp_path)
    both = prefixed("student.", student) | prefixed("teacher.", teacher)
    chosen = {key.removeprefix("teacher."): x for key, x in both.items() if key.startswith("teacher.")}
    assert_same_state(load(tmp_path, state_dict=chosen)[0].state_dict(), teacher.state_dict())
    write(student, tmp_path, {key.replace("classifier.", "fc."): x for key, x in student.state_dict().items()})
    assert_same_state(load(tmp_path, key_mapping={r"^fc\.": "classifier."})[0].state_dict(), student.state_dict())
    with pytest.raises(ValueError, match="names twice"):
        load(tmp_path, key_mapping={r"^fc\..*": "classifier.weight"})


def test_from_pretrained_with_another_container_lists_its_entries(tmp_path):
    write(make_model(), tmp_path, {"teacher": make_model().state_dict(), "epoch": 3})
    with pytest.raises(ValueError, match=r"nor does its 'model', .*; its entries are 'teacher', 'epoch': pass the"):
        load(tmp_path)
    write(make_model(), tmp_path, {"model": {"teacher": make_model().state_dict()}, "epoch": 3})
    with pytest.raises(ValueError, match=r"; its entries under 'model' are 'teacher': pass the tensors"):
        load(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_from_pretrained_with_foreign_objects_names_them_only(zipped, tmp_path):
    model = make_model()
    content = {"model": model.state_dict(), "folder": pathlib.PurePosixPath("/data")}
    torch.save(content, tmp_path / "model.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"and was not loaded: pathlib\.PurePosixPath\. If you trust") as raised:
        load(tmp_path / "model.pth")
    message = str(raised.value)
    assert "\x1b" not in message
    assert "weights_only" not in message
    assert "\n" not in message


ARGS = {"mean": [0.4, 0.5, 0.6], "std": [0.2], "crop_pct": 0.95, "crop_mode": None, "interpolation": ""}


@pytest.mark.parametrize("form", [argparse.Namespace, dict])
def test_from_pretrained_stores_the_preprocessing_in_options_of_timm(form, tmp_path):
    """timm's training script saves its options, as a `Namespace`; one number is for all channels."""
    theirs = timm_reference.build(use_rel_pos_bias=True)
    file = tmp_path / "model_best.pth.tar"
    torch.save({"arch": "beit", "args": form(**ARGS), "state_dict": theirs.state_dict()}, file)
    config = load(file)[0].config
    assert (config.pixel_mean, config.pixel_std) == ((0.4, 0.5, 0.6), (0.2,) * 3)
    assert config.pixel_resize == {"crop_pct": 0.95}
    assert load(file, pixel_mean=[0.1] * 3)[0].config.pixel_mean == (0.1,) * 3


@pytest.mark.parametrize(
    "options", [{"mean": None}, {"std": None}, {"crop_pct": None}, {"mean": [0.5, 0.5]}, {"std": "imagenet"}]
)
def test_from_pretrained_with_incomplete_options_of_timm_guesses_nothing(options, tmp_path):
    """timm takes what is missing from its table of architectures."""
    theirs = timm_reference.build(use_rel_pos_bias=True)
    file = tmp_path / "model_best.pth.tar"
    torch.save({"args": argparse.Namespace(**(ARGS | options)), "state_dict": theirs.state_dict()}, file)
    config = load(file)[0].config
    assert (config.pixel_mean, config.pixel_std, config.pixel_resize) == (None, None, None)
