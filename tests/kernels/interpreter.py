"""Make Triton's interpreter faster, with the same results."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from triton import language
from triton.runtime import interpreter


def patch_once_per_launch() -> None:
    """Patch `triton.language` once per launch, not at every call of a device function."""
    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    patched: set[ModuleType] = set()

    def launch_patching(executor: interpreter.GridExecutor, *args: Any, **kwargs: Any) -> None:
        patched.clear()  # each launch undoes its patches
        launch(executor, *args, **kwargs)

    def patch_missing(function: Callable[..., Any]) -> Any:
        modules = patched_modules(function)
        if modules <= patched:
            return None
        patched.update(modules)
        return patch(function)

    interpreter.GridExecutor.__call__ = launch_patching
    interpreter._patch_lang = patch_missing


@functools.cache
def patched_modules(function: Callable[..., Any]) -> frozenset[ModuleType]:
    """Return the modules that the interpreter patches for `function`."""
    modules = {value for value in function.__globals__.values() if inspect.ismodule(value)}
    return frozenset(modules & {language, language.core})


def skip_overflow_checks() -> None:
    """Do not check every integer operation for overflow: compiled kernels do not either.

    test_far_strides.py notices offsets that overflow.
    """
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
