"""The installer from top to bottom: look at the computer, make the environment, then do what was asked."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from installer import environment, machine, packages
from installer.environment import Wanted, clean_environment, python_of
from installer.launchers import add_to_menu, write_launchers
from installer.report import Report, StopError, megabytes

ROOT = Path(__file__).resolve().parent.parent
FIRST_PROMPT = "a red apple"


def main(arguments: list[str]) -> int:
    """Set up and do what was asked. Exit codes: 0, 2 wrong words, 3 this computer cannot, 130 stopped."""
    options = _parse(arguments)
    try:
        machine.check_platform()
        work = machine.check_writable(ROOT)
        report = Report(work / "install.log", steps=5)
        report.note(machine.describe())
        prepare(options, report)
        if options.test:
            return run_tests()
        if options.run:
            return open_window() if window_may_open(report) else make_first_picture(report)
        return 0
    except StopError as stop:
        print(f"\n{stop.what}\n{stop.todo}", file=sys.stderr)
        return 3
    except OSError as error:
        print(f"\nA file could not be used: {error}", file=sys.stderr)
        print("Run this again; it goes on where it stopped.", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on where it was.", file=sys.stderr)
        return 130


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="install.py", description="Sets Tonfa up in its own folder, and starts or tests it."
    )
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--run", action="store_true", help="set up, then open the window")
    asked.add_argument("--test", action="store_true", help="set up with the tests' packages, then run the tests")
    asked.add_argument("--prepare", action="store_true", help="only set up")
    parser.add_argument(
        "--torch-index",
        metavar="URL",
        default="",
        help="take PyTorch from this index; 'auto' lets Tonfa choose again",
    )
    return parser.parse_args(arguments)


# ------------------------------------------------------------------------------------------------------ setting up


def prepare(options: argparse.Namespace, report: Report) -> None:
    """Make the environment fit this computer and this version of Tonfa; takes a moment if it does already."""
    venv = ROOT / ".venv"
    card = machine.ask_driver()
    build = machine.choose_build(card, unused_card=card is None and machine.has_card_without_driver())
    with environment.only_one(ROOT / ".build" / "install.lock", report) as lock:
        have = environment.read_stamp(venv)
        index = options.torch_index or (have.torch_index if have else "")
        index = "" if index == "auto" else index
        wanted = Wanted(build.kind, index, options.test, environment.digest(ROOT))
        if environment.satisfies(have, wanted) and environment.works(venv):
            if options.test or machine.has_display():  # it may have been made where no window was needed
                machine.install_system_packages(report, need_window=True)
        else:
            if have:  # what a person tests with stays when only --run is asked for
                wanted = Wanted(build.kind, index, options.test or have.tests, wanted.digest)
            print(f"Setting up Tonfa in {ROOT}", flush=True)
            _install(venv, build, wanted, report, lock)
        write_launchers(ROOT)


def _install(venv: Path, build: machine.Build, wanted: Wanted, report: Report, lock: int) -> None:
    report.step("Looking at this computer")
    report.say(build.why)
    machine.install_system_packages(report, need_window=wanted.tests or machine.has_display())
    already = environment.size_of(venv)
    free = machine.check_space(ROOT, build.kind, already)
    report.say(f"{megabytes(free)} of disk space are free.")

    report.step("Making the Python environment .venv")
    (venv / environment.STAMP).unlink(missing_ok=True)
    environment.make_venv(venv, report, lock)
    pip = packages.Pip(ROOT, report, lock)
    pip.update_itself()

    version = packages.pinned_torch((ROOT / "installer" / "constraints.txt").read_text(encoding="utf-8"))
    report.step(f"Installing PyTorch {version} for the {'graphics card' if build.kind == 'cuda' else 'processor'}")
    if wanted.torch_index:
        sources = [packages.TorchSource(f"torch=={version}", wanted.torch_index, again=True)]
    else:
        sources = packages.torch_sources(build.kind, version, pip.offered_torch, sys.platform, platform.machine())
    if sources[0].large:
        report.say("Only the large build for graphics cards can be had here; it works without a card too.")
        machine.check_space(ROOT, "cuda", already)
    packages.install_torch(pip, sources, report)

    report.step("Installing the other packages")
    extras = [name for name, needed in (("tests", wanted.tests), ("gpu", build.kind == "cuda")) if needed]
    pip.install("--no-build-isolation", "-e", f".[{','.join(extras)}]" if extras else ".")

    report.step("Checking that everything works")
    packages.check_imports(venv, build, report)
    shutil.rmtree(ROOT / ".build" / "tmp", ignore_errors=True)
    environment.write_stamp(venv, wanted)
    start, *_ = write_launchers(ROOT)
    report.say(f"Ready. From now on {start.name} starts Tonfa.")


# -------------------------------------------------------------------------------------------------- what was asked


def run_tests() -> int:
    """Run the tests without a screen; pytest's closing line is the last one printed. Returns pytest's exit code."""
    processors = os.cpu_count() or 1
    workers = min(4, processors)  # each holds torch and a small model: about 1 GB
    threads = str(max(1, processors // workers))
    quiet = {"QT_QPA_PLATFORM": "offscreen", "OMP_NUM_THREADS": threads}
    command = [str(python_of(ROOT / ".venv")), "-m", "pytest", "-q", "-n", str(workers), "--dist", "worksteal"]
    print(f"Running the tests on {workers} processors", flush=True)
    return subprocess.run(command, cwd=ROOT, env=clean_environment() | quiet, check=False).returncode


def window_may_open(report: Report) -> bool:
    """Whether Qt can open a window here: there is a display server and it answers. Says so if not."""
    if not machine.has_display():
        report.say("There is no display here, so no window can open: making one picture instead.")
        return False
    code = "from PySide6.QtGui import QGuiApplication; QGuiApplication([])"
    command = [str(python_of(ROOT / ".venv")), "-c", code]
    try:
        done = subprocess.run(
            command, env=clean_environment(), capture_output=True, text=True, timeout=30, check=False
        )
        if done.returncode == 0:
            return True
        report.note(done.stderr)
    except subprocess.TimeoutExpired:
        report.note("the display does not answer")
    report.say("The display here cannot be used, so no window can open: making one picture instead.")
    return False


def open_window() -> int:
    """Run the window until it is closed; returns its exit code."""
    if sys.platform.startswith("linux"):
        add_to_menu(ROOT)
    print("Opening the window", flush=True)
    command = [str(python_of(ROOT / ".venv")), "-m", "app"]
    return subprocess.run(command, cwd=ROOT, env=clean_environment(), check=False).returncode


def make_first_picture(report: Report) -> int:
    """Make one picture with the built-in model and print its path. Returns the engine's exit code."""
    python = str(python_of(ROOT / ".venv"))
    where = "from engine.folders import next_picture, todays_pictures; print(next_picture(todays_pictures(), 0))"
    variables = clean_environment()
    asked = subprocess.run(
        [python, "-c", where], cwd=ROOT, env=variables, capture_output=True, text=True, check=False
    )
    if asked.returncode:
        report.note(asked.stderr)
        last = (asked.stderr.strip().splitlines() or [""])[-1]
        raise StopError(
            f"There is no place for pictures. {last}", "Set TONFA_HOME to a folder that may be written to."
        )
    file = asked.stdout.strip()
    command = [python, "-m", "engine", "generate", "--prompt", FIRST_PROMPT, "--out", file, "--json"]
    done = subprocess.run(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True, check=False)
    report.note(done.stdout)
    if done.returncode:
        return done.returncode  # the engine has said what happened, and what to do
    seconds = json.loads(done.stdout.strip().splitlines()[-1])["seconds"]["total"]
    report.say(f'"{FIRST_PROMPT}", made in {seconds:.1f} s. The picture is here:')
    print(file, flush=True)
    return 0
