"""`from_timm` and `to_timm`: equal bits, outputs and gradients; errors of unsupported models."""

import importlib
import json

import numpy as np
import pytest
import torch
from PIL import Image

import beit_fast
from beit_fast.checkpoint.key_mapping import to_timm_names
from beit_fast.cli import main
from beit_fast.image_processing.of_checkpoint import find_processor
from beit_fast.utils.hub import HubOptions

from ..support import models, timm_reference
from ..support.oracle import relative_error
from ..support.timm_reference import timm

# Import by name, after timm_reference, which imports timm even if torchvision is not installed.
integration = importlib.import_module("beit_fast.integrations.timm")
accelerate, from_timm, to_timm = integration.accelerate, integration.from_timm, integration.to_timm

NETWORKS = {
    **timm_reference.POSITIONS,
    "rectangular": {"use_rel_pos_bias": True, "img_size": (24, 40)},
    "cls pooling": {"use_rel_pos_bias": True, "global_pool": "token"},
    "without layer scale": {"use_rel_pos_bias": True, "init_values": None},
    "gray": {"use_rel_pos_bias": True, "in_chans": 1},
    "without a head": {"use_rel_pos_bias": True, "num_classes": 0},
    "one layer": {"use_rel_pos_bias": True, "depth": 1},
    "other norms": {"use_rel_pos_bias": True, "norm_layer": lambda size, **_: torch.nn.LayerNorm(size, eps=1e-3)},
}


def pixels_for(model):
    return torch.randn(2, model.in_chans, *model.patch_embed.img_size)


