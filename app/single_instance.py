"""One window per user: a second start raises the first's window and ends."""

from __future__ import annotations

import getpass
import hashlib
import os

from PySide6.QtCore import QLockFile, QObject, QThread, Signal
from PySide6.QtNetwork import QLocalServer, QLocalSocket

from engine import folders

RAISE = b"raise\n"
ANSWER_WITHIN_MS = 500
TRIES = 20


def server_name() -> str:
    """The same for one user and one set of folders, and no other's."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getpid() if not hasattr(os, "getuid") else os.getuid())
    return "tonfa-" + hashlib.sha256(f"{user}|{folders.settings()}".encode()).hexdigest()[:16]


class SingleInstance(QObject):
    """`claim()` says whether this process is the first; `raise_requested` comes from later ones."""

    raise_requested = Signal()

    def __init__(self, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._name = server_name()
        self._lock: QLockFile | None = None
        self._server: QLocalServer | None = None

    def claim(self) -> bool:
        """A lock decides who is first, so that two starts at once do not both win. A stale lock is taken over.

        Where the settings folder cannot be written to there is no lock, and every start is the first.
        """
        folder = folders.settings()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return True
        self._lock = QLockFile(str(folder / "window.lock"))
        self._lock.setStaleLockTime(0)  # only a dead owner makes it stale, however long it runs
        for _ in range(TRIES):
            if self._lock.tryLock(0):
                self._listen()
                return True
            if self._lock.error() == QLockFile.LockError.PermissionError:
                return True
            if self._ask_first():
                return False
            QThread.msleep(100)  # the first is only just starting, or just ending
        return False

    def _listen(self) -> None:
        QLocalServer.removeServer(self._name)  # left by one that was killed; the lock says it is not running
        self._server = QLocalServer(self)
        self._server.setSocketOptions(QLocalServer.SocketOption.UserAccessOption)
        self._server.newConnection.connect(self._answer)
        self._server.listen(self._name)

    def _ask_first(self) -> bool:
        socket = QLocalSocket()
        socket.connectToServer(self._name)
        if not socket.waitForConnected(ANSWER_WITHIN_MS):
            return False
        socket.write(RAISE)
        told = socket.waitForBytesWritten(ANSWER_WITHIN_MS)
        socket.disconnectFromServer()
        return told

    def _answer(self) -> None:
        assert self._server is not None
        while (socket := self._server.nextPendingConnection()) is not None:
            socket.disconnected.connect(socket.deleteLater)
            socket.close()
            self.raise_requested.emit()

    def release(self) -> None:
        if self._server is not None:
            self._server.close()
        if self._lock is not None:
            self._lock.unlock()
