"""Parameter groups: layers, weight decay, models of both packages and wrappers."""

from __future__ import annotations

import math

import peft
import pytest
import torch
import transformers
from torch import nn

import beit_fast
from beit_fast.training import layer_decay_parameter_groups

from ..support.models import build
from ..support.transformers_reference import POSITIONS, TINY, options_for

NAMES = (
    "BeitModel",
    "BeitForMaskedImageModeling",
    "BeitForImageClassification",
    "BeitForSemanticSegmentation",
    "BeitBackbone",
)


def make(name: str, package: str, position: str = "per layer", **options: object) -> nn.Module:
    if package == "beit_fast":
        return build(name, position, **options)
    values = TINY | POSITIONS[position] | options_for(name) | options
    return getattr(transformers, name)(transformers.BeitConfig(**values))


def by_name(model: nn.Module, **numbers: float) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of each parameter."""
    groups = layer_decay_parameter_groups(model, **({"lr": 1.0, "decay": 0.5, "weight_decay": 0.05} | numbers))
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    return {name: found[id(p)] for name, p in model.named_parameters() if id(p) in found}


@pytest.mark.parametrize("package", ["beit_fast", "transformers"])
@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_in_one_group(name, package):
    model = make(name, package)
    groups = layer_decay_parameter_groups(model, 1e-3, 0.65, 0.05)
    placed = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(placed) == len(set(placed))
    assert set(placed) == {id(parameter) for parameter in model.parameters()}
    torch.optim.AdamW(groups)


@pytest.mark.parametrize("package", ["beit_fast", "transformers"])
def test_learning_rates_follow_unilm(package):
    model = make("BeitForImageClassification", package)
    blocks = model.config.num_hidden_layers
    for name, (rate, _) in by_name(model).items():
        if "embeddings." in name:
            layer = 0
        elif "layer." in name or "layers." in name:
            layer = int(next(part for part in name.split(".") if part.isdigit())) + 1
        else:
            layer = blocks + 1
        assert rate == 0.5 ** (blocks + 1 - layer), name


@pytest.mark.parametrize("package", ["beit_fast", "transformers"])
def test_final_norms_heads_and_a_shared_table_are_the_last_layer(package):
    model = make("BeitForMaskedImageModeling", package, "shared")
    rates = by_name(model)
    last = [name for name, (rate, _) in rates.items() if rate == 1.0]
    assert {name.split(".")[0] for name in last} == {"beit", "layernorm", "lm_head"}
    assert sum("relative_position_bias_table" in name for name in last) == 1


@pytest.mark.parametrize("package", ["beit_fast", "transformers"])
def test_weight_decay_leaves_out_vectors_tokens_positions_and_tables(package):
    options = {"use_absolute_position_embeddings": True, "use_mask_token": True, "layer_scale_init_value": 0.1}
    model = make("BeitForMaskedImageModeling", package, **options)
    decays = {name: decay for name, (_, decay) in by_name(model).items()}
    kept = ("cls_token", "mask_token", "position_embeddings", "relative_position_bias_table", "lambda_1", "lambda_2")
    assert all(sum(name.endswith(text) for name in decays) for text in kept)
    for name, parameter in model.named_parameters():
        is_left_out = parameter.ndim == 1 or name.endswith(kept)
        assert decays[name] == (0.0 if is_left_out else 0.05), name


def test_frozen_parameters_are_left_out():
    model = make("BeitForImageClassification", "beit_fast")
    model.beit.embeddings.requires_grad_(False)
    groups = layer_decay_parameter_groups(model, 1e-3)
    placed = {id(parameter) for group in groups for parameter in group["params"]}
    assert placed == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert all(group["params"] for group in groups)
    assert groups[0]["name"] == "layer_1_decay"


def test_shared_parameter_is_in_the_group_of_its_first_module():
    model = make("BeitForImageClassification", "beit_fast")
    layers = model.beit.encoder.layer
    layers[1].layernorm_before.weight = layers[0].layernorm_before.weight
    shared = layers[0].layernorm_before.weight
    groups = layer_decay_parameter_groups(model, 1e-3)
    owners = [group["name"] for group in groups if any(parameter is shared for parameter in group["params"])]
    assert owners == ["layer_1_no_decay"]
    assert sum(parameter is shared for group in groups for parameter in group["params"]) == 1


class Wrapper(nn.Module):
    def __init__(self, name: str, model: nn.Module) -> None:
        super().__init__()
        self.add_module(name, model)


@pytest.mark.parametrize("wrapper", ["module", "_orig_mod", "model"])
def test_wrapped_model_has_the_groups_of_the_model(wrapper):
    model = make("BeitForImageClassification", "beit_fast")
    assert list(by_name(Wrapper(wrapper, model)).values()) == list(by_name(model).values())


@pytest.mark.parametrize("package", ["beit_fast", "transformers"])
def test_adapters_of_peft_have_the_rate_of_their_layer(package):
    """LoRA and a new head under the names of `PeftModel`: base_model.model.beit.encoder.layer.0.… .lora_A.default."""
    model = make("BeitForImageClassification", package)
    blocks = model.config.num_hidden_layers
    targets = ["query", "value"] if package == "beit_fast" else ["q_proj", "v_proj"]
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    targets = [name for name in ("query", "value", *targets) if name in present]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, modules_to_save=["classifier"], r=2))
    found = by_name(wrapped)
    assert set(found) == {name for name, p in wrapped.named_parameters() if p.requires_grad}
    adapters = [name for name in found if "lora_" in name]
    assert len(adapters) == blocks * len(set(targets)) * 2
    for name in adapters:
        layer = int(next(part for part in name.split(".") if part.isdigit()))
        assert found[name] == (0.5 ** (blocks - layer), 0.05), name
    head = {name: value for name, value in found.items() if "classifier" in name}
    assert {name.rpartition(".")[2]: value for name, value in head.items()} == {
        "weight": (1.0, 0.05),
        "bias": (1.0, 0.0),
    }


@pytest.mark.parametrize("is_ours", [True, False])
def test_backbone_inside_a_model_of_transformers_has_the_rates_of_its_layers(is_ours):
    values = TINY | POSITIONS["per layer"] | {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}
    model = transformers.UperNetForSemanticSegmentation(
        transformers.UperNetConfig(
            backbone_config=transformers.BeitConfig(**values), hidden_size=16, pool_scales=[1, 2], num_labels=3,
            use_auxiliary_head=False,
        )
    )  # fmt: skip
    if is_ours:
        model.backbone = beit_fast.BeitBackbone(beit_fast.BeitConfig(**values))
    found = by_name(model)
    assert set(found) == {name for name, _ in model.named_parameters()}
    layers = {name: rate for name, (rate, _) in found.items() if name.startswith("backbone.")}
    numbers = {name: next((int(part) for part in name.split(".") if part.isdigit()), None) for name in layers}
    embedded = {rate for name, rate in layers.items() if "embeddings." in name}
    assert embedded == {0.5**5}
    in_blocks = {(number, layers[name]) for name, number in numbers.items() if "layer" in name and number is not None}
    assert in_blocks >= {(layer, 0.5 ** (4 - layer)) for layer in range(4)}
    assert {rate for name, (rate, _) in found.items() if not name.startswith("backbone.")} == {1.0}


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", ["ddp", "compile", "compiled ddp"])
def test_model_under_ddp_and_compile_has_the_groups_of_the_model(wrap, process_group):
    model = make("BeitForImageClassification", "beit_fast")
    wrapped = nn.parallel.DistributedDataParallel(model) if "ddp" in wrap else model
    wrapped = torch.compile(wrapped) if "compile" in wrap else wrapped
    assert next(iter(wrapped.state_dict())).split(".")[0] in ("module", "_orig_mod")
    assert list(by_name(wrapped).values()) == list(by_name(model).values())


def test_groups_step_each_layer_by_its_rate():
    model = make("BeitForImageClassification", "beit_fast")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(layer_decay_parameter_groups(model, 1e-2, 0.5, 0.0))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    rates = by_name(model, lr=1e-2)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            before[name] - parameter, torch.full_like(parameter, rates[name][0]), atol=1e-6, rtol=0
        )


def test_trainer_of_transformers_steps_with_the_groups(tmp_path):
    model = beit_fast.BeitForImageClassification(beit_fast.BeitConfig(**(TINY | {"num_labels": 3})))
    optimizer = torch.optim.AdamW(layer_decay_parameter_groups(model, 1e-3, 0.5))
    data = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 3} for i in range(4)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to="none", save_strategy="no", use_cpu=True,
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
    trainer.train()
    blocks = model.config.num_hidden_layers
    rates = {group["name"].removesuffix("_decay").removesuffix("_no"): group["lr"] for group in optimizer.param_groups}
    assert rates["layer_0"] == 1e-3 * 0.5 ** (blocks + 1)
    assert rates[f"layer_{blocks + 1}"] == 1e-3
    assert all(optimizer.state[p] for group in optimizer.param_groups for p in group["params"] if p.grad is not None)


@pytest.mark.parametrize(
    ("numbers", "kind", "expected"),
    [
        ({"lr": -1.0}, ValueError, ["lr=-1.0"]),
        ({"lr": math.inf, "decay": 0.0, "weight_decay": -1}, ValueError, ["3 errors", "lr=inf", "decay=0.0"]),
        ({"lr": 1.0, "decay": 1.5}, ValueError, ["decay=1.5", "at most 1"]),
        ({"lr": "1e-3"}, TypeError, ["lr='1e-3'"]),
    ],
)
def test_numbers_that_do_not_fit_are_one_error(numbers, kind, expected):
    with pytest.raises(kind) as error:
        layer_decay_parameter_groups(nn.Linear(2, 2), **numbers)
    assert all(text in str(error.value) for text in expected), str(error.value)


def test_model_that_is_not_beit_or_is_frozen_is_an_error():
    with pytest.raises(ValueError, match="Linear is not a BEiT model"):
        layer_decay_parameter_groups(nn.Linear(2, 2), 1e-3)
    model = make("BeitModel", "beit_fast").requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        layer_decay_parameter_groups(model, 1e-3)
