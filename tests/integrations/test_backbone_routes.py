"""`BeitBackbone` and fused attention inside UperNet, DPT and ZoeDepth of Transformers, by every route.

Route A: the configuration has `model_type="beit_fast"`. Route B: `AutoBackbone` builds `beit_fast.BeitBackbone` for an
unchanged hub configuration, after `register()` or `AutoBackbone.register`. Route C: Transformers' backbone has
`attn_implementation="triton"`. Route D: `model.backbone = BeitBackbone(...)`.
"""

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import beit_fast
from beit_fast.integrations.transformers import register, unregister

from ..support.attention_spy import AttentionSpy
from ..support.dense_models import DENSE_MODELS, dpt, main_output, model_class, upernet, zoedepth
from ..support.models import align_parameters
from ..support.oracle import relative_error
from ..support.transformers_reference import POSITIONS, hub_gradients, hub_state, randomize

ROUTES = ("A", "B", "B by AutoBackbone.register", "C", "D")
QUICK = {("B", upernet), ("B", dpt), ("B", zoedepth), ("C", upernet), ("A", dpt), ("D", upernet)}
BIASED = ("per layer", "shared", "both")


@pytest.fixture
def mapping():
    """Yield the mapping of `AutoBackbone`; restore it after the test."""
    mapping = transformers.AutoBackbone._model_mapping._extra_content
    before = dict(mapping)
    yield mapping
    unregister()
    mapping.clear()
    mapping.update(before)


def reference(build, folder, position="per layer", **options):
    """Build a random fp64 model of Transformers and pixels; save the model in `folder`."""
    config, size = build(**({"use_relative_position_bias": False} | POSITIONS[position] | options))
    model = model_class(build)(config).double().eval()
    randomize(model)
    model.save_pretrained(folder)
    return model, torch.randn(2, 3, *size, dtype=torch.float64)


def load(route, build, folder, **options):
    """Load the checkpoint in fp64 with fused attention by a route."""
    cls = model_class(build)
    options = {"dtype": torch.float64, **options}
    if route == "D":
        model = cls.from_pretrained(folder, **options)
        backbone = beit_fast.BeitBackbone(model.backbone.config).double().eval()
        backbone.load_state_dict(hub_state(model.backbone))
        model.backbone = backbone
        return model
    if route == "C":
        register(models=False, backbones=False)
        return cls.from_pretrained(folder, attn_implementation={"backbone_config": "triton"}, **options)
    if route == "B by AutoBackbone.register":
        transformers.AutoBackbone.register(transformers.BeitConfig, beit_fast.BeitBackbone, exist_ok=True)
        return cls.from_pretrained(folder, **options)
    register(models=False, attention=False)
    if route == "A":
        file = folder / "config.json"
        values = json.loads(file.read_text())
        values["backbone_config"]["model_type"] = "beit_fast"
        file.write_text(json.dumps(values))
    return cls.from_pretrained(folder, **options)


def run_model(model, pixels):
    """Return the output, the hidden states, and the gradients by hub names.

    The loss depends on every element of the output.
    """
    model.zero_grad()
    outputs = model(pixels, output_hidden_states=True)
    out = main_output(outputs)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return out.detach(), [x.detach() for x in outputs.hidden_states], hub_gradients(model)


def build_route_params(routes=ROUTES, quick=frozenset(QUICK)):
    """Return (build, route) of every model and route; all but `quick` are marked slow."""
    pairs = [(build, route) for build in DENSE_MODELS for route in routes]
    return [
        pytest.param(build, route, marks=() if (route, build) in quick else pytest.mark.slow) for build, route in pairs
    ]


@pytest.mark.parametrize(("build", "route"), build_route_params())
def test_backbone_every_route_equals_transformers(build, route, mapping, tmp_path):
    """Compare outputs, hidden states and gradients of rectangular images.

    Every layer calls the fused operator, and a dense bias is never created.
    """
    theirs, pixels = reference(build, tmp_path)
    expected, states, gradients = run_model(theirs, pixels)
    ours = load(route, build, tmp_path)
    assert isinstance(ours.backbone, beit_fast.BeitBackbone) == (route != "C")
    tokens = pixels.shape[2] // 8 * (pixels.shape[3] // 8) + 1
    with AttentionSpy(tokens) as spy:
        actual = run_model(ours, pixels)
    assert (spy.calls, spy.tables) == (4, 4)
    assert not spy.square
    assert relative_error(actual[0], expected) < 1e-9
    for mine, wanted in zip(actual[1], states, strict=True):
        assert relative_error(mine, wanted) < 1e-9
    assert actual[2].keys() == gradients.keys()
    for name, wanted in gradients.items():
        if not wanted.isnan().any():  # unused parameters do not have a gradient
            assert relative_error(actual[2][name], wanted) < 1e-9, name
    tables = [name for name in gradients if "bias_table" in name]
    assert len(tables) == 4
    assert all(gradients[name].norm() > 0 for name in tables)


