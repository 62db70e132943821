"""Runs the stages on two GPUs by the clock: `python -m recipe.schedule PLAN --work FOLDER --downloads FOLDER`.

first: data, autoencoder (GPU 0), text encoders and judge (GPU 1), then a short trial of all later stages.
second: data, flow on both GPUs, then distillation (GPU 0) beside a LoRA of the base (GPU 1), then the report beside
a LoRA of the distilled network. A stage starts before its turn, to be compiled when the stage before it ends; they
meet through files.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Turn:
    """A stage: started `start` seconds after the data is there, told to stop training at `stop`."""

    stage: str
    gpus: tuple[int, ...]
    start: float
    stop: float
    options: tuple[str, ...] = ()


def first_plan(total_s: float) -> list[Turn]:
    return [
        Turn("autoencoder", (0,), 0, total_s - 15),
        Turn("text", (1,), 0, 0.40 * total_s),
        Turn("flow", (0, 1), 0.33 * total_s, 0.72 * total_s),
        Turn("distil", (0,), 0.40 * total_s, 0.80 * total_s),
        Turn("lora", (1,), 0.50 * total_s, 0.88 * total_s),
        Turn("report", (0,), 0.60 * total_s, 0),
    ]


def second_plan(total_s: float) -> list[Turn]:
    """`total_s` until the distilled network is exported; the second LoRA ends 85 s later."""
    distil = total_s - 14
    flow = distil - 90
    return [
        Turn("flow", (0, 1), 0, flow),
        Turn("warm", (1,), 0, 0),
        Turn("distil", (0,), flow - 45, distil),
        Turn("lora", (1,), flow - 40, distil + 2, ("--base", "base")),
        Turn("report", (0,), distil - 40, 0),
        Turn("lora", (1,), distil - 30, total_s + 85, ("--base", "distilled")),
    ]


PLANS = {"first": first_plan, "second": second_plan}


def command(args: argparse.Namespace, stage: str) -> list[str]:
    line = [sys.executable, "-m", "recipe", stage, "--work", str(args.work), "--downloads", str(args.downloads)]
    return line + (["--toy"] if args.toy else [])


def start(args: argparse.Namespace, turn: Turn, stop: float) -> list[subprocess.Popen[bytes]]:
    """One process a GPU; each writes its own log."""
    processes = []
    for rank, gpu in enumerate(turn.gpus):
        environment = os.environ | {"GPU": str(gpu), "PYTHONUNBUFFERED": "1"}
        if len(turn.gpus) > 1:
            environment |= {"RANK": str(rank), "WORLD_SIZE": str(len(turn.gpus))}
        log = (args.work / f"{'_'.join((turn.stage, *turn.options[1:]))}_{rank}.log").open("wb")
        line = [*command(args, turn.stage), "--until", str(stop), *turn.options]
        processes.append(subprocess.Popen(line, env=environment, stdout=log, stderr=subprocess.STDOUT))
    print(f"schedule: {turn.stage} started, stops in {stop - time.time():.0f} s", flush=True)
    return processes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plan", choices=sorted(PLANS))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--downloads", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="for everything after the data")
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    begun = time.time()
    if (args.work / "base.pt").exists():
        parser.error(f"{args.work} holds an earlier run; take another folder")
    running = start(args, Turn("prepare", (0,), 0, 0), 0)
    for turn in sorted(PLANS[args.plan](args.seconds), key=lambda turn: turn.start):
        time.sleep(max(0.0, begun + turn.start - time.time()))
        running += start(args, turn, begun + turn.stop)
    codes = [process.wait() for process in running]
    print(f"schedule: done after {time.time() - begun:.0f} s, exit codes {codes}", flush=True)


if __name__ == "__main__":
    main()
