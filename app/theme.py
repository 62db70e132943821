"""Colours, type, icons: the tokens of assets/tokens.json, and the one place that knows which theme is on.

Painting code asks `color("accent")`, `font("label")`, `icon("dice", 16, "text2")`; the answer changes with the
theme, so nothing that paints itself keeps a colour. `Theme` follows the system and repolishes once.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from PySide6.QtCore import QByteArray, QObject, QRectF, QSize, Qt, Signal, Slot
from PySide6.QtGui import QColor, QFont, QFontDatabase, QGuiApplication, QIcon, QPainter, QPalette, QPixmap
from PySide6.QtSvg import QSvgRenderer
from PySide6.QtWidgets import QApplication

Scheme = Literal["dark", "light"]

ASSETS = Path(__file__).resolve().parent.parent / "assets"
WEIGHTS = {400: QFont.Weight.Normal, 500: QFont.Weight.Medium, 600: QFont.Weight.DemiBold}

TOKENS: dict[str, Any] = json.loads((ASSETS / "tokens.json").read_text(encoding="utf-8"))
LAYOUT: dict[str, Any] = TOKENS["layout"]
RADIUS: dict[str, int] = TOKENS["radius"]
HEIGHT: dict[str, int] = TOKENS["control_height"]

_scheme: Scheme = "dark"


def scheme() -> Scheme:
    return _scheme


@lru_cache(maxsize=512)
def _color(name: str, of: Scheme, alpha: float) -> QColor:
    text = TOKENS["color"][of][name]
    if len(text) == 9:  # tokens say RRGGBBAA; Qt reads AARRGGBB
        text = f"#{text[7:]}{text[1:7]}"
    color = QColor(text)
    if alpha < 1:
        color.setAlphaF(color.alphaF() * alpha)
    return color


def color(name: str, alpha: float = 1.0) -> QColor:
    """The colour of a token in the theme that is on. Raises KeyError for a name that tokens.json lacks."""
    return _color(name, _scheme, alpha)


@lru_cache(maxsize=1)
def _family() -> str:
    """Loads the fonts that come with the program; falls back to the system's if they cannot be read."""
    families: list[str] = []
    for file in sorted((ASSETS / "fonts").glob("Inter-*.ttf")):
        families += QFontDatabase.applicationFontFamilies(QFontDatabase.addApplicationFont(str(file)))
    return "Inter" if "Inter" in families else QFont().family()


@lru_cache(maxsize=32)
def _font(role: str) -> QFont:
    of = TOKENS["type"][role]
    result = QFont([_family(), QFont().family(), *TOKENS["type"]["fallback"][1:]])
    result.setPixelSize(of["px"])
    result.setWeight(WEIGHTS[of["weight"]])
    result.setHintingPreference(QFont.HintingPreference.PreferNoHinting)
    return result


def font(role: str, weight: int = 0) -> QFont:
    """The font of a role: caption, small, body, label, prompt, title, page, hero. weight: another than its own."""
    result = QFont(_font(role))
    if weight:
        result.setWeight(WEIGHTS[weight])
    return result


def figures(role: str, weight: int = 0) -> QFont:
    """The same with tabular figures, for numbers that change or stand under each other."""
    result = font(role, weight)
    result.setFeature(QFont.Tag("tnum"), 1)
    return result


@lru_cache(maxsize=128)
def _svg(name: str) -> str:
    return (ASSETS / "icons" / f"{name}.svg").read_text(encoding="utf-8")


@lru_cache(maxsize=512)
def _icon(name: str, size: int, rgba: int, ratio: float) -> QPixmap:
    tint = QColor.fromRgba(rgba)
    source = _svg(name).replace("currentColor", tint.name(QColor.NameFormat.HexRgb))
    pixmap = QPixmap(QSize(size, size) * ratio)
    pixmap.fill(Qt.GlobalColor.transparent)
    painter = QPainter(pixmap)
    painter.setOpacity(tint.alphaF())
    QSvgRenderer(QByteArray(source.encode())).render(painter, QRectF(pixmap.rect()))
    painter.end()
    pixmap.setDevicePixelRatio(ratio)
    return pixmap


def icon(name: str, size: int, tint: QColor | str, ratio: float = 1.0) -> QPixmap:
    """One drawing of assets/icons, rendered once per size, colour and pixel ratio. size in logical pixels."""
    of = color(tint) if isinstance(tint, str) else tint
    return _icon(name, size, of.rgba(), ratio)


def app_icon() -> QIcon:
    result = QIcon()
    for size in (16, 24, 32, 48, 64, 128, 256):
        result.addPixmap(icon("app-icon-small" if size <= 24 else "app-icon", size, "text"))
    return result