@pytest.mark.skipif(
    transformers.__version__.startswith("4."), reason="4.x cannot change the attention of a built model"
)
@pytest.mark.parametrize("implementation", ["triton", {"backbone_config": "triton"}])
def test_set_attn_implementation_existing_model_uses_operator(implementation, mapping, tmp_path):
    model, pixels = reference(upernet, tmp_path)
    expected = main_output(model(pixels))
    register(models=False, backbones=False)
    model.set_attn_implementation(implementation)
    with AttentionSpy(25) as spy:
        actual = main_output(model(pixels))
    assert (spy.calls, spy.square) == (4, [])
    assert relative_error(actual, expected) < 1e-9


@pytest.mark.parametrize("build", DENSE_MODELS)
def test_backbone_lost_bias_changes_output(build, mapping, tmp_path):
    theirs, pixels = reference(build, tmp_path)
    ours = load("B", build, tmp_path)
    for module in ours.backbone.modules():
        if hasattr(module, "relative_position_bias_table"):
            torch.nn.init.zeros_(module.relative_position_bias_table)
    assert relative_error(main_output(ours(pixels)), main_output(theirs(pixels))) > 1e-6  # the depth is near 0.7


@pytest.mark.slow
@pytest.mark.parametrize("position", [name for name in POSITIONS if name != "per layer"])
def test_backbone_every_position_kind_equals_transformers(position, mapping, tmp_path):
    theirs, pixels = reference(zoedepth, tmp_path, position)
    # Transformers 5.24 saves a backbone's shared table under a name that differs from 4.57 and the hub.
    ours = load("B", zoedepth, tmp_path, key_mapping={r"^backbone\.beit\.": "backbone."})
    with AttentionSpy(25) as spy:
        actual = main_output(ours(pixels))
    assert (spy.calls, spy.tables) == (4, 4 if position in BIASED else 0)
    assert relative_error(actual, main_output(theirs(pixels))) < 1e-9


@pytest.mark.parametrize(
    ("build", "route"), build_route_params(("A", "B", "B by AutoBackbone.register"), {("A", upernet), ("B", dpt)})
)
def test_from_pretrained_sets_every_tensor(build, route, mapping, tmp_path):
    """Load every tensor from the file, on a real device.

    Transformers builds on the meta device. Buffers and attributes outside the state dict would stay uninitialized.
    """
    theirs, _ = reference(build, tmp_path)
    ours = load(route, build, tmp_path)
    stored = hub_state(theirs)
    state = ours.backbone.state_dict()
    assert {f"backbone.{name}" for name in state} == {name for name in stored if name.startswith("backbone.")}
    assert all(torch.equal(x, stored[f"backbone.{name}"]) for name, x in state.items())
    assert {name for name, _ in ours.backbone.named_buffers()} <= state.keys()
    for name, module in ours.backbone.named_modules():
        unsaved = [key for key, value in vars(module).items() if isinstance(value, torch.Tensor)]
        assert not unsaved, f"{name} has unsaved tensors {unsaved}"


@pytest.mark.parametrize(("build", "route"), build_route_params(("A", "B"), {("A", upernet), ("B", upernet)}))
def test_save_pretrained_reloads_equal(build, route, mapping, tmp_path):
    theirs, pixels = reference(build, tmp_path / "theirs")
    ours = load(route, build, tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again = model_class(build).from_pretrained(tmp_path / "ours", dtype=torch.float64)
    assert isinstance(again.backbone, beit_fast.BeitBackbone)
    assert torch.equal(main_output(align_parameters(again)(pixels)), main_output(align_parameters(ours)(pixels)))
    written, stored = (load_file(tmp_path / folder / "model.safetensors") for folder in ("ours", "theirs"))
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[name], x) for name, x in stored.items())
    if route == "B":
        unregister()
        back, info = model_class(build).from_pretrained(
            tmp_path / "ours", dtype=torch.float64, output_loading_info=True
        )
        assert not isinstance(back.backbone, beit_fast.BeitBackbone)
        assert not any(info.values())
        assert torch.equal(main_output(align_parameters(back)(pixels)), main_output(align_parameters(theirs)(pixels)))


