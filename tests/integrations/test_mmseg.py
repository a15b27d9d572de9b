"""`MmsegBeit` against a reference `BEiT` with mmsegmentation's names, maps, pyramid and loading."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from beit_fast.integrations.mmseg import MmsegBeit

from ..support import timm_reference
from ..support.oracle import dense_bias, relative_error
from ..support.timm_reference import timm

ARGUMENTS = {
    "img_size": (32, 32),
    "patch_size": 8,
    "embed_dims": 32,
    "num_layers": 4,
    "num_heads": 4,
    "mlp_ratio": 2,
    "out_indices": (0, 1, 2, 3),
    "norm_cfg": {"type": "LN", "eps": 1e-6},
    "act_cfg": {"type": "GELU"},
}


class ReferenceAttention(nn.Module):
    """Attention with mmsegmentation's names and the oracle's dense bias."""

    def __init__(self, size, heads, window):
        super().__init__()
        self.heads, self.window = heads, window
        rows = (2 * window[0] - 1) * (2 * window[1] - 1) + 3
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(size)), nn.Parameter(torch.zeros(size))
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, heads))
        self.register_buffer("relative_position_index", torch.zeros(1, dtype=torch.int64))
        self.qkv = nn.Linear(size, 3 * size, bias=False)
        self.proj = nn.Linear(size, size)

    def forward(self, x):
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        weights = (scores + dense_bias(self.relative_position_bias_table, self.window)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class ReferenceFFN(nn.Module):
    def __init__(self, size, inner):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Sequential(nn.Linear(size, inner), nn.GELU(), nn.Dropout(0.0)), nn.Linear(inner, size), nn.Dropout(0.0)
        )

    def forward(self, x):
        return self.layers(x)


class ReferenceLayer(nn.Module):
    def __init__(self, size, heads, inner, window):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(size, eps=1e-6), nn.LayerNorm(size, eps=1e-6)
        self.attn, self.ffn = ReferenceAttention(size, heads, window), ReferenceFFN(size, inner)
        self.gamma_1, self.gamma_2 = nn.Parameter(torch.ones(size)), nn.Parameter(torch.ones(size))

    def forward(self, x):
        x = x + self.gamma_1 * self.attn(self.ln1(x))
        return x + self.gamma_2 * self.ffn(self.ln2(x))


class ReferenceBeit(nn.Module):
    """mmsegmentation's `BEiT`: maps after the blocks `out_indices`, counted from 0."""

    def __init__(self, img_size, patch_size, embed_dims, num_layers, num_heads, mlp_ratio, out_indices, **unused):
        super().__init__()
        window = (img_size[0] // patch_size, img_size[1] // patch_size)
        self.out_indices = out_indices
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dims))
        self.patch_embed = nn.Module()
        self.patch_embed.projection = nn.Conv2d(3, embed_dims, patch_size, patch_size)
        self.layers = nn.ModuleList(
            ReferenceLayer(embed_dims, num_heads, mlp_ratio * embed_dims, window) for _ in range(num_layers)
        )

    def forward(self, inputs):
        patches = self.patch_embed.projection(inputs)
        x = torch.cat([self.cls_token.expand(len(inputs), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
        outs = []
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index in self.out_indices:
                outs.append(x[:, 1:].transpose(1, 2).reshape(patches.shape).contiguous())
        return tuple(outs)


class ReferencePyramid(nn.Module):
    """mmsegmentation's `Feature2Pyramid` with rescales of 4, 2, 1 and 1/2."""

    def __init__(self, size):
        super().__init__()
        up = [nn.ConvTranspose2d(size, size, 2, 2) for _ in range(3)]
        self.upsample_4x = nn.Sequential(up[0], nn.BatchNorm2d(size), nn.GELU(), up[1])
        self.upsample_2x = nn.Sequential(up[2])
        self.downsample_2x = nn.MaxPool2d(2, 2)

    def forward(self, maps):
        steps = (self.upsample_4x, self.upsample_2x, nn.Identity(), self.downsample_2x)
        return tuple(step(x) for step, x in zip(steps, maps, strict=True))


class ReferenceSegmentor(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.backbone = ReferenceBeit(**(ARGUMENTS | options))
        self.neck = ReferencePyramid(ARGUMENTS["embed_dims"])
        self.decode_head = nn.Module()
        self.decode_head.conv_seg = nn.Conv2d(32, 5, 1)


@torch.no_grad()
def randomize(model):
    """Draw every tensor: tables and CLS from N(0, 1), layer scale at least 0.1."""
    generator = torch.Generator().manual_seed(5)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        if "gamma" in name or "running_var" in name:
            tensor.uniform_(0.1, 1.0, generator=generator)
        elif "table" in name or "cls_token" in name:
            tensor.normal_(generator=generator)
        else:
            tensor.normal_(1.0 if "ln" in name and name.endswith("weight") else 0.0, 0.2, generator=generator)
    return model.eval()


def segmentor(**options):
    return randomize(ReferenceSegmentor(**options))


def build_beit(**options):
    return MmsegBeit(**(ARGUMENTS | {"attn_implementation": "triton"} | options)).eval()


def save(tmp_path, model, **extra):
    file = tmp_path / "segmentor.pth"
    torch.save({"state_dict": model.state_dict(), "meta": {"epoch": 3}} | extra, file)
    return file


def assert_equal_maps(mine, wanted):
    assert isinstance(mine, tuple)
    assert len(mine) == len(wanted)
    for one, other in zip(mine, wanted, strict=True):
        assert one.is_contiguous()
        assert relative_error(one, other) < 1e-5


def test_forward_maps_and_gradients_equal_mmseg():
    theirs = segmentor().backbone
    mine = build_beit()
    mine.load_state_dict(theirs.state_dict())
    pixels = torch.randn(2, 3, 32, 32)
    maps, wanted = mine(pixels), theirs(pixels)
    assert [tuple(x.shape) for x in maps] == [(2, 32, 4, 4)] * 4
    assert_equal_maps(maps, wanted)
    for result in (maps, wanted):
        sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in result).backward()
    layers = [layer.attention for layer in mine.trunk.encoder.layer]
    for layer, reference in zip(layers, theirs.layers, strict=True):
        attention = layer.attention
        table = attention.relative_position_bias.relative_position_bias_table
        assert relative_error(table.grad, reference.attn.relative_position_bias_table.grad) < 1e-5
        packed = torch.cat([part.weight.grad for part in (attention.query, attention.key, attention.value)])
        assert relative_error(packed, reference.attn.qkv.weight.grad) < 1e-5
    assert relative_error(mine.trunk.embeddings.cls_token.grad, theirs.cls_token.grad) < 1e-5


def test_forward_calls_operator_and_lost_bias_changes_maps():
    from torch.utils._python_dispatch import TorchDispatchMode

    calls = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(function)
            return function(*args, **(kwargs or {}))

    theirs, mine, pixels = segmentor().backbone, build_beit(), torch.randn(1, 3, 32, 32)
    mine.load_state_dict(theirs.state_dict())
    with Spy(), torch.no_grad():
        mine(pixels)
    assert calls.count(torch.ops.beit_fast.rel_pos_attention.default) == 4
    with torch.no_grad():
        for layer in theirs.layers:
            layer.attn.relative_position_bias_table.zero_()
        assert min(relative_error(a, b) for a, b in zip(mine(pixels), theirs(pixels), strict=True)) > 1e-2


@pytest.mark.parametrize(
    ("out_indices", "expected"), [(-1, [3]), (2, [2]), ([1, 3], [1, 3]), ((0, -1), [0, 3]), ((-3, -2), [1, 2])]
)
def test_out_indices_count_from_zero(out_indices, expected):
    theirs, mine = segmentor().backbone, build_beit(out_indices=out_indices)
    mine.load_state_dict(theirs.state_dict())
    theirs.out_indices = expected
    assert mine.out_indices == expected
    pixels = torch.randn(1, 3, 32, 32)
    assert_equal_maps(mine(pixels), theirs(pixels))


@pytest.mark.parametrize("img_size", [(32, 32), (24, 40)])
def test_forward_other_image_size_resizes_tables(img_size):
    """Resize the tables bilinearly to the window of the image.

    mmsegmentation supports only the window of `img_size`.
    """
    theirs, mine = segmentor(img_size=img_size).backbone, build_beit(img_size=img_size)
    mine.load_state_dict(theirs.state_dict())
    other = segmentor(img_size=(40, 48)).backbone
    state = copy.deepcopy(theirs.state_dict())
    height, width = (2 * side // 8 - 1 for side in img_size)
    for name in [name for name in state if name.endswith("table")]:
        grid = state[name][:-3].t().reshape(1, 4, height, width)
        resized = F.interpolate(grid, size=(9, 11), mode="bilinear", align_corners=False)
        state[name] = torch.cat([resized.flatten(2)[0].t(), state[name][-3:]])
    other.load_state_dict(state)
    pixels = torch.randn(2, 3, 40, 48)
    assert_equal_maps(mine(pixels), other(pixels))
    pixels = torch.randn(1, 3, *img_size)
    assert_equal_maps(mine(pixels), theirs(pixels))
    assert mine(torch.randn(1, 3, 37, 33))[0].shape == (1, 32, 4, 4)


def test_init_weights_segmentor_file_loads_backbone_and_neck(tmp_path):
    theirs = segmentor()
    mine = build_beit(feature_pyramid=True, pretrained=save(tmp_path, theirs))
    before = {id(parameter) for parameter in mine.parameters()}
    mine.init_weights()
    assert {id(parameter) for parameter in mine.parameters()} == before, "mmengine requires in-place changes"
    pixels = torch.randn(2, 3, 32, 48)
    assert [tuple(x.shape[2:]) for x in mine(pixels)] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    pixels = torch.randn(2, 3, 32, 32)
    assert_equal_maps(mine(pixels), theirs.neck(theirs.backbone(pixels)))


@pytest.mark.parametrize("how", ["pretrained", "init_cfg", "argument"])
def test_init_weights_every_file_argument_loads(how, tmp_path):
    theirs, pixels = segmentor(), torch.randn(1, 3, 32, 32)
    file = save(tmp_path, theirs)
    named = {"pretrained": {"pretrained": str(file)}, "argument": {}}
    mine = build_beit(**named.get(how, {"init_cfg": {"type": "Pretrained", "checkpoint": str(file)}}))
    mine.init_weights(**({"pretrained": file} if how == "argument" else {}))
    assert_equal_maps(mine(pixels), theirs.backbone(pixels))


def test_init_weights_unilm_file_other_size_resizes_tables(tmp_path):
    """Resize tables geometrically when loading, as unilm and mmsegmentation do."""
    theirs = timm_reference.build(use_rel_pos_bias=True, depth=4, mlp_ratio=2, img_size=32)
    torch.save({"model": theirs.state_dict()}, tmp_path / "unilm.pth")
    mine = build_beit(img_size=48, pretrained=tmp_path / "unilm.pth")
    mine.init_weights()
    larger = timm_reference.build(use_rel_pos_bias=True, depth=4, mlp_ratio=2, img_size=48)
    larger.load_state_dict(timm.models.beit.checkpoint_filter_fn(theirs.state_dict(), larger))
    pixels = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        wanted = larger.forward_intermediates(pixels, intermediates_only=True)
        assert_equal_maps(mine(pixels), wanted)
        even = build_beit(img_size=48, pretrained=tmp_path / "unilm.pth", position_interpolation="bilinear")
        even.init_weights()
        assert relative_error(even(pixels)[3], wanted[3]) > 1e-4


def test_load_state_dict_inside_segmentor_is_strict():
    """Load a segmentor's checkpoint strictly, with `MmsegBeit` as its backbone, and back."""
    theirs = segmentor()
    mine = segmentor()
    mine.backbone = build_beit()
    mine.load_state_dict(theirs.state_dict())
    pixels = torch.randn(1, 3, 32, 32)
    assert_equal_maps(mine.backbone(pixels), theirs.backbone(pixels))
    again = segmentor()
    again.backbone = build_beit()
    again.load_state_dict(mine.state_dict())
    assert_equal_maps(again.backbone(pixels), theirs.backbone(pixels))
    without = {key: x for key, x in theirs.state_dict().items() if key != "backbone.layers.1.gamma_1"}
    with pytest.raises(RuntimeError, match=r"Missing key.*backbone\.trunk\.encoder\.layer\.1\.lambda_1"):
        mine.load_state_dict(without)
    missing, unexpected = build_beit().load_state_dict({"conv1.weight": torch.zeros(1)}, strict=False)
    assert len(missing) == len(build_beit().state_dict())
    assert unexpected == ["conv1.weight"]


def test_init_weights_without_file_resets_parameters():
    torch.manual_seed(0)
    mine = build_beit(init_values=0.3)
    mine.load_state_dict(segmentor().backbone.state_dict())
    mine.init_weights()
    assert not mine.trunk.embeddings.cls_token.any()
    assert mine.trunk.encoder.layer[2].lambda_1.eq(torch.tensor(0.3)).all()


def test_init_arguments_reach_config_and_modules():
    mine = MmsegBeit(
        img_size=(24, 40), patch_size=8, in_channels=1, embed_dims=32, num_layers=3, num_heads=2, mlp_ratio=1.5,
        attn_drop_rate=0.1, drop_path_rate=0.2, norm_cfg={"type": "LN", "requires_grad": False},
        act_cfg={"type": "ReLU"}, norm_eval=True, attn_implementation="sdpa", patch_embed_implementation="conv",
    )  # fmt: skip
    config = mine.trunk.config
    assert (config.image_size, config.num_channels, config.intermediate_size) == ((24, 40), 1, 48)
    assert (config.attention_probs_dropout_prob, config.drop_path_rate) == (0.1, 0.2)
    assert (config.hidden_act, config.layer_norm_eps, config.layer_scale_init_value) == ("relu", 1e-5, 0.1)
    assert (mine.trunk.attn_implementation, mine.trunk.patch_embed_implementation) == ("sdpa", "conv")
    norms = [module for module in mine.modules() if isinstance(module, nn.LayerNorm)]
    assert not any(parameter.requires_grad for norm in norms for parameter in norm.parameters())
    assert mine.trunk.encoder.layer[0].attention.attention.query.weight.requires_grad
    assert MmsegBeit(embed_dims=32, num_heads=2, num_layers=1).out_indices == [0]


def test_init_unsupported_arguments_lists_every_reason():
    with pytest.raises(ValueError, match="cannot be built") as error:
        MmsegBeit(
            num_layers=4, out_indices=(3, 1), qv_bias=False, patch_norm=True, final_norm=True, num_fcs=3,
            init_values=0.0, norm_cfg={"type": "BN"}, act_cfg={"type": "Swish"}, pretrained="a.pth",
            init_cfg={"type": "Normal"}, feature_pyramid=True, position_interpolation="cubic",
        )  # fmt: skip
    for part in (
        *("qv_bias=False is not supported (expected True)", "patch_norm=True", "final_norm=True", "num_fcs=3"),
        *("init_values=0.0", "'BN'", "'Swish'", "pretrained and init_cfg were both passed", "'Normal'", "'cubic'"),
        *("out_indices=[3, 1] is not supported (expected 0 to 3, ascending)", "2 out_indices is not supported"),
    ):
        assert part in str(error.value), part
    with pytest.raises(ValueError, match="out_indices"):
        MmsegBeit(out_indices=12)


def test_init_weights_mismatched_file_raises_and_keeps_weights(tmp_path):
    mine = build_beit(embed_dims=16)
    before = copy.deepcopy(mine.state_dict())
    with pytest.raises(ValueError, match="does not fit BeitBackbone"):
        mine.init_weights(save(tmp_path, segmentor()))
    assert all(torch.equal(tensor, before[key]) for key, tensor in mine.state_dict().items())


@pytest.mark.slow
def test_import_without_mmseg_and_timm_succeeds():
    code = """
import sys
for name in ("mmseg", "mmengine", "mmcv", "timm", "transformers"):
    sys.modules[name] = None
from beit_fast.integrations.mmseg import MmsegBeit
MmsegBeit(img_size=32, embed_dims=32, num_layers=1, num_heads=2)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
