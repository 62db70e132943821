"""The queue between the window and the engine's process, with a scripted process in place of the real one.

The real process is driven in test_end_to_end.py; here it dies, hangs and answers exactly when the test says so.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
from PySide6.QtCore import QTimer
from PySide6.QtWidgets import QApplication
from pytestqt.qtbot import QtBot

from app.engine_thread import EngineThread
from engine.events import Cancelled, Event, Failed, Final, Finished, ImageDone, Planned, Prepared
from engine.host import EngineStopped
from engine.problems import Problem, ProblemKind
from engine.requests import ImageRequest, InspectRequest, PrepareRequest, Request

PLANNED = Planned(1, 0, 2, 3, None, "fits")
MEMORY = Failed(Problem(ProblemKind.MEMORY, "It does not fit.", "Choose a smaller size."))


class ScriptedHost:
    """A child that says what the test puts into it."""

    def __init__(self) -> None:
        self.arriving: queue.Queue[tuple[int, Event] | str] = queue.Queue()
        self.submitted: list[tuple[int, Request]] = []
        self.cancelled: list[int] = []
        self.plans: list[tuple[int, ImageRequest]] = []
        self.starts = 0
        self.closed = 0
        self.pid: int | None = None
        self.obeys_cancel = True

    def start(self) -> None:
        self.starts += 1
        self.pid = 1000 + self.starts

    def submit(self, job: int, request: Request) -> None:
        self.submitted.append((job, request))

    def cancel(self, job: int) -> None:
        self.cancelled.append(job)
        if self.obeys_cancel:
            self.arriving.put((job, Cancelled()))

    def plan(self, job: int, request: ImageRequest) -> None:
        self.plans.append((job, request))

    def receive(self, timeout_s: float) -> tuple[int, Event] | None:
        try:
            arrived = self.arriving.get(timeout=min(timeout_s, 0.02))
        except queue.Empty:
            return None
        if isinstance(arrived, str):
            raise EngineStopped(arrived)
        return arrived

    def close(self, timeout_s: float = 5.0) -> None:
        self.closed += 1
        self.pid = None


class Running:
    """An EngineThread with its scripted host and what it said."""

    def __init__(self, qtbot: QtBot) -> None:
        self.host = ScriptedHost()
        self.thread = EngineThread(self.host)
        self.qtbot = qtbot
        self.heard: list[tuple[int, Event]] = []
        self.plans: list[Event] = []
        self.restarts: list[str] = []
        self.thread.event_arrived.connect(lambda job, event: self.heard.append((job, event)))
        self.thread.planned.connect(self.plans.append)
        self.thread.restarted.connect(self.restarts.append)
        self.thread.start()

    def say(self, job: int, event: Event) -> None:
        self.host.arriving.put((job, event))

    def finals(self, job: int) -> list[Event]:
        return [event for one, event in self.heard if one == job and isinstance(event, Final)]

    def wait(self, condition: Callable[[], object]) -> None:
        self.qtbot.waitUntil(lambda: bool(condition()), timeout=5000)


@pytest.fixture
def running(qtbot: QtBot, qapp: QApplication) -> Iterator[Running]:
    it = Running(qtbot)
    yield it
    it.thread.close()
    assert it.thread.isFinished()


def test_one_job_at_a_time_in_the_order_asked(running: Running) -> None:
    first, second = running.thread.submit(ImageRequest("a")), running.thread.submit(ImageRequest("b"))
    running.wait(lambda: [job for job, _ in running.host.submitted] == [first])
    running.say(first, Finished())
    running.wait(lambda: [job for job, _ in running.host.submitted] == [first, second])
    running.say(second, Finished())
    running.wait(lambda: running.finals(second))
    assert running.finals(first) == [Finished()]


def test_first_goes_before_what_waits(running: Running) -> None:
    made = running.thread.submit(ImageRequest("made"))
    running.wait(lambda: running.host.submitted)
    late = running.thread.submit(ImageRequest("late"))
    soon = running.thread.submit(ImageRequest("soon"), first=True)
    running.say(made, Finished())
    running.wait(lambda: len(running.host.submitted) == 2)
    assert running.host.submitted[1][0] == soon
    assert late not in [job for job, _ in running.host.submitted]


def test_a_waiting_job_is_cancelled_without_asking_the_child(running: Running) -> None:
    running.thread.submit(ImageRequest("made"))
    waiting = running.thread.submit(ImageRequest("waits"))
    running.thread.cancel(waiting)
    running.wait(lambda: running.finals(waiting) == [Cancelled()])
    assert running.host.cancelled == []


def test_a_running_job_is_cancelled_by_the_child(running: Running) -> None:
    job = running.thread.submit(ImageRequest("made"))
    running.wait(lambda: running.host.submitted)
    running.thread.cancel(job)
    running.wait(lambda: running.finals(job) == [Cancelled()])
    assert running.host.cancelled == [job]


def test_after_a_failure_pictures_wait_for_the_answer_and_inspecting_does_not(running: Running) -> None:
    bad, waits = running.thread.submit(ImageRequest("bad")), running.thread.submit(ImageRequest("waits"))
    running.wait(lambda: running.host.submitted)
    running.say(bad, MEMORY)
    running.wait(lambda: running.finals(bad) == [MEMORY])
    look = running.thread.submit(InspectRequest("file.safetensors"))
    running.wait(lambda: look in [job for job, _ in running.host.submitted])
    running.say(look, Finished())
    running.wait(lambda: running.finals(look))
    assert running.thread.held
    assert waits not in [job for job, _ in running.host.submitted]
    running.thread.go_on()
    running.wait(lambda: waits in [job for job, _ in running.host.submitted])


def test_a_dead_child_fails_its_job_is_started_again_and_the_queue_stays(running: Running) -> None:
    killed, waits = running.thread.submit(ImageRequest("killed")), running.thread.submit(ImageRequest("waits"))
    running.wait(lambda: running.host.submitted)
    running.host.arriving.put("Exit code -9.")
    running.wait(lambda: running.restarts and running.host.starts == 2)
    (final,) = running.finals(killed)
    assert isinstance(final, Failed)
    assert final.problem.what == "The engine stopped and was started again."
    assert final.problem.detail == "Exit code -9."
    assert running.finals(waits) == []
    running.thread.go_on()
    running.wait(lambda: waits in [job for job, _ in running.host.submitted])
    running.say(waits, Finished())
    running.wait(lambda: running.finals(waits) == [Finished()])


@pytest.mark.parametrize("asked", [PrepareRequest("mini"), ImageRequest("a fox")], ids=["loading", "a picture"])
def test_a_child_that_dies_when_all_was_done_but_to_say_so_fails_nothing(
    running: Running, asked: PrepareRequest | ImageRequest
) -> None:
    """As one does that is killed while it is idle, as far as a person can see."""
    done: Event = Prepared("mini", "cpu", "w4a16", 1.0)
    if isinstance(asked, ImageRequest):
        done = ImageDone(1, 1, 0, np.zeros((1, 1, 3), np.uint8), "", {}, 1.0)
    job = running.thread.submit(asked)
    running.wait(lambda: running.host.submitted)
    running.say(job, done)
    running.host.arriving.put("Exit code -9.")
    running.wait(lambda: running.restarts)
    assert [event for _, event in running.heard] == [done, Finished()]
    assert not running.thread.held
    again = running.thread.submit(PrepareRequest("mini"))
    running.wait(lambda: again in [one for one, _ in running.host.submitted])
    running.host.arriving.put("Exit code -9.")
    running.wait(lambda: running.finals(again))
    assert isinstance(running.finals(again)[0], Failed), "what was done is forgotten with its job"


def test_a_child_that_says_it_ends_gets_nothing_more_and_the_next_one_does(running: Running) -> None:
    broken, look = running.thread.submit(PrepareRequest("mini")), running.thread.submit(InspectRequest("file"))
    running.wait(lambda: running.host.submitted)
    ended = replace(MEMORY, ends_engine=True)
    running.say(broken, ended)
    running.wait(lambda: running.finals(broken) == [ended])
    assert look not in [job for job, _ in running.host.submitted]
    running.host.arriving.put("Exit code 4.")
    running.wait(lambda: look in [job for job, _ in running.host.submitted])
    assert running.finals(look) == []


def test_nothing_on_the_gui_thread_comes_between_a_job_that_died_and_the_restart(running: Running) -> None:
    """A person's answer to the failure would otherwise be followed by the same sentence once more."""
    order: list[str] = []

    def failed(job: int, event: Event) -> None:
        order.append("failed")
        QTimer.singleShot(0, lambda: order.append("answered"))

    running.thread.event_arrived.connect(failed)
    running.thread.restarted.connect(lambda _: order.append("restarted"))
    running.thread.submit(ImageRequest("killed"))
    running.wait(lambda: running.host.submitted)
    running.host.arriving.put("Exit code -9.")
    running.wait(lambda: "answered" in order)
    assert order == ["failed", "restarted", "answered"]


