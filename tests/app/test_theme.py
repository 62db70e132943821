"""Tokens, fonts and icons: what the drawing code may rely on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PySide6.QtCore import Qt
from PySide6.QtGui import QColor, QFontInfo, QFontMetricsF, QRawFont
from PySide6.QtWidgets import QApplication

from app import theme
from app.theme import Theme

APP = Path(theme.__file__).parent


def luminance(color: QColor) -> float:
    """Relative luminance as WCAG 2 defines it."""
    channels = (color.redF(), color.greenF(), color.blueF())
    red, green, blue = (c / 12.92 if c <= 0.03928 else float((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return float(0.2126 * red + 0.7152 * green + 0.0722 * blue)


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(theme.color(one)), luminance(theme.color(other))), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [Qt.ColorScheme.Dark, Qt.ColorScheme.Light])
def test_text_can_be_read_on_every_ground_it_stands_on(dark: Theme, scheme: Qt.ColorScheme) -> None:
    dark.follow(scheme)
    for ground in ("rail", "window", "stage", "surface", "raised", "hover"):
        for ink in ("text", "text2", "text3"):
            assert contrast(ink, ground) >= 4.5, (ink, ground)
    assert contrast("on-accent", "accent") >= 4.5
    assert contrast("danger", "danger-soft") >= 4.5


def test_the_theme_follows_the_system_and_repolishes_once(dark: Theme, qapp: QApplication) -> None:
    changes: list[None] = []
    dark.changed.connect(lambda: changes.append(None))
    dark.follow(Qt.ColorScheme.Light)
    assert theme.scheme() == "light"
    assert qapp.palette().window().color() == theme.color("window")
    dark.follow(Qt.ColorScheme.Unknown)
    assert theme.scheme() == "dark"
    assert len(changes) == 2


def test_inter_comes_with_the_program_in_three_weights(dark: Theme) -> None:
    assert [QFontInfo(theme.font(role)).family() for role in theme.TOKENS["type"] if role in ("body", "hero")] == [
        "Inter",
        "Inter",
    ]
    styles = {QFontInfo(theme.font(role)).styleName() for role in ("body", "caption", "label")}
    assert styles == {"Regular", "Medium", "SemiBold"}


def test_figures_are_tabular(dark: Theme) -> None:
    metrics = QFontMetricsF(theme.figures("label"))
    assert metrics.horizontalAdvance("1111") == metrics.horizontalAdvance("8888")


@pytest.mark.parametrize("words", ["Größe", "Przykład", "Ελλάδα", "Привет", "Tiếng Việt", "→ × · ↵ − °"])
def test_the_fonts_hold_the_letters_people_type(dark: Theme, words: str) -> None:
    raw = QRawFont.fromFont(theme.font("body"))
    assert raw.familyName() == "Inter"
    assert all(raw.supportsCharacter(ord(character)) for character in words if character != " ")


def test_every_token_and_icon_that_the_code_names_is_there() -> None:
    colors = theme.TOKENS["color"]
    assert colors["dark"].keys() == colors["light"].keys()
    icons = {file.stem for file in (theme.ASSETS / "icons").glob("*.svg")}
    for file in APP.rglob("*.py"):
        source = file.read_text(encoding="utf-8")
        for name in re.findall(r'theme\.color\("([^"]+)"', source):
            assert name in colors["dark"], (file, name)
        for name in re.findall(r'paint\.icon\(painter, "([^"]+)"', source):
            assert name in icons, (file, name)


def test_an_icon_takes_the_colour_it_is_asked_for(dark: Theme) -> None:
    image = theme.icon("stop", 24, QColor("#ff0000")).toImage()
    assert image.pixelColor(12, 12).name() == "#ff0000"
    assert image.pixelColor(0, 0).alpha() == 0
    assert theme.icon("stop", 24, "text", 2.0).width() == 48


def test_no_colour_is_written_down_outside_the_tokens() -> None:
    for file in APP.rglob("*.py"):
        found = re.findall(r"#[0-9A-Fa-f]{6}\b", file.read_text(encoding="utf-8"))
        assert not found, (file, found)


def test_tokens_are_plain_json() -> None:
    assert json.loads((theme.ASSETS / "tokens.json").read_text(encoding="utf-8")) == theme.TOKENS
