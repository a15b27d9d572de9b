"""unilm's flags: the table, the parser and what is set."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from beit_fast import BeitConfig
from beit_fast.cli import main
from beit_fast.cli.training import finetuning_fields, option_fields
from beit_fast.cli.unilm_flags import FLAGS, PRETRAINING_MODELS, flags_of
from beit_fast.cli.unilm_parser import add_flags, take_flags
from beit_fast.training import FinetuneOptions, PretrainOptions

COMMANDS = ("pretrain", "finetune")
# The options of both scripts in microsoft/unilm, folder beit, at 806a6fd and eda5963.
BOTH = """
    batch_size epochs save_ckpt_freq model rel_pos_bias disable_rel_pos_bias abs_pos_emb layer_scale_init_value
    input_size drop_path opt opt_eps opt_betas clip_grad momentum weight_decay weight_decay_end lr warmup_lr min_lr
    warmup_epochs warmup_steps train_interpolation data_path imagenet_default_mean_and_std output_dir log_dir device
    seed resume auto_resume no_auto_resume start_epoch num_workers pin_mem no_pin_mem world_size local_rank dist_on_itp
    dist_url
"""
SCRIPTS = {
    "pretrain": """
        discrete_vae_weight_path discrete_vae_type num_mask_patches max_mask_patches_per_block
        min_mask_patches_per_block second_input_size second_interpolation
    """,
    "finetune": """
        update_freq drop attn_drop_rate disable_eval_during_finetuning model_ema model_ema_decay model_ema_force_cpu
        layer_decay color_jitter aa smoothing crop_pct reprob remode recount resplit mixup cutmix cutmix_minmax
        mixup_prob mixup_switch_prob mixup_mode finetune model_key model_prefix init_scale use_mean_pooling use_cls
        disable_weight_decay_on_rel_pos_bias eval_data_path nb_classes data_set save_ckpt no_save_ckpt eval dist_eval
        enable_deepspeed
    """,
}
NUMBERS = {"lr": float, "weight_decay": float, "input_size": int, "clip_grad": float}
CONFIG_FIELDS = vars(BeitConfig())


def parser_of(command: str) -> argparse.ArgumentParser:
    """A parser with the options that the table names."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--model", required=command == "finetune")
    parser.add_argument("--tensorboard", action="store_true")
    switches = ("model_ema", "imagenet_default_mean_and_std")
    for flag in flags_of(command).values():
        if flag.effect not in ("same", "option"):
            continue
        if flag.name in switches:
            parser.add_argument(flag.target, action="store_true")
        elif flag.name == "opt_betas":
            parser.add_argument(flag.target, type=float, nargs="+")
        else:
            parser.add_argument(flag.target, type=NUMBERS.get(flag.name, str))
    add_flags(parser, command)
    return parser


def parse(command: str, line: str) -> tuple[dict[str, Any], list[str]]:
    fields = vars(parser_of(command).parse_args(line.split()))
    notes = take_flags(fields, command)
    return fields, notes


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_of_command_are_those_of_its_script(command):
    names = (BOTH + SCRIPTS[command]).split()
    assert sorted(flags_of(command)) == sorted(names)
    assert len(names) == sum(command in flag.commands for flag in FLAGS)  # none twice


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.name)
def test_row_says_what_it_does(flag):
    if flag.effect == "configuration":
        assert flag.target in CONFIG_FIELDS
    assert bool(flag.target) == (flag.effect in ("same", "option", "configuration")) or flag.effect == "converted"
    assert flag.note or flag.effect in ("same", "option", "configuration")
    assert not flag.accepted or flag.effect == "refused"


@pytest.mark.parametrize("name", PRETRAINING_MODELS)
def test_model_name_gives_fields_of_the_configuration(name):
    config = BeitConfig(**PRETRAINING_MODELS[name])
    assert (config.hidden_size, config.vocab_size) == (1024 if "large" in name else 768, 8192)
    assert config.intermediate_size == 4 * config.hidden_size == 4 * 64 * config.num_attention_heads


@pytest.mark.parametrize("spelling", ["--weight_decay", "--weight-decay"])
def test_both_spellings_set_one_option(spelling):
    fields, notes = parse("pretrain", f"a b {spelling} 0.1")
    assert (fields["weight_decay"], notes) == (0.1, [])


