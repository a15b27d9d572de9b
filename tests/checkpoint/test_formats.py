"""Checkpoints of timm, unilm, mmsegmentation, DiT and Data2VecVision."""

import argparse

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import beit_fast
from beit_fast.checkpoint.infer_config import infer_config
from beit_fast.checkpoint.key_mapping import format_of, to_hub_names
from beit_fast.checkpoint.resize_positions import resize_table_geometric

from ..support import timm_reference
from ..support.timm_reference import timm
from ..support.transformers_reference import TINY, randomize

Classifier = beit_fast.BeitForImageClassification


def relative_error(mine, wanted):
    return ((mine - wanted).norm() / wanted.norm()).item()


def assert_fits(info):
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))


def assert_equal_trunks(mine, wanted):
    for key, tensor in wanted.items():
        assert torch.equal(mine[key], tensor), key


@pytest.mark.parametrize("wrapped", ["plain", "model", "module", "data parallel", "safetensors"])
@pytest.mark.parametrize("position", timm_reference.POSITIONS)
def test_from_pretrained_with_a_timm_classifier_matches_timm(position, wrapped, tmp_path):
    theirs = timm_reference.build(**timm_reference.POSITIONS[position])
    state = theirs.state_dict()
    file = tmp_path / ("model.safetensors" if wrapped == "safetensors" else "checkpoint.pth")
    if wrapped == "safetensors":
        save_file(state, file)
    elif wrapped == "data parallel":
        torch.save({f"module.{key}": x for key, x in state.items()}, file)
    else:
        torch.save(state if wrapped == "plain" else {wrapped: state, "epoch": 3}, file)
    heads = {} if "bias" in str(timm_reference.POSITIONS[position]) else {"num_attention_heads": 4}
    ours, info = Classifier.from_pretrained(file, output_loading_info=True, **heads)
    assert_fits(info)
    assert (ours.config.num_attention_heads, ours.config.num_hidden_layers, ours.config.num_labels) == (4, 3, 5)
    assert (ours.config.image_size, ours.config.patch_size, ours.config.layer_norm_eps) == (32, 8, 1e-6)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert relative_error(ours(pixels).logits, theirs(pixels)) < 1e-5


def test_save_pretrained_of_a_timm_model_loads_in_transformers(tmp_path):
    theirs = timm_reference.build(use_rel_pos_bias=True)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    ours = Classifier.from_pretrained(tmp_path / "timm.pth")
    ours.save_pretrained(tmp_path / "hub")
    model, info = transformers.BeitForImageClassification.from_pretrained(tmp_path / "hub", output_loading_info=True)
    assert_fits(info)
    attention = ours.beit.encoder.layer[1].attention.attention
    packed = torch.cat([part.weight for part in (attention.query, attention.key, attention.value)])
    assert torch.equal(packed, theirs.blocks[1].attn.qkv.weight)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert relative_error(model(pixels).logits, theirs(pixels)) < 1e-5


def test_from_pretrained_with_a_timm_folder_and_other_options_matches_timm(tmp_path):
    """The config.json of timm is ignored: it has no fields of BEiT."""
    theirs = timm_reference.build(use_rel_pos_bias=True, init_values=None, global_pool="token", use_fc_norm=False)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architecture": "beit_tiny", "num_classes": 5, "pretrained_cfg": {}}')
    ours, info = Classifier.from_pretrained(tmp_path, output_loading_info=True)
    assert_fits(info)
    assert not ours.config.use_mean_pooling
    assert ours.config.layer_scale_init_value == 0
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert relative_error(ours(pixels).logits, theirs(pixels)) < 1e-5


def test_infer_config_without_a_table_requires_num_attention_heads(tmp_path):
    torch.save(timm_reference.build(use_abs_pos_emb=True).state_dict(), tmp_path / "absolute.pth")
    with pytest.raises(ValueError, match="pass num_attention_heads"):
        Classifier.from_pretrained(tmp_path / "absolute.pth")


