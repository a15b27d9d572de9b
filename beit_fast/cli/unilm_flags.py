"""The flags of unilm's BeiT scripts and their effect here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

Command: TypeAlias = Literal["pretrain", "finetune"]
Effect: TypeAlias = Literal["same", "option", "configuration", "converted", "ignored", "refused"]

_BOTH: tuple[Command, ...] = ("pretrain", "finetune")
_PRETRAIN: tuple[Command, ...] = ("pretrain",)
_FINETUNE: tuple[Command, ...] = ("finetune",)


class UnilmFlag(NamedTuple):
    """One flag of `run_beit_pretraining.py` or `run_class_finetuning.py`.

    Attributes:
        name: The name without dashes.
        commands: The commands of this package that take it.
        effect: What it does. "same": it is an option of this package, with hyphens. "option": it is the option
            `target`. "configuration": it sets the field `target` of `BeitConfig`. "converted": see `note`. "ignored":
            it has no effect, for the reason in `note`. "refused": it is an error, and `note` says what to use instead.
        target: An option or a positional argument of this package, or a field of `BeitConfig`.
        parse: The type of its value, or None for a switch.
        value: What a switch sets.
        note: A conversion, a reason, or what to use instead.
        accepted: Values that a refused flag may have, because they change nothing.
    """

    name: str
    commands: tuple[Command, ...]
    effect: Effect
    target: str = ""
    parse: Callable[[str], Any] | None = str
    value: Any = None
    note: str = ""
    accepted: tuple[Any, ...] = ()

    @property
    def flag(self) -> str:
        """The flag as unilm spells it."""
        return f"--{self.name}"


def _same(commands: tuple[Command, ...], *names: str) -> list[UnilmFlag]:
    return [UnilmFlag(name, commands, "same", "--" + name.replace("_", "-")) for name in names]


def _switch(
    name: str, commands: tuple[Command, ...], effect: Effect, target: str = "", value: Any = None, note: str = ""
) -> UnilmFlag:
    return UnilmFlag(name, commands, effect, target, None, value, note)


_LAUNCHER = "torchrun and accelerate launch set it"
_REL_POS_NOTE = "in unilm it is on unless --disable_rel_pos_bias is given"

FLAGS: tuple[UnilmFlag, ...] = (
    *_same(_BOTH, "batch_size", "epochs", "input_size", "drop_path", "warmup_lr", "weight_decay_end", "device"),
    *_same(_BOTH, "opt_eps", "opt_betas", "clip_grad", "weight_decay", "lr", "min_lr", "warmup_epochs", "warmup_steps"),
    *_same(_BOTH, "train_interpolation", "imagenet_default_mean_and_std", "seed", "num_workers"),
    *_same(_PRETRAIN, "num_mask_patches", "max_mask_patches_per_block", "min_mask_patches_per_block"),
    *_same(
        _PRETRAIN,
        "layer_scale_init_value",
        "second_input_size",
        "second_interpolation",
    ),
    UnilmFlag("discrete_vae_weight_path", _PRETRAIN, "option", "--tokenizer"),
    UnilmFlag("discrete_vae_type", _PRETRAIN, "refused", note="the file decides: `--tokenizer`", accepted=("dall-e",)),
    *_same(_FINETUNE, "layer_decay", "smoothing", "color_jitter", "aa", "crop_pct", "nb_classes"),
    *_same(_FINETUNE, "reprob", "remode", "recount", "mixup", "cutmix", "mixup_prob", "mixup_switch_prob"),
    *_same(_FINETUNE, "mixup_mode", "model_ema", "model_ema_decay", "eval_data_path"),
    UnilmFlag("save_ckpt_freq", _BOTH, "option", "--save-every-epochs"),
    UnilmFlag("update_freq", _FINETUNE, "option", "--gradient-accumulation"),
    UnilmFlag("log_dir", _BOTH, "converted", "--tensorboard", note="`--tensorboard`, whose files are in OUT"),
    UnilmFlag("data_path", _BOTH, "converted", "DATA", note="DATA"),
    UnilmFlag("output_dir", _BOTH, "converted", "OUT", note="OUT"),
    UnilmFlag(
        "model",
        _PRETRAIN,
        "converted",
        "--model",
        note="a name such as `beit_base_patch16_224_8k_vocab` sets the sizes of `BeitConfig`",
    ),
    UnilmFlag(
        "model",
        _FINETUNE,
        "converted",
        "--model",
        note="a name such as `beit_base_patch16_384` sets the image size, and the checkpoint has the other sizes",
    ),
    UnilmFlag("finetune", _FINETUNE, "converted", "--model", note="`--model`, the checkpoint to start from"),
    UnilmFlag(
        "data_set",
        _FINETUNE,
        "converted",
        note="`IMNET` takes `DATA/train` and `DATA/val`, `image_folder` takes DATA itself (the default, unlike in "
        "unilm), and `CIFAR` is refused",
    ),
    _switch(
        "disable_eval_during_finetuning", _FINETUNE, "converted", note="no evaluation, as without `--eval-data-path`"
    ),
    _switch("rel_pos_bias", _PRETRAIN, "configuration", "use_shared_relative_position_bias", True, _REL_POS_NOTE),
    _switch("disable_rel_pos_bias", _PRETRAIN, "configuration", "use_shared_relative_position_bias", False),
    _switch("rel_pos_bias", _FINETUNE, "configuration", "use_relative_position_bias", True, _REL_POS_NOTE),
    _switch("disable_rel_pos_bias", _FINETUNE, "configuration", "use_relative_position_bias", False),
    _switch("abs_pos_emb", _BOTH, "configuration", "use_absolute_position_embeddings", True),
    UnilmFlag("layer_scale_init_value", _FINETUNE, "configuration", "layer_scale_init_value", float),
    UnilmFlag("drop", _FINETUNE, "configuration", "hidden_dropout_prob", float),
    UnilmFlag("attn_drop_rate", _FINETUNE, "configuration", "attention_probs_dropout_prob", float),
    _switch("use_mean_pooling", _FINETUNE, "configuration", "use_mean_pooling", True),
    _switch("use_cls", _FINETUNE, "configuration", "use_mean_pooling", False),
    UnilmFlag("momentum", _BOTH, "ignored", parse=float, note="AdamW has no momentum"),
    _switch("auto_resume", _BOTH, "ignored", note="a run always resumes from OUT"),
    _switch("pin_mem", _BOTH, "ignored", note="memory is pinned if there is a GPU"),
    _switch("no_pin_mem", _BOTH, "ignored", note="memory is pinned if there is a GPU"),
    UnilmFlag("world_size", _BOTH, "ignored", parse=int, note=_LAUNCHER),
    UnilmFlag("local_rank", _BOTH, "ignored", parse=int, note=_LAUNCHER),
    UnilmFlag("dist_url", _BOTH, "ignored", note=_LAUNCHER),
    _switch("resplit", _FINETUNE, "ignored", note="unilm does not use it"),
    _switch("disable_weight_decay_on_rel_pos_bias", _FINETUNE, "ignored", note="bias tables never have weight decay"),
    _switch("dist_eval", _FINETUNE, "ignored", note="all processes share each evaluation"),
    _switch("save_ckpt", _FINETUNE, "ignored", note="checkpoints are always written"),
    UnilmFlag("opt", _BOTH, "refused", note="the optimizer is AdamW", accepted=("adamw",)),
    UnilmFlag("resume", _BOTH, "refused", note="rerun the same command to resume from OUT", accepted=("",)),
    _switch("no_auto_resume", _BOTH, "refused", note="pass a new OUT to start from the beginning"),
    UnilmFlag("start_epoch", _BOTH, "refused", parse=int, note="the checkpoint in OUT decides", accepted=(0,)),
    _switch("dist_on_itp", _BOTH, "refused", note="start the processes by torchrun or accelerate launch"),
    _switch("model_ema_force_cpu", _FINETUNE, "refused", note="the average is on the device of the model"),
    UnilmFlag(
        "cutmix_minmax", _FINETUNE, "refused", parse=float, note="the sizes of boxes follow from lambda: `--cutmix`"
    ),
    UnilmFlag(
        "model_key",
        _FINETUNE,
        "refused",
        note="the weights are found under `model` or `module`",
        accepted=("model|module",),
    ),
    UnilmFlag("model_prefix", _FINETUNE, "refused", note="prefixes of wrappers are found", accepted=("",)),
    UnilmFlag(
        "init_scale",
        _FINETUNE,
        "refused",
        parse=float,
        note="a new head starts at `initializer_range`",
        accepted=(1.0,),
    ),
    _switch("no_save_ckpt", _FINETUNE, "refused", note="a run without checkpoints cannot resume"),
    _switch("eval", _FINETUNE, "refused", note="`beit-fast eval`"),
    _switch("enable_deepspeed", _FINETUNE, "refused", note="`--fsdp`"),
)
"""Every flag of both scripts, once for each command in which it means the same."""


def flags_of(command: Command) -> dict[str, UnilmFlag]:
    """Return the flags of one command by name."""
    return {flag.name: flag for flag in FLAGS if command in flag.commands}


_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}

PRETRAINING_MODELS: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224_8k_vocab": _BASE | {"vocab_size": 8192, "layer_norm_eps": 1e-6},
    "beit_large_patch16_224_8k_vocab": _LARGE | {"vocab_size": 8192, "layer_norm_eps": 1e-6},
}
"""Fields of `BeitConfig` for each model that unilm pre-trains."""

FINETUNING_MODELS: dict[str, int] = {
    "beit_base_patch16_224": 224,
    "beit_base_patch16_384": 384,
    "beit_large_patch16_224": 224,
    "beit_large_patch16_384": 384,
    "beit_large_patch16_512": 512,
}
"""The image size of each model that unilm fine-tunes."""
