"""`from_pretrained` and `save_pretrained` of the models."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import torch
from torch import Tensor

from ..configuration.beit_config import IMPLEMENTATION_FIELDS
from ..utils.hub_upload import HubUpload
from ..utils.names import AttentionImplementation, PatchEmbedImplementation

if TYPE_CHECKING:
    from ..checkpoint.device_map import DeviceMap


class PretrainedMixin(HubUpload):
    """Loading, saving and upload of the models.

    The arguments of `from_pretrained`:

    Args:
        pretrained_model_name_or_path: A folder, a file (safetensors, an index of shards, or a pickle of tensors, read
            with `weights_only=True`), or a hub repository such as `"microsoft/beit-base-patch16-224"`. None if
            `state_dict` is passed. In a pickle the state dict may be under `"model"`, `"state_dict"` and the like. Its
            names may have the prefixes of DDP, `torch.compile`, Lightning and `AveragedModel`.
        config: A `BeitConfig`, one of Transformers, a dict of fields or a path to one, instead of the checkpoint's.
        attn_implementation, patch_embed_implementation: See `BeitPreTrainedModel`.
        dtype, torch_dtype: Dtype of the parameters or its name, such as `"bfloat16"` or `"bf16"`. None or `"auto"`:
            that of the configuration, else of the file.
        device: Device of the parameters.
        device_map, max_memory, offload_folder: Dispatch the layers to devices, host memory and disk by the package
            accelerate, instead of `device`. `device_map` is `"auto"`, or a device for every part by name. See
            `beit_fast.checkpoint.device_map.Placement`. The file is read into host memory first.
        revision, cache_dir, token, local_files_only: Passed to `huggingface_hub`.
        subfolder: The folder of the checkpoint inside the repository or the local folder.
        use_safetensors: True reads safetensors files only, False pickles only. None prefers safetensors.
        variant: A part of the names of files, as `"fp16"` in `model.fp16.safetensors`.
        use_ema: True reads averaged weights (under `"state_dict_ema"`, `"model_ema"` and the like), False the others.
            None reads averaged weights if the file has them, as timm does. If only the prefixes of names tell a model
            and its average apart, None is an error.
        num_labels: Number of classes. `ignore_mismatched_sizes` is required if the file's head has another number.
        ignore_mismatched_sizes: Initialize parameters whose shape differs, with a warning, instead of raising.
        image_size: Resize bias tables and position embeddings to images of this size.
        position_interpolation: `"bilinear"` (Transformers, MiDaS) or `"geometric"` (timm, unilm).
        output_loading_info: Return `(model, info)`. `info` has the sets `missing_keys`, `unexpected_keys` and
            `mismatched_keys`. `weights_entry` is the entry of the file that was read, and `ema_weights` that of
            averaged weights if these were read. `left_aside` lists the entries and tensors that were not read.
        options: Fields of `BeitConfig` that override those of the checkpoint, `add_pooling_layer`, and Transformers'
            arguments in `beit_fast.checkpoint.arguments.OrdinaryArguments`: `state_dict`, `key_mapping` and others.
    """

    @overload
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *,
        config: Any = None,
        attn_implementation: AttentionImplementation | None = None,
        patch_embed_implementation: PatchEmbedImplementation | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        device_map: DeviceMap | None = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        offload_folder: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        subfolder: str = "",
        use_safetensors: bool | None = None,
        variant: str | None = None,
        use_ema: bool | None = None,
        num_labels: int | None = None,
        ignore_mismatched_sizes: bool = False,
        image_size: int | tuple[int, int] | None = None,
        position_interpolation: str = "bilinear",
        output_loading_info: Literal[False] = False,
        **options: Any,
    ) -> Self: ...

    @overload
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *,
        output_loading_info: Literal[True],
        **options: Any,
    ) -> tuple[Self, dict[str, Any]]: ...

    @overload
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *,
        output_loading_info: bool,
        **options: Any,
    ) -> Self | tuple[Self, dict[str, Any]]: ...

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *,
        config: Any = None,
        attn_implementation: AttentionImplementation | None = None,
        patch_embed_implementation: PatchEmbedImplementation | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        device_map: DeviceMap | None = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        offload_folder: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        subfolder: str = "",
        use_safetensors: bool | None = None,
        variant: str | None = None,
        use_ema: bool | None = None,
        num_labels: int | None = None,
        ignore_mismatched_sizes: bool = False,
        image_size: int | tuple[int, int] | None = None,
        position_interpolation: str = "bilinear",
        output_loading_info: bool = False,
        **options: Any,
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Load a model from a checkpoint, in evaluation mode.

        `BeitPreTrainedModel` lists the formats, `PretrainedMixin` explains the arguments.

        Raises:
            FileNotFoundError: If there is no checkpoint.
            TypeError: If an option is not known, or the name is not a path.
            ValueError: If the name is empty, the file is damaged, unsafe or ambiguous, a device cannot be used, or the
                configuration cannot be inferred. Also if parameters are missing, unexpected or mismatched (all are
                listed).
        """
        from ..checkpoint import loading

        model_class: Any = cls
        kernels = dict(zip(IMPLEMENTATION_FIELDS, (attn_implementation, patch_embed_implementation), strict=True))
        placement = loading.Placement(device, device_map, max_memory, offload_folder)
        hub = loading.HubOptions(revision, cache_dir, token, local_files_only, subfolder=subfolder or "")
        sizes = loading.SizeOptions(num_labels, image_size, position_interpolation, ignore_mismatched_sizes)
        choice = loading.FileChoice(use_safetensors, variant or None)
        dtype = loading.one_dtype(dtype, torch_dtype)
        chosen = loading.LoadOptions(kernels, dtype, placement, hub, sizes, choice, use_ema)
        model, info = loading.load_model(model_class, pretrained_model_name_or_path, config, chosen, options)
        return (model, info) if output_loading_info else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        max_shard_size: int | str = "5GB",
        safe_serialization: bool = True,
        variant: str | None = None,
        save_function: Callable[..., Any] | None = None,
        push_to_hub: bool = False,
        **upload_options: Any,
    ) -> None:
        """Write `config.json` and safetensors under the names of the hub.

        Transformers 4 and 5 read these files. All files are written next to the old ones and flushed before any is
        replaced. A process that is killed leaves either the old or the new weights.

        Args:
            save_directory: The folder, created if missing.
            is_main_process: False writes nothing; pass it in all processes of a run but one.
            state_dict: Tensors to write instead of those of the model. If these are sharded over processes, gather
                them with `get_model_state_dict` of `torch.distributed.checkpoint.state_dict`.
            max_shard_size: Larger weights are split into shards with an index. Bytes, or a string such as `"5GB"`.
            safe_serialization: Must be True: pickles are not written.
            variant: A part of the names of weights files, as `"fp16"` in `model.fp16.safetensors`. `config.json` is
                that of all variants, without a dtype. Files of other variants are kept.
            save_function: No effect, as in Transformers: it would replace `torch.save`.
            push_to_hub: Then upload the same files by `push_to_hub`.
            upload_options: Arguments of `push_to_hub`, such as `repo_id`, by default the name of the folder.

        Raises:
            TypeError: If an argument is not known or has a wrong type.
            ValueError: If the path is empty, `safe_serialization` is False, or `state_dict` does not match the model.
                Also if parameters are on the meta device or sharded over processes. Also if modules have values that
                safetensors cannot store, such as quantized weights, or that `from_pretrained` cannot read (these
                modules are listed). Nothing is then written.
            OSError: If the folder cannot be written, or the hub cannot be reached after it was written.
        """
        from ..checkpoint.saving import save_model

        upload = self._upload_after_saving(save_directory, is_main_process, push_to_hub, upload_options)
        if not (save_function is None or callable(save_function)):
            raise TypeError(f"save_function={save_function!r} is not supported (expected a function or None)")
        if not is_main_process:
            return
        model: Any = self
        save_model(model, save_directory, max_shard_size, safe_serialization, state_dict, variant)
        if upload is not None:
            self.push_to_hub(**upload, state_dict=state_dict, max_shard_size=max_shard_size, variant=variant)

    def _replaced_on_hub(self, save_options: Mapping[str, Any]) -> Sequence[str]:
        # A single file takes precedence over shards, so files of an earlier upload would be read instead of new ones.
        from ..checkpoint.saving import FileNames

        return FileNames.of(save_options.get("variant")).on_hub()