@pytest.mark.parametrize("size", [48, 24, (48, 64)])
def test_from_pretrained_with_geometric_resizing_matches_timm(size, tmp_path):
    """timm resizes the tables when it loads them into a model of the new size."""
    theirs = timm_reference.build(use_rel_pos_bias=True)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    ours = Classifier.from_pretrained(tmp_path / "timm.pth", image_size=size, position_interpolation="geometric")
    larger = timm_reference.build(use_rel_pos_bias=True, img_size=size)
    larger.load_state_dict(timm.models.beit.checkpoint_filter_fn(theirs.state_dict(), larger))
    for layer, block in zip(ours.beit.encoder.layer, larger.blocks, strict=True):
        table = layer.attention.attention.relative_position_bias.relative_position_bias_table
        assert relative_error(table, block.attn.relative_position_bias_table) <= 1e-6
    height, width = (size, size) if isinstance(size, int) else size
    pixels = torch.randn(2, 3, height, width)
    with torch.no_grad():
        assert relative_error(ours(pixels).logits, larger(pixels)) < 1e-5


@pytest.mark.parametrize(
    ("old", "new"), [((14, 14), (24, 24)), ((24, 24), (14, 14)), ((4, 6), (7, 5)), ((2, 3), (3, 3))]
)
def test_resize_table_geometric_matches_timm(old, new):
    rows = (2 * old[0] - 1) * (2 * old[1] - 1) + 3
    table = torch.randn(rows, 5)
    new_rows = (2 * new[0] - 1) * (2 * new[1] - 1) + 3
    wanted = timm.layers.resize_rel_pos_bias_table(table, new, (new_rows, 5), old_window_size=old)
    mine = resize_table_geometric(table, old, new)
    assert relative_error(mine, wanted) <= 1e-6
    assert torch.equal(mine[-3:], table[-3:])


def test_resize_table_geometric_from_a_single_patch_is_constant():
    table = torch.randn(4, 2)
    resized = resize_table_geometric(table, (1, 1), (2, 2))
    assert torch.equal(resized, torch.cat([table[:1].expand(9, -1), table[1:]]))


def test_resize_positions_keeps_the_dtype(tmp_path):
    state = timm_reference.build(use_rel_pos_bias=True).half().state_dict()
    torch.save(state, tmp_path / "half.pth")
    for interpolation in ("bilinear", "geometric"):
        ours = Classifier.from_pretrained(tmp_path / "half.pth", image_size=48, position_interpolation=interpolation)
        assert ours.dtype == torch.float16


def test_from_pretrained_with_unilm_pretraining_loads(tmp_path):
    """The file has argparse options, an index buffer, a mask token, `norm`, `lm_head` and a shared table."""
    theirs = timm_reference.build(use_shared_rel_pos_bias=True)
    state = timm_reference.masked_modeling_state(theirs)
    assert any(key.endswith("relative_position_index") for key in state)
    torch.save({"model": state, "args": argparse.Namespace(lr=0.1), "epoch": 1}, tmp_path / "pretrain.pth")
    model, info = beit_fast.BeitForMaskedImageModeling.from_pretrained(
        tmp_path / "pretrain.pth", output_loading_info=True
    )
    assert_fits(info)
    assert model.config.use_mask_token
    assert model.config.vocab_size == 11
    assert torch.equal(model.layernorm.weight, state["norm.weight"])
    assert torch.equal(model.beit.embeddings.mask_token, state["mask_token"])
    pixels, masked = torch.randn(1, 3, 32, 32), torch.arange(16)[None] % 2 == 0
    with torch.no_grad():
        tokens = theirs.patch_embed(pixels)
        tokens = torch.where(masked[..., None], state["mask_token"], tokens)
        tokens = torch.cat([theirs.cls_token, tokens], 1)
        bias = theirs.rel_pos_bias()
        for block in theirs.blocks:
            tokens = block(tokens, shared_rel_pos_bias=bias)
        tokens = torch.nn.functional.layer_norm(tokens, (32,), state["norm.weight"], state["norm.bias"], 1e-6)
        wanted = tokens[:, 1:] @ state["lm_head.weight"].t() + state["lm_head.bias"]
        assert relative_error(model(pixels, bool_masked_pos=masked).logits, wanted) < 1e-5


