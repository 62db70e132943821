"""What comes and what came: Now, how many wait, then today's pictures, newest first."""

from __future__ import annotations

from functools import partial

from PySide6.QtCore import (
    QAbstractItemModel,
    QEvent,
    QMimeData,
    QModelIndex,
    QPersistentModelIndex,
    QPoint,
    QRectF,
    QSize,
    Qt,
    QUrl,
    Signal,
)
from PySide6.QtGui import QColor, QDrag, QImage, QMouseEvent, QPainter, QPaintEvent, QPen, QPixmap
from PySide6.QtWidgets import (
    QAbstractButton,
    QAbstractItemView,
    QHBoxLayout,
    QLabel,
    QListView,
    QStyle,
    QStyledItemDelegate,
    QStyleOptionViewItem,
    QVBoxLayout,
    QWidget,
)

from app import theme
from app.widgets import paint
from app.widgets.button import Button
from app.widgets.menu import Menu

GAP = 10
RADIUS = 8
FILE_ROLE = Qt.ItemDataRole.UserRole + 1  # of the pictures' model: the PNG's path, "" where none was written


def paint_ring(painter: QPainter, area: QRectF, name: str) -> None:
    painter.setBrush(Qt.BrushStyle.NoBrush)
    painter.setPen(QPen(theme.color(name), 2))
    painter.drawRoundedRect(area.adjusted(-3, -3, 3, 3), RADIUS + 3, RADIUS + 3)


class _Delegate(QStyledItemDelegate):
    """Thumbnails without a widget each."""

    def __init__(self, side: int, parent: QWidget) -> None:
        super().__init__(parent)
        self.side = side

    def sizeHint(  # noqa: N802  (Qt's name)
        self, option: QStyleOptionViewItem, index: QModelIndex | QPersistentModelIndex
    ) -> QSize:
        return QSize(self.side + GAP, self.side + GAP)

    def paint(
        self, painter: QPainter, option: QStyleOptionViewItem, index: QModelIndex | QPersistentModelIndex
    ) -> None:
        rect = option.rect
        state = option.state
        area = QRectF(rect.x() + GAP / 2, rect.y() + GAP / 2, self.side, self.side)
        painter.save()
        painter.setRenderHints(QPainter.RenderHint.Antialiasing | QPainter.RenderHint.SmoothPixmapTransform)
        image = index.data(Qt.ItemDataRole.DecorationRole)
        if isinstance(image, QImage):
            paint.rounded_pixmap(painter, area, QPixmap.fromImage(image), RADIUS)
        else:
            paint.ground(painter, area, RADIUS, theme.color("surface"))
        if state & QStyle.StateFlag.State_Selected:
            paint_ring(painter, area, "accent")
        elif state & QStyle.StateFlag.State_MouseOver:
            painter.setPen(QPen(theme.color("control"), 1))
            painter.setBrush(Qt.BrushStyle.NoBrush)
            painter.drawRoundedRect(area.adjusted(0.5, 0.5, -0.5, -0.5), RADIUS, RADIUS)
        painter.restore()


