"""The engine's process: every job ends once, whatever dies; nothing of the window is run in it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from engine.events import Cancelled, Event, Failed, Final, Finished, ImageDone, Planned, StepDone
from engine.folders import repository
from engine.host import EngineStopped, Host
from engine.requests import ImageRequest, InspectRequest
from tests.end_to_end.tiny_bundle import make_tiny_bundle

PATIENCE = 120.0  # for a machine with other work; nothing here waits that long


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_bundle(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def shared_host() -> Iterator[Host]:
    host = Host()
    host.start()
    yield host
    host.close()


@pytest.fixture
def host(shared_host: Host) -> Host:
    shared_host.start()  # a test may have left it dead
    return shared_host


def events_until(host: Host, jobs: set[int]) -> list[tuple[int, Event]]:
    """Everything that arrives until each of `jobs` ended."""
    waiting, events = set(jobs), []
    deadline = time.monotonic() + PATIENCE
    while waiting:
        assert time.monotonic() < deadline, f"jobs {waiting} did not end: {events}"
        arrived = host.receive(timeout_s=1.0)
        if arrived is not None:
            events.append(arrived)
            if isinstance(arrived[1], Final):
                waiting.remove(arrived[0])
    return events


def finals(events: list[tuple[int, Event]]) -> dict[int, Event]:
    return {job: event for job, event in events if isinstance(event, Final)}


def wait_for(condition, what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_a_picture_comes_out_of_the_other_process(host, model):
    host.submit(1, ImageRequest("a red fox", model=model))
    events = events_until(host, {1})
    (done,) = [event for _, event in events if isinstance(event, ImageDone)]
    assert done.pixels.shape == (64, 64, 3)
    assert isinstance(finals(events)[1], Finished)
    assert host.pid is not None
    assert host.pid != os.getpid()


def test_a_problem_comes_as_a_value(host, tmp_path):
    host.submit(2, InspectRequest(str(tmp_path / "missing.safetensors")))
    failed = finals(events_until(host, {2}))[2]
    assert isinstance(failed, Failed)
    assert "missing.safetensors" in failed.problem.what


def test_jobs_run_in_order_and_a_waiting_one_can_be_cancelled(host, model):
    for job in (11, 12, 13):
        host.submit(job, ImageRequest("a cat", model=model, steps=20))
    host.cancel(12)
    events = events_until(host, {11, 12, 13})
    ended = finals(events)
    assert isinstance(ended[11], Finished)
    assert isinstance(ended[12], Cancelled)
    assert isinstance(ended[13], Finished)
    order = [job for job, event in events if isinstance(event, StepDone)]
    assert order == [11] * 20 + [13] * 20


def test_a_running_job_can_be_cancelled_and_the_next_one_is_as_ever(host, model):
    host.submit(21, ImageRequest("a cat", model=model, steps=1000))
    host.submit(22, ImageRequest("a cat", model=model))
    events = []
    while not any(isinstance(event, StepDone) for _, event in events):
        events += [arrived] if (arrived := host.receive(1.0)) else []
    host.cancel(21)
    host.cancel(99)  # there is no such job
    ended = finals(events_until(host, {21, 22}))
    assert isinstance(ended[21], Cancelled)
    assert isinstance(ended[22], Finished)


def test_a_plan_is_answered_while_a_picture_is_being_made(host, model):
    host.submit(31, ImageRequest("a cat", model=model, steps=1000))
    events: list[tuple[int, Event]] = []
    while not any(isinstance(event, StepDone) for _, event in events):
        events += [arrived] if (arrived := host.receive(1.0)) else []
    host.plan(32, ImageRequest("a cat", model=model, steps=30))
    while not any(job == 32 for job, _ in events):
        events += [arrived] if (arrived := host.receive(1.0)) else []
    host.cancel(31)
    assert isinstance(finals(events_until(host, {31}))[31], Cancelled)
    (planned,) = [event for job, event in events if job == 32]
    assert isinstance(planned, Planned)
    assert planned.fits == "fits"
    host.plan(33, ImageRequest("a cat", model="nowhere"))
    assert isinstance(finals(events_until(host, {33}))[33], Failed)


def test_a_dead_child_is_told_once_and_for_all_and_can_be_started_again(host, model):
    host.submit(41, ImageRequest("a cat", model=model, steps=1000))
    while not (arrived := host.receive(1.0)) or not isinstance(arrived[1], StepDone):
        pass
    assert host.pid is not None
    psutil.Process(host.pid).kill()
    with pytest.raises(EngineStopped) as stopped:
        events_until(host, {41})
    assert "Exit code" in stopped.value.detail
    with pytest.raises(EngineStopped):
        host.receive(0.1)
    assert host.pid is None
    host.start()
    host.submit(42, ImageRequest("a cat", model=model))
    assert isinstance(finals(events_until(host, {42}))[42], Finished)


def test_a_child_that_lost_its_card_says_what_happened_and_then_ends(monkeypatch, tmp_path):
    ruined = "from engine import host, jit; jit.card_failure = lambda: 'a fault'; host.serve()"
    monkeypatch.setattr("engine.host._CHILD", ruined)
    host = Host()
    host.start()
    host.submit(51, InspectRequest(str(tmp_path / "missing.safetensors")))
    failed = finals(events_until(host, {51}))[51]
    assert isinstance(failed, Failed)
    assert failed.ends_engine
    assert "The graphics card could not do its work" in failed.problem.what
    with pytest.raises(EngineStopped, match="Exit code 4"):
        events_until(host, {52})
    host.close()


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_crash_tells_where_it_was(host):
    assert host.pid is not None
    wait_for(lambda: psutil.Process(host.pid).num_threads() > 2, "the child did not come up")
    os.kill(host.pid, signal.SIGSEGV)
    with pytest.raises(EngineStopped) as stopped:
        events_until(host, {1})
    assert "Segmentation fault" in stopped.value.detail


def test_close_ends_a_running_job_within_its_time(model, tmp_path):
    host = Host()
    host.start()
    host.submit(1, ImageRequest("a cat", model=model, steps=1000, count=100, out=str(tmp_path)))
    while not (arrived := host.receive(1.0)) or not isinstance(arrived[1], StepDone):
        pass
    pid = host.pid
    assert pid is not None
    started = time.monotonic()
    host.close(timeout_s=PATIENCE)
    assert not psutil.pid_exists(pid)
    assert time.monotonic() - started < PATIENCE
    assert all(path.suffix == ".png" and not path.name.startswith(".") for path in tmp_path.iterdir())
    host.close()  # nothing happens
    with pytest.raises(EngineStopped):
        host.submit(2, ImageRequest("a cat", model=model))


PARENT = """
    import os, sys
    with open({trace!r}, "a") as file:
        file.write(__name__ + "\\n")
    from engine.host import Host

    if __name__ == "__main__":
        host = Host()
        host.start()
        print(host.pid, flush=True)
        sys.stdin.read(1)
        os._exit(9)
"""


def test_the_child_never_runs_the_parents_main_and_dies_with_it(tmp_path):
    trace, script = tmp_path / "trace", tmp_path / "parent.py"
    script.write_text(textwrap.dedent(PARENT).format(trace=str(trace)))
    environment = {**os.environ, "PYTHONPATH": str(repository())}
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=tmp_path
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    wait_for(lambda: psutil.Process(child).num_threads() > 1, "the child did not come up")
    assert trace.read_text().split() == ["__main__"]
    parent.kill()
    parent.wait()
    wait_for(lambda: not psutil.pid_exists(child), "the child outlived its parent")


def test_a_folder_called_engine_where_it_is_started_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "__init__.py").write_text("raise SystemExit('the wrong engine')")
    monkeypatch.chdir(tmp_path)
    host = Host()
    host.start()
    host.submit(1, InspectRequest(str(Path(__file__))))
    assert isinstance(finals(events_until(host, {1}))[1], Finished)
    host.close()


def test_the_window_can_hold_a_host_without_torch():
    code = "import sys; from engine.host import Host; Host(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=repository())
