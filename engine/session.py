"""Engine: holds the device and the loaded model, runs one request at a time, and turns it into events."""

from __future__ import annotations

import gc
import os
import queue
import threading
import traceback
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, TypeVar

import psutil
import torch

from engine import __version__, folders, jit, memory, recipe, timing
from engine.checkpoints.bundle import Bundle, read_bundle
from engine.checkpoints.safetensors_file import unreadable
from engine.device import Device, PlanChoice, choose_device, choose_plan
from engine.events import (
    Cancelled,
    Event,
    Failed,
    Final,
    Finished,
    ImageDone,
    ImageStarted,
    Loading,
    Notice,
    Planned,
    Prepared,
    StepDone,
)
from engine.families.flux import plan_counts
from engine.lora import LoraReport
from engine.monitor import peak_host_bytes
from engine.pipelines.doctor import look_at_machine
from engine.pipelines.foresight import Transformer, model_sizes, read_transformer
from engine.pipelines.inspect_file import inspect_file
from engine.pipelines.loaded_model import LoadedModel
from engine.pipelines.prepare_card import Report
from engine.pipelines.settle import Settled, picture_path, settle
from engine.pipelines.text_to_image import Drawn, Picture, text_to_image
from engine.pipelines.verify_picture import Verification, recipe_differences, request_of, verify_pixels
from engine.pipelines.wishes import check_out
from engine.problems import (
    Problem,
    ProblemError,
    ProblemKind,
    internal_error,
    machine_cannot,
    not_enough_memory,
)
from engine.recipe import Machine, Recipe, UsedFile, UsedLora
from engine.requests import (
    BenchRequest,
    DoctorRequest,
    ImageRequest,
    InspectRequest,
    PrepareRequest,
    QuantizeRequest,
    Request,
    VerifyRequest,
)

T = TypeVar("T")
Work = Generator[Event, None, T]


class _Stopped(Exception):  # noqa: N818  not an error
    """The job was cancelled. Never leaves this file."""


@dataclass(frozen=True, slots=True)
class _Job:
    """What an image request became, before anything is loaded."""

    bundle: Bundle
    transformer: Transformer
    device: Device
    plan: PlanChoice
    settled: Settled


