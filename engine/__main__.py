"""The command line: generate, inspect, quantize, verify, bench, doctor. The window's engine, without a window.

    tonfa generate --prompt "a red fox" --out fox.png

Progress and problems go to standard error. With --json the last line of standard output is one JSON object, also
for errors; its shape is in engine/cli.schema.json. Exit codes: 0; 2 bad request or damaged file; 3 this machine
cannot; 130 cancelled; 1 a bug of ours.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from engine import __version__
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
    QuantizeProgress,
    StepDone,
)
from engine.folders import (
    assets,
    cache,
    check_regular,
    discard_unfinished,
    list_models,
    models_folders,
    named_path,
    pictures,
)
from engine.problems import EXIT_CODE, Problem, ProblemError, bad_file, bad_request, internal_error
from engine.requests import (
    BUILT_IN_MODEL,
    BenchRequest,
    DoctorRequest,
    ImageRequest,
    InspectRequest,
    LoraChoice,
    QuantizeRequest,
    Request,
    VerifyRequest,
)

if TYPE_CHECKING:
    from engine.session import Engine

CANCELLED = 130
SIGNALS = (signal.SIGINT, signal.SIGTERM)
MOST_KEYS_SHOWN = 4  # of one reason; --json has them all
CEILING_WORDS = {"memory": "memory", "matrix": "16-bit matrix", "fp8": "FP8 matrix"}
KIND_WORDS = {
    "svdquant": "a network in 4 bits",
    "transformer": "a network in 16 bits",
    "lora": "a LoRA",
    "text_encoder": "a text encoder",
    "vae": "a VAE",
    "bundle": "a whole model",
    "unknown": "something else",
}
MAX_JOBS = 100_000
MAX_JOBS_BYTES = 64 * 2**20
# A job line may say what the flags say, by the same names.
IMAGE_FIELDS = (
    "prompt", "negative", "model", "width", "height", "steps", "seed", "count", "guidance", "cfg", "plan", "device",
    "threads", "noise", "out",
)  # fmt: skip


# --------------------------------------------------------------------------------------------- what was asked


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are problems like all others."""

    def error(self, message: str) -> NoReturn:
        raise bad_request(f"{message[:1].upper()}{message[1:]}.", f"See {self.prog} --help.")


def lora_choice(text: str) -> LoraChoice:
    """FILE or NAME, with :STRENGTH where the tail behind the last colon is a finite number."""
    head, colon, tail = text.rpartition(":")
    with contextlib.suppress(ValueError):
        strength = float(tail)
        if colon and math.isfinite(strength):
            return LoraChoice(head, strength)
    return LoraChoice(text)


def _kept_layer(text: str) -> tuple[str, str]:
    pattern, _, kind = text.rpartition("=")
    return pattern, kind


