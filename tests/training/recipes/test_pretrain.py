"""Pre-training: what is learned, written and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor
from transformers.models.beit import BeitForMaskedImageModeling as TransformersModel

from beit_fast import BeitForMaskedImageModeling
from beit_fast.training import BlockMaskGenerator, pretrain
from beit_fast.training.recipes.pretrain import config_of, mask_generator_of
from beit_fast.training.tokenizers import PatchColorTokenizer, VQKDTokenizer, load_visual_tokenizer

from .pretrain_data import command_of, options_of, rows_of, write_inputs

CPU_ALONE = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("pretrain"))


def weights_of(output: Path, name: str = "model") -> bytes:
    return (output / name / "model.safetensors").read_bytes()


def test_pretrain_learns_tokens_and_saves_what_transformers_loads(folder, tmp_path):
    changes = {"epochs": 60, "warmup_epochs": 2, "lr": 5e-3, "drop_path": 0.0, "crop_scale": (1.0, 1.0), "hflip": 0.0}
    rows = pretrain(options_of(folder, tmp_path, **changes))
    first, last = ([row["loss"] for row in part] for part in (rows[:10], rows[-10:]))
    assert sum(last) < 0.7 * sum(first)
    model = BeitForMaskedImageModeling.from_pretrained(tmp_path / "model", attn_implementation="eager").eval()
    theirs = TransformersModel.from_pretrained(tmp_path / "model", attn_implementation="eager").eval()
    assert model.config.use_shared_relative_position_bias
    assert model.config.vocab_size == 8
    pixels, masked = torch.randn(2, 3, 32, 32), torch.arange(16).expand(2, 16) < 6
    with torch.no_grad():
        ours, expected = (each(pixels, bool_masked_pos=masked).logits for each in (model, theirs))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert AutoImageProcessor.from_pretrained(tmp_path / "model").size["height"] == 32
    assert load_visual_tokenizer(tmp_path / "tokenizer").vocab_size == 8


def test_pretrain_resumed_after_each_step_has_the_numbers_of_a_whole_run(folder, tmp_path):
    changes = {"save_every_steps": 1, "model_ema_decay": 0.9, "gradient_accumulation": 1, "color_jitter": 0.3}
    pretrain(options_of(folder, tmp_path / "whole", **changes))
    for steps in (1, 2, 4, None):  # an epoch has 3 steps
        pretrain(options_of(folder, tmp_path / "parts", **changes, max_steps=steps))
    assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "whole")
    for name in ("model", "model_ema"):
        assert weights_of(tmp_path / "parts", name) == weights_of(tmp_path / "whole", name)
    assert weights_of(tmp_path / "whole", "model") != weights_of(tmp_path / "whole", "model_ema")


@pytest.mark.parametrize("processes", [1, 2])
def test_pretrain_killed_resumes_to_the_same_numbers(processes, folder, tmp_path):
    changes = {"epochs": 8, "save_every_steps": 2, "num_workers": 1, "batch_size": 4 // processes, "log_every": 3}
    whole = command_of(folder, tmp_path / "whole", processes, **changes)
    subprocess.run(whole, check=True, capture_output=True, timeout=300, env=CPU_ALONE)
    killed = tmp_path / "killed"
    command = command_of(folder, killed, processes, **changes)
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, env=CPU_ALONE
    )
    deadline = time.monotonic() + 240
    while len(rows_of(killed) if (killed / "log.jsonl").exists() else []) < 4:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert len(rows_of(killed)) < len(rows_of(tmp_path / "whole"))
    subprocess.run(command, check=True, capture_output=True, timeout=300, env=CPU_ALONE)
    assert rows_of(killed) == rows_of(tmp_path / "whole")
    assert weights_of(killed) == weights_of(tmp_path / "whole")


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_pretrain_in_two_processes_has_the_losses_of_one(fsdp, folder, tmp_path):
    changes = {"drop_path": 0.0, "batch_size": 4, "model_ema_decay": 0.5}
    pretrain(options_of(folder, tmp_path / "one", **changes))
    sharded = changes | {"batch_size": 2} | ({"fsdp": True} if fsdp else {})
    command = command_of(folder, tmp_path / "two", 2, **sharded)
    subprocess.run(command, check=True, capture_output=True, timeout=300, env=CPU_ALONE)
    ours, expected = (BeitForMaskedImageModeling.from_pretrained(tmp_path / name / "model") for name in ("two", "one"))
    for (name, parameter), (_, other) in zip(ours.named_parameters(), expected.named_parameters(), strict=True):
        # Masks are drawn for the batch of a process, so gradients differ; names, shapes and sizes do not.
        assert parameter.shape == other.shape, name
        assert (parameter - other).abs().max() < 0.05, name
    steps = [row["step"] for row in rows_of(tmp_path / "two")]
    assert steps == [row["step"] for row in rows_of(tmp_path / "one")]
    assert (tmp_path / "two/model_ema/model.safetensors").exists()


@pytest.mark.slow
def test_pretrain_sharded_resumes_to_the_same_numbers(folder, tmp_path):
    changes = {"fsdp": True, "batch_size": 2, "save_every_steps": 1, "model_ema_decay": 0.5}
    for name, steps in (("whole", 6), ("parts", 2), ("parts", 6)):
        command = command_of(folder, tmp_path / name, 2, **changes, max_steps=steps)
        subprocess.run(command, check=True, capture_output=True, timeout=300, env=CPU_ALONE)
    assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "whole")
    for name in ("model", "model_ema"):
        assert weights_of(tmp_path / "parts", name) == weights_of(tmp_path / "whole", name)


def test_pretrain_resumed_by_other_processes_trains_on_the_same_images(folder, tmp_path):
    pretrain(options_of(folder, tmp_path, max_steps=2, save_every_steps=1))
    command = command_of(folder, tmp_path, 2, batch_size=2, save_every_steps=1)
    subprocess.run(command, check=True, capture_output=True, timeout=300, env=CPU_ALONE)
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_pretrain_accumulates_gradients_to_those_of_a_larger_batch(folder, tmp_path):
    changes = {"drop_path": 0.0, "epochs": 1, "warmup_epochs": 0, "opt_betas": (0.9, 0.98)}
    pretrain(options_of(folder, tmp_path / "large", **changes, batch_size=4))
    pretrain(options_of(folder, tmp_path / "small", **changes, batch_size=2, gradient_accumulation=2))
    large, small = (rows_of(tmp_path / name) for name in ("large", "small"))
    assert [row["step"] for row in small] == [row["step"] for row in large]
    # The images of a step are the same, the masks are drawn in smaller batches.
    assert small[0]["loss"] == pytest.approx(large[0]["loss"], rel=0.2)


def test_pretrain_in_bfloat16_or_recomputed_stays_near_float32(folder, tmp_path):
    changes = {"drop_path": 0.0, "epochs": 1}
    pretrain(options_of(folder, tmp_path / "float32", **changes))
    expected = rows_of(tmp_path / "float32")
    for name, options in {"bf16": {"precision": "bfloat16"}, "recomputed": {"gradient_checkpointing": True}}.items():
        pretrain(options_of(folder, tmp_path / name, **changes, **options))
        losses = [row["loss"] for row in rows_of(tmp_path / name)]
        assert losses == pytest.approx([row["loss"] for row in expected], rel=2e-2), name
    saved = BeitForMaskedImageModeling.from_pretrained(tmp_path / "bf16/model")
    assert saved.dtype == torch.float32


@pytest.mark.slow
def test_pretrain_compiled_stays_near_eager(folder, tmp_path):
    changes = {"drop_path": 0.0, "epochs": 1, "warmup_epochs": 0}
    pretrain(options_of(folder, tmp_path / "eager", **changes))
    torch._dynamo.utils.counters.clear()
    pretrain(options_of(folder, tmp_path / "compiled", **changes, compile=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    losses, expected = ([row["loss"] for row in rows_of(tmp_path / name)] for name in ("compiled", "eager"))
    assert losses == pytest.approx(expected, rel=1e-3)


def test_pretrain_starts_as_the_paper_says(folder, tmp_path):
    pretrain(options_of(folder, tmp_path, epochs=1, max_steps=1, warmup_epochs=2, weight_decay=0.0))
    model = BeitForMaskedImageModeling.from_pretrained(tmp_path / "model").requires_grad_(False)
    # The learning rate of the first step is 0.
    deviation = model.config.initializer_range
    assert model.beit.embeddings.mask_token.std() == pytest.approx(deviation, rel=0.4)
    assert model.beit.embeddings.cls_token.std() == pytest.approx(deviation, rel=0.4)
    for index, layer in enumerate(model.beit.encoder.layer, 1):
        expected = deviation / (2 * index) ** 0.5
        assert layer.attention.output.dense.weight.std() == pytest.approx(expected, rel=0.15)
        assert layer.output.dense.weight.std() == pytest.approx(expected, rel=0.15)
        assert layer.intermediate.dense.weight.std() == pytest.approx(deviation, rel=0.15)


def test_pretrain_continues_a_checkpoint_at_another_size(folder, tmp_path):
    pretrain(options_of(folder, tmp_path / "first"))
    tokenizer = str(tmp_path / "first/tokenizer")
    changes = {"init_from": str(tmp_path / "first/model"), "tokenizer": tokenizer, "input_size": 48}
    pretrain(options_of(folder, tmp_path / "second", **changes))
    assert BeitForMaskedImageModeling.from_pretrained(tmp_path / "second/model").config.image_size == 48


def test_pretrain_takes_a_tokenizer_of_another_patch_size(folder, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    tokenizer = VQKDTokenizer(vocab_size=16, code_dim=8, image_size=64, patch_size=16, **sizes)
    tokenizer.save_pretrained(tmp_path / "vqkd")
    pretrain(options_of(folder, tmp_path / "run", tokenizer=str(tmp_path / "vqkd")))
    assert BeitForMaskedImageModeling.from_pretrained(tmp_path / "run/model").config.vocab_size == 16


def test_masks_of_other_windows_are_in_proportion_to_the_papers(folder, tmp_path):
    for size, masked, least in ((112, 75, 16), (224, 300, 64), (56, 19, 4)):
        options = options_of(folder, tmp_path, input_size=size)
        masks = mask_generator_of(options, config_of(options))
        assert isinstance(masks, BlockMaskGenerator)
        assert (masks.num_masking_patches, masks.min_num_patches) == (masked, least)


def test_unreadable_images_are_counted_and_skipped(folder, tmp_path):
    inputs = write_inputs(tmp_path / "inputs")
    (inputs / "images/99.png").write_bytes(b"not an image")
    rows = pretrain(options_of(inputs, tmp_path / "run", epochs=3))
    reported = [text for row in rows for text in row.get("unreadable", [])]
    assert len(reported) == 1
    assert reported[0].startswith("99.png: ")


def with_file(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_mask_patches": 17}, r"num_masking_patches=17 .*at most 16"),
        ({"min_mask_patches_per_block": 16, "num_mask_patches": 16}, "do not fit"),
        ({"second_input_size": 40}, r"5x5 tokens .* 4x4 patches"),
        ({"vocab_size": 4000}, "4000"),
        ({"batch_size": 100}, "12 images are fewer than a global batch of 100"),
        ({"gradient_accumulation": 4}, "12 images, but a step takes 16"),
        ({"input_size": 4}, "image_size=4 is too small"),
        ({"fsdp": True}, "fsdp=True needs several processes"),
        ({"model": "huge"}, "huge"),
        ({"tokenizer": "nowhere/tokenizer"}, "nowhere/tokenizer"),
    ],
)
def test_pretrain_bad_input_is_one_error_and_writes_nothing(changes, message, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises((ValueError, OSError), match=message):
        pretrain(options_of(folder, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_pretrain_empty_folder_is_an_error(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="does not contain images"):
        pretrain(options_of(folder, tmp_path / "run", data=tmp_path / "empty"))


def test_pretrain_with_other_settings_is_an_error_that_names_each(folder, tmp_path):
    pretrain(options_of(folder, tmp_path / "run", epochs=1))
    before = weights_of(tmp_path / "run")
    with pytest.raises(ValueError, match=r"epochs: 1 before, 2 now; lr: 0.001 before, 0.002 now"):
        pretrain(options_of(folder, tmp_path / "run", epochs=2, lr=2e-3))
    assert weights_of(tmp_path / "run") == before
    more = write_inputs(tmp_path / "more", images=13)
    with pytest.raises(ValueError, match="images: 12 before, 13 now"):
        pretrain(options_of(more, tmp_path / "run", epochs=1))
    pretrain(options_of(folder, tmp_path / "run", epochs=2, overwrite=True))
    assert json.loads((tmp_path / "run/run.json").read_text())["settings"]["epochs"] == 2


def test_pretrain_into_a_folder_of_other_files_is_an_error(folder, tmp_path):
    with_file(tmp_path)
    with pytest.raises(ValueError, match=r"not empty .* notes.txt"):
        pretrain(options_of(folder, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_pretrain_of_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(folder, tmp_path):
    with pytest.raises(RuntimeError, match="the loss is nan before step"):
        pretrain(options_of(folder, tmp_path, lr=1e30, warmup_epochs=0, clip_grad=None, epochs=20))


def test_fitted_tokenizer_is_a_function_of_the_seed(folder, tmp_path):
    books = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        pretrain(options_of(folder, tmp_path / name, max_steps=1, seed=seed))
        tokenizer = load_visual_tokenizer(tmp_path / name / "tokenizer")
        assert isinstance(tokenizer, PatchColorTokenizer)
        books.append(tokenizer.codebook)
    assert torch.equal(books[0], books[1])
    assert not torch.equal(books[0], books[2])
