"""Engine pixels <-> QImage. QImage only: safe off the GUI thread."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PySide6.QtCore import QRectF, QSize, Qt
from PySide6.QtGui import QImage, QImageReader, QPainter

from engine.events import Pixels

MAX_SIDE = 16_384  # a picture file beyond this is not one of ours


def to_qimage(pixels: Pixels) -> QImage:
    """pixels: (H, W, 3) uint8 sRGB. The picture owns its memory. Raises ValueError for another shape or dtype."""
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or 0 in pixels.shape:
        raise ValueError(f"to_qimage: expected (H, W, 3) uint8, got {pixels.shape} {pixels.dtype}")
    height, width, _ = pixels.shape
    data = np.ascontiguousarray(pixels)
    return QImage(data.data, width, height, 3 * width, QImage.Format.Format_RGB888).copy()


def to_pixels(image: QImage) -> Pixels:
    """The same the other way: (H, W, 3) uint8 sRGB, a copy."""
    rgb = image.convertToFormat(QImage.Format.Format_RGB888)
    rows = np.frombuffer(rgb.constBits(), np.uint8).reshape(rgb.height(), rgb.bytesPerLine())
    return rows[:, : 3 * rgb.width()].reshape(rgb.height(), rgb.width(), 3).copy()


def thumbnail(image: QImage, side: int) -> QImage:
    """The middle square of a picture, side x side device pixels."""
    edge = min(image.width(), image.height())
    square = QRectF((image.width() - edge) / 2, (image.height() - edge) / 2, edge, edge)
    if edge > side:  # smooth scaling of the whole beats one linear tap per pixel
        scaled = image.copy(square.toRect()).scaled(
            QSize(side, side), Qt.AspectRatioMode.IgnoreAspectRatio, Qt.TransformationMode.SmoothTransformation
        )
        return scaled.convertToFormat(QImage.Format.Format_RGB32)
    result = QImage(side, side, QImage.Format.Format_RGB32)
    painter = QPainter(result)
    painter.setRenderHint(QPainter.RenderHint.SmoothPixmapTransform)
    painter.drawImage(QRectF(0, 0, side, side), image, square)
    painter.end()
    return result


def load_small(file: str | Path, side: int) -> QImage | None:
    """A thumbnail of a picture file, side x side device pixels, or None where there is none."""
    image = load(file)
    return None if image is None else thumbnail(image, side)


def load(file: str | Path) -> QImage | None:
    """A picture from a file, or None when it is not there or not a picture of sane size."""
    reader = QImageReader(str(file))
    size = reader.size()
    if not size.isValid() or max(size.width(), size.height()) > MAX_SIDE:
        return None
    image = reader.read()
    return None if image.isNull() else image
