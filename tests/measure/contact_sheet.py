"""Draw a contact sheet with the built-in model, through the engine's process as the window does it.

    python -m tests.measure.contact_sheet prompts docs/measured/contact-sheet.webp
    python -m tests.measure.contact_sheet lora    docs/measured/lora-strengths.webp

`prompts` draws 24 varied prompts, one seed each and never a chosen one: prompt number i gets seed i. `lora` draws
five prompts at the strengths 0, 0.25, 0.5, 0.75 and 1 of the model's first LoRA, the same seed along a row.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from engine.events import Failed, Final, ImageDone, Pixels
from engine.folders import list_models
from engine.host import Host
from engine.requests import BUILT_IN_MODEL, ImageRequest, LoraChoice

LABEL_PX = 22
GAP_PX = 8
PROMPTS = (
    "a red apple", "a fox", "a cat", "an elephant", "a rocket", "a pizza",
    "a birthday cake", "a penguin", "a grinning face", "an umbrella", "a guitar", "a house",
    "a dog on a blue background", "a strawberry on a pink background", "a robot on a yellow background",
    "a purple cat", "a green car", "a blue bird",
    "two dogs", "three strawberries", "four balloons",
    "a sailboat at sunset", "an owl at night", "a rocket in space",
)  # fmt: skip
LORA_PROMPTS = ("a red apple", "a fox", "a rocket", "a penguin on a blue background", "a pizza")
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def draw(requests: Sequence[ImageRequest]) -> list[Pixels]:
    """One picture a request, (H, W, 3) uint8; stops with the engine's words if one fails."""
    host = Host()
    host.start()
    pictures = []
    try:
        for job, request in enumerate(requests):
            host.submit(job, request)
            event = None
            while not isinstance(event, Final):
                arrived = host.receive(timeout_s=60.0)
                event = arrived[1] if arrived else None
                if isinstance(event, Failed):
                    raise SystemExit(str(event.problem))
                if isinstance(event, ImageDone):
                    pictures.append(event.pixels)
    finally:
        host.close()
    return pictures


def lay_out(pictures: Sequence[Pixels], labels: Sequence[str], columns: int) -> Image.Image:
    """A grid of pictures of one size, each with its label below."""
    height, width = pictures[0].shape[:2]
    rows = -(-len(pictures) // columns)
    cell_width, cell_height = width + GAP_PX, height + LABEL_PX + GAP_PX
    sheet = Image.new("RGB", (columns * cell_width + GAP_PX, rows * cell_height + GAP_PX), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for index, (pixels, label) in enumerate(zip(pictures, labels, strict=True)):
        x = GAP_PX + index % columns * cell_width
        y = GAP_PX + index // columns * cell_height
        sheet.paste(Image.fromarray(pixels), (x, y))
        pen.text((x, y + height + 3), label, fill="black", font=font)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=["prompts", "lora"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default=BUILT_IN_MODEL)
    options = parser.parse_args()
    if options.what == "prompts":
        requests = [
            ImageRequest(prompt, seed=seed, model=options.model, previews=False)
            for seed, prompt in enumerate(PROMPTS)
        ]
        labels, columns = [f"{request.prompt} ({request.seed})" for request in requests], 6
    else:
        card = next(card for card in list_models() if options.model in (card.model, card.name))
        lora = card.loras[0]
        cells = [(prompt, seed, s) for seed, prompt in enumerate(LORA_PROMPTS) for s in STRENGTHS]
        requests = [
            ImageRequest(prompt, seed=seed, model=options.model, loras=(LoraChoice(lora.name, s),), previews=False)
            for prompt, seed, s in cells
        ]
        labels, columns = [f"{prompt}, {s:g}" for prompt, _, s in cells], len(STRENGTHS)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lay_out(draw(requests), labels, columns).save(options.out, quality=90)
    print(options.out)


if __name__ == "__main__":
    main()
