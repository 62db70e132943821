"""The controls of the left column, by keys and mouse, as a person uses them."""

from __future__ import annotations

import pytest
from PySide6.QtCore import QPoint, QPointF, Qt
from PySide6.QtGui import QAccessible, QWheelEvent
from PySide6.QtTest import QTest
from PySide6.QtWidgets import QApplication, QLineEdit, QVBoxLayout, QWidget
from pytestqt.qtbot import QtBot

from app.theme import Theme
from app.widgets.lora_list import LoraList
from app.widgets.lora_row import LoraView
from app.widgets.number_field import NumberField, parse
from app.widgets.prompt_box import PromptBox
from app.widgets.seed_field import SeedField
from app.widgets.size_picker import SizePicker
from app.widgets.strength_slider import MARGIN, StrengthSlider
from app.widgets.switch import Switch

Key = Qt.Key
Mod = Qt.KeyboardModifier
LEFT = Qt.MouseButton.LeftButton


def shown(qtbot: QtBot, widget: QWidget, width: int = 300) -> None:
    qtbot.addWidget(widget)
    widget.resize(width, widget.sizeHint().height())
    widget.show()
    qtbot.waitExposed(widget)


# ------------------------------------------------------------------------------------------------ slider


@pytest.fixture
def slider(qtbot: QtBot, dark: Theme) -> StrengthSlider:
    it = StrengthSlider()
    it.set_name("3D look")
    shown(qtbot, it, 280 + 2 * MARGIN)
    it.setFocus()
    return it


def x_of(slider: StrengthSlider, strength: float) -> QPoint:
    return QPoint(round(MARGIN + (strength / 2 + 1) / 2 * (slider.width() - 2 * MARGIN)), slider.height() // 2)


@pytest.mark.parametrize(
    ("key", "modifier", "after"),
    [
        (Key.Key_Right, Mod.NoModifier, 0.55),
        (Key.Key_Left, Mod.NoModifier, 0.45),
        (Key.Key_Right, Mod.ShiftModifier, 0.51),
        (Key.Key_PageUp, Mod.NoModifier, 0.75),
        (Key.Key_PageDown, Mod.NoModifier, 0.25),
        (Key.Key_Home, Mod.NoModifier, -2.0),
        (Key.Key_End, Mod.NoModifier, 2.0),
        (Key.Key_0, Mod.NoModifier, 0.0),
    ],
)
def test_keys_move_the_strength(
    slider: StrengthSlider, qtbot: QtBot, key: Qt.Key, modifier: Qt.KeyboardModifier, after: float
) -> None:
    slider.set_strength(0.5)
    with qtbot.waitSignal(slider.strength_changed) as said:
        QTest.keyClick(slider, key, modifier)
    assert said.args == [pytest.approx(after)]


def test_backspace_and_double_click_go_back_to_the_files_own_strength(slider: StrengthSlider, qtbot: QtBot) -> None:
    with qtbot.waitSignal(slider.reset_requested):
        QTest.keyClick(slider, Key.Key_Backspace)
    with qtbot.waitSignal(slider.reset_requested):
        QTest.mouseDClick(slider, LEFT, pos=x_of(slider, 0.5))


def test_a_drag_snaps_to_whole_numbers_unless_shift_is_held(slider: StrengthSlider) -> None:
    QTest.mousePress(slider, LEFT, pos=x_of(slider, -1.0))
    assert slider.strength() == -1.0
    QTest.mouseMove(slider, x_of(slider, 1.0) + QPoint(1, 0))
    assert slider.strength() == 1.0, "snapped"
    QTest.mouseMove(slider, x_of(slider, 1.3))
    assert slider.strength() == pytest.approx(1.3, abs=0.02)
    QTest.mouseRelease(slider, LEFT, pos=x_of(slider, 1.3))
    slider.set_strength(0.0)
    QTest.mousePress(slider, LEFT, Mod.ShiftModifier, x_of(slider, 1.0) + QPoint(2, 0))
    assert slider.strength() == pytest.approx(1.03, abs=0.011)


def test_the_wheel_acts_only_with_the_focus(slider: StrengthSlider, qtbot: QtBot) -> None:
    other = QLineEdit()
    shown(qtbot, other)

    def turn() -> None:
        where = QPointF(20, 10)
        QApplication.sendEvent(
            slider,
            QWheelEvent(where, where, QPoint(), QPoint(0, 120), Qt.MouseButton.NoButton, Mod.NoModifier,
                        Qt.ScrollPhase.NoScrollPhase, False),
        )  # fmt: skip

    slider.set_strength(0.5)
    slider.clearFocus()
    turn()
    assert slider.strength() == 0.5
    slider.setFocus()
    if slider.hasFocus():  # a platform without active windows gives none
        turn()
        assert slider.strength() == pytest.approx(0.55)


def test_set_from_outside_says_nothing(slider: StrengthSlider, qtbot: QtBot) -> None:
    with qtbot.assertNotEmitted(slider.strength_changed):
        slider.set_strength(1.25)
    slider.set_strength(7)
    assert slider.strength() == 2.0, "beyond its ends the handle stays at the end"


def test_assistive_technology_hears_name_role_and_value(slider: StrengthSlider) -> None:
    slider.set_strength(-0.45)
    interface = QAccessible.queryAccessibleInterface(slider)
    assert interface.role() == QAccessible.Role.Slider
    assert interface.text(QAccessible.Text.Name) == "3D look strength"
    assert interface.text(QAccessible.Text.Description) == "-0.45, from minus 2 to 2"


# ------------------------------------------------------------------------------------------- number field


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("0.6+0.1", 0.7),
        ("41 830 592", 41830592),
        ("41\u202f830\u202f592", 41830592),
        ("\u22120.45", -0.45),
        ("2,5", 2.5),
        (" 1 - 3 ", -2),
        (".5", 0.5),
    ],
)
def test_numbers_and_simple_sums_are_read(words: str, value: float) -> None:
    assert parse(words) == pytest.approx(value)