class Engine:
    """Runs requests one at a time. `cancel` and `plan` may be called from other threads meanwhile."""

    def __init__(self) -> None:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to repeat itself
        torch.use_deterministic_algorithms(True, warn_only=True)
        # filling every new buffer costs time and decides nothing
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        jit.set_cache_folder(folders.cache() / "kernels")
        self._default_threads = torch.get_num_threads()
        self._model: LoadedModel | None = None
        self._model_key: tuple[object, ...] = ()
        self._cancelled: set[int] = set()

    # ------------------------------------------------------------------------------------------------ the door

    def run(self, job: int, request: Request) -> Iterator[Event]:
        """Do what is asked; events as it goes, exactly one Final at the end, whatever happens."""
        work = self._work(job, request)
        final: Final | None = None
        while final is None:
            try:
                yield next(work)
            except StopIteration as done:
                final = Finished(done.value)
            except _Stopped:
                final = Cancelled()
            except Exception as error:
                lost = jit.card_failure()  # then this process can use no card any more
                final = Failed(_card_failed(f"{error}\n{lost}") if lost else _problem_of(error), bool(lost))
        self._cancelled.discard(job)
        if not isinstance(final, Finished):
            gc.collect()  # what the stopped work held goes back before the next one is planned
        yield final

    def cancel(self, job: int) -> None:
        """Stop a job, also before it began. It ends in Cancelled within a block on the CPU, a step on a card."""
        self._cancelled.add(job)

    def plan(self, request: ImageRequest) -> Planned:
        """What a request would take, from headers and earlier measurements. Raises ProblemError."""
        job = self._prepared_job(request)
        layout, available, total = self._memory_plan(job)
        first = job.settled.pictures[0]
        predictions = 1 if first.cfg == 1 else 2
        seconds = None
        speed = timing.recall(_speed_key(job, request.threads or self._default_threads))
        if speed is not None:
            model = self._model if self._model_key == _model_key(job) else None
            prompts = {first.prompt} if predictions == 1 else {first.prompt, first.negative}
            missing = sum(1 for prompt in prompts if model is None or not model.has_embeddings(prompt))
            pixels, count = first.width * first.height, len(job.settled.pictures)
            seconds = speed.predict(
                first.steps * count,
                first.num_tokens,
                pixels * count,
                predictions,
                missing,
                loaded=model is not None,
            )
        on_card = job.device.is_cuda
        return Planned(
            host_bytes=memory.PROCESS_BYTES if on_card else layout.peak_bytes,
            device_bytes=layout.peak_bytes if on_card else 0,
            free_bytes=available,
            total_bytes=total,
            seconds=seconds,
            fits="tight" if layout.fits == "moves" and not on_card else layout.fits,
        )

    def unload(self) -> None:
        """Give the model's memory back; the next picture loads it again."""
        if self._model is not None:
            self._model.unload()
        self._model, self._model_key = None, ()
        gc.collect()

    # ----------------------------------------------------------------------------------------------- the tasks

    def _work(self, job: int, request: Request) -> Work[dict[str, Any]]:
        check = self._check_of(job)
        check()
        match request:
            case ImageRequest():
                return (yield from self._images(request, check))
            case PrepareRequest():
                return (yield from self._prepare(request, check))
            case InspectRequest():
                return inspect_file(folders.named_path(request.file), check)
            case VerifyRequest():
                return (yield from self._verify(request, check))
            case DoctorRequest():
                return look_at_machine()
            case BenchRequest():
                return (yield from self._bench(request, check))
            case QuantizeRequest():
                return (yield from self._quantize(job, request))

    def _images(self, request: ImageRequest, check: Callable[[], None]) -> Work[dict[str, Any]]:
        started = perf_counter()
        check_out(request.out)
        job = self._prepared_job(request)
        for notice in job.settled.notices:
            yield Notice(notice)
        model, reports, load_s = yield from self._ready(job, request.threads, check)
        first = job.settled.pictures[0]
        prompts = [first.prompt] if first.cfg == 1 else [first.prompt, first.negative]
        missing = sum(1 for prompt in dict.fromkeys(prompts) if not model.has_embeddings(prompt))
        encode_from = perf_counter()
        yield from _watched(lambda _: model.embeddings(prompts, check))
        encode_s = perf_counter() - encode_from
        files: list[str] = []
        denoise_s = decode_s = 0.0
        for index, picture in enumerate(job.settled.pictures, start=1):
            drawn, file = yield from self._one_image(request, job, model, picture, index, check)
            files += [file] if file else []
            denoise_s, decode_s = denoise_s + drawn.denoise_s, decode_s + drawn.decode_s
        self._remember(job, request, model, encode_s / missing if missing else None, drawn)
        return {
            "out": files,
            "model": job.bundle.card.name,
            "family": job.bundle.card.family,
            "plan": plan_counts(model.network),
            "prompt": first.prompt,
            "negative": first.negative,
            "seed": first.seed,
            "steps": first.steps,
            "width": first.width,
            "height": first.height,
            "guidance": first.guidance,
            "cfg": first.cfg,
            "loras": [_lora_json(report) for report in reports],
            "seconds": {
                "load": round(load_s, 3),
                "encode": round(encode_s, 3),
                "denoise": round(denoise_s, 3),
                "decode": round(decode_s, 3),
                "total": round(perf_counter() - started, 3),
            },
            "peak_bytes": {"host": peak_host_bytes(), "device": _peak_device_bytes(job.device)},
        }

    def _one_image(
        self,
        request: ImageRequest,
        job: _Job,
        model: LoadedModel,
        picture: Picture,
        index: int,
        check: Callable[[], None],
    ) -> Work[tuple[Drawn, str]]:
        images = request.count
        yield ImageStarted(index, images, picture.seed, picture.steps, picture.width, picture.height)
        started = perf_counter()
        for event in text_to_image(model, picture, check):
            if isinstance(event, Drawn):
                break
            elapsed = perf_counter() - started
            yield StepDone(index, images, event.step, picture.steps, elapsed, event.preview)
        else:
            raise AssertionError("text_to_image ends with Drawn")
        seconds = perf_counter() - started
        made = self._recipe(job, model, picture, request.threads, event.decode)
        path, saved, failure = picture_path(request.out, picture.seed, images), "", None
        if path is not None:
            try:
                folders.write_whole(path, recipe.png_bytes(event.pixels, made))
                saved = str(path.absolute())
            except ProblemError as error:
                failure = error  # the picture is shown all the same: no finished work is lost
        yield ImageDone(index, images, picture.seed, event.pixels, saved, made.to_json(), seconds)
        if failure is not None:
            raise failure
        return event, saved

    def _prepare(self, request: PrepareRequest, check: Callable[[], None]) -> Work[dict[str, Any]]:
        image = ImageRequest(
            "-", model=request.model, plan=request.plan, device=request.device, threads=request.threads
        )
        job = self._prepared_job(image)
        model, _, load_s = yield from self._ready(job, request.threads, check)
        yield Prepared(job.bundle.card.name, job.device.name, model.plan.plan, load_s)
        return {"model": job.bundle.card.name, "seconds": {"load": round(load_s, 3)}}

    def _verify(self, request: VerifyRequest, check: Callable[[], None]) -> Work[dict[str, Any]]:
        path = folders.named_path(request.file)
        pixels, texts = recipe.read_png(path)
        told = recipe.recipe_of(texts, path.name)
        image = request_of(told, path.name, request.model)
        job = self._prepared_job(image)
        model, _, _ = yield from self._ready(job, image.threads, check)
        picture = job.settled.pictures[0]
        now = self._recipe(job, model, picture, image.threads, told.decode)
        differs = recipe_differences(told, now)
        for difference in differs:
            yield Notice(str(difference))
        yield ImageStarted(1, 1, picture.seed, picture.steps, picture.width, picture.height)
        started = perf_counter()
        for event in text_to_image(model, picture, check):
            if isinstance(event, Drawn):
                drawn = recipe_differences(told, replace(now, decode=event.decode))
                for difference in drawn:
                    if difference not in differs:  # how it was decoded shows only now
                        yield Notice(str(difference))
                result: Verification = verify_pixels(str(path), pixels, event.pixels, drawn)
                return result.to_json()
            yield StepDone(1, 1, event.step, picture.steps, perf_counter() - started, event.preview)
        raise AssertionError("text_to_image ends with Drawn")

    def _bench(self, request: BenchRequest, check: Callable[[], None]) -> Work[dict[str, Any]]:
        device = choose_device(request.device)
        if not device.is_cuda:
            raise machine_cannot(
                "bench measures graphics cards, and none can be used here.", "See doctor for what is missing."
            )
        from engine.pipelines.bench import bench

        self.unload()
        torch.cuda.set_device(device.torch_name)
        return (
            yield from _watched(lambda report: bench(device, request.shapes, request.step, _checked(report, check)))
        )

    def _quantize(self, job: int, request: QuantizeRequest) -> Work[dict[str, Any]]:
        from engine.quantizer.quantize_model import quantize_model

        self.unload()  # a block of the 16-bit network wants the room
        for event in quantize_model(request, cancelled=lambda: job in self._cancelled):
            match event:
                case Finished(result):
                    return dict(result)
                case Cancelled():
                    raise _Stopped
                case Failed(problem):
                    raise ProblemError(problem)
                case _:
                    yield event
        raise AssertionError("quantize_model ends with a final event")

    # ------------------------------------------------------------------------------------------------- pieces

    def _check_of(self, job: int) -> Callable[[], None]:
        def check() -> None:
            if job in self._cancelled:
                raise _Stopped

        return check

    def _prepared_job(self, request: ImageRequest) -> _Job:
        """Find, read headers, settle. Loads no weights."""
        bundle = read_bundle(folders.find_model(request.model))
        transformer = read_transformer(bundle)
        device = choose_device(request.device)
        plan = choose_plan(device, transformer.precision, request.plan)
        settled = settle(request, bundle, transformer.config.guidance_embeds)
        return _Job(bundle, transformer, device, plan, settled)

    def _memory_plan(self, job: _Job) -> tuple[memory.MemoryPlan, int, int]:
        """The plan, the bytes this process may have in the memory that decides, and that memory's size."""
        sizes = model_sizes(job.bundle, job.transformer, job.settled, job.device, job.plan)
        first = job.settled.pictures[0]
        if job.device.is_cuda:
            free, total = torch.cuda.mem_get_info(job.device.torch_name)
            available, process = free + torch.cuda.memory_reserved(job.device.torch_name), 0
        else:
            system = psutil.virtual_memory()
            available, total = system.available + psutil.Process().memory_info().rss, system.total
            process = memory.PROCESS_BYTES
        predictions = 1 if first.cfg == 1 else 2
        return memory.plan(sizes, first.width, first.height, predictions, available, process), available, total

    def _ready(
        self, job: _Job, threads: int | None, check: Callable[[], None]
    ) -> Work[tuple[LoadedModel, list[LoraReport], float]]:
        """The job's model in memory with its LoRAs on, loaded now if it was not. Returns the seconds that took."""
        torch.set_num_threads(threads or self._default_threads)
        if job.device.is_cuda:
            torch.cuda.set_device(job.device.torch_name)  # a thread's own; kernels run on the current one
        started = perf_counter()
        layout, available, _ = self._memory_plan(job)
        if layout.fits == "too large":
            where = "graphics memory" if job.device.is_cuda else "memory"
            raise ProblemError(not_enough_memory(layout.peak_bytes / 2**30, available / 2**30, where))
        if self._model is None or self._model_key != _model_key(job):
            self.unload()
            model = LoadedModel(job.bundle, job.device, job.plan, layout.keep_all)

            def load(report: Report) -> None:
                told = _checked(report, check)
                for role in (*job.bundle.weights, *job.bundle.tokenizers):
                    told(f"Checking {job.bundle.card.name}", 0.0)
                    job.bundle.part_hash(role, check)
                model.load(told)

            try:
                yield from _watched(load)
            except BaseException:
                model.unload()
                raise
            self._model, self._model_key = model, _model_key(job)
            if job.plan.notice:
                yield Notice(job.plan.notice)
        model = self._model
        choices = [(str(lora.path), lora.strength) for lora in job.settled.loras]

        def put_on(_: Report) -> list[LoraReport]:
            for lora in job.settled.loras:
                job.bundle.lora_hash(lora.path, check)
            return model.set_loras(choices)

        reports = yield from _watched(put_on)
        check()
        yield from _watched(lambda report: model.prepare(job.settled.pictures[0], _checked(report, check)))
        return model, reports, perf_counter() - started

    def _recipe(self, job: _Job, model: LoadedModel, picture: Picture, threads: int | None, decode: str) -> Recipe:
        on_card = job.device.is_cuda
        files = {role: part.path for role, part in job.bundle.weights.items()}
        files |= {role: part.part.path for role, part in job.bundle.tokenizers.items()}
        return Recipe(
            prompt=picture.prompt,
            negative=picture.negative,
            seed=picture.seed,
            noise=picture.noise,
            width=picture.width,
            height=picture.height,
            sampler="euler",
            steps=picture.steps,
            shift=job.bundle.shift,
            guidance=picture.guidance,
            cfg=picture.cfg,
            plan=job.plan.plan if job.transformer.precision else "bf16",
            dtype=job.device.dtype,
            attention=model.attention_of(picture),
            decode=decode,
            model=job.bundle.card.name,
            family=job.bundle.card.family,
            model_version=job.bundle.card.version,
            files={role: UsedFile(path.name, job.bundle.part_hash(role)) for role, path in files.items()},
            machine=Machine(
                card=job.device.name if on_card else f"cpu: {job.device.name}",
                driver=job.device.driver,
                torch=torch.__version__,
                kernels=jit.kernels_version() if on_card else "",
                threads=0 if on_card else (threads or self._default_threads),
            ),
            program=__version__,
            loras=tuple(
                UsedLora(one.name, job.bundle.lora_hash(one.path), one.strength) for one in job.settled.loras
            ),
        )

    def _remember(
        self, job: _Job, request: ImageRequest, model: LoadedModel, encode_s: float | None, drawn: Drawn
    ) -> None:
        """Keep what this machine needed, for the next prediction."""
        key = _speed_key(job, request.threads or self._default_threads)
        known = timing.recall(key)
        if encode_s is None:
            encode_s = known.encode if known else 0.0
        picture = job.settled.pictures[-1]
        predictions = 1 if picture.cfg == 1 else 2
        step_token = drawn.denoise_s / (picture.steps * picture.num_tokens * predictions)
        decode_pixel = drawn.decode_s / (picture.width * picture.height)
        timing.remember(key, timing.Speed(model.load_seconds, encode_s, step_token, decode_pixel))


