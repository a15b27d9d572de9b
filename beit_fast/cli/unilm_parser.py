"""Accept the flags of unilm's scripts beside the options of a command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, TypeAlias, cast

from ..utils.messages import join_choices, raise_value_error
from .unilm_flags import FINETUNING_MODELS, PRETRAINING_MODELS, Command, UnilmFlag, flags_of

Fields: TypeAlias = dict[str, Any]

_GIVEN = "unilm_flags"  # the field of a namespace that keeps flags until `take_flags`


def add_flags(parser: argparse.ArgumentParser, command: Command) -> None:
    """Add unilm's flags to the parser of a command; its help does not list them.

    A flag that is an option of the command under another spelling has the type, choices and effect of that option.
    The others wait for `take_flags`. An argument of the command is not required if a flag that replaces it is given:
    DATA by `--data_path`, OUT by `--output_dir`, and `--model` by `--finetune`.

    Args:
        parser: The parser with all options of the command.
        command: The command.

    Raises:
        ValueError: If the table names options that the parser does not have; the error lists all of them.
    """
    own = {name: action for action in parser._actions for name in action.option_strings or [_metavar(action)]}
    flags = flags_of(command)
    missing = [flag for flag in flags.values() if flag.effect != "configuration" and flag.target not in ("", *own)]
    raise_value_error(
        f"beit-fast {command} lacks options that flags of unilm set",
        [f"{flag.flag} sets {flag.target}" for flag in missing],
    )
    for flag in flags.values():
        if flag.flag in own:
            continue
        action = own.get(flag.target)
        if flag.effect in ("same", "option") and action is not None:
            parser.add_argument(flag.flag, action=_Forward, own=action)
        else:
            parser.add_argument(flag.flag, action=_Record, flag=flag, own=action)


def _metavar(action: argparse.Action) -> str:
    return action.metavar if isinstance(action.metavar, str) else action.dest


class _Forward(argparse.Action):
    """Another spelling of an option."""

    def __init__(self, option_strings: Sequence[str], dest: str, own: argparse.Action) -> None:
        super().__init__(
            option_strings,
            own.dest,
            own.nargs,
            own.const,
            argparse.SUPPRESS,  # the default of `own` holds
            cast(Any, own.type),
            own.choices,
            help=argparse.SUPPRESS,
            metavar=own.metavar,
        )
        self.own = own

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        self.own(parser, namespace, values, self.own.option_strings[0])


class _Record(argparse.Action):
    """Keep the value of a flag for `take_flags`.

    Args:
        flag: The flag.
        own: The required argument that the flag replaces, or None.
    """

    def __init__(
        self, option_strings: Sequence[str], dest: str, flag: UnilmFlag, own: argparse.Action | None = None
    ) -> None:
        several = "+" if flag.name == "cutmix_minmax" else None
        nargs = 0 if flag.parse is None else several
        kind: Any = flag.parse if own is None or own.nargs == 0 else own.type
        super().__init__(option_strings, _GIVEN, nargs, None, argparse.SUPPRESS, kind, help=argparse.SUPPRESS)
        self.flag, self.own = flag, own

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        if self.own is not None:
            self.own.required = False  # argparse looks for missing arguments at the end
        value = self.flag.value if self.flag.parse is None else values
        setattr(namespace, _GIVEN, getattr(namespace, _GIVEN, {}) | {self.flag.name: value})


def take_flags(fields: Fields, command: Command) -> list[str]:
    """Replace unilm's flags among parsed fields by the options they set.

    `fields["configuration"]` gets the fields of `BeitConfig` that flags set; other entries of it are kept.

    Args:
        fields: The fields of the parsed namespace, which are changed in place.
        command: The command.

    Returns:
        One line for each flag that has no effect, with the reason.

    Raises:
        ValueError: If flags are refused or contradict options; the error lists all of them.
    """
    flags, given = flags_of(command), fields.pop(_GIVEN, {})
    errors: list[str] = []
    notes: list[str] = []
    configuration: dict[str, Any] = {}
    for name, value in given.items():
        flag = flags[name]
        if flag.effect == "configuration":
            configuration[flag.target] = value
        elif flag.effect == "ignored":
            notes.append(f"{flag.flag} has no effect: {flag.note}")
        elif flag.effect == "refused" and value not in flag.accepted:
            shown = "" if flag.parse is None else f" {value}"
            errors.append(f"{flag.flag}{shown} is not supported: {flag.note}")
    if fields.get("warmup_steps") == -1:  # how unilm spells none
        fields["warmup_steps"] = None
    if "log_dir" in given:
        fields["tensorboard"] = True
    _take_architecture(fields, command, given, configuration, errors)
    for name in ("data_path", "output_dir"):
        if name in given:
            _fill(fields, flags[name], given[name], errors)
    if command == "finetune":
        _take_data_set(fields, given, errors)
    raise_value_error(f"flags of unilm cannot be used with beit-fast {command}", errors)
    fields["configuration"] = {**fields.get("configuration", {}), **configuration}
    return notes


def _fill(fields: Fields, flag: UnilmFlag, value: Any, errors: list[str]) -> None:
    """Set a positional argument by a flag; both are an error."""
    name = flag.target.lower()
    if fields.get(name) is not None:
        errors.append(f"{flag.target} is given twice: {str(fields[name])!r}, and {flag.flag} {str(value)!r}")
    fields[name] = value


def _take_architecture(
    fields: Fields, command: Command, given: Fields, configuration: dict[str, Any], errors: list[str]
) -> None:
    """Take `--finetune`, and a `--model` that names a model of unilm."""
    name = fields.get("model")
    if command == "pretrain":
        if name in PRETRAINING_MODELS:
            fields["model"] = None
            configuration |= PRETRAINING_MODELS[name] | configuration
        return
    if name in FINETUNING_MODELS:
        fields["model"] = None
        if fields.get("input_size") is None:
            fields["input_size"] = FINETUNING_MODELS[name]
        if not given.get("finetune"):
            errors.append(f"--model {name} is an architecture of unilm: pass the checkpoint as --finetune or --model")
    if given.get("finetune"):
        if fields["model"] is not None:
            errors.append(f"the checkpoint is given twice: --model {name}, and --finetune {given['finetune']}")
        fields["model"] = given["finetune"]


def _take_data_set(fields: Fields, given: Fields, errors: list[str]) -> None:
    """Take `--data_set` and `--disable_eval_during_finetuning`."""
    kind = given.get("data_set", "image_folder")
    if kind == "IMNET":
        data = fields["data"]
        fields["data"] = _below(data, "train")
        if fields.get("eval_data_path") is None:
            fields["eval_data_path"] = _below(data, "val")
    elif kind != "image_folder":
        expected = join_choices(("IMNET", "image_folder"))
        errors.append(f"--data_set {kind} is not supported (expected {expected}, and a folder of one folder a class)")
    if "disable_eval_during_finetuning" in given:
        fields["eval_data_path"] = None


def _below(folder: str | PurePath, name: str) -> str | PurePath:
    return folder / name if isinstance(folder, PurePath) else str(PurePath(folder) / name)
