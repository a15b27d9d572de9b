"""Checkpoints as training frameworks write them: what is read, and what the loading report says."""

import re

import pytest
import torch
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel

import beit_fast

from .test_wrappers import Wrapper, assert_same_state, load, make_model, prefixed, write

RAW, AVERAGED = make_model(0), make_model(1)
OPTIMIZER = torch.optim.AdamW(RAW.parameters()).state_dict()
LOSS_AND_METRICS = {
    "criterion.weight": torch.ones(5),
    "train_acc.tp": torch.zeros(5, dtype=torch.long),
    "val_f1.total": torch.tensor(3),
}


def lightning(**more):
    state = {**prefixed("model.", RAW), **LOSS_AND_METRICS}
    return {"state_dict": state, "epoch": 3, "hyper_parameters": {"lr": 0.1}, "optimizer_states": [OPTIMIZER], **more}


def averages_of_lightning(count):
    """What `WeightAveraging` writes after `count` updates."""
    return {
        "state_dict": prefixed("model.", AVERAGED),
        "current_model_state": prefixed("model.", RAW),
        "averaging_state": {"n_averaged": torch.tensor(count)},
    }


PL_AVERAGE = AveragedModel(Wrapper("model", AVERAGED)).state_dict()
WITH_AVERAGES = {
    "callback with ema_state_dict": (
        lightning(callbacks={"EMA": {"ema_state_dict": prefixed("model.", AVERAGED), "decay": 0.9}}),
        "callbacks.EMA.ema_state_dict",
    ),
    "callback with another key": (
        lightning(callbacks={"EMACallback{'decay': 0.9}": {"shadow": prefixed("model.", AVERAGED)}, "Stop": {"n": 1}}),
        "callbacks.EMACallback{'decay': 0.9}.shadow",
    ),
    "StochasticWeightAveraging": (
        lightning(callbacks={"StochasticWeightAveraging": {"n_averaged": 2, "average_model_state": PL_AVERAGE}}),
        "callbacks.StochasticWeightAveraging.average_model_state",
    ),
    "WeightAveraging": (averages_of_lightning(7), "state_dict"),
    "averages inside an entry": (
        {"model": RAW.state_dict(), "ema": {"averaged_model": AVERAGED.state_dict(), "decay": 0.9}},
        "ema.averaged_model",
    ),
    "averages under an unknown key inside an entry": (
        {"model": RAW.state_dict(), "ema": {"shadow": AVERAGED.state_dict(), "updates": torch.tensor(3)}},
        "ema.shadow",
    ),
    "an averaging module with the model": (
        {
            "model": RAW.state_dict(),
            "ema_model_state_dict": {
                **prefixed("online_model.", RAW),
                **prefixed("ema_model.", AVERAGED),
                "initted": torch.tensor(True),
                "step": torch.tensor([4]),
            },
        },
        "ema_model_state_dict",
    ),
}


@pytest.mark.parametrize("case", WITH_AVERAGES)
def test_from_pretrained_finds_averages_of_frameworks_and_reports_their_entry(case, tmp_path):
    """Regression: `use_ema=True` refused these files, or the other weights were read without a word."""
    content, entry = WITH_AVERAGES[case]
    write(RAW, tmp_path, content)
    for use_ema, wanted, taken in ((None, AVERAGED, entry), (True, AVERAGED, entry), (False, RAW, None)):
        loaded, info = load(tmp_path, use_ema=use_ema)
        assert_same_state(loaded.state_dict(), wanted.state_dict())
        assert info["ema_weights"] == taken
        if taken is not None:
            assert info["weights_entry"] == entry


def test_from_pretrained_before_the_first_average_of_lightning_reads_the_others(tmp_path):
    """Before it, `state_dict` has the initial weights."""
    write(RAW, tmp_path, averages_of_lightning(0))
    loaded, info = load(tmp_path)
    assert_same_state(loaded.state_dict(), RAW.state_dict())
    assert (info["weights_entry"], info["ema_weights"]) == ("current_model_state", None)
    with pytest.raises(ValueError, match=r"does not contain averaged weights, and use_ema=True; its other entries are"):
        load(tmp_path, use_ema=True)


PLAIN = {
    "Lightning": (lightning(), "state_dict"),
    "DeepSpeed": ({"module": RAW.state_dict(), "ds_config": {}, "ds_version": "0.15", "optimizer": None}, "module"),
    "Composer": ({"state": {"model": prefixed("model.", RAW), "optimizers": {}}, "rng": []}, "state.model"),
    "without averages": ({"model": RAW.state_dict(), "model_without_ema": RAW.state_dict()}, "model"),
}


@pytest.mark.parametrize("case", PLAIN)
def test_from_pretrained_reads_files_of_frameworks(case, tmp_path):
    content, entry = PLAIN[case]
    write(RAW, tmp_path, content)
    loaded, info = load(tmp_path)
    assert_same_state(loaded.state_dict(), RAW.state_dict())
    assert (info["weights_entry"], info["ema_weights"]) == (entry, None)


