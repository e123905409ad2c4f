"""How plain data shows itself: as JSON, in a terminal, as a page. The words and pictures are `perfkit.reporting`'s."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar


class AsJson:
    """Base of what can be written down whole.

    Class attributes:
        _indent: spaces at each level of the JSON.
    """

    _indent: ClassVar[int] = 1

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-ready data; numbers that are not finite become None."""
        return plain(self)

    def to_json(self, path: str | Path | None = None) -> str:
        """All of it as canonical JSON (sorted keys); written to `path` if one is given."""
        text = json.dumps(self.to_dict(), sort_keys=True, indent=self._indent, allow_nan=False)
        return written(text + "\n", path)


class InTerminal:
    """Base of what is printed, by rich or as plain text.

    Class attributes:
        _terminal: the module of `perfkit.reporting` whose `render(shown)` is what rich prints, at any width.
        _width: columns of the plain text.
    """

    _terminal: ClassVar[str]
    _width: ClassVar[int] = 100

    def __rich__(self) -> Any:
        return _reporting(self._terminal).render(self)

    def __str__(self) -> str:
        return _reporting("terminal").to_text(self.__rich__(), self._width)


class AsPage:
    """Base of what is a page of its own, and an output in a notebook.

    Class attributes:
        _page: the module of `perfkit.reporting` with `render(shown)` and `embedded(shown)`.
    """

    _page: ClassVar[str]

    def to_html(self, path: str | Path | None = None) -> str:
        """All of it as one self-contained HTML page, which needs no network; written to `path` if one is given."""
        return written(_reporting(self._page).render(self), path)

    def _repr_html_(self) -> str:
        return _reporting(self._page).embedded(self)


def _reporting(module: str) -> ModuleType:
    """Imported at first use: who only looks at the numbers needs no rich and no jinja2."""
    return importlib.import_module(f"perfkit.reporting.{module}")


def plain(value: Any) -> Any:
    """Dataclasses, enums and containers as what JSON knows; numbers that are not finite become None."""
    if dataclasses.is_dataclass(value):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, enum.Enum):
        return value.value
    return value


def written(text: str, path: str | Path | None) -> str:
    """Write `text` to `path` whole or not at all, and return it."""
    if path is not None:
        path = Path(path)
        partial = path.with_name(f".{path.name}.partial")
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    return text