def _watched(work: Callable[[Report], T]) -> Work[T]:
    """Run `work` beside this generator, so that what it reports arrives as Loading events while it works."""
    events: queue.SimpleQueue[Loading | None] = queue.SimpleQueue()
    results: list[T] = []
    errors: list[BaseException] = []
    abandoned = threading.Event()
    last = [-1.0]

    def report(what: str, fraction: float) -> None:
        if abandoned.is_set():
            raise _Stopped
        if fraction - last[0] >= 0.01 or (fraction in (0.0, 1.0) and fraction != last[0]):
            last[0] = fraction
            events.put(Loading(what, fraction))

    card = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> None:
        try:
            if card is not None:
                torch.cuda.set_device(card)
            with torch.no_grad():  # the mode is a thread's own
                results.append(work(report))
        except BaseException as error:
            errors.append(error)
        finally:
            events.put(None)

    thread = threading.Thread(target=run, name="engine work", daemon=True)
    thread.start()
    try:
        while (event := events.get()) is not None:
            yield event
    finally:
        abandoned.set()
        thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _checked(report: Report, check: Callable[[], None]) -> Report:
    """`report`, and a chance to stop."""

    def told(what: str, fraction: float) -> None:
        check()
        report(what, fraction)

    return told


def _model_key(job: _Job) -> tuple[object, ...]:
    """Equal for two jobs that can use the same loaded model; files that were replaced make another one."""
    stamps = []
    for part in [*job.bundle.weights.values(), *(one.part for one in job.bundle.tokenizers.values())]:
        try:
            stat = part.path.stat()
        except OSError as error:
            raise unreadable(part.path, error) from None
        stamps.append((str(part.path), stat.st_size, stat.st_mtime_ns))
    return (job.bundle.card.folder, job.device, job.plan.plan, *stamps)