class NowTile(QAbstractButton):
    """The picture that is being made: small preview, ring, step count; a mark when it stopped."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._image: QImage | None = None
        self._step, self._steps, self._mark = 0, 0, ""
        self.setCheckable(True)
        self.setFocusPolicy(Qt.FocusPolicy.TabFocus)
        self.setAccessibleName("Now")

    def set_progress(self, image: QImage | None, step: int, steps: int, mark: str) -> None:
        """mark: "" while it is being made, "stop" where the person stopped it, "error" where something else did."""
        self._image, self._step, self._steps, self._mark = image, step, steps, mark
        words = "Stopped" if mark else f"Step {step} of {steps}" if steps else "Starting"
        self.setAccessibleDescription(words)
        self.setToolTip(words)
        self.update()

    def paintEvent(self, event: QPaintEvent) -> None:  # noqa: N802
        painter = paint.begin(self)
        area = QRectF(self.rect()).adjusted(5, 5, -5, -5)
        if self._image is not None:
            paint.rounded_pixmap(painter, area, QPixmap.fromImage(self._image), RADIUS)
            paint.ground(painter, area, RADIUS, QColor(0, 0, 0, 90))
        else:
            paint.ground(painter, area, RADIUS, theme.color("surface"), theme.color("line"))
        ink = theme.color("on-picture" if self._image is not None else "text")
        middle = area.center()
        if self._mark:
            paint.icon(painter, self._mark, middle, 28, ink)
        else:
            ring = QRectF(0, 0, 44, 44)
            ring.moveCenter(middle)
            faint = QColor(ink)
            faint.setAlphaF(0.3)
            painter.setPen(QPen(faint, 3.5))
            painter.setBrush(Qt.BrushStyle.NoBrush)
            painter.drawEllipse(ring)
            if self._steps:
                painter.setPen(QPen(ink, 3.5, Qt.PenStyle.SolidLine, Qt.PenCapStyle.RoundCap))
                painter.drawArc(ring, 90 * 16, -round(360 * 16 * self._step / self._steps))
                font = theme.figures("caption", 600)
                words = f"{self._step}/{self._steps}"
                paint.text(painter, ring, words, font, ink, Qt.AlignmentFlag.AlignHCenter)
        if self.isChecked():
            paint_ring(painter, area, "danger" if self._mark == "error" else "accent")
        painter.end()


class _Placeholder(QWidget):
    """The dashed place of the first picture."""

    def paintEvent(self, event: QPaintEvent) -> None:  # noqa: N802
        painter = paint.begin(self)
        painter.setPen(QPen(theme.color("control"), 1.25, Qt.PenStyle.DashLine))
        painter.setBrush(Qt.BrushStyle.NoBrush)
        painter.drawRoundedRect(QRectF(self.rect()).adjusted(5.5, 5.5, -5.5, -5.5), RADIUS, RADIUS)
        painter.end()


class _Pictures(QListView):
    """The finished ones. One Tab stop with arrows inside; a tile can be dragged out as its file."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setViewMode(QListView.ViewMode.IconMode)
        self.setMovement(QListView.Movement.Static)
        self.setResizeMode(QListView.ResizeMode.Adjust)
        self.setUniformItemSizes(True)
        self.setSpacing(0)
        self.setMouseTracking(True)
        self.setSelectionMode(QAbstractItemView.SelectionMode.SingleSelection)
        self.setEditTriggers(QAbstractItemView.EditTrigger.NoEditTriggers)
        self.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.setVerticalScrollMode(QAbstractItemView.ScrollMode.ScrollPerPixel)
        self.setVerticalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.setAccessibleName("Pictures of today")
        self._pressed_at: QPoint | None = None

    def mousePressEvent(self, event: QMouseEvent) -> None:  # noqa: N802
        self._pressed_at = event.position().toPoint()
        super().mousePressEvent(event)

    def mouseMoveEvent(self, event: QMouseEvent) -> None:  # noqa: N802
        here = event.position().toPoint()
        if event.buttons() & Qt.MouseButton.LeftButton and self._pressed_at is not None:
            if (here - self._pressed_at).manhattanLength() > 10:
                self._drag(self.indexAt(self._pressed_at))
            return
        super().mouseMoveEvent(event)

    def _drag(self, index: QModelIndex) -> None:
        file = index.data(FILE_ROLE) if index.isValid() else ""
        self._pressed_at = None
        if not file:
            return
        data = QMimeData()
        data.setUrls([QUrl.fromLocalFile(file)])
        drag = QDrag(self)
        drag.setMimeData(data)
        drag.setPixmap(QPixmap.fromImage(index.data(Qt.ItemDataRole.DecorationRole)).scaledToHeight(64))
        drag.exec(Qt.DropAction.CopyAction)


def _heading(words: str) -> QLabel:
    label = QLabel(words)
    label.setFont(theme.font("small", 600))
    return label