@pytest.mark.parametrize(
    "words", ["", "x", "1+", "1**2", "1e9", "__import__('os')", "--1", "9" * 70, "1 2+", "nan"]
)
def test_what_is_no_number_is_none(words: str) -> None:
    assert parse(words) is None


@pytest.fixture
def field(qtbot: QtBot, dark: Theme) -> NumberField:
    it = NumberField("Guidance", 0, 30, decimals=1, step=0.1)
    shown(qtbot, it, 140)
    it.set_value(4.5)
    return it


def type_into(field: NumberField, words: str) -> None:
    field.lineEdit().setFocus()
    field.selectAll()
    QTest.keyClicks(field.lineEdit(), words)
    QTest.keyClick(field.lineEdit(), Key.Key_Return)


def test_typing_a_sum_sets_its_value_once(field: NumberField, qtbot: QtBot) -> None:
    heard: list[float] = []
    field.valueChanged.connect(heard.append)
    type_into(field, "3+0.5")
    assert field.value() == pytest.approx(3.5)
    assert heard == [pytest.approx(3.5)]


def test_bad_text_goes_back_to_the_last_value(field: NumberField) -> None:
    type_into(field, "lots")
    assert field.value() == pytest.approx(4.5)
    assert field.lineEdit().text() == "4.5"


def test_a_number_beyond_the_limits_stops_at_them(field: NumberField) -> None:
    type_into(field, "99")
    assert field.value() == 30


def test_dragging_sideways_changes_and_a_click_begins_to_type(field: NumberField) -> None:
    edit = field.lineEdit()
    start = QPoint(20, 10)
    QTest.mousePress(edit, LEFT, pos=start)
    QTest.mouseMove(edit, start + QPoint(60, 0))
    QTest.mouseRelease(edit, LEFT, pos=start + QPoint(60, 0))
    assert field.value() == pytest.approx(5.5)
    QTest.mouseClick(edit, LEFT, pos=start)
    assert field.value() == pytest.approx(5.5)
    assert edit.selectedText() == "5.5"


