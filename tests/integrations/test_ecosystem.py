"""Trainer, pipelines, PEFT and `device_map`, with this package's models and with accelerated ones of Transformers."""

import accelerate as accelerate_package
import numpy as np
import peft
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

import beit_fast
from beit_fast.integrations.transformers import accelerate, register, unregister, with_transformers_outputs

from ..support.attention_spy import AttentionSpy
from ..support.oracle import relative_error
from ..support.transformers_reference import TINY, hub_state, options_for, randomize

OTHERS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("from an auto class", "accelerated", "triton")]
KINDS = ["ours", *OTHERS]
"""Ours as it is built; as `AutoModel*` builds it; Transformers' accelerated; Transformers' with "triton"."""

OPTIONS = TINY | {"use_relative_position_bias": True, "use_mask_token": False}
TOKENS = 17


@pytest.fixture(autouse=True)
def _unregistered():
    yield
    unregister()


def checkpoint(name, folder, **options):
    """Transformers' model with every number drawn, and its files in `folder`."""
    theirs = getattr(transformers, name)(transformers.BeitConfig(**(OPTIONS | options_for(name) | options))).eval()
    randomize(theirs)
    theirs.save_pretrained(folder)
    return theirs


def load(kind, name, folder, **options):
    """The checkpoint as a model of that kind, in evaluation mode."""
    if kind == "ours":
        return getattr(beit_fast, name).from_pretrained(folder, attn_implementation="triton", **options)
    if kind == "accelerated":
        model = getattr(transformers, name).from_pretrained(folder, **options)
        accelerate(model, attn_implementation="triton")
        return model
    register()
    cls = getattr(transformers, name if kind == "triton" else name.replace("Beit", "AutoModel"))
    return cls.from_pretrained(folder, attn_implementation="triton", **options)


def assert_fused(spy, layers=3):
    assert (spy.calls, spy.tables) == (layers, layers)
    assert not spy.square