def _parser() -> _Parser:
    shared = _Parser(add_help=False)
    shared.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    parser = _Parser(prog="tonfa", description="Make pictures from 4-bit SVDQuant diffusion models.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser, metavar="COMMAND")

    def command(name: str, help_text: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=help_text, description=help_text, parents=[shared], allow_abbrev=False
        )

    generate = command("generate", "Make pictures from a prompt.")
    generate.add_argument("--prompt", metavar="TEXT", help="what to see")
    generate.add_argument("--out", metavar="FILE.png", help="the picture to write, or a folder for numbered ones")
    generate.add_argument("--model", metavar="NAME|PATH", help=f"a model's name or folder ({BUILT_IN_MODEL})")
    generate.add_argument(
        "--lora", metavar="FILE|NAME[:STRENGTH]", action="append", type=str, help="a LoRA; may be given again"
    )
    generate.add_argument("--negative", metavar="TEXT", help="what to leave out")
    generate.add_argument("--cfg", metavar="C", type=float, help="weight between two predictions; 1 = one")
    generate.add_argument("--guidance", metavar="G", type=float, help="the number a distilled network takes")
    generate.add_argument("--width", metavar="W", type=int, help="in pixels")
    generate.add_argument("--height", metavar="H", type=int, help="in pixels")
    generate.add_argument("--steps", metavar="N", type=int)
    generate.add_argument("--seed", metavar="N", type=int, help="0 if not given")
    generate.add_argument("--count", metavar="N", type=int, help="pictures, with seeds counted up")
    generate.add_argument("--plan", metavar="PLAN", help="auto, w4a4, w4a8, w4a16 or bf16")
    generate.add_argument("--device", metavar="D", help="auto, cpu or cuda:N")
    generate.add_argument("--threads", metavar="N", type=int, help="of the processor")
    generate.add_argument("--noise", metavar="KIND", help="philox, or torch as other programs")
    generate.add_argument("--recipe", metavar="FILE.png", help="take what is not given here from this picture")
    generate.add_argument("--jobs", metavar="FILE.jsonl", help="one request a line, by the names of these flags")

    inspect = command("inspect", "Say what a checkpoint, a LoRA or a model folder is.")
    inspect.add_argument("file", metavar="FILE")

    quantize = command("quantize", "Make a 4-bit checkpoint of a 16-bit one.")
    quantize.add_argument("source", metavar="SOURCE")
    quantize.add_argument("--out", metavar="FILE", required=True)
    quantize.add_argument("--precision", default="int4", metavar="int4|nvfp4")
    quantize.add_argument("--rank", type=int, default=32, metavar="R")
    quantize.add_argument("--rounding", default="gptq", metavar="nearest|gptq")
    quantize.add_argument("--no-smooth", action="store_true")
    quantize.add_argument("--prompts", default="", metavar="FILE", help="calibration prompts, one a line")
    quantize.add_argument("--keep", action="append", default=[], metavar="PATTERN=bf16|int8")
    quantize.add_argument("--device", default="auto", metavar="D")
    quantize.add_argument("--seed", type=int, default=0, metavar="N")

    verify = command("verify", "Make the picture of a recipe again and compare bytes.")
    verify.add_argument("file", metavar="FILE.png")
    verify.add_argument("--model", metavar="NAME|PATH", help="where the model is, if not in a models folder")

    bench = command("bench", "Measure the graphics card's kernels beside torch's.")
    bench.add_argument("--shapes", default="flux", metavar="flux|mini", help="sizes of which network")
    bench.add_argument("--step", action="store_true", help="a whole denoising step, too")
    bench.add_argument("--device", default="auto", metavar="D")

    command("doctor", "Say what this computer is, what it can run and what is missing.")
    return parser


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of an image request that flags name."""
    found = {name: getattr(options, name) for name in IMAGE_FIELDS if getattr(options, name) is not None}
    if options.lora is not None:
        found["loras"] = tuple(lora_choice(text) for text in options.lora)
    return found


def _recipe_fields(file: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a picture tells of its making, `fields` first; its LoRAs are looked for by their bytes."""
    from engine import recipe

    path = named_path(file)
    texts = recipe.read_png(path)[1]
    if recipe.JSON_KEY in texts:
        from engine.pipelines.verify_picture import recipe_fields

        return recipe_fields(recipe.recipe_of(texts, path.name), path.name, fields)
    return {**recipe.settings_of(texts, path.name), **fields}


def image_requests(options: argparse.Namespace) -> list[ImageRequest]:
    """One request, or those of a --jobs file. Raises ProblemError naming the line that is wrong."""
    fields = _given(options)
    if options.recipe:
        fields = _recipe_fields(options.recipe, fields)
    if not options.jobs:
        if "prompt" not in fields:
            raise bad_request("No prompt is given.", "Add --prompt TEXT.")
        return [_with_out(ImageRequest(**fields, previews=False))]
    requests = []
    for number, line in enumerate(_job_lines(named_path(options.jobs)), start=1):
        if not line.strip():
            continue
        try:
            requests.append(_with_out(_job_request(line, fields)))
        except ProblemError as error:
            problem = error.problem
            raise ProblemError(replace(problem, what=f"Line {number} of the jobs: {problem.what}")) from None
        if len(requests) > MAX_JOBS:
            raise bad_request(f"The jobs file has more than {MAX_JOBS} jobs.", "Split it.")
    if not requests:
        raise bad_request("The jobs file has no job in it.", "Write one JSON object a line.")
    return requests


def _with_out(request: ImageRequest) -> ImageRequest:
    if not request.out:
        raise bad_request("There is no file to write the picture to.", "Add --out FILE.png.")
    return request


def _job_lines(path: Path) -> list[str]:
    try:
        check_regular(path)
        if path.stat().st_size > MAX_JOBS_BYTES:
            raise bad_file(f"{path.name} is larger than 64 MB.", "Split it.")
        return path.read_text("utf-8-sig").split("\n")  # splitlines() also splits where a JSON text may go on
    except OSError as error:
        raise bad_file(f"{path.name} cannot be read.", "Check the name.", str(error)) from None
    except UnicodeDecodeError as error:
        raise bad_file(f"{path.name} is not UTF-8 text.", "Save it as UTF-8.", str(error)) from None


def _job_request(line: str, defaults: Mapping[str, Any]) -> ImageRequest:
    from engine.safe_json import parse_json

    content = parse_json(line, "It")
    if not isinstance(content, dict):
        raise bad_file("It is not a JSON object.", 'Write {"prompt": "...", "out": "..."}.')
    unknown = content.keys() - {*IMAGE_FIELDS, "lora"}
    if unknown:
        raise bad_request(f"There is no field {min(unknown)!r}.", f"Use {', '.join((*IMAGE_FIELDS, 'lora'))}.")
    fields = {**defaults, **{name: value for name, value in content.items() if name != "lora"}}
    for name in ("prompt", "negative", "model", "plan", "device", "noise", "out"):
        if name in fields and not isinstance(fields[name], str):
            raise bad_request(f"{name} must be text.", "Put it into quotes.")
    if "lora" in content:
        loras = content["lora"] if isinstance(content["lora"], list) else [content["lora"]]
        if not all(isinstance(text, str) for text in loras):
            raise bad_request("lora must be a text or a list of texts.", 'Write "FILE:STRENGTH".')
        fields["loras"] = tuple(lora_choice(text) for text in loras)
    if "prompt" not in fields:
        raise bad_request("It has no prompt.", 'Add "prompt".')
    return ImageRequest(**fields, previews=False)


def requests_of(options: argparse.Namespace) -> list[Request]:
    match options.command:
        case "generate":
            return list(image_requests(options))
        case "inspect":
            return [InspectRequest(options.file)]
        case "verify":
            return [VerifyRequest(options.file, options.model or "")]
        case "doctor":
            return [DoctorRequest()]
        case "bench":
            return [BenchRequest(options.shapes, options.step, options.device)]
        case _:
            return [
                QuantizeRequest(
                    source=options.source,
                    out=options.out,
                    precision=options.precision,
                    rank=options.rank,
                    rounding=options.rounding,
                    smooth=not options.no_smooth,
                    prompts=options.prompts,
                    keep=tuple(_kept_layer(text) for text in options.keep),
                    device=options.device,
                    seed=options.seed,
                )
            ]


def refuse_early(requests: Sequence[Request]) -> None:
    """Tell a mistake in a name before torch is imported, which takes seconds. Jobs fail one by one, later."""
    if len(requests) > 1:
        return
    match requests[0]:
        case QuantizeRequest(source, out):
            from engine.quantizer.result_file import result_file

            result_file(out)
            _check_there(source)
        case InspectRequest(file):
            _check_there(file)
        case request:
            from engine.pipelines.wishes import check_wish

            check_wish(request)


def _check_there(file: str) -> None:
    if not named_path(file).exists():
        raise bad_file(f"There is no file {file!r}.", "Check the name and the folder.")


# -------------------------------------------------------------------------------------------- what is told


class _Progress:
    """One line on standard error: rewritten in place on a terminal, else a line whenever the words change."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._in_place = stream.isatty()
        self._last = ""

    def say(self, words: str, detail: str = "") -> None:
        if self._in_place:
            self._stream.write(f"\r\x1b[K{words}{detail}")
        elif words != self._last:
            self._stream.write(f"{words}\n")
        self._last = words
        self._stream.flush()

    def line(self, words: str) -> None:
        """A line that stays."""
        self._stream.write(f"\r\x1b[K{words}\n" if self._in_place and self._last else f"{words}\n")
        self._last = ""
        self._stream.flush()

    def end(self) -> None:
        if self._in_place and self._last:
            self._stream.write("\n")
            self._stream.flush()


def _tell(event: Event, progress: _Progress) -> None:
    match event:
        case Loading(what, fraction):
            progress.say(what, f" {fraction:.0%}")
        case Notice(what):
            progress.line(what)
        case ImageStarted(image, images, seed):
            progress.say(f"Picture {image} of {images}", f", seed {seed}")
        case StepDone(image, images, step, steps, elapsed):
            progress.say(f"Picture {image} of {images}", f", step {step} of {steps}, {elapsed:.1f} s")
        case ImageDone(file=file, seconds=seconds) if file:  # without one it could not be saved, which is told next
            progress.line(f"{file} in {seconds:.1f} s")
        case QuantizeProgress(what, done, total, left):
            progress.say(what, f" {done} of {total}, about {left:.0f} s left")


def _human(command: str, result: Mapping[str, Any]) -> Iterator[str]:
    """The result without --json: paths for generate, short tables for the others."""
    match command:
        case "generate":
            yield from result["out"]
        case "verify":
            yield (
                "The bytes are the same."
                if result["same"]
                else (
                    f"{result['pixels_different']} pixels differ, by at most {result['largest_difference']} of 255."
                )
            )
        case "inspect":
            yield from _human_inspect(result)
        case "doctor":
            yield from _human_doctor(result)
        case "bench":
            yield from _human_bench(result)
        case _:
            yield str(result.get("out", ""))


def _human_inspect(result: Mapping[str, Any]) -> Iterator[str]:
    yield f"File         {result['file']}"
    family = f" of the family {result['family']}" if result["family"] else ""
    yield f"Is           {KIND_WORDS[result['kind']]}{family}"
    if result["precision"]:
        yield f"Numbers      {result['precision']}"
    if result["layers"]:
        ranks = ", ".join(f"rank {rank} in {count}" for rank, count in result["ranks"].items())
        yield f"Layers       {result['layers']}{f'; {ranks}' if ranks else ''}"
    yield f"Usable       {'yes' if result['usable'] else 'no'}{': ' if result['reason'] else ''}{result['reason']}"
    for plan, count in result["plans"].items():
        yield f"Runs {plan:<8}{count}: {', '.join(_layers_by(plan, result['plan_of_layer']))}"
    if result["keys_used"]:
        yield f"Tensors used {result['keys_used']}"
    reasons: dict[str, list[str]] = {}
    for one in result["keys_unused"]:
        reasons.setdefault(one["why"], []).append(one["key"])
    for why, keys in reasons.items():
        more = f" and {len(keys) - MOST_KEYS_SHOWN} more" if len(keys) > MOST_KEYS_SHOWN else ""
        yield f"Not used     {', '.join(keys[:MOST_KEYS_SHOWN])}{more}: {why}"


def _layers_by(plan: str, plans: Mapping[str, str]) -> list[str]:
    """Names of the layers that run by a plan, one with * for all blocks that agree."""
    groups: dict[str, list[str]] = {}
    for name in plans:
        groups.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(name)
    shown = []
    for pattern, names in groups.items():
        here = [name for name in names if plans[name] == plan]
        shown += [pattern] if len(here) == len(names) else here
    return shown


def _human_doctor(result: Mapping[str, Any]) -> Iterator[str]:
    cpu = result["cpu"]
    yield f"Tonfa        {__version__}, Python {platform.python_version()}, {platform.platform(terse=True)}"
    yield f"Processor    {cpu['name']}, {cpu['threads']} threads, {cpu['memory_bytes'] / 2**30:.1f} GB of memory"
    for gpu in result["gpus"]:
        free, memory = (f"{gpu[key] / 2**30:.1f}" for key in ("free_bytes", "memory_bytes"))
        yield f"Card         {gpu['name']} ({gpu['arch']}), {free} of {memory} GB free, driver {gpu['driver']}"
        yield f"             4-bit files run {gpu['plan_int4']} (int4) and {gpu['plan_nvfp4']} (nvfp4)"
    if not result["gpus"]:
        yield "Card         none"
    for card in list_models():
        yield f"Model        {card.name} {card.version}: {'cannot be used' if card.problem else card.folder}"
    for model in result["models"]:
        runs = ", ".join(f"{count} by {plan}" for plan, count in model["plans"].items())
        yield f"Layers       {model['name']}: {runs}"
    yield f"Pictures     {pictures()}"
    for index, folder in enumerate(folder for folder in models_folders() if folder != assets()):
        yield f"{'' if index else 'Your models':<13}{folder}"
    yield f"Caches       {cache()}"
    for one in result["problems"]:
        yield f"- {one['what']} {one['todo']}"
    if not result["problems"]:
        yield "Nothing is missing."


def _human_bench(result: Mapping[str, Any]) -> Iterator[str]:
    """A Markdown table, as docs/measured has them."""
    copy, matrix, fp8 = (
        result["ceilings"][name] for name in ("copy_bytes_per_second", "matrix_flops", "fp8_flops")
    )
    yield (
        f"{result['card']} ({result['arch']}), torch {result['torch']}; copies {copy / 1e12:.2f} TB/s, multiplies "
        f"{matrix / 1e12:.0f} TFLOP/s in 16 bit{f', {fp8 / 1e12:.0f} in FP8' if fp8 else ''}; "
        f"plan {result['plan']}; medians in microseconds"
    )
    yield ""
    yield "| operation | shape | ours | torch 16-bit | torch FP8 | of the ceiling |"
    yield "|---|---|---|---|---|---|"
    for one in result["kernels"]:
        beside = ("" if us is None else f"{us:.1f}" for us in (one["torch_us"], one["fp8_us"]))
        cells = [one["operation"], one["shape"], f"{one['us']:.1f}", *beside]
        yield f"| {' | '.join(cells)} | {one['ceiling']:.0%} of {CEILING_WORDS[one['bound']]} |"
    if result["steps"]:
        yield ""
        yield "| one denoising step | ms | weights GiB |"
        yield "|---|---|---|"
    for one in result["steps"]:
        yield f"| {one['what']} | {one['ms']:.2f} | {one['weights_bytes'] / 2**30:.2f} |"


# ------------------------------------------------------------------------------------------------- what is done


@dataclass(frozen=True, slots=True)
class _Outcome:
    """How one request ended."""

    exit_code: int
    json: dict[str, Any]


def _outcome(final: Final, command: str) -> _Outcome:
    match final:
        case Finished(result):
            return _Outcome(_verified(result) if command == "verify" else 0, dict(result))
        case Cancelled():
            return _Outcome(CANCELLED, {"error": {"what": "Stopped.", "todo": "Start it again when you like."}})
        case Failed(problem):
            return _failure(problem)


def _verified(result: Mapping[str, Any]) -> int:
    """Other bytes on another machine are the machine's; on the very same one the file is not what it was."""
    if result["same"]:
        return 0
    return 3 if result["differs"] else 2


def _failure(problem: Problem) -> _Outcome:
    return _Outcome(EXIT_CODE[problem.kind], {"error": {"what": problem.what, "todo": problem.todo}})


def _run_all(
    engine: Engine, requests: Sequence[Request], command: str, progress: _Progress, interrupt: _Interrupt
) -> list[_Outcome]:
    """Run every request; a failed one does not stop those behind it, a cancelled one and a lost card do."""
    outcomes: list[_Outcome] = []
    for job, request in enumerate(requests, start=1):
        interrupt.cancels(lambda job=job: engine.cancel(job))  # type: ignore[misc]
        for event in engine.run(job, request):
            if isinstance(event, Final):
                outcomes.append(_outcome(event, command))
                if isinstance(event, Failed):
                    progress.line(str(event.problem))
                    if event.problem.detail and (event.ends_engine or EXIT_CODE[event.problem.kind] == 1):
                        progress.line(event.problem.detail)
            else:
                _tell(event, progress)
        if outcomes[-1].exit_code == CANCELLED:
            progress.line("Stopped.")
            break
        if isinstance(event, Failed) and event.ends_engine:
            break
    return outcomes


class _Interrupt:
    """Ctrl-C and a polite kill. The first one cancels the running job, which ends as cancelled jobs do.

    Before there is an engine (torch is being imported), and when asked a second time, the process ends at once:
    with its words, its JSON object and no temporary file left.
    """

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._cancel: Callable[[], None] | None = None
        self._asked = False

    def __enter__(self) -> _Interrupt:
        self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, old in self._before.items():
            signal.signal(number, old)

    def cancels(self, cancel: Callable[[], None]) -> None:
        """What the first signal does from now on."""
        self._cancel = cancel
        if self._asked:
            cancel()

    def ignore(self) -> None:
        """From here on the result is told, once and whole."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._cancel is not None and not self._asked:
            self._asked = True
            self._cancel()
            return
        discard_unfinished()
        with contextlib.suppress(OSError):  # os.write: a stream that is being written to takes no second writer
            os.write(2, b"\nStopped.\n")
            if self._as_json:
                os.write(1, json.dumps(_outcome(Cancelled(), "").json).encode() + b"\n")
        os._exit(CANCELLED)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    with _Interrupt(as_json="--json" in words) as interrupt:
        return _main(words, interrupt)


def _main(words: list[str], interrupt: _Interrupt) -> int:
    as_json = "--json" in words
    progress = _Progress(sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        options = _parser().parse_args(words)
        requests = requests_of(options)
        refuse_early(requests)
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch comes; engine/host.py says why
        from engine.session import Engine

        outcomes = _run_all(Engine(), requests, options.command, progress, interrupt)
        interrupt.ignore()
        progress.end()
        result = _joined(options, outcomes)
        if not as_json:
            for outcome in outcomes:
                if "error" not in outcome.json:
                    print(*_human(options.command, outcome.json), sep="\n")
    except ProblemError as error:
        progress.line(str(error.problem))
        result = _failure(error.problem)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whoever read our output is gone: nothing to say any more
        return 1
    except Exception as error:
        problem = internal_error(repr(error))
        progress.line(f"{problem} {problem.detail}")
        result = _failure(problem)
    interrupt.ignore()
    if as_json:
        print(json.dumps(result.json))
    return result.exit_code


def _joined(options: argparse.Namespace, outcomes: Sequence[_Outcome]) -> _Outcome:
    """One object for everything: the result itself, or with --jobs a list of them.

    The code of jobs is 130 if they were stopped, else the first failure's.
    """
    if getattr(options, "jobs", None) is None:
        return outcomes[0]
    codes = [outcome.exit_code for outcome in outcomes]
    code = CANCELLED if CANCELLED in codes else next(filter(None, codes), 0)
    return _Outcome(code, {"jobs": [outcome.json for outcome in outcomes]})


if __name__ == "__main__":
    sys.exit(main())