def test_option_keeps_its_default_type_and_number_of_values_under_the_other_spelling():
    fields, _ = parse("finetune", "a b --model m --opt_betas 0.9 0.98 --model_ema --imagenet_default_mean_and_std")
    assert fields["opt_betas"] == [0.9, 0.98]
    assert (fields["model_ema"], fields["imagenet_default_mean_and_std"], fields["mixup"]) == (True, True, None)
    with pytest.raises(argparse.ArgumentError, match="invalid float value: 'many'"):
        parse("finetune", "a b --model m --weight_decay many")


def test_published_pretraining_command_is_taken_whole():
    fields, notes = parse(
        "pretrain",
        "--data_path images --output_dir run --num_mask_patches 75 --model beit_base_patch16_224_8k_vocab "
        "--discrete_vae_weight_path tokenizer --batch_size 128 --lr 1.5e-3 --warmup_steps 10000 --epochs 150 "
        "--clip_grad 3.0 --drop_path 0.1 --layer_scale_init_value 0.1 --abs_pos_emb --disable_rel_pos_bias "
        "--local_rank 0 --momentum 0.9 --save_ckpt_freq 5 --log_dir logs",
    )
    assert (fields["data"], fields["out"], fields["model"]) == (Path("images"), Path("run"), None)
    assert (fields["num_mask_patches"], fields["lr"], fields["warmup_steps"]) == ("75", 1.5e-3, "10000")
    assert fields["configuration"] == PRETRAINING_MODELS["beit_base_patch16_224_8k_vocab"] | {
        "use_absolute_position_embeddings": True,
        "use_shared_relative_position_bias": False,
    }
    assert [note.split()[0] for note in notes] == ["--local_rank", "--momentum"]
    assert (fields["save_every_epochs"], fields["tensorboard"]) == ("5", True)
    assert "unilm_flags" not in fields


def test_published_finetuning_command_is_taken_whole():
    fields, notes = parse(
        "finetune",
        "--model beit_large_patch16_384 --data_path imagenet --finetune pretrained.pth --output_dir run "
        "--batch_size 8 --lr 2e-5 --update_freq 1 --warmup_epochs 5 --epochs 30 --layer_decay 0.9 --drop_path 0.4 "
        "--weight_decay 1e-8 --data_set IMNET --use_cls --drop 0.2 --opt adamw",
    )
    assert (fields["data"], fields["out"], fields["model"]) == (Path("imagenet/train"), Path("run"), "pretrained.pth")
    assert (fields["eval_data_path"], fields["input_size"], notes) == (Path("imagenet/val"), 384, [])
    assert fields["configuration"] == {"use_mean_pooling": False, "hidden_dropout_prob": 0.2}


def test_input_size_overrides_that_of_the_model_name():
    fields, _ = parse("finetune", "a b --model beit_base_patch16_224 --finetune c --input_size 384")
    assert fields["input_size"] == 384


def test_model_that_is_not_a_name_of_unilm_stays_a_checkpoint():
    fields, _ = parse("finetune", "a b --model folder/beit_base_patch16_224")
    assert (fields["model"], fields["configuration"]) == ("folder/beit_base_patch16_224", {})
    assert parse("pretrain", "a b --model folder")[0]["model"] == "folder"


def test_evaluation_is_off_if_disabled():
    line = "a b --model m --data_set IMNET --disable_eval_during_finetuning"
    assert parse("finetune", line)[0]["eval_data_path"] is None


def test_refused_flags_are_one_error_with_all_of_them():
    line = "a b --model m --enable_deepspeed --opt sgd --data_set CIFAR --cutmix_minmax 0.2 0.8"
    with pytest.raises(ValueError, match="cannot be used with beit-fast finetune") as caught:
        parse("finetune", line)
    lines = str(caught.value).splitlines()[1:]
    assert [line.split()[1] for line in lines] == [
        *("--enable_deepspeed", "--opt", "--cutmix_minmax", "--data_set"),
    ]
    assert lines[0] == "- --enable_deepspeed is not supported: `--fsdp`"


@pytest.mark.parametrize(
    ("command", "line", "message"),
    [
        ("pretrain", "a b --data_path c", "DATA is given twice: 'a', and --data_path 'c'"),
        ("pretrain", "a --data_path c --output_dir d", "DATA is given twice: 'a', and --data_path 'c'"),
        ("pretrain", "a b --output_dir c", "OUT is given twice: 'b', and --output_dir 'c'"),
        ("finetune", "a b --model beit_base_patch16_224", "pass the checkpoint as --finetune or --model"),
        ("finetune", "a b --model c --finetune d", "the checkpoint is given twice: --model c, and --finetune d"),
        ("pretrain", "a b --start_epoch 3", "--start_epoch 3 is not supported"),
    ],
)
def test_contradictions_are_errors(command, line, message):
    with pytest.raises(ValueError, match=message):
        parse(command, line)


