"""Arguments of `from_pretrained`: Transformers' ordinary ones, fields of the configuration, and errors for others."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..configuration.beit_config import IMPLEMENTATION_FIELDS
from ..configuration.labels_and_stages import known_fields
from ..utils.foreign_names import suggest_options
from ..utils.messages import FieldError, describe, raise_errors
from .protocol import PretrainedModel

_FLAGS = (
    "use_safetensors",
    "use_ema",
    "force_download",
    "offload_buffers",
    "weights_only",
    "low_cpu_mem_usage",
    "trust_remote_code",
)
_TYPES: tuple[tuple[type, str, tuple[str, ...]], ...] = (
    (bool, "True, False", _FLAGS),
    (str, "a string", ("subfolder", "variant")),
    (Mapping, "a dict", ("state_dict", "key_mapping", "proxies")),
)


class OrdinaryArguments(NamedTuple):
    """Arguments that Transformers' `from_pretrained` also has, beside those in the signature.

    Attributes:
        state_dict: Tensors to load instead of those of the files. They are copied. The name may then be None.
        key_mapping: Regular expressions and their replacements for names in the checkpoint, applied first.
        force_download: Download the files again, even if they are in the cache.
        offload_buffers: Also keep buffers on the device for offloading; requires `device_map`.
        weights_only: None or True: a pickle is always read as plain data. False is an error.
        low_cpu_mem_usage: No effect: tensors are always assigned, and never initialized first.
        trust_remote_code: No effect: code of a repository never runs.
        proxies: No effect, with a warning: `huggingface_hub` reads `HTTPS_PROXY`.
    """

    state_dict: Mapping[str, Any] | None = None
    key_mapping: Mapping[str, str] | None = None
    force_download: bool = False
    offload_buffers: bool = False
    weights_only: bool | None = None
    low_cpu_mem_usage: bool | None = None
    trust_remote_code: bool | None = None
    proxies: Mapping[str, str] | None = None

    def check(self, name_or_path: Any) -> None:
        """Check what cannot be fulfilled, before a file is read.

        Raises:
            TypeError: If there is neither a name nor a state dict.
            ValueError: If a pickle should run code.
        """
        if name_or_path is None and self.state_dict is None:
            raise TypeError("pretrained_model_name_or_path=None requires state_dict")
        if self.weights_only is False:
            raise ValueError("weights_only=False is not supported: a pickle could then run code (expected True)")
        if self.proxies:
            warnings.warn(
                "proxies has no effect: huggingface_hub reads the environment variable HTTPS_PROXY", stacklevel=4
            )


def split_arguments(
    model_class: type[PretrainedModel], given: Mapping[str, Any]
) -> tuple[OrdinaryArguments, dict[str, Any], dict[str, Any]]:
    """Split keywords into ordinary arguments, the constructor's and fields of the configuration.

    Raises:
        TypeError: If a keyword is not supported. The error lists what is accepted.
    """
    built = set(inspect.signature(model_class).parameters) - {"config", *IMPLEMENTATION_FIELDS}
    fields = known_fields()
    unknown = sorted(set(given) - built - fields - set(OrdinaryArguments._fields))
    if unknown:
        arguments = _explicit_arguments(model_class) | set(OrdinaryArguments._fields) | built
        advice = suggest_options(unknown, arguments | fields)
        raise TypeError(
            f"{model_class.__name__}.from_pretrained got unexpected arguments {', '.join(unknown)} (expected fields of "
            f"BeitConfig, {', '.join(sorted(arguments))}){advice}"
        )
    ordinary = {name: given[name] for name in OrdinaryArguments._fields if given.get(name) is not None}
    constructor = {name: value for name, value in given.items() if name in built}
    return OrdinaryArguments(**ordinary), constructor, {name: given[name] for name in given if name in fields - built}


def _explicit_arguments(model_class: Any) -> set[str]:
    """Names in the signatures of `from_pretrained`; a subclass may only pass keywords on."""
    functions = [vars(cls)["from_pretrained"].__func__ for cls in model_class.__mro__ if "from_pretrained" in vars(cls)]
    parameters = [parameter for function in functions for parameter in inspect.signature(function).parameters.values()]
    return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def check_types(owner: str, given: Mapping[str, Any]) -> None:
    """Check the types of arguments that are not None.

    Raises:
        TypeError: If any is wrong. The error lists all of them.
    """
    errors = [
        FieldError(f"{describe(name, given[name])} is not supported (expected {expected} or None)", wrong_type=True)
        for kind, expected, names in _TYPES
        for name in names
        if given.get(name) is not None and not isinstance(given[name], kind)
    ]
    raise_errors(f"{owner}.from_pretrained", errors)
