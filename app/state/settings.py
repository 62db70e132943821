"""What the window remembers from one start to the next. No prompts: they are in the pictures."""

from __future__ import annotations

import json
from typing import Any

from PySide6.QtCore import QByteArray, QObject, QSettings

from engine import folders


class Settings(QObject):
    """Values with their defaults; a damaged file is as good as none."""

    def __init__(self, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._file = QSettings(str(folders.settings() / "window.ini"), QSettings.Format.IniFormat, self)

    @property
    def geometry(self) -> QByteArray | None:
        value = self._file.value("window/geometry")
        return value if isinstance(value, QByteArray) and not value.isEmpty() else None

    @geometry.setter
    def geometry(self, value: QByteArray) -> None:
        self._file.setValue("window/geometry", value)

    @property
    def composer_width(self) -> int | None:
        """Only when the person dragged its edge."""
        return self._number("window/composer_width")

    @composer_width.setter
    def composer_width(self, value: int) -> None:
        self._file.setValue("window/composer_width", value)

    @property
    def model(self) -> str:
        return str(self._file.value("generate/model") or "")

    @model.setter
    def model(self, value: str) -> None:
        self._file.setValue("generate/model", value)

    @property
    def composer(self) -> dict[str, Any]:
        """What `ComposerState.remembered` said, for the model of that name."""
        try:
            told = json.loads(str(self._file.value("generate/composer") or "{}"))
        except (ValueError, RecursionError):
            return {}
        return told if isinstance(told, dict) else {}

    @composer.setter
    def composer(self, values: dict[str, Any]) -> None:
        self._file.setValue("generate/composer", json.dumps(values))

    def _number(self, name: str) -> int | None:
        try:
            return int(str(self._file.value(name)))
        except ValueError:
            return None

    def save(self) -> None:
        self._file.sync()