def scalar(logits):
    return (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum()


def assert_equal_states(mine, wanted):
    mine, wanted = mine.state_dict(), wanted.state_dict()
    assert mine.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(mine[name], tensor), name
        assert mine[name].dtype == tensor.dtype


@pytest.mark.parametrize("name", NETWORKS)
def test_from_timm_round_trip_equals_timm(name):
    theirs = timm_reference.build(**NETWORKS[name])
    ours = from_timm(theirs, attn_implementation="triton")
    pixels = pixels_for(theirs)
    wanted, logits = theirs(pixels), ours(pixels).logits
    assert relative_error(logits, wanted) < 1e-5
    scalar(wanted).backward()
    scalar(logits).backward()
    # Rename gradients as parameters. The packed qkv gradient joins those of query, key and value.
    gradients = to_timm_names({key: parameter.grad for key, parameter in ours.named_parameters()})
    for key, parameter in theirs.named_parameters():
        assert relative_error(gradients[key], parameter.grad) < 1e-5, key
    back = to_timm(ours)
    assert_equal_states(back, theirs)
    assert relative_error(back(pixels), wanted) < 1e-6
    assert not {p.data_ptr() for p in back.parameters()} & {p.data_ptr() for p in theirs.parameters()}


@pytest.mark.parametrize("position", ["per layer", "shared", "both", "absolute"])
def test_to_timm_round_trip_equals_beit_fast(position):
    options = {"use_mask_token": False, "drop_path_rate": 0.3, "attention_probs_dropout_prob": 0.1}
    options |= {"vocab_size": beit_fast.BeitConfig.vocab_size}  # timm does not have a vocabulary size
    ours = models.build(position=position, hidden_dropout_prob=0.2, **options).train()
    ours.set_pixel_normalization(models.MEAN, models.STD)
    ours.config.pixel_resize = {"interpolation": "bilinear", "crop_pct": 0.9}
    theirs = to_timm(ours)
    assert theirs.training
    assert {block.mlp.drop1.p for block in theirs.blocks} == {0.0}
    back = from_timm(theirs)
    assert back.training
    assert back.config.pixel_resize.pop("crop_mode") == "center"  # timm's default
    assert back.config == ours.config
    assert_equal_states(back, ours)
    pixels = models.images()
    with torch.no_grad():
        assert relative_error(theirs.eval()(pixels), ours.eval()(pixels).logits) < 1e-5
    torch.manual_seed(0)
    dropped = theirs.train()(pixels)
    assert not torch.allclose(dropped, theirs.eval()(pixels))


def test_to_timm_keeps_dtype_sizes_and_pretrained_cfg():
    ours = models.build(use_mask_token=False, image_size=(24, 40), intermediate_size=37).bfloat16()
    ours.set_pixel_normalization(models.MEAN, models.STD)
    theirs = to_timm(ours)
    assert {p.dtype for p in theirs.parameters()} == {torch.bfloat16}
    assert theirs.blocks[0].mlp.fc1.out_features == 37
    options = theirs.pretrained_cfg
    assert options["input_size"] == (3, 24, 40)
    assert (list(options["mean"]), list(options["std"])) == (models.MEAN, models.STD)
    assert options["num_classes"] == 5
    assert not {"url", "hf_hub_id"} & set(options)
    assert from_timm(theirs).dtype == torch.bfloat16


TIMM_SIZES = {"depth": 1, "embed_dim": 32, "num_heads": 4, "num_classes": 5}


def evaluation_pixels(photograph, cfg):
    """timm's evaluation transform with Pillow: resize the short edge, crop the center, normalize."""
    size = cfg["input_size"][1]
    short = int(size / cfg["crop_pct"])
    width, height = photograph.size
    scale = short / min(width, height)
    filter_ = Image.Resampling[cfg["interpolation"].upper()]
    resized = photograph.resize((int(width * scale + 1e-9), int(height * scale + 1e-9)), filter_)
    left, top = ((side - size) // 2 for side in resized.size)
    levels = np.asarray(resized.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
    values = (levels - np.float32(cfg["mean"])) / np.float32(cfg["std"])
    return torch.from_numpy(values).permute(2, 0, 1)[None]


@pytest.mark.parametrize("name", ["beitv2_base_patch16_224", "beit_base_patch16_384"])
def test_from_timm_keeps_the_preprocessing(tmp_path, capsys, name):
    """Regression: beitv2 was normalized with 0.5 after the conversion, not with ImageNet's mean and deviation."""
    theirs = timm.create_model(name, **TIMM_SIZES).eval()
    photograph = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    photograph.save(tmp_path / "p.png")
    pixels = evaluation_pixels(photograph, theirs.pretrained_cfg)
    from_timm(theirs).save_pretrained(tmp_path / "m")
    config = beit_fast.BeitConfig.from_pretrained(tmp_path / "m")
    assert (config.pixel_mean, config.pixel_std) == (theirs.pretrained_cfg["mean"], theirs.pretrained_cfg["std"])
    processor = find_processor(tmp_path / "m", config, HubOptions())
    assert (processor(photograph, return_tensors="pt")["pixel_values"] - pixels).abs().max() < 1e-5
    assert main.main(["classify", str(tmp_path / "p.png"), "--model", str(tmp_path / "m"), "--json", "--top", "5"]) == 0
    shown = {e["index"]: e["probability"] for e in json.loads(capsys.readouterr().out)["results"][0]["classes"]}
    with torch.no_grad():
        wanted = theirs(pixels).softmax(-1)[0].tolist()
    assert [shown[index] for index in range(5)] == pytest.approx(wanted, rel=1e-4)
    back = to_timm(from_timm(theirs)).pretrained_cfg
    for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode"):
        assert back[key] == theirs.pretrained_cfg[key], key


def test_from_timm_without_known_preprocessing_stores_none():
    gray = timm.create_model("beit_base_patch16_224", in_chans=1, **TIMM_SIZES)  # its pretrained_cfg is for RGB
    for theirs in (gray, timm_reference.build(use_rel_pos_bias=True)):
        config = from_timm(theirs).config
        assert (config.pixel_mean, config.pixel_std, config.pixel_resize) == (None, None, None)
        assert not any(name.startswith("pixel_") for name in config.to_dict())


def test_to_timm_without_known_preprocessing_has_that_of_the_image_processor(tmp_path):
    theirs = to_timm(models.build(use_mask_token=False))
    back = from_timm(theirs)
    processor = find_processor(tmp_path, back.config, HubOptions())
    assert processor.to_dict() == beit_fast.BeitImageProcessor(size=back.config.image_height_width).to_dict() | {
        "crop_size": processor.size
    }


@pytest.mark.parametrize(("size", "inner"), [(768, 3072), (1408, 6144), (176, 469), (49, 29)])
def test_mlp_ratio_restores_intermediate_size(size, inner):
    from beit_fast.integrations.timm.conversion import _mlp_ratio

    assert int(size * _mlp_ratio(size, inner)) == inner


def test_from_timm_mixed_dtypes_are_kept():
    theirs = timm_reference.build(use_rel_pos_bias=True)
    for block in theirs.blocks:
        block.attn.relative_position_bias_table.data = block.attn.relative_position_bias_table.data.double()
    assert_equal_states(to_timm(from_timm(theirs)), theirs)


def test_from_timm_accelerated_model_equals_timm():
    theirs = timm_reference.build(use_rel_pos_bias=True, use_shared_rel_pos_bias=True)
    pixels = pixels_for(theirs)
    wanted = theirs(pixels)
    accelerate(theirs)
    assert relative_error(from_timm(theirs)(pixels).logits, wanted) < 1e-5


def test_from_timm_after_resize_equals_timm():
    """Keep timm's geometric resize if the image size is set before conversion.

    After conversion, tables are resized bilinearly at every call.
    """
    theirs = timm_reference.build(use_rel_pos_bias=True)
    ours = from_timm(theirs)
    theirs.set_input_size(48)
    resized = from_timm(theirs)
    assert resized.config.window == (6, 6)
    pixels = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        assert relative_error(resized(pixels).logits, theirs(pixels)) < 1e-5
        assert relative_error(ours(pixels).logits, theirs(pixels)) > 1e-4


UNSUPPORTED = {
    "Mlp with GELU": {"swiglu_mlp": True},
    r"unexpected.*: .*mlp\.norm": {"scale_mlp": True},
    r"lacks parameters: .*query\.bias": {"qkv_bias": False},
    r"patches of \(8, 4\)": {"patch_size": (8, 4)},
    "global_pool='avg' with norm is not supported": {"use_fc_norm": False},
    "global_pool='' with norm": {"global_pool": ""},
    r"head_drop with p=0\.1 is not supported \(expected 0\.0": {"drop_rate": 0.1},
    r"mlp\.drop1 with p=0\.2": {"proj_drop_rate": 0.2, "pos_drop_rate": 0.2},
    r"attn\.proj_drop with p=0\.2 is not supported \(expected 0\.0": {"proj_drop_rate": 0.2},
}


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_from_timm_unsupported_network_raises(reason):
    theirs = timm_reference.build(**({"use_rel_pos_bias": True} | UNSUPPORTED[reason]))
    with pytest.raises(ValueError, match=f"(?s)cannot be converted to BeitForImageClassification:.*- .*{reason}"):
        from_timm(theirs)


def test_from_timm_unsupported_network_lists_every_reason():
    theirs = timm_reference.build(use_rel_pos_bias=True, swiglu_mlp=True, global_pool="", drop_rate=0.1)
    theirs.blocks[1].norm1.eps = 1e-3
    theirs.blocks[2].attn.attn_drop.p = 0.5
    theirs.blocks[0].drop_path1 = timm.layers.DropPath(0.3)
    with pytest.raises(ValueError, match="cannot be converted to") as error:
        from_timm(theirs)
    for part in (
        "global_pool",
        "SwiGLU",
        "eps 1e-06, 0.001",
        "head_drop",
        "attn.attn_drop",
        "drop path rates 0.3",
    ):
        assert part in str(error.value), part


def test_to_timm_unsupported_model_raises(tmp_path):
    ours = models.build(hidden_act="relu", head_dim=4)
    with pytest.raises(
        ValueError, match=r"(?s)cannot be converted to timm's Beit.*head_dim=4.*hidden_act='relu'.*mask token"
    ):
        to_timm(ours)
    with_token = models.build()
    with_token.save_pretrained(tmp_path)
    to_timm(beit_fast.BeitForImageClassification.from_pretrained(tmp_path, use_mask_token=False))
    with torch.device("meta"):
        empty = beit_fast.BeitForImageClassification(beit_fast.BeitConfig(num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"meta device have no values: .* and"):
        to_timm(empty)


def test_to_timm_and_from_timm_wrong_class_raises():
    with pytest.raises(TypeError, match="to_timm takes a BeitForImageClassification, not a BeitModel"):
        to_timm(models.build("BeitModel"))
    with pytest.raises(TypeError, match=r"from_timm takes a Beit of timm\.models\.beit, not a Linear"):
        from_timm(torch.nn.Linear(1, 1))