def test_from_pretrained_with_a_shared_table_of_unilm_copies_it(tmp_path):
    state = timm_reference.masked_modeling_state(timm_reference.build(use_shared_rel_pos_bias=True))
    torch.save({"model": state}, tmp_path / "pretrain.pth")
    with pytest.warns(UserWarning, match=r"classifier\.weight"):
        model = Classifier.from_pretrained(
            tmp_path / "pretrain.pth",
            num_labels=3,
            use_relative_position_bias=True,
            use_shared_relative_position_bias=False,
        )
    tables = [p for name, p in model.named_parameters() if name.endswith("bias_table")]
    assert len(tables) == 3
    assert all(torch.equal(table, state["rel_pos_bias.relative_position_bias_table"]) for table in tables)


@pytest.mark.parametrize("package", ["unilm", "mmseg"])
def test_from_pretrained_with_segmentation_files_loads(package, tmp_path):
    """Weights of a segmentation model with the names of unilm's ADE20k files and of mmsegmentation."""
    source = timm_reference.build(use_rel_pos_bias=True, depth=4)
    values = TINY | {"num_hidden_layers": 4, "use_relative_position_bias": True, "out_indices": [1, 2, 3, 4]}
    values |= {"auxiliary_channels": 6, "use_mask_token": False, "layer_norm_eps": 1e-6}
    head = beit_fast.BeitForSemanticSegmentation(beit_fast.BeitConfig(**values))
    randomize(head)
    fpn = {"unilm": ("backbone.fpn1.", "backbone.fpn2."), "mmseg": ("neck.upsample_4x.", "neck.upsample_2x.")}[package]
    state = {}
    for key, tensor in head.state_dict().items():
        if not key.startswith("beit."):
            key = key.replace("_head.classifier.", "_head.conv_seg.")
            state[key.replace("fpn1.", fpn[0]).replace("fpn2.", fpn[1])] = tensor
    trunk = {key: x for key, x in source.state_dict().items() if not key.startswith(("head.", "fc_norm."))}
    state |= timm_reference.mmseg_state(trunk) if package == "mmseg" else {f"backbone.{k}": x for k, x in trunk.items()}
    torch.save({"state_dict": state, "meta": {"epoch": 2}}, tmp_path / "segmentation.pth")

    model, info = beit_fast.BeitForSemanticSegmentation.from_pretrained(
        tmp_path / "segmentation.pth", out_indices=[1, 2, 3, 4], output_loading_info=True
    )
    assert_fits(info)
    assert (model.config.num_labels, model.config.auxiliary_channels, model.config.num_attention_heads) == (5, 6, 4)
    with pytest.raises(ValueError, match="which has 4 layers: pass out_indices"):
        beit_fast.BeitForSemanticSegmentation.from_pretrained(tmp_path / "segmentation.pth")
    own = model.state_dict()
    assert_equal_trunks(own, {key: x for key, x in head.state_dict().items() if not key.startswith("beit.")})
    wanted, _ = to_hub_names(source.state_dict())
    assert_equal_trunks(own, {key: x for key, x in wanted.items() if key.startswith(("beit.encoder", "beit.embed"))})
    with torch.no_grad():
        features = source.forward_intermediates(torch.ones(1, 3, 32, 32), intermediates_only=True)
        states = model.beit(torch.ones(1, 3, 32, 32), output_hidden_states=True).hidden_states
    for feature, state in zip(features, states[1:], strict=True):
        assert relative_error(state[:, 1:].transpose(1, 2).reshape(feature.shape), feature) < 1e-5


def test_from_pretrained_with_dit_loads_absolute_positions(tmp_path):
    values = TINY | {"use_absolute_position_embeddings": True, "use_mask_token": True}
    theirs = transformers.BeitForMaskedImageModeling(transformers.BeitConfig(**values)).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    ours, info = beit_fast.BeitForMaskedImageModeling.from_pretrained(tmp_path, output_loading_info=True)
    assert_fits(info)
    assert not ours.config.has_relative_position_bias
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert relative_error(ours(pixels).logits, theirs(pixels).logits) < 1e-5


