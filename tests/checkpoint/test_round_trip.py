"""`save_pretrained` writes only what `from_pretrained` reads: other modules are one error, and no file."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import beit_fast
from beit_fast import BeitForImageClassification

from ..support.models import build


def with_weight_norm(model):
    parametrizations.weight_norm(model.classifier)
    return model


def with_old_weight_norm(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model.classifier)
    return model


def with_pruning(model):
    prune.l1_unstructured(model.classifier, "weight", amount=0.5)
    return model


def with_another_classifier(model):
    model.classifier = nn.Linear(model.config.hidden_size, 11)
    return model


def with_sequential_head(model):
    model.classifier = nn.Sequential(nn.Dropout(0.1), model.classifier)
    return model


def with_int8_weight(model):
    weight = model.classifier.weight.detach()
    model.classifier.weight = nn.Parameter((weight * 100).to(torch.int8), requires_grad=False)
    return model


def with_adapters(model):
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(target_modules=["query", "value"], modules_to_save=["classifier"], r=2)
    return peft.get_peft_model(model, options).base_model.model


def with_new_module(model):
    model.beit.extra = nn.Linear(2, 2)
    return model


def without_a_bias(model):
    model.beit.encoder.layer[0].output.dense.bias = None
    return model


def with_fewer_layers(model):
    del model.beit.encoder.layer[1:]
    return model


LAYER = "beit.encoder.layer.0"
CASES = {
    "weight norm": (
        with_weight_norm,
        "- classifier (torch.nn.utils.parametrize.ParametrizedLinear): found parametrizations.weight.original0 [5, 1], "
        "parametrizations.weight.original1 [5, 32], expected weight [5, 32]",
        "remove_parametrizations(module, name)",
    ),
    "old weight norm": (
        with_old_weight_norm,
        "- classifier (torch.nn.modules.linear.Linear): found weight_g [5, 1], weight_v [5, 32], expected weight",
        "remove_weight_norm(module)",
    ),
    "pruning": (with_pruning, "found weight_orig [5, 32], weight_mask [5, 32], expected weight", "prune.remove(module"),
    "another classifier": (
        with_another_classifier,
        "found weight [11, 32], bias [11], expected weight [5, 32], bias [5]",
        "set model.config.num_labels = 11",
    ),
    "sequential head": (
        with_sequential_head,
        "- classifier (torch.nn.modules.container.Sequential): found 1.weight [5, 32], 1.bias [5], expected weight [5",
        "a class whose constructor builds these modules",
    ),
    "int8 weight": (
        with_int8_weight,
        "found weight int8 [5, 32], expected weight float32 [5, 32]",
        "before it is quantized",
    ),
    "adapters": (
        with_adapters,
        f"- {LAYER}.attention.attention.query (peft.tuners.lora.layer.Linear): found base_layer.weight [32, 32], ",
        "merge_and_unload()",
    ),
    "new module": (
        with_new_module,
        "- beit (beit_fast.models.beit.BeitModel): found extra.weight [2, 2], extra.bias [2], expected nothing",
        "a class whose constructor builds these modules",
    ),
    "no bias": (
        without_a_bias,
        f"- {LAYER}.output.dense (torch.nn.modules.linear.Linear): found nothing, expected bias [32]",
        "a class whose constructor builds these modules",
    ),
    "fewer layers": (
        with_fewer_layers,
        "- beit.encoder.layer.1.attention.attention.query (missing in the model): found nothing, expected weight [32",
        "set model.config.num_hidden_layers to the number of layers left, if some were removed",
    ),
}


def assert_reads_back(model, folder, **options):
    loaded = type(model).from_pretrained(folder, **options).state_dict()
    own = {key.replace("_orig_mod.", ""): tensor for key, tensor in model.state_dict().items()}
    assert loaded.keys() == own.keys()
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in own.items())


@pytest.mark.parametrize("passed", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_save_pretrained_of_modules_that_cannot_be_read_names_them_and_writes_nothing(name, passed, tmp_path):
    """Regression: the files were written, and `from_pretrained` could not read them."""
    change, found, advice = CASES[name]
    model = change(build(num_labels=5))
    options = {"state_dict": model.state_dict()} if passed else {}
    with pytest.raises(ValueError, match="from_pretrained could not read this checkpoint") as raised:
        model.save_pretrained(tmp_path / "new", **options)
    assert found in str(raised.value)
    assert advice in str(raised.value)
    assert "state_dict() with torch.save" in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_save_pretrained_after_what_the_error_says_can_be_read(tmp_path):
    cases = {}
    cases["weight norm"] = with_weight_norm(build())
    parametrize.remove_parametrizations(cases["weight norm"].classifier, "weight")
    cases["pruning"] = with_pruning(build())
    prune.remove(cases["pruning"].classifier, "weight")
    cases["classifier"] = with_another_classifier(build())
    cases["classifier"].config.num_labels = 11
    peft = pytest.importorskip("peft")
    cases["peft"] = peft.get_peft_model(build(), peft.LoraConfig(target_modules=["query"])).merge_and_unload()
    for name, model in cases.items():
        model.save_pretrained(tmp_path / name)
        assert_reads_back(model, tmp_path / name)


def test_save_pretrained_with_the_state_of_a_clean_copy_can_be_read(tmp_path):
    """`state_dict` has what the class builds, though the model has adapters."""
    model = build()
    state = copy.deepcopy(model).state_dict()
    with_adapters(model).save_pretrained(tmp_path, state_dict=state)
    loaded = BeitForImageClassification.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in state.items())


def test_save_pretrained_of_many_wrong_modules_shows_some_and_counts_the_others(tmp_path):
    model = build(num_hidden_layers=12)
    for layer in model.beit.encoder.layer:
        layer.output.dense.bias = None
    with pytest.raises(ValueError, match="- and 2 more modules") as raised:
        model.save_pretrained(tmp_path)
    assert str(raised.value).count("expected bias") == 10


class WithItsOwnHead(BeitForImageClassification):
    def __init__(self, config):
        super().__init__(config)
        self.classifier = nn.Sequential(nn.Dropout(0.1), parametrizations.weight_norm(nn.Linear(32, 7)))


class WithAnArgument(BeitForImageClassification):
    def __init__(self, config, channels=7):
        super().__init__(config)
        self.extra = nn.Linear(2, channels)


class OnlyOnADevice(BeitForImageClassification):
    def __init__(self, config):
        super().__init__(config)
        self.scale = float(torch.ones(1).sum())


def test_save_pretrained_of_a_subclass_that_builds_its_modules_can_be_read(tmp_path):
    config = build().config
    model = WithItsOwnHead(config)
    model.save_pretrained(tmp_path / "head")
    assert_reads_back(model, tmp_path / "head")
    model = WithAnArgument(config, channels=3)
    model.save_pretrained(tmp_path / "argument")
    assert_reads_back(model, tmp_path / "argument", channels=3)


class WithItsOwnConfiguration(BeitForImageClassification):
    def __init__(self):
        super().__init__(build().config)


@pytest.mark.parametrize("create", [lambda: OnlyOnADevice(build().config), WithItsOwnConfiguration])
def test_save_pretrained_of_a_class_that_only_its_user_can_build_is_read_by_the_base_class(create, tmp_path):
    model = create()
    model.save_pretrained(tmp_path / "new")
    read = BeitForImageClassification.from_pretrained(tmp_path / "new")
    assert {key: x.tolist() for key, x in read.state_dict().items()} == {
        key: x.tolist() for key, x in model.state_dict().items()
    }


def test_save_pretrained_of_models_without_a_head_or_pooling_can_be_read(tmp_path):
    model = beit_fast.BeitModel(build().config, add_pooling_layer=False)
    model.save_pretrained(tmp_path / "pooling")
    assert_reads_back(model, tmp_path / "pooling", add_pooling_layer=False)
    model = build()
    model.classifier = nn.Identity()
    model.save_pretrained(tmp_path / "head")
    assert_reads_back(model, tmp_path / "head", num_labels=0)


def test_save_pretrained_of_compiled_modules_writes_the_names_of_the_hub(tmp_path):
    """Transformers reads these names only."""
    from safetensors.torch import load_file

    model = build()
    plain = list(model.state_dict())
    model.beit.encoder.layer[1] = torch.compile(model.beit.encoder.layer[1])
    model.save_pretrained(tmp_path)
    assert sorted(load_file(tmp_path / "model.safetensors")) == sorted(plain)
    assert_reads_back(model, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, None])
def test_save_pretrained_of_any_floating_point_dtype_can_be_read(dtype, tmp_path):
    """None: some parameters of a model in bfloat16 stay in float32."""
    model = build().to(torch.bfloat16 if dtype is None else dtype)
    if dtype is None:
        model.classifier.float()
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).dtype is model.dtype


def test_save_pretrained_does_not_change_random_numbers(tmp_path):
    model = build()
    state = torch.get_rng_state()
    model.save_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