def test_missing_folders_are_required_without_their_flags(capsys):
    with pytest.raises((SystemExit, argparse.ArgumentError)) as caught:
        parse("pretrain", "--output_dir run")
    assert "required: DATA" in str(caught.value) + capsys.readouterr().err


def test_values_that_change_nothing_are_accepted():
    line = "a b --opt adamw --start_epoch 0"
    assert parse("pretrain", line)[1] == []


def test_add_flags_to_a_parser_without_the_options_names_all_of_them():
    parser = argparse.ArgumentParser()
    parser.add_argument("data", metavar="DATA")
    with pytest.raises(ValueError, match="beit-fast pretrain lacks options") as caught:
        add_flags(parser, "pretrain")
    assert {"- --output_dir sets OUT", "- --lr sets --lr"} <= set(str(caught.value).splitlines())
    assert "DATA" not in str(caught.value)


def test_help_lists_options_once():
    text = parser_of("finetune").format_help()
    assert "--weight-decay" in text
    assert "--weight_decay" not in text


def options_of(line: str) -> Any:
    """The options of a whole command line, from the parser of `beit-fast`."""
    fields = vars(main._parser().parse_args(line.split()))
    if fields.pop("command") == "pretrain":
        return PretrainOptions(**option_fields(fields, "pretrain"))
    return FinetuneOptions(**finetuning_fields(fields))


@pytest.mark.parametrize("command", COMMANDS)
def test_parser_of_beit_fast_takes_every_flag(command):
    commands = next(each for each in main._parser()._actions if isinstance(each, argparse._SubParsersAction))
    assert {flag.flag for flag in flags_of(command).values()} <= set(commands.choices[command]._option_string_actions)


def test_command_of_unilm_pretrains_the_same_model_here(capsys):
    options = options_of(
        "pretrain --data_path images --output_dir run --model beit_large_patch16_224_8k_vocab --num_mask_patches 75 "
        "--discrete_vae_weight_path vae --discrete_vae_type dall-e --batch_size 64 --lr 1.5e-3 --opt_betas 0.9 0.98 "
        "--clip_grad 3.0 --drop_path 0.1 --layer_scale_init_value 1e-5 --min_mask_patches_per_block 16 --pin_mem "
        "--warmup_epochs 10 --epochs 800 --imagenet_default_mean_and_std --save_ckpt_freq 20"
    )
    assert (options.data, options.output, options.tokenizer) == (Path("images"), Path("run"), "vae")
    assert (options.lr, options.opt_betas, options.clip_grad, options.batch_size) == (1.5e-3, (0.9, 0.98), 3.0, 64)
    assert (options.num_mask_patches, options.epochs, options.save_every_epochs) == (75, 800, 20)
    assert options.configuration["hidden_size"] == 1024
    assert options.image_mean == (0.485, 0.456, 0.406)
    assert "--pin_mem has no effect" in capsys.readouterr().err


def test_command_of_unilm_finetunes_the_same_way_here():
    options = options_of(
        "finetune --model beit_base_patch16_224 --finetune checkpoint.pth --data_path train --eval_data_path val "
        "--data_set image_folder --nb_classes 10 --output_dir run --update_freq 2 --layer_decay 0.65 --mixup 0.8 "
        "--cutmix 1.0 --smoothing 0.1 --model_ema --model_ema_decay 0.999 --reprob 0.25 --aa none --attn_drop_rate 0.1"
    )
    assert (str(options.model), options.input_size, options.nb_classes) == ("checkpoint.pth", 224, 10)
    assert (options.gradient_accumulation, options.layer_decay, options.model_ema_decay) == (2, 0.65, 0.999)
    assert (options.eval_data_path, options.aa) == (Path("val"), None)
    assert options.configuration == {"attention_probs_dropout_prob": 0.1}


def test_warmup_steps_of_minus_one_are_none():
    assert options_of("pretrain images run --warmup_steps -1").warmup_steps is None
    assert options_of("pretrain images run --warmup_steps 7").warmup_steps == 7