def test_a_child_that_never_says_a_word_is_not_started_for_ever(running: Running) -> None:
    jobs = [running.thread.submit(ImageRequest(words)) for words in ("a", "b", "c")]
    running.host.arriving.put("no torch")
    running.wait(lambda: running.host.starts == 2)
    running.thread.go_on()
    running.host.arriving.put("no torch")
    running.wait(lambda: all(running.finals(job) for job in jobs))
    assert running.host.starts == 2
    last = running.finals(jobs[-1])[0]
    assert isinstance(last, Failed)
    assert last.problem.what == "The engine could not be started."
    again = running.thread.submit(ImageRequest("again"))  # a new wish is a new try
    running.wait(lambda: running.host.starts == 3)
    running.say(again, Finished())
    running.wait(lambda: running.finals(again) == [Finished()])


def test_only_the_newest_plan_is_answered(running: Running) -> None:
    running.wait(lambda: running.host.starts == 1)
    running.thread.plan(ImageRequest("first", steps=1))
    for steps in (2, 3, 4):
        running.thread.plan(ImageRequest("later", steps=steps))
    running.wait(lambda: len(running.host.plans) == 1)
    running.say(running.host.plans[0][0], PLANNED)
    running.wait(lambda: len(running.host.plans) == 2)
    assert running.host.plans[1][1].steps == 4
    assert running.plans == []
    running.say(running.host.plans[1][0], PLANNED)
    running.wait(lambda: running.plans == [PLANNED])