def examples(count=24):
    """Images whose class can be seen, each with a field that no model takes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % OPTIONS["num_labels"]
    pixels = torch.randn(count, 3, 32, 32, generator=generator) + labels.view(-1, 1, 1, 1) - 2
    return [{"pixel_values": pixels[i], "labels": int(labels[i]), "index": i} for i in range(count)]


def trainer_of(model, folder, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=8, per_device_eval_batch_size=8, seed=3,
        learning_rate=0.02, optim="sgd", lr_scheduler_type="constant", logging_steps=1, save_steps=2, report_to=[],
        use_cpu=True, disable_tqdm=True, **options,
    )  # fmt: skip
    data = examples()
    return transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=data[:10],
        compute_metrics=lambda prediction: {"accuracy": (prediction[0].argmax(-1) == prediction[1]).mean()},
    )


def losses(trainer):
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


@pytest.mark.parametrize("kind", KINDS)
def test_trainer_trains_as_it_does_theirs(kind, tmp_path):
    """The same losses, metrics and weights after a few steps of SGD."""
    theirs = checkpoint("BeitForImageClassification", tmp_path / "start")
    expected = trainer_of(theirs, tmp_path / "theirs")
    expected.train()
    model = load(kind, "BeitForImageClassification", tmp_path / "start")
    trainer = trainer_of(model, tmp_path / "ours")
    trainer.train()
    assert len(losses(trainer)) == 4
    assert relative_error(losses(trainer), losses(expected)) < 1e-3
    scores, wanted = trainer.evaluate(), expected.evaluate()
    assert scores["eval_loss"] == pytest.approx(wanted["eval_loss"], rel=1e-3)
    assert scores["eval_accuracy"] == wanted["eval_accuracy"]
    stored = hub_state(expected.model)
    state = model.state_dict() if isinstance(model, beit_fast.BeitPreTrainedModel) else hub_state(model)
    start = load_file(tmp_path / "start" / "model.safetensors")
    for name, x in stored.items():
        assert relative_error(state[name].cpu(), x) < 1e-3, name
    assert all(not torch.equal(state[name].cpu(), start[name]) for name in start if "bias_table" in name)


@pytest.mark.parametrize("kind", ["ours", OTHERS[0]])
def test_trainer_goes_on_from_a_checkpoint(kind, tmp_path):
    """Of ours: their own BEiT in 5.23 has other names in memory than in the file, and Trainer loads none of those."""
    checkpoint("BeitForImageClassification", tmp_path / "start")
    whole, rest = (
        trainer_of(load(kind, "BeitForImageClassification", tmp_path / "start"), tmp_path / run)
        for run in ("whole", "rest")
    )
    whole.train()
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for mine, other in zip(rest.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


def test_what_trainer_saves_of_ours(tmp_path):
    """Trainer writes the weights alone of models that are not Transformers'; `save_pretrained` writes a checkpoint."""
    checkpoint("BeitForImageClassification", tmp_path / "start")
    model = load("ours", "BeitForImageClassification", tmp_path / "start")
    trainer = trainer_of(model, tmp_path / "run")
    trainer.train()
    trainer.save_model(tmp_path / "weights")
    model.save_pretrained(tmp_path / "whole")
    written = load_file(tmp_path / "weights" / "model.safetensors")
    assert all(torch.equal(written[name], x) for name, x in model.state_dict().items())
    for folder, options in (("weights", {"config": model.config}), ("whole", {})):
        again = beit_fast.BeitForImageClassification.from_pretrained(tmp_path / folder, **options)
        assert all(torch.equal(x, y) for x, y in zip(again.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_trainer_checkpoints_activations(kind, tmp_path):
    checkpoint("BeitForImageClassification", tmp_path / "start")
    plain = trainer_of(load(kind, "BeitForImageClassification", tmp_path / "start"), tmp_path / "plain")
    plain.train()
    model = load(kind, "BeitForImageClassification", tmp_path / "start")
    trainer = trainer_of(model, tmp_path / "checkpointed", gradient_checkpointing=True)
    trainer.train()
    assert model.is_gradient_checkpointing
    torch.testing.assert_close(losses(trainer), losses(plain))


def test_checkpointing_some_layers_is_refused():
    model = beit_fast.BeitModel(beit_fast.BeitConfig(**OPTIONS))
    with pytest.raises(ValueError, match="every_n_layers=2, offload=True is not supported"):
        model.activation_checkpointing_enable(every_n_layers=2, offload=True)
    assert not model.is_gradient_checkpointing


def photograph():
    generator = np.random.default_rng(0)
    return Image.fromarray(generator.integers(0, 256, (40, 56, 3), dtype=np.uint8))


def their_processor():
    by_pillow = getattr(transformers, "BeitImageProcessorPil", transformers.BeitImageProcessor)  # 5.x, 4.57
    return by_pillow(size={"height": 32, "width": 32}, do_center_crop=False)


def our_processor():
    return beit_fast.BeitImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)


@pytest.mark.parametrize("processor", [their_processor, our_processor])
@pytest.mark.parametrize("kind", KINDS)
def test_image_classification_pipeline(kind, processor, tmp_path):
    theirs = checkpoint("BeitForImageClassification", tmp_path)
    expected = transformers.pipeline("image-classification", model=theirs, image_processor=their_processor(), device=-1)
    model = load(kind, "BeitForImageClassification", tmp_path)
    actual = transformers.pipeline("image-classification", model=model, image_processor=processor(), device=-1)
    wanted = expected([photograph()] * 2, top_k=3)
    with AttentionSpy(TOKENS) as spy:
        found = actual([photograph()] * 2, top_k=3, batch_size=2)
    assert_fused(spy)
    assert [[entry["label"] for entry in image] for image in found] == [
        [entry["label"] for entry in image] for image in wanted
    ]
    for mine, other in zip(found[0], wanted[0], strict=True):
        assert mine["score"] == pytest.approx(other["score"], rel=1e-4)
    assert type(actual).__name__ in repr(actual)


@pytest.mark.parametrize("processor", [their_processor, our_processor])
@pytest.mark.parametrize("kind", KINDS)
def test_image_segmentation_pipeline(kind, processor, tmp_path):
    theirs = checkpoint("BeitForSemanticSegmentation", tmp_path)
    expected = transformers.pipeline("image-segmentation", model=theirs, image_processor=their_processor(), device=-1)
    model = load(kind, "BeitForSemanticSegmentation", tmp_path)
    if kind == "ours":
        with_transformers_outputs(model)
    actual = transformers.pipeline("image-segmentation", model=model, image_processor=processor(), device=-1)
    with AttentionSpy(TOKENS) as spy:
        found = actual(photograph())
    assert_fused(spy, layers=4)
    wanted = expected(photograph())
    assert [entry["label"] for entry in found] == [entry["label"] for entry in wanted]
    for mine, other in zip(found, wanted, strict=True):
        assert np.mean(np.asarray(mine["mask"]) != np.asarray(other["mask"])) < 1e-2  # ties in rounding


@pytest.mark.parametrize("task", ["image-classification", "image-segmentation"])
def test_pipelines_by_name_take_ours_once_registered(task, tmp_path):
    name = "BeitForImageClassification" if task == "image-classification" else "BeitForSemanticSegmentation"
    checkpoint(name, tmp_path)
    their_processor().save_pretrained(tmp_path)
    register()
    pipe = transformers.pipeline(task, model=str(tmp_path), device=-1)
    assert isinstance(pipe.model, getattr(beit_fast, name))
    assert pipe(photograph())
    pipe.save_pretrained(tmp_path / "pipeline")
    assert isinstance(transformers.pipeline(task, model=str(tmp_path / "pipeline"), device=-1).model, type(pipe.model))


def lora(model):
    """Adapters on query and value, by the names that the model gives them, and a new head."""
    names = [name.rsplit(".", 1)[-1] for name, _ in model.named_modules()]
    targets = ["query", "value"] if "query" in names else ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, modules_to_save=["classifier"])
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("kind", KINDS)
def test_lora_on_query_and_value(kind, tmp_path):
    """Trains adapters and head alone, through the fused operator; they save, load, and merge."""
    checkpoint("BeitForImageClassification", tmp_path / "base")
    model = load(kind, "BeitForImageClassification", tmp_path / "base")
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([1, 3])}
    before = model(**inputs).logits.detach()
    adapted = lora(model)
    assert relative_error(adapted(**inputs).logits, before) < 1e-6
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):  # lora_A gets a gradient once lora_B is not zero
        with AttentionSpy(TOKENS) as spy:
            adapted(**inputs).loss.backward()
        assert_fused(spy)
        optimizer.step()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert len([name for name in trained if "lora_" in name]) == 3 * 2 * 2
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    adapted.eval()
    after = adapted(**inputs).logits.detach()
    assert relative_error(after, before) > 1e-3
    adapted.save_pretrained(tmp_path / "adapter")
    assert adapted.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    fresh = load(kind, "BeitForImageClassification", tmp_path / "base")
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert relative_error(again(**inputs).logits, after) < 1e-6
    merged = again.merge_and_unload()
    assert type(merged) is type(fresh)
    with AttentionSpy(TOKENS) as spy:
        assert relative_error(merged(**inputs).logits, after) < 1e-5
    assert_fused(spy)


