"""The launchers start the right thing from any folder, however it is called."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys

import pytest

from installer.launchers import add_to_menu, desktop_entry, write_launchers

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="runs a shell script")
NAMES = ["tonfa", "My Pictures & more", 'a "quoted" $HOME 100% `x` \\ folder']


def launch(root, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(root / "tonfa.sh"), *arguments]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)


@linux
@pytest.mark.parametrize("name", NAMES)
def test_the_script_starts_the_window_from_anywhere(tmp_path, name):
    root = tmp_path / name
    (root / ".venv" / "bin").mkdir(parents=True)
    write_launchers(root, "linux")
    python = root / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\npwd\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    done = launch(root, "a b")
    assert done.stdout.splitlines() == [str(root), "-m", "app", "a b"]


@linux
def test_before_the_installation_it_says_what_to_run(tmp_path):
    write_launchers(tmp_path, "linux")
    done = launch(tmp_path)
    assert done.returncode == 3
    assert "installer/install.py --run" in done.stderr


def unquote_exec(value: str) -> str:
    """The Desktop Entry Specification backwards: values, then arguments, then field codes."""
    value = value.replace("\\\\", "\\")
    assert value[0] == value[-1] == '"'
    plain, escaped = "", False
    for character in value[1:-1]:
        if character == "\\" and not escaped:
            escaped = True
            continue
        plain, escaped = plain + character, False
    return plain.replace("%%", "%")


@pytest.mark.parametrize("name", NAMES)
def test_the_entry_names_the_script_and_the_icon(tmp_path, name):
    root = tmp_path / name
    parser = configparser.RawConfigParser()
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(desktop_entry(root))
    entry = parser["Desktop Entry"]
    assert unquote_exec(entry["Exec"]) == str(root / "tonfa.sh")
    assert entry["Icon"].endswith("assets/icons/app-icon.svg".replace("/", os.sep))
    assert entry["Terminal"] == "false"


@pytest.mark.skipif(shutil.which("desktop-file-validate") is None, reason="needs desktop-file-utils")
def test_the_desktop_accepts_the_entry(tmp_path):
    root = tmp_path / "with space"
    root.mkdir()
    entry, _ = write_launchers(root, "linux")
    done = subprocess.run(["desktop-file-validate", str(entry)], capture_output=True, text=True, check=False)
    assert done.stdout + done.stderr == ""


@linux
def test_the_menu_entry_goes_where_the_desktop_looks(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert add_to_menu(tmp_path) == tmp_path / "data" / "applications" / "tonfa.desktop"


def test_windows_gets_a_batch_file_with_its_line_ends(tmp_path):
    (batch,) = write_launchers(tmp_path, "win32")
    text = batch.read_bytes()
    assert batch.name == "Tonfa.bat"
    assert text.count(b"\n") == text.count(b"\r\n") > 5
    assert b"pythonw.exe -m app" in text
