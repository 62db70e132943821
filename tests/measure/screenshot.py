"""A picture of the window after it made pictures with the real engine, for the documents.

    python -m tests.measure.screenshot OUT.png [--theme dark|light] [--size 1280x800] [--model NAME|FOLDER]
                                       [--prompt TEXT]... [--seed N] [--lora STRENGTH] [--making STEP] [--kill STEP]

--making: taken while the last picture is at that step; --kill: the engine's process is killed there.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable

from PySide6.QtCore import Qt
from PySide6.QtTest import QTest
from PySide6.QtWidgets import QApplication

from app.__main__ import Program
from engine.requests import BUILT_IN_MODEL

PATIENCE_S = 300


def wait(program: Program, condition: Callable[[], object]) -> None:
    """Until it is so, or something went wrong; the strip that tells it is then in the picture."""
    until = time.monotonic() + PATIENCE_S
    while not condition() and program.generation.trouble is None:
        if time.monotonic() > until:
            generation = program.generation
            program.close()
            sys.exit(f"Not so after {PATIENCE_S} s: {generation.model}, {generation.status()}")
        QTest.qWait(10)


def draw(program: Program, asked: argparse.Namespace) -> None:
    """Type the prompts, wait for the pictures or for the step of the last one."""
    generation, composer = program.generation, program.composer
    wait(program, lambda: generation.model.words.startswith("Ready"))
    composer.set_seed(asked.seed)
    if asked.lora is not None and composer.loras:
        composer.set_strength(composer.loras[0].file, asked.lora)
        composer.switch_lora(composer.loras[0].file, True)
    for prompt in asked.prompt or ["a red fox"]:
        composer.set_prompt(prompt)
        program.page.generate()
    step = asked.making or asked.kill
    if not step:
        wait(program, lambda: not generation.jobs)
        return
    last = generation.jobs[-1]
    wait(program, lambda: (now := generation.running) is not None and now.job is last and now.step >= step)
    if asked.kill and program.engine.pid is not None:
        os.kill(program.engine.pid, signal.SIGTERM if sys.platform == "win32" else signal.SIGKILL)
        wait(program, lambda: False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--theme", choices=["dark", "light"], default="dark")
    parser.add_argument("--size", default="1280x800")
    parser.add_argument("--model", default=BUILT_IN_MODEL)
    parser.add_argument("--prompt", action="append")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lora", type=float)
    parser.add_argument("--making", type=int, default=0)
    parser.add_argument("--kill", type=int, default=0)
    asked = parser.parse_args()
    width, height = (int(side) for side in asked.size.split("x"))
    program = Program(QApplication([]))
    program.theme.follow(Qt.ColorScheme.Light if asked.theme == "light" else Qt.ColorScheme.Dark)
    program.settings.model = asked.model
    program.start()
    program.window.resize(width, height)
    draw(program, asked)
    QTest.qWait(700)  # a sample of the memory
    program.window.grab().save(asked.out)
    program.window.close()
    program.close()
    print(asked.out)


if __name__ == "__main__":
    main()