class Timeline(QWidget):
    picture_chosen = Signal(int)  # row of the model
    recipe_requested = Signal(int)  # double-click: use this one's recipe
    now_chosen = Signal()
    remove_requested = Signal(int)  # a waiting job
    stop_all_requested = Signal()

    def __init__(self, model: QAbstractItemModel, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._waiting: list[tuple[int, str]] = []
        self.setProperty("ground", "window")
        self.setAttribute(Qt.WidgetAttribute.WA_StyledBackground)
        self._now_title, self._today = _heading("Now"), _heading("Today")
        self.now = NowTile()
        self.waiting = Button("", "secondary", height=36)
        self.waiting.setFont(theme.font("small", 500))
        self.list = _Pictures()
        self.list.setModel(model)
        self._delegate = _Delegate(80, self)
        self.list.setItemDelegate(self._delegate)
        self._placeholder = _Placeholder()
        self._inside = QVBoxLayout(self)
        self._inside.setSpacing(0)
        queue = QHBoxLayout()
        queue.setContentsMargins(GAP // 2, 4, 0, 0)
        queue.addWidget(self.waiting, 0, Qt.AlignmentFlag.AlignLeft)
        for widget in (self._now_title, self.now, queue, self._today, self._placeholder):
            if isinstance(widget, QWidget):
                self._inside.addWidget(widget, 0, Qt.AlignmentFlag.AlignLeft)
            else:
                self._inside.addLayout(widget)
        self._inside.addWidget(self.list, 1)
        self._filler = QWidget()
        self._inside.addWidget(self._filler, 1)
        self._now_title.setContentsMargins(5, 0, 0, 4)
        self.set_side(80, 112)
        self.list.clicked.connect(lambda index: self.picture_chosen.emit(index.row()))
        self.list.doubleClicked.connect(lambda index: self.recipe_requested.emit(index.row()))
        self.list.selectionModel().currentChanged.connect(self._current)
        self.now.clicked.connect(self.now_chosen)
        self.waiting.clicked.connect(self._open_queue)
        model.rowsInserted.connect(lambda *_: self._arrange())
        model.rowsRemoved.connect(lambda *_: self._arrange())
        self.set_now(False, False)
        self.set_waiting([])

    def set_side(self, side: int, width: int) -> None:
        """side: of a thumbnail; width: of the whole timeline. Logical pixels."""
        self.setFixedWidth(width)
        self._delegate.side = side
        margin = (112 - 80) // 2 - GAP // 2 if width >= 112 else 5
        self._inside.setContentsMargins(margin, 15, 0, 0)
        for widget in (self.now, self._placeholder):
            widget.setFixedSize(side + GAP, side + GAP)
        self.waiting.setFixedWidth(side)
        self.list.setGridSize(QSize(side + GAP, side + GAP))
        self.list.setFixedWidth(width - margin)

    # -- what is shown --

    def set_now(self, making: bool, stopped: bool) -> None:
        self._now_title.setText("Stopped" if stopped else "Now")
        self._now_title.setVisible(making or stopped)
        self.now.setVisible(making or stopped)
        self._arrange()

    def set_waiting(self, waiting: list[tuple[int, str]]) -> None:
        """(job, prompt) in the order they will be made."""
        self._waiting = waiting
        self.waiting.setText(f"{len(waiting)} waiting")
        self.waiting.setToolTip("Show what waits, and take things out")
        self.waiting.setVisible(bool(waiting))
        self._arrange()

    def _arrange(self) -> None:
        empty = self.list.model().rowCount() == 0
        self.list.setHidden(empty)
        self._filler.setVisible(empty)
        self._placeholder.setVisible(empty and self.now.isHidden())
        self._today.setHidden(empty and not self.now.isHidden())
        self._today.setContentsMargins(5, 0 if self.now.isHidden() else 14, 0, 4)

    def select(self, row: int | None) -> None:
        """None: the stage shows the one that is being made."""
        self.now.setChecked(row is None)
        selection = self.list.selectionModel()
        if row is None:
            selection.clear()
            return
        index = self.list.model().index(row, 0)
        if index != self.list.currentIndex() or not selection.isSelected(index):
            blocked = selection.blockSignals(True)
            self.list.setCurrentIndex(index)
            selection.blockSignals(blocked)
            self.list.scrollTo(index)
            self.list.viewport().update()

    def _current(self, current: QModelIndex, previous: QModelIndex) -> None:
        if current.isValid() and self.list.hasFocus():
            self.picture_chosen.emit(current.row())

    def _open_queue(self) -> None:
        menu = Menu(self)
        for job, prompt in self._waiting[:12]:
            words = " ".join(prompt.split())
            shown = words if len(words) <= 48 else words[:47] + "…"
            menu.addAction(f"Remove “{shown}”", partial(self.remove_requested.emit, job))
        menu.addSeparator()
        menu.addAction("Stop all\tCtrl+Shift+.", self.stop_all_requested.emit)
        menu.exec(self.waiting.mapToGlobal(self.waiting.rect().bottomLeft()))

    def changeEvent(self, event: QEvent) -> None:  # noqa: N802
        super().changeEvent(event)
        if event.type() == QEvent.Type.PaletteChange and hasattr(self, "list"):
            self.list.viewport().update()

    def paintEvent(self, event: QPaintEvent) -> None:  # noqa: N802
        super().paintEvent(event)
        painter = paint.begin(self)
        painter.fillRect(0, 0, 1, self.height(), theme.color("line"))
        painter.end()