def palette() -> QPalette:
    """What Qt's own dialogs and menus are painted with, so that they fit."""
    result = QPalette()
    roles = QPalette.ColorRole
    for role, name in {
        roles.Window: "window",
        roles.WindowText: "text",
        roles.Base: "surface",
        roles.AlternateBase: "raised",
        roles.Text: "text",
        roles.PlaceholderText: "text3",
        roles.Button: "raised",
        roles.ButtonText: "text",
        roles.BrightText: "on-accent",
        roles.ToolTipBase: "raised",
        roles.ToolTipText: "text",
        roles.Highlight: "accent",
        roles.HighlightedText: "on-accent",
        roles.Link: "accent-text",
        roles.LinkVisited: "accent-text",
        roles.Light: "hover",
        roles.Midlight: "raised",
        roles.Mid: "line",
        roles.Dark: "line",
        roles.Shadow: "rail",
        roles.Accent: "accent",
    }.items():
        result.setColor(role, color(name))
    for role in (roles.WindowText, roles.Text, roles.ButtonText):
        result.setColor(QPalette.ColorGroup.Disabled, role, color("text3"))
    return result


def _hex(name: str, alpha: float = 1.0) -> str:
    return color(name, alpha).name(QColor.NameFormat.HexArgb)


def style_sheet() -> str:
    """For Qt's plain widgets only; whatever has a face of its own paints itself."""
    return f"""
    QWidget[ground="window"] {{ background: {_hex("window")}; }}
    QWidget[ground="rail"] {{ background: {_hex("rail")}; }}
    QWidget[ground="stage"] {{ background: {_hex("stage")}; }}
    QLabel {{ background: transparent; color: {_hex("text")}; }}
    QLabel[tone="text2"] {{ color: {_hex("text2")}; }}
    QLabel[tone="text3"] {{ color: {_hex("text3")}; }}
    QLabel[tone="warn"] {{ color: {_hex("warn")}; }}
    QLabel[tone="danger"] {{ color: {_hex("danger")}; }}
    QPlainTextEdit, QTextEdit, QLineEdit {{ background: transparent; border: none; color: {_hex("text")};
        selection-background-color: {_hex("accent")}; selection-color: {_hex("on-accent")}; }}
    QScrollArea {{ background: transparent; border: none; }}
    QListView {{ background: transparent; border: none; outline: none; }}
    QToolTip {{ background: {_hex("raised")}; color: {_hex("text")}; border: 1px solid {_hex("line")};
        padding: 4px 6px; }}
    QMenu {{ background: {_hex("raised")}; color: {_hex("text")}; border: 1px solid {_hex("line")};
        border-radius: {RADIUS["field"]}px; padding: 6px; }}
    QMenu::item {{ padding: 7px 28px 7px 12px; border-radius: 6px; }}
    QMenu::icon {{ padding-left: 10px; }}
    QMenu::item:selected {{ background: {_hex("hover")}; }}
    QMenu::item:disabled {{ color: {_hex("text3")}; }}
    QMenu::separator {{ height: 1px; background: {_hex("control", 0.4)}; margin: 6px 8px; }}
    QScrollBar:vertical {{ width: 8px; background: transparent; margin: 0; }}
    QScrollBar:horizontal {{ height: 8px; background: transparent; margin: 0; }}
    QScrollBar::handle {{ background: {_hex("control", 0.6)}; border-radius: 2px; margin: 2px; }}
    QScrollBar::handle:vertical {{ min-height: 28px; }}
    QScrollBar::handle:horizontal {{ min-width: 28px; }}
    QScrollBar::add-line, QScrollBar::sub-line {{ width: 0; height: 0; }}
    QScrollBar::add-page, QScrollBar::sub-page {{ background: transparent; }}
    QSplitter::handle {{ background: {_hex("line")}; }}
    """


class Theme(QObject):
    """Dresses the program and follows the system between dark and light."""

    changed = Signal()

    def __init__(self, app: QApplication) -> None:
        super().__init__(app)
        self._app = app
        self._dressed = False
        app.setStyle("Fusion")
        app.setFont(font("body"))
        app.setWindowIcon(app_icon())
        hints = QGuiApplication.styleHints()
        hints.colorSchemeChanged.connect(self.follow)
        self.follow(hints.colorScheme())

    @Slot(Qt.ColorScheme)
    def follow(self, wanted: Qt.ColorScheme) -> None:
        """Unknown means dark: pictures are judged more easily on a dark ground."""
        global _scheme
        before, _scheme = _scheme, "light" if wanted == Qt.ColorScheme.Light else "dark"
        if self._dressed and before == _scheme:
            return  # polishing a whole window again costs a tenth of a second
        self._dressed = True
        self._app.setPalette(palette())
        self._app.setStyleSheet(style_sheet())
        self.changed.emit()
