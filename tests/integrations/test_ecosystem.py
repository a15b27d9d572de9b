"""Trainer, pipelines, PEFT and `device_map` with beit_fast and accelerated Transformers models."""

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

OTHERS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("auto class", "accelerated", "triton")]
KINDS = ["ours", *OTHERS]
"""beit_fast's class; the same built by `AutoModel*`; Transformers' model accelerated; Transformers' with "triton"."""

OPTIONS = TINY | {"use_relative_position_bias": True, "use_mask_token": False}
TOKENS = 17


@pytest.fixture(autouse=True)
def _unregistered():
    yield
    unregister()


def checkpoint(name, folder, **options):
    """Build a random model of Transformers and save it in `folder`."""
    theirs = getattr(transformers, name)(transformers.BeitConfig(**(OPTIONS | options_for(name) | options))).eval()
    randomize(theirs)
    theirs.save_pretrained(folder)
    return theirs


def load(kind, name, folder, **options):
    """Load the checkpoint as a model of a kind, in evaluation mode."""
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
    """Return images that reveal their class; `index` is not a model argument."""
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
def test_trainer_train_equals_transformers(kind, tmp_path):
    """Compare losses, metrics and weights after a few steps of SGD."""
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
def test_trainer_resume_equals_uninterrupted_run(kind, tmp_path):
    """Resume training of beit_fast models.

    Transformers' BEiT 5.24 has other names in memory than in the file, and Trainer does not load them.
    """
    checkpoint("BeitForImageClassification", tmp_path / "start")
    whole, rest = (
        trainer_of(load(kind, "BeitForImageClassification", tmp_path / "start"), tmp_path / run)
        for run in ("whole", "rest")
    )
    whole.train()
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for mine, other in zip(rest.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


def test_trainer_save_model_weights_reload_equal(tmp_path):
    """Save weights only with Trainer, and a whole checkpoint with `save_pretrained`."""
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
def test_trainer_gradient_checkpointing_equals_plain(kind, tmp_path):
    checkpoint("BeitForImageClassification", tmp_path / "start")
    plain = trainer_of(load(kind, "BeitForImageClassification", tmp_path / "start"), tmp_path / "plain")
    plain.train()
    model = load(kind, "BeitForImageClassification", tmp_path / "start")
    trainer = trainer_of(model, tmp_path / "checkpointed", gradient_checkpointing=True)
    trainer.train()
    assert model.is_gradient_checkpointing
    torch.testing.assert_close(losses(trainer), losses(plain))


def random_photo():
    generator = np.random.default_rng(0)
    return Image.fromarray(generator.integers(0, 256, (40, 56, 3), dtype=np.uint8))


def hf_processor():
    processor = getattr(transformers, "BeitImageProcessorPil", transformers.BeitImageProcessor)  # 5.x, 4.57
    return processor(size={"height": 32, "width": 32}, do_center_crop=False)


def beit_fast_processor():
    return beit_fast.BeitImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)


@pytest.mark.parametrize("processor", [hf_processor, beit_fast_processor])
@pytest.mark.parametrize("kind", KINDS)
def test_image_classification_pipeline_equals_transformers(kind, processor, tmp_path):
    theirs = checkpoint("BeitForImageClassification", tmp_path)
    expected = transformers.pipeline("image-classification", model=theirs, image_processor=hf_processor(), device=-1)
    model = load(kind, "BeitForImageClassification", tmp_path)
    actual = transformers.pipeline("image-classification", model=model, image_processor=processor(), device=-1)
    wanted = expected([random_photo()] * 2, top_k=3)
    with AttentionSpy(TOKENS) as spy:
        found = actual([random_photo()] * 2, top_k=3, batch_size=2)
    assert_fused(spy)
    assert [[entry["label"] for entry in image] for image in found] == [
        [entry["label"] for entry in image] for image in wanted
    ]
    for mine, other in zip(found[0], wanted[0], strict=True):
        assert mine["score"] == pytest.approx(other["score"], rel=1e-4)
    assert type(actual).__name__ in repr(actual)


@pytest.mark.parametrize("processor", [hf_processor, beit_fast_processor])
@pytest.mark.parametrize("kind", KINDS)
def test_image_segmentation_pipeline_equals_transformers(kind, processor, tmp_path):
    theirs = checkpoint("BeitForSemanticSegmentation", tmp_path)
    expected = transformers.pipeline("image-segmentation", model=theirs, image_processor=hf_processor(), device=-1)
    model = load(kind, "BeitForSemanticSegmentation", tmp_path)
    if kind == "ours":
        with_transformers_outputs(model)
    actual = transformers.pipeline("image-segmentation", model=model, image_processor=processor(), device=-1)
    with AttentionSpy(TOKENS) as spy:
        found = actual(random_photo())
    assert_fused(spy, layers=4)
    wanted = expected(random_photo())
    assert [entry["label"] for entry in found] == [entry["label"] for entry in wanted]
    for mine, other in zip(found, wanted, strict=True):
        assert np.mean(np.asarray(mine["mask"]) != np.asarray(other["mask"])) < 1e-2  # rounding can change ties