def test_a_stepper_has_minus_and_plus(qtbot: QtBot, dark: Theme) -> None:
    count = NumberField("Count", 1, 99, stepper=True)
    shown(qtbot, count, 152)
    minus, plus = (area.center().toPoint() for area in count._buttons())
    QTest.mouseClick(count, LEFT, pos=plus)
    QTest.mouseClick(count, LEFT, pos=plus)
    assert count.value() == 3
    QTest.mouseClick(count, LEFT, pos=minus)
    assert count.value() == 2


def test_a_number_field_is_a_spin_box_with_a_name(field: NumberField) -> None:
    interface = QAccessible.queryAccessibleInterface(field)
    assert interface.role() == QAccessible.Role.SpinBox
    assert interface.text(QAccessible.Text.Name) == "Guidance"


def test_the_seed_goes_round_its_modes_and_keeps_every_digit(qtbot: QtBot, dark: Theme) -> None:
    seed = SeedField()
    shown(qtbot, seed, 182)
    modes: list[str] = []
    seed.mode_chosen.connect(modes.append)
    for mode in ("random", "keep", "one up"):
        seed.set_mode(mode)
        QTest.mouseClick(seed.button, LEFT)
    assert modes == ["keep", "one up", "random"]
    seed.set_value(2**53 - 1)
    assert int(seed.value()) == 2**53 - 1
    assert seed.lineEdit().text() == "9\u202f007\u202f199\u202f254\u202f740\u202f991"


# ------------------------------------------------------------------------------------------------- switch


def test_a_switch_is_a_checkbox_with_a_name(qtbot: QtBot, dark: Theme) -> None:
    switch = Switch("3D look on")
    shown(qtbot, switch, 34)
    QTest.mouseClick(switch, LEFT, pos=QPoint(30, 2))
    assert switch.isChecked(), "the whole 28 pixels count"
    QTest.keyClick(switch, Key.Key_Space)
    assert not switch.isChecked()
    interface = QAccessible.queryAccessibleInterface(switch)
    assert interface.role() == QAccessible.Role.CheckBox
    assert interface.text(QAccessible.Text.Name) == "3D look on"


# ------------------------------------------------------------------------------------------------- prompt


def test_the_prompt_grows_from_its_least_to_ten_lines(qtbot: QtBot, dark: Theme) -> None:
    box = PromptBox()
    shown(qtbot, box, 312)
    box.set_least_lines(2)
    heights = []
    for lines in (0, 2, 5, 10, 30):
        box.set_prompt("\n".join(["word"] * max(1, lines)) if lines else "")
        heights.append(box.prompt.height())
    assert heights[0] == heights[1] < heights[2] < heights[3] == heights[4]


def test_enter_is_a_new_line_and_ctrl_enter_is_not(qtbot: QtBot, dark: Theme) -> None:
    box = PromptBox()
    shown(qtbot, box, 312)
    QTest.keyClicks(box.prompt, "a")
    QTest.keyClick(box.prompt, Key.Key_Return)
    QTest.keyClick(box.prompt, Key.Key_Return, Mod.ControlModifier)
    QTest.keyClicks(box.prompt, "b")
    assert box.prompt.toPlainText() == "a\nb"


def test_a_prompt_set_from_outside_can_be_undone(qtbot: QtBot, dark: Theme) -> None:
    box = PromptBox()
    shown(qtbot, box, 312)
    QTest.keyClicks(box.prompt, "mine")
    box.set_prompt("another")
    box.prompt.undo()
    assert box.prompt.toPlainText() == "mine"


def test_foreign_text_stays_plain(qtbot: QtBot, dark: Theme) -> None:
    box = PromptBox()
    shown(qtbot, box, 312)
    box.set_prompt("<b>bold</b> & <img src=x>")
    assert box.prompt.toPlainText() == "<b>bold</b> & <img src=x>"


def test_a_closed_leave_out_field_leaves_nothing_out(qtbot: QtBot, dark: Theme) -> None:
    box = PromptBox()
    shown(qtbot, box, 312)
    heard: list[str] = []
    box.negative_changed.connect(heard.append)
    box._leave_out.click()
    QTest.keyClicks(box.negative, "grey")
    assert heard[-1] == "grey"
    box._leave_out.click()
    assert heard[-1] == ""
    assert box.negative.toPlainText() == "grey", "closing forgets nothing"


