"""The engine in a child process: requests go in, events come out, a pipe each way.

A child, because a CUDA fault cannot be survived in the process it happened in and because importing torch holds
Python's lock for hundreds of milliseconds. The child is a fresh interpreter that imports this module only, never
the window's `__main__`. It reads pickled commands from its standard input and writes pickled (job, event) pairs to
its standard output. When the parent dies, however it dies, the child's input ends and so does the child.

    host = Host()
    host.start()
    host.submit(1, ImageRequest("a red fox"))
    while (arrived := host.receive(timeout_s=1.0)) is None or not isinstance(arrived[1], Final): ...
    host.close()
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from dataclasses import dataclass
from typing import IO, Any

from engine.events import Cancelled, Event, Failed, Final
from engine.folders import repository
from engine.problems import ProblemError, internal_error
from engine.requests import ImageRequest, Request

DETAIL_LINES = 40  # of the child's standard error, kept for the problem's details
CARD_LOST = 4  # exit code of a child whose card failed for good
_CHILD = "from engine.host import serve; serve()"


class EngineStopped(Exception):  # noqa: N818  what the window catches, named for what it says
    """The child died. `detail` holds its exit code and the last lines it wrote to standard error."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


@dataclass(frozen=True, slots=True)
class _Submit:
    job: int
    request: Request


@dataclass(frozen=True, slots=True)
class _Plan:
    job: int
    request: ImageRequest


@dataclass(frozen=True, slots=True)
class _Cancel:
    job: int


