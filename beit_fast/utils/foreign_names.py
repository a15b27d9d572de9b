"""Names of options in other libraries, for hints in errors and warnings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .messages import closest, join_choices

FOREIGN_NAMES: dict[str, tuple[str, ...]] = {
    # timm, unilm, mmsegmentation: models
    "num_classes": ("num_labels",),
    "nb_classes": ("num_labels",),
    "img_size": ("image_size",),
    "in_chans": ("num_channels",),
    "in_channels": ("num_channels",),
    "embed_dim": ("hidden_size",),
    "embed_dims": ("hidden_size",),
    "depth": ("num_hidden_layers",),
    "num_layers": ("num_hidden_layers",),
    "num_heads": ("num_attention_heads",),
    "mlp_ratio": ("intermediate_size",),
    "feedforward_channels": ("intermediate_size",),
    "attn_head_dim": ("head_dim",),
    "act_layer": ("hidden_act",),
    "init_values": ("layer_scale_init_value",),
    "init_std": ("initializer_range",),
    "drop": ("hidden_dropout_prob",),
    "drop_rate": ("hidden_dropout_prob",),
    "proj_drop_rate": ("hidden_dropout_prob",),
    "attn_drop": ("attention_probs_dropout_prob",),
    "attn_drop_rate": ("attention_probs_dropout_prob",),
    "drop_path": ("drop_path_rate",),
    "use_abs_pos_emb": ("use_absolute_position_embeddings",),
    "use_rel_pos_bias": ("use_relative_position_bias",),
    "use_shared_rel_pos_bias": ("use_shared_relative_position_bias",),
    "global_pool": ("use_mean_pooling",),
    "use_fc_norm": ("use_mean_pooling",),
    "grad_checkpointing": ("gradient_checkpointing",),
    # timm: preprocessing
    "input_size": ("size", "image_size"),
    "mean": ("image_mean", "pixel_mean"),
    "std": ("image_std", "pixel_std"),
    "interpolation": ("resample", "pixel_resize"),
    "crop_pct": ("size", "crop_size", "pixel_resize"),
    "crop_mode": ("do_center_crop", "pixel_resize"),
    # Transformers: earlier names, and those of its other vision models
    "use_auth_token": ("token",),
    "hidden_dropout": ("hidden_dropout_prob",),
    "attention_dropout": ("attention_probs_dropout_prob",),
    # Without a counterpart
    "qkv_bias": (),
    "qkv_fused": (),
    "norm_layer": (),
    "head_init_scale": (),
    "init_scale": (),
    "pos_drop_rate": (),
    "scale_mlp": (),
    "swiglu_mlp": (),
    "qk_scale": (),
}
"""The options that do what an option of another library does, by its name there.

Each tuple is empty if this package has no such option.
"""


def suggest_options(names: Sequence[str], known: Iterable[str]) -> str:
    """Return hints for unknown options, such as " (did you mean 'x'?)".

    The hints are for names of other libraries and for typos. The string is empty if there are none.

    Args:
        names: The unknown options.
        known: The options that exist.
    """
    options = frozenset(known)
    hints = {name: hint for name in names if (hint := _hint(name, options))}
    if len(hints) == 1:
        return "".join(f" ({hint})" for hint in hints.values())
    return f" ({'; '.join(f'{name}: {hint}' for name, hint in hints.items())})" if hints else ""


def _hint(name: str, options: frozenset[str]) -> str:
    meant = FOREIGN_NAMES.get(name)
    if meant == ():
        return "other libraries have this option, this package does not"
    similar = closest(name, options)
    choices = [option for option in meant or () if option in options] or ([] if similar is None else [similar])
    return f"did you mean {join_choices(choices)}?" if choices else ""
