"""Small random BEiT models of Transformers as a reference.

Every parameter is random, because a zero would hide an error.
"""

from __future__ import annotations

import math
import tempfile
import types

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.models.beit import modeling_beit as reference_modeling

import beit_fast

from .oracle import dense_bias

POSITIONS = {
    "per layer": {"use_relative_position_bias": True},
    "shared": {"use_shared_relative_position_bias": True},
    "both": {"use_relative_position_bias": True, "use_shared_relative_position_bias": True},
    "absolute": {"use_absolute_position_embeddings": True},
    "none": {},
}

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
    "vocab_size": 11,
    "num_labels": 5,
    "drop_path_rate": 0.0,
    "use_mask_token": True,
}

CLASSES = (
    "BeitModel",
    "BeitForMaskedImageModeling",
    "BeitForImageClassification",
    "BeitForSemanticSegmentation",
    "BeitBackbone",
)


def options_for(name: str) -> dict[str, object]:
    """Return the options that a class needs beyond `TINY`."""
    if name == "BeitForSemanticSegmentation":
        return {
            "num_hidden_layers": 4,
            "out_indices": [1, 2, 3, 4],
            "auxiliary_channels": 6,
            "pool_scales": (1, 2),
        }
    if name == "BeitBackbone":
        return {"out_features": ["stem", "stage1", "stage3"]}
    return {}


def build_pair(name: str, attn_implementation: str = "sdpa", reference_attention: str = "sdpa", **options: object):
    """Build the reference model and ours with the same random weights, in fp64 and evaluation mode."""
    values = TINY | options_for(name) | options
    values = {key: value for key, value in values.items() if value is not None}
    config = transformers.BeitConfig(**values)
    config._attn_implementation = reference_attention
    reference = getattr(transformers, name)(config).double().eval()
    randomize(reference)
    if not _is_square(config):
        _use_the_papers_gather(reference)
    ours = getattr(beit_fast, name)(beit_fast.BeitConfig(**values), attn_implementation=attn_implementation)
    ours = ours.double().eval()
    ours.load_state_dict(hub_state(reference), strict=True)
    return reference, ours


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> None:
    """Draw random parameters and buffers.

    Tables, tokens and positions are N(0, 1), layer scale is at least 0.1, and norms and statistics differ from 0 and 1.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        if "lambda" in name or "running_var" in name:
            tensor.uniform_(0.1, 1.0, generator=generator)
        elif any(part in name for part in ("bias_table", "token", "position_embeddings")):
            tensor.normal_(generator=generator)
        elif tensor.ndim == 1:
            tensor.normal_(1.0 if name.endswith("weight") else 0.0, 0.3, generator=generator)
        else:
            tensor.normal_(0.0, 0.7 / math.sqrt(tensor[0].numel()), generator=generator)


def hub_state(reference: nn.Module) -> dict[str, Tensor]:
    """Return the reference's weights under hub names, which `save_pretrained` writes."""
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        state = load_file(f"{folder}/model.safetensors")
    if isinstance(reference, reference_modeling.BeitBackbone):
        # It has an unused final norm if it pools by CLS, and a wrong name for a shared table.
        state = {key.removeprefix("beit."): x for key, x in state.items() if not key.startswith("layernorm.")}
    return state


def hub_gradients(reference: nn.Module) -> dict[str, Tensor]:
    """Return gradients under hub names by saving them in place of the weights."""
    with torch.no_grad():
        weights = {name: p.detach().clone() for name, p in reference.named_parameters()}
        for p in reference.parameters():
            p.copy_(torch.full_like(p, math.nan) if p.grad is None else p.grad)
        state = hub_state(reference)
        for name, p in reference.named_parameters():
            p.copy_(weights[name])
    return state


def _is_square(config: transformers.BeitConfig) -> bool:
    size = config.image_size
    return not isinstance(size, (list, tuple)) or size[0] == size[1]


def _use_the_papers_gather(reference: nn.Module) -> None:
    """Correct Transformers 5.24 for rectangular native windows, at the native size only.

    Transformers 5.24 reads the table as (width, height), which permutes it. It also uses the square root of the patch
    count for absolute positions.
    """

    def bias(self, window_size, *unused: object, **unused_too: object) -> Tensor:
        assert tuple(window_size) == tuple(self.window_size), "the corrected reference supports only the native size"
        return dense_bias(self.relative_position_bias_table, tuple(window_size)).unsqueeze(0)

    for module in reference.modules():
        if isinstance(module, reference_modeling.BeitRelativePositionBias):
            module.forward = types.MethodType(bias, module)
        if isinstance(module, reference_modeling.BeitEmbeddings) and module.position_embeddings is not None:
            module.interpolate_pos_encoding = types.MethodType(lambda self, *_: self.position_embeddings, module)


def random_inputs(name: str, model: nn.Module, size: tuple[int, int] = (32, 32), batch: int = 2) -> dict[str, Tensor]:
    """Return pixels, and the labels and masks that the loss of the class needs."""
    generator = torch.Generator().manual_seed(1)
    config, patch = model.config, model.config.patch_size
    pixels = torch.randn(batch, 3, *size, generator=generator, dtype=torch.float64)
    patches = (size[0] // patch) * (size[1] // patch)
    inputs = {"pixel_values": pixels}
    if name == "BeitForMaskedImageModeling":
        masked = torch.rand(batch, patches, generator=generator) > 0.5
        masked[:, 0] = True
        labels = torch.randint(0, config.vocab_size, (int(masked.sum()),), generator=generator)
        inputs |= {"bool_masked_pos": masked, "labels": labels}
    elif name == "BeitForImageClassification":
        inputs["labels"] = torch.randint(0, config.num_labels, (batch,), generator=generator)
    elif name == "BeitForSemanticSegmentation":
        labels = torch.randint(0, config.num_labels, (batch, *size), generator=generator)
        labels[:, :3] = config.semantic_loss_ignore_index
        inputs["labels"] = labels
    return inputs


def scalar_of(outputs: object) -> Tensor:
    """Return the loss, or a scalar that depends on every output."""
    if getattr(outputs, "loss", None) is not None:
        return outputs.loss
    features = getattr(outputs, "feature_maps", None) or [outputs.last_hidden_state, outputs.pooler_output]
    return sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in features)


def main_output(outputs: object) -> list[Tensor]:
    """Return logits, feature maps, or hidden states and pooled tokens."""
    if getattr(outputs, "logits", None) is not None:
        return [outputs.logits]
    return list(getattr(outputs, "feature_maps", None) or [outputs.last_hidden_state, outputs.pooler_output])
