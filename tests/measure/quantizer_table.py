"""What each step of the quantizer buys: errors of every layer, and how near the pictures stay. Prints Markdown.

    python -m tests.measure.quantizer_table BUNDLE [--t5 FILE] [--errors-only]
    python -m tests.measure.quantizer_table --synthetic      the made-up layer with strong outliers of the tests

BUNDLE: a folder with a bundle.json and a 16-bit network. It is converted five times; 16 pictures are drawn
from each file and compared with those of the 16-bit network: same prompts, same seeds. --t5: a 4-bit T5 to
compare as well.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from engine import Engine
from engine.events import Failed, Finished, ImageDone
from engine.monitor import cpu_name
from engine.requests import ImageRequest, Plan, QuantizeRequest

STEPS = ("error_rtn", "error_smooth", "error_svdquant", "error_final")
PROMPTS = (
    "a koala", "an avocado", "a lighthouse", "a penguin in the snow", "a blue teapot", "two frogs",
    "a yellow bus on a green background", "a mushroom on a meadow", "a red umbrella", "a bee", "a sailboat at sea",
    "three cherries", "a violin", "a snowman at night", "a camel in the desert", "a purple butterfly",
)  # fmt: skip


class Conversion(NamedTuple):
    name: str
    fields: dict[str, Any]
    plans: tuple[Plan, ...] = ("w4a16", "w4a4")


CONVERSIONS = (
    Conversion("int4, round to nearest", {"rank": 0, "smooth": False, "rounding": "nearest"}),
    Conversion("int4, smoothed", {"rank": 0, "rounding": "nearest"}),
    Conversion("int4, SVDQuant rank 32", {"rounding": "nearest"}),
    Conversion("int4, SVDQuant rank 32, GPTQ", {}),
    Conversion("nvfp4, SVDQuant rank 32, GPTQ", {"precision": "nvfp4"}),
)


def finish(engine: Engine, request: ImageRequest | QuantizeRequest) -> tuple[dict[str, Any], list[ImageDone]]:
    """Run a request to its end; its result and its pictures."""
    pictures: list[ImageDone] = []
    for event in engine.run(1, request):
        match event:
            case ImageDone():
                pictures.append(event)
            case Failed(problem):
                sys.exit(str(problem))
            case Finished(result):
                return dict(result), pictures
    raise AssertionError("a job ends with a final event")


def with_part(bundle: Path, folder: Path, role: str, file: Path) -> Path:
    """A copy of a bundle in which one part is another file."""
    shutil.copytree(bundle, folder)
    content = json.loads((folder / "bundle.json").read_text("utf-8"))
    part = content["parts"][role]
    shutil.copyfile(file, folder / part["path"])
    part["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (folder / "bundle.json").write_text(json.dumps(content), "utf-8")
    return folder


def draw(engine: Engine, bundle: Path, plan: Plan) -> list[np.ndarray]:
    pictures = []
    for seed, prompt in enumerate(PROMPTS, start=1):
        request = ImageRequest(prompt, model=str(bundle), plan=plan, seed=seed, device="cpu", previews=False)
        pictures += [done.pixels.astype(np.float64) for done in finish(engine, request)[1]]
    engine.unload()
    return pictures


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * math.log10(255**2 / max(float(((a - b) ** 2).mean()), 1e-9))


def likeness(pictures: list[np.ndarray], wide: list[np.ndarray]) -> str:
    values = [psnr_db(a, b) for a, b in zip(pictures, wide, strict=True)]
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def print_errors(name: str, result: dict[str, Any]) -> None:
    layers = result["per_layer"]
    sums = [sum(layer[step] for layer in layers) for step in STEPS]
    print(f"\n## Errors, {name} ({result['seconds']:.0f} s)\n")
    print("| layer | nearest | smoothed | SVDQuant | final |\n| --- | --- | --- | --- | --- |")
    for layer in layers:
        print(f"| {layer['name']} | " + " | ".join(f"{layer[step]:.4f}" for step in STEPS) + " |")
    print("| **sum** | " + " | ".join(f"**{total:.3f}**" for total in sums) + " |")
    print(f"\nThe sums fall from step to step: {'yes' if sums == sorted(sums, reverse=True) else 'NO'}.")
    for before, after, words in (
        ("error_rtn", "error_smooth", "smoothing alone"),
        ("error_smooth", "error_svdquant", "the low-rank branch"),
        ("error_svdquant", "error_final", "the final rounding"),
    ):
        worse = [layer for layer in layers if layer[after] > layer[before]]
        names = [f"{layer['name']} (+{100 * (layer[after] / layer[before] - 1):.1f} %)" for layer in worse]
        print(f"Worse by {words}: {', '.join(names) or 'no layer'}.")


def print_synthetic() -> None:
    """One linear, 256 x 256, every fiftieth channel thirty times as large; errors on rows no step has seen."""
    from engine.quantizer.quantize_layer import Settings, quantize_shared_input
    from tests.engine.quantizer.test_quantize_layer import ROWS, layer

    print("| synthetic layer | nearest | smoothed | SVDQuant | final |\n| --- | --- | --- | --- | --- |")
    for precision in ("int4", "nvfp4"):
        (made,) = quantize_shared_input([layer()], ROWS, Settings(precision, 32, "gptq", smooth=True))
        errors = made.errors
        values = (errors.rtn, errors.smooth, errors.svdquant, errors.final)
        print(f"| {precision}, rank 32 | " + " | ".join(f"{value:.4f}" for value in values) + " |")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("bundle", type=Path, nargs="?")
    arguments.add_argument("--synthetic", action="store_true")
    arguments.add_argument("--t5", type=Path)
    arguments.add_argument("--errors-only", action="store_true")
    chosen = arguments.parse_args()
    if chosen.synthetic:
        print_synthetic()
    if chosen.bundle is None:
        return
    engine = Engine()
    rows: list[str] = []
    print(
        f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {platform.system()}; ", end=""
    )
    print(f"load before: {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        wide = [] if chosen.errors_only else draw(engine, chosen.bundle, "auto")
        for index, conversion in enumerate(CONVERSIONS):
            out = folder / f"{index}.safetensors"
            result, _ = finish(
                engine, QuantizeRequest(str(chosen.bundle), str(out), device="cpu", **conversion.fields)
            )
            if conversion.fields.get("rounding", "gptq") == "gptq":
                print_errors(conversion.name, result)
            if wide:
                made = with_part(chosen.bundle, folder / str(index), "transformer", out)
                found = {plan: likeness(draw(engine, made, plan), wide) for plan in conversion.plans}
                rows.append(f"| {conversion.name} | {found['w4a16']} | {found['w4a4']} |")
        if chosen.t5 and wide:
            made = with_part(chosen.bundle, folder / "t5", "t5", chosen.t5)
            rows.append(f"| 16-bit network, 4-bit T5 | {likeness(draw(engine, made, 'auto'), wide)} | |")
            out = folder / "3.safetensors"
            both = with_part(made, folder / "both", "transformer", out)
            rows.append(
                f"| int4, SVDQuant rank 32, GPTQ, 4-bit T5 | {likeness(draw(engine, both, 'w4a16'), wide)} | |"
            )
    if rows:
        print("\n## Likeness of pictures\n")
        print("| file | w4a16 | w4a4 |\n| --- | --- | --- |\n" + "\n".join(rows))


if __name__ == "__main__":
    main()