@pytest.mark.parametrize("kind", KINDS)
def test_lora_under_gradient_checkpointing(kind, tmp_path):
    if kind in ("accelerated", "triton") and transformers.__version__.startswith("4."):
        pytest.skip("PEFT has no hook for the patch embeddings of Transformers 4, which give a tuple")
    checkpoint("BeitForImageClassification", tmp_path)
    model = load(kind, "BeitForImageClassification", tmp_path)
    model.gradient_checkpointing_enable()
    adapted = lora(model).train()
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([1, 3])}
    adapted(**inputs).loss.backward()
    gradients = [p.grad for name, p in adapted.named_parameters() if "lora_B" in name]
    assert len(gradients) == 6
    assert all(gradient.norm() > 0 for gradient in gradients)


def map_with_disk(model):
    """Every part by name, the second block on disk."""
    blocks = [name for name, module in model.named_modules() if type(module).__name__ == "BeitLayer"]
    others = [
        name
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False)) and not any(name.startswith(block) for block in blocks)
    ]
    return dict.fromkeys(others, "cpu") | {name: "disk" if name == blocks[1] else "cpu" for name in blocks}


@pytest.mark.parametrize("kind", KINDS)
def test_device_map_auto(kind, tmp_path):
    theirs = checkpoint("BeitForImageClassification", tmp_path)
    model = load(kind, "BeitForImageClassification", tmp_path, device_map="auto")
    if isinstance(model, beit_fast.BeitPreTrainedModel):  # Transformers keeps no map of one device
        assert model.hf_device_map == {"": "cpu"}
    pixels = torch.randn(2, 3, 32, 32)
    with AttentionSpy(TOKENS) as spy, torch.no_grad():
        actual = model(pixels).logits
    assert_fused(spy)
    assert relative_error(actual, theirs(pixels).logits) < 1e-5
    pipe = transformers.pipeline("image-classification", model=model, image_processor=their_processor())
    assert len(pipe(photograph())) == 5


