"""How long a picture takes and how much memory: from a cold process to the saved PNG, and warm. Prints a table.

    python tests/measure/picture_times.py [MODEL] [--repeat 3] [--threads N]

Cold runs are `python -m engine generate` in fresh processes; where their time goes is read from its own JSON and
from what lies before and after it. Warm runs are one process that draws again and again (--jobs).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from engine.folders import repository
from engine.monitor import cpu_name, cpu_threads

PROMPTS = ("a red fox in the snow", "three green apples", "a pirate ship at sea", "a blue owl", "a house at night")


def run(words: list[str], environment: dict[str, str]) -> tuple[dict[str, Any], float]:
    """The JSON of a finished command, and the seconds its process lived."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "engine", *words, "--json"],
        capture_output=True, text=True, check=False, env=environment, cwd=repository(),
    )  # fmt: skip
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1]), seconds


def imports(environment: dict[str, str]) -> float:
    """Seconds until the engine's module is imported, torch included."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import engine.session"], check=True, env=environment, cwd=repository())
    return time.perf_counter() - started


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("model", nargs="?", default="tonfa-mini")
    arguments.add_argument("--repeat", type=int, default=3)
    arguments.add_argument("--threads", type=int, default=cpu_threads())
    chosen = arguments.parse_args()
    shared = ["--model", chosen.model, "--threads", str(chosen.threads)]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TONFA_HOME": folder}
        print(f"{cpu_name()}, {chosen.threads} threads; load before: {os.getloadavg()[0]:.1f}")
        cold = []
        for index in range(chosen.repeat):
            out = str(Path(folder) / f"cold-{index}.png")
            cold.append(run(["generate", "--prompt", PROMPTS[0], "--out", out, *shared], environment))
        jobs = Path(folder) / "jobs.jsonl"
        lines = [{"prompt": prompt, "out": str(Path(folder) / f"{i}.png")} for i, prompt in enumerate(PROMPTS * 2)]
        jobs.write_text("\n".join(map(json.dumps, lines)), "utf-8")
        warm, _ = run(["generate", "--jobs", str(jobs), *shared], environment)
        first = warm["jobs"][0]
        print(
            f"{first['width']} x {first['height']}, {first['steps']} steps, cfg {first['cfg']:g}, {first['plan']}"
        )
        stages = ("load", "encode", "denoise", "decode")
        print(f"{'':22}" + "".join(f"{name:>9}" for name in ("python", *stages, "rest", "total")))
        importing = imports(environment)
        for number, (result, seconds) in enumerate(cold, start=1):
            told = result["seconds"]
            rest = seconds - importing - sum(told[name] for name in stages)
            row = [importing, *(told[name] for name in stages), rest, seconds]
            print(f"cold process {number:<9}" + "".join(f"{value:8.2f}s" for value in row))
        totals = [job["seconds"] for job in warm["jobs"][len(PROMPTS) :]]
        row = [0.0, *(statistics.median(one[name] for one in totals) for name in stages)]
        total = statistics.median(one["total"] for one in totals)
        print(f"{'warm, known prompt':22}" + "".join(f"{value:8.2f}s" for value in [*row, total - sum(row), total]))
        totals = [job["seconds"] for job in warm["jobs"][1 : len(PROMPTS)]]
        row = [0.0, *(statistics.median(one[name] for one in totals) for name in stages)]
        total = statistics.median(one["total"] for one in totals)
        print(f"{'warm, new prompt':22}" + "".join(f"{value:8.2f}s" for value in [*row, total - sum(row), total]))
        peak = max(job["peak_bytes"]["host"] for job in warm["jobs"])
        print(f"highest resident memory {peak / 2**20:.0f} MiB; load after: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
