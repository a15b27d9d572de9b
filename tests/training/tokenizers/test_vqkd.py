"""BEiT v2's tokenizer: its published formula, and files of unilm."""

from __future__ import annotations

import argparse

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from beit_fast.training.tokenizers import VQKDTokenizer

from .build import random_pixels

HIDDEN, HEADS, CODES = 32, 4, 40


def unilm_state() -> dict[str, Tensor]:
    """Random numbers under unilm's names: two blocks, patches of 8, images of 24, 40 codes of 6 numbers."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    state = {
        "encoder.cls_token": random(1, 1, HIDDEN),
        "encoder.pos_embed": random(1, 10, HIDDEN),
        "encoder.patch_embed.proj.weight": random(HIDDEN, 3, 8, 8),
        "encoder.patch_embed.proj.bias": random(HIDDEN),
        "encoder.fc_norm.weight": 1 + random(HIDDEN),
        "encoder.fc_norm.bias": random(HIDDEN),
        "encode_task_layer.0.weight": random(HIDDEN, HIDDEN),
        "encode_task_layer.0.bias": random(HIDDEN),
        "encode_task_layer.2.weight": random(6, HIDDEN),
        "encode_task_layer.2.bias": random(6),
        "quantize.embedding.weight": F.normalize(random(CODES, 6), dim=-1),
    }
    for block in ("encoder.blocks.0", "encoder.blocks.1"):
        for norm in ("norm1", "norm2"):
            state |= {f"{block}.{norm}.weight": 1 + random(HIDDEN), f"{block}.{norm}.bias": random(HIDDEN)}
        state |= {f"{block}.attn.q_bias": random(HIDDEN), f"{block}.attn.v_bias": random(HIDDEN)}
        state |= {f"{block}.attn.qkv.weight": random(3 * HIDDEN, HIDDEN)}
        state |= {f"{block}.attn.proj.weight": random(HIDDEN, HIDDEN), f"{block}.attn.proj.bias": random(HIDDEN)}
        state |= {f"{block}.mlp.fc1.weight": random(80, HIDDEN), f"{block}.mlp.fc1.bias": random(80)}
        state |= {f"{block}.mlp.fc2.weight": random(HIDDEN, 80), f"{block}.mlp.fc2.bias": random(HIDDEN)}
    return state


TRAINING_ONLY = {
    "quantize.cluster_size": torch.zeros(CODES),
    "quantize.embedding.initted": torch.ones(1),
    "quantize.embedding.cluster_size": torch.zeros(CODES),
    "quantize.embedding.embed_avg": torch.zeros(CODES, 6),
    "decoder.cls_token": torch.zeros(1, 1, HIDDEN),
    "decoder.blocks.0.attn.qkv.weight": torch.zeros(3 * HIDDEN, HIDDEN),
    "decode_task_layer.0.weight": torch.zeros(HIDDEN, HIDDEN),
    "teacher_model.visual.proj": torch.zeros(2, 2),
    "scaling_layer.shift": torch.zeros(1, 3, 1, 1),
}


def published_distances(state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """Squared distances `[B * P, V]` of arXiv 2208.06366, equation (1), with unilm's ViT written out in float64."""
    w = {name: tensor.double() for name, tensor in state.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (HIDDEN,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    images = pixels.double() / 0.5 - 1
    tokens = F.conv2d(images, w["encoder.patch_embed.proj.weight"], w["encoder.patch_embed.proj.bias"], stride=8)
    x = torch.cat([w["encoder.cls_token"].expand(len(pixels), 1, -1), tokens.flatten(2).mT], 1) + w["encoder.pos_embed"]
    for block in ("encoder.blocks.0", "encoder.blocks.1"):
        biases = torch.cat([w[f"{block}.attn.q_bias"], torch.zeros(HIDDEN), w[f"{block}.attn.v_bias"]])
        qkv = norm(x, f"{block}.norm1") @ w[f"{block}.attn.qkv.weight"].T + biases
        q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        weights = ((HIDDEN // HEADS) ** -0.5 * q @ k.mT).softmax(-1)
        x = x + linear((weights @ v).transpose(1, 2).flatten(2), f"{block}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
    hidden = torch.tanh(linear(norm(x[:, 1:], "encoder.fc_norm"), "encode_task_layer.0"))
    z = linear(hidden, "encode_task_layer.2").flatten(0, 1)
    z = z / z.norm(dim=-1, keepdim=True)
    codes = w["quantize.embedding.weight"]
    return z.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * z @ codes.T


@pytest.mark.parametrize("entry", ["model", "state_dict"])
def test_from_unilm_file_gives_the_ids_of_the_published_formula(entry, tmp_path):
    state = unilm_state()
    content = {entry: state | TRAINING_ONLY, "args": argparse.Namespace(model="vqkd"), "epoch": 3}
    torch.save(content, tmp_path / "vqkd.pth")
    tokenizer = VQKDTokenizer.from_unilm_file(tmp_path / "vqkd.pth", num_attention_heads=HEADS)
    assert (tokenizer.image_size, tokenizer.patch_size, tokenizer.vocab_size) == (24, 8, CODES)
    pixels = random_pixels(20, 3, 24, 24)
    distances = published_distances(state, pixels)
    nearest, second = distances.topk(2, largest=False).values.T
    assert (second - nearest).min() > 1e-5  # no tie that float32 could decide otherwise
    expected = distances.argmin(-1).view(20, 3, 3)
    assert torch.equal(tokenizer(pixels), expected)
    assert len(expected.unique()) > 10
    features = tokenizer.features(tokenizer.preprocess(pixels))
    cosines = F.cosine_similarity(features.flatten(0, 1)[:, None], tokenizer.codebook, dim=-1)
    assert torch.equal(cosines.argmax(-1).view_as(expected), expected)


def test_saved_file_has_the_names_of_unilm(tmp_path):
    from safetensors.torch import load_file

    state = unilm_state()
    torch.save({"model": state}, tmp_path / "vqkd.pth")
    VQKDTokenizer.from_unilm_file(tmp_path / "vqkd.pth", num_attention_heads=HEADS).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "visual_tokenizer.safetensors")
    assert saved.keys() == state.keys()
    assert [name for name in state if not torch.equal(saved[name], state[name])] == []


def test_codebook_rows_of_other_lengths_follow_the_published_distance(tmp_path):
    state = unilm_state()
    state["quantize.embedding.weight"] *= torch.linspace(0.5, 1.5, CODES)[:, None]
    torch.save({"model": state}, tmp_path / "vqkd.pth")
    tokenizer = VQKDTokenizer.from_unilm_file(tmp_path / "vqkd.pth", num_attention_heads=HEADS)
    pixels = random_pixels(4, 3, 24, 24)
    assert torch.equal(tokenizer(pixels), published_distances(state, pixels).argmin(-1).view(4, 3, 3))


def test_new_codebook_has_rows_of_length_1():
    tokenizer = VQKDTokenizer(
        vocab_size=9, code_dim=4, image_size=8, patch_size=8, hidden_size=64, num_hidden_layers=1, num_attention_heads=1
    )
    torch.testing.assert_close(tokenizer.codebook.norm(dim=-1), torch.ones(9))


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("quantize.embedding.weight", r"is not a VQ-KD tokenizer: it lacks quantize\.embedding\.weight"),
        ("encoder.pos_embed", r"is not a VQ-KD tokenizer: it lacks encoder\.pos_embed"),
        ("encode_task_layer.2.bias", r"it lacks: encode_task_layer\.2\.bias"),
        ("encoder.blocks.1.attn.q_bias", r"it lacks: encoder\.blocks\.1\.attn\.q_bias"),
        ("encoder.fc_norm.weight", r"it lacks: encoder\.fc_norm\.weight"),
    ],
)
def test_file_that_lacks_a_tensor_names_it(lost, message, tmp_path):
    torch.save({"model": {name: value for name, value in unilm_state().items() if name != lost}}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message):
        VQKDTokenizer.from_unilm_file(tmp_path / "a.pth", num_attention_heads=HEADS)


def test_file_with_other_names_or_shapes_is_one_error(tmp_path):
    table = "encoder.blocks.0.attn.relative_position_bias_table"
    state = unilm_state() | {table: torch.zeros(28, HEADS), "encoder.cls_token": torch.zeros(1, 1, 3)}
    torch.save({"model": state}, tmp_path / "a.pth")
    with pytest.raises(
        ValueError, match=rf"does not have: {table}\n.*encoder.cls_token \[1, 1, 3\] \(expected \[1, 1, 32"
    ):
        VQKDTokenizer.from_unilm_file(tmp_path / "a.pth", num_attention_heads=HEADS)


def test_heads_that_shapes_do_not_tell_must_be_passed(tmp_path):
    torch.save({"model": unilm_state()}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"num_attention_heads can neither be inferred .*hidden_size=32"):
        VQKDTokenizer.from_unilm_file(tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"num_attention_heads=0 \(expected a positive integer\)"):
        VQKDTokenizer.from_unilm_file(tmp_path / "a.pth", num_attention_heads=0)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        VQKDTokenizer.from_unilm_file(tmp_path / "b.pth")