def test_from_pretrained_leaves_losses_and_metrics_beside_the_model_aside_and_reports_them(tmp_path):
    """Regression: a Lightning file with `criterion.weight` or `train_acc.tp` beside `model.*` was refused."""
    write(RAW, tmp_path, lightning())
    _, info = load(tmp_path)
    assert info["left_aside"] == ["epoch", "hyper_parameters", "optimizer_states", *LOSS_AND_METRICS]
    save_file(prefixed("model.", RAW) | LOSS_AND_METRICS, tmp_path / "model.safetensors")
    loaded, info = load(tmp_path / "model.safetensors")
    assert_same_state(loaded.state_dict(), RAW.state_dict())
    assert set(info["left_aside"]) == set(LOSS_AND_METRICS)
    RAW.save_pretrained(tmp_path / "plain")
    info = load(tmp_path / "plain")[1]
    assert (info["weights_entry"], info["left_aside"]) == (None, [])


def test_from_pretrained_with_a_possible_head_beside_a_trunk_raises(tmp_path):
    trunk = beit_fast.BeitModel(RAW.config, add_pooling_layer=False)
    beside = {"fc.weight": torch.ones(7, RAW.config.hidden_size), "fc.bias": torch.ones(7)}
    write(trunk, tmp_path, prefixed("net.", trunk) | beside | LOSS_AND_METRICS)
    with pytest.raises(
        ValueError, match=r"under the prefix 'net\.', and other names without it: fc\.weight\. It is not"
    ):
        beit_fast.BeitModel.from_pretrained(tmp_path)
    write(trunk, tmp_path, prefixed("net.", trunk) | LOSS_AND_METRICS)
    loaded = beit_fast.BeitModel.from_pretrained(tmp_path, add_pooling_layer=False)
    assert_same_state(loaded.state_dict(), trunk.state_dict())


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("average", ["ema_model.", "ema_model.module.", "model_ema."])
def test_from_pretrained_with_use_ema_chooses_between_two_prefixes(average, file, tmp_path):
    state = prefixed("model.", RAW) | prefixed(average, AVERAGED) | LOSS_AND_METRICS
    if "module" in average:
        state["ema_model.n_averaged"] = torch.tensor(3)
    RAW.config.save_pretrained(tmp_path)
    torch.save(state, tmp_path / file) if file.endswith("bin") else save_file(state, tmp_path / file)
    for use_ema, wanted, taken in ((True, AVERAGED, average.rstrip(".")), (False, RAW, None)):
        loaded, info = load(tmp_path, use_ema=use_ema)
        assert_same_state(loaded.state_dict(), wanted.state_dict())
        assert info["ema_weights"] == taken
        assert set(LOSS_AND_METRICS) < set(info["left_aside"])
    with pytest.raises(
        ValueError, match=r"several BEiT models, .*: pass use_ema=True or use_ema=False, or pass the ten"
    ):
        load(tmp_path)


def test_from_pretrained_with_only_an_averaged_prefix_reports_it(tmp_path):
    write(RAW, tmp_path, prefixed("ema_model.", AVERAGED))
    assert load(tmp_path)[1]["ema_weights"] == "ema_model"
    with pytest.raises(ValueError, match=r"only averaged weights \(it has 'ema_model'\), and use_ema=False"):
        load(tmp_path, use_ema=False)


def test_from_pretrained_with_averages_without_names_reports_them_as_left_aside(tmp_path):
    """torch-ema saves a list."""
    write(RAW, tmp_path, {"model": RAW.state_dict(), "ema": {"shadow_params": list(AVERAGED.parameters())}})
    assert load(tmp_path)[1]["left_aside"] == ["ema"]
    with pytest.raises(
        ValueError, match="does not contain averaged weights, and use_ema=True; its other entries are 'ema"
    ):
        load(tmp_path, use_ema=True)


def test_from_pretrained_with_parameters_that_zero_3_divides_raises(tmp_path):
    """Regression: every shape of the model was listed, without the cause."""
    empty = {key: torch.empty(0) for key in RAW.state_dict()}
    write(RAW, tmp_path, {"module": empty, "ds_version": "0.15"})
    with pytest.raises(ValueError, match=r"\d+ tensors without elements: .*ZeRO-3 .* zero_to_fp32\.py merges\)$"):
        load(tmp_path)


MODULES = {
    "a module": lambda model: model,
    "modules as YOLO saves them": lambda model: {"epoch": 3, "model": model.half(), "ema": model},
}


@pytest.mark.parametrize("case", MODULES)
def test_from_pretrained_with_modules_names_their_classes_and_the_way_out(case, tmp_path):
    torch.save(MODULES[case](make_model()), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=re.escape("and was not loaded: ")) as raised:
        load(tmp_path / "model.pt")
    message = str(raised.value)
    assert "was not loaded: beit_fast.models.beit.BeitForImageClassification, " in message  # also if 20 others follow
    assert "safetensors.torch.save_file(state_dict, 'model.safetensors')" in message


def test_from_pretrained_with_the_optimizer_of_a_trainer_lists_its_entries(tmp_path):
    torch.save(OPTIMIZER, tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match=r"does not contain a state dict, .*; its entries are 'state', 'param_groups'"):
        load(tmp_path / "optimizer.pt")
