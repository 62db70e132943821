"""How long the window takes to be up, and how long its thread ever stands still while a model works.

    python -m tests.measure.window start [--times 10]
    python -m tests.measure.window stall --model FOLDER [--pictures 5] [--steps 8]

start: from asking for the process to the end of the first paint of the window, `python -m app` as it is.
stall: a timer of 4 ms in the window's thread while the engine loads the model and makes pictures with previews;
the longest gap between two ticks is how long a click could have waited.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

START = """
import os, sys
from PySide6.QtCore import QEvent, QObject, QTimer
from PySide6.QtWidgets import QApplication
import app.__main__ as program

class Watch(QObject):
    def eventFilter(self, watched, event):
        if event.type() == QEvent.Type.Paint and not self.property("seen"):
            self.setProperty("seen", True)
            QTimer.singleShot(0, told)  # after the paint, not before
        return False

def told():
    print(int("torch" in sys.modules), flush=True)
    os._exit(0)

watch = Watch()
run = QApplication.exec
def patched(*arguments):
    QApplication.instance().installEventFilter(watch)
    return run()
QApplication.exec = patched
program.main()
"""


def start(times: int) -> None:
    taken = []
    for _ in range(times + 1):  # the first fills the disk cache and is not counted
        with tempfile.TemporaryDirectory() as home:
            env = {**os.environ, "TONFA_HOME": home}
            began = time.perf_counter()
            with subprocess.Popen(
                [sys.executable, "-c", START], env=env, stdout=subprocess.PIPE, text=True
            ) as child:
                assert child.stdout is not None
                torch = child.stdout.readline().strip()
                taken.append(time.perf_counter() - began)
        assert torch == "0", "the window must be up before torch"
    counted = sorted(taken[1:])
    print(f"process start to first paint, {times} starts: median {statistics.median(counted):.2f} s, "
          f"fastest {counted[0]:.2f} s, slowest {counted[-1]:.2f} s; torch was never loaded")  # fmt: skip


def stall(model: str, pictures: int, steps: int) -> None:
    from PySide6.QtCore import QTimer
    from PySide6.QtWidgets import QApplication

    from app.__main__ import Program

    app = QApplication([])
    program = Program(app)
    program.settings.model = model
    phases: dict[str, list[float]] = {}
    last = [time.perf_counter()]

    def tick() -> None:
        now = time.perf_counter()
        phases.setdefault(phase(), []).append(now - last[0])
        last[0] = now

    def phase() -> str:
        if program.history.rowCount() >= pictures and not program.generation.jobs:
            return "idle"
        return "making" if program.generation.model.words.startswith("Ready") else "loading"

    def act() -> None:
        if phase() == "making" and not program.generation.jobs and not program.history.rowCount():
            program.composer.set_prompt("a red fox")
            program.composer.set_steps(steps)
            for _ in range(pictures):
                program.page.generate()
        elif len(phases.get("idle", ())) > 500:
            began = time.perf_counter()
            program.window.close()
            program.close()
            print(f"closing: {time.perf_counter() - began:.2f} s")
            app.quit()

    ticks, acts = QTimer(), QTimer()
    ticks.timeout.connect(tick)
    acts.timeout.connect(act)
    program.start()
    ticks.start(4)
    acts.start(200)
    app.exec()
    program.close()
    for name, gaps in phases.items():
        ordered = sorted(gaps)
        print(f"{name}: {len(gaps)} ticks in {sum(gaps):.1f} s, longest gap {1000 * ordered[-1]:.0f} ms, "
              f"99 of 100 below {1000 * ordered[int(0.99 * len(ordered))]:.0f} ms")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    of_start = commands.add_parser("start")
    of_start.add_argument("--times", type=int, default=10)
    of_stall = commands.add_parser("stall")
    of_stall.add_argument("--model", required=True)
    of_stall.add_argument("--pictures", type=int, default=5)
    of_stall.add_argument("--steps", type=int, default=8)
    chosen = parser.parse_args()
    if chosen.command == "start":
        start(chosen.times)
    else:
        stall(chosen.model, chosen.pictures, chosen.steps)


if __name__ == "__main__":
    main()
