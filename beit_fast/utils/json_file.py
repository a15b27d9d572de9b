"""Saving of configurations and image processors: one JSON file in a folder."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from .files import atomic_write_text
from .hub_upload import HubUpload
from .paths import as_path


class JsonFile(HubUpload):
    """`save_pretrained` for classes that are one JSON file."""

    _file_name: ClassVar[str]

    def _text_to_save(self) -> str:
        """Return the checked contents of the file."""
        raise NotImplementedError

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        **upload_options: Any,
    ) -> list[str]:
        """Check the values, write the JSON file and return its path.

        Args:
            save_directory: The folder, created if missing.
            is_main_process: False writes nothing and returns an empty list.
            push_to_hub: Then upload the file by `push_to_hub`.
            upload_options: Arguments of `push_to_hub`, such as `repo_id`, by default the name of the folder.

        Raises:
            TypeError, ValueError: If an argument or a value is not valid. Nothing is then written.
            OSError: If the folder cannot be written, or the hub cannot be reached after it was written.
        """
        upload = self._upload_after_saving(save_directory, is_main_process, push_to_hub, upload_options)
        text = self._text_to_save()
        if not is_main_process:
            return []
        file = as_path("the folder", save_directory) / self._file_name
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(file, text)
        if upload is not None:
            self.push_to_hub(**upload)
        return [os.fspath(file)]
