"""What starts Tonfa by a double-click: a script beside the README and an entry in the applications menu."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_SCRIPT = """\
#!/bin/sh
# Opens Tonfa's window. Written by installer/install.py.
here=$(CDPATH= cd -- "$(dirname -- "$(readlink -f -- "$0")")" && pwd) || exit 1
if [ ! -x "$here/.venv/bin/python" ]; then
    echo "Tonfa is not set up yet. Run: python3 installer/install.py --run" >&2
    exit 3
fi
unset PYTHONPATH PYTHONHOME
cd "$here" && exec .venv/bin/python -m app "$@"
"""

_BATCH = """\
@echo off
rem Opens Tonfa's window. Written by installer/install.py.
cd /d "%~dp0"
set PYTHONPATH=
set PYTHONHOME=
if not exist .venv\\Scripts\\pythonw.exe (
    echo Tonfa is not set up yet. Run: py installer\\install.py --run
    pause
    exit /b 3
)
start "" .venv\\Scripts\\pythonw.exe -m app %*
"""


def write_launchers(root: Path, system: str = sys.platform) -> list[Path]:
    """Write the launchers into `root`; returns their paths, the one to double-click first."""
    if system == "win32":
        return [_write(root / "Tonfa.bat", _BATCH.replace("\n", "\r\n"))]
    script = _write(root / "tonfa.sh", _SCRIPT, executable=True)
    return [_write(root / "Tonfa.desktop", desktop_entry(root), executable=True), script]


def add_to_menu(root: Path) -> Path:
    """Linux: put Tonfa into this user's applications menu; returns the entry's path."""
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    menu = data / "applications"
    menu.mkdir(parents=True, exist_ok=True)
    return _write(menu / "tonfa.desktop", desktop_entry(root))


def desktop_entry(root: Path) -> str:
    """The text of a .desktop file for the Tonfa in `root` (freedesktop.org's Desktop Entry Specification 1.4)."""
    icon = root / "assets" / "icons" / "app-icon.svg"
    return "\n".join(
        [
            "[Desktop Entry]",
            "Type=Application",
            "Version=1.4",
            "Name=Tonfa",
            "GenericName=Picture Maker",
            "Comment=Make pictures from words on your own computer",
            f"Exec={_exec(root / 'tonfa.sh')}",
            f"Path={_value(str(root))}",
            f"Icon={_value(str(icon))}",
            "Terminal=false",
            "Categories=Graphics;2DGraphics;RasterGraphics;",
            "Keywords=image;picture;AI;diffusion;",
            "",
        ]
    )


def _value(text: str) -> str:
    """Escape a string value: backslash and line breaks."""
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")


def _exec(program: Path) -> str:
    """Quote one argument of Exec: the quoting of arguments, then the escaping of values; % is a field code."""
    quoted = "".join("\\" + character if character in '"`$\\' else character for character in str(program))
    return _value(f'"{quoted.replace("%", "%%")}"')


def _write(path: Path, text: str, executable: bool = False) -> Path:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(text.encode())
    if executable:
        temporary.chmod(0o755)
    os.replace(temporary, path)
    return path
