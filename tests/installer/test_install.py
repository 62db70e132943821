"""The file that people run: old Pythons can read it, it needs nothing, and it says what is wrong."""

from __future__ import annotations

import ast
import io
import subprocess
import sys
from pathlib import Path

import pytest

from installer.report import Report, megabytes

ROOT = Path(__file__).resolve().parents[2]
INSTALL = ROOT / "installer" / "install.py"


def run(*words: str, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, **options)


def test_any_python_3_can_read_the_file():
    ast.parse(INSTALL.read_text(), feature_version=(3, 3))


@pytest.mark.parametrize("file", sorted((ROOT / "installer").glob("*.py")), ids=lambda file: file.name)
def test_it_needs_the_standard_library_only(file):
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            assert name.split(".")[0] in {*sys.stdlib_module_names, "installer"}


def pretend_python(version: str, path: str) -> subprocess.CompletedProcess[str]:
    code = (
        f"import sys, runpy; sys.version_info = {version}; sys.argv = ['install.py', '--run']; "
        f"runpy.run_path({str(INSTALL)!r}, run_name='__main__')"
    )
    return run("-c", code, env={"PATH": path})


def test_an_old_python_says_which_one_is_needed(tmp_path):
    done = pretend_python("(3, 8, 10)", path=str(tmp_path))
    assert done.returncode == 3
    assert "Python 3.8 is too old: Tonfa needs 3.11 or newer." in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="makes a shell script")
def test_an_old_python_hands_over_to_a_newer_one(tmp_path):
    newer = tmp_path / "python3.12"
    newer.write_text('#!/bin/sh\necho "newer got $2"\n')
    newer.chmod(0o755)
    done = pretend_python("(3, 8, 10)", path=str(tmp_path))
    assert "going on with" in done.stdout
    assert "newer got --run" in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="makes a shell script")
def test_a_newer_python_that_does_not_start_is_passed_over(tmp_path):
    for name in ("python3.14", "python3.13"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 127\n")
        (tmp_path / name).chmod(0o755)
    assert pretend_python("(3, 8, 10)", path=str(tmp_path)).returncode == 3
    (tmp_path / "python3.11").write_text('#!/bin/sh\n[ "$1" = -c ] || echo "3.11 got $2"\n')
    (tmp_path / "python3.11").chmod(0o755)
    assert "3.11 got --run" in pretend_python("(3, 8, 10)", path=str(tmp_path)).stdout


def test_wrong_words_are_answered_with_the_right_ones():
    done = run(str(INSTALL))
    assert done.returncode == 2
    assert "--run" in done.stderr
    assert "--test" in done.stderr
    assert run(str(INSTALL), "--run", "--test").returncode == 2
    assert run(str(INSTALL), "--help").returncode == 0


def test_steps_are_counted_and_everything_is_in_the_log(tmp_path):
    out = io.StringIO()
    report = Report(tmp_path / "new" / "install.log", steps=2, out=out)
    report.step("Looking")
    report.say("Found it")
    report.moving("12 MB of 80 MB")  # for terminals only
    report.note("for the log")
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("[1/2]")
    assert lines[0].endswith("Looking")
    assert lines[1].strip() == "Found it"
    assert "12 MB" not in out.getvalue()
    assert report.log_text().splitlines()[-2:] == [lines[1], "for the log"]


def test_sizes_are_said_in_words():
    assert [megabytes(13_300_000), megabytes(1_949_000_000)] == ["13 MB", "1.9 GB"]