@pytest.mark.parametrize("task", ["Model", "ForImageClassification", "ForSemanticSegmentation"])
def test_from_pretrained_with_data2vec_vision_loads(task, tmp_path):
    values = TINY | {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "use_relative_position_bias": True}
    values |= {"auxiliary_channels": 6} if task == "ForSemanticSegmentation" else {}
    if task == "ForSemanticSegmentation":
        values["pool_scales"] = (1, 2)
    config = transformers.Data2VecVisionConfig(**{k: v for k, v in values.items() if k != "vocab_size"})
    theirs = getattr(transformers, f"Data2VecVision{task}")(config).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    options = {"add_pooling_layer": False} if task == "Model" else {}
    ours, info = getattr(beit_fast, f"Beit{task}").from_pretrained(tmp_path, output_loading_info=True, **options)
    assert_fits(info)
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        mine, wanted = ours(pixels), theirs(pixels)
    name = "last_hidden_state" if task == "Model" else "logits"
    assert relative_error(getattr(mine, name), getattr(wanted, name)) < 1e-5


def test_to_hub_names_drops_index_buffers(tmp_path):
    model = transformers.BeitModel(transformers.BeitConfig(**TINY, use_relative_position_bias=True))
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = "encoder.layer.0.attention.attention.relative_position_bias.relative_position_index"
    save_file(state | {name: torch.zeros(17, 17, dtype=torch.int64)}, tmp_path / "model.safetensors")
    _, info = beit_fast.BeitModel.from_pretrained(tmp_path, output_loading_info=True)
    assert_fits(info)


def test_from_pretrained_with_another_network_raises(tmp_path):
    save_file({"conv1.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"is not a BEiT model.*blocks\.0\.attn.*conv1\.weight"):
        beit_fast.BeitModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="got no names"):
        format_of([])


@pytest.mark.parametrize(("depth", "stages"), [(12, [3, 5, 7, 11]), (24, [7, 11, 15, 23])])
def test_infer_config_of_segmentation_selects_the_stages_of_the_hub(depth, stages):
    trunk, _ = to_hub_names(timm_reference.build(use_rel_pos_bias=True, depth=depth, num_classes=0).state_dict())
    head = {"decode_head.classifier.weight": torch.zeros(150, 32, 1, 1)}
    head |= {f"decode_head.psp_modules.{scale}.1.conv.weight": torch.zeros(1) for scale in range(4)}
    config = infer_config(trunk | head, "a file", {})
    assert config.out_indices == stages
    assert config.num_labels == 150
    assert config.pool_scales == (1, 2, 3, 6)
    assert not config.use_auxiliary_head
    del head["decode_head.psp_modules.3.1.conv.weight"]
    with pytest.raises(ValueError, match="which has 3 scales: pass pool_scales"):
        infer_config(trunk | head, "a file", {})
    assert infer_config(trunk | head, "a file", {"pool_scales": (1, 2, 3)}).pool_scales == (1, 2, 3)


def test_from_pretrained_with_a_rectangular_table_requires_a_config(tmp_path):
    theirs = timm_reference.build(use_rel_pos_bias=True, img_size=(24, 40))
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    with pytest.raises(ValueError, match=r"\[48, 4\] is not for a square image\. Pass config=BeitConfig"):
        Classifier.from_pretrained(tmp_path / "timm.pth")
    ours = Classifier.from_pretrained(tmp_path / "timm.pth", config=rectangular_config((24, 40)))
    pixels = torch.randn(2, 3, 24, 40)
    with torch.no_grad():
        assert relative_error(ours(pixels).logits, theirs(pixels)) < 1e-5
    larger = Classifier.from_pretrained(tmp_path / "timm.pth", config=rectangular_config((24, 40)), image_size=48)
    assert larger.config.window == (6, 6)


def rectangular_config(size):
    values = TINY | {"image_size": size, "use_relative_position_bias": True, "use_mask_token": False}
    return beit_fast.BeitConfig(**values, layer_norm_eps=1e-6)