# ------------------------------------------------------------------------------------------------ LoRA list


def view(file: str, **values: object) -> LoraView:
    settings: dict[str, object] = {"strength": 1.0, "own_strength": 0.8, "on": True, "words": "all 44 layers used"}
    return LoraView(file, file.upper(), **(settings | values))  # type: ignore[arg-type]


@pytest.fixture
def loras(qtbot: QtBot, dark: Theme) -> LoraList:
    it = LoraList()
    qtbot.addWidget(it)
    it.set_loras([view("a"), view("b", on=False, strength=-0.4)])
    it.resize(312, it.sizeHint().height())
    it.show()
    qtbot.waitExposed(it)
    return it


def test_slider_and_field_show_one_strength_and_both_change_it(loras: LoraList) -> None:
    heard: list[tuple[str, float]] = []
    loras.strength_chosen.connect(lambda file, strength: heard.append((file, round(strength, 3))))
    first, second = loras.rows()
    assert (second.slider.strength(), second.field.value()) == (-0.4, -0.4)
    QTest.keyClick(first.slider, Key.Key_Left)
    first.field.setValue(1.25)
    first.slider.reset_requested.emit()
    assert heard == [("a", 0.95), ("a", 1.25), ("a", 0.8)]


def test_a_changed_value_keeps_the_row_and_the_drag(loras: LoraList) -> None:
    before = loras.rows()
    loras.set_loras([view("a", strength=0.3), view("b")])
    assert loras.rows() == before
    assert before[0].slider.strength() == 0.3
    loras.set_loras([view("b"), view("a")])
    assert loras.rows() != before


def test_rows_switch_move_and_go_by_keys(loras: LoraList, qtbot: QtBot) -> None:
    first, second = loras.rows()
    with qtbot.waitSignal(loras.switched) as said:
        QTest.keyClick(second.switch, Key.Key_Space)
    assert said.args == ["b", True]
    with qtbot.waitSignal(loras.move_requested) as moved:
        QTest.keyClick(first.slider, Key.Key_Down, Mod.AltModifier)
    assert moved.args == ["a", 1]
    with qtbot.waitSignal(loras.remove_requested) as removed:
        QTest.keyClick(first.slider, Key.Key_Delete)
    assert removed.args == ["a"]


def test_an_empty_list_says_what_to_do(loras: LoraList) -> None:
    loras.set_loras([])
    assert loras.rows() == []
    words = [label.text() for label in loras.findChildren(QWidget) if hasattr(label, "text")]
    assert "Drop a LoRA here, or +" in words


def test_plus_without_known_loras_asks_for_a_file(loras: LoraList, qtbot: QtBot) -> None:
    with qtbot.waitSignal(loras.file_requested):
        loras.open_add()


# --------------------------------------------------------------------------------------------------- size


def test_sizes_are_chosen_and_swapped(qtbot: QtBot, dark: Theme) -> None:
    picker = SizePicker()
    shown(qtbot, picker, 312)
    picker.set_presets([("Square", 256, 256), ("Wide", 320, 192)])
    picker.set_size(320, 192)
    assert picker.select.currentText() == "Wide  320 × 192"
    with qtbot.waitSignal(picker.size_chosen) as swapped:
        QTest.mouseClick(picker._swap, LEFT)
    assert swapped.args == [192, 320]
    picker.set_size(192, 320)
    assert picker.select.currentText() == "Tall  192 × 320", "a size that is no preset says its shape"
    picker.set_size(256, 256)
    assert not picker._swap.isEnabled()
    assert picker._swap.toolTip() == "Both sides are the same", "what is greyed says why"


def test_tab_goes_through_a_row_in_reading_order(loras: LoraList) -> None:
    holder = QWidget()
    QVBoxLayout(holder).addWidget(loras)
    row = loras.rows()[0]
    chain, at = [], row.more.nextInFocusChain()
    for _ in range(30):
        if at in (row.field, row.switch, row.slider):
            chain.append(at)
        assert at is not None
        at = at.nextInFocusChain()
    assert chain[:3] == [row.field, row.switch, row.slider]
