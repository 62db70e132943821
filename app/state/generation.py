"""From Generate to the picture: which jobs there are, what the running one does, what went wrong.

Turns events into what the page shows. The page reads plain attributes after `changed` (anything) or
`progress_changed` (the running picture only, several times a second).
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Protocol

from PySide6.QtCore import QObject, QTimer, Signal, Slot

from app import images
from app.state import words
from app.state.composer import ComposerState, LoraUse
from app.state.history import History, Picture
from app.state.jobs import Job, ModelState, Running, Trouble
from app.state.memory import MemoryNow
from engine import folders
from engine.events import (
    Cancelled,
    Event,
    Failed,
    Final,
    Finished,
    ImageDone,
    ImageStarted,
    Json,
    Loading,
    Notice,
    Planned,
    Prepared,
    StepDone,
)
from engine.problems import Problem, ProblemError, ProblemKind, engine_stopped, internal_error
from engine.requests import ImageRequest, InspectRequest, PrepareRequest, Request

DOT = "  ·  "
PLAN_AFTER_MS = 150  # of no further change


class Engine(Protocol):
    """What this state needs of `EngineThread`."""

    @property
    def held(self) -> bool: ...
    def submit(self, request: Request, first: bool = False) -> int: ...
    def cancel(self, job: int) -> None: ...
    def plan(self, request: ImageRequest) -> None: ...
    def go_on(self) -> None: ...


class GenerationState(QObject):
    changed = Signal()
    progress_changed = Signal()
    announced = Signal(str)  # for assistive technology: start, every quarter, end; problems at once
    device_known = Signal(str)
    submitted = Signal()  # a picture was asked for

    def __init__(
        self, engine: Engine, composer: ComposerState, history: History, parent: QObject | None = None
    ) -> None:
        super().__init__(parent)
        self._engine, self._composer, self._history = engine, composer, history
        self.jobs: list[Job] = []  # pictures, the running one first
        self.running: Running | None = None
        self.stopped: Running | None = None  # what the strip is about, or what the person stopped
        self.was_stopped = False  # by the person, and nothing was begun since
        self.trouble: Trouble | None = None
        self.notice = ""
        self.planned: Planned | None = None
        self.plan_problem = ""
        self.model = ModelState("Starting")
        self.device = ""
        self.shown: Picture | None = None  # None: the running picture
        self._prepare: tuple[int, PrepareRequest] | None = None
        self._load_began = 0.0
        self._no_model: str | None = None  # why there is none, once that is known
        self._inspected: dict[int, str] = {}  # job -> LoRA file
        self._after_steps_s: dict[tuple[int, int], float] = {}  # size -> decoding, as last measured
        self._plan_timer = QTimer(self)
        self._plan_timer.setSingleShot(True)
        self._plan_timer.setInterval(PLAN_AFTER_MS)
        self._plan_timer.timeout.connect(self._plan)
        self._planned_for: ImageRequest | None = None
        composer.changed.connect(self._plan_timer.start)

    # -- wishes --

    def prepare(self) -> None:
        """Load the chosen model, so that Generate starts at once."""
        card = self._composer.model
        if card is None:
            return
        if self._prepare is not None:
            self._engine.cancel(self._prepare[0])
        request = PrepareRequest(card.model)
        self.model = ModelState("Starting", 0.0)
        self._load_began = time.monotonic()
        self._prepare = (self._engine.submit(request, first=True), request)
        self.changed.emit()

    def generate(self, first: bool = False) -> bool:
        """Ask for what the composer says. False when that is not a request yet."""
        if self._composer.model is None:
            if self._no_model is not None:
                self.say_no_model(self._no_model)
            return False
        if not self._composer.prompt.strip():
            return False
        try:
            request = self._composer.next_request(str(folders.todays_pictures()))
        except ProblemError as error:
            self._raise(error.problem, None)
            return False
        self._submit(request, first)
        return True

    def _submit(self, request: ImageRequest, first: bool = False) -> None:
        self.was_stopped = False
        if self.trouble is None:
            self.stopped = None
        job = Job(self._engine.submit(request, first), request, self._expected_s())
        at = 1 if first and self.jobs and self.running else 0 if first else len(self.jobs)
        self.jobs.insert(at, job)
        if len(self.jobs) == 1:
            self.shown = None
        self._begin_next()
        self.submitted.emit()
        self.changed.emit()

    def stop(self) -> None:
        """Stop this one."""
        if self.running is not None:
            self.running.job.stopping = True
            self._engine.cancel(self.running.job.id)
            self.changed.emit()

    def stop_all(self) -> None:
        for job in reversed(self.jobs):  # from the back, so that nothing else begins in between
            job.stopping = True
            self._engine.cancel(job.id)
        self.changed.emit()

    def remove(self, job: int) -> None:
        """Take a waiting one out of the queue."""
        self._engine.cancel(job)

    def inspect_lora(self, file: str) -> None:
        """Recognise a file by its content; the row says what of it is used."""
        self._inspected[self._engine.submit(InspectRequest(file), first=True)] = file

    def say_no_model(self, reason: str) -> None:
        """There is nothing to make pictures with; `reason` is what is wrong with the model there is, if any."""
        self._no_model = reason
        self.model = ModelState("Not loaded")
        what = reason or "No model was found."
        todo = f"Put a model folder with a {folders.BUNDLE_FILE} into {folders.user_models()} and start again."
        self._raise(Problem(ProblemKind.FILE, what, "" if reason else todo), None)

    def say_bug(self, detail: str) -> None:
        """Something in the window failed that nobody foresaw."""
        self._raise(internal_error(detail), None)

    def answer(self, retry: bool) -> None:
        """The strip was answered: its button (retry) or its close button. The queue goes on either way."""
        trouble, self.trouble, self.stopped = self.trouble, None, None
        if trouble is not None and retry:
            if isinstance(trouble.retry, ImageRequest):
                self._submit(trouble.retry, first=True)
            elif trouble.retry is not None:
                self.prepare()
        self._engine.go_on()
        self._begin_next()
        self.changed.emit()

    def show(self, picture: Picture | None) -> None:
        self.shown = picture
        self.changed.emit()

    def save_copy(self, picture: Picture, target: str) -> None:
        """The PNG with its recipe, byte for byte; a picture that was never written is written now."""
        try:
            if picture.file:
                shutil.copyfile(picture.file, target)
            elif not self._history.image(picture).save(target, b"PNG"):
                raise OSError(f"{target} could not be written.")
        except OSError as error:
            name = Path(target).name
            todo = "Check that the folder may be written to and that the disk is not full."
            self._raise(Problem(ProblemKind.MACHINE, f"{name} was not saved.", todo, str(error)), None)

    # -- events --

    @Slot(int, object)
    def on_event(self, job: int, event: Event) -> None:
        if job in self._inspected:
            self._on_inspect(job, event)
        elif self._prepare is not None and job == self._prepare[0]:
            self._on_prepare(event)
        elif (task := next((one for one in self.jobs if one.id == job), None)) is not None:
            self._on_picture(task, event)

    @Slot(object)
    def on_planned(self, answer: Planned | Failed) -> None:
        if isinstance(answer, Planned):
            self.planned, self.plan_problem = answer, ""
            if self.model.words.startswith("Ready"):
                self._show_ready(self.device)
        else:
            self.planned, self.plan_problem = None, answer.problem.what
        self.changed.emit()

    @Slot(str)
    def on_restarted(self, detail: str) -> None:
        """The engine died and runs again: one sentence, and the model is loaded again."""
        if self.trouble is None:
            self._raise(engine_stopped(detail), None)
        if self.trouble is not None and isinstance(self.trouble.retry, PrepareRequest):
            return  # it died while loading: the person decides whether to try that again
        self.prepare()
        self._planned_for = None
        self._plan_timer.start()

    def _on_prepare(self, event: Event) -> None:
        match event:
            case Loading(what, fraction):
                self._show_loading(what, fraction)
            case Prepared(device=device):
                self._show_ready(device)
            case Failed(problem):
                request = self._prepare[1] if self._prepare else None
                self.model = ModelState("Not loaded")
                self._raise(problem, request)
        if isinstance(event, Final):
            self._prepare = None
            if isinstance(event, Finished) and self.model.loading is not None:
                self._show_ready(self.device)
            if isinstance(event, Cancelled):
                self.model = ModelState("Not loaded")
            self._planned_for = None  # what is loaded changes what a picture needs more
            self._plan_timer.start()
        self.changed.emit()

    def _show_loading(self, what: str, fraction: float) -> None:
        if self.model.loading is None:
            self._load_began = time.monotonic()
        spent = time.monotonic() - self._load_began
        left = spent / fraction * (1 - fraction) if fraction > 0.15 else None
        ready = "" if left is None else f", ready in {words.about(max(1.0, left))}"
        self.model = ModelState(f"Loading{ready}", fraction)

    def _show_ready(self, device: str) -> None:
        self.device = device or self.device
        on_card = self.planned is not None and self.planned.device_bytes > 0
        self.model = ModelState(f"Ready · in {'graphics' if on_card else 'system'} memory")
        if self.device:
            self.device_known.emit(self.device)

    def _on_inspect(self, job: int, event: Event) -> None:
        file = self._inspected[job]
        if isinstance(event, Finished):
            result = event.result
            if result.get("kind") != "lora":
                self._composer.set_lora_use(file, None, f"not a LoRA but: {result.get('kind', 'unknown')}")
            elif not result.get("usable", True):
                self._composer.set_lora_use(file, None, str(result.get("reason") or "made for another model"))
        elif isinstance(event, Failed):
            self._composer.set_lora_use(file, None, event.problem.what)
        if isinstance(event, Final):
            del self._inspected[job]

    def _on_picture(self, job: Job, event: Event) -> None:
        if isinstance(event, Cancelled):
            self._on_stopped(job)
            self._end(job)
            return
        if self.running is None or self.running.job is not job:
            self.running = Running(job, images=job.request.count, steps=job.request.steps or 0)
        now = self.running
        match event:
            case Loading(what, fraction):
                now.loading = what
                self._show_loading(what, fraction)
                self.changed.emit()
            case Prepared(device=device):
                self._show_ready(device)
            case Notice(what):
                self.notice = what
            case ImageStarted(image, images_, seed, steps, width, height):
                now.image, now.images, now.seed, now.steps = image, images_, seed, steps
                now.width, now.height, now.step, now.elapsed_s = width, height, 0, 0.0
                now.preview, now.loading = None, ""
                if self.model.loading is not None:
                    self._show_ready(self.device)
                self.announced.emit(f"Making picture {image} of {images_}" if images_ > 1 else "Making the picture")
                self.changed.emit()
            case StepDone(step=step, steps=steps, elapsed_s=elapsed, preview=preview):
                self._announce_quarter(now.step, step, steps)
                now.step, now.steps, now.elapsed_s = step, steps, elapsed
                if preview is not None:
                    now.preview = images.to_qimage(preview)
                self.progress_changed.emit()
            case ImageDone():
                self._keep(now, event)
            case Finished(result):
                self._learn_lora_use(result)
            case Failed(problem):
                self.stopped = now
                self._raise(problem, job.request)
        if isinstance(event, Final):
            self._end(job)

    def _on_stopped(self, job: Job) -> None:
        """What there was of a stopped picture stays on the stage, unless another one is begun."""
        now = self.running
        if now is None or now.job is not job or any(not one.stopping for one in self.jobs):
            return
        self.was_stopped = True
        if now.preview is not None and self.trouble is None:
            self.stopped = now
        self.announced.emit("Stopped")

    def _keep(self, now: Running, done: ImageDone) -> None:
        """A finished picture enters the timeline; the stage shows it unless the person looks at another one."""
        self._after_steps_s[now.width, now.height] = max(0.0, done.seconds - now.elapsed_s)
        each = None if now.job.predicted_s is None else now.job.predicted_s / max(1, now.images)
        picture = self._history.add(
            images.to_qimage(done.pixels),
            now.job.request,
            seed=done.seed,
            steps=now.steps,
            seconds=done.seconds,
            predicted_s=each,
            file=done.file,
        )
        last = done.image >= done.images and len(self.jobs) == 1
        if self.shown is None and last:
            self.shown = picture
        now.preview = None
        self.announced.emit("Picture done")
        self.changed.emit()

    def _end(self, job: Job) -> None:
        self.jobs.remove(job)
        self.notice = ""
        if self.model.loading is not None and self._prepare is None:
            self.model = ModelState("Not loaded")  # it ended before its model was there
        if self.running is not None and self.running.job is job:
            self.running = None
            if self.stopped is None and not self.jobs and self.shown is None:
                self.shown = self._history.picture(0)
        self._begin_next()
        self._planned_for = None  # measured times are known now
        self._plan_timer.start()
        self.changed.emit()

    def _begin_next(self) -> None:
        """The first of the queue is what the engine works at, unless it was told to wait."""
        if self.running is None and self.jobs and not self._engine.held:
            job = self.jobs[0]
            request = job.request
            card = self._composer.model
            width, height = card.default_size if card else (1, 1)
            self.running = Running(
                job,
                images=request.count,
                steps=request.steps or 0,
                seed=request.seed,
                width=request.width or width,
                height=request.height or height,
            )

    def _learn_lora_use(self, result: Json) -> None:
        for one in result.get("loras", ()):
            unused = tuple((str(key["key"]), str(key["why"])) for key in one.get("keys_unused", ()))
            used = int(one.get("layers_used", one.get("keys_used", 0)))
            layers = int(one.get("layers", used + len(unused)))
            self._composer.set_lora_use(str(one["file"]), LoraUse(used, layers, unused))

    def _announce_quarter(self, before: int, now: int, steps: int) -> None:
        quarter = 4 * now // max(1, steps)
        if quarter != 4 * before // max(1, steps) and 0 < quarter < 4:
            self.announced.emit(f"{25 * quarter} percent")

    def _raise(self, problem: Problem, retry: Request | None) -> None:
        self.trouble = Trouble(problem, retry)
        self.announced.emit(f"{problem.what} {problem.todo}")
        self.changed.emit()

    # -- predictions --

    def _plan(self) -> None:
        """Ask once things have settled, and only when the answer can be another one."""
        try:
            request = self._composer.plan_request()
        except ProblemError as error:
            self.planned, self.plan_problem = None, error.problem.what
            self.changed.emit()
            return
        if request is not None and request != self._planned_for:
            self._planned_for = request
            self._engine.plan(request)

    def _expected_s(self) -> float | None:
        """For the request in the composer. A prediction made while the model loads counts the loading, too."""
        return None if self.planned is None or self.model.loading is not None else self.planned.seconds

    # -- words --

    @property
    def working(self) -> bool:
        return bool(self.jobs)

    @property
    def waiting(self) -> list[Job]:
        return self.jobs[1:] if self.running is not None else list(self.jobs)

    def button(self) -> tuple[str, str]:
        """Words and icon of the main button: the truth about what pressing it does."""
        if self.jobs or (self.trouble is not None and self._engine.held):
            return "Add to queue", "queue"
        if self.model.loading is not None:
            return "Generate when ready", "generate"
        count = self._composer.count
        return (f"Generate {count} pictures" if count > 1 else "Generate"), "generate"

    def status(self) -> tuple[str, str, str]:
        """State in words, what stands beside it, and the tone of the dot."""
        waiting = self.waiting
        if self.trouble is not None:
            beside = f"{len(waiting)} more in the queue" if waiting else ""
            return "Waiting for you", beside, "danger"
        if self.running is not None:
            return self._making_words(), self._waiting_words(waiting), "accent"
        if self.model.loading is not None:
            name = self._composer.model.name if self._composer.model else "the model"
            return f"Loading {name}", "", "accent"
        return ("Stopped" if self.was_stopped else "Ready"), "", "accent"

    def _making_words(self) -> str:
        assert self.running is not None
        if self.running.job.stopping:
            return "Stopping"
        if self.running.loading or self.model.loading is not None:
            return f"Loading {self._composer.model.name if self._composer.model else 'the model'}"
        if self.running.images > 1:
            return f"Making picture {self.running.image} of {self.running.images}"
        return "Making the picture"

    def _waiting_words(self, waiting: list[Job]) -> str:
        if not waiting:
            return self.notice
        known = [job.predicted_s for job in waiting]
        total = sum(one for one in known if one is not None)
        when = f", {words.about(total)}" if None not in known else ""
        return f"{len(waiting)} more waiting{when}"

    def step_words(self) -> tuple[str, str]:
        """Under the picture while it is being made: step and time left; speed."""
        now = self.running or self.stopped
        if now is None:
            return "", ""
        if self.running is None:
            return f"Stopped at step {now.step} of {now.steps}", words.size(now.width, now.height)
        if now.step == 0:
            return (now.loading or "Starting"), words.size(now.width, now.height)
        each = now.elapsed_s / now.step
        left = each * (now.steps - now.step) + self._after_steps_s.get((now.width, now.height), 0.0)
        parts = [f"Step {now.step} of {now.steps}"]
        if now.step < now.steps or left > 0.05:
            parts.append(f"{words.seconds(left)} left")
        return DOT.join(parts), words.speed(now.elapsed_s, now.step)

    def caption(self, picture: Picture) -> tuple[str, str, str]:
        """Under a finished picture: how it was made, the time it took, and the first once more for little room."""
        seed, size = f"Seed {words.number(picture.seed)}", words.size(picture.width, picture.height)
        time_words = "" if picture.seconds is None else words.seconds(picture.seconds)
        if picture.predicted_s is not None:
            time_words += f", predicted {words.seconds(picture.predicted_s)}"
        return DOT.join((seed, words.steps(picture.steps), size)), time_words, DOT.join((seed, size))

    def prediction(self) -> tuple[str, str]:
        """How it fits ("" while unknown), and the sentence."""
        plan = self.planned
        if plan is None:
            return "", self.plan_problem
        sentence = words.prediction(plan.fits, self._needed(), plan.total_bytes, plan.seconds, self._composer.count)
        return plan.fits, sentence

    def memory_bar(self, now: MemoryNow) -> tuple[int, int, int, int]:
        """Bytes: other programs, Tonfa, what the next picture adds at most, all there is."""
        adds = max(0, self._needed() - now.engine) if self.planned is not None else 0
        return now.others, now.ours, adds, now.total

    def _needed(self) -> int:
        return 0 if self.planned is None else self.planned.device_bytes or self.planned.host_bytes
