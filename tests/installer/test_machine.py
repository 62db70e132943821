"""What the installer decides from what it finds on a computer."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from installer import machine
from installer.machine import Card, choose_build
from installer.report import StopError


def test_a_new_driver_and_card_get_the_cuda_build():
    build = choose_build(Card("NVIDIA GeForce RTX 4090", 89, 13000))
    assert build.kind == "cuda"
    assert "RTX 4090" in build.why


@pytest.mark.parametrize(
    ("card", "unused_card", "says"),
    [
        (None, False, "No NVIDIA card"),
        (None, True, "Install NVIDIA's driver 580"),
        (Card("NVIDIA GeForce RTX 3060", 86, 12020), False, "too old (CUDA 12.2)"),
        (Card("NVIDIA GeForce RTX 3060", 86, 12090), False, "Update the driver to 580 or newer"),
        (Card("NVIDIA GeForce GTX 1080", 61, 13000), False, "GTX 1080 is too old"),
    ],
    ids=["no card", "no driver", "old driver", "what to do", "old card"],
)
def test_everything_else_goes_on_with_the_processor_and_says_why(card, unused_card, says):
    build = choose_build(card, unused_card)
    assert build.kind == "cpu"
    assert says in build.why
    assert "processor" in build.why


def test_the_driver_of_this_computer_can_be_asked():
    card = machine.ask_driver()
    assert card is None or (card.name and card.capability >= 30 and card.cuda >= 9000)


def test_a_card_without_driver_is_seen_on_the_bus(tmp_path):
    def device(name: str, vendor: str, kind: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(vendor + "\n")
        (tmp_path / name / "class").write_text(kind + "\n")

    device("0000:00:02.0", "0x8086", "0x030000")
    device("0000:01:00.1", "0x10de", "0x040300")  # the sound part of an NVIDIA card
    (tmp_path / "unreadable").mkdir()
    assert not machine.has_card_without_driver(tmp_path)
    device("0000:01:00.0", "0x10de", "0x030000")
    assert machine.has_card_without_driver(tmp_path)


@pytest.mark.parametrize(
    ("environment", "system", "expected"),
    [
        ({}, "linux", False),
        ({"DISPLAY": ""}, "linux", False),
        ({"DISPLAY": ":0"}, "linux", True),
        ({"WAYLAND_DISPLAY": "wayland-0"}, "linux", True),
        ({}, "win32", True),
    ],
)
def test_a_display_is_found_where_there_is_one(environment, system, expected):
    assert machine.has_display(environment, system) is expected


def test_a_mac_and_a_32_bit_python_are_told_so():
    with pytest.raises(StopError, match="macOS"):
        machine.check_platform("darwin", 64)
    with pytest.raises(StopError, match="64-bit Python"):
        machine.check_platform("linux", 32)
    machine.check_platform("linux", 64)
    machine.check_platform()  # this computer


def test_too_little_space_names_both_numbers(tmp_path):
    with pytest.raises(StopError) as stop:
        machine.check_space(tmp_path, "cuda", already=-(10**18))
    assert "are needed" in stop.value.what
    assert "are free" in stop.value.what
    assert "Make some space" in stop.value.todo


def test_what_an_unfinished_installation_takes_is_not_asked_for_twice(tmp_path):
    assert machine.check_space(tmp_path, "cuda", already=10**12) > 0


def test_a_folder_that_may_not_be_written_to_is_named(tmp_path):
    (tmp_path / ".build").write_text("a file where a folder should be")
    with pytest.raises(StopError) as stop:
        machine.check_writable(tmp_path)
    assert str(tmp_path) in stop.value.what
    assert "home folder" in stop.value.todo


def test_the_work_folder_is_made_and_left_clean(tmp_path):
    assert list(machine.check_writable(tmp_path).iterdir()) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="system packages are a matter of Linux")
def test_every_library_that_is_missing_is_a_package_to_install():
    _, window = machine.missing_packages()
    assert set(window) <= set(machine.QT_LIBRARIES.values())


def test_the_notice_about_the_log_is_short():
    assert "Python" in machine.describe()
    assert Path(sys.executable).name in machine.describe()
