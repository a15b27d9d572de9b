"""Upload what `save_pretrained` writes to the Hugging Face hub."""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .messages import FieldError, describe, raise_errors, unexpected_arguments
from .paths import as_path

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

_SAVE_ONLY = ("is_main_process", "push_to_hub")


class HubUpload:
    """`push_to_hub` for classes with `save_pretrained`.

    `huggingface_hub.ModelHubMixin` would be a base class, so huggingface_hub would be imported with the models. It also
    replaces `__new__` and `from_pretrained`, and passes other arguments to `save_pretrained`.
    """

    def _replaced_on_hub(self, save_options: Mapping[str, Any]) -> Sequence[str]:
        """Patterns of files in the repository that a new upload replaces."""
        return ()

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **save_options: Any,
    ) -> CommitInfo:
        """Write what `save_pretrained` writes to a hub repository.

        The files are first saved to a temporary folder. The repository is created if it does not exist. Its other
        files are kept.

        Args:
            repo_id: The repository, `"name"` or `"user/name"`.
            commit_message, commit_description: The message of the commit.
            private: Whether a new repository is private; None is the default of the account.
            token: A token, or True or None for the stored one.
            revision: The branch, created if it does not exist; None is the main branch.
            create_pr: Open a pull request instead of committing.
            save_options: Arguments of `save_pretrained`, such as `max_shard_size` of the models.

        Returns:
            The commit, from `huggingface_hub`.

        Raises:
            TypeError: If an argument is not known, or `repo_id` is not a string.
            ValueError: If `save_pretrained` refuses, the name is not valid, or `revision` is passed with `create_pr`.
                Nothing is created or uploaded then.
            OSError: If the hub cannot be reached or refuses, from `huggingface_hub`.
        """
        from huggingface_hub import HfApi

        accepted = {*_upload_names(), *_save_names(type(self))}
        errors = _upload_errors(repo_id, revision, create_pr) + unexpected_arguments(save_options, accepted)
        raise_errors(f"{type(self).__name__}.push_to_hub", errors)
        owner: Any = self
        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            owner.save_pretrained(folder, **save_options)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
                delete_patterns=list(self._replaced_on_hub(save_options)) or None,
            )

    def _upload_after_saving(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool,
        push_to_hub: bool,
        upload_options: Mapping[str, Any],
    ) -> dict[str, Any] | None:
        """Check the arguments that all `save_pretrained` share, before anything is written.

        Returns:
            The arguments of `push_to_hub`, or None if nothing is to be uploaded.

        Raises:
            TypeError, ValueError: If an argument is not known or not valid; the error lists all of them.
        """
        path = as_path("the folder", save_directory)
        flags = {"is_main_process": is_main_process, "push_to_hub": push_to_hub}
        errors = [
            FieldError(f"{describe(name, value)} is not supported (expected True or False)", wrong_type=True)
            for name, value in flags.items()
            if not isinstance(value, bool)
        ]
        accepted = {*_upload_names(), *_save_names(type(self)), *_SAVE_ONLY}
        errors += unexpected_arguments(upload_options, accepted)
        given = {name: value for name, value in upload_options.items() if value not in (None, False)}
        if push_to_hub:
            given = {"repo_id": path.resolve().name} | given
            errors += _upload_errors(given["repo_id"], given.get("revision"), given.get("create_pr", False))
        elif used := [name for name in given if name in _upload_names()]:
            errors.append(FieldError(f"{', '.join(used)} cannot be passed without push_to_hub=True"))
        raise_errors(f"{type(self).__name__}.save_pretrained", errors)
        return given if push_to_hub and is_main_process else None


def _upload_names() -> list[str]:
    """Names of the arguments of `push_to_hub` itself."""
    return _named_parameters(HubUpload.push_to_hub)


def _save_names(owner: type) -> set[str]:
    """Names of the arguments of `save_pretrained` that `push_to_hub` passes on; an override may pass keywords on."""
    methods = [vars(base)["save_pretrained"] for base in owner.__mro__ if "save_pretrained" in vars(base)]
    names = {name for method in methods for name in _named_parameters(method)[1:]}
    return names.difference(_SAVE_ONLY)


def _named_parameters(method: Any) -> list[str]:
    """Names of the parameters after `self`, without `*args` and `**kwargs`."""
    parameters = list(inspect.signature(method).parameters.values())[1:]
    return [each.name for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]


def _upload_errors(repo_id: Any, revision: Any, create_pr: Any) -> list[FieldError]:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    expected = "expected 'name' or 'user/name'"
    errors = []
    if not isinstance(repo_id, str):
        errors.append(FieldError(f"{describe('repo_id', repo_id)} is not a string ({expected})", wrong_type=True))
    else:
        try:
            validate_repo_id(repo_id)
        except HFValidationError:
            errors.append(FieldError(f"{describe('repo_id', repo_id)} is not the name of a repository ({expected})"))
    if create_pr and revision is not None:
        errors.append(FieldError(f"{revision=} cannot be passed with create_pr=True, which opens a branch of its own"))
    return errors