class Host:
    """The parent's end. One thread may send while another receives; a closed or dead host can be started again."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._arrived: queue.SimpleQueue[tuple[int, Event] | None] = queue.SimpleQueue()
        self._errors: collections.deque[str] = collections.deque(maxlen=DETAIL_LINES)
        self._sending = threading.Lock()

    @property
    def pid(self) -> int | None:
        """The child's process id while it is alive; live memory is read by it."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def start(self) -> None:
        """Start the child. Returns at once: what is submitted while it still imports waits in the pipe."""
        if self.pid is not None:
            return
        # Waiting threads sleep instead of spinning: as fast on idle cores, and 2.2 s instead of 5 s a picture while
        # another program uses them (measured on two cores).
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        # -P and PYTHONPATH: the child imports this very engine, never a folder of that name where it was started.
        paths = [str(repository()), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"},
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
        self._arrived = queue.SimpleQueue()
        self._errors = collections.deque(maxlen=DETAIL_LINES)
        errors = threading.Thread(
            target=_keep_lines, args=(self._process.stderr, self._errors), name="engine errors", daemon=True
        )
        errors.start()
        events = threading.Thread(
            target=_receive_all,
            args=(self._process.stdout, self._arrived, errors),
            name="engine events",
            daemon=True,
        )
        events.start()

    def submit(self, job: int, request: Request) -> None:
        """Queue a request under a number of the caller's. It will end in exactly one Final, or EngineStopped."""
        self._send(_Submit(job, request))

    def cancel(self, job: int) -> None:
        """Stop a waiting or running job; it ends in Cancelled, unless it had already ended."""
        self._send(_Cancel(job))

    def plan(self, job: int, request: ImageRequest) -> None:
        """Ask what a request would take. Answered by `Planned` (or Failed) even while a picture is being made.

        Where several plans wait, only the newest is answered: sliders ask faster than files are read.
        """
        self._send(_Plan(job, request))

    def receive(self, timeout_s: float) -> tuple[int, Event] | None:
        """The next event and its job, None after `timeout_s` seconds. Raises EngineStopped if the child died."""
        try:
            arrived = self._arrived.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if arrived is None:
            self._arrived.put(None)  # so that every later call says the same
            raise EngineStopped(self._detail())
        return arrived

    def close(self, timeout_s: float = 5.0) -> None:
        """End the child: it is told to, then after `timeout_s` seconds made to."""
        process = self._process
        if process is None:
            return
        with contextlib.suppress(OSError, ValueError):
            if process.stdin is not None:
                process.stdin.close()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # it is dying; a busy machine takes its time
                process.wait(timeout_s)
        self._process = None

    def _send(self, message: object) -> None:
        process = self._process
        if process is None or process.stdin is None:
            raise EngineStopped("The engine was not started.")
        try:
            with self._sending:
                process.stdin.write(pickle.dumps(message))
                process.stdin.flush()
        except (OSError, ValueError):
            raise EngineStopped(self._detail()) from None

    def _detail(self) -> str:
        process = self._process
        if process is None:
            return "The engine was closed."
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
        return "\n".join([f"Exit code {process.poll()}.", *self._errors])


def _receive_all(
    pipe: IO[bytes], arrived: queue.SimpleQueue[tuple[int, Event] | None], errors: threading.Thread
) -> None:
    try:
        while True:
            arrived.put(pickle.load(pipe))
    except (EOFError, pickle.UnpicklingError, OSError, ValueError):
        errors.join(1.0)  # the last words come first
        arrived.put(None)


def _keep_lines(pipe: IO[bytes], kept: collections.deque[str]) -> None:
    with contextlib.suppress(OSError, ValueError):
        for line in pipe:
            kept.append(line.decode("utf-8", "replace").rstrip())
            with contextlib.suppress(OSError, ValueError, AttributeError):
                sys.stderr.write(kept[-1] + "\n")  # None where a window was started without a console


# ----------------------------------------------------------------------------------------------- in the child


def serve() -> None:
    """The child's whole life: run jobs one after another until the parent's pipe ends."""
    commands = os.fdopen(os.dup(0), "rb")
    events = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library that prints must not write between the events
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    faulthandler.enable()
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is the parent's to answer
    _Child(commands, events).run()


class _Child:
    """Three threads: commands are read by one, plans answered by a second, jobs run in the main one."""

    def __init__(self, commands: IO[bytes], events: IO[bytes]) -> None:
        self._commands, self._events = commands, events
        self._sending = threading.Lock()
        self._changed = threading.Condition()  # guards what waits and what runs
        self._waiting: collections.deque[_Submit] = collections.deque()
        self._running: int | None = None
        self._plan: _Plan | None = None
        self._plan_changed = threading.Condition()
        self._engine: Any = None

    def run(self) -> None:
        threading.Thread(target=self._read_commands, name="commands", daemon=True).start()
        from engine.session import Engine

        self._engine = Engine()
        threading.Thread(target=self._answer_plans, name="plans", daemon=True).start()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting))
                task = self._waiting.popleft()
                self._running = task.job
            final: Event | None = None
            try:
                for event in self._engine.run(task.job, task.request):
                    if isinstance(event, Final):
                        final = event
                    else:
                        self._send(task.job, event)
            except Exception:
                final = Failed(internal_error(traceback.format_exc()))
            with self._changed:
                self._running = None
                self._changed.notify_all()
            self._send(task.job, final or Failed(internal_error("The job ended without a result.")))
            if isinstance(final, Failed) and final.ends_engine:
                os._exit(CARD_LOST)  # only another process can use the card again

    def _read_commands(self) -> None:
        try:
            while True:
                self._obey(pickle.load(self._commands))
        except (EOFError, OSError, pickle.UnpicklingError):
            with self._changed:  # the parent closed us or died: no temporary file may stay behind
                self._waiting.clear()
                if self._running is not None:
                    self._engine.cancel(self._running)
                    self._changed.wait_for(lambda: self._running is None, timeout=3.0)
            os._exit(0)

    def _obey(self, command: object) -> None:
        match command:
            case _Submit():
                with self._changed:
                    self._waiting.append(command)
                    self._changed.notify_all()
            case _Plan():
                with self._plan_changed:
                    self._plan = command
                    self._plan_changed.notify()
            case _Cancel(job):
                with self._changed:
                    waiting = [task for task in self._waiting if task.job == job]
                    for task in waiting:
                        self._waiting.remove(task)
                    if self._running == job:
                        self._engine.cancel(job)
                for task in waiting:
                    self._send(task.job, Cancelled())

    def _answer_plans(self) -> None:
        while True:
            with self._plan_changed:
                self._plan_changed.wait_for(lambda: self._plan is not None)
                task, self._plan = self._plan, None
            assert task is not None
            try:
                answer: Event = self._engine.plan(task.request)
            except ProblemError as error:
                answer = Failed(error.problem)
            except Exception:
                answer = Failed(internal_error(traceback.format_exc()))
            self._send(task.job, answer)

    def _send(self, job: int, event: Event) -> None:
        content = pickle.dumps((job, event))
        with contextlib.suppress(OSError), self._sending:  # nobody listens any more: the reader ends the process
            self._events.write(content)
            self._events.flush()