@pytest.mark.parametrize("position", ["use_relative_position_bias", "use_shared_relative_position_bias"])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_on_disk(kind, position, tmp_path):
    """Weights that hooks bring when a block runs reach the fused operator, bias tables included."""
    options = {"use_relative_position_bias": False, position: True}
    theirs = checkpoint("BeitForImageClassification", tmp_path / "files", **options)
    places = map_with_disk(load(kind, "BeitForImageClassification", tmp_path / "files"))
    model = load(
        kind, "BeitForImageClassification", tmp_path / "files", device_map=places, offload_folder=tmp_path / "disk"
    )
    assert any(p.is_meta for p in model.parameters())
    pixels = torch.randn(2, 3, 32, 40)
    with AttentionSpy(21) as spy, torch.no_grad():
        actual = model(pixels).logits
    assert_fused(spy)
    assert relative_error(actual, theirs(pixels).logits) < 1e-5
    assert any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("kind", ["accelerated", "ours"])
@pytest.mark.slow
def test_dispatch_after_the_model_is_there(kind, tmp_path):
    theirs = checkpoint("BeitForImageClassification", tmp_path / "files")
    model = load(kind, "BeitForImageClassification", tmp_path / "files")
    accelerate_package.dispatch_model(model, map_with_disk(model), offload_dir=tmp_path / "disk")
    pixels = torch.randn(2, 3, 32, 32)
    with AttentionSpy(TOKENS) as spy, torch.no_grad():
        actual = model(pixels).logits
    assert_fused(spy)
    assert relative_error(actual, theirs(pixels).logits) < 1e-5


def test_device_map_fills_memory_without_splitting_a_block(tmp_path):
    theirs = checkpoint("BeitForImageClassification", tmp_path / "files")
    model = load(
        "ours", "BeitForImageClassification", tmp_path / "files",
        device_map="sequential", max_memory={"cpu": 100_000}, offload_folder=tmp_path / "disk",
    )  # fmt: skip
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert not any(name.count(".") > 3 for name in model.hf_device_map)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert relative_error(model(pixels).logits, theirs(pixels).logits) < 1e-5


def test_arguments_that_do_not_go_together(tmp_path, monkeypatch):
    from beit_fast.checkpoint import device_map

    checkpoint("BeitForImageClassification", tmp_path)
    load_ours = beit_fast.BeitForImageClassification.from_pretrained
    with pytest.raises(ValueError, match="device='cpu' and device_map='auto' both place"):
        load_ours(tmp_path, device="cpu", device_map="auto")
    with pytest.raises(ValueError, match="max_memory and offload_folder have no effect"):
        load_ours(tmp_path, max_memory={"cpu": 1}, offload_folder=tmp_path)
    monkeypatch.setattr(device_map.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install accelerate"):
        load_ours(tmp_path, device_map="auto")