@pytest.mark.parametrize("task", ["image-classification", "image-segmentation"])
def test_pipeline_by_path_after_register_builds_beit_fast(task, tmp_path):
    name = "BeitForImageClassification" if task == "image-classification" else "BeitForSemanticSegmentation"
    checkpoint(name, tmp_path)
    hf_processor().save_pretrained(tmp_path)
    register()
    pipe = transformers.pipeline(task, model=str(tmp_path), device=-1)
    assert isinstance(pipe.model, getattr(beit_fast, name))
    assert pipe(random_photo())
    pipe.save_pretrained(tmp_path / "pipeline")
    assert isinstance(transformers.pipeline(task, model=str(tmp_path / "pipeline"), device=-1).model, type(pipe.model))


def lora(model):
    """Add adapters on query and value by the model's names, and a new head."""
    names = [name.rsplit(".", 1)[-1] for name, _ in model.named_modules()]
    targets = ["query", "value"] if "query" in names else ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, modules_to_save=["classifier"])
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("kind", KINDS)
def test_lora_query_and_value_trains_saves_and_merges(kind, tmp_path):
    """Train only adapters and head through the fused operator; save, load and merge."""
    checkpoint("BeitForImageClassification", tmp_path / "base")
    model = load(kind, "BeitForImageClassification", tmp_path / "base")
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([1, 3])}
    before = model(**inputs).logits.detach()
    adapted = lora(model)
    assert relative_error(adapted(**inputs).logits, before) < 1e-6
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):  # lora_A has a zero gradient until lora_B is nonzero
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
def test_lora_gradient_checkpointing_trains_adapters(kind, tmp_path):
    if kind in ("accelerated", "triton") and transformers.__version__.startswith("4."):
        pytest.skip("PEFT cannot hook the patch embeddings of Transformers 4, which return a tuple")
    checkpoint("BeitForImageClassification", tmp_path)
    model = load(kind, "BeitForImageClassification", tmp_path)
    model.gradient_checkpointing_enable()
    adapted = lora(model).train()
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([1, 3])}
    adapted(**inputs).loss.backward()
    gradients = [p.grad for name, p in adapted.named_parameters() if "lora_B" in name]
    assert len(gradients) == 6
    assert all(gradient.norm() > 0 for gradient in gradients)


def disk_device_map(model):
    """Return a device map with the second block on disk."""
    blocks = [name for name, module in model.named_modules() if type(module).__name__ == "BeitLayer"]
    others = [
        name
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False)) and not any(name.startswith(block) for block in blocks)
    ]
    return dict.fromkeys(others, "cpu") | {name: "disk" if name == blocks[1] else "cpu" for name in blocks}


@pytest.mark.parametrize("kind", KINDS)
def test_from_pretrained_device_map_auto_equals_transformers(kind, tmp_path):
    theirs = checkpoint("BeitForImageClassification", tmp_path)
    model = load(kind, "BeitForImageClassification", tmp_path, device_map="auto")
    if isinstance(model, beit_fast.BeitPreTrainedModel):  # Transformers does not keep a map of one device
        assert model.hf_device_map == {"": "cpu"}
    pixels = torch.randn(2, 3, 32, 32)
    with AttentionSpy(TOKENS) as spy, torch.no_grad():
        actual = model(pixels).logits
    assert_fused(spy)
    assert relative_error(actual, theirs(pixels).logits) < 1e-5
    pipe = transformers.pipeline("image-classification", model=model, image_processor=hf_processor())
    assert len(pipe(random_photo())) == 5


@pytest.mark.parametrize("position", ["use_relative_position_bias", "use_shared_relative_position_bias"])
@pytest.mark.parametrize("kind", KINDS)
def test_from_pretrained_block_on_disk_equals_transformers(kind, position, tmp_path):
    """Run the fused operator on weights and bias tables that hooks load."""
    options = {"use_relative_position_bias": False, position: True}
    theirs = checkpoint("BeitForImageClassification", tmp_path / "files", **options)
    places = disk_device_map(load(kind, "BeitForImageClassification", tmp_path / "files"))
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
def test_dispatch_model_loaded_model_equals_transformers(kind, tmp_path):
    theirs = checkpoint("BeitForImageClassification", tmp_path / "files")
    model = load(kind, "BeitForImageClassification", tmp_path / "files")
    accelerate_package.dispatch_model(model, disk_device_map(model), offload_dir=tmp_path / "disk")
    pixels = torch.randn(2, 3, 32, 32)
    with AttentionSpy(TOKENS) as spy, torch.no_grad():
        actual = model(pixels).logits
    assert_fused(spy)
    assert relative_error(actual, theirs(pixels).logits) < 1e-5


def test_device_map_sequential_keeps_blocks_whole(tmp_path):
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


def test_from_pretrained_conflicting_arguments_raises(tmp_path, monkeypatch):
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