def _speed_key(job: _Job, threads: int) -> str:
    where = job.device.name if job.device.is_cuda else f"cpu x {threads}"
    return f"{job.bundle.card.name} {job.bundle.card.version} | {job.plan.plan} | {where}"


def _lora_json(report: LoraReport) -> dict[str, Any]:
    return {
        "file": report.file,
        "strength": report.strength,
        "keys_used": report.keys_used,
        "keys_unused": [{"key": one.key, "why": one.why} for one in report.keys_unused],
        "layers_used": report.layers_used,
        "layers": report.layers,
    }


def _peak_device_bytes(device: Device) -> int:
    return int(torch.cuda.max_memory_allocated(device.torch_name)) if device.is_cuda else 0


def _problem_of(error: Exception) -> Problem:
    """A failure as a person can act on it; what is none of those is our bug."""
    match error:
        case ProblemError():
            return error.problem
        case torch.OutOfMemoryError() | MemoryError():
            return _out_of_memory(str(error))
        case jit.KernelError():
            return _card_failed(str(error))
        case RuntimeError() if memory.NO_MEMORY_WORDS in str(error):
            return _out_of_memory(str(error))
    return internal_error("".join(traceback.format_exception(error)))


def _card_failed(detail: str) -> Problem:
    return machine_cannot(
        "The graphics card could not do its work.",
        "Try again; if it happens again, update NVIDIA's driver or choose the device cpu.",
        detail,
    ).problem


def _out_of_memory(detail: str) -> Problem:
    return Problem(
        ProblemKind.MEMORY,
        what="The memory did not suffice for this picture.",
        todo="Choose a smaller size, or close other programs that use the memory.",
        detail=detail,
    )
