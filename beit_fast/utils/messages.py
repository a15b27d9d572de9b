"""Messages of errors: one error that lists every reason."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

_LIST_LIMIT = 20
_CLOSE = 0.85  # share of equal letters from which a name counts as a typo of another


class FieldError(NamedTuple):
    """The reason why a field is rejected.

    `wrong_type` is True if the type is wrong, not the value.
    """

    text: str
    wrong_type: bool = False


def raise_errors(owner: str, errors: Sequence[FieldError]) -> None:
    """Raise one error that lists all `errors`, if there are any.

    Raises:
        TypeError: If all errors are about types.
        ValueError: If any error is about a value.
    """
    if not errors:
        return
    kind = TypeError if all(error.wrong_type for error in errors) else ValueError
    count = "an error" if len(errors) == 1 else f"{len(errors)} errors"
    raise kind(f"{owner} has {count}:\n" + "\n".join(f"- {error.text}" for error in errors))


def raise_value_error(heading: str, errors: Sequence[str]) -> None:
    """Raise one ValueError that lists all `errors` under `heading`.

    If there are none, return.
    """
    if errors:
        raise ValueError(f"{heading}:\n" + "\n".join(f"- {error}" for error in errors))


def unexpected_arguments(names: Iterable[str], accepted: Iterable[str]) -> list[FieldError]:
    """Return the error of arguments that are not in `accepted`; none if there are no such `names`."""
    accepted = sorted(accepted)
    unknown = sorted(set(names) - set(accepted))
    if not unknown:
        return []
    advice = "".join(suggest(name, accepted) for name in unknown)
    what = "an unexpected argument" if len(unknown) == 1 else "unexpected arguments"
    return [FieldError(f"{what} {', '.join(unknown)} (expected {', '.join(accepted)}){advice}", wrong_type=True)]


def describe(name: str, value: Any) -> str:
    """`name=value` with a shortened value."""
    return f"{name}={reprlib.repr(value)}"


def full_name(kind: type) -> str:
    """Name of a class with its module.

    It tells apart classes of one name, such as the many called `Linear`.
    """
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def count_of(number: int, noun: str) -> str:
    """Count things, as in "1 image" and "2 images"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def join_some(items: Iterable[object], limit: int = _LIST_LIMIT) -> str:
    """Join the first `limit` items by commas and count the others."""
    shown = [str(item) for item in items]
    more = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    return ", ".join(shown[:limit]) + more


def join_choices(choices: Iterable[Any]) -> str:
    """Join choices as in "'a', 'b' or 'c'"."""
    *first, last = map(repr, choices)
    return f"{', '.join(first)} or {last}" if first else last


def suggest(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for a name in `known`.

    The string is empty if none resembles `name`.
    """
    close = closest(name, known)
    return "" if close is None else f" (did you mean {close!r}?)"


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the name in `known` that `name` resembles, or None."""
    return next(iter(difflib.get_close_matches(name, sorted(known), n=1, cutoff=_CLOSE)), None)