@pytest.mark.parametrize("route", ["A", "B"])
def test_from_pretrained_missing_tensors_are_initialized(route, mapping, tmp_path):
    """Initialize tables of another window and a missing layer scale; load the rest."""
    theirs, _ = reference(upernet, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["backbone_config"]["image_size"] = 48
    (tmp_path / "config.json").write_text(json.dumps(config))
    stored = load_file(tmp_path / "model.safetensors")
    del stored["backbone.encoder.layer.0.lambda_1"]
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours, info = load(route, upernet, tmp_path, ignore_mismatched_sizes=True, output_loading_info=True)
    assert len(info["mismatched_keys"]) == 4
    layers = ours.backbone.encoder.layer
    for layer, original in zip(layers, hub_layers(theirs), strict=True):
        table = layer.attention.attention.relative_position_bias.relative_position_bias_table
        assert table.shape == ((2 * 6 - 1) ** 2 + 3, 4)
        assert torch.equal(table, torch.zeros_like(table))
        assert torch.equal(layer.lambda_2, original["lambda_2"])
    assert torch.equal(layers[0].lambda_1, torch.full_like(layers[0].lambda_1, 0.1))
    assert torch.equal(layers[1].lambda_1, hub_layers(theirs)[1]["lambda_1"])
    assert torch.equal(ours.backbone.embeddings.cls_token, hub_state(theirs)["backbone.embeddings.cls_token"])


def hub_layers(model):
    state = hub_state(model)
    prefix = "backbone.encoder.layer."
    return [
        {name.removeprefix(f"{prefix}{index}."): x for name, x in state.items() if name.startswith(f"{prefix}{index}.")}
        for index in range(4)
    ]


@pytest.mark.parametrize(
    "build", [upernet, *(pytest.param(build, marks=pytest.mark.slow) for build in (dpt, zoedepth))]
)
def test_backbone_requested_outputs_equal_transformers(build, mapping, tmp_path):
    theirs, pixels = reference(build, tmp_path)
    if not transformers.__version__.startswith("4."):  # 4.x always returns attention weights
        theirs.set_attn_implementation("eager")
    ours = load("B", build, tmp_path)
    plain = ours(pixels)
    assert plain.hidden_states is None
    assert plain.attentions is None
    as_tuple = ours(pixels, return_dict=False)
    assert torch.equal(as_tuple[0], main_output(plain))
    expected, actual = (model(pixels, output_attentions=True, output_hidden_states=True) for model in (theirs, ours))
    assert len(actual.attentions) == len(expected.attentions) == 4
    for mine, wanted in zip(actual.attentions, expected.attentions, strict=True):
        assert relative_error(mine, wanted) < 1e-6  # the softmax of Transformers is in fp32
    assert len(actual.hidden_states) == len(expected.hidden_states)
    longer = ours(pixels, output_attentions=True, output_hidden_states=True, return_dict=False)
    assert len(longer) == 3


@pytest.mark.parametrize(
    "build", [upernet, *(pytest.param(build, marks=pytest.mark.slow) for build in (dpt, zoedepth))]
)
def test_from_pretrained_dtype_and_implementation_reach_backbone(build, mapping, tmp_path):
    reference(build, tmp_path)
    ours = load("B", build, tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in ours.backbone.parameters()} == {torch.bfloat16}
    assert ours.backbone.attn_implementation is None
    for implementation in ("eager", "triton"):
        ours = load("B", build, tmp_path, attn_implementation={"backbone_config": implementation})
        assert ours.backbone.attn_implementation == implementation


def test_backbone_attributes_equal_transformers(mapping):
    from beit_fast.integrations.transformers.auto_classes import BackboneType

    register(models=False, attention=False)
    config, _ = dpt()
    backbone = transformers.AutoBackbone.from_config(config.backbone_config)
    theirs = transformers.BeitBackbone(config.backbone_config)
    assert backbone.backbone_type is BackboneType.TRANSFORMERS is theirs.backbone_type
    for name in ("stage_names", "num_features", "out_features", "out_indices", "out_feature_channels", "channels"):
        assert getattr(backbone, name) == getattr(theirs, name), name
    backbone.out_features = theirs.out_features = ["stem", "stage2"]
    assert backbone.out_indices == theirs.out_indices
    assert (backbone.config.hidden_size, backbone.config.patch_size) == (32, 8)
    pixels = torch.randn(1, 3, 32, 40)
    output = backbone.forward_with_filtered_kwargs(pixels, output_hidden_states=False, output_attentions=False)
    assert type(output) is type(theirs(pixels))
    assert [x.shape for x in output.feature_maps] == [(1, 21, 32)] * 2
    assert output.hidden_states is None


def test_auto_backbone_both_model_types_in_one_process(mapping, tmp_path):
    """Build each model type's own backbone if `"beit"` was not registered."""
    register(models=False, attention=False)
    del mapping[transformers.BeitConfig]
    ours, theirs = (model_class(dpt)(dpt(model_type=model_type)[0]) for model_type in ("beit_fast", "beit"))
    assert isinstance(ours.backbone, beit_fast.BeitBackbone)
    assert isinstance(theirs.backbone, transformers.BeitBackbone)
    assert copy.deepcopy(ours).backbone.state_dict().keys() == ours.backbone.state_dict().keys()
