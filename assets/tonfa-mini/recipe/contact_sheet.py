"""Pictures side by side with their captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

LINE_PX, TEXT_PX = 12, 28


def contact_sheet(
    pictures: Tensor, captions: Sequence[str], path: Path, columns: int, cell_px: int, colours: int | None = 256
) -> None:
    """pictures (N, 3, H, W) 0 .. 1 -> a PNG; `colours` None keeps full colour. Captions may be empty."""
    if pictures.shape[-1] != cell_px:
        pictures = F.interpolate(pictures.float(), size=(cell_px, cell_px), mode="area")
    pixels = (pictures.float().clamp(0, 1).permute(0, 2, 3, 1).cpu() * 255 + 0.5).byte().numpy()
    text_px = TEXT_PX if captions else 0
    rows = -(-len(pixels) // columns)
    sheet = Image.new("RGB", (columns * (cell_px + 6), rows * (cell_px + text_px + 6)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, picture in enumerate(pixels):
        x, y = i % columns * (cell_px + 6) + 3, i // columns * (cell_px + text_px + 6) + 3
        sheet.paste(Image.fromarray(picture), (x, y))
        if captions:
            for line, words in enumerate(_wrap(captions[i], pen, font, cell_px)[:2]):
                pen.text((x, y + cell_px + 1 + LINE_PX * line), words, font=font, fill="black")
    (sheet.quantize(colours) if colours else sheet).save(path, optimize=True)


def _wrap(
    text: str, pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if pen.textlength(longer, font=font) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
