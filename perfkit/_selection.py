"""Which layers of a model a recipe works on: shell patterns over the names the framework gives them."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from perfkit._errors import InvalidInputError, nearest


def patterns(value: str | Iterable[str], option: str) -> tuple[str, ...]:
    """What a caller may write for `include=` or `exclude=`, as a tuple of patterns.

    Raises:
        InvalidInputError: it is neither a text nor an iterable of texts.
    """
    written = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (value,)
    for item in written:
        if not isinstance(item, str):
            raise InvalidInputError(f"{option}={value!r}): expected layer names or patterns such as 'encoder.*'")
    return written


def selected(names: Iterable[str], include: tuple[str, ...], exclude: tuple[str, ...], recipe: str) -> set[str]:
    """The names that a pattern of `include` matches (all where there is none) and no pattern of `exclude`.

    Raises:
        InvalidInputError: a pattern matches nothing, which a caller would otherwise not notice.
    """
    names = list(names)
    for option, given in (("include", include), ("exclude", exclude)):
        for pattern in given:
            if not any(fnmatchcase(name, pattern) for name in names):
                known = nearest(pattern, names) if names else "it has no layer that this recipe works on"
                raise InvalidInputError(f"{recipe}: {option}={pattern!r} matches no layer of the model; {known}")

    def matched(name: str, given: tuple[str, ...]) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in given)

    return {name for name in names if (not include or matched(name, include)) and not matched(name, exclude)}