def test_closing_answers_everything_once_and_joins(running: Running) -> None:
    jobs = [running.thread.submit(ImageRequest(words)) for words in ("a", "b", "c")]
    running.wait(lambda: running.host.submitted)
    running.thread.close()
    assert running.thread.isFinished()
    running.wait(lambda: all(running.finals(job) == [Cancelled()] for job in jobs))
    assert running.host.closed == 1
    late = running.thread.submit(ImageRequest("late"))
    running.wait(lambda: running.finals(late) == [Cancelled()])


def test_closing_does_not_wait_for_a_child_that_does_not_listen(running: Running) -> None:
    running.host.obeys_cancel = False
    job = running.thread.submit(ImageRequest("a"))
    running.wait(lambda: running.host.submitted)
    running.thread.close()
    assert running.thread.isFinished()
    running.wait(lambda: running.finals(job) == [Cancelled()])


def test_every_job_of_many_threads_ends_exactly_once(running: Running) -> None:
    jobs: list[int] = []

    def submit() -> None:
        for _ in range(20):
            job = running.thread.submit(ImageRequest("x"))
            jobs.append(job)
            if job % 3 == 0:
                running.thread.cancel(job)

    threads = [threading.Thread(target=submit) for _ in range(4)]
    for thread in threads:
        thread.start()
    answered: set[int] = set()

    def answer_and_count() -> bool:
        for job, _ in list(running.host.submitted):
            if job not in answered:
                answered.add(job)
                running.say(job, Finished())
        return len(jobs) == 80 and all(running.finals(job) for job in jobs)

    running.wait(answer_and_count)
    assert all(len(running.finals(job)) == 1 for job in jobs)
