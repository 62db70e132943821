"""Today's pictures, newest first: a list model with thumbnails, and the full pictures while memory allows."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

from PySide6.QtCore import (
    QAbstractListModel,
    QModelIndex,
    QObject,
    QPersistentModelIndex,
    QRunnable,
    Qt,
    QThreadPool,
    Signal,
    Slot,
)
from PySide6.QtGui import QImage

from app import images
from app.state.earlier import Earlier
from engine.requests import ImageRequest

FILE_ROLE = Qt.ItemDataRole.UserRole + 1
THUMBNAIL_SIDE = 208  # device pixels: sharp at two per logical one
KEPT_BYTES = 256 * 2**20  # of full pictures; older ones are read from their files again
_Index = QModelIndex | QPersistentModelIndex


@dataclass(frozen=True, slots=True)
class Picture:
    """A finished picture: how it was made, where it is."""

    id: int
    request: ImageRequest
    seed: int
    steps: int
    width: int
    height: int
    seconds: float | None  # None where an earlier start of the window made it
    predicted_s: float | None
    file: str  # "" where none was written
    thumbnail: QImage


class _Load(QRunnable):
    """Reads a picture's file on a thread of the pool."""

    class Done(QObject):
        loaded = Signal(int, object)

    def __init__(self, picture: Picture) -> None:
        super().__init__()
        self._picture = picture
        self.done = _Load.Done()

    def run(self) -> None:
        self.done.loaded.emit(self._picture.id, images.load(self._picture.file))


class History(QAbstractListModel):
    """Row 0 is the newest."""

    image_loaded = Signal(int)  # picture id: `image` has it now
    earlier_added = Signal()

    def __init__(self, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._pictures: list[Picture] = []
        self._full: dict[int, QImage] = {}  # in the order of use
        self._loading: set[int] = set()
        self._ids = count(1)

    def add(
        self,
        image: QImage,
        request: ImageRequest,
        *,
        seed: int,
        steps: int,
        seconds: float,
        predicted_s: float | None,
        file: str,
    ) -> Picture:
        picture = Picture(
            next(self._ids),
            request,
            seed,
            steps,
            image.width(),
            image.height(),
            seconds,
            predicted_s,
            file,
            images.thumbnail(image, THUMBNAIL_SIDE),
        )
        self.beginInsertRows(QModelIndex(), 0, 0)
        self._pictures.insert(0, picture)
        self.endInsertRows()
        self._keep(picture.id, image)
        return picture

    @Slot(list)
    def add_earlier(self, found: list[Earlier]) -> None:
        """What was made before this start, newest first; it goes below all others."""
        known = {one.file for one in self._pictures}
        older = [
            Picture(
                next(self._ids),
                one.request,
                one.request.seed,
                one.request.steps or 1,
                one.width,
                one.height,
                None,
                None,
                one.file,
                one.thumbnail,
            )
            for one in found
            if one.file not in known
        ]
        if older:
            self.beginInsertRows(QModelIndex(), len(self._pictures), len(self._pictures) + len(older) - 1)
            self._pictures += older
            self.endInsertRows()
            self.earlier_added.emit()

    def picture(self, row: int) -> Picture | None:
        return self._pictures[row] if 0 <= row < len(self._pictures) else None

    def row_of(self, picture_id: int) -> int | None:
        return next((i for i, one in enumerate(self._pictures) if one.id == picture_id), None)

    def image(self, picture: Picture) -> QImage:
        """The full picture, or its thumbnail while the file is being read (`image_loaded` follows)."""
        if (full := self._full.get(picture.id)) is not None:
            self._keep(picture.id, full)
            return full
        if picture.file and picture.id not in self._loading:
            self._loading.add(picture.id)
            task = _Load(picture)
            task.done.loaded.connect(self._loaded)
            QThreadPool.globalInstance().start(task)
        return picture.thumbnail

    def _loaded(self, picture_id: int, image: QImage | None) -> None:
        if image is not None:  # a file that is gone leaves the thumbnail standing
            self._loading.discard(picture_id)
            self._keep(picture_id, image)
            self.image_loaded.emit(picture_id)

    def _keep(self, picture_id: int, image: QImage) -> None:
        self._full.pop(picture_id, None)
        self._full[picture_id] = image
        files = {one.id: one.file for one in self._pictures}
        while len(self._full) > 1 and sum(one.sizeInBytes() for one in self._full.values()) > KEPT_BYTES:
            oldest = next((one for one in self._full if files.get(one)), None)
            if oldest is None or oldest == picture_id:
                return  # what was never written stays
            del self._full[oldest]

    # -- QAbstractListModel --

    def rowCount(self, parent: _Index = QModelIndex()) -> int:  # noqa: N802, B008  (Qt's name and default)
        return 0 if parent.isValid() else len(self._pictures)

    def data(self, index: _Index, role: int = Qt.ItemDataRole.DisplayRole) -> object:
        picture = self.picture(index.row()) if index.isValid() else None
        if picture is None:
            return None
        match role:
            case Qt.ItemDataRole.DecorationRole:
                return picture.thumbnail
            case Qt.ItemDataRole.AccessibleTextRole | Qt.ItemDataRole.ToolTipRole:
                return picture.request.prompt
            case _ if role == FILE_ROLE:
                return picture.file
        return None
