"""The background thread that drives the engine's process: requests go in, events come out on the GUI thread.

The queue lives here, not in the child, so that it survives the child. One job at a time is handed over. After a
picture failed the rest waits (`held`) until the person has answered; loading and inspecting go on.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from typing import Protocol

from PySide6.QtCore import QObject, QThread, Signal, Slot

from engine.events import Cancelled, Event, Failed, Final, Finished, ImageDone, Planned, Prepared
from engine.host import EngineStopped
from engine.problems import Problem, ProblemKind, engine_stopped
from engine.requests import ImageRequest, PrepareRequest, Request

LISTEN_S = 0.25  # how long one call of receive waits; sending does not wait for it
FINAL_WITHIN_S = 2.0  # on closing: for the running job to end by itself


class EngineHost(Protocol):
    """What is needed of `engine.host.Host`."""

    @property
    def pid(self) -> int | None: ...
    def start(self) -> None: ...
    def submit(self, job: int, request: Request) -> None: ...
    def cancel(self, job: int) -> None: ...
    def plan(self, job: int, request: ImageRequest) -> None: ...
    def receive(self, timeout_s: float) -> tuple[int, Event] | None: ...
    def close(self, timeout_s: float = 5.0) -> None: ...


def cannot_start(detail: str) -> Problem:
    return Problem(
        ProblemKind.ENGINE,
        what="The engine could not be started.",
        todo="Try again. If it happens once more, copy the details and report them.",
        detail=detail,
    )


class EngineThread(QThread):
    """Every job, waiting or running, ends in exactly one Final, whatever happens to the child."""

    event_arrived = Signal(int, object)  # job id, engine.events.Event
    planned = Signal(object)  # Planned | Failed, for the newest plan
    restarted = Signal(str)  # the child died and a new one runs; details
    _died = Signal(object, object, str)  # the job that ran, if any, and how it ended; details

    def __init__(self, host: EngineHost, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._host = host
        self._lock = threading.RLock()
        self._waiting: deque[tuple[int, Request]] = deque()
        self._running: int | None = None
        self._done = False  # the running job has all it was for; only its Final is missing
        self._last_job = 0
        self._alive = False
        self._ending = False  # the child said that it ends: it gets nothing more
        self._held = False
        self._closing = False
        self._silent_deaths = 0  # one after another, without a word in between
        self._plan_wanted: ImageRequest | None = None
        self._plan_job: int | None = None
        self._died.connect(self._tell_death)

    # -- called on the GUI thread --

    def submit(self, request: Request, first: bool = False) -> int:
        """Put a request into the queue, `first` before all that waits. Returns its job id."""
        with self._lock:
            job = self._next_id()
            if first:
                self._waiting.appendleft((job, request))
            else:
                self._waiting.append((job, request))
            closing = self._closing
            self._hand_over()
        if closing:
            self._cancel_waiting()
        return job

    def cancel(self, job: int) -> None:
        """Stop a waiting or running job; one that has ended already is left alone."""
        with self._lock:
            waiting = [task for task in self._waiting if task[0] == job]
            for task in waiting:
                self._waiting.remove(task)
            if self._running == job:
                with contextlib.suppress(EngineStopped):  # its death ends the job
                    self._host.cancel(job)
        if waiting:
            self.event_arrived.emit(job, Cancelled())

    def plan(self, request: ImageRequest) -> None:
        """Ask what a request would take. Only the newest is answered, by `planned`."""
        with self._lock:
            self._plan_wanted = request
            self._hand_over()

    def go_on(self) -> None:
        """The person has answered the failure: the queue moves again."""
        with self._lock:
            self._held = False
            self._hand_over()

    @property
    def held(self) -> bool:
        return self._held

    @property
    def pid(self) -> int | None:
        """The child's process id, for reading what memory it holds."""
        return self._host.pid

    def close(self, timeout_s: float = 5.0) -> None:
        """Cancel everything, answer what waits, end the child, join."""
        with self._lock:
            self._closing = True
            if self._running is not None:
                with contextlib.suppress(EngineStopped):
                    self._host.cancel(self._running)
        self._cancel_waiting()
        if self.isRunning():
            self.wait(int(timeout_s * 1000))

    # -- the thread --

    def run(self) -> None:
        deadline: float | None = None
        while True:
            if self._closing:
                deadline = deadline or time.monotonic() + FINAL_WITHIN_S
                if self._running is None or time.monotonic() > deadline:
                    break
            if not self._alive and not self._start():
                self.msleep(50)
                continue
            try:
                arrived = self._host.receive(0.05 if self._closing else LISTEN_S)
            except EngineStopped as stopped:
                self._bury(stopped.detail)
                continue
            if arrived is not None:
                self._tell(*arrived)
        self._end()

    def _start(self) -> bool:
        """Start a child where one is wanted: at first, after a death, or when there is work again."""
        with self._lock:
            if self._closing or (self._silent_deaths > 1 and not self._waiting):
                return False
            try:
                self._host.start()
            except OSError as error:
                self._silent_deaths = 2
                self._fail_all(cannot_start(str(error)))
                return False
            self._alive = True
            self._hand_over()
            return True

    def _tell(self, job: int, event: Event) -> None:
        """Pass an event on; whatever ends the running job makes room for the next."""
        with self._lock:
            self._silent_deaths = 0
            if job == self._plan_job:
                self._plan_job = None
                newest = self._plan_wanted is None
                self._hand_over()
                if newest and isinstance(event, Planned | Failed):
                    self.planned.emit(event)
                return
            if job != self._running:
                return
            if isinstance(event, Final):
                self._running = None
                self._held = self._held or (isinstance(event, Failed) and self._holds)
                self._ending = isinstance(event, Failed) and event.ends_engine
            self._done = isinstance(event, Prepared) or (
                isinstance(event, ImageDone) and event.image == event.images
            )
        self.event_arrived.emit(job, event)
        with self._lock:
            self._hand_over()

    def _bury(self, detail: str) -> None:
        """The child died. Its job fails, unless all was done but to say so; a new child starts, the queue stays."""
        with self._lock:
            if self._closing:
                self._alive = False
                if self._running is not None:
                    job, self._running = self._running, None
                    self.event_arrived.emit(job, Cancelled())
                return
            self._host.close(0.1)
            self._alive = self._ending = False
            self._plan_job = None
            self._silent_deaths += 1
            if self._silent_deaths > 1:
                self._fail_all(cannot_start(detail))
                return
            ended, self._running = self._running, None
            self._held = self._held or (ended is not None and self._holds and not self._done)
            final = Finished() if self._done else Failed(engine_stopped(detail))
        self._died.emit(ended, final, detail)

    @Slot(object, object, str)
    def _tell_death(self, job: int | None, final: Final, detail: str) -> None:
        """On the GUI thread, in one go: an answer to the first cannot come before the second."""
        if job is not None:
            self.event_arrived.emit(job, final)
        self.restarted.emit(detail)

    def _fail_all(self, problem: Problem) -> None:
        jobs = ([] if self._running is None else [self._running]) + [job for job, _ in self._waiting]
        self._running, self._held = None, False
        self._waiting.clear()
        for job in jobs:
            self.event_arrived.emit(job, Failed(problem))

    def _end(self) -> None:
        with self._lock:
            if self._running is not None:
                job, self._running = self._running, None
                self.event_arrived.emit(job, Cancelled())
        self._host.close(2.0)

    # -- under the lock --

    def _next_id(self) -> int:
        self._last_job += 1
        return self._last_job

    def _hand_over(self) -> None:
        """Give the child what it may have now. A pipe that broke is noticed by the thread, which ends the job."""
        if not self._alive or self._ending or self._closing:
            return
        if self._plan_wanted is not None and self._plan_job is None:
            request, self._plan_wanted = self._plan_wanted, None
            self._plan_job = self._next_id()
            with contextlib.suppress(EngineStopped):
                self._host.plan(self._plan_job, request)
        if self._running is not None:
            return
        ready = [task for task in self._waiting if not (self._held and isinstance(task[1], ImageRequest))]
        if not ready:
            return
        job, task = ready[0]
        self._waiting.remove((job, task))
        self._running, self._done = job, False
        self._holds = isinstance(task, ImageRequest | PrepareRequest)
        with contextlib.suppress(EngineStopped):
            self._host.submit(job, task)

    _holds = False  # whether a failure of the running job makes the rest wait

    def _cancel_waiting(self) -> None:
        with self._lock:
            jobs = [job for job, _ in self._waiting]
            self._waiting.clear()
        for job in jobs:
            self.event_arrived.emit(job, Cancelled())
